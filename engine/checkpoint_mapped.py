"""A checkpoint file mapped into memory and read in blocks of rows, so that little of it stays resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

BLOCK_BYTES = 16 << 20
RENEW = 1 / 20


class MappedFile:
    """`tensors` by name. Pages that were read count as resident memory of the process until they are unmapped, so the
    mapping is renewed when a 20th of the file has been read: at most 20 times a file and once per block
    (measured: 40 ms for a file of Meta's with 723 tensors).
    """

    def __init__(self, path: Path, load: Callable[[Path], dict[str, torch.Tensor]]) -> None:
        self.path = path
        self.tensors = load(path)
        self._load = load
        self._limit = path.stat().st_size * RENEW
        self._read = 0

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows from there on) of a tensor, in order."""
        rows, size = len(self.tensors[name]), self.tensors[name].nbytes
        step = max(1, BLOCK_BYTES * rows // size)
        for first in range(0, rows, step):
            if self._read > self._limit:
                self.tensors = self._load(self.path)
                self._read = 0
            block = self.tensors[name][first : first + step]
            self._read += block.nbytes
            yield first, block
