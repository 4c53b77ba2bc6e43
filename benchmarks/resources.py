"""`python -m benchmarks.resources`: what every kernel takes of a GPU, compiled as it is launched, on any machine.

The launches of `benchmarks/launches.py` run on tensors without memory (device "meta") of the sizes of Llama 2; Triton
is told that a GPU is there, and compiles for it instead of launching. So the signature, the alignment that Triton
specialises on, the tile sizes, warps and stages are those of the real launch. Registers and spills are read from the
machine code with the `cuobjdump` that Triton ships.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
except ModuleNotFoundError:
    sys.exit("benchmarks.resources compiles with Triton, which is not installed: pip install triton")

from benchmarks.launches import LAUNCHES, WIDE

SHARED_KB = {90: 227, 80: 163}  # of one program; a multiprocessor has one KB more, and each program takes one


class Gpu:
    """What Triton's launcher asks of a driver. A device per architecture: compiled kernels are kept by device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiled(capability: int) -> Iterator[list[Any]]:
    """Kernels that are launched inside are compiled and put into the list instead. The process keeps the driver: there
    may be no other to go back to."""
    kernels: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Gpu(capability))
    try:
        yield kernels
    finally:
        JITFunction.run = launch


def rows(capability: int, only: str = "") -> Iterator[dict[str, Any]]:
    """One for every kernel that a launch uses, dtype by dtype."""
    for launch in LAUNCHES:
        if only not in launch.name:
            continue
        for dtype in launch.dtypes:
            with compiled(capability) as kernels:
                launch.run(dtype)
            seen = set()
            for kernel in kernels:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    yield {"launch": launch.name, "dtype": str(dtype)[6:], "arch": capability, **resources(kernel)}


def resources(kernel: Any) -> dict[str, Any]:
    """Registers of a thread, bytes that it spills, shared memory, and how many warps a multiprocessor then holds."""
    usage = _resource_usage(kernel.asm["cubin"])
    meta, ptx = kernel.metadata, kernel.asm["ptx"]
    return {
        "kernel": kernel.name,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "shared": meta.shared,
        "occupancy": _warps_held(meta.num_warps, usage["REG"], meta.shared, meta.target.arch) / 64,
        "wide": kernel.name in WIDE,
        "product": next((kind for kind in ("wgmma.mma_async", "mma.sync") if kind in ptx), "-"),
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in reversed(text.splitlines()) if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def _warps_held(warps: int, registers: int, shared: int, capability: int) -> int:
    """Of 64: what registers (given out in 256s to a warp) and shared memory leave room for."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (SHARED_KB[capability] + 1) * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps


def table(found: list[dict[str, Any]]) -> str:
    """As Markdown: a row for each kernel and dtype of a launch, with sm_90 / sm_80 side by side."""
    lines = [
        "| launch | dtype | kernel | warps | stages | registers | spilled, B | shared, KB | occupancy | product |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    sides: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
    for row in found:
        key = (row["launch"], row["dtype"], row["kernel"])
        sides.setdefault(key, {}).setdefault(row["arch"], []).append(row)
    for (launch, dtype, kernel), by_arch in sides.items():
        for variants in zip(*by_arch.values(), strict=True):

            def both(text: Callable[[dict[str, Any]], str], variants: Any = variants) -> str:
                return " / ".join(dict.fromkeys(map(text, variants)))

            lines.append(
                f"| {launch} | {dtype} | `{kernel}` | {both(lambda row: str(row['warps']))} "
                f"| {both(lambda row: str(row['stages']))} | {both(lambda row: str(row['registers']))} "
                f"| {both(lambda row: str(row['spills']))} | {both(lambda row: format(row['shared'] / 1024, '.1f'))} "
                f"| {both(lambda row: format(row['occupancy'], '.0%'))} | {both(lambda row: row['product'].split('.')[0])} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_KB))
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if not any(arguments.only in launch.name for launch in LAUNCHES):
        parser.error(f"no launch has {arguments.only!r} in its name: {', '.join(launch.name for launch in LAUNCHES)}")
    torch.set_num_threads(1)
    found = []
    for capability in arguments.arch:
        for row in rows(capability, arguments.only):
            found.append(row)
            if arguments.json:
                print(json.dumps(row), flush=True)
    if not arguments.json:
        print(f"Triton {triton.__version__}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
