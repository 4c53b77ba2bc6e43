"""Token trees: how sequences that share a beginning are packed for training, without padding and without repetition.

A tree is a segment of tokens with children that continue it: a DPO prompt with its chosen and rejected answer, or just
one segment. A pack lists several trees in pre-order; each token carries its depth (`position`) and where its subtree
stops in the pack (`end`), and `j <= i < end[j]` is the whole attention mask. Losses run over *edges*: the last token of
a shared prompt predicts the first token of every answer, so a row can have several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import InputError


@dataclass(frozen=True)
class TokenTree:
    """One segment and what continues it.

    `weight` is the loss weight of predicting each of this segment's tokens (0: a prompt; one float, or one per token);
    `sequence` is the number of the answer to which the segment's edges are summed (any int >= 0, unique in a batch);
    `key` (64 bits, signed) names the segment in dropout: the mask of a token depends on it and the token's position.
    """

    tokens: Sequence[int]
    weight: float | Sequence[float] = 0.0
    sequence: int = 0
    children: tuple[TokenTree, ...] = ()
    key: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise InputError("a TokenTree segment has no tokens; leave empty segments out")
        if not isinstance(self.weight, (int, float)) and len(self.weight) != len(self.tokens):
            raise InputError(f"a TokenTree segment of {len(self.tokens)} tokens has {len(self.weight)} loss weights")

    def __len__(self) -> int:
        return len(self.tokens) + sum(len(child) for child in self.children)

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches: one sequence, however many segments it has."""
        return len(self.children) == 0 or (len(self.children) == 1 and self.children[0].is_chain)

    @staticmethod
    def pack(trees: Iterable[TokenTree], budget: int) -> list[Pack]:
        """Put whole trees, in the given order, into packs of at most `budget` tokens."""
        packs: list[Pack] = []
        builder = _Builder()
        for number, tree in enumerate(trees):
            size = len(tree)
            if size > budget:
                raise InputError(
                    f"tree {number} has {size} tokens; a pack holds {budget}: raise the budget or cut the row"
                )
            if len(builder.tokens) + size > budget:
                packs.append(builder.finish())
                builder = _Builder()
            builder.add(tree)
            builder.chains.append(size if tree.is_chain else 0)
        if builder.tokens:
            packs.append(builder.finish())
        return packs


@dataclass(frozen=True)
class Edges:
    """What is predicted, one entry per (row, next token): all [E]; row, target and sequence int64, weight fp32 (not 0)."""

    row: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    sequence: torch.Tensor

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: str | torch.device) -> Edges:
        return Edges(*(x.to(device) for x in (self.row, self.target, self.weight, self.sequence)))


@dataclass(frozen=True)
class Pack:
    """Trees in pre-order: tokens, position, end and key (of the token's segment) are int64 [N]. `chains`: how many tokens
    each tree has, where none branches: then the pack is plain causal sequences, one after the other."""

    tokens: torch.Tensor
    position: torch.Tensor
    end: torch.Tensor
    key: torch.Tensor
    edges: Edges
    chains: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: str | torch.device) -> Pack:
        tokens, position, end, key = (x.to(device) for x in (self.tokens, self.position, self.end, self.key))
        return Pack(tokens, position, end, key, self.edges.to(device), self.chains)


@dataclass
class _Builder:
    tokens: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    key: list[int] = field(default_factory=list)
    edges: list[tuple[int, int, float, int]] = field(default_factory=list)
    chains: list[int] = field(default_factory=list)  # tokens of each tree, 0 for one that branches

    def add(self, tree: TokenTree, parent: int = -1, depth: int = 0) -> None:
        """Append the segment, then its children; `parent` is the row of the token before the segment (-1: none)."""
        start, size, stop = len(self.tokens), len(tree.tokens), len(self.tokens) + len(tree)
        self.tokens.extend(tree.tokens)
        self.position.extend(range(depth, depth + size))
        self.end.extend([stop] * size)
        self.key.extend([tree.key] * size)
        for row, (token, weight) in enumerate(_weighted(tree), start=start):
            before = parent if row == start else row - 1
            if weight and before >= 0:  # the first token of a tree has nothing before it that could predict it
                self.edges.append((before, token, weight, tree.sequence))
        for child in tree.children:
            self.add(child, start + size - 1, depth + size)

    def finish(self) -> Pack:
        row, target, weight, sequence = zip(*self.edges, strict=True) if self.edges else ((), (), (), ())
        edges = Edges(_ints(row), _ints(target), torch.tensor(weight, dtype=torch.float32), _ints(sequence))
        chains = tuple(self.chains) if all(self.chains) else None
        return Pack(_ints(self.tokens), _ints(self.position), _ints(self.end), _ints(self.key), edges, chains)


def _weighted(tree: TokenTree) -> Iterator[tuple[int, float]]:
    weights = [tree.weight] * len(tree.tokens) if isinstance(tree.weight, (int, float)) else tree.weight
    return zip(tree.tokens, weights, strict=True)


def _ints(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
