"""Packed copies of a model's weights: what the sampler passes as `linear` to `Llama.forward`, and uses for the head.

A weight is packed when it is first used and again after every announced update (`Llama.weight_epoch`). The copies
double the memory of the fp32 matrices that are used; `PackedWeights.bytes()` tells how much they hold.
"""

from __future__ import annotations

import torch

from engine import ops
from engine.model import Llama


class PackedWeights:
    """`packed(x [N, in], weight [out, in]) -> [N, out]`, where weight is a parameter of `model` or a view of one.

    Entries are found by address and shape. They hold their weight, so that no other tensor can get its address.
    """

    def __init__(self, model: Llama, threads: int | None = None) -> None:
        self.model = model
        self.threads = threads or torch.get_num_threads()
        self._epoch = model.weight_epoch
        self._entries: dict[tuple[int, torch.Size, tuple[int, ...]], ops.PackedWeight] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._epoch != self.model.weight_epoch:
            self.clear()
        key = (weight.data_ptr(), weight.shape, weight.stride())
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = ops.pack_linear(weight)
        return ops.linear(x, entry, self.threads)

    def clear(self) -> None:
        """Drop all copies; they are made again when they are used."""
        self._entries.clear()
        self._epoch = self.model.weight_epoch

    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(entry.panels.nbytes for entry in self._entries.values() if entry.panels is not None)


def packed(model: Llama, threads: int | None = None) -> PackedWeights:
    """The sampler's `linear` for `model`; threads: torch's number if not given."""
    return PackedWeights(model, threads)
