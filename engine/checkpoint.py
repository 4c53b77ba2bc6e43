"""Checkpoints: HF directories (config.json + safetensors, single or sharded) in and out.

Tensors are memory-mapped and copied one by one into the fused parameters, so loading needs no second copy of the
weights. Writing goes to a temporary directory beside the target, is synced, and renamed into place: a reader finds the
old directory, the new one or, between two renames, none, and never half of one. One writer at a time per directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.config import LlamaConfig, read_json
from engine.errors import CheckpointError, InputError
from engine.model import Block, Llama
from engine.tokenizer import Tokenizer

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SHARD_BYTES = 4 << 30


def load_checkpoint(
    directory: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Llama:
    """A Llama from an HF directory. `dtype=None` keeps the dtype of the files.

    Raises CheckpointError naming the file or tensor: missing, truncated or corrupt files, missing, extra or misshapen
    tensors, non-float dtypes, NaN or infinity, a tokenizer.model with more pieces than the model has embeddings.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if (directory / "tokenizer.model").is_file():
        _check_vocabulary(Tokenizer(directory), config)
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
    model: Llama,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write an HF directory that transformers loads as it is, in the model's dtype.

    A checkpoint that stood there before is replaced whole; any other directory with files in it is refused.
    `generation_config` is added to generation_config.json, which otherwise holds the ids of BOS and EOS.
    """
    if model.embed.dtype not in DTYPES:
        raise InputError(f"the model is {model.embed.dtype}; a checkpoint holds fp32, fp16 or bf16: convert it first")
    directory = Path(directory).resolve()  # through a symbolic link: the link stays, what it points to is replaced
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(directory, "tmp")
    _finish_interrupted_save(directory)
    _check_replaceable(directory)
    try:
        temporary.mkdir()
        _write_all(model, temporary, tokenizer, max_shard_bytes, generation_config or {})
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
    if directory.is_dir():
        return LlamaConfig.from_hf(directory)
    old = _beside(directory, "old")
    advice = f"an interrupted save left {old}: rename it" if old.is_dir() else "expected a checkpoint in HF layout"
    raise CheckpointError(f"{directory}: there is no such directory; {advice}")


def _check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model {config.vocab_size} embeddings: "
            "they do not belong together; use the tokenizer that the model was trained with"
        )


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint or from the single file."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
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


def _write_all(
    model: Llama,
    directory: Path,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int,
    generation_config: Mapping[str, Any],
) -> None:
    bos, eos = 1, 2
    if tokenizer:
        _check_vocabulary(tokenizer, model.config)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        tokenizer.save(directory)
    _write_json(directory / "config.json", model.config.to_hf(DTYPES[model.embed.dtype], bos, eos))
    generation = {"bos_token_id": bos, "eos_token_id": eos, **generation_config}
    _write_json(directory / "generation_config.json", generation)
    _write_tensors(model, directory, max_shard_bytes)


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
    # Row slices of a fused parameter are contiguous and do not overlap: safetensors writes them from where they are.
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _beside(directory: Path, kind: str) -> Path:
    """Where a save keeps the new ("tmp") and the replaced ("old") directory; one name, so that the next save cleans up."""
    return directory.with_name(f".{directory.name}.{kind}")


def _finish_interrupted_save(directory: Path) -> None:
    """What a save that was killed left behind: put the old directory back if nothing stands in its place, drop the rest."""
    old = _beside(directory, "old")
    if old.is_dir() and not directory.exists():
        old.rename(directory)
    for leftover in (old, _beside(directory, "tmp")):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; a checkpoint is a directory: choose another name")
    if any(directory.iterdir()) and not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds files but no checkpoint and would be replaced whole; choose another name")


def _swap(temporary: Path, directory: Path) -> None:
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    old = _beside(directory, "old")
    if directory.exists():
        directory.rename(old)
    try:
        temporary.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
