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
    Keys,
    SFTRow,
    batch_order,
    build_trees,
    check_kinds,
    check_rows,
    edge_groups,
    pack_trees,
    replay_batch,
    row_keys,
)
from engine.train.dropout import pack_dropout
from engine.train.heldout import Heldout
from engine.train.losses import PREFERENCE, chosen_nll, replay_loss, sequence_logps, sft_loss
from engine.train.precision import check_parameters, check_precision, clip, compute_model, computing, make_optimizer
from engine.train.state import METRICS, Progress, StateDir, identity
from engine.train.timing import Work, peak_flops, timing_row
from engine.tree import Edges, Pack

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
        if self.loss not in PREFERENCE:
            raise InputError(f"loss is {self.loss!r}; expected one of {', '.join(PREFERENCE)}")
        expected = "a probability of at least 0 and below 0.5"
        _check_number("label_smoothing", self.label_smoothing, lambda x: 0 <= x < 0.5, expected)
        for name in ("nll_weight", "replay_weight"):
            expected = "a finite number of at least 0 (0: off)"
            _check_number(name, getattr(self, name), lambda x: 0 <= x < math.inf, expected)
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
    best_step: int | None = None  # after which the held-out rows measured best


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
    heldout: Heldout | None = None,
) -> TrainResult:
    """Train `model` in place, of a LoRA the adapters, on SFTRows (SFTConfig) or DPORows with `reference` set (DPOConfig;
    `replay`: its rows).

    Writes `metrics.jsonl` (one row a step, TRL's names) and `timing.jsonl` (tokens and seconds a step, and what follows
    from them: engine/train/timing.py) into `out_dir`; calls `on_step(step, steps, metrics)`. A step whose loss or gradient
    is not finite raises FloatingPointError before it touches the weights. Raises the model's weight epoch once a step.

    The state in `out_dir/state`, saved every `config.save_every` steps, after every measurement of `heldout` and the last
    step, and when `should_stop()`, asked after every step, is true (then TrainingInterrupted), lets the same call go on
    where it was: weights, AdamW, rows and metrics.jsonl end as the same bits as without the interruption. Call it with the
    model as first loaded (or as the state has it); `weight_epoch` is then the unbroken run's too. InputError names what
    differs (rows, config, weights, torch, threads) or is damaged. The state stays until `clear_state(out_dir)`;
    resume=False drops it.
    """
    replay = replay or ()
    _check_data(model, rows, replay, config)
    if heldout is not None:
        _check_heldout(model, heldout, config, out_dir)
    keys = row_keys(rows), row_keys(replay, replay=True)
    batches = batch_order(len(rows), config.batch_size, config.epochs, config.seed, config.max_steps)
    optimizer = make_optimizer(model, config)
    about = identity(model, rows, replay, config) | ({"heldout": heldout.identity()} if heldout else {})
    state = (
        StateDir(Path(out_dir), model, optimizer, about, heldout is not None and heldout.keep_best)
        if out_dir is not None
        else None
    )
    done = state.begin(resume) if state else 0
    progress = state.progress if state else Progress()
    measured = Batch.take(heldout.rows, (), config, 0, range(len(heldout.rows))) if heldout else None
    peak = peak_flops(model.embed.device) if state else None
    per_epoch = math.ceil(len(rows) / config.batch_size)
    while done < len(batches) and not (heldout and heldout.gives_up(progress)):
        started = time.perf_counter()
        rate = learning_rate(config, done, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = Batch.take(rows, replay, config, done, batches[done], keys)
        metrics, work = _step(model, batch, config, optimizer)
        done += 1
        progress.num_tokens += work.tokens
        metrics = {"step": done, **metrics, "learning_rate": rate}
        metrics |= {"epoch": done / per_epoch, "num_tokens": progress.num_tokens}
        seconds = time.perf_counter() - started
        timing = timing_row(done, work, seconds, peak, model.embed.device)
        if heldout and measured and heldout.due(done, len(batches)):
            found = evaluate(compute_model(model, config.precision), measured, config)
            heldout.note(progress, done, found)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
            timing["eval_seconds"] = time.perf_counter() - started - seconds
        if state:
            state.log(metrics, timing)
        if on_step:
            on_step(done, len(batches), metrics)
        stop = should_stop is not None and should_stop()
        if state and (
            stop or done == len(batches) or (heldout and heldout.due(done, len(batches))) or _save(config, done)
        ):
            state.save(done)
        if stop:
            raise TrainingInterrupted(done, len(batches), state.out_dir if state else None)
    optimizer.zero_grad(set_to_none=True)
    if state and state.keep_best and progress.best_step not in (None, done):
        state.load_best()
    return TrainResult(done, state.out_dir / METRICS if state else None, model.weight_epoch, progress.best_step)


def _save(config: SFTConfig, done: int) -> bool:
    return config.save_every is not None and done % config.save_every == 0


@torch.no_grad()
def evaluate(model: Llama | LoRA, batch: Batch, config: SFTConfig) -> Metrics:
    """The metrics of a batch as one step has them, without dropout; its replay rows are left out."""
    metrics: Metrics = {}
    for pack, loss_of, linear in _packs(batch, config, model.embed.device):
        with ops.sums_in_fp32():
            hidden, loss = _hidden(model, pack, keep), partial(loss_of, edges=pack.edges)
            _add(metrics, ops.logprob_loss(hidden, model.head, pack.edges, loss, linear)[1])
    return metrics


def _add(metrics: Metrics, part: Metrics) -> None:
    for name, value in part.items():
        metrics[name] = metrics.get(name, 0.0) + value


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
    trees, sequences = build_trees(list(zip(row_keys(rows), rows, strict=True)), max_pack_tokens)
    sums: dict[int, float] = {}
    with torch.no_grad(), ops.sums_in_fp32():
        for pack in pack_trees(trees, max_pack_tokens):
            pack = pack.to(model.embed.device)
            present = pack.edges.sequence.unique()
            found = sequence_logps(pack_logprobs(model, pack), pack.edges, present)
            sums.update(zip(present.tolist(), found.tolist(), strict=True))
    return [(sums[chosen], sums[rejected]) for chosen, rejected in sequences]


def pack_logprobs(model: Llama | LoRA, pack: Pack, dropout: Dropout = keep, run: Run = plainly) -> torch.Tensor:
    """Log-prob of every edge of a pack [E] fp32, differentiable. In the groups in which a preference loss takes them, so
    that a policy that is its own reference has the same bits."""
    hidden, head = _hidden(model, pack, dropout, run), model.head
    groups = edge_groups(pack, ops.group_rows(head))
    return torch.cat([ops.token_logprobs(hidden[edges.row], head, edges.target)[0] for edges in groups])


def _hidden(model: Llama | LoRA, pack: Pack, dropout: Dropout, run: Run = plainly) -> torch.Tensor:
    """[N, dim]"""
    return model(pack.tokens, pack.position, tree_attend(pack.end, pack.chains), dropout=dropout, run=run)


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
    check_references([row for row in rows if isinstance(row, DPORow)])
    weight = config.replay_weight if isinstance(config, DPOConfig) else 0.0
    if bool(replay) != (weight > 0):
        raise InputError(
            f"there are {len(replay)} replay rows and replay_weight is {weight}; give both (in a DPOConfig) or neither"
        )
    if replay:
        check_kinds(replay, SFTRow, "replay trains on SFTRow", "replay row")
        check_rows(replay, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens, "replay row")


def _check_heldout(model: Llama | LoRA, heldout: Any, config: SFTConfig, out_dir: str | Path | None) -> None:
    if not isinstance(heldout, Heldout):
        raise InputError(f"heldout is a {type(heldout).__name__}; expected a Heldout(rows, every)")
    kind = DPORow if isinstance(config, DPOConfig) else SFTRow
    check_kinds(heldout.rows, kind, f"{type(config).__name__} trains on {kind.__name__}", "held-out row")
    check_rows(heldout.rows, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens, "held-out row")
    check_references([row for row in heldout.rows if isinstance(row, DPORow)], "held-out row")
    if heldout.by != "loss" and not isinstance(config, DPOConfig):
        raise InputError(f"the held-out measure is {heldout.by!r}, which SFT does not have; use 'loss'")
    if heldout.keep_best and out_dir is None:
        raise InputError("keep_best needs an out_dir, where the best weights are kept")


def check_references(rows: Sequence[DPORow], kind: str = "row") -> None:
    """Raise InputError naming the first row whose `reference` is not two finite numbers."""
    for number, row in enumerate(rows):
        _check_reference(f"{kind} {number}", row.reference)


def _check_reference(row: str, reference: Any) -> None:
    if reference is None:
        raise InputError(f"{row} has no reference log-probs; compute them with reference_logprobs(model, rows)")
    try:
        fits = len(reference) == 2 and all(math.isfinite(value) for value in reference)
    except TypeError:
        fits = False
    if not fits:
        raise InputError(f"{row}: reference is {reference!r}; expected two finite numbers (chosen, rejected)")


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


def _step(
    model: Llama | LoRA, batch: Batch, config: SFTConfig, optimizer: torch.optim.Optimizer
) -> tuple[Metrics, Work]:
    """One update: its metrics and what it took."""
    optimizer.zero_grad(set_to_none=True)
    with computing(model, config.precision) as compute:
        metrics, work = _backward(compute, batch, config)
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
    return {**metrics, "grad_norm": norm}, work


def _backward(model: Llama | LoRA, batch: Batch, config: SFTConfig) -> tuple[Metrics, Work]:
    """Add the gradient of the batch's mean loss to the parameters, pack by pack: as many packs as the tokens need."""
    metrics: Metrics = {}
    work = Work()
    for pack, loss_of, linear in _packs(batch, config, model.embed.device):
        work = work.and_of(pack, model.config)
        dropout = pack_dropout(pack, config.dropout, config.seed, batch.step)
        with ops.sums_in_fp32():
            hidden = _hidden(model, pack, dropout, CHECKPOINTING[config.activation_checkpointing])
            _add(metrics, _pack_backward(hidden, model.head, pack, loss_of, linear))
    return metrics, work


def _pack_backward(hidden: torch.Tensor, head: torch.Tensor, pack: Pack, loss_of: LossOf, linear: bool) -> Metrics:
    """Add the gradient of a pack's loss to what hidden [N, dim] comes from, and to the head; the metrics.

    A loss that is not linear in the log-probs takes one pass over the head only where all its logits fit: it is given in
    groups of whole trees, as many at a time as fit.
    """
    groups = [pack.edges] if linear else edge_groups(pack, ops.group_rows(head))
    parts = [(edges, partial(loss_of, edges=edges)) for edges in groups]
    value, found, _ = ops.logprob_losses(hidden, head, parts, linear)
    value.backward()
    metrics: Metrics = {}
    for part in found:
        _add(metrics, part)
    return metrics


LossOf = Callable[..., tuple[torch.Tensor, Metrics]]
PackLoss = tuple[Pack, LossOf, bool]  # the loss of (logp, edges=...), some of the pack's trees; whether linear in logp


def _packs(batch: Batch, config: SFTConfig, device: torch.device) -> Iterator[PackLoss]:
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
