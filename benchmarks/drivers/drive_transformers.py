"""transformers: a common beginning and every prompt computed once into a cache, copied to the candidates, then `generate`."""

from __future__ import annotations

from typing import Any

from protocol import Generate, Workload, serve


def load(settings: dict[str, Any]) -> tuple[str, Any, Generate]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["format"])
    ).eval()

    @torch.inference_mode()
    def generate(workload: Workload) -> list[list[list[int]]]:
        prompts = torch.tensor(workload["prompts"])
        rows, length = prompts.shape
        torch.manual_seed(workload["seed"])
        cache = transformers.DynamicCache(config=model.config)
        shared = workload["shared"] if rows > 1 else 0
        if shared:
            model(prompts[:1, :shared], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(rows)
        model(prompts[:, shared:-1], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(workload["n"])
        room = transformers.StaticCache(config=model.config, max_cache_len=length + workload["max_tokens"])
        for number, layer in enumerate(cache.layers):  # written in place, where a growing cache is copied every step
            room.update(layer.keys, layer.values, number)
        sampling = workload["temperature"] > 0
        ids = model.generate(
            prompts.repeat_interleave(workload["n"], dim=0),
            attention_mask=torch.ones(rows * workload["n"], length, dtype=torch.int64),
            past_key_values=room,
            disable_compile=True,
            do_sample=sampling,
            temperature=workload["temperature"] if sampling else None,
            top_p=workload["top_p"] if sampling else None,
            top_k=0 if sampling else None,
            min_new_tokens=workload["max_tokens"],
            max_new_tokens=workload["max_tokens"],
            pad_token_id=0,
        )
        return ids[:, length:].view(rows, workload["n"], -1).tolist()

    return transformers.__version__, lambda: None, generate


if __name__ == "__main__":
    serve(load)
