"""python -m benchmarks quantization: what int8 costs, on texts that the model writes itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine import LLM, InputError, SamplingParams, load_checkpoint
from engine.quantize import quantization_error


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quantization", description=__doc__)
    parser.add_argument("--checkpoint", default="selfreward/tiny/m0", help="a directory; default: %(default)s")
    parser.add_argument(
        "--texts", type=int, default=64, help="written by the model at temperature 1 (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="of each text at most (default: %(default)s)")
    given = parser.parse_args(words)
    for name, value in (("texts", given.texts), ("tokens", given.tokens)):
        if value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    try:
        model = load_checkpoint(Path(given.checkpoint))
        writer = LLM(model)
        params = SamplingParams(n=given.texts, max_tokens=min(given.tokens, writer.max_model_len - 1), seed=0)
        (output,) = writer.generate([[1]], params)
        error = quantization_error(model, [[1, *answer.token_ids] for answer in output.outputs])
    except InputError as problem:
        parser.error(str(problem))
    print(f"int8 beside fp32, {given.checkpoint}, {error}")
    return 0
