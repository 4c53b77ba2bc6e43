"""Reading HF's layout: config.json, and safetensors in one file or in shards with an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoint_mapped import MappedFile
from engine.config import LlamaConfig, read_json
from engine.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBED = "model.embed_tokens.weight"


class HfFiles:
    """`config`, and the tensors by HF's names."""

    def __init__(self, directory: Path) -> None:
        self.config = LlamaConfig.from_hf(directory)
        self._directory = directory
        self._files = _tensor_files(directory)

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        if EMBED not in self._files:
            raise CheckpointError(f"{self._directory} has no tensor {EMBED}; expected a Llama checkpoint in HF layout")
        return self._files[EMBED].tensors[EMBED].dtype

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless the files hold exactly the tensors of these names and shapes."""
        ignored = {name for name in self._files if name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_embeddings:
            ignored.add("lm_head.weight")
        missing = sorted(shapes.keys() - self._files.keys())
        extra = sorted(self._files.keys() - shapes.keys() - ignored)
        if missing:
            what = f"{len(missing)} tensors that config.json asks for, first {missing[0]}"
            raise CheckpointError(f"{self._directory} lacks {what}; copy the whole checkpoint")
        if extra:
            what = f"{len(extra)} tensors that config.json has no place for, first {extra[0]}"
            raise CheckpointError(f"{self._directory} has {what}; use the config.json that belongs to them")
        for name, shape in shapes.items():
            found = self._files[name].tensors[name].shape
            if found != shape:
                label = f"{self._files[name].path}: {name}"
                raise CheckpointError(f"{label} has shape {list(found)}; config.json asks for {list(shape)}")

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
        """What the tensor consists of: (file and name for errors, place in the tensor, values)."""
        file = self._files[name]
        for first, rows in file.blocks(name):
            yield f"{file.path}: {name}", (slice(first, first + len(rows)),), rows


def _tensor_files(directory: Path) -> dict[str, MappedFile]:
    """Tensor name -> its file, from the index of a sharded checkpoint or from the single file."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(f"{directory} has neither {SINGLE} nor an index of shards; expected HF layout")
        single = MappedFile(directory / SINGLE, _load)
        return dict.fromkeys(single.tensors, single)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for every tensor; copy it again")
    for name in sorted(set(names.values())):
        if not (directory / name).is_file():
            raise CheckpointError(f"{index} points to {name}, which is missing; copy the whole checkpoint")
    files = {name: MappedFile(directory / name, _load) for name in sorted(set(names.values()))}
    for tensor, name in names.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{index} points to {name} for {tensor}, which is not in it; copy both again")
    return {tensor: files[name] for tensor, name in names.items()}


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error
    except (AttributeError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds a tensor that torch cannot read ({error}); expected fp32, fp16 or bf16"
        ) from error
