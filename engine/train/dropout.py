"""Dropout of a training step: residual and embedding only, keyed by what a token is, not by where it is packed."""

from __future__ import annotations

import hashlib
from functools import partial

import torch

from engine import ops
from engine.model import Dropout, keep
from engine.tree import Pack


def pack_dropout(pack: Pack, rate: float, seed: int, step: int) -> Dropout:
    """The `dropout` of `Llama.forward` for one pack; with rate 0 none at all."""
    return partial(_drop, pack, rate, step_key(seed, step)) if rate else keep


def step_key(seed: int, step: int) -> int:
    """64 bits (signed) that depend on the training's seed and the step alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "big", signed=True)


def _drop(pack: Pack, rate: float, key: int, site: int, x: torch.Tensor) -> torch.Tensor:
    """x [N, units] without the dropped units, the others scaled so that the mean stays. Backward keeps a byte a unit."""
    kept = ops.dropout_mask(key, pack.key, pack.position, site, x.shape[1], rate)  # [N, units]
    return x * kept * (1.0 / (1.0 - rate))
