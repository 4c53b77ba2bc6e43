"""Checkpoints: HF directories (config.json + safetensors, single or sharded) in and out.

Tensors are memory-mapped and copied one by one into the fused parameters, so loading needs no second copy of the
weights. Writing goes to a temporary directory beside the target, is synced, and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.config import LlamaConfig, config_from_hf, config_to_hf
from engine.errors import CheckpointError, NotBuiltError
from engine.model import Block, Llama
from engine.tokenizer import Tokenizer

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SHARD_BYTES = 4 << 30


def load_checkpoint(
    directory: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Llama:
    """A Llama from an HF directory. `dtype=None` keeps the dtype of the files.

    Raises CheckpointError naming the file or tensor: missing, truncated or corrupt files, missing, extra or misshapen
    tensors, non-float dtypes, NaN or infinity.
    """
    directory = Path(directory)
    config = _read_config(directory)
    files = _tensor_files(directory)
    if dtype is None:
        dtype = _file_dtype(directory, files)
    model = Llama(config, dtype=dtype, device=device)
    slots = dict(_slots(model))
    _check_names(directory, files, slots, config)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(_read_tensor(directory / files[name], name, slot.shape))
    model.weights_changed()
    return model


def save_checkpoint(
    model: Llama, directory: str | Path, tokenizer: Tokenizer | None = None, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write an HF directory that transformers loads as it is. A directory that stood there before is replaced whole."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_tensors(model, temporary, max_shard_bytes)
        bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
        dtype = DTYPES[model.embed.dtype]
        _write_json(temporary / "config.json", config_to_hf(model.config, dtype, bos, eos))
        _write_json(temporary / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
        if tokenizer:
            tokenizer.save(temporary)
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_hash(directory: str | Path) -> str:
    """Hash of shape, names and values of the tensors, whatever the sharding: equal models have equal hashes."""
    directory = Path(directory)
    digest = hashlib.blake2b(repr(_read_config(directory)).encode(), digest_size=16)
    files = _tensor_files(directory)
    for name in sorted(files):
        tensor = _read_tensor(directory / files[name], name, None)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def _slots(model: Llama) -> Iterator[tuple[str, torch.Tensor]]:
    """HF's tensor names and the (views of the) parameters that hold them."""
    config = model.config
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", model.embed
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at = f"model.layers.{number}."
        qkv, gate_up = block.attention.qkv, block.mlp.gate_up
        yield at + "input_layernorm.weight", block.attention_norm.weight
        yield at + "self_attn.q_proj.weight", qkv[:q]
        yield at + "self_attn.k_proj.weight", qkv[q : q + kv]
        yield at + "self_attn.v_proj.weight", qkv[q + kv :]
        yield at + "self_attn.o_proj.weight", block.attention.o
        yield at + "post_attention_layernorm.weight", block.mlp_norm.weight
        yield at + "mlp.gate_proj.weight", gate_up[: config.ffn_dim]
        yield at + "mlp.up_proj.weight", gate_up[config.ffn_dim :]
        yield at + "mlp.down_proj.weight", block.mlp.down
    yield "model.norm.weight", model.norm.weight
    if not config.tie_embeddings:
        yield "lm_head.weight", model.head


def _read_config(directory: Path) -> LlamaConfig:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory; expected a Llama checkpoint in HF layout")
    if (directory / "params.json").is_file():
        raise NotBuiltError(
            f"{directory} is in Meta's layout (params.json), which is not built yet; convert it to HF's"
        )
    return config_from_hf(_read_json(directory / "config.json"), str(directory / "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; an HF checkpoint has it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint or from the single file."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{index} has no weight_map that names a file for every tensor; copy it again")
        for name in sorted(set(files.values())):
            if not (directory / name).is_file():
                raise CheckpointError(f"{index} points to {name}, which is missing; copy the whole checkpoint")
        return files
    single = directory / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{directory} has neither model.safetensors nor an index of shards; expected HF layout")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single.name)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error


def _read_tensor(path: Path, name: str, shape: torch.Size | None) -> torch.Tensor:
    with _open(path) as file:
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error}); copy it again") from error
    if shape is not None and tensor.shape != shape:
        raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}; config.json asks for {list(shape)}")
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected fp32, fp16 or bf16 (quantised files: no)")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def _file_dtype(directory: Path, files: dict[str, str]) -> torch.dtype:
    name = "model.embed_tokens.weight"
    if name not in files:
        raise CheckpointError(f"{directory} has no tensor {name}; expected a Llama checkpoint in HF layout")
    return _read_tensor(directory / files[name], name, None).dtype


def _check_names(directory: Path, files: dict[str, str], slots: dict[str, Any], config: LlamaConfig) -> None:
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    missing, extra = sorted(slots.keys() - files.keys()), sorted(files.keys() - slots.keys() - ignored)
    if missing:
        raise CheckpointError(f"{directory} lacks {len(missing)} tensors that config.json asks for, first {missing[0]}")
    if extra:
        raise CheckpointError(
            f"{directory} has {len(extra)} tensors that config.json has no place for, first {extra[0]}"
        )


def _write_tensors(model: Llama, directory: Path, max_shard_bytes: int) -> None:
    tensors = {name: slot.detach() for name, slot in _slots(model)}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _save(tensors, directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Row slices of a fused parameter share its storage; safetensors wants tensors that own theirs.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path), metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _swap(temporary: Path, directory: Path) -> None:
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)  # between the two renames a reader finds no directory, never half of one
    try:
        temporary.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(directory.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
