"""Random Llamas of a stated size: speed does not depend on what the weights are."""

from __future__ import annotations

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


def product_flops(model: Llama) -> int:
    """Floating-point operations of one row in the products with weights, the head apart."""
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in ("embed", "head"))
