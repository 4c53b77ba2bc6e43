"""SFT and DPO: one loop over packed token trees.

Order of a step: count over the whole batch, forward and backward pack by pack, clip, refuse a non-finite step, update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine import ops
from engine.errors import InputError
from engine.lora import LoRA
from engine.model import Dropout, Llama, Run, keep, plainly, recomputed, tree_attend
from engine.train.batches import (
    DPORow,
    SFTRow,
    batch_order,
    check_kinds,
    check_rows,
    dpo_tree,
    replay_batch,
    row_key,
    sft_tree,
)
from engine.train.dropout import pack_dropout
from engine.train.losses import dpo_loss, replay_loss, sequence_logps, sft_loss
from engine.train.precision import check_parameters, check_precision, clip, computing, make_optimizer
from engine.train.state import METRICS, StateDir, identity
from engine.tree import Pack, TokenTree

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
        _check_integer("seed", self.seed, low=0)
        for name in ("lr", "min_lr", "weight_decay"):
            _check_number(name, getattr(self, name), lambda x: 0 <= x < math.inf, "a finite number of at least 0")
        _check_number("dropout", self.dropout, lambda x: 0 <= x < 1, "a rate of at least 0 and below 1")
        _check_number("clip", self.clip, lambda x: x > 0, "a gradient norm above 0 (inf: never clip)")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2 or not all(map(_is_beta, self.betas)):
            raise InputError(f"betas is {self.betas!r}; expected two numbers of at least 0 and below 1")


@dataclass(frozen=True)
class DPOConfig(SFTConfig):
    """Direct preference optimisation; every row carries its reference log-probs.

    Replay: every step adds `replay_weight` times the mean NLL per target token of the next `replay_batch_size` of the
    SFT rows given to `train` as `replay`, to hold what SFT taught (such as judging) while DPO moves on.
    """

    lr: float = 1e-6
    min_lr: float = 1e-7
    schedule: str = "linear"
    beta: float = 0.1
    replay_weight: float = 0.0
    replay_batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("beta", self.beta, lambda x: 0 < x < math.inf, "a finite number above 0")
        expected = "a finite number of at least 0 (0: off)"
        _check_number("replay_weight", self.replay_weight, lambda x: 0 <= x < math.inf, expected)
        _check_integer("replay_batch_size", self.replay_batch_size)


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_integer(name: str, value: Any, otherwise: str = "", low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {low}{otherwise}")


def _check_number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not fits(value):
        raise InputError(f"{name} is {value!r}; expected {expected}")


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


@dataclass(frozen=True)
class TrainResult:
    steps: int
    metrics_path: Path | None
    weight_epoch: int


class TrainingInterrupted(Exception):
    """`should_stop` said so after `step` of `steps` steps; the same call goes on from there if it has an out_dir."""

    def __init__(self, step: int, steps: int, out_dir: Path | None) -> None:
        kept = f"the state is in {out_dir / 'state'}" if out_dir else "nothing was saved: there is no out_dir"
        super().__init__(f"training stopped after step {step} of {steps}; {kept}")
        self.step, self.steps = step, steps


Rows = Sequence[SFTRow] | Sequence[DPORow]
Metrics = dict[str, float]


def train(
    model: Llama | LoRA,
    rows: Rows,
    config: SFTConfig,
    out_dir: str | Path | None = None,
    on_step: Callable[[int, int, Metrics], None] | None = None,
    *,
    resume: bool = True,
    should_stop: Callable[[], bool] | None = None,
    replay: Sequence[SFTRow] | None = None,
) -> TrainResult:
    """Train `model` in place, of a LoRA the adapters, on SFTRows (SFTConfig) or DPORows with `reference` set (DPOConfig;
    `replay`: its rows).

    Writes `metrics.jsonl` (one row a step, TRL's names) and `timing.jsonl` (tokens and seconds a step) into `out_dir`;
    calls `on_step(step, steps, metrics)`. A step whose loss or gradient is not finite raises FloatingPointError before
    it touches the weights. Raises the model's weight epoch once a step.

    The state in `out_dir/state`, saved every `config.save_every` steps, after the last one, and when `should_stop()`,
    asked after every step, is true (then TrainingInterrupted), lets the same call go on where it was: weights, AdamW,
    rows and metrics.jsonl end as the same bits as without the interruption. Call it with the model as first loaded (or
    as the state has it); `weight_epoch` is then the unbroken run's too. InputError names what differs (rows, config,
    weights, torch, threads) or is damaged. The state stays until `clear_state(out_dir)`; resume=False drops it.
    """
    replay = replay or ()
    _check_data(model, rows, replay, config)
    batches = batch_order(len(rows), config.batch_size, config.epochs, config.seed, config.max_steps)
    optimizer = make_optimizer(model, config)
    state = (
        StateDir(Path(out_dir), model, optimizer, identity(model, rows, replay, config))
        if out_dir is not None
        else None
    )
    done = state.begin(resume) if state else 0
    for step in range(done, len(batches)):
        started = time.perf_counter()
        rate = learning_rate(config, step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        metrics, tokens = _step(model, Batch.take(rows, replay, config, step, batches[step]), config, optimizer)
        metrics = {"step": step + 1, **metrics, "learning_rate": rate}
        if state:
            state.log(metrics, {"step": step + 1, "tokens": tokens, "seconds": time.perf_counter() - started})
        if on_step:
            on_step(step + 1, len(batches), metrics)
        stop = should_stop is not None and should_stop()
        if state and (stop or step + 1 == len(batches) or (config.save_every and (step + 1) % config.save_every == 0)):
            state.save(step + 1)
        if stop:
            raise TrainingInterrupted(step + 1, len(batches), state.out_dir if state else None)
    optimizer.zero_grad(set_to_none=True)
    return TrainResult(len(batches), state.out_dir / METRICS if state else None, model.weight_epoch)


def learning_rate(config: SFTConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then `schedule` from lr down to min_lr at the last step. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    fall = progress if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.lr + (config.min_lr - config.lr) * fall


def reference_logprobs(
    model: Llama | LoRA, rows: Sequence[DPORow], max_pack_tokens: int = 4096
) -> list[tuple[float, float]]:
    """Sums of log-probs (chosen, rejected) of every row under `model`, by the same op and packing as training. Where that
    runs in a bf16 copy, give the copy: `compute_model(model, precision)`."""
    _check_model(model)
    check_kinds(rows, DPORow, "expected a DPORow")
    check_rows(rows, model.config.vocab_size, model.config.max_seq_len, max_pack_tokens)
    sums: list[float] = []
    with torch.no_grad(), ops.sums_in_fp32():
        for pack in TokenTree.pack((dpo_tree(row, number) for number, row in enumerate(rows)), max_pack_tokens):
            pack = pack.to(model.embed.device)
            sums.extend(sequence_logps(pack_logprobs(model, pack), pack.edges, pack.edges.sequence.unique()).tolist())
    return list(zip(sums[::2], sums[1::2], strict=True))


def pack_logprobs(model: Llama | LoRA, pack: Pack, dropout: Dropout = keep, run: Run = plainly) -> torch.Tensor:
    """Log-prob of every edge of a pack [E] fp32, differentiable."""
    attend = tree_attend(pack.end, pack.chains)
    hidden = model(pack.tokens, pack.position, attend, dropout=dropout, run=run)  # [N, dim]
    return ops.token_logprobs(hidden[pack.edges.row], model.head, pack.edges.target)[0]


def _check_model(model: Any) -> None:
    if not isinstance(model, (Llama, LoRA)):
        raise InputError(f"model is {model!r}; expected a Llama, as load_checkpoint returns it, or a LoRA")


def _check_data(model: Llama | LoRA, rows: Rows, replay: Sequence[SFTRow], config: SFTConfig) -> None:
    _check_model(model)
    if not isinstance(config, SFTConfig):
        raise InputError(f"config is a {type(config).__name__}; expected an SFTConfig or a DPOConfig")
    kind = DPORow if isinstance(config, DPOConfig) else SFTRow
    check_kinds(rows, kind, f"{type(config).__name__} trains on {kind.__name__}")
    check_parameters(model, config.precision)
    check_rows(rows, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens)
    for number, row in enumerate(rows):
        if isinstance(row, DPORow):
            _check_reference(number, row.reference)
    weight = config.replay_weight if isinstance(config, DPOConfig) else 0.0
    if bool(replay) != (weight > 0):
        raise InputError(
            f"there are {len(replay)} replay rows and replay_weight is {weight}; give both (in a DPOConfig) or neither"
        )
    if replay:
        check_kinds(replay, SFTRow, "replay trains on SFTRow", "replay row")
        check_rows(replay, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens, "replay row")


def _check_reference(number: int, reference: Any) -> None:
    if reference is None:
        raise InputError(f"row {number} has no reference log-probs; compute them with reference_logprobs(model, rows)")
    try:
        fits = len(reference) == 2 and all(math.isfinite(value) for value in reference)
    except TypeError:
        fits = False
    if not fits:
        raise InputError(f"row {number}: reference is {reference!r}; expected two finite numbers (chosen, rejected)")


@dataclass(frozen=True)
class Batch:
    """What one step trains on: rows and replay rows, each with its number in the data."""

    step: int
    rows: list[tuple[int, SFTRow | DPORow]]
    replay: list[tuple[int, SFTRow]]

    @staticmethod
    def take(rows: Rows, replay: Sequence[SFTRow], config: SFTConfig, step: int, numbers: list[int]) -> Batch:
        """Step `step` (from 0): the rows of these numbers, and the replay rows whose turn it is."""
        turn: list[int] = []
        if isinstance(config, DPOConfig) and replay:
            turn = replay_batch(len(replay), config.replay_batch_size, config.seed, step)
        return Batch(
            step, [(number, rows[number]) for number in numbers], [(number, replay[number]) for number in turn]
        )


def _step(
    model: Llama | LoRA, batch: Batch, config: SFTConfig, optimizer: torch.optim.Optimizer
) -> tuple[Metrics, int]:
    """One update: its metrics and how many tokens it ran through."""
    optimizer.zero_grad(set_to_none=True)
    with computing(model, config.precision) as compute:
        metrics, tokens = _backward(compute, batch, config)
    norm = clip(model, optimizer, config.clip)
    if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
        replayed = f" and replay rows {[number for number, _ in batch.replay]}" if batch.replay else ""
        raise FloatingPointError(
            f"step {batch.step + 1}: loss {metrics['loss']}, gradient norm {norm}, on rows "
            f"{[number for number, _ in batch.rows]}{replayed}; "
            "the weights were not touched: lower the learning rate or look at those rows"
        )
    optimizer.step()
    model.weights_changed()
    return {**metrics, "grad_norm": norm}, tokens


def _backward(model: Llama | LoRA, batch: Batch, config: SFTConfig) -> tuple[Metrics, int]:
    """Add the gradient of the batch's mean loss to the parameters, pack by pack: as many packs as the tokens need."""
    metrics: Metrics = {}
    tokens = 0
    for pack, loss_of in _packs(batch, config, model.embed.device):
        dropout = pack_dropout(pack, config.dropout, config.seed, batch.step)
        with ops.sums_in_fp32():
            run = CHECKPOINTING[config.activation_checkpointing]
            loss, part = loss_of(pack_logprobs(model, pack, dropout, run))
            loss.backward()
        tokens += len(pack)
        for name, value in part.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return metrics, tokens


LossOf = Callable[[torch.Tensor], tuple[torch.Tensor, Metrics]]


def _packs(batch: Batch, config: SFTConfig, device: torch.device) -> Iterator[tuple[Pack, LossOf]]:
    """The packs of one batch, each with its loss as a function of the per-edge log-probs."""
    if not isinstance(config, DPOConfig):
        examples = [(row_key(number), row) for number, row in batch.rows if isinstance(row, SFTRow)]
        yield from _sft_packs(examples, sft_loss, config.max_pack_tokens, device)
        return
    pairs = [(row_key(number), row) for number, row in batch.rows if isinstance(row, DPORow)]
    reference = torch.tensor([row.reference for _, row in pairs], dtype=torch.float32, device=device)  # [pairs, 2]
    trees = [dpo_tree(row, place, key) for place, (key, row) in enumerate(pairs)]
    for pack in TokenTree.pack(trees, config.max_pack_tokens):
        pack = pack.to(device)
        yield pack, partial(dpo_loss, edges=pack.edges, reference=reference, beta=config.beta, total_pairs=len(pairs))
    replayed = [(row_key(-1 - number), row) for number, row in batch.replay]
    yield from _sft_packs(replayed, partial(replay_loss, weight=config.replay_weight), config.max_pack_tokens, device)


def _sft_packs(
    rows: list[tuple[int, SFTRow]],
    loss: Callable[..., tuple[torch.Tensor, Metrics]],
    budget: int,
    device: torch.device,
) -> Iterator[tuple[Pack, LossOf]]:
    """Rows with their dropout keys; `loss` is divided by the number of all their target tokens."""
    total = float(sum(len(row.completion) for _, row in rows))
    for pack in TokenTree.pack([sft_tree(row, place, key) for place, (key, row) in enumerate(rows)], budget):
        pack = pack.to(device)
        yield pack, partial(loss, edges=pack.edges, total_weight=total)
