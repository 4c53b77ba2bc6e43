"""How many KV blocks what runs will need: admission looks ahead instead of reserving everybody's worst case.

Every sequence is taken to grow by one token a step until its expected end and to give its own blocks back then. Blocks
are counted at the end of each interval of `block_size` steps, an upper bound for what the interval needs.
"""

from __future__ import annotations


class Forecast:
    def __init__(self, held: int, block_size: int) -> None:
        """held: blocks in use now, whoever holds them."""
        self.held, self.size = held, block_size
        self.growth: list[int] = []  # blocks that are taken up to the end of an interval by those still running in it
        self.released: list[int] = []  # blocks of `held` that are given back at the beginning of an interval

    def add(self, own: int, blocks: int, length: int, final: int) -> None:
        """A sequence of `length` tokens in `blocks` blocks, `own` of them shared with nobody, that ends with `final`."""
        intervals = max(1, -(-(final - length) // self.size))
        missing = intervals + 1 - len(self.growth)
        if missing > 0:
            self.growth += [0] * missing
            self.released += [0] * missing
        for interval in range(intervals):
            tokens = min(length + (interval + 1) * self.size, final)
            self.growth[interval] += -(-tokens // self.size) - blocks
        self.released[intervals] += own

    def peak(self) -> int:
        """The most blocks that are in use at once."""
        most, held = self.held, self.held
        for growth, released in zip(self.growth, self.released, strict=True):
            held -= released
            most = max(most, held + growth)
        return most

    def copy(self) -> Forecast:
        twin = Forecast(self.held, self.size)
        twin.growth, twin.released = list(self.growth), list(self.released)
        return twin
