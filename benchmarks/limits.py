"""What this machine can do at most, measured in the run that is compared with it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import engine._C as _C


class Limits(NamedTuple):
    gflops: float  # fp32 multiply-adds in registers, all threads
    gbps: float  # reads from memory, all threads

    @staticmethod
    def measure(threads: int) -> Limits:
        """The best of five short runs of each."""
        memory = np.ones(1 << 27, dtype=np.float32)  # 512 MB: more than any last-level cache
        gflops = max(_C.probe_fma(1_000_000 // 5, threads) for _ in range(5))
        return Limits(gflops, max(_C.probe_read(memory, threads) for _ in range(5)))


def machine() -> dict[str, str | int]:
    """What a number depends on, without what names the machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        found = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
        name = f"{found.get('model name', name)}, family {found.get('cpu family')}, model {found.get('model')}"
    return {
        "cpu": name,
        "instructions": _C.instruction_levels()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
