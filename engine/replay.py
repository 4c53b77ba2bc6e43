"""A forward's native calls, made again for every step: what `engine/graphs.py` is to a GPU.

A step of 12 layers is 110 calls. From Python each takes some 10 microseconds before its kernel begins, which for one row
of a small model is a fifth of the step. So `Llama.forward` runs once without computing anything, its kernels' calls are
kept in order, and a step makes them from C++ with its own rows, pages and threads.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from engine import ops
from engine.batch import Batch


class Replay:
    """`replay(batch, threads) -> hidden [R, dim]`, valid until the next call, for steps of up to `rows` rows.

    forward(tokens [rows], positions [rows]) -> hidden: all of its work on rows is done by native kernels (anything else
    in between is a ValueError), in the same order whatever the step. What it reads from the model is held, the pages that
    it writes are not.
    """

    def __init__(self, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int) -> None:
        tokens, positions = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
        self._recording = ops.Recording(tokens.numpy(), positions.numpy())
        self._memory = _RowMemory(self._recording.own)
        with ops.rows_from(self._memory.empty), self._recording:
            self._hidden = forward(tokens, positions)

    def __call__(self, tokens: torch.Tensor, batch: Batch, threads: int) -> torch.Tensor:
        b = batch
        rows = tokens.numpy(), b.positions.numpy(), b.slots.numpy()
        self._recording.replay(*rows, b.copies.numpy(), b.items.numpy(), threads)
        return self._hidden[: len(tokens)]


class _RowMemory:
    """Memory for the rows between kernels, in few pieces: one is used again as soon as no tensor over it is left, which
    happens in a replay at the same place as in the recording. It stays the recording's for good."""

    def __init__(self, own: Callable[..., None]) -> None:
        self._own = own
        self._pieces: list[torch.Tensor] = []
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)  # by number of floats

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        free = self._free[math.prod(shape)]
        if not free:
            self._pieces.append(torch.empty(math.prod(shape), dtype=torch.float32))
            self._own(self._pieces[-1].numpy())
            free.append(self._pieces[-1])
        piece = free.pop()
        array = piece.numpy()  # a new object, which every tensor over it holds
        weakref.finalize(array, free.append, piece).atexit = False
        return torch.from_numpy(array).view(*shape)
