"""Copies of a live model's weights in another dtype, or of a LoRA's, merged: one per model and dtype, for whoever needs it.

The trainer runs forward and backward in such a copy and the sampler draws from the same one: both ask for it here. A copy
is keyed by the weight epoch and follows it in place, so that its parameters stay where they are. Weights that are the
base's own, such as the embedding of a LoRA in the base's dtype, are shared with it.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from engine.lora import LoRA
from engine.model import Llama

_COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, Llama]] = WeakKeyDictionary()


def copy_in(model: Llama | LoRA, dtype: torch.dtype) -> Llama:
    """The model's weights, a LoRA's merged, rounded to `dtype` and up to date; a Llama of that dtype is its own copy.

    InputError where the model was changed without `weights_changed()`: the copy would not know.
    """
    model.check_weights()
    if isinstance(model, Llama) and model.embed.dtype == dtype:
        return model
    copies = _COPIES.setdefault(model, {})
    if dtype not in copies:
        copies[dtype] = _beside(model, dtype)
    copy = copies[dtype]
    if copy.weight_epoch != model.weight_epoch:
        _write(copy, model)
        copy.weight_epoch = model.weight_epoch - 1
        copy.weights_changed()
    return copy


def _beside(model: Llama | LoRA, dtype: torch.dtype) -> Llama:
    """A Llama whose parameters wait to be written, except for those that can be shared."""
    base = model.base if isinstance(model, LoRA) else model
    copy = Llama(base.config, dtype, device="meta")
    copy.rope_cos, copy.rope_sin = base.rope_cos, base.rope_sin
    for name, parameter in base.named_parameters():
        shared = isinstance(model, LoRA) and parameter.dtype == dtype and not model.adapts(parameter)
        module, _, leaf = name.rpartition(".")
        own = parameter if shared else nn.Parameter(torch.empty_like(parameter, dtype=dtype))
        setattr(copy.get_submodule(module), leaf, own)
    if base.config.tie_embeddings:
        copy.head = copy.embed
    copy.weight_epoch = -1
    return copy


@torch.no_grad()
def _write(copy: Llama, model: Llama | LoRA) -> None:
    base = model.base if isinstance(model, LoRA) else model
    for to, of in zip(copy.parameters(), base.parameters(), strict=True):
        if to is not of:
            to.copy_(model.merged_weight(of) if isinstance(model, LoRA) else of)
