"""The shape of a Llama: presets, HF's `config.json` in and out, Meta's `params.json` in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, InputError

HF_SIZES = {  # HF's name of every size that config.json must state
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}
META_VARIANTS = ("use_scaled_rope", "moe", "sliding_window", "quantization_args", "lora_args")  # later than Llama 2


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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"LlamaConfig.{name} is {value!r}; expected a positive number")
            object.__setattr__(self, name, float(value))  # 10000 and 10000.0 are one config, also in its hash
        if not isinstance(self.tie_embeddings, bool):
            raise InputError(f"LlamaConfig.tie_embeddings is {self.tie_embeddings!r}; expected true or false")
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

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """From HF's config.json as transformers 4 or 5 writes it: its contents, its path, or the directory that holds it.

        `where` names contents in errors. Raises CheckpointError for a file that is missing or no JSON, a value that is
        missing or impossible, any architecture but plain Llama 2, and a directory in Meta's layout.
        """
        if not isinstance(source, Mapping):
            path = _config_path(Path(source))
            source, where = read_json(path), str(path)
        _refuse_other_architectures(source, where)
        sizes = {ours: _size(source, theirs, where) for theirs, ours in HF_SIZES.items()}
        rope = source.get("rope_parameters") or {}  # transformers 5; in 4 rope_theta stands at the top
        try:
            return cls(
                **sizes,
                n_kv_heads=_given(source, "num_key_value_heads", sizes["n_heads"]),
                head_dim=_given(source, "head_dim", sizes["dim"] // sizes["n_heads"]),
                norm_eps=_given(source, "rms_norm_eps", 1e-6),  # where it is absent, HF's own default
                rope_theta=_given(rope, "rope_theta", _given(source, "rope_theta", 10000.0)),
                tie_embeddings=_given(source, "tie_word_embeddings", False),
            )
        except InputError as error:
            raise CheckpointError(f"{where}: {error}; correct it or copy it again") from error

    @classmethod
    def from_meta(
        cls, source: str | Path | Mapping[str, Any], vocab_size: int | None = None, where: str = "params.json"
    ) -> LlamaConfig:
        """From Meta's params.json: its contents or its path.

        `vocab_size`, the rows of the embedding, is needed where params.json leaves it to the tokenizer by saying -1.
        The file tells no context length: 4096, as Llama 2 was trained, unless it has `max_seq_len`. `where` names
        contents in errors. Raises CheckpointError as `from_hf` does.
        """
        if not isinstance(source, Mapping):
            source, where = read_json(Path(source)), str(source)
        for name in META_VARIANTS:
            if source.get(name):
                raise CheckpointError(f"{where}: {name} is {source[name]!r}; Llama 2 has none")
        dim, n_layers, n_heads = (_size(source, name, where) for name in ("dim", "n_layers", "n_heads"))
        vocab = _given(source, "vocab_size", -1)
        if vocab == -1 and vocab_size is None:
            raise CheckpointError(f"{where}: vocab_size is -1; give the number of rows of the embedding")
        try:
            return cls(
                dim=dim,
                n_layers=n_layers,
                n_heads=n_heads,
                n_kv_heads=_given(source, "n_kv_heads", n_heads),
                head_dim=_given(source, "head_dim", dim // n_heads),
                ffn_dim=_meta_ffn_dim(source, dim),
                vocab_size=vocab_size if vocab == -1 and vocab_size is not None else vocab,
                max_seq_len=_given(source, "max_seq_len", 4096),
                norm_eps=_given(source, "norm_eps", 1e-5),
                rope_theta=_given(source, "rope_theta", 10000.0),
            )
        except InputError as error:
            raise CheckpointError(f"{where}: {error}; correct it or copy it again") from error

    def to_hf(self, dtype: str = "float32", bos_id: int = 1, eos_id: int = 2) -> dict[str, Any]:
        """The contents of HF's config.json. transformers 4 reads rope_theta at the top, 5 in rope_parameters: both are."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{theirs: getattr(self, ours) for theirs, ours in HF_SIZES.items()},
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "torch_dtype": dtype,
        }


PRESETS = {
    "7B": LlamaConfig(),
    "13B": LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824),
    "70B": LlamaConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        expected = (
            "HF's layout has config.json, Meta's has params.json" if path.name == "config.json" else "copy it too"
        )
        raise CheckpointError(f"{path} is missing; {expected}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it a readable file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def _config_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / "params.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is in Meta's layout and has no config.json; read its params.json with from_meta")
    return path / "config.json"


def _size(values: Mapping[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if value is None:
        raise CheckpointError(f"{where} has no {name}; a Llama config needs it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {name} is {value!r}; expected a positive integer")
    return value


def _meta_ffn_dim(params: Mapping[str, Any], dim: int) -> int:
    """Two thirds of 4 * dim, times ffn_dim_multiplier where there is one (70B), rounded up to a multiple."""
    multiple, multiplier = _given(params, "multiple_of", 256), _given(params, "ffn_dim_multiplier", 1)
    for name, value in (("multiple_of", multiple), ("ffn_dim_multiplier", multiplier)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(f"{name} is {value!r}; expected a positive number")
    width = int(multiplier * int(8 * dim / 3))  # cut twice, as Meta does
    return -(-width // multiple) * multiple


def _refuse_other_architectures(values: Mapping[str, Any], where: str) -> None:
    if values.get("model_type") != "llama":
        raise CheckpointError(f"{where}: model_type is {values.get('model_type')!r}; this engine runs 'llama'")
    for name, allowed in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if _given(values, name, allowed) != allowed:
            raise CheckpointError(f"{where}: {name} is {values[name]!r}; Llama 2 has {allowed!r}")
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5, transformers 4
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {name} is {rope!r}; expected a JSON object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: rope type {kind!r} is not supported; Llama 2 has plain rotary embedding")


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """HF writes null where it means the default."""
    value = values.get(name)
    return default if value is None else value
