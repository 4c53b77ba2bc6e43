"""A forward's native calls, made again for every step: what `engine/graphs.py` is to a GPU.

A step of 12 layers is 110 calls. From Python each takes some 10 microseconds before its kernel begins, which for one row
of a small model is a fifth of the step. So `Llama.forward` runs once without computing anything, its kernels' calls are
kept in order, and a step makes them from C++ with its own rows, pages and threads.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import ops
from engine.batch import Batch


class Replay:
    """`replay(tokens, batch, threads) -> hidden [R, dim]` for steps of up to `rows` rows, valid until the next call; one
    call at a time.

    forward(tokens [rows], positions [rows]) -> hidden: native kernels, and views, are all that touches rows, in the same
    order whatever the step; anything else is a ValueError, because a replay would leave it out. What the kernels read
    from the model must stay where it is, and the pages that they write must stay too. inputs: rows that are not made by
    kernels, fp32, which the caller keeps where they are.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        rows: int,
        inputs: Sequence[torch.Tensor] = (),
    ) -> None:
        self.rows = rows
        tokens, positions = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
        self._recording = ops.Recording(tokens.numpy(), positions.numpy())
        self._memory = _RowMemory(self._recording.own)
        for given in inputs:
            self._recording.own(given.numpy())
        with self._recording, ops.rows_from(self._memory.empty), _ViewsOnly(self._memory):
            self._hidden = forward(tokens, positions)
        if not self._memory.holds(self._hidden) or not self._hidden.is_contiguous():
            raise ValueError("what the forward returns is not what its last kernel writes: it cannot be replayed")

    def __call__(self, tokens: torch.Tensor, batch: Batch, threads: int) -> torch.Tensor:
        b = batch
        rows = tokens.numpy(), b.positions.numpy(), b.slots.numpy()
        self._recording.replay(*rows, b.copies.numpy(), b.items.numpy(), threads)
        return self._hidden[: len(tokens)]


class _RowMemory:
    """Memory for the rows between kernels, in few pieces: one is used again when no tensor over it is left, which happens
    in a replay at the same place as in the recording. All of it stays the recording's."""

    def __init__(self, own: Callable[..., None]) -> None:
        self._own = own
        self.pieces: list[tuple[torch.Tensor, Callable[[], Any]]] = []  # and who uses it: None if nobody does

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        size = math.prod(shape)
        found = next((i for i, (piece, user) in enumerate(self.pieces) if len(piece) == size and user() is None), None)
        if found is None:
            found = len(self.pieces)
            self.pieces.append((torch.empty(size, dtype=torch.float32), lambda: None))
            self._own(self.pieces[found][0].numpy())
        piece = self.pieces[found][0]
        array = piece.numpy()  # a new object, which every tensor over it holds
        self.pieces[found] = piece, weakref.ref(array)
        return torch.from_numpy(array).view(*shape)

    def holds(self, x: torch.Tensor) -> bool:
        return any(p.data_ptr() <= x.data_ptr() < p.data_ptr() + p.nbytes for p, _ in self.pieces)


class _ViewsOnly(TorchDispatchMode):
    """Torch's operations on row memory are errors, but for views."""

    def __init__(self, memory: _RowMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if not func.is_view and any(map(self._memory.holds, tensors)):
            raise ValueError(f"{func} on rows is no native kernel: it cannot be replayed")
        return func(*args, **(kwargs or {}))
