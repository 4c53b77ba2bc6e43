"""Rows that are held out: measured now and then, to keep the best weights and to stop when nothing gets better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.train.batches import DPORow, SFTRow
from engine.train.state import Progress, rows_hash

MEASURES = {"loss": -1, "rewards/accuracies": 1, "rewards/margins": 1}  # which way is better


@dataclass(frozen=True)
class Heldout:
    """Measure `rows`, of the kind that is trained on, every `every` steps and after the last, without dropout.

    The metrics of that step get the loss and what belongs to it under TRL's names, `eval_loss`, `eval_rewards/margins` and
    so on, and the state is saved. `by` says which of them is the measure: "loss" (the lower the better), and with DPO
    "rewards/accuracies" or "rewards/margins" (the higher).
    `keep_best`: the model ends with the weights that measured best, the first of equals. `patience`: training ends after
    that many measurements in a row that were no better than the best (None: never). Both go through an interruption as if
    there had been none. A measure that is not finite ends the training: FloatingPointError naming the step and the rows.
    """

    rows: Sequence[SFTRow] | Sequence[DPORow]
    every: int
    keep_best: bool = False
    patience: int | None = None
    by: str = "loss"

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; expected an integer of at least 1")
        if not isinstance(self.by, str) or self.by not in MEASURES:
            raise InputError(f"by is {self.by!r}; expected one of {', '.join(MEASURES)}")

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` (from 1) of `steps`."""
        return step % self.every == 0 or step == steps

    def note(self, progress: Progress, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after `step`: finite numbers."""
        value = metrics[self.by]
        better = progress.best is None or MEASURES[self.by] * value > MEASURES[self.by] * progress.best
        if better:
            progress.best, progress.best_step, progress.stale = value, step, 0
        else:
            progress.stale += 1

    def gives_up(self, progress: Progress) -> bool:
        return self.patience is not None and progress.stale >= self.patience

    def identity(self) -> dict[str, Any]:
        options = {"every": self.every, "keep_best": self.keep_best, "patience": self.patience, "by": self.by}
        return {"rows": rows_hash(self.rows), **options}
