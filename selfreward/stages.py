"""The stages: each reads finished files of the run, writes its own whole, and returns counts that add up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import (
    LLM,
    DPOConfig,
    DPORow,
    InputError,
    Llama,
    SamplingParams,
    SFTConfig,
    SFTRow,
    Tokenizer,
    load_checkpoint,
    reference_logprobs,
    save_checkpoint,
    train,
)
from selfreward import tiny
from selfreward.eft import select
from selfreward.evaluate import judge_accuracy, longer_wins, mean_and_error
from selfreward.formats import load_ift, load_prompts, load_ranked, read_jsonl
from selfreward.judge import Judgement, JudgeTemplate, judge_status, mean_score
from selfreward.pairs import build_pair
from selfreward.prompts import take_prompts, write_prompts
from selfreward.recipe import DPO, SFT, Recipe, Sampling
from selfreward.report import Reporter
from selfreward.state import RunDir, row_seed

Row = dict[str, Any]
STEP0_PAIRS = 64


class GateError(Exception):
    """The run must not go on: what was found and what to do next (exit code 3)."""


@dataclass
class Run:
    """What every stage needs: the recipe, the directory, the tokenizer, the judge's template, and the loaded model."""

    recipe: Recipe
    dir: RunDir
    tokenizer: Tokenizer
    template: JudgeTemplate
    report: Reporter
    _loaded: tuple[Path, LLM] | None = field(default=None)

    @property
    def base(self) -> Path:
        """M0's directory."""
        return self.recipe.model if self.recipe.model is not None else self.dir.file("m0/model")

    def model(self, number: int) -> Path:
        """Directory of M_number: M1 comes out of SFT, M_{k+1} out of round k."""
        if number == 1:
            return self.dir.file("m1/model" if self.dir.file("m1/model").is_dir() else "sft/model")
        return self.dir.file(f"iter_{number - 1}/model")

    def llm(self, path: Path) -> LLM:
        """The sampler on a model of the run; the last one stays loaded."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # free the old weights before the new ones come
            self._loaded = (path, LLM(load_checkpoint(path), tokenizer=self.tokenizer))
        return self._loaded[1]

    def fresh(self, path: Path) -> Llama:
        """A copy of a model that training may change."""
        self._loaded = None
        return load_checkpoint(path)

    def rows(self, name: str) -> list[Row]:
        return read_jsonl(self.dir.file(name))


# ---- SFT, EFT, M1 -----------------------------------------------------------------------------------------------------


def make_base(run: Run) -> Row:
    """M0 with random weights, for trials without a checkpoint."""
    assert run.recipe.init is not None
    config = run.recipe.init.config(run.tokenizer.vocab_size)
    save_checkpoint(Llama(config).init_weights(run.recipe.init.seed), run.base, run.tokenizer)
    return {"parameters": config.n_parameters}


def train_baseline(run: Run) -> Row:
    """The SFT baseline: M0 on the human instructions alone."""
    rows, counts = _ift_rows(run)
    return _train_sft(run, rows, "sft/model", "sft") | counts


def build_eft(run: Run) -> Row:
    """The baseline judges human-ranked answers; what agrees with the ranks becomes judge data."""
    recipe = run.recipe
    heldout = load_ranked(recipe.data.eft_heldout)[: recipe.evaluation.judge_groups] if recipe.data.eft_heldout else []
    groups = load_ranked(recipe.data.eft)[: recipe.data.eft_limit] if recipe.data.eft else []
    held = {group["prompt"] for group in heldout}
    shared = next((group["id"] for group in groups if group["prompt"] in held), None)
    if shared is not None:
        raise InputError(
            f"{recipe.data.eft}: group {shared} has a prompt of {recipe.data.eft_heldout}; keep them apart"
        )
    items = [(f"{g['id']}-{i}", g["prompt"], a["text"]) for g in groups for i, a in enumerate(g["answers"])]
    drawn = _judge(run, run.dir.file("sft/model"), items, recipe.eft, recipe.eft.attempts, (0, "eft")) if items else {}
    by_group = {g["id"]: [drawn[f"{g['id']}-{i}"] for i in range(len(g["answers"]))] for g in groups}
    rows, dropped, counts = select(groups, by_group)
    run.dir.write_jsonl("eft/judgements.jsonl", [row for rows_ in drawn.values() for row in rows_])
    run.dir.write_jsonl("eft/train.jsonl", rows)
    run.dir.write_jsonl("eft/dropped.jsonl", dropped)
    run.dir.write_jsonl("eft/heldout.jsonl", heldout)
    if not rows and recipe.eft.required:
        raise GateError(
            f"no judgement of the SFT baseline agrees with the ranks of the {len(groups)} groups in {recipe.data.eft} "
            f"({dict(counts)}): raise eft.attempts or data.eft_limit, or set eft.required=false to go without judge data"
        )
    return {"groups": len(groups), "train": len(rows), "heldout": len(heldout), **counts}


def train_m1(run: Run) -> Row:
    """M1: M0 on instructions and judge data. Without judge data the baseline is M1 and is not trained twice."""
    judgements = run.rows("eft/train.jsonl")
    if not judgements:
        return {"same_as": "sft/model"}
    rows, counts = _ift_rows(run)
    for row in judgements:
        prompt = run.template.token_ids(run.tokenizer, row["prompt"], row["answer"])
        rows.append(SFTRow(prompt, row["judgement_token_ids"]))
    return _train_sft(run, rows, "m1/model", "m1") | counts | {"eft": len(judgements)}


# ---- one round --------------------------------------------------------------------------------------------------------


def new_prompts(run: Run, k: int) -> Row:
    """This round's prompts, none of which an earlier round, the seed data or the held-out data has."""
    recipe, options = run.recipe, run.recipe.prompts
    taken = {row["prompt"] for j in range(1, k) for row in run.rows(f"iter_{j}/prompts.jsonl")} | _known_prompts(run)
    if options.mode == "file":
        assert options.file is not None
        rows, dropped = take_prompts(load_prompts(options.file), options.count, taken, k)
    else:
        assert options.count is not None
        valid = tiny.is_valid if options.valid == "tiny" else lambda text: True
        params = _params(options, 1, 0)
        rows, dropped = write_prompts(run.llm(run.model(1)), params, options.count, taken, valid, (recipe.seed, k))
    longest = run.llm(run.model(1)).max_model_len - 1
    fitting = [row for row in rows if len(run.tokenizer.chat_prompt(row["prompt"])) <= longest]
    dropped["prompt_too_long"] += len(rows) - len(fitting)
    if not fitting:
        raise GateError(
            f"round {k} has no prompts left after the filters ({dict(dropped)}): raise prompts.count, change the sampling "
            "settings under prompts, or give prompts.mode=file with a larger prompts.file"
        )
    run.dir.write_jsonl(f"iter_{k}/prompts.jsonl", fitting)
    return {"kept": len(fitting), "dropped": dict(+dropped)}


def sample_candidates(run: Run, k: int) -> Row:
    """N answers of M_k to every prompt."""
    options = run.recipe.candidates
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    llm = run.llm(run.model(k))
    ids = [run.tokenizer.chat_prompt(row["prompt"]) for row in prompts]
    params = [_params(options, options.n, row_seed(run.recipe.seed, k, "candidates", row["id"])) for row in prompts]
    rows = []
    for prompt, one, output in zip(prompts, params, _generate(run, llm, ids, params, "candidates"), strict=True):
        for answer in output.outputs:
            rows.append(
                {
                    "id": f"{prompt['id']}-{answer.index}",
                    "prompt_id": prompt["id"],
                    "prompt": prompt["prompt"],
                    "index": answer.index,
                    "text": answer.text,
                    "token_ids": answer.token_ids,
                    "finish_reason": answer.finish_reason,
                    "logprob": answer.cumulative_logprob,
                    "seed": one.seed,
                }
            )
    run.dir.write_jsonl(f"iter_{k}/candidates.jsonl", rows)
    return {"prompts": len(prompts), "candidates": len(rows)} | _finish_counts(rows)


def judge_candidates(run: Run, k: int) -> Row:
    """K judgements of M_k on every candidate; an unreadable one is a status, never a number."""
    options = run.recipe.judge
    candidates = run.rows(f"iter_{k}/candidates.jsonl")
    items = [(row["id"], row["prompt"], row["text"]) for row in candidates]
    drawn = _judge(run, run.model(k), items, options, options.draws, (k, "judge"))
    rows = [row for row in candidates for row in drawn[row["id"]]]
    statuses = Counter(row["status"] for row in rows)
    run.dir.write_jsonl(f"iter_{k}/judgements.jsonl", rows)
    assert sum(statuses.values()) == len(candidates) * options.draws
    readable = statuses["ok"] / len(rows)
    if readable < run.recipe.gates.min_readable:
        raise GateError(
            f"round {k}: {readable:.1%} of {len(rows)} judgements are readable ({dict(statuses)}), the floor is "
            f"{run.recipe.gates.min_readable:.0%}: give the model judge data (data.eft), more room (judge.max_tokens), a "
            f"template that it can follow (judge.template), or lower gates.min_readable; what it wrote is in "
            f"{run.dir.file(f'iter_{k}/judgements.jsonl')}"
        )
    return {"judgements": len(rows), "statuses": dict(statuses)}


def build_pairs(run: Run, k: int) -> Row:
    """Best against worst per prompt; everything without a pair is a row with its reason."""
    recipe = run.recipe
    draws: dict[str, list[Judgement]] = {}
    for row in run.rows(f"iter_{k}/judgements.jsonl"):
        draws.setdefault(row["candidate_id"], []).append(Judgement(row["score"], row["status"]))
    by_prompt: dict[str, list[Row]] = {}
    for row in run.rows(f"iter_{k}/candidates.jsonl"):
        score = mean_score(draws[row["id"]], recipe.judge.min_valid_draws)
        by_prompt.setdefault(row["prompt_id"], []).append(row | {"score": score})
    pairs, dropped = [], []
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    for prompt in prompts:
        pair, reason = build_pair(prompt, by_prompt[prompt["id"]], recipe.pairs.allow_truncated_chosen)
        if pair is not None:
            pairs.append(pair)
        else:
            dropped.append({"id": prompt["id"], "prompt": prompt["prompt"], "reason": reason})
    reasons = Counter(row["reason"] for row in dropped)
    assert len(pairs) + sum(reasons.values()) == len(prompts)
    run.dir.write_jsonl(f"iter_{k}/pairs.jsonl", pairs)
    run.dir.write_jsonl(f"iter_{k}/dropped.jsonl", dropped)
    if len(pairs) < recipe.gates.min_pairs:
        raise GateError(
            f"round {k} has {len(pairs)} pairs of {len(prompts)} prompts ({dict(reasons)}), the floor is "
            f"{recipe.gates.min_pairs}: raise prompts.count, candidates.n or judge.draws, or lower gates.min_pairs"
        )
    return {"prompts": len(prompts), "pairs": len(pairs), "dropped": dict(reasons)}


def train_dpo(run: Run, k: int) -> Row:
    """M_{k+1}: DPO from M_k, with M_k as the reference, on this round's pairs."""
    pairs = run.rows(f"iter_{k}/pairs.jsonl")
    model = run.fresh(run.model(k))
    config = DPOConfig(**_train_options(run.recipe.dpo), seed=row_seed(run.recipe.seed, k, "dpo", 0) >> 1)
    rows = [
        DPORow(run.tokenizer.chat_prompt(p["prompt"]), p["chosen_token_ids"], p["rejected_token_ids"]) for p in pairs
    ]
    reference = reference_logprobs(model, rows, config.max_pack_tokens)
    _check_step_zero(run, k, model, rows, reference)
    rows = [DPORow(r.prompt, r.chosen, r.rejected, ref) for r, ref in zip(rows, reference, strict=True)]
    result = train(model, rows, config, run.dir.file(f"iter_{k}/training"), run.report.steps(f"iter_{k}/dpo"))
    save_checkpoint(model, run.dir.file(f"iter_{k}/model"), run.tokenizer)
    return {"pairs": len(pairs), "steps": result.steps}


# ---- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_model(run: Run, name: str, path: Path) -> Row:
    """One row of the report: truth on held-out instructions, accuracy as a judge on held-out ranks, mean length."""
    recipe, options = run.recipe, run.recipe.evaluation
    row: Row = {"name": name, "true_quality": None, "true_quality_se": None, "true_quality_n": 0, "mean_length": None}
    if recipe.data.heldout is not None:
        prompts = load_prompts(recipe.data.heldout)[: options.prompts]
        answers = _answers(run, path, prompts)
        row["mean_length"], _ = mean_and_error([len(answer) for answer, _ in answers])
        if options.oracle == "tiny":
            grades = [float(tiny.grade(p["prompt"], text)) for p, (_, text) in zip(prompts, answers, strict=True)]
            row["true_quality"], row["true_quality_se"] = mean_and_error(grades)
            row["true_quality_n"] = len(grades)
    groups = run.rows("eft/heldout.jsonl")
    if groups:
        items = [(f"{g['id']}-{i}", g["prompt"], a["text"]) for g in groups for i, a in enumerate(g["answers"])]
        drawn = _judge(run, path, items, recipe.judge, recipe.judge.draws, (0, "evaluation"))
        scores = [[_mean(run, drawn[f"{group['id']}-{i}"]) for i in range(len(group["answers"]))] for group in groups]
        row |= judge_accuracy(groups, scores) | {"longer_wins": longer_wins(groups)}
    return row


def _answers(run: Run, path: Path, prompts: list[Row]) -> list[tuple[list[int], str]]:
    options = run.recipe.evaluation
    ids = [run.tokenizer.chat_prompt(row["prompt"]) for row in prompts]
    params = [
        SamplingParams(
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=row_seed(run.recipe.seed, 0, "evaluation", row["id"]),
        )
        for row in prompts
    ]
    outputs = _generate(run, run.llm(path), ids, params, "answers")
    return [(output.outputs[0].token_ids, output.outputs[0].text) for output in outputs]


def _mean(run: Run, rows: list[Row]) -> float | None:
    return mean_score([Judgement(row["score"], row["status"]) for row in rows], run.recipe.judge.min_valid_draws)


# ---- shared -----------------------------------------------------------------------------------------------------------


def _judge(
    run: Run, model: Path, items: Sequence[tuple[str, str, str]], options: Sampling, draws: int, key: tuple[int, str]
) -> dict[str, list[Row]]:
    """`draws` judgements of every (id, prompt, answer); the rubric and each answer are computed once."""
    llm = run.llm(model)
    max_tokens: int = options.max_tokens  # type: ignore[attr-defined]
    asked, ids, params = list[str](), list[list[int]](), list[SamplingParams]()
    rows: dict[str, list[Row]] = {}
    for item, prompt, answer in items:
        tokens = run.template.token_ids(run.tokenizer, prompt, answer)
        if len(tokens) + 1 > llm.max_model_len:
            rows[item] = [
                _judgement_row(item, draw, "", [], Judgement(None, "prompt_too_long")) for draw in range(draws)
            ]
            continue
        asked.append(item)
        ids.append(tokens)
        params.append(
            SamplingParams(
                n=draws,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=max_tokens,
                seed=row_seed(run.recipe.seed, key[0], key[1], item),
            )
        )
    for item, output in zip(asked, _generate(run, llm, ids, params, key[1]), strict=True):
        rows[item] = [
            _judgement_row(item, draw.index, draw.text, draw.token_ids, judge_status(draw.text, draw.finish_reason))
            for draw in output.outputs
        ]
    return rows


def _judgement_row(item: str, draw: int, text: str, token_ids: list[int], judgement: Judgement) -> Row:
    return {
        "id": f"{item}-{draw}",
        "candidate_id": item,
        "draw": draw,
        "score": judgement.score,
        "status": judgement.status,
        "text": text,
        "token_ids": token_ids,
    }


def _generate(run: Run, llm: LLM, ids: list[list[int]], params: list[SamplingParams], what: str) -> list[Any]:
    outputs: list[Any] = [None] * len(ids)
    progress = run.report.progress(what, len(ids))
    for output in llm.stream(ids, params):
        outputs[output.index] = output
        progress(1)
    return outputs


def _params(options: Any, n: int, seed: int) -> SamplingParams:
    return SamplingParams(
        n=n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens, seed=seed
    )


def _ift_rows(run: Run) -> tuple[list[SFTRow], Row]:
    """Chat prompts with human answers, cut at `data.max_tokens` (a cut answer has no EOS), and how many were cut or,
    because the prompt alone fills that many tokens, left out."""
    limit = run.recipe.data.max_tokens
    rows, counts = list[SFTRow](), Counter[str](ift=0, ift_cut=0, ift_prompt_too_long=0)
    for row in load_ift(run.recipe.data.ift, run.recipe.data.ift_limit):
        prompt = run.tokenizer.chat_prompt(row["prompt"])
        answer = [*run.tokenizer.encode(row["response"].strip()), run.tokenizer.eos_id]
        room = limit - len(prompt)
        if room < 1:
            counts["ift_prompt_too_long"] += 1
            continue
        rows.append(SFTRow(prompt, answer[:room]))
        counts["ift"] += 1
        counts["ift_cut"] += len(answer) > room
    if not rows:
        raise InputError(f"{run.recipe.data.ift}: no prompt is shorter than data.max_tokens={limit}; raise it")
    return rows, dict(counts)


def _train_options(options: SFT | DPO) -> Row:
    return options.model_dump()


def _train_sft(run: Run, rows: list[SFTRow], out: str, name: str) -> Row:
    model = run.fresh(run.base)
    config = SFTConfig(**_train_options(run.recipe.sft), seed=row_seed(run.recipe.seed, 0, name, 0) >> 1)
    result = train(model, rows, config, run.dir.file(out).parent / "training", run.report.steps(name))
    save_checkpoint(model, run.dir.file(out), run.tokenizer)
    return {"rows": len(rows), "steps": result.steps}


def _check_step_zero(run: Run, k: int, model: Llama, rows: list[DPORow], reference: list[tuple[float, float]]) -> None:
    """The policy is the reference before step 0: its log-probs in another packing must be the cached ones."""
    again = reference_logprobs(
        model, rows[:STEP0_PAIRS], max(len(r.prompt) + len(r.chosen) + len(r.rejected) for r in rows)
    )
    worst = max(abs(a - b) for one, two in zip(again, reference, strict=False) for a, b in zip(one, two, strict=True))
    if not worst <= run.recipe.gates.step0_tolerance:
        raise GateError(
            f"round {k}: before step 0 the policy's log-probs differ from the cached reference by {worst:.2e} nats a "
            f"sequence, allowed are {run.recipe.gates.step0_tolerance:.0e}: the model or its numbers changed; start the "
            "round again in a new directory"
        )


def _known_prompts(run: Run) -> set[str]:
    """Prompts of seed and held-out data."""
    data = run.recipe.data
    known = {row["prompt"] for row in load_ift(data.ift, data.ift_limit)}
    for ranked in (data.eft, data.eft_heldout):
        known |= {group["prompt"] for group in load_ranked(ranked)} if ranked else set()
    return known | ({row["prompt"] for row in load_prompts(data.heldout)} if data.heldout else set())


def _finish_counts(rows: list[Row]) -> Row:
    return dict(Counter(f"finish_{row['finish_reason']}" for row in rows))


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes, for the manifest."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
