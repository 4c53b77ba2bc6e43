"""Packed weights, and the kernels of the CPU sampler's forward, which compute from them.

A matrix is packed as fp32, as bf16 where the model is, or as int8 where that is asked for. Weights that somebody else
may read or change (a live model's) are copied when they are first used and again after every announced update; those
that the engine loaded itself are packed as they are read, and the parameters give their memory up.
"""

from __future__ import annotations

from typing import Any

import torch

from engine import ops
from engine.model import Kernels, Llama, give_up, given_up


class PackedWeights:
    """`packed(x [N, in], weight [out, in], threads) -> [N, out]`, fp32; weight: a parameter. quantization: None or "int8".

    Entries are found by the identity of their parameter, which they hold, so that no other can take its place.
    """

    def __init__(self, quantization: str | None = None) -> None:
        self.quantization = quantization
        self._epoch = 0
        self._entries: dict[int, tuple[torch.Tensor, Any]] = {}  # a matrix packed, a vector as fp32

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, threads: int = 1) -> torch.Tensor:
        return ops.linear(x, self._entry(weight), threads)

    def kernels(self, threads: int) -> Kernels:
        """For `Llama.forward`: a row's bits depend on that row alone, not on the others and not on `threads`."""
        norm = self._entry
        return Kernels(
            embed=lambda tokens, weight: ops.embed_rows(tokens, weight, threads),
            linear=lambda x, weight: self(x, weight, threads),
            rms_norm=lambda x, weight, eps: ops.rms_norm_rows(x, norm(weight), eps, threads),
            add_rms_norm=lambda x, branch, weight, eps: ops.add_rms_norm_rows(x, branch, norm(weight), eps, threads),
            swiglu=lambda gate_up: ops.swiglu_rows(gate_up, threads),
        )

    def take(self, model: Llama, parameter: torch.nn.Parameter) -> None:
        """Pack a matrix for good and give up the memory of the parameter. The embedding stays: its rows are looked up."""
        if parameter.dim() == 2 and parameter is not model.embed and ops.packs(parameter):
            self._entry(parameter)
            give_up(parameter)

    def write(self, parameter: torch.nn.Parameter, rows: slice, tensor: torch.Tensor) -> None:
        """Replace rows of a weight, wherever it is held."""
        if given_up(parameter):
            ops.repack_linear(self._entry(parameter), tensor.to(parameter.dtype), rows.indices(len(parameter))[0])
        else:
            parameter[rows].copy_(tensor)

    def follow(self, epoch: int) -> None:
        """Forget copies of weights from before this epoch."""
        if epoch != self._epoch:
            self.clear()
            self._epoch = epoch

    def clear(self) -> None:
        """Drop all copies; they are made again when they are used. What was given up for them stays."""
        self._entries = {key: entry for key, entry in self._entries.items() if given_up(entry[0])}

    def forget(self) -> None:
        """Drop everything, also what is held nowhere else."""
        self._entries.clear()

    def bytes(self) -> int:
        """Memory of the packed matrices, the only ones where the parameters gave theirs up."""
        packed = (entry for _, entry in self._entries.values() if isinstance(entry, ops.PackedWeight))
        return sum(entry.bytes() for entry in packed)

    def _entry(self, weight: torch.Tensor) -> Any:
        found = self._entries.get(id(weight))
        if found is None:
            made = ops.pack_linear(weight, self.quantization) if weight.dim() == 2 else weight.detach().float()
            found = self._entries[id(weight)] = (weight, made)
        return found[1]
