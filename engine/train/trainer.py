"""SFT and DPO: one loop over packed token trees.

Order of a step: count over the whole batch, forward and backward pack by pack, clip, refuse a non-finite step, update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from engine import ops
from engine.lora import LoRA
from engine.model import Dropout, Llama, Run, keep, plainly, tree_attend
from engine.train.batches import (
    DPORow,
    Rows,
    SFTRow,
    batch_order,
    build_trees,
    check_kinds,
    check_rows,
    edge_groups,
    pack_trees,
    row_keys,
)
from engine.train.checks import check_data, check_heldout, check_model
from engine.train.config import CHECKPOINTING, SFTConfig, learning_rate
from engine.train.dropout import pack_dropout
from engine.train.heldout import Heldout
from engine.train.losses import sequence_logps
from engine.train.packs import Batch, LossOf, Metrics, packs
from engine.train.precision import clip, compute_model, computing, make_optimizer
from engine.train.state import METRICS, Progress, StateDir, identity
from engine.train.timing import Work, peak_flops, timing_row
from engine.tree import Pack

_SHOWN_ROWS = 10


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


@torch.inference_mode(False)  # also where the caller has turned gradients off
@torch.enable_grad()
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
    is not finite raises FloatingPointError before it touches the weights; so do held-out rows whose measure is not. Raises the
    model's weight epoch once a step, and leaves no gradients on it.

    The state in `out_dir/state`, saved every `config.save_every` steps, after every measurement of `heldout` and the last
    step, and when `should_stop()`, asked after every step, is true (then TrainingInterrupted), lets the same call go on
    where it was: weights, AdamW, rows and metrics.jsonl end as the same bits as without the interruption. Call it with the
    model as first loaded (or as the state has it); `weight_epoch` is then the unbroken run's too. InputError names what
    differs (rows, config, weights, torch, threads) or is damaged. The state stays until `clear_state(out_dir)`;
    resume=False drops it.
    """
    replay = replay or ()
    check_data(model, rows, replay, config)
    if heldout is not None:
        check_heldout(model, heldout, config, out_dir)
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
            found = _measure(compute_model(model, config.precision), measured, config, done)
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
    if state and state.keep_best and progress.best_step not in (None, done):
        state.load_best()
    return TrainResult(done, state.out_dir / METRICS if state else None, model.weight_epoch, progress.best_step)


def _save(config: SFTConfig, done: int) -> bool:
    return config.save_every is not None and done % config.save_every == 0


def _step(
    model: Llama | LoRA, batch: Batch, config: SFTConfig, optimizer: torch.optim.Optimizer
) -> tuple[Metrics, Work]:
    """One update: its metrics and what it took."""
    optimizer.zero_grad(set_to_none=True)
    try:
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
    finally:
        optimizer.zero_grad(set_to_none=True)  # whatever ends the training, 4 bytes a parameter are free again
    model.weights_changed()
    return {**metrics, "grad_norm": norm}, work


def _backward(model: Llama | LoRA, batch: Batch, config: SFTConfig) -> tuple[Metrics, Work]:
    """Add the gradient of the batch's mean loss to the parameters, pack by pack: as many packs as the tokens need."""
    metrics: Metrics = {}
    work = Work()
    for pack, loss_of, linear in packs(batch, config, model.embed.device):
        work = work.and_of(pack, model)
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


@torch.no_grad()
def evaluate(model: Llama | LoRA, batch: Batch, config: SFTConfig) -> Metrics:
    """The metrics of a batch as one step has them, without dropout; its replay rows are left out."""
    metrics: Metrics = {}
    for pack, loss_of, linear in packs(batch, config, model.embed.device):
        with ops.sums_in_fp32():
            hidden, loss = _hidden(model, pack, keep), partial(loss_of, edges=pack.edges)
            _add(metrics, ops.logprob_loss(hidden, model.head, pack.edges, loss, linear)[1])
    return metrics


def _measure(model: Llama | LoRA, batch: Batch, config: SFTConfig, step: int) -> Metrics:
    """`evaluate` the held-out rows after `step`. A number that is not finite would be no measure, and no JSON."""
    found = evaluate(model, batch, config)
    wrong = next((name for name, value in found.items() if not math.isfinite(value)), None)
    if wrong is None:
        return found
    rows = []
    for (number, row), keys in zip(batch.rows, batch.keys, strict=True):
        alone = evaluate(model, replace(batch, rows=[(number, row)], keys=[keys]), config)
        if not all(map(math.isfinite, alone.values())):
            rows.append(number)
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    raise FloatingPointError(
        f"step {step}: on held-out rows {rows[:_SHOWN_ROWS]}{more} {wrong} is {found[wrong]}; the model holds the weights "
        "after that step: lower the learning rate or look at those rows"
    )


def _add(metrics: Metrics, part: Metrics) -> None:
    for name, value in part.items():
        metrics[name] = metrics.get(name, 0.0) + value


def reference_logprobs(
    model: Llama | LoRA, rows: Sequence[DPORow], max_pack_tokens: int = 4096
) -> list[tuple[float, float]]:
    """Sums of log-probs (chosen, rejected) of every row under `model`, by the same op and packing as training. Where that
    runs in a bf16 copy, give the copy: `compute_model(model, precision)`."""
    check_model(model)
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
    return torch.cat([ops.token_logprobs(F.embedding(edges.row, hidden), head, edges.target)[0] for edges in groups])


def _hidden(model: Llama | LoRA, pack: Pack, dropout: Dropout, run: Run = plainly) -> torch.Tensor:
    """[N, dim]"""
    return model(pack.tokens, pack.position, tree_attend(pack.end, pack.chains), dropout=dropout, run=run)
