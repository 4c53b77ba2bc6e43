"""The stages that train: SFT on instructions and judge data, DPO on a round's pairs, or SFT again on perfect answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TypeVar

import torch

from engine import (
    DPOConfig,
    DPORow,
    Heldout,
    InputError,
    Llama,
    LoRA,
    SFTConfig,
    SFTRow,
    TrainingInterrupted,
    clear_state,
    compute_model,
    load_reference,
    reference_gap,
    reference_logprobs,
    save_adapter,
    save_checkpoint,
    save_reference,
    train,
)
from selfreward.context import GateError, Row, Run, Stopped
from selfreward.judging import scored_candidates
from selfreward.pairs import positive, said
from selfreward.seeds import example_ids, file_of, ift_rows, same
from selfreward.state import row_seed

R = TypeVar("R", SFTRow, DPORow)
STEP0_PAIRS = 64
PARITY_BF16 = 0.1  # nats a token, where the forward is bf16 and the sampler fp32: at most 0.041 in the micro recipe
STEP0_BF16 = 0.25  # nats, where the forward is bf16 at least: by the packing the micro recipe's pairs differ by 0.015


def train_baseline(run: Run) -> Row:
    """The SFT baseline: M0 on the human instructions alone."""
    rows, counts = ift_examples(run)
    return _train_sft(run, rows, [], "sft") | counts


def train_m1(run: Run) -> Row:
    """M1: M0 on instructions and judge data. Without judge data the baseline is M1 and is not trained twice."""
    judge_rows, too_long = eft_rows(run, run.recipe.sft.max_pack_tokens)
    if not judge_rows:
        return {"same_as": "sft/model", "eft_too_long": too_long}
    rows, counts = ift_examples(run)
    counts |= {"eft": len(judge_rows), "eft_too_long": too_long}
    return _train_sft(run, rows, judge_rows, "m1") | counts


def train_round(run: Run, k: int) -> Row:
    """M_{k+1}, by the recipe's method."""
    return train_positives(run, k) if run.recipe.method == "positives" else train_dpo(run, k)


def train_dpo(run: Run, k: int) -> Row:
    """M_{k+1}: DPO from M_k, with M_k as the reference, on this round's pairs."""
    pairs, options = run.rows(f"iter_{k}/pairs.jsonl"), run.recipe.dpo
    model = run.fresh(run.model(k), options.precision)
    config = DPOConfig(**options.of_round(k), seed=row_seed(run.recipe.seed, k, "dpo", 0) >> 1)
    if run.recipe.pairs.consistency:
        config = replace(config, label_smoothing=1 - run.dir.counts(f"iter_{k}/pairs")["consistency"])
    rows = [
        DPORow(run.tokenizer.chat_prompt(said(p, "prompt")), p["chosen_token_ids"], p["rejected_token_ids"])
        for p in pairs
    ]
    computing = compute_model(model, config.precision)
    rows = _with_reference(run, k, computing, rows, config)
    parity = _parity(run, k, pairs, rows, run.rough_sampler or computing.embed.dtype == torch.bfloat16)
    replay = eft_rows(run, options.max_pack_tokens)[0] if options.replay_weight else []
    kept, heldout = _apart(run, rows)
    steps = _train(run, model, kept, config, f"iter_{k}", replay, heldout)
    smoothed = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    return {"pairs": len(pairs)} | steps | parity | smoothed | ({"replay": len(replay)} if replay else {})


def train_positives(run: Run, k: int) -> Row:
    """M_{k+1}, the paper's other variant (section 2.4): M0 on the seed data and, of each round so far, the best answer
    to every prompt that has one with the perfect score."""
    found = [
        best
        for j in range(1, k + 1)
        for candidates in scored_candidates(run, j, drawn=True).values()
        if (best := positive(candidates, run.recipe.pairs.allow_truncated_chosen)) is not None
    ]
    if not found:
        raise GateError(f"round {k}: no answer has the perfect score; use method=dpo, or a model that judges better")
    rows, counts = ift_examples(run)
    limit = run.recipe.sft.max_pack_tokens
    positives = [SFTRow(run.tokenizer.chat_prompt(row["prompt"]), row["token_ids"]) for row in found]
    fitting = [row for row in positives if _tokens(row) <= limit]
    counts |= {"positives": len(fitting), "positives_too_long": len(positives) - len(fitting)}
    return _train_sft(run, rows, eft_rows(run, limit)[0] + fitting, f"iter_{k}") | counts


def _train_sft(run: Run, instructions: list[SFTRow], others: list[SFTRow], folder: str) -> Row:
    """Judge data and the model's own answers are trained on whole: what is measured is answers by humans."""
    config = SFTConfig(**run.recipe.sft.model_dump(), seed=row_seed(run.recipe.seed, 0, folder, 0) >> 1)
    kept, heldout = _apart(run, instructions)
    model = run.fresh(run.base, config.precision)
    return {"rows": len(kept) + len(others)} | _train(run, model, kept + others, config, folder, [], heldout)


def _apart(run: Run, rows: list[R]) -> tuple[list[R], Heldout | None]:
    """The rows to train on and those to measure: the recipe's share of the prompts, each with all of its rows. Prompts that
    differ only in case and blanks are one."""
    options = run.recipe.keep_best
    if not options.share:
        return rows, None
    keys = {prompt: same(run.tokenizer.decode(list(prompt))) for prompt in {tuple(row.prompt) for row in rows}}
    places = {key: row_seed(run.recipe.seed, 0, "held out", key) for key in keys.values()}
    if len(places) < 2:
        raise GateError(
            "there is one prompt only, of which keep_best.share can leave out none; set it to 0 in a new directory"
        )
    count = max(1, round(options.share * len(places)))
    out = set(sorted(places, key=lambda key: places[key])[:count])
    held = [row for row in rows if keys[tuple(row.prompt)] in out]
    kept = [row for row in rows if keys[tuple(row.prompt)] not in out]
    return kept, Heldout(held, options.every, keep_best=True, patience=options.patience)


def _train(
    run: Run,
    model: Llama | LoRA,
    rows: list[SFTRow] | list[DPORow],
    config: SFTConfig,
    folder: str,
    replay: list[SFTRow],
    heldout: Heldout | None,
) -> Row:
    """Train, from a saved state if the run was interrupted here, and save folder/model; a LoRA's is the merged one, with
    folder/adapter beside it. Returns the number of steps, and of rows held out with the step that measured best."""
    out = run.dir.file(folder)
    try:
        result = train(
            model,
            rows,
            config,
            out,
            on_step=run.report.steps(folder),
            should_stop=run.stop.is_set,
            replay=replay or None,
            heldout=heldout,
        )
    except TrainingInterrupted:
        raise Stopped from None
    except FloatingPointError as error:
        key = "dpo.lr" if isinstance(config, DPOConfig) else "sft.lr"
        raise FloatingPointError(f"{folder}/model: {error} (a changed {key} needs a new --out directory)") from None
    counts: Row = {"steps": result.steps}
    if heldout:
        counts |= {"held_out": len(heldout.rows), "best_step": result.best_step}
    if isinstance(model, LoRA):
        inside = run.start.is_relative_to(run.dir.file(""))
        base = run.start.relative_to(run.dir.file("")) if inside else run.start  # the same bytes in every directory
        save_adapter(model, out / "adapter", base_model=str(base))
        counts["lora_rank"] = model.rank
        model = model.merged()
    save_checkpoint(model, out / "model", run.tokenizer)
    clear_state(out)
    return counts


def _with_reference(run: Run, k: int, model: Llama | LoRA, rows: list[DPORow], config: DPOConfig) -> list[DPORow]:
    """The rows with M_k's log-probs, which are computed once per round and stored beside the pairs."""
    path, template = run.dir.file(f"iter_{k}/reference.jsonl"), run.tokenizer.template_hash
    if not path.is_file():
        values = reference_logprobs(model, rows, config.max_pack_tokens)
        referenced = [replace(row, reference=value) for row, value in zip(rows, values, strict=True)]
        _check_step_zero(run, k, model, referenced)
        save_reference(path, model, referenced, template)
    return load_reference(path, model, rows, template)


def _check_step_zero(run: Run, k: int, model: Llama | LoRA, rows: list[DPORow]) -> None:
    """The policy is the reference before step 0: its log-probs in another packing must be the cached ones."""
    worst = reference_gap(model, rows, STEP0_PAIRS)
    allowed = max(run.recipe.gates.step0_tolerance, STEP0_BF16 if model.embed.dtype == torch.bfloat16 else 0.0)
    if not worst <= allowed:
        raise GateError(
            f"round {k}: before step 0 the policy's log-probs differ from the cached reference by {worst:.2e} nats a "
            f"sequence, allowed are {allowed:.0e} (gates.step0_tolerance; with bf16 at least {STEP0_BF16}): more "
            "than rounding, and long answers in bf16 round more, says that the model or its numbers changed; then start the "
            "round again in a new directory"
        )


def _parity(run: Run, k: int, pairs: list[Row], rows: list[DPORow], rough: bool = False) -> Row:
    """How far the sampler's log-probs of the pairs' answers are from the trainer's, in nats a token: mean and most.

    M_k drew the answers and M_k is the reference, so nothing but rounding may lie between them. rough: one of the two rounds
    to 16 bits or fewer.
    """
    sampled = {row["id"]: row["logprob"] for row in run.rows(f"iter_{k}/candidates.jsonl")}
    gaps = [
        abs(sampled[f"{pair['prompt_id']}-{pair[f'{kind}_index']}"] - trained) / len(pair[f"{kind}_token_ids"])
        for pair, row in zip(pairs, rows, strict=True)
        for kind, trained in zip(("chosen", "rejected"), row.reference or (), strict=True)
    ]
    worst = max(gaps)  # of finite numbers: neither file can hold others
    allowed = max(run.recipe.gates.parity_tolerance, PARITY_BF16 if rough else 0.0)
    if worst > allowed:
        raise GateError(
            f"round {k}: the sampler's log-probs of an answer are {worst:.1e} nats a token from the trainer's, allowed are "
            f"{allowed:.0e} (gates.parity_tolerance): the pairs in {run.dir.file(f'iter_{k}')} "
            f"are not by the model in {run.model(k)}; start the round again in a new directory"
        )
    return {"parity_mean": float(f"{sum(gaps) / len(gaps):.1e}"), "parity_max": float(f"{worst:.1e}")}


def eft_rows(run: Run, limit: int) -> tuple[list[SFTRow], int]:
    """The judge data: judge prompts with the judgement to write, and how many are longer than one forward pass takes."""
    rows = [
        SFTRow(run.template.token_ids(run.tokenizer, row["prompt"], row["answer"]), row["judgement_token_ids"])
        for row in run.rows("eft/train.jsonl")
    ]
    fitting = [row for row in rows if _tokens(row) <= limit]
    return fitting, len(rows) - len(fitting)


def ift_examples(run: Run) -> tuple[list[SFTRow], Row]:
    """Chat prompts with human answers, cut at `data.max_tokens` or the model's context (a cut answer has no EOS), and how
    many were cut or, because the prompt alone fills that many tokens, left out."""
    data = run.recipe.data
    rows, counts = list[SFTRow](), Counter[str](ift=0, ift_cut=0, ift_prompt_too_long=0)
    limit = min(data.max_tokens, run.context)
    for row in ift_rows(run.recipe):
        prompt, answer = example_ids(run.tokenizer, row)
        room = limit - len(prompt)
        if room < 1:
            counts["ift_prompt_too_long"] += 1
            continue
        rows.append(SFTRow(prompt, answer[:room]))
        counts["ift"] += 1
        counts["ift_cut"] += len(answer) > room
    if not rows:
        higher = " or raise data.max_tokens" if data.max_tokens < run.context else ""
        raise InputError(
            f"{file_of(run.recipe, 'data.ift')}: no prompt is shorter than {limit} tokens (data.max_tokens is "
            f"{data.max_tokens}, the model's context {run.context}); bring shorter ones{higher}, in a new --out directory"
        )
    return rows, dict(counts)


def _tokens(row: SFTRow) -> int:
    return len(row.prompt) + len(row.completion)
