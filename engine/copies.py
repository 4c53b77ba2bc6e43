"""Copies of a live model's weights in another dtype, one per model and dtype, for whoever computes in it.

The trainer runs forward and backward in such a copy and the sampler draws from the same one: both ask for it here. A copy
is keyed by the weight epoch and follows it in place, so that its parameters stay where they are.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from engine.model import Llama

_COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, Llama]] = WeakKeyDictionary()


def copy_in(model: Llama, dtype: torch.dtype) -> Llama:
    """The model's weights rounded to `dtype`, up to date: the model itself if it is of that dtype.

    InputError where the model was changed without `weights_changed()`: the copy would not know.
    """
    model.check_weights()
    if model.embed.dtype == dtype:
        return model
    copies = _COPIES.setdefault(model, {})
    if dtype not in copies:
        copies[dtype] = Llama(model.config, dtype, model.embed.device)
        copies[dtype].weight_epoch = -1
    copy = copies[dtype]
    if copy.weight_epoch != model.weight_epoch:
        with torch.no_grad():
            for to, of in zip(copy.parameters(), model.parameters(), strict=True):
                to.copy_(of)
        copy.weight_epoch = model.weight_epoch - 1
        copy.weights_changed()
    return copy
