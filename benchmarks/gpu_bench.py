"""The runner behind `python -m benchmarks.gpu`: limits, cases timed in turns, rows written as they come."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

MINUTES = 7
REPEATS = 20
L2 = 256 << 20  # bytes, more than any L2


class Case(NamedTuple):
    """One subject at one size. ours and the peers take nothing and return what they compute."""

    kernel: str
    shape: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    reference: Callable[[], Any] | None  # what `ours` must agree with; None: it was checked by whoever made the case
    bytes: int = 0
    flops: int = 0
    bound: float = 2e-2  # relative error of each result


class Bench:
    """Times cases and writes rows."""

    def __init__(self, part: str, smoke: bool, out: Path | None, minutes: float = MINUTES) -> None:
        self.part, self.smoke = part, smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.minutes, self.deadline = minutes, time.monotonic() + 60 * minutes
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.rows: list[dict[str, Any]] = []
        self._file = None
        if out is not None and not smoke:
            folder = out / next((kind for kind in ("h200", "h100", "a100") if kind in self.name.lower()), "gpu")
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{part}.jsonl"
            self._file = self._path.with_suffix(".part").open("w", encoding="utf-8")
        self._flush = torch.empty(1 << 10 if smoke else L2, dtype=torch.int8, device=self.device)
        self.bandwidth, self.rate = (1.0, 1.0) if smoke else self._limits()
        self.write("limits", gbps=self.bandwidth, tflops=self.rate)

    def _limits(self) -> tuple[float, float]:
        """GB/s of a copy, read and written, and TFLOP/s of a 16-bit product of random numbers."""
        source = torch.randn(1 << 28, device=self.device)  # 1 GB
        target = torch.empty_like(source)
        copy = self.time({"copy": lambda: target.copy_(source)})["copy"][1]
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=self.dtype) for _ in range(2))
        product = self.time({"product": lambda: a @ b})["product"][1]
        return 2 * source.nbytes / copy * 1e-6, 2 * 8192**3 / product * 1e-9

    def time(self, runs: dict[str, Callable[[], Any]], repeats: int | None = None) -> dict[str, tuple[float, ...]]:
        """20% quantile, median and 80% quantile of each in ms, run in turns."""
        repeats = 2 if self.smoke else repeats or REPEATS
        for _ in range(1 if self.smoke else 3):
            for run in runs.values():
                run()
        found: dict[str, list[Any]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                self._flush.zero_()
                found[name].append(self._once(run))
        self.synchronize()
        times = {
            name: [x if isinstance(x, float) else x[0].elapsed_time(x[1]) for x in given]
            for name, given in found.items()
        }
        return {name: _quantiles(given) for name, given in times.items()}

    def _once(self, run: Callable[[], Any]) -> Any:
        if self.device.type == "cpu":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        torch.cuda._sleep(2_000_000)  # a millisecond: the host is ahead of the device when the clock starts
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        run()
        events[1].record()
        return events

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, case: Case) -> None:
        """Check, time and write one case."""
        if case.reference is not None:
            for mine, exact in zip(_tensors(case.ours()), _tensors(case.reference()), strict=True):
                error = (mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
                if not error <= case.bound:
                    raise AssertionError(
                        f"{case.kernel} {case.shape}: relative error {error:.2g}, {case.bound} allowed"
                    )
        memory = {name: self._extra_memory(run) for name, run in {"ours": case.ours, **case.peers}.items()}
        times = self.time({"ours": case.ours, **case.peers})
        low, middle, high = times["ours"]
        floor = max(case.bytes / self.bandwidth * 1e-6, case.flops / self.rate * 1e-9)  # ms
        self.write(
            case.kernel,
            shape=case.shape,
            dtype=str(self.dtype)[6:],
            ms=middle,
            ms_low_high=[low, high],
            gbps=case.bytes / middle * 1e-6,
            tflops=case.flops / middle * 1e-9,
            share_of_floor=floor / middle,
            peers={name: {"ms": t[1], "speedup": t[1] / middle} for name, t in times.items() if name != "ours"},
            extra_memory=memory["ours"],
            extra_memory_of_peers={name: memory[name] for name in case.peers},
        )

    def _extra_memory(self, run: Callable[[], Any]) -> int:
        """Bytes at the most, besides what was there before and what is returned."""
        if self.device.type == "cpu":
            return 0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = sum(x.nbytes for x in _tensors(run()))
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before - returned

    def all(self, makers: list[Callable[[Bench], Iterator[Case]]]) -> None:
        """Every case of every maker, until the time is over; one that fails is a row, and the next is run."""
        for make in makers:
            gc.collect()  # the models of the maker before
            try:
                if self.over(make.__name__):
                    continue
                for case in make(self):
                    if self.over(case.kernel):
                        break
                    self.run(case)
            except Exception as error:
                if self.smoke:
                    raise
                self.write(make.__name__, failed=f"{type(error).__name__}: {error}"[:500])
        if self._file:  # what was there is replaced by a whole run only
            self._file.close()
            self._path.with_suffix(".part").replace(self._path)

    def over(self, what: str) -> bool:
        """Whether the time is; then a row says what was not begun."""
        if time.monotonic() <= self.deadline:
            return False
        self.write(what, skipped=f"{self.minutes:g} minutes are over")
        return True

    def write(self, kernel: str, **values: Any) -> None:
        row = {"part": self.part, "kernel": kernel, **values, "device": self.name, "versions": versions()}
        if self.smoke:
            row["smoke"] = True
        row["command"] = f"python -m benchmarks.gpu {self.part}"
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        print(_line(row), flush=True)

    @property
    def failed(self) -> bool:
        return any("failed" in row for row in self.rows)


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]


def _tensors(found: Any) -> list[torch.Tensor]:
    found = found if isinstance(found, (tuple, list)) else [found]
    return [x for x in found if isinstance(x, torch.Tensor)]


def _line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    if "failed" in row or "skipped" in row:
        return f"| {row['kernel']} | {row.get('failed') or row.get('skipped')} |"
    if row["kernel"] == "limits":
        limits = f"copy {row['gbps']:.0f} GB/s, products {row['tflops']:.0f} TFLOP/s"
        return (
            f"{row['device']}: {'a smoke run, its numbers mean nothing' if 'smoke' in row else limits}\n\n"
            "| kernel | shape | ms | GB/s | TFLOP/s | of floor | peers | extra MB |\n|---|---|---|---|---|---|---|---|"
        )
    peers = ", ".join(f"{name} {peer['speedup']:.2f}x" for name, peer in row.get("peers", {}).items())
    return (
        f"| {row['kernel']} | {row['shape']} | {row['ms']:.3f} | {row['gbps']:.0f} | {row['tflops']:.1f} "
        f"| {row['share_of_floor']:.0%} | {peers} | {row['extra_memory'] / 1e6:.0f} |"
    )
