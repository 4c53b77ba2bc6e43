"""CTranslate2: as many workers as threads, each with one thread, small batches; a common beginning as its static prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol import Generate, Workload, serve


def load(settings: dict[str, Any]) -> tuple[str, Any, Generate]:
    import ctranslate2

    directory = Path(settings["scratch"]) / f"ctranslate2-{settings['format']}"
    if not (directory / "model.bin").is_file():
        convert(Path(settings["model"]), directory, settings["format"])
    generator = ctranslate2.Generator(
        str(directory), compute_type=settings["format"], inter_threads=settings["threads"], intra_threads=1
    )

    def generate(workload: Workload) -> list[list[list[int]]]:
        ctranslate2.set_random_seed(workload["seed"] % 2**31)
        prompts = [[str(token) for token in prompt] for prompt in workload["prompts"]]
        shared = workload["shared"] if len(prompts) > 1 else 0
        sampling = workload["temperature"] > 0
        results = generator.generate_batch(
            [prompt[shared:] for prompt in prompts],
            static_prompt=prompts[0][:shared] or None,
            include_prompt_in_result=False,
            max_batch_size=BATCH[settings["format"]],
            num_hypotheses=workload["n"],
            min_length=workload["max_tokens"],
            max_length=workload["max_tokens"],
            sampling_topk=0 if sampling else 1,
            sampling_topp=workload["top_p"] if sampling else 1,
            sampling_temperature=workload["temperature"] if sampling else 1,
        )
        return [[list(ids) for ids in result.sequences_ids] for result in results]

    return ctranslate2.__version__, lambda: None, generate


BATCH = {"float32": 4, "int8": 2}  # prompts at a time, the fastest of 1, 2, 4 and 8 over sampling and judging


def convert(directory: Path, target: Path, form: str) -> None:
    """A Hugging Face directory as CTranslate2's, its vocabulary the ids as words."""
    import numpy as np
    from ctranslate2.specs import common_spec, transformer_spec
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors.update(load_file(shard))
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config.get("rope_theta", 10000.0),
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = tensors["model.norm.weight"]
    decoder.projection.weight = tensors["lm_head.weight"]
    for number, layer in enumerate(decoder.layer):
        part = {name: tensors[f"model.layers.{number}.{name}.weight"] for name in PARTS}
        layer.self_attention.layer_norm.gamma = part["input_layernorm"]
        layer.self_attention.linear[0].weight = np.concatenate([part[f"self_attn.{name}_proj"] for name in "qkv"])
        layer.self_attention.linear[1].weight = part["self_attn.o_proj"]
        layer.ffn.layer_norm.gamma = part["post_attention_layernorm"]
        layer.ffn.linear_0.weight = part["mlp.gate_proj"]
        layer.ffn.linear_0_noact.weight = part["mlp.up_proj"]
        layer.ffn.linear_1.weight = part["mlp.down_proj"]
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "1", "2", "0"
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.validate()
    spec.optimize(quantization=None if form == "float32" else form)
    target.mkdir(parents=True, exist_ok=True)
    spec.save(str(target))


PARTS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)


if __name__ == "__main__":
    serve(load)
