"""Packed copies of a model's weights, and the kernels of the sampler's forward, which compute from them.

A weight is packed when it is first used and again after every announced update (`Llama.weight_epoch`). The copies
double the memory of the fp32 matrices that are used; `PackedWeights.bytes()` tells how much they hold.
"""

from __future__ import annotations

import torch

from engine import ops
from engine.model import Kernels, Llama


class PackedWeights:
    """`packed(x [N, in], weight [out, in], threads) -> [N, out]`; weight: a parameter of `model` or a view of one.

    Entries are found by address and shape. They hold their weight, so that no other tensor can get its address.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self._epoch = model.weight_epoch
        self._entries: dict[tuple[int, torch.Size, tuple[int, ...]], ops.PackedWeight] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, threads: int = 1) -> torch.Tensor:
        if self._epoch != self.model.weight_epoch:
            self.clear()
        key = (weight.data_ptr(), weight.shape, weight.stride())
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = ops.pack_linear(weight)
        return ops.linear(x, entry, threads)

    def kernels(self, threads: int) -> Kernels:
        """For `Llama.forward`: a row's bits depend on that row alone, not on the others and not on `threads`."""
        return Kernels(
            linear=lambda x, weight: self(x, weight, threads),
            rms_norm=lambda x, weight, eps: ops.rms_norm_rows(x, weight, eps, threads),
            add_rms_norm=lambda x, branch, weight, eps: ops.add_rms_norm_rows(x, branch, weight, eps, threads),
            swiglu=lambda gate_up: ops.swiglu_rows(gate_up, threads),
        )

    def clear(self) -> None:
        """Drop all copies; they are made again when they are used."""
        self._entries.clear()
        self._epoch = self.model.weight_epoch

    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(entry.panels.nbytes for entry in self._entries.values() if entry.panels is not None)
