"""Every CPU kernel beside torch and beside what this machine can do, in turns in one process.

A case is a few calls that are timed one after the other, again and again, and with them the probe of the machine's limit,
so that a slow minute hits all of them. Weights and pages are taken in turns from more memory than any last-level cache
holds: they are read as in a model, cold. What is printed are medians; a share is that of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import engine._C as _C
from benchmarks.limits import machine
from benchmarks.options import bad_target, bad_threads
from engine import ops
from engine.batch import Batch
from engine.kernels import linear as _linear
from engine.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from engine.kernels.rope_write import rope_write_reference
from engine.kernels.sample import sample_reference
from engine.kernels.swiglu import swiglu_reference
from engine.replay import Replay
from engine.sampling import Query, SamplingParams, draw_rules

COLD = 320 << 20  # bytes of arguments to go round in: ten times a large last-level cache
SHAPES = ((768, 2048), (4096, 4096), (4096, 11008), (768, 32000))  # depth, outputs
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
HEADS = ((12, 64), (32, 128))  # heads, head dim
PAGES = (torch.float32, torch.bfloat16)
BLOCK = 64
SETTLE = 0.01  # seconds: torch's threads wait for more work by spinning before they sleep, on a core that is wanted
SECONDS = 0.5  # of a case at least, and at least three turns


class Row(NamedTuple):
    """One call of a case. `work`: FLOPs where the limit is "fma", bytes where it is "read" or "copy". bars: the least
    "share" of the limit, or the least speed beside another call, by its name."""

    kernel: str
    call: str
    limit: str
    work: float
    beside: Sequence[str] = ()
    bars: Mapping[str, float] = MappingProxyType({})


class Case(NamedTuple):
    shape: str
    batch: int
    calls: Mapping[str, Callable[..., Any]]  # each with the number of the turn
    rows: list[Row]
    repeats: Mapping[str, int] = MappingProxyType({})  # how many calls of its kernel one of these makes, if not one


class Probes:
    """The limits, in FLOPs or bytes a second: multiply-adds in registers, reads, copies (both directions counted)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.memory = np.ones(COLD // 4, dtype=np.float32)
        self.target = np.ones_like(self.memory)

    def rate(self, limit: str) -> float:
        if limit == "fma":
            return _C.probe_fma(1_000_000, self.threads) * 1e9  # 1.3 ms: a sleeping thread takes 0.1 to join
        if limit == "read":
            return _C.probe_read(self.memory, self.threads) * 1e9
        started = time.perf_counter()
        torch.from_numpy(self.target).copy_(torch.from_numpy(self.memory))
        return 2 * self.memory.nbytes / (time.perf_counter() - started)


def measure(threads: int, parts: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows as they come, of some of PARTS (none named: of all)."""
    probes = Probes(threads)
    for part in parts or PARTS:
        for case in PARTS[part](threads):
            yield from _run(case, probes)


def _run(case: Case, probes: Probes) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in case.calls}
    rates: dict[str, list[float]] = {row.limit: [] for row in case.rows}
    for call in case.calls.values():
        call(0)
    first = next(iter(case.calls.values()))
    began = time.perf_counter()
    for turn in itertools.count(1):
        for name, call in case.calls.items():
            started = time.perf_counter()
            call(turn)
            seconds[name].append((time.perf_counter() - started) / case.repeats.get(name, 1))
            if name == "torch" and probes.threads > 1:
                time.sleep(SETTLE)
                probes.rate("fma")  # what comes next does not begin on cores that slept
                first(turn + 7)
        if turn % 2 and turn < 18:
            for limit, found in rates.items():
                found.append(probes.rate(limit))
        if turn >= 3 and time.perf_counter() - began > SECONDS:
            break
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for row in case.rows:
        own = middle[row.call]
        measured = {
            "share": row.work / own / statistics.median(rates[row.limit]),
            **{name: middle[name] / own for name in row.beside},
        }
        low, high = np.quantile(seconds[row.call], (0.2, 0.8))
        yield {
            "kernel": row.kernel,
            "shape": case.shape,
            "batch": case.batch,
            "microseconds": own * 1e6,
            "low_high": [low * 1e6, high * 1e6],
            "limit": row.limit,
            "share": measured["share"],
            "times_as_fast_as": {name: measured[name] for name in row.beside},
            "missed": [f"{name} {measured[name]:.2f} < {bar:.2f}" for name, bar in row.bars.items() if measured[name] < bar],
        }  # fmt: skip


def _linear_cases(threads: int) -> Iterator[Case]:
    levels = _C.linear_bf16_levels()
    widened = next(level for level in levels if "bf16" not in level)  # the fastest that has no dot instruction
    for depth, outputs in SHAPES:
        count = max(2, COLD // (4 * depth * outputs))
        plain = [torch.randn(outputs, depth) * 0.02 for _ in range(count)]
        fp32 = [ops.pack_linear(weight) for weight in plain]
        bf16 = [ops.pack_linear(plain[i % count].bfloat16()) for i in range(2 * count)]
        int8 = [ops.pack_linear(plain[i % count], "int8") for i in range(4 * count)]
        for rows in ROWS:
            x = torch.randn(rows, depth)
            out = torch.empty(rows, outputs)

            def widen(turn: int, x: torch.Tensor = x, out: torch.Tensor = out, bf16: list[Any] = bf16) -> None:
                _C.linear_bf16(
                    x.numpy(), bf16[(turn + len(bf16) // 2) % len(bf16)].panels, out.numpy(), threads, widened
                )

            calls: dict[str, Callable[[int], Any]] = {
                "fp32": partial(_product, x, fp32, threads),
                "bf16": partial(_product, x, bf16, threads),
                "widened": widen,
                "int8": partial(_product, x, int8, threads),
                "torch": partial(_torch_product, x, plain),
            }
            flops, few = _linear.flops(rows, outputs, depth), rows <= 4

            def row(call: str, weights: list[Any], beside: Sequence[str], bars: dict[str, float]) -> Row:
                limit, work = ("read", weights[0].bytes()) if few else ("fma", flops)  # noqa: B023
                return Row(f"linear {call}", call, limit, work, beside, bars)

            dot = len(levels) > 1 and levels[0] != widened
            yield Case(
                f"{depth} x {outputs}",
                rows,
                calls,
                [
                    row("fp32", fp32, ["torch"], _bar(rows, share={1: 0.93, 32: 0.7, 64: 0.7, 512: 0.82})),
                    row("bf16", bf16, ["fp32"], _bar(rows, share={1: 0.93}, fp32={n: 1.4 for n in ROWS if dot and n >= 32})),
                    row("widened", bf16, ["fp32"], _bar(rows, fp32={64: 1 / 1.3})),
                    row("int8", int8, ["fp32"], _bar(rows, fp32={n: 2.5 if n == 512 else 2.0 for n in ROWS if n >= 16})),
                ],
            )  # fmt: skip


def _product(x: torch.Tensor, weights: Sequence[ops.PackedWeight], threads: int, turn: int) -> None:
    ops.linear(x, weights[turn % len(weights)], threads)


def _torch_product(x: torch.Tensor, weights: Sequence[torch.Tensor], turn: int) -> None:
    F.linear(x, weights[turn % len(weights)])


def _bar(rows: int, **bars: dict[int, float]) -> dict[str, float]:
    return {name: least[rows] for name, least in bars.items() if rows in least}


def _attention_cases(threads: int) -> Iterator[Case]:
    for (heads, dim), batch, dtype in itertools.product(HEADS, (1, 32), PAGES):
        yield _attention_case(heads, dim, batch, dtype, threads)


def _attention_case(heads: int, dim: int, batch: int, dtype: torch.dtype, threads: int) -> Case:
    """Decoding: one row of every sequence, each with pages of its own, which lie anywhere."""
    context, chunks = 2048, 2048 // BLOCK
    block_bytes = 2 * heads * dim * BLOCK * dtype.itemsize
    sets = max(1, COLD // (batch * chunks * block_bytes))
    order = torch.randperm(sets * batch * chunks).view(sets, batch, chunks)
    keys = torch.randn(order.numel(), heads, dim, BLOCK).to(dtype)
    values = torch.randn(order.numel(), heads, BLOCK, dim).to(dtype)
    places = itertools.product(range(batch), range(chunks))
    run = torch.tensor([[chunk, row, row + 1] for row, chunk in places])
    items = [torch.cat([pages.view(-1, 1), run], dim=1) for pages in order]
    positions = torch.full((batch,), context - 1)
    q = torch.randn(batch, heads, dim)

    def paged(turn: int) -> None:
        ops.chunk_attention(q, keys, values, items[turn % sets], positions, threads)

    def gathered(turn: int) -> None:
        index = order[turn % sets]  # [batch, chunks]
        k = keys[index].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [batch, heads, context, dim]
        v = values[index].transpose(1, 2).flatten(2, 3)
        F.scaled_dot_product_attention(q[:, :, None].to(dtype), k, v)

    name = "fp32" if dtype == torch.float32 else "bf16"
    row = Row(f"attention {name}", "own", "read", batch * chunks * block_bytes, ["torch"], {"share": 1 / 1.5})
    return Case(f"{heads} heads x {dim}, {context} tokens", batch, {"own": paged, "torch": gathered}, [row])


def _small_cases(threads: int) -> Iterator[Case]:
    """What only moves memory: arguments in turns from more of it than a cache holds."""
    for batch, dim in ((32, 768), (512, 768), (512, 4096)):
        yield from _row_cases(batch, dim, threads)
        yield _rope_write_case(batch, dim, threads)


def _row_cases(batch: int, dim: int, threads: int) -> Iterator[Case]:
    """Ours as a step makes them, one after the other in a replay: a call from Python takes 5 microseconds more."""
    sets, size = max(2, COLD // (16 * batch * dim)), 4 * batch * dim
    pairs = [torch.randn(2, batch, dim) for _ in range(sets)]
    weight, ids = torch.ones(dim), torch.zeros(batch, dtype=torch.int64)
    step = Batch.empty()._replace(positions=ids, slots=ids)

    def case(name: str, moved: int, own: Callable[..., Any], torchs: Callable[..., Any], *given: Any) -> Case:
        arguments = [_small_arguments(name, pair) for pair in pairs]
        replay = Replay(lambda *_: [own(*some, *given, threads) for some in arguments][-1], batch, pairs)
        calls = {
            "own": lambda turn: replay(ids, step, threads),
            "torch": lambda turn: torchs(*arguments[turn % sets], *given),
        }
        row = Row(name, "own", "copy", moved, ["torch"], {"share": 1 / 1.5})
        return Case(f"{dim}", batch, calls, [row], {"own": sets})

    yield case("rms_norm", 2 * size, ops.rms_norm_rows, rms_norm_reference, weight, 1e-5)
    yield case(
        "add_rms_norm", 4 * size, lambda *given: ops.add_rms_norm_rows(*given)[1], add_rms_norm_reference, weight, 1e-5
    )
    yield case("swiglu", 3 * size, ops.swiglu_rows, swiglu_reference)


def _small_arguments(name: str, pair: torch.Tensor) -> list[torch.Tensor]:
    if name == "swiglu":
        return [pair.view(pair.shape[1], -1)]
    return [pair[0]] if name == "rms_norm" else [*pair]


def _rope_write_case(batch: int, dim: int, threads: int) -> Case:
    """Up to 32 rows: decoding, every row in a page of its own; more: a prompt, rows one after the other."""
    heads, head = dim // 64, 64
    blocks = max(2 * batch, COLD // (8 * BLOCK * dim))
    keys, values = torch.zeros(blocks, heads, head, BLOCK), torch.zeros(blocks, heads, BLOCK, head)
    qkv = torch.randn(batch, 3, heads, head)
    cos, sin = torch.randn(2, batch, head // 2)
    copies = torch.empty(0, 3, dtype=torch.int64)
    pages = torch.randperm(blocks)
    rows = torch.arange(batch)

    def slots(turn: int) -> torch.Tensor:
        if batch <= 32:
            return pages[(turn * batch + rows) % blocks] * BLOCK + turn % BLOCK
        return pages[(turn * -(-batch // BLOCK) + rows // BLOCK) % blocks] * BLOCK + rows % BLOCK

    def write(fn: Callable[..., Any], turn: int, *threads: int) -> None:
        q, k, v = qkv.unbind(1)
        fn(q, k, v, cos, sin, keys, values, slots(turn), copies, *threads)

    moved = 4 * batch * dim * 6  # q, k, v in; q, k, v out
    calls = {
        "own": lambda turn: write(ops.rope_write, turn, threads),
        "torch": lambda turn: write(rope_write_reference, turn),
    }
    bars = {"share": 1 / 1.5} if batch > 32 else {}  # decoding touches a line of 64 bytes for every 4 of a key
    return Case(f"{dim}", batch, calls, [Row("rope_write", "own", "copy", moved, ["torch"], bars)])


def _sample_cases(threads: int) -> Iterator[Case]:
    """A draw of 32,000 logits in a cache, beside reading them four times from memory."""
    batch, vocab = 64, 32000
    for kind, (temperature, top_p) in itertools.product(("flat", "peaked"), ((1.0, 1.0), (0.7, 0.9))):
        logits = torch.randn(batch, vocab) * 0.6
        if kind == "peaked":
            logits[:, :50] += torch.linspace(12, 6, 50)
        rules = _rules(batch, vocab, temperature, top_p)
        calls = {
            "own": lambda turn, logits=logits, rules=rules: ops.sample_rows(logits, rules, threads),
            "torch": lambda turn, logits=logits, rules=rules: sample_reference(logits, rules),
        }
        row = Row("sample", "own", "read", 4 * logits.nbytes, ["torch"])
        yield Case(f"{kind}, temperature {temperature}, top-p {top_p}", batch, calls, [row])


def _rules(batch: int, vocab: int, temperature: float, top_p: float) -> ops.DrawRules:
    params = SamplingParams(temperature=temperature, top_p=top_p)
    return draw_rules([Query(row, params, seed=row) for row in range(batch)], vocab)


PARTS: dict[str, Callable[[int], Iterator[Case]]] = {
    "linear": _linear_cases,
    "attention": _attention_cases,
    "rows": _small_cases,
    "sample": _sample_cases,
}


HEADER = """| kernel | shape | rows | microseconds | share of limit | times as fast as | below its bar |
|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """Of a Markdown table."""
    beside = ", ".join(f"{name} {value:.2f}" for name, value in row["times_as_fast_as"].items())
    return (
        f"| {row['kernel']} | {row['shape']} | {row['batch']} | {row['microseconds']:,.0f} "
        f"| {row['share']:.0%} of {row['limit']} | {beside} | {'; '.join(row['missed'])} |"
    )


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    problem = bad_threads(given.threads) or bad_target(given.json)
    if problem:
        parser.error(problem)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    found = machine()
    print(f"{found['cpu']}, {found['instructions']}, {found['threads']} threads\n")
    with torch.no_grad():
        rows = []
        print(HEADER)
        for row in measure(torch.get_num_threads(), given.parts):
            rows.append(row)
            print(line(row), flush=True)
    if given.json:
        command = " ".join(["python -m benchmarks kernels", *given.parts, f"--threads {torch.get_num_threads()}"])
        given.json.write_text(json.dumps({"command": command, "machine": found, "rows": rows}, indent=1) + "\n")
    return 0
