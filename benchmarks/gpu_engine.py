"""The engine end to end on a GPU, at Llama 2 7B's shape with random weights: decoding, prompts, the loop's two workloads with
each idea switched off, a training step, and transformers' continuous batching beside it. Driven by `benchmarks/gpu.py`."""

from __future__ import annotations

import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu_bench import Bench, Case
from benchmarks.models import product_flops
from benchmarks.workloads import Workload
from engine import LLM, PRESETS, DPOConfig, DPORow, Llama, LlamaConfig, SamplingParams, SFTConfig, SFTRow, train

TINY = LlamaConfig(64, 2, 4, 2, 16, 96, 512, 512)


def model_of(bench: Bench, layers: int = 32) -> Llama:
    config = TINY if bench.smoke else replace(PRESETS["7B"], n_layers=layers)
    with torch.device(bench.device):
        return Llama(config, dtype=bench.dtype, device=bench.device).init_weights()


def ids(rng: random.Random, count: int, config: LlamaConfig) -> list[int]:
    return [rng.randrange(3, config.vocab_size) for _ in range(count)]


def engine(model: Llama, bench: Bench) -> LLM:
    return LLM(model, kv_cache_gb=0.01 if bench.smoke else None)


def weight_bytes(model: Llama) -> int:
    """Of what a step reads: all but the embeddings."""
    return sum(p.nbytes for p in model.parameters()) - model.embed.nbytes


def seconds(run: Callable[[], Any], bench: Bench) -> float:
    bench.synchronize()
    began = time.perf_counter()
    run()
    bench.synchronize()
    return time.perf_counter() - began


def generate(llm: LLM, prompts: list[list[int]], new: int, n: int = 1) -> None:
    params = SamplingParams(n=n, temperature=0.7, max_tokens=new, ignore_eos=True, seed=1)
    for output in llm.generate(prompts, params):
        if [len(answer.token_ids) for answer in output.outputs] != [new] * n:
            raise AssertionError(f"request {output.index} has answers of other lengths than {new}")


def decoding(bench: Bench) -> Iterator[Case]:
    """A step's time from two lengths of the same answers; its floor reads the weights once and every context once."""
    model, rng = model_of(bench), random.Random(0)
    context, short, long = (20, 2, 6) if bench.smoke else (512, 32, 160)
    config = model.config
    token = 2 * model.embed.itemsize * config.n_layers * config.n_kv_heads * config.head_dim
    llm = engine(model, bench)
    for batch in (2,) if bench.smoke else (1, 32, 128, 256):
        if bench.over(f"decode step, batch {batch}"):
            break
        begin = context - (short + long) // 2  # the steps that are timed have this context on average
        generate(llm, [ids(rng, begin, config) for _ in range(batch)], short)  # captures the graphs
        times = []
        for _ in range(1 if bench.smoke else 3):
            prompts = [ids(rng, begin, config) for _ in range(batch)]
            llm.reset_prefix_cache()
            few = seconds(lambda prompts=prompts: generate(llm, prompts, short), bench)  # type: ignore[misc]
            llm.reset_prefix_cache()
            many = seconds(lambda prompts=prompts: generate(llm, prompts, long), bench)  # type: ignore[misc]
            times.append((many - few) / (long - short) * 1e3)
        moved, middle = weight_bytes(model) + batch * context * token, statistics.median(times)
        bench.write(
            "decode step",
            shape=f"batch {batch}, context {context}",
            ms=middle,
            ms_low_high=[min(times), max(times)],
            gbps=moved / middle * 1e-6,
            tflops=0.0,
            share_of_floor=moved / bench.bandwidth * 1e-6 / middle,
            tokens_per_second=batch / middle * 1e3,
            extra_memory=0,
        )
    yield from ()


def prompts(bench: Bench) -> Iterator[Case]:
    model, rng = model_of(bench), random.Random(0)
    llm, length = engine(model, bench), 20 if bench.smoke else 2048
    generate(llm, [ids(rng, length, model.config)], 1)
    times = []
    for _ in range(2 if bench.smoke else 5):
        llm.reset_prefix_cache()
        prompt = ids(rng, length, model.config)
        times.append(seconds(lambda prompt=prompt: generate(llm, [prompt], 1), bench) * 1e3)  # type: ignore[misc]
    config, middle = model.config, statistics.median(times)
    flops = weight_bytes(model) // model.embed.itemsize * 2 * length
    flops += 2 * config.n_layers * config.n_heads * config.head_dim * length * length
    bench.write(
        "prefill",
        shape=f"{length} tokens",
        ms=middle,
        ms_low_high=[min(times), max(times)],
        gbps=0.0,
        tflops=flops / middle * 1e-9,
        share_of_floor=flops / bench.rate * 1e-9 / middle,
        extra_memory=0,
    )
    yield from ()


def workload(name: str, bench: Bench, seed: int, config: LlamaConfig) -> Workload:
    """Sampling: 32 prompts of 512 tokens, 8 samples of 256 tokens. Judging: 48 prompts of 1,024 tokens, half of them one
    rubric, 3 draws of 64 tokens."""
    rng = random.Random(seed)
    if bench.smoke:
        count, shared, own, n, new = 2, 8, 6, 2, 3
    elif name == "sampling":
        count, shared, own, n, new = 32, 0, 512, 8, 256
    else:
        count, shared, own, n, new = 48, 512, 512, 3, 64
    rubric = ids(rng, shared, config)
    given = [[*rubric, *ids(rng, own, config)] for _ in range(count)]
    params = SamplingParams(n=n, temperature=0.7, top_p=0.9, max_tokens=new, ignore_eos=True, seed=seed)
    return Workload(name, given, [params] * count)


def without_graphs(llm: LLM) -> None:
    llm._runner.graphs = False  # type: ignore[union-attr]


def without_overlap(llm: LLM) -> None:
    llm._overlap = False


def without_groups(llm: LLM) -> None:
    llm._grouped = False


def as_it_is(llm: LLM) -> None:
    pass


VARIANTS = {"engine": as_it_is, "no graphs": without_graphs, "no overlap": without_overlap, "ungrouped": without_groups}


def timed(llm: LLM, work: Workload, bench: Bench) -> float:
    """Seconds for a workload, none of whose prompts is known."""
    llm.reset_prefix_cache()

    def run() -> None:
        for output, params in zip(llm.generate(work.prompts, work.params), work.params, strict=True):
            if [len(answer.token_ids) for answer in output.outputs] != [params.max_tokens] * params.n:
                raise AssertionError(f"request {output.index} has answers of other lengths than asked for")

    return seconds(run, bench)


def write_workload(bench: Bench, name: str, variant: str, work: Workload, spent: list[float], ratio: float) -> None:
    middle = statistics.median(spent)
    bench.write(
        name,
        shape=f"{variant}: {work.new_tokens / middle:.0f} new tokens/s, {ratio:.2f}x the time",
        ms=middle * 1e3,
        ms_low_high=[min(spent) * 1e3, max(spent) * 1e3],
        gbps=0.0,
        tflops=0.0,
        share_of_floor=0.0,
        new_tokens_per_second=work.new_tokens / middle,
        time_ratio=ratio,
        extra_memory=0,
    )


def workloads(bench: Bench) -> Iterator[Case]:
    """Each idea off, in turns."""
    model = model_of(bench)
    llm = engine(model, bench)
    usual = llm._overlap
    for name in ("sampling", "judging"):
        spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        timed(llm, workload(name, bench, 99, model.config), bench)  # captures the graphs
        for seed in range(1 if bench.smoke else 2):
            work = workload(name, bench, seed, model.config)
            for variant, change in VARIANTS.items():
                if bench.over(f"{name}, {variant}"):
                    return
                llm._overlap, llm._grouped = usual, True
                if hasattr(llm._runner, "graphs"):
                    llm._runner.graphs = True
                change(llm)
                spent[variant].append(timed(llm, work, bench))
        for variant, times in spent.items():
            ratio = statistics.median(t / own for t, own in zip(times, spent["engine"], strict=True))
            write_workload(bench, name, variant, work, times, ratio)
    yield from ()


def step_flops(model: Llama, tokens: int, targets: int) -> int:
    """Of the products with weights, forward and backward; the head runs for what is predicted alone."""
    return 3 * product_flops(model) * tokens + 6 * model.head.numel() * targets


def steps(bench: Bench) -> Iterator[Case]:
    """SFT and DPO steps of the whole model at 12 bytes a parameter, 81 GB; of its first 16 layers where that has no room."""
    room = torch.cuda.get_device_properties(bench.device).total_memory if bench.device.type == "cuda" else 0
    model, rng = model_of(bench, 32 if room > 110e9 else 16), random.Random(0)
    prompt, answer, rows = (6, 5, 2) if bench.smoke else (512, 256, 8)
    budget = 64 if bench.smoke else 2048
    sft = [SFTRow(ids(rng, prompt, model.config), ids(rng, answer, model.config)) for _ in range(3 * rows)]
    dpo = [
        DPORow(row.prompt, row.completion, ids(rng, answer, model.config), reference=(-9.0 * answer, -9.0 * answer))
        for row in sft
    ]
    options: dict[str, Any] = {"batch_size": rows, "max_pack_tokens": budget, "lr": 1e-6, "min_lr": 0.0}
    options["precision"] = "bf16-stochastic" if bench.dtype == torch.bfloat16 else "fp32"
    for name, given, config, answers in (
        ("SFT step", sft, SFTConfig(**options), rows),
        ("DPO step", dpo, DPOConfig(**options), 2 * rows),
    ):
        tokens = rows * prompt + answers * answer
        if bench.over(name):
            break
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ends: list[float] = []

        def at_step(step: int, of: int, metrics: dict[str, float], ends: list[float] = ends) -> None:
            bench.synchronize()
            ends.append(time.perf_counter())

        train(model, given, config, on_step=at_step)
        spent = [1e3 * (b - a) for a, b in pairwise(ends)]
        middle = statistics.median(spent)
        flops = step_flops(model, tokens, answers * answer)
        bench.write(
            name,
            shape=f"{model.config.n_layers} layers, {rows} rows, {tokens} tokens, {tokens / middle * 1e3:.0f} tokens/s",
            ms=middle,
            ms_low_high=[min(spent), max(spent)],
            gbps=0.0,
            tflops=flops / middle * 1e-9,
            share_of_floor=flops / bench.rate * 1e-9 / middle,
            extra_memory=torch.cuda.max_memory_allocated() - weight_bytes(model) if bench.device.type == "cuda" else 0,
        )
    yield from ()


def transformers(bench: Bench) -> Iterator[Case]:
    """transformers' continuous batching at its defaults for a GPU (graphs and asynchronous batches where it has them), its
    manager kept between calls, in turns with the engine. Random weights of its own, EOS ignored: what is compared is time
    for the same numbers of tokens. Both caches have room for all that the workload holds at once."""
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers import LlamaConfig as TheirConfig

    model = model_of(bench)
    config = model.config
    with torch.device(bench.device):
        theirs: Any = LlamaForCausalLM._from_config(
            TheirConfig(
                hidden_size=config.dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                intermediate_size=config.ffn_dim,
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_seq_len,
            ),
            attn_implementation="paged|sdpa",
            dtype=bench.dtype,
        )
    token = 2 * model.embed.itemsize * config.n_layers * config.n_kv_heads * config.head_dim
    llm = LLM(
        model, kv_cache_gb=0.01 if bench.smoke else 85_000 * token / 2**30
    )  # 256 answers of 256 tokens, 32 prompts
    known = inspect.signature(theirs.generate_batch).parameters
    kept = {"persistent_manager": True} if "persistent_manager" in known else {}

    def ask(work: Workload) -> None:
        first = work.params[0]
        options = GenerationConfig(
            max_new_tokens=first.max_tokens,
            num_return_sequences=first.n,
            do_sample=True,
            temperature=first.temperature,
            top_p=first.top_p,
            eos_token_id=-1,
            pad_token_id=0,
        )
        found = theirs.generate_batch(inputs=work.prompts, generation_config=options, **kept)
        if sum(len(output.generated_tokens) for output in found.values()) != work.new_tokens:
            raise AssertionError("transformers generated another number of tokens than asked for")

    for name in ("sampling", "judging"):
        spent: dict[str, list[float]] = {"engine": [], "transformers generate_batch": []}
        untimed = workload(name, bench, 99, config)
        timed(llm, untimed, bench)
        ask(untimed)
        for seed in range(1 if bench.smoke else 2):
            if bench.over(name):
                return
            work = workload(name, bench, seed, config)
            spent["engine"].append(timed(llm, work, bench))
            spent["transformers generate_batch"].append(seconds(lambda work=work: ask(work), bench))  # type: ignore[misc]
        for variant, times in spent.items():
            ratio = statistics.median(t / own for t, own in zip(times, spent["engine"], strict=True))
            write_workload(bench, name, variant, work, times, ratio)
    yield from ()


MAKERS: dict[str, list[Callable[[Bench], Iterator[Case]]]] = {
    "sampler": [decoding, prompts, workloads],
    "train": [steps],
    "peers": [transformers],
}
