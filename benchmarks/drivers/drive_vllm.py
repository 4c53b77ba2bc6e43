"""vLLM in this process, with its prefix cache: a prompt's candidates and a common beginning find what was computed."""

from __future__ import annotations

from typing import Any

from protocol import Generate, Workload, serve


def load(settings: dict[str, Any]) -> tuple[str, Any, Generate]:
    import vllm

    llm = vllm.LLM(
        settings["model"],
        dtype=settings["format"],
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=32,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
    )

    def generate(workload: Workload) -> list[list[list[int]]]:
        params = vllm.SamplingParams(
            n=workload["n"],
            temperature=workload["temperature"],
            top_p=workload["top_p"],
            max_tokens=workload["max_tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in workload["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]

    return vllm.__version__, llm.reset_prefix_cache, generate


if __name__ == "__main__":
    serve(load)
