"""SFT and DPO: one loop over packed token trees.

Order of a step: count over the whole batch, forward and backward pack by pack, clip, refuse a non-finite step, update.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine import ops
from engine.errors import InputError, NotBuiltError
from engine.model import Llama, tree_attend
from engine.train.batches import DPORow, SFTRow, batch_order, check_rows, dpo_tree, sft_tree
from engine.train.losses import dpo_loss, sequence_logps, sft_loss
from engine.tree import Pack, TokenTree

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; the defaults are the paper's (section 3.1.3), the rest plain AdamW.

    lr falls to min_lr by `schedule` after `warmup_steps`; max_pack_tokens bounds the tokens of one forward pass.
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

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if self.dropout != 0.0:
            raise NotBuiltError(f"dropout is {self.dropout}; only 0 is built so far")
        for name in ("epochs", "batch_size", "max_pack_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}; expected at least 1, or None for all epochs")
        for name in ("lr", "min_lr", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected a finite number of at least 0")
        if not self.clip > 0:
            raise InputError(f"clip is {self.clip}; expected a gradient norm above 0 (inf: never clip)")


@dataclass(frozen=True)
class DPOConfig(SFTConfig):
    """Direct preference optimisation; every row carries its reference log-probs."""

    lr: float = 1e-6
    min_lr: float = 1e-7
    schedule: str = "linear"
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; expected a finite number above 0")


@dataclass(frozen=True)
class TrainResult:
    steps: int
    metrics_path: Path | None
    weight_epoch: int


Rows = Sequence[SFTRow] | Sequence[DPORow]
Metrics = dict[str, float]


def train(
    model: Llama,
    rows: Rows,
    config: SFTConfig,
    out_dir: str | Path | None = None,
    on_step: Callable[[int, int, Metrics], None] | None = None,
) -> TrainResult:
    """Train `model` in place on SFTRows (SFTConfig) or DPORows with `reference` set (DPOConfig).

    Writes `metrics.jsonl` (one row a step, TRL's names) and `timing.jsonl` (tokens and seconds a step) into `out_dir`;
    calls `on_step(step, steps, metrics)`. A step whose loss or gradient is not finite raises FloatingPointError before
    it touches the weights. Raises the model's weight epoch once a step.
    """
    check_rows(rows, model.config.vocab_size, model.config.max_seq_len)
    _check_kind(rows, config)
    batches = batch_order(len(rows), config.batch_size, config.epochs, config.seed, config.max_steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    metrics_log, timing_log = [], []
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(batches))
        metrics, tokens = _step(model, [rows[number] for number in batch], config, optimizer, step, batch)
        metrics = {"step": step + 1, **metrics, "learning_rate": learning_rate(config, step, len(batches))}
        metrics_log.append(metrics)
        timing_log.append({"step": step + 1, "tokens": tokens, "seconds": time.perf_counter() - started})
        if on_step:
            on_step(step + 1, len(batches), metrics)
    optimizer.zero_grad(set_to_none=True)
    path = _write_logs(Path(out_dir), metrics_log, timing_log) if out_dir is not None else None
    return TrainResult(len(batches), path, model.weight_epoch)


def learning_rate(config: SFTConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then `schedule` from lr down to min_lr at the last step. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    fall = progress if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr + (config.min_lr - config.lr) * fall


def reference_logprobs(model: Llama, rows: Sequence[DPORow], max_pack_tokens: int = 4096) -> list[tuple[float, float]]:
    """Sums of log-probs (chosen, rejected) of every row under `model`, by the same op and packing as training."""
    check_rows(rows, model.config.vocab_size, model.config.max_seq_len)
    sums: list[float] = []
    with torch.no_grad():
        for pack in TokenTree.pack((dpo_tree(row, number) for number, row in enumerate(rows)), max_pack_tokens):
            sums.extend(sequence_logps(pack_logprobs(model, pack), pack.edges, pack.edges.sequence.unique()).tolist())
    return list(zip(sums[::2], sums[1::2], strict=True))


def pack_logprobs(model: Llama, pack: Pack) -> torch.Tensor:
    """Log-prob of every edge of a pack [E] fp32, differentiable."""
    hidden = model(pack.tokens, pack.position, tree_attend(pack.end))  # [N, dim]
    return ops.token_logprobs(hidden[pack.edges.row], model.head, pack.edges.target)[0]


def _check_kind(rows: Rows, config: SFTConfig) -> None:
    kind = DPORow if isinstance(config, DPOConfig) else SFTRow
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            raise InputError(
                f"row {number} is a {type(row).__name__}; {type(config).__name__} trains on {kind.__name__}"
            )
        if isinstance(row, DPORow) and row.reference is None:
            raise InputError(
                f"row {number} has no reference log-probs; compute them with reference_logprobs(model, rows)"
            )


def _step(
    model: Llama,
    rows: Sequence[SFTRow | DPORow],
    config: SFTConfig,
    optimizer: torch.optim.Optimizer,
    step: int,
    numbers: list[int],
) -> tuple[Metrics, int]:
    optimizer.zero_grad(set_to_none=True)
    metrics: Metrics = {}
    tokens = 0
    for pack, loss_of in _packs(rows, config):
        loss, part = loss_of(pack_logprobs(model, pack))
        loss.backward()
        tokens += len(pack)
        metrics = {name: metrics.get(name, 0.0) + value for name, value in part.items()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
        raise FloatingPointError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}, on rows {numbers}; "
            "the weights were not touched: lower the learning rate or look at those rows"
        )
    optimizer.step()
    model.weights_changed()
    return {**metrics, "grad_norm": norm}, tokens


LossOf = Callable[[torch.Tensor], tuple[torch.Tensor, Metrics]]


def _packs(rows: Sequence[SFTRow | DPORow], config: SFTConfig) -> Iterator[tuple[Pack, LossOf]]:
    """The packs of one batch, each with its loss as a function of the per-edge log-probs."""
    if isinstance(config, DPOConfig):
        pairs = [row for row in rows if isinstance(row, DPORow)]
        reference = torch.tensor([row.reference for row in pairs], dtype=torch.float32)  # [pairs, 2]
        for pack in TokenTree.pack([dpo_tree(row, i) for i, row in enumerate(pairs)], config.max_pack_tokens):
            yield (
                pack,
                partial(dpo_loss, edges=pack.edges, reference=reference, beta=config.beta, total_pairs=len(pairs)),
            )
    else:
        examples = [row for row in rows if isinstance(row, SFTRow)]
        total = float(sum(len(row.completion) for row in examples))
        for pack in TokenTree.pack([sft_tree(row, i) for i, row in enumerate(examples)], config.max_pack_tokens):
            yield pack, partial(sft_loss, edges=pack.edges, total_weight=total)


def _write_logs(out_dir: Path, metrics: list[Metrics], timing: list[dict[str, float]]) -> Path:
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        (out_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out_dir / "metrics.jsonl"
