"""Small random models for the engine's tests."""

from typing import Any

from engine.config import LlamaConfig
from engine.model import Llama

SMALL: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 96,
    "vocab_size": 111,
    "max_seq_len": 512,
}


def small_config(**overrides: Any) -> LlamaConfig:
    """A Llama of about 100 thousand parameters with grouped heads and a vocabulary that is no round number."""
    return LlamaConfig(**{**SMALL, **overrides})


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """Weights wide enough (std 0.1) that no mistake hides in small activations."""
    return Llama(config).init_weights(seed, std=0.1)
