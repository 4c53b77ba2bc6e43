"""The stages: each reads finished files of the run, writes its own, and returns counts that add up."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine import (
    DPOConfig,
    DPORow,
    InputError,
    Llama,
    LoRA,
    RequestOutput,
    SamplingParams,
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
from selfreward import tiny
from selfreward.context import GateError, Row, Run, Stopped
from selfreward.eft import select
from selfreward.evaluate import judge_accuracy, longer_wins, mean_and_error
from selfreward.judge import Judgement, mean_score
from selfreward.judging import Item, judge_by_model, judge_candidates
from selfreward.pairs import TOO_LONG, Rules, pair_id, positive
from selfreward.pairs import build_pairs as prompt_pairs
from selfreward.prompts import take_prompts, write_prompts
from selfreward.recipe import Candidates, Recipe, of_round
from selfreward.report import reasons
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.seeds import (
    eft_groups,
    example_ids,
    file_of,
    heldout_groups,
    heldout_prompts,
    ift_rows,
    known_prompts,
)
from selfreward.state import row_seed

STEP0_PAIRS = 64
PARITY_BF16 = 0.1  # nats a token, where the forward is bf16 and the sampler fp32: at most 0.041 in the micro recipe
STEP0_BF16 = 0.25  # nats, where the forward is bf16 at least: by the packing the micro recipe's pairs differ by 0.015
REFUSED = ("no_ranks", "unreadable", "order", "tie")  # why an attempt of the EFT builder is not kept


# ---- SFT, EFT, M1 -----------------------------------------------------------------------------------------------------


def written(stage: str, counts: Row) -> list[str]:
    """What a finished stage left in the run that later stages and the report read."""
    folder, _, last = stage.partition("/")
    if folder == "evaluation" or "same_as" in counts:
        return []
    if stage == "eft":
        return ["eft/train.jsonl"]
    if last == "model":
        return [stage, *([f"{folder}/adapter"] if "lora_rank" in counts else [])]
    return [f"{stage}.jsonl"] + ([f"{folder}/dropped.jsonl"] if last == "pairs" else [])


def make_base(run: Run) -> Row:
    """M0 with random weights, for trials without a checkpoint."""
    assert run.recipe.init is not None
    config = run.recipe.init.config(run.tokenizer.vocab_size)
    save_checkpoint(Llama(config).init_weights(run.recipe.init.seed), run.base, run.tokenizer)
    return {"parameters": config.n_parameters}


def train_baseline(run: Run) -> Row:
    """The SFT baseline: M0 on the human instructions alone."""
    rows, counts = _ift_rows(run)
    return _train_sft(run, rows, "sft") | counts


def build_eft(run: Run) -> Row:
    """The baseline judges human-ranked answers; what agrees with the ranks becomes judge data."""
    recipe = run.recipe
    heldout, groups = heldout_groups(recipe), eft_groups(recipe)
    drawn = judge_by_model(
        run, "eft/judgements.jsonl", run.dir.file("sft/model"), _ranked_items(groups), recipe.eft, (0, "eft")
    )
    rows, dropped, counts = select(groups, _by_answer(groups, drawn))
    run.dir.write_jsonl("eft/train.jsonl", rows)
    run.dir.write_jsonl("eft/dropped.jsonl", dropped)
    run.dir.write_jsonl("eft/heldout.jsonl", heldout)
    if not rows and (recipe.eft.required or recipe.dpo.replay_weight):
        file = file_of(recipe, "data.eft")
        raise GateError(
            f"no judgement of the SFT baseline agrees with the ranks of the {len(groups)} groups in {file} "
            f"({reasons({name: counts[name] for name in REFUSED if counts[name]})}): {_eft_advice(run, counts)}, or set "
            f"eft.required=false{' and dpo.replay_weight=0' if recipe.dpo.replay_weight else ''} to go without judge data"
        )
    if recipe.dpo.replay_weight and not _eft_rows(run, recipe.dpo.max_pack_tokens)[0]:
        raise GateError(
            f"all {len(rows)} rows of judge data are longer than dpo.max_pack_tokens ({recipe.dpo.max_pack_tokens}): raise "
            "it, or set dpo.replay_weight=0, in a new --out directory"
        )
    return {"groups": len(groups), "train": len(rows), "heldout": len(heldout), **counts}


def _eft_advice(run: Run, counts: Counter[str]) -> str:
    if 2 * counts["unreadable"] > sum(counts[name] for name in REFUSED):
        return (
            f"most are unreadable (see {run.dir.file('eft/judgements.jsonl')}): give a judge.template that this model can "
            f"follow (it is {run.template.path}), or raise eft.max_tokens"
        )
    return "raise eft.attempts, or give more groups (data.eft, data.eft_limit)"


def train_m1(run: Run) -> Row:
    """M1: M0 on instructions and judge data. Without judge data the baseline is M1 and is not trained twice."""
    judge_rows, too_long = _eft_rows(run, run.recipe.sft.max_pack_tokens)
    if not judge_rows:
        return {"same_as": "sft/model", "eft_too_long": too_long}
    rows, counts = _ift_rows(run)
    counts |= {"eft": len(judge_rows), "eft_too_long": too_long}
    return _train_sft(run, rows + judge_rows, "m1") | counts


# ---- one round --------------------------------------------------------------------------------------------------------


def new_prompts(run: Run, k: int) -> Row:
    """This round's prompts, none of which an earlier round, the seed data or the held-out data has."""
    taken = known_prompts(run.recipe)
    if run.recipe.prompts.mode == "file":
        rows, dropped = take_prompts(run.recipe, k, taken)
    else:
        earlier = {row["prompt"] for j in range(1, k) for row in run.rows(f"iter_{j}/prompts.jsonl")}
        rows, dropped = write_prompts(run, k, taken | earlier)
    fitting = [row for row in rows if len(run.tokenizer.chat_prompt(row["prompt"])) < run.context]
    dropped["prompt_too_long"] += len(rows) - len(fitting)
    if not fitting:
        raise GateError(
            f"round {k} has no prompts left after the filters ({reasons(+dropped)}): {_prompts_advice(run)}"
        )
    run.dir.write_jsonl(f"iter_{k}/prompts.jsonl", fitting)
    return {"kept": len(fitting), "dropped": dict(+dropped)}


def _prompts_advice(run: Run) -> str:
    if run.recipe.prompts.mode == "file":
        return f"give a prompts.file with shorter prompts (the model's context is {run.context} tokens)"
    return (
        "raise prompts.count or prompts.max_tokens, change prompts.temperature or prompts.top_p, or set prompts.mode=file "
        "and prompts.file"
    )


def sample_candidates(run: Run, k: int) -> Row:
    """N answers of M_k to every prompt."""
    options = run.recipe.candidates
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    requests = [_candidate_request(run, k, prompt, options) for prompt in prompts]
    rows = sample_groups(run, f"iter_{k}/candidates.jsonl", run.llm(run.model(k)), in_groups(requests))
    return {"prompts": len(prompts), "candidates": len(rows)} | _finish_counts(rows)


def _candidate_request(run: Run, k: int, prompt: Row, options: Candidates) -> Request:
    seed = row_seed(run.recipe.seed, k, "candidates", prompt["id"])

    def rows(output: RequestOutput | None) -> list[Row]:
        assert output is not None, "new_prompts leaves out what does not fit"
        return [
            {
                "id": f"{prompt['id']}-{answer.index}",
                "prompt_id": prompt["id"],
                "prompt": prompt["prompt"],
                "index": answer.index,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "logprob": answer.cumulative_logprob,
                "seed": seed,
            }
            for answer in output.outputs
        ]

    params = SamplingParams(
        n=options.n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens, seed=seed
    )
    return Request(run.tokenizer.chat_prompt(prompt["prompt"]), params, rows)


def judge_round(run: Run, k: int) -> Row:
    """K judgements of every candidate by M_k or the recipe's judge; an unreadable one is a status, never a number."""
    options = run.recipe.judge
    candidates = run.rows(f"iter_{k}/candidates.jsonl")
    items: dict[str, list[Item]] = {}
    for row in candidates:
        items.setdefault(row["prompt_id"], []).append(Item(row["id"], row["prompt"], row["text"]))
    rows = judge_candidates(run, k, list(items.values()))
    statuses = Counter(row["status"] for row in rows)
    assert sum(statuses.values()) == len(candidates) * options.draws
    readable = statuses["ok"] / len(rows)
    if readable < run.recipe.gates.min_readable:
        raise GateError(
            f"round {k}: {readable:.1%} of {len(rows)} judgements are readable ({reasons(statuses)}), the floor is "
            f"{run.recipe.gates.min_readable:.0%}: give the model judge data (data.eft), more room (judge.max_tokens), a "
            f"template that it can follow (judge.template), or lower gates.min_readable; what it wrote is in "
            f"{run.dir.file(f'iter_{k}/judgements.jsonl')}"
        )
    return {"judgements": len(rows), "statuses": dict(statuses)}


def build_pairs(run: Run, k: int) -> Row:
    """Best against worst per prompt; every pair that a prompt could have and has not is a row with its reason."""
    recipe, scored = run.recipe, _scored_candidates(run, k)
    options = recipe.pairs
    rules = Rules(
        allow_truncated_chosen=options.allow_truncated_chosen,
        tie_break=options.tie_break,
        length_control=of_round(options.length_control, k),
        per_prompt=options.per_prompt,
    )
    pairs, dropped = [], []
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    for prompt in prompts:
        for number, (pair, reason) in enumerate(prompt_pairs(prompt, scored[prompt["id"]], rules)):
            if pair is not None and _pair_tokens(run, pair) > recipe.dpo.max_pack_tokens:
                pair, reason = None, TOO_LONG
            if pair is not None:
                pairs.append(pair)
            else:
                dropped.append({"id": pair_id(prompt["id"], number), "prompt": prompt["prompt"], "reason": reason})
    without = Counter(row["reason"] for row in dropped)
    assert len(pairs) + sum(without.values()) == options.per_prompt * len(prompts)
    run.dir.write_jsonl(f"iter_{k}/pairs.jsonl", pairs)
    run.dir.write_jsonl(f"iter_{k}/dropped.jsonl", dropped)
    if len(pairs) < recipe.gates.min_pairs and recipe.method == "dpo":
        raise GateError(
            f"round {k} has {len(pairs)} pairs of {len(prompts)} prompts (without one: {reasons(without)}), the floor is "
            f"{recipe.gates.min_pairs}: lower gates.min_pairs, or raise {_more_prompts(recipe)}, candidates.n or judge.draws"
            f"{', or dpo.max_pack_tokens' if without[TOO_LONG] else ''}"
        )
    counts = {"prompts": len(prompts), "pairs": len(pairs), "dropped": dict(without)}
    return counts | ({"consistency": _consistency(k, pairs)} if options.consistency else {})


def _consistency(k: int, pairs: list[Row]) -> float:
    """The mean over the pairs, which must be better than chance: its distance to 1 becomes the label smoothing."""
    known = [pair["consistency"] for pair in pairs if pair["consistency"] is not None]
    mean = math.fsum(known) / len(known) if known else 0.5
    if mean <= 0.5:
        raise GateError(
            f"round {k}: the judge's draws order the answers no more alike than by chance (consistency {mean:.2f} of "
            f"{len(known)} pairs): give the judge more judge data (data.eft), or set pairs.consistency=false in a new directory"
        )
    return mean


def _more_prompts(recipe: Recipe) -> str:
    if recipe.prompts.mode == "continue":
        return "prompts.count"
    return f"the number of prompts in {recipe.prompts.file}" + (" and prompts.count" if recipe.prompts.count else "")


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
        DPORow(run.tokenizer.chat_prompt(p["prompt"]), p["chosen_token_ids"], p["rejected_token_ids"]) for p in pairs
    ]
    computing = compute_model(model, config.precision)
    rows = _with_reference(run, k, computing, rows, config)
    parity = _parity(run, k, pairs, rows, computing.embed.dtype)
    replay = _eft_rows(run, options.max_pack_tokens)[0] if options.replay_weight else []
    steps = _train(run, model, rows, config, f"iter_{k}", replay)
    return {"pairs": len(pairs)} | steps | parity | ({"replay": len(replay)} if replay else {})


def train_positives(run: Run, k: int) -> Row:
    """M_{k+1}, the paper's other variant (section 2.4): M0 on the seed data and, of each round so far, the best answer
    to every prompt that has one with the perfect score."""
    found = [
        best
        for j in range(1, k + 1)
        for candidates in _scored_candidates(run, j).values()
        if (best := positive(candidates, run.recipe.pairs.allow_truncated_chosen)) is not None
    ]
    if not found:
        raise GateError(f"round {k}: no answer has the perfect score; use method=dpo, or a model that judges better")
    rows, counts = _ift_rows(run)
    limit = run.recipe.sft.max_pack_tokens
    rows += _eft_rows(run, limit)[0]
    positives = [SFTRow(run.tokenizer.chat_prompt(row["prompt"]), row["token_ids"]) for row in found]
    fitting = [row for row in positives if _tokens(row) <= limit]
    counts |= {"positives": len(fitting), "positives_too_long": len(positives) - len(fitting)}
    return _train_sft(run, rows + fitting, f"iter_{k}") | counts


# ---- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_model(run: Run, name: str, path: Path) -> Row:
    """One row of the report: truth on held-out instructions, accuracy as a judge on held-out ranks, mean length."""
    options, folder = run.recipe.evaluation, f"evaluation/{name}"
    row: Row = {"name": name, "mean_length": None}
    row |= dict.fromkeys(("true_quality", "true_quality_se", "true_quality_greedy", "true_quality_greedy_se"))
    row["true_quality_n"] = 0
    if run.recipe.data.heldout is not None:
        answers = _answers(run, path, f"{folder}/answers.jsonl", options.temperature)
        row["mean_length"], _ = mean_and_error([len(answer["token_ids"]) for answer in answers])
        greedy = _answers(run, path, f"{folder}/greedy.jsonl", 0.0) if options.greedy else []
        if options.oracle is not None:
            row["true_quality"], row["true_quality_se"] = mean_and_error([a["grade"] for a in answers])
            row["true_quality_greedy"], row["true_quality_greedy_se"] = mean_and_error([a["grade"] for a in greedy])
            row["true_quality_n"] = len(answers)
    groups = heldout_groups(run.recipe)
    if groups:
        file, judge = f"{folder}/judgements.jsonl", run.recipe.judge
        drawn = _by_answer(groups, judge_by_model(run, file, path, _ranked_items(groups), judge, (0, "evaluation")))
        scores = [[_mean(run, draws) for draws in drawn[group["id"]]] for group in groups]
        row |= judge_accuracy(groups, scores) | {"longer_wins": longer_wins(groups)}
    return row


def _answers(run: Run, path: Path, name: str, temperature: float) -> list[Row]:
    """One answer to every held-out instruction; the seeds are the same for all models."""
    options = run.recipe.evaluation

    def request(prompt: Row) -> Request:
        seed = row_seed(run.recipe.seed, 0, "evaluation", prompt["id"])
        params = SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=seed)
        ids = run.tokenizer.chat_prompt(prompt["prompt"])
        return Request(ids, params, lambda output: [_answer_row(run, prompt, output)])

    prompts = heldout_prompts(run.recipe)
    return sample_groups(run, name, run.llm(path), in_groups([request(prompt) for prompt in prompts]))


def _answer_row(run: Run, prompt: Row, output: RequestOutput | None) -> Row:
    """An instruction that leaves no room for an answer has none."""
    text, ids, finish = "", list[int](), "prompt_too_long"
    if output is not None:
        (answer,) = output.outputs
        text, ids, finish = answer.text, answer.token_ids, answer.finish_reason
    row: Row = {"id": prompt["id"], "prompt": prompt["prompt"], "text": text, "token_ids": ids, "finish_reason": finish}
    return row | {"grade": tiny.grade(prompt["prompt"], text)} if run.recipe.evaluation.oracle else row


# ---- shared -----------------------------------------------------------------------------------------------------------


def _train(
    run: Run,
    model: Llama | LoRA,
    rows: list[SFTRow] | list[DPORow],
    config: SFTConfig,
    folder: str,
    replay: list[SFTRow],
) -> Row:
    """Train, from a saved state if the run was interrupted here, and save folder/model; a LoRA's is the merged one, with
    folder/adapter beside it. Returns the number of steps."""
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
        )
    except TrainingInterrupted:
        raise Stopped from None
    except FloatingPointError as error:
        key = "dpo.lr" if isinstance(config, DPOConfig) else "sft.lr"
        raise FloatingPointError(f"{folder}/model: {error} (a changed {key} needs a new --out directory)") from None
    counts: Row = {"steps": result.steps}
    if isinstance(model, LoRA):
        inside = run.start.is_relative_to(run.dir.file(""))
        base = run.start.relative_to(run.dir.file("")) if inside else run.start  # the same bytes in every directory
        save_adapter(model, out / "adapter", base_model=str(base))
        counts["lora_rank"] = model.rank
        model = model.merged()
    save_checkpoint(model, out / "model", run.tokenizer)
    clear_state(out)
    return counts


def _train_sft(run: Run, rows: list[SFTRow], folder: str) -> Row:
    config = SFTConfig(**run.recipe.sft.model_dump(), seed=row_seed(run.recipe.seed, 0, folder, 0) >> 1)
    return {"rows": len(rows)} | _train(run, run.fresh(run.base, config.precision), rows, config, folder, [])


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


def _parity(run: Run, k: int, pairs: list[Row], rows: list[DPORow], computed_in: torch.dtype = torch.float32) -> Row:
    """How far the sampler's log-probs of the pairs' answers are from the trainer's, in nats a token: mean and most.

    M_k drew the answers and M_k is the reference, so nothing but rounding may lie between them.
    """
    sampled = {row["id"]: row["logprob"] for row in run.rows(f"iter_{k}/candidates.jsonl")}
    gaps = [
        abs(sampled[f"{pair['prompt_id']}-{pair[f'{kind}_index']}"] - trained) / len(pair[f"{kind}_token_ids"])
        for pair, row in zip(pairs, rows, strict=True)
        for kind, trained in zip(("chosen", "rejected"), row.reference or (), strict=True)
    ]
    worst = max(gaps)  # of finite numbers: neither file can hold others
    allowed = max(run.recipe.gates.parity_tolerance, PARITY_BF16 if computed_in == torch.bfloat16 else 0.0)
    if worst > allowed:
        raise GateError(
            f"round {k}: the sampler's log-probs of an answer are {worst:.1e} nats a token from the trainer's, allowed are "
            f"{allowed:.0e} (gates.parity_tolerance): the pairs in {run.dir.file(f'iter_{k}')} "
            f"are not by the model in {run.model(k)}; start the round again in a new directory"
        )
    return {"parity_mean": float(f"{sum(gaps) / len(gaps):.1e}"), "parity_max": float(f"{worst:.1e}")}


def _scored_candidates(run: Run, k: int) -> dict[str, list[Row]]:
    """Prompt id -> its candidates with the mean score of their judgements (None: too few are readable)."""
    draws: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/judgements.jsonl"):
        draws.setdefault(row["candidate_id"], []).append(row)
    scored: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/candidates.jsonl"):
        judged = draws[row["id"]]
        scored.setdefault(row["prompt_id"], []).append(
            row | {"score": _mean(run, judged), "draws": [each["score"] for each in judged]}
        )
    return scored


def _mean(run: Run, rows: Sequence[Row]) -> float | None:
    return mean_score([Judgement(row["score"], row["status"]) for row in rows], run.recipe.judge.min_valid_draws)


def _ranked_items(groups: Sequence[Row]) -> list[list[Item]]:
    return [[Item(f"{g['id']}-{i}", g["prompt"], a["text"]) for i, a in enumerate(g["answers"])] for g in groups]


def _by_answer(groups: Sequence[Row], judgements: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Group id -> for each of its answers the judgement rows, in order of the draws."""
    drawn: dict[str, list[Row]] = {}
    for row in judgements:
        drawn.setdefault(row["candidate_id"], []).append(row)
    return {group["id"]: [drawn[f"{group['id']}-{i}"] for i in range(len(group["answers"]))] for group in groups}


def _eft_rows(run: Run, limit: int) -> tuple[list[SFTRow], int]:
    """The judge data: judge prompts with the judgement to write, and how many are longer than one forward pass takes."""
    rows = [
        SFTRow(run.template.token_ids(run.tokenizer, row["prompt"], row["answer"]), row["judgement_token_ids"])
        for row in run.rows("eft/train.jsonl")
    ]
    fitting = [row for row in rows if _tokens(row) <= limit]
    return fitting, len(rows) - len(fitting)


def _tokens(row: SFTRow) -> int:
    return len(row.prompt) + len(row.completion)


def _ift_rows(run: Run) -> tuple[list[SFTRow], Row]:
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


def _pair_tokens(run: Run, pair: Row) -> int:
    prompt = run.tokenizer.chat_prompt(pair["prompt"])
    return len(prompt) + len(pair["chosen_token_ids"]) + len(pair["rejected_token_ids"])


def _finish_counts(rows: list[Row]) -> Row:
    return dict(Counter(f"finish_{row['finish_reason']}" for row in rows))


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes, for the manifest."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
