"""Small random models for the engine's tests."""

from typing import Any

import torch

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


def random_llama(config: LlamaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Llama:
    """Weights wide enough (std 0.1) that no mistake hides in small activations."""
    return Llama(config, dtype=dtype).init_weights(seed, std=0.1)


def widened(model: Llama) -> Llama:
    """The same weights in fp32."""
    wide = Llama(model.config)
    wide.load_state_dict(model.state_dict())
    wide.weights_changed()
    return wide
