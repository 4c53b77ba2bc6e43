"""llama.cpp through its C API: every sequence in a KV stream of its own, with flash attention and keys and values in f16.

A common beginning is decoded once and copied to the prompts, a prompt once and copied to its candidates.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protocol import Generate, Workload, serve


def load(settings: dict[str, Any]) -> tuple[str, Any, Generate]:
    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    file = Path(settings["scratch"]) / f"llamacpp-{settings['format']}.gguf"
    if not file.is_file():
        convert(Path(settings["model"]), file, settings["format"])
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp could not load {file}"
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    pool = ThreadPoolExecutor(settings["threads"])
    contexts: dict[tuple[int, int], Any] = {}
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def context_for(sequences: int, tokens: int) -> Any:
        if (sequences, tokens) not in contexts:
            for context in contexts.values():
                llama_cpp.llama_free(context)
            contexts.clear()
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * tokens, sequences
            params.n_batch = params.n_ubatch = BATCH
            params.n_threads = params.n_threads_batch = settings["threads"]
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.kv_unified = False
            contexts[sequences, tokens] = llama_cpp.llama_init_from_model(model, params)
            assert contexts[sequences, tokens], "llama.cpp made no context"
        return contexts[sequences, tokens]

    def decode(context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted), at most BATCH."""
        batch.n_tokens = len(rows)
        for number, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = wanted
        status = llama_cpp.llama_decode(context, batch)
        assert status == 0, f"llama_decode returned {status}"

    def sampler(workload: Workload, seed: int) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if workload["temperature"] == 0:
            steps = [llama_cpp.llama_sampler_init_greedy()]
        else:
            steps = [
                llama_cpp.llama_sampler_init_temp(workload["temperature"]),
                llama_cpp.llama_sampler_init_top_p(workload["top_p"], 1),
                llama_cpp.llama_sampler_init_dist(seed),
            ]
        for step in steps:
            llama_cpp.llama_sampler_chain_add(chain, step)
        return chain

    def generate(workload: Workload) -> list[list[list[int]]]:
        prompts, n, shared = workload["prompts"], workload["n"], workload["shared"]
        longest = max(map(len, prompts)) + workload["max_tokens"]
        sequences = len(prompts) * n
        context = context_for(sequences, -(-longest // 256) * 256)  # llama.cpp rounds a stream up to 256 cells
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, False)

        shared = shared if len(prompts) > 1 else 0
        if shared:
            decode(context, [(token, at, 0, False) for at, token in enumerate(prompts[0][:shared])])
            for number in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, number * n, -1, -1)
        first_logits = {}
        whole = max(1, BATCH // (max(map(len, prompts)) - shared))  # prompts in a batch
        for begin in range(0, len(prompts), whole):
            together = range(begin, min(begin + whole, len(prompts)))
            rows = [
                (token, at, number * n, at + 1 == len(prompts[number]))
                for number in together
                for at, token in enumerate(prompts[number])
                if at >= shared
            ]
            for part in range(0, len(rows), BATCH):
                decode(context, rows[part : part + BATCH])
            ends = [at for at, row in enumerate(rows) if row[3]]
            for number, end in zip(together, ends, strict=True):
                logits = llama_cpp.llama_get_logits_ith(context, end % BATCH)
                first_logits[number] = np.ctypeslib.as_array(logits, (vocab,)).copy()
        for number in range(len(prompts)):
            for candidate in range(1, n):
                llama_cpp.llama_memory_seq_cp(memory, number * n, number * n + candidate, -1, -1)

        samplers = [sampler(workload, workload["seed"] % 2**31 + number) for number in range(sequences)]
        tokens: list[list[int]] = [[] for _ in range(sequences)]
        for step in range(workload["max_tokens"]):
            if step == 0:
                for sequence in range(sequences):
                    tokens[sequence].append(draw(llama_cpp, samplers[sequence], first_logits[sequence // n]))
                continue
            rows = [
                (tokens[sequence][-1], len(prompts[sequence // n]) + step - 1, sequence, True)
                for sequence in range(sequences)
            ]
            decode(context, rows)
            drawn = pool.map(lambda s: llama_cpp.llama_sampler_sample(samplers[s], context, s), range(sequences))
            for sequence, token in enumerate(drawn):
                tokens[sequence].append(token)
        for chain in samplers:
            llama_cpp.llama_sampler_free(chain)
        return [tokens[number * n : (number + 1) * n] for number in range(len(prompts))]

    generate.silent = silent  # type: ignore[attr-defined]  # llama.cpp calls it as long as it lives
    return llama_cpp.__version__, lambda: None, generate


BATCH = 512


def draw(llama_cpp: Any, chain: Any, logits: Any) -> int:
    """One token from a row of logits that is not the context's last."""
    candidates = (llama_cpp.llama_token_data * len(logits))()
    import numpy as np

    view = np.frombuffer(candidates, dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])
    view["id"], view["logit"], view["p"] = np.arange(len(logits)), logits, 0
    array = llama_cpp.llama_token_data_array(candidates, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(chain, array)
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token


def convert(directory: Path, file: Path, form: str) -> None:
    """A Hugging Face directory as GGUF without a vocabulary: prompts are ids."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[form]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for shard in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if ".q_proj." in name:
                tensor = interleaved(tensor, heads)
            elif ".k_proj." in name:
                tensor = interleaved(tensor, kv_heads)
            kept = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
            if kept == gguf.GGMLQuantizationType.F32:
                writer.add_tensor(gguf_name(name), tensor)
            else:
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Any, heads: int) -> Any:
    """llama.cpp rotates neighbours, Hugging Face the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).copy()


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, part = name.split(".", 3)
    parts = {
        "self_attn.q_proj.weight": "attn_q",
        "self_attn.k_proj.weight": "attn_k",
        "self_attn.v_proj.weight": "attn_v",
        "self_attn.o_proj.weight": "attn_output",
        "mlp.gate_proj.weight": "ffn_gate",
        "mlp.up_proj.weight": "ffn_up",
        "mlp.down_proj.weight": "ffn_down",
        "input_layernorm.weight": "attn_norm",
        "post_attention_layernorm.weight": "ffn_norm",
    }
    return f"blk.{layer}.{parts[part]}.weight"


if __name__ == "__main__":
    serve(load)
