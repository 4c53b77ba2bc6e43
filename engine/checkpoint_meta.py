"""Reading Meta's layout: params.json and consolidated.00.pth, consolidated.01.pth, ...

The files are the ranks of tensor parallelism: each holds every tensor, but only its part of the rows or columns; the
norms are whole in all of them. Llama 2 came in 1 (7B), 2 (13B) and 8 (70B) files. Two things differ from HF's layout
besides the names: rotary pairs are neighbouring rows of q and k (HF and this engine: rows half a head apart), and the
config tells neither the width of the MLP (a rule does) nor, with `vocab_size: -1`, the vocabulary (the tensors do).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from engine.checkpoint_mapped import MappedFile
from engine.config import LlamaConfig, read_json
from engine.errors import CheckpointError

EMBED, HEAD = "tok_embeddings.weight", "output.weight"

# HF's name of a part -> Meta's, and the dimension along which the files split it (None: each has all of it).
PARTS: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens": ("tok_embeddings", 1),  # Llama 1 and 2; `_axis` also finds 0, as Llama 3 has it
    "input_layernorm": ("attention_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
}
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
KEY_VALUE = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


class MetaFiles:
    """`config`, and the tensors by HF's names."""

    def __init__(self, directory: Path) -> None:
        self._params = directory / "params.json"
        params = read_json(self._params)
        self._shards = [MappedFile(path, _load) for path in _shard_paths(directory)]
        vocab = self._vocab_size() if params.get("vocab_size", -1) == -1 else None
        self.config = LlamaConfig.from_meta(params, vocab, where=str(self._params))

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        self._need(EMBED)
        return self._shards[0].tensors[EMBED].dtype

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless every file holds exactly its parts of the tensors of these names and shapes."""
        names = {_meta_name(name)[0] for name in shapes}
        for shard in self._shards:
            missing = sorted(names - shard.tensors.keys())
            extra = sorted(shard.tensors.keys() - names - {"rope.freqs"})  # a table that everyone computes
            if missing:
                what = f"{len(missing)} tensors that {self._params.name} asks for, first {missing[0]}"
                raise CheckpointError(f"{shard.path} lacks {what}; copy it again")
            if extra:
                what = f"{len(extra)} tensors that {self._params.name} has no place for, first {extra[0]}"
                raise CheckpointError(f"{shard.path} has {what}; use the params.json that belongs to them")
        for name, shape in shapes.items():
            self._check_shape(name, shape)

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
        """What the tensor consists of: (file and name for errors, place in the tensor, values), all views of the files.

        Where files hold the same part, the first comes last, so that whoever copies in order ends with its values.
        """
        meta, _ = _meta_name(name)
        axis, parts = self._split(name, shape)
        size = shape[axis] // parts
        for number, shard in reversed(list(enumerate(self._shards))):
            label, start = f"{shard.path}: {meta}", number * parts // len(self._shards) * size
            for first, rows in shard.blocks(meta):
                if axis == 1:
                    yield label, (slice(first, first + len(rows)), slice(start, start + size)), rows
                elif name.endswith(ROTATED):
                    for where, values in _half_split(rows, start + first, self.config.head_dim):
                        yield label, (where,), values
                else:
                    yield label, (slice(start + first, start + first + len(rows)),), rows

    def _split(self, name: str, shape: torch.Size) -> tuple[int, int]:
        """The dimension along which the files split a tensor, and into how many parts."""
        meta, axis = _meta_name(name)
        count, found = len(self._shards), self._shards[0].tensors[meta].shape
        if axis is None:
            return 0, 1
        if meta == EMBED and found != shape and found == (shape[0] // count, shape[1]):
            return 0, count
        # With fewer key/value heads than files some writers give each file a whole head, others a slice of one.
        heads = self.config.n_kv_heads
        if name.endswith(KEY_VALUE) and found[:1] == (self.config.head_dim,) and count % heads == 0:
            return 0, heads
        return axis, count

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        meta, _ = _meta_name(name)
        axis, parts = self._split(name, shape)
        if shape[axis] % parts:
            what = f"{meta} of shape {list(shape)} cannot be split over {parts} files"
            raise CheckpointError(
                f"{self._params.parent}: {what}; is a consolidated.*.pth missing or of another model?"
            )
        expected = [*shape]
        expected[axis] //= parts
        for shard in self._shards:
            found = [*shard.tensors[meta].shape]
            if found != expected:
                asked = f"{self._params.name} and {_files(len(self._shards))} ask for {expected}"
                raise CheckpointError(f"{shard.path}: {meta} has shape {found}; {asked}: is a file missing or foreign?")

    def _vocab_size(self) -> int:
        """The rows of the head; the embedding must have as many."""
        self._need(EMBED)
        self._need(HEAD)
        count = len(self._shards)
        embed, head = (self._shards[0].tensors[name].shape[0] for name in (EMBED, HEAD))
        if embed not in (head, head * count):
            raise CheckpointError(
                f"{self._shards[0].path}: {EMBED} has {embed} rows and {HEAD} {head} in each of {_files(count)}, so the "
                "vocabulary is unclear; is a consolidated.*.pth missing?"
            )
        return head * count

    def _need(self, name: str) -> None:
        shard = self._shards[0]
        if name not in shard.tensors or shard.tensors[name].dim() != 2:
            raise CheckpointError(f"{shard.path} has no matrix {name}; expected a Llama checkpoint in Meta's layout")


def _meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of an HF tensor, and the dimension along which it is split."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
    if layer:
        part, axis = PARTS[layer[2]]
        return f"layers.{layer[1]}.{part}.weight", axis
    part, axis = PARTS[name.removesuffix(".weight")]
    return f"{part}.weight", axis


def _half_split(tensor: torch.Tensor, start: int, head_dim: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of q or k, the first of which is row `start` of the whole: row 2i + j of a head goes to row j * D/2 + i.

    Yields (rows of the whole, every other row of the tensor) per head and j, so that no permuted copy is made. A tensor
    may begin and end inside a head.
    """
    end = start + len(tensor)
    for head in range(start // head_dim * head_dim, end, head_dim):  # first row of a head
        first, stop = max(start, head), min(end, head + head_dim)
        for j in (0, 1):
            row = first + (first + j) % 2  # head_dim is even, so the parity within the head is that of the row
            values = tensor[row - start : stop - start : 2]
            to = head + j * head_dim // 2 + (row - head) // 2
            if len(values):
                yield slice(to, to + len(values)), values


def _shard_paths(directory: Path) -> list[Path]:
    """consolidated.00.pth and so on, without a gap."""
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise CheckpointError(f"{directory} has params.json but no consolidated.00.pth; copy the whole checkpoint")
    for number, path in enumerate(paths):
        expected = f"consolidated.{number:02d}.pth"
        if path.name != expected:
            raise CheckpointError(f"{directory} has {path.name} but no {expected}; copy the whole checkpoint")
    return paths


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory; nothing in it is executed."""
    try:
        values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zip reader, unpickler and storage each raise types of their own
        raise CheckpointError(f"{path} {_why_unreadable(path, error)}") from error
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise CheckpointError(f"{path} holds something else than named tensors; expected Meta's consolidated weights")
    return values


def _why_unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as failure:
        return f"cannot be read ({failure.strerror}); make it readable"
    if start == b"\x80\x02":  # a bare pickle: torch.save before version 1.6
        return "is in torch's old format, which cannot be mapped into memory; load it with weights_only=True and save it anew"
    if zipfile.is_zipfile(path) and "weights_only" in str(error):
        return (
            "is corrupt or holds more than tensors, which could run code and is refused; copy it again or save it anew"
        )
    return f"is truncated or corrupt ({reason}); copy it again"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
