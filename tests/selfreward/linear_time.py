"""Whether reading a text takes time in proportion to its length, by ratio: no clock of this or that machine."""

import time
from collections.abc import Callable
from typing import Any


def assert_linear(read: Callable[[str], Any], unit: str) -> None:
    """Sixteen times the text must take far less than the 256 times of a quadratic reading."""

    def seconds(length: int) -> float:
        text, best = unit * (length // len(unit)), float("inf")
        for _ in range(3):
            started = time.process_time()
            read(text)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(32_000) <= 64 * max(seconds(2_000), 1e-4), unit
