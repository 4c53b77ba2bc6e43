"""`python -m benchmarks.gpu kernels|sampler|train|peers`: what the GPU path reaches, beside the chip's limits and others.

Bandwidth and product rate are measured first, in the same run; a floor is the larger of bytes over the one and FLOPs over
the other. What is compared runs in turns, the L2 cache overwritten before each run; a row has the median and the 20 and
80% quantiles, is checked against a reference before it is timed, and is appended to `<out>/<device>/<part>.jsonl` as soon
as it exists. After --minutes nothing new is begun, and a row says so.

--smoke runs every case at toy size, on a CPU in Triton's interpreter where there is no GPU, to show that the code runs: it
keeps no file, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.gpu_bench import MINUTES, Bench

PARTS = ("kernels", "sampler", "train", "peers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, no file, no meaning")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which nothing new is begun; default: %(default)s"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        if not arguments.smoke:
            parser.error("torch finds no GPU here; --smoke runs the cases at toy size on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks import gpu_engine, gpu_kernels

    bench = Bench(arguments.part, arguments.smoke, arguments.out, arguments.minutes)
    bench.all({"kernels": gpu_kernels.MAKERS, **gpu_engine.MAKERS}[arguments.part])
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
