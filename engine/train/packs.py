"""What one step trains on: its rows, and the packs that they become, each with its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.train.batches import DPORow, Keys, Rows, SFTRow, build_trees, pack_trees, replay_batch, row_keys
from engine.train.config import DPOConfig, SFTConfig
from engine.train.losses import PREFERENCE, chosen_nll, replay_loss, sft_loss
from engine.tree import Edges, Pack

Metrics = dict[str, float]
LossOf = Callable[..., tuple[torch.Tensor, Metrics]]
PackLoss = tuple[Pack, LossOf, bool]  # the loss of (logp, edges=...), some of the pack's trees; whether linear in logp


@dataclass(frozen=True)
class Batch:
    """What one step trains on: rows and replay rows, each with its number in the data, and with its keys."""

    step: int
    rows: list[tuple[int, SFTRow | DPORow]]
    replay: list[tuple[int, SFTRow]]
    keys: list[Keys]
    replay_keys: list[Keys]

    @staticmethod
    def take(
        rows: Rows,
        replay: Sequence[SFTRow],
        config: SFTConfig,
        step: int,
        numbers: Sequence[int],
        keys: tuple[list[Keys], list[Keys]] | None = None,
    ) -> Batch:
        """Step `step` (from 0): the rows of these numbers, and the replay rows whose turn it is. keys: `row_keys` of all
        rows and of all replay rows, which are made where they are not given."""
        of_rows, of_replay = keys or (row_keys(rows), row_keys(replay, replay=True))
        turn: list[int] = []
        if isinstance(config, DPOConfig) and replay:
            turn = replay_batch(len(replay), config.replay_batch_size, config.seed, step)
        return Batch(
            step,
            [(number, rows[number]) for number in numbers],
            [(number, replay[number]) for number in turn],
            [of_rows[number] for number in numbers],
            [of_replay[number] for number in turn],
        )


def packs(batch: Batch, config: SFTConfig, device: torch.device) -> Iterator[PackLoss]:
    """The packs of one batch, each with its loss."""
    rows = list(zip(batch.keys, (row for _, row in batch.rows), strict=True))
    if isinstance(config, DPOConfig):
        yield from _dpo_packs([(keys, row) for keys, row in rows if isinstance(row, DPORow)], config, device)
        loss: LossOf = partial(replay_loss, weight=config.replay_weight)
        rows = list(zip(batch.replay_keys, (row for _, row in batch.replay), strict=True))
    else:
        loss = sft_loss
    yield from _sft_packs(
        [(keys, row) for keys, row in rows if isinstance(row, SFTRow)], loss, config.max_pack_tokens, device
    )


def _sft_packs(rows: list[tuple[Keys, SFTRow]], loss: LossOf, budget: int, device: torch.device) -> Iterator[PackLoss]:
    """`loss` is divided by the number of all target tokens of the rows (at least 1: without targets it is 0)."""
    total = float(max(1, sum(row.targets for _, row in rows)))
    for pack in pack_trees(build_trees(rows, budget)[0], budget):
        yield pack.to(device), partial(loss, total_weight=total), True


def _dpo_packs(rows: list[tuple[Keys, DPORow]], config: DPOConfig, device: torch.device) -> Iterator[PackLoss]:
    trees, sequences = build_trees(rows, config.max_pack_tokens)
    reference = torch.tensor([row.reference for _, row in rows], dtype=torch.float32, device=device)  # [pairs, 2]
    pairs = torch.tensor(sequences, device=device)  # [pairs, 2]
    totals = len(rows), sum(len(row.chosen) for _, row in rows)
    loss = partial(preference_loss, sequences=pairs, reference=reference, totals=totals, config=config)
    for pack in pack_trees(trees, config.max_pack_tokens):
        yield pack.to(device), loss, False


def preference_loss(
    logp: torch.Tensor,
    edges: Edges,
    sequences: torch.Tensor,
    reference: torch.Tensor,
    totals: tuple[int, int],
    config: DPOConfig,
) -> tuple[torch.Tensor, Metrics]:
    """The loss of the pairs whose answers are in `edges` by the options of `config`.

    sequences and reference [P, 2], as in `dpo_loss`, of all pairs of the batch; totals: their number, and the target tokens
    of their chosen answers.
    """
    pairs, tokens = totals
    here = torch.isin(sequences[:, 0], edges.sequence)
    sequences, reference = sequences[here], reference[here]
    loss, metrics = PREFERENCE[config.loss](
        logp, edges, reference, config.beta, pairs, config.label_smoothing, sequences
    )
    if config.nll_weight:
        nll, found = chosen_nll(logp, edges, tokens, sequences)
        loss = loss + config.nll_weight * nll
        metrics |= found | {"loss": metrics["loss"] + config.nll_weight * found["nll_loss"]}
    return loss, metrics
