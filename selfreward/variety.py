"""How varied are a model's texts? Plain figures over token ids: a model that has collapsed shows here first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

REPEATED = 4  # tokens in a row


def distinct(texts: Iterable[Sequence[int]], n: int) -> float | None:
    """distinct-n: of all runs of n tokens in these texts, the share that differ (1: none occurs twice).

    It falls with the amount of text, so only figures over equally many tokens compare.
    """
    different, total = set[tuple[int, ...]](), 0
    for ids in texts:
        runs = _runs(ids, n)
        different.update(runs)
        total += len(runs)
    return len(different) / total if total else None


def repetition(texts: Iterable[Sequence[int]]) -> float | None:
    """Mean over the texts of the share of their runs of four tokens that stood in the same text before.

    0: no text repeats itself; near 1: a loop. Texts of fewer than four tokens are left out.
    """
    found = [(len(set(runs)), len(runs)) for ids in texts if (runs := _runs(ids, REPEATED))]
    return sum(1 - different / total for different, total in found) / len(found) if found else None


def diversity(groups: Iterable[Sequence[Hashable]]) -> float | None:
    """Mean over the prompts of (different answers - 1) / (answers - 1). 0: always the same text, 1: all differ."""
    found = [(len(set(group)) - 1) / (len(group) - 1) for group in groups if len(group) > 1]
    return sum(found) / len(found) if found else None


def _runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
