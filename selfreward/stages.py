"""The stages: each reads finished files of the run, writes its own, and returns counts that add up."""

from __future__ import annotations

import math
from collections import Counter

from engine import Llama, RequestOutput, SamplingParams, save_checkpoint
from selfreward.context import GateError, Row, Run
from selfreward.eft import select
from selfreward.gates import check_judgements, length_drift
from selfreward.health import round_warnings
from selfreward.judging import Item, by_answer, judge_by_model, judge_candidates, ranked_items, scored_candidates
from selfreward.pairs import NO_MORE, TOO_LONG, Rules, pair_id, said
from selfreward.pairs import build_pairs as prompt_pairs
from selfreward.prompts import PROMPT_TOO_LONG, by_reason, take_prompts, write_few_shot, write_prompts
from selfreward.recipe import Recipe
from selfreward.recipe_stages import Candidates
from selfreward.report import reasons
from selfreward.report_rounds import figures_of_round
from selfreward.sampling import Request, in_groups, sample_groups
from selfreward.seeds import eft_groups, file_of, heldout_groups, known_prompts
from selfreward.state import row_seed
from selfreward.training import eft_rows

REFUSED = ("no_ranks", "unreadable", "order", "tie")  # why an attempt of the EFT builder is not kept


# ---- M0 and judge data -----------------------------------------------------------------------------------------------------


def written(stage: str, counts: Row) -> list[str]:
    """What a finished stage left in the run that later stages and the report read."""
    folder, _, last = stage.partition("/")
    if stage == "evaluation/head_to_head":
        return ["evaluation/head_to_head.jsonl"]
    if folder == "evaluation":  # both meet those of other models
        read = {"answers": counts.get("mean_length") is not None, "judgements": counts.get("judge_groups")}
        return [f"{stage}/{name}.jsonl" for name, there in read.items() if there]
    if "same_as" in counts:
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


def build_eft(run: Run) -> Row:
    """The baseline judges human-ranked answers; what agrees with the ranks becomes judge data."""
    recipe = run.recipe
    heldout, groups = heldout_groups(recipe), eft_groups(recipe)
    drawn = judge_by_model(
        run, "eft/judgements.jsonl", run.dir.file("sft/model"), ranked_items(groups), recipe.eft, (0, "eft")
    )
    rows, dropped, counts = select(groups, by_answer(groups, drawn))
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
    if recipe.dpo.replay_weight and not eft_rows(run, recipe.dpo.max_pack_tokens)[0]:
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


# ---- one round --------------------------------------------------------------------------------------------------------


def new_prompts(run: Run, k: int) -> Row:
    """This round's prompts, none of which an earlier round, the seed data or the held-out data has."""
    known, mode = known_prompts(run.recipe), run.recipe.prompts.mode
    if mode == "file":
        choice = take_prompts(run.recipe, k, known)
    else:
        earlier = [row for j in range(1, k) for row in run.rows(f"iter_{j}/prompts.jsonl")]
        known |= {row["prompt"] for row in earlier}
        choice = write_few_shot(run, k, known, earlier) if mode == "few_shot" else write_prompts(run, k, known)
    kept, dropped = list[Row](), list(choice.dropped)
    for row in choice.kept:
        fits = len(run.tokenizer.chat_prompt(row["prompt"])) < run.context
        (kept if fits else dropped).append(row if fits else row | {"reason": PROMPT_TOO_LONG})
    counts = by_reason(dropped)
    assert len(kept) + sum(counts.values()) == len(choice)
    run.dir.write_jsonl(f"iter_{k}/prompts_dropped.jsonl", dropped)
    if not kept:
        raise GateError(f"round {k} has no prompts left after the filters ({reasons(counts)}): {_prompts_advice(run)}")
    wanted = run.recipe.prompts.count or 0
    if mode != "file" and len(kept) < wanted:
        run.report.warn(
            f"iter_{k}/prompts: {len(kept)} of prompts.count={wanted} in {len(run.rows(f'iter_{k}/attempts.jsonl'))} "
            f"requests ({reasons(counts)}); the round goes on with them, what was dropped is in "
            f"{run.dir.file(f'iter_{k}/prompts_dropped.jsonl')}"
        )
    run.dir.write_jsonl(f"iter_{k}/prompts.jsonl", kept)
    return {"kept": len(kept), "dropped": counts}


def _prompts_advice(run: Run) -> str:
    if run.recipe.prompts.mode == "file":
        return f"give a prompts.file with shorter prompts (the model's context is {run.context} tokens)"
    few_shot = "give another prompts.template or prompt_model, " if run.recipe.prompts.mode == "few_shot" else ""
    return (
        f"raise prompts.count or prompts.max_tokens, change prompts.temperature or prompts.top_p, {few_shot}or set "
        "prompts.mode=file and prompts.file"
    )


def sample_candidates(run: Run, k: int) -> Row:
    """N answers of M_k to every prompt."""
    options = run.recipe.candidates
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    requests = [_candidate_request(run, k, prompt, options) for prompt in prompts]
    rows = sample_groups(run, f"iter_{k}/candidates.jsonl", run.model(k), in_groups(requests))
    drift = length_drift(run, k, [len(row["token_ids"]) for row in rows])
    counts = {"prompts": len(prompts), "candidates": len(rows)} | _finish_counts(rows)
    return counts | ({} if drift is None else {"length_drift": round(drift, 4)})


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
    check_judgements(run, k, rows)
    counts: Row = {"judgements": len(rows), "statuses": dict(statuses)}
    if options.score == "expected":
        counts["expected"] = sum(row.get("expected") is not None for row in rows)
        counts["without_place"] = statuses["ok"] - counts["expected"]  # they count as the score that was drawn
    return counts


def build_pairs(run: Run, k: int) -> Row:
    """Best against worst per prompt; every pair that a prompt could have and has not is a row with its reason."""
    recipe, scored = run.recipe, scored_candidates(run, k)
    options = recipe.pairs
    rules = Rules(**{key: value for key, value in options.of_round(k).items() if key != "consistency"})
    pairs, dropped = [], []
    prompts = run.rows(f"iter_{k}/prompts.jsonl")
    for prompt in prompts:
        for number, (pair, reason) in enumerate(prompt_pairs(prompt, scored[prompt["id"]], rules)):
            if pair is not None and _pair_tokens(run, pair) > recipe.dpo.max_pack_tokens:
                pair, reason = None, TOO_LONG
            if pair is not None:
                pairs.append(pair)
            else:
                name = pair_id(prompt["id"], number)
                dropped.append({"id": name, "prompt_id": prompt["id"], "prompt": prompt["prompt"], "reason": reason})
    without = Counter(row["reason"] for row in dropped)
    assert len(pairs) + sum(without.values()) == options.per_prompt * len(prompts)
    run.dir.write_jsonl(f"iter_{k}/pairs.jsonl", pairs)
    run.dir.write_jsonl(f"iter_{k}/dropped.jsonl", dropped)
    if len(pairs) < recipe.gates.min_pairs and recipe.method == "dpo":
        none = {name: count for name, count in without.items() if name != NO_MORE}
        raise GateError(
            f"round {k} has {len(pairs)} pairs of {len(prompts)} prompts (without one: {reasons(none)}), the floor is "
            f"{recipe.gates.min_pairs}: {_pairs_advice(recipe, none)}"
        )
    counts = {"prompts": len(prompts), "pairs": len(pairs), "dropped": dict(without)}
    return counts | ({"consistency": _consistency(k, pairs)} if options.consistency else {})


def say_what_is_odd(run: Run, k: int) -> None:
    """Before a round's training: what is no reason to stop, but to look."""
    for sentence in round_warnings(figures_of_round(run.dir.path, run.dir.finished(), k), run.recipe.dump()):
        run.report.warn(sentence)


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


def _pairs_advice(recipe: Recipe, without: dict[str, int]) -> str:
    """What helps most against the most frequent reason, then what helps always."""
    most = max(without, key=lambda reason: without[reason], default="")
    first = {
        "tie": "set judge.score=expected, or raise judge.draws or candidates.temperature",
        "duplicate": "raise candidates.temperature or candidates.n",
        "none_choosable": "raise candidates.max_tokens, or set pairs.allow_truncated_chosen=true",
        "too_few_scored": "raise judge.max_tokens or judge.draws",
        TOO_LONG: "raise dpo.max_pack_tokens",
    }.get(most, "raise candidates.n or judge.draws")
    lower = ", or lower gates.min_pairs" if recipe.gates.min_pairs > 1 else ""
    return f"{first}, or raise {_more_prompts(recipe)}{lower}"


def _more_prompts(recipe: Recipe) -> str:
    if recipe.prompts.mode != "file":
        return "prompts.count"
    return f"the number of prompts in {recipe.prompts.file}" + (" and prompts.count" if recipe.prompts.count else "")


def _pair_tokens(run: Run, pair: Row) -> int:
    prompt = run.tokenizer.chat_prompt(said(pair, "prompt"))
    return len(prompt) + len(pair["chosen_token_ids"]) + len(pair["rejected_token_ids"])


def _finish_counts(rows: list[Row]) -> Row:
    return dict(Counter(f"finish_{row['finish_reason']}" for row in rows))
