"""Random Llamas of a stated size: the speed of products does not depend on what the weights are."""

from __future__ import annotations

import torch

from engine import InputError, Llama, LlamaConfig


def _config(dim: int, layers: int, heads: int, head_dim: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(dim, layers, heads, heads, head_dim, ffn, vocab_size=32000, max_seq_len=1024)


MODELS = {
    "110M": _config(
        768, 12, 12, 64, 2048
    ),  # 134M parameters, 109.5M in products: 84.9M in the layers, 24.6M in the head
    "138M": _config(768, 12, 12, 128, 2048),  # the same with wider heads, 137.8M in products
    "15M": _config(288, 6, 6, 48, 768),
}


def random_model(name: str) -> Llama:
    if name not in MODELS:
        raise InputError(f"model is {name!r}; expected one of {', '.join(MODELS)}")
    return Llama(MODELS[name]).init_weights(seed=0)


def peaked(model: Llama) -> Llama:
    """The model with a head 8 times as large, in place: logits as far apart as a trained model's.

    Random ones differ so little that 90% of the probability is most of the vocabulary, and whoever sorts the nucleus,
    as llama.cpp does, would spend 1.9 ms on a token instead of 0.3.
    """
    with torch.no_grad():
        model.head.mul_(8.0)
    model.weights_changed()
    return model


def product_flops(model: Llama) -> int:
    """Floating-point operations of one row in the products with weights, the head apart."""
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in ("embed", "head"))
