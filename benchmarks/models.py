"""Random Llamas of a stated size: speed does not depend on what the weights are."""

from __future__ import annotations

from engine import InputError, Llama, LlamaConfig

MODELS = {
    # 134M parameters, 109.5M of them in products
    "110M": LlamaConfig(vocab_size=32000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2048, max_seq_len=1024),
    "15M": LlamaConfig(vocab_size=32000, dim=288, n_layers=6, n_heads=6, n_kv_heads=6, ffn_dim=768, max_seq_len=1024),
}  # fmt: skip


def random_model(name: str) -> Llama:
    if name not in MODELS:
        raise InputError(f"model is {name!r}; expected one of {', '.join(MODELS)}")
    return Llama(MODELS[name]).init_weights(seed=0)


def product_flops(model: Llama) -> int:
    """Floating-point operations of one row in the products with weights, the head apart."""
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in ("embed", "head"))
