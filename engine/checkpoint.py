"""Checkpoints: directories in HF's or Meta's layout in, in HF's layout out.

Tensors are memory-mapped and copied piece by piece into the fused parameters, so loading needs no second copy of the
weights, in resident memory neither of the model nor of its files. Writing goes to a temporary directory beside the
target, is synced, and renamed into place: a reader finds the old directory, the new one or, between two renames, none,
and never half of one. One writer at a time per directory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.checkpoint_hf import HfFiles
from engine.checkpoint_meta import MetaFiles
from engine.config import LlamaConfig
from engine.errors import CheckpointError, InputError
from engine.model import Block, Llama, given_up
from engine.tokenizer import Tokenizer

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SHARD_BYTES = 4 << 30


class Layout(Protocol):
    """A directory of either layout, opened: its config, and its tensors by HF's names."""

    config: LlamaConfig

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, shapes: Mapping[str, torch.Size]) -> None: ...

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]: ...


def read_config(directory: str | Path) -> LlamaConfig:
    """The config of a checkpoint in HF's or Meta's layout, without its weights. Raises CheckpointError as loading does."""
    return _open_layout(Path(directory)).config


def load_checkpoint(
    directory: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    loaded: Callable[[Llama, torch.nn.Parameter], None] | None = None,
) -> Llama:
    """A Llama from a directory in HF's or Meta's layout. `dtype=None` keeps the dtype of the files.

    loaded(model, parameter): called with each parameter when it is complete, before the next one takes memory: who packs
    weights may take it and give its own memory up.

    Meta's layout does not tell the longest context: 4096, as Llama 2 was trained, unless params.json has `max_seq_len`.

    Raises CheckpointError naming the file or tensor: missing, truncated or corrupt files, missing, extra or misshapen
    tensors, non-float dtypes, NaN or infinity, values beyond `dtype`, a tokenizer.model with more pieces than the model
    has embeddings. Names and shapes are checked before memory is taken for the weights.
    """
    directory = Path(directory)
    layout = _open_layout(directory)
    if (directory / "tokenizer.model").is_file():
        _check_vocabulary(Tokenizer(directory), layout.config)
    layout.check(_shapes(layout.config))
    model = Llama(layout.config, dtype=dtype or layout.dtype, device=device)
    _fill_model(model, layout, loaded)
    return model


def reload_checkpoint(
    model: Llama, directory: str | Path, loaded: Callable[[Llama, torch.nn.Parameter], None] | None = None
) -> None:
    """Read the weights of `directory`, which `model` was loaded from, again into parameters whose memory was given up."""
    shapes = dict(Llama(model.config, device="meta").named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = torch.empty(shapes[name].shape, dtype=parameter.dtype, device=parameter.device)
    layout = _open_layout(Path(directory))
    layout.check(_shapes(model.config))
    _fill_model(model, layout, loaded)


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
    Raises InputError where the directory cannot be written (full disk, no permission); what stood there before stays.
    """
    if not isinstance(model, Llama):
        raise InputError(
            f"the model is a {type(model).__name__}; a checkpoint holds a Llama (of a LoRA save `merged()`, or the adapter "
            "alone with save_adapter)"
        )
    if any(given_up(parameter) for parameter in model.parameters()):
        raise InputError("the model's matrices are packed for sampling only; save the one that was trained or loaded")
    if model.embed.dtype not in DTYPES:
        raise InputError(f"the model is {model.embed.dtype}; a checkpoint holds fp32, fp16 or bf16: convert it first")
    with replacing(Path(directory), "config.json") as temporary:
        _write_all(model, temporary, tokenizer, max_shard_bytes, generation_config or {})


@contextmanager
def replacing(directory: Path, mark: str, what: str = "a checkpoint") -> Iterator[Path]:
    """A temporary directory beside `directory`, which takes its place, whole and on the disk, when the block ends.

    What stands there is replaced if it is nothing, empty or has a file called `mark`, as `what` has. InputError where that
    is not so, or the directory cannot be written; then what stood there stays.
    """
    directory = directory.resolve()  # through a symbolic link: the link stays, what it points to is replaced
    temporary = _beside(directory, "tmp")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _finish_interrupted_save(directory)
        _check_replaceable(directory, mark, what)
        temporary.mkdir()
        yield temporary
        _swap(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory} cannot be written ({error}); make room there or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_hash(directory: str | Path) -> str:
    """Hash of config, names and values of the tensors, whatever layout and sharding: equal models have equal hashes.

    Raises CheckpointError as loading does.
    (The longest context is part of the config: Llama 2 in Meta's layout equals an HF directory that says 4096.)
    """
    directory = Path(directory)
    layout = _open_layout(directory)
    if (directory / "tokenizer.model").is_file():
        _check_vocabulary(Tokenizer(directory), layout.config)
    shapes = _shapes(layout.config)
    layout.check(shapes)
    digest = hashlib.blake2b(repr(layout.config).encode(), digest_size=16)
    for name, shape in sorted(shapes.items()):
        tensor = torch.empty(shape, dtype=next(layout.pieces(name, shape))[2].dtype)
        _fill(tensor, layout, name)
        digest.update(f"{name} {tensor.dtype} {tuple(shape)}".encode())
        digest.update(tensor.view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def _open_layout(directory: Path) -> Layout:
    if not directory.is_dir():
        old = _beside(directory, "old")
        advice = f"an interrupted save left {old}: rename it" if old.is_dir() else "expected a checkpoint's directory"
        found = "this is a file" if directory.is_file() else "there is no such directory"
        raise CheckpointError(f"{directory}: {found}; {advice}")
    if (directory / "params.json").is_file() and not (directory / "config.json").is_file():
        return MetaFiles(directory)
    return HfFiles(directory)


def _shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """HF's name and shape of every tensor, from a model that takes no memory."""
    with torch.device("meta"):
        return {name: slot.shape for name, slot in hf_tensors(Llama(config, device="meta"))}


def _fill_model(
    model: Llama, layout: Layout, loaded: Callable[[Llama, torch.nn.Parameter], None] | None = None
) -> None:
    # A fresh parameter takes memory when it is written, so only those that are kept take any.
    with torch.no_grad():
        for _, parts in groupby(hf_rows(model), key=lambda part: id(part[1])):
            for name, parameter, rows in parts:
                _fill(parameter[rows], layout, name)
            if loaded:
                loaded(model, parameter)
    model.weights_changed()


def _fill(target: torch.Tensor, layout: Layout, name: str) -> None:
    """Copy the tensor of that name, converted to the target's dtype and device."""
    for label, where, values in layout.pieces(name, target.shape):
        _check_values(label, values, target.dtype)
        target[where].copy_(values)


def _check_values(label: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    if values.dtype not in DTYPES:
        raise CheckpointError(f"{label} is {values.dtype}; expected fp32, fp16 or bf16 (quantised files: no)")
    # NaN comes through a minimum, and unlike isfinite() it makes no copies (measured: 80 times faster on 134 MB).
    low, high = (value.item() for value in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(f"{label} holds NaN or infinity; the checkpoint is damaged")
    if max(-low, high) > torch.finfo(dtype).max:
        raise CheckpointError(f"{label} reaches {max(-low, high):.3g}, too large for {dtype}; load it as float32")


def update_tensors(
    model: Llama,
    named_tensors: Mapping[str, torch.Tensor],
    write: Callable[[torch.nn.Parameter, slice, torch.Tensor], None] | None = None,
) -> int:
    """Copy tensors into a model's parameters, in place, and return its new weight epoch.

    Names are HF's (`model.layers.0.self_attn.q_proj.weight`, as in a transformers state dict) or the model's own
    (`blocks.0.attention.qkv`), any part of them. Nothing is written unless all names, shapes and dtypes fit (InputError).
    write(parameter, rows, tensor): in place of a copy, for weights that are held elsewhere.
    """
    everything = slice(None)
    places = {name: (parameter, rows) for name, parameter, rows in hf_rows(model)}
    places |= {name: (parameter, everything) for name, parameter in model.named_parameters()}
    ignored = {"lm_head.weight"} if model.config.tie_embeddings else set()
    for name, tensor in named_tensors.items():
        if name not in places and name not in ignored:
            near = difflib.get_close_matches(name, places, n=1)
            raise InputError(f"the model has no tensor {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if name in places:
            parameter, rows = places[name]
            if tensor.shape != parameter[rows].shape:
                raise InputError(f"{name} has shape {list(tensor.shape)}; the model's is {list(parameter[rows].shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} is {tensor.dtype}; expected a floating-point tensor")
    model.half_updated = True
    with torch.no_grad():
        for name, tensor in named_tensors.items():
            if name in places:
                (write or _copy)(*places[name], tensor)
    return model.weights_changed()


def _copy(parameter: torch.nn.Parameter, rows: slice, tensor: torch.Tensor) -> None:
    parameter[rows].copy_(tensor)


def hf_tensors(model: Llama) -> Iterator[tuple[str, torch.Tensor]]:
    """HF's tensor names and the (views of the) parameters that hold them."""
    for name, parameter, rows in hf_rows(model):
        yield name, parameter[rows]


def hf_rows(model: Llama) -> Iterator[tuple[str, torch.nn.Parameter, slice]]:
    """HF's tensor names, and which rows of which parameter hold each; the parts of a parameter one after the other."""
    config = model.config
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    whole = slice(None)
    yield "model.embed_tokens.weight", model.embed, whole
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at = f"model.layers.{number}."
        qkv, gate_up = block.attention.qkv, block.mlp.gate_up
        yield at + "input_layernorm.weight", block.attention_norm.weight, whole
        yield at + "self_attn.q_proj.weight", qkv, slice(q)
        yield at + "self_attn.k_proj.weight", qkv, slice(q, q + kv)
        yield at + "self_attn.v_proj.weight", qkv, slice(q + kv, None)
        yield at + "self_attn.o_proj.weight", block.attention.o, whole
        yield at + "post_attention_layernorm.weight", block.mlp_norm.weight, whole
        yield at + "mlp.gate_proj.weight", gate_up, slice(config.ffn_dim)
        yield at + "mlp.up_proj.weight", gate_up, slice(config.ffn_dim, None)
        yield at + "mlp.down_proj.weight", block.mlp.down, whole
    yield "model.norm.weight", model.norm.weight, whole
    if not config.tie_embeddings:
        yield "lm_head.weight", model.head, whole


def _check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model {config.vocab_size} embeddings: "
            "they do not belong together; use the tokenizer that the model was trained with"
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
    tensors = {name: slot.detach() for name, slot in hf_tensors(model)}
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
    shutil.copymode(path.parent / "config.json", path)  # safetensors makes its file for the owner alone


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


def _check_replaceable(directory: Path, mark: str, what: str) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; {what} is a directory: choose another name")
    if any(directory.iterdir()) and not (directory / mark).is_file():
        kind = what.split()[-1]
        raise InputError(f"{directory} holds files but no {kind} and would be replaced whole; choose another name")


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
