"""The shape of a Llama: presets, and readers for HF's `config.json` and Meta's `params.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, InputError


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the shapes and the arithmetic of a Llama 2 model.

    `n_heads` must be a multiple of `n_kv_heads` (GQA; equal: MHA; 1: MQA) and `head_dim` even (RoPE rotates halves).
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    head_dim: int = 128
    ffn_dim: int = 11008
    vocab_size: int = 32000
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"LlamaConfig.{name} is {value!r}; expected a positive integer")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise InputError(f"LlamaConfig.{name} is {value!r}; expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"LlamaConfig.n_heads is {self.n_heads}, not a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            raise InputError(f"LlamaConfig.head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def n_parameters(self) -> int:
        """Number of parameters; a tied head is counted once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * layer + embeddings + self.dim


PRESETS = {
    "7B": LlamaConfig(),
    "13B": LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824),
    "70B": LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
}


def config_from_hf(values: dict[str, Any], where: str) -> LlamaConfig:
    """A LlamaConfig from the contents of HF's config.json; `where` names the file in errors."""

    def get(name: str, default: Any = None) -> Any:
        value = values.get(name, default)
        if value is None:
            raise CheckpointError(f"{where} has no {name}; a Llama config needs it")
        return value

    if values.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{where}: model_type is {values['model_type']!r}; this engine runs 'llama'")
    for name, allowed in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if values.get(name, allowed) != allowed:
            raise CheckpointError(f"{where}: {name} is {values[name]!r}; Llama 2 has {allowed!r}")
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5, transformers 4
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {name} is {rope!r}; expected a JSON object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: rope type {kind!r} is not supported; Llama 2 has plain rotary embedding")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    heads, dim = get("num_attention_heads"), get("hidden_size")
    try:
        return LlamaConfig(
            dim=dim,
            n_layers=get("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or dim // heads,
            ffn_dim=get("intermediate_size"),
            vocab_size=get("vocab_size"),
            max_seq_len=get("max_position_embeddings"),
            norm_eps=get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or values.get("rope_theta", 10000.0),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
    except (InputError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def config_to_hf(config: LlamaConfig, dtype: str, bos_id: int = 1, eos_id: int = 2) -> dict[str, Any]:
    """What HF's config.json holds for this shape (transformers 4 reads the flat rope_theta, 5 rope_parameters)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
