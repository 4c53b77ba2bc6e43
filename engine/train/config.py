"""What a training is told: its options, what each may be, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.model import Run, plainly, recomputed
from engine.train.losses import PREFERENCE
from engine.train.precision import check_precision

SCHEDULES = ("constant", "linear", "cosine")
CHECKPOINTING: dict[str, Run] = {"none": plainly, "full": recomputed}


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; the defaults are the paper's (section 3.1.3), the rest plain AdamW.

    lr falls to min_lr by `schedule` after `warmup_steps`; max_pack_tokens bounds the tokens of one forward pass.
    `dropout` is the rate at the embedding and where attention and MLP join the residual stream.
    activation_checkpointing "full": every block's activations are made again in the backward, a forward more for a
    fraction of the memory, and the same bits; "none": they are kept.
    precision: "fp32", "bf16-copy" (fp32 parameters, computing in a bf16 copy) or "bf16-stochastic" (bf16 parameters, whose
    updates are rounded stochastically): `engine/train/precision.py`.
    Every `save_every` steps the state is saved (None: only when stopped and at the end). The paper's stages have 250 to
    300 steps: at 100 a kill costs at most a third of one, and 12 bytes a parameter are written three times.
    """

    lr: float = 5.5e-6
    min_lr: float = 1.1e-6
    schedule: str = "cosine"
    warmup_steps: int = 0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 16
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    max_pack_tokens: int = 4096
    dropout: float = 0.0
    seed: int = 0
    save_every: int | None = 100
    activation_checkpointing: str = "none"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        check_precision(self.precision)
        for name in ("epochs", "batch_size", "max_pack_tokens"):
            _check_integer(name, getattr(self, name))
        if self.max_steps is not None:
            _check_integer("max_steps", self.max_steps, " (None: all epochs)")
        if self.save_every is not None:
            _check_integer("save_every", self.save_every, " (None: when stopped and at the end)")
        _check_integer("warmup_steps", self.warmup_steps, low=0)
        _check_integer("seed", self.seed, " and below 2^63", low=0, below=1 << 63)
        for name in ("lr", "min_lr", "weight_decay"):
            _check_number(name, getattr(self, name), lambda x: 0 <= x < math.inf, "a finite number of at least 0")
        if self.min_lr > self.lr and self.schedule != "constant":
            raise InputError(f"min_lr is {self.min_lr}, above lr ({self.lr}), which falls to it; lower min_lr too")
        _check_number("dropout", self.dropout, lambda x: 0 <= x < 1, "a rate of at least 0 and below 1")
        _check_number("clip", self.clip, lambda x: x > 0, "a gradient norm above 0 (inf: never clip)")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2 or not all(map(_is_beta, self.betas)):
            raise InputError(f"betas is {self.betas!r}; expected two numbers of at least 0 and below 1")


@dataclass(frozen=True)
class DPOConfig(SFTConfig):
    """Direct preference optimisation; every row carries its reference log-probs.

    `loss`: "sigmoid" (DPO) or "ipo", of which `beta` is the strength. `label_smoothing` is the probability that a label
    is wrong (cDPO). `nll_weight` times the NLL of the chosen answers, per token of them, is added. Each of them composes
    with the others, and with replay (engine/train/losses.py has the formulas and their sources).

    Replay: every step adds `replay_weight` times the mean NLL per target token of the next `replay_batch_size` of the
    SFT rows given to `train` as `replay`, to hold what SFT taught (such as judging) while DPO moves on.
    """

    lr: float = 1e-6
    min_lr: float = 1e-7
    schedule: str = "linear"
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    replay_weight: float = 0.0
    replay_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("beta", self.beta, lambda x: 0 < x < math.inf, "a finite number above 0")
        _check_choice("loss", self.loss, PREFERENCE)
        expected = "a probability of at least 0 and below 0.5"
        _check_number("label_smoothing", self.label_smoothing, lambda x: 0 <= x < 0.5, expected)
        for name in ("nll_weight", "replay_weight"):
            expected = "a finite number of at least 0 (0: off)"
            _check_number(name, getattr(self, name), lambda x: 0 <= x < math.inf, expected)
        _check_integer("replay_batch_size", self.replay_batch_size)


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_integer(name: str, value: Any, otherwise: str = "", low: int = 1, below: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < below:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {low}{otherwise}")


def _check_number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not fits(value):
        raise InputError(f"{name} is {value!r}; expected {expected}")


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


def learning_rate(config: SFTConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then `schedule` from lr down to min_lr at the last step. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    fall = progress if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr + (config.min_lr - config.lr) * fall
