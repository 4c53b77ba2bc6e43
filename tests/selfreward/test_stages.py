"""What single stages do with odd rows; the loop as a whole is in test_run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from engine import DPOConfig, DPORow, InputError, Tokenizer, load_checkpoint, reference_logprobs
from selfreward import stages
from selfreward.context import GateError
from selfreward.recipe import Recipe
from selfreward.stages import Run, _check_step_zero, _ift_rows, _parity, _with_reference

NOTHING: Any = None  # the parts of a run that these stages do not touch


def test_instruction_rows_are_cut_and_prompts_that_leave_no_room_are_counted(tmp_path):
    file = tmp_path / "ift.jsonl"
    given = [("copy a b c", "a b c"), ("copy a b c d e f g", "a"), ("copy a b c", "a b c d e f g a b c")]
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in given))
    recipe = Recipe.load("tiny", [f"data.ift={file}", "data.max_tokens=11"])
    tokenizer = Tokenizer(recipe.model)
    rows, counts = _ift_rows(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
    assert counts == {"ift": 2, "ift_cut": 1, "ift_prompt_too_long": 1}
    whole, cut = rows
    assert whole.completion == [*tokenizer.encode("a b c"), tokenizer.eos_id]
    assert len(cut.prompt) + len(cut.completion) == 11 and tokenizer.eos_id not in cut.completion


@pytest.fixture
def round_one(tmp_path):
    """A run with M0 as M1, two pairs, and the candidates that they are of as M1 would have drawn them."""
    recipe = Recipe.load("tiny", [])
    directory = SimpleNamespace(file=lambda name: tmp_path / name, counts=lambda stage: {})
    run = Run(recipe, directory, Tokenizer(recipe.model), NOTHING, NOTHING)
    model, encode = load_checkpoint(recipe.model), run.tokenizer.encode
    pairs, candidates, data = [], [], []
    for number, prompt in enumerate(("copy a b c", "sort c b")):
        answers = [[*encode(text), run.tokenizer.eos_id] for text in ("a b c", "a")]
        pairs.append(
            {"id": f"p{number}", "prompt_id": f"p{number}", "prompt": prompt, "chosen_index": 1, "rejected_index": 0,
             "chosen_token_ids": answers[0], "rejected_token_ids": answers[1]}
        )  # fmt: skip
        data.append(DPORow(run.tokenizer.chat_prompt(prompt), *answers))
    for pair, (chosen, rejected) in zip(pairs, reference_logprobs(model, data), strict=True):
        candidates += [{"id": f"{pair['id']}-{i}", "logprob": value} for i, value in enumerate((rejected, chosen))]
    (tmp_path / "iter_1").mkdir()
    (tmp_path / "iter_1/candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in candidates))
    return run, model, pairs, data


def test_the_reference_is_stored_once_and_belongs_to_its_model_and_pairs(round_one, monkeypatch):
    run, model, _, data = round_one
    first = _with_reference(run, 1, model, data, DPOConfig())
    monkeypatch.setattr(stages, "reference_logprobs", NOTHING)  # not asked for a second time
    assert _with_reference(run, 1, model, data, DPOConfig()) == first
    with pytest.raises(InputError, match=r"iter_1/reference.jsonl holds the reference of something else: .*pair 0"):
        _with_reference(run, 1, model, data[::-1], DPOConfig())


def test_the_step_zero_gate_stops_a_policy_that_is_not_the_reference(round_one):
    run, model, _, data = round_one
    rows = _with_reference(run, 1, model, data, DPOConfig())
    _check_step_zero(run, 1, model, rows)
    for moved in (rows[1].reference[0] + 2e-3, math.inf):
        wrong = [rows[0], replace(rows[1], reference=(moved, rows[1].reference[1]))]
        with pytest.raises((GateError, InputError), match=r"differ from the cached reference by 2.0\de-03|two finite"):
            _check_step_zero(run, 1, model, wrong)


def test_the_samplers_log_probs_are_the_trainers_or_the_round_stops(round_one, tmp_path):
    run, model, pairs, data = round_one
    rows = _with_reference(run, 1, model, data, DPOConfig())
    found = _parity(run, 1, pairs, rows)
    assert 0 <= found["parity_mean"] <= found["parity_max"] <= 1e-6
    path = tmp_path / "iter_1/candidates.jsonl"
    candidates = [json.loads(line) for line in path.read_text().splitlines()]
    candidates[3]["logprob"] -= 0.1
    path.write_text("".join(json.dumps(row) + "\n" for row in candidates))
    with pytest.raises(GateError, match=r"log-probs of an answer are 2.5e-02 nats a token from the trainer's"):
        _parity(run, 1, pairs, rows)


@pytest.mark.parametrize("name", ["trl", "messages", "sharegpt", "alpaca", "preference", "open_assistant"])
def test_the_same_instructions_are_the_same_training_rows_in_every_format(name, tmp_path):
    said = [("copy a b c", "a b c"), ("sort c b", "b c")]
    row = {
        "trl": lambda p, r: {
            "prompt": [{"role": "user", "content": p}],
            "completion": [{"role": "assistant", "content": r}],
        },
        "messages": lambda p, r: {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]},
        "sharegpt": lambda p, r: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": r}]},
        "alpaca": lambda p, r: {"instruction": p, "input": "", "output": r},
        "preference": lambda p, r: {"prompt": p, "chosen": r, "rejected": "a"},
        "open_assistant": lambda p, r: {
            "prompt": {"text": p, "replies": [{"text": "a", "rank": 1}, {"text": r, "rank": 0}]}
        },
    }[name]
    file = tmp_path / "ift.jsonl"
    file.write_text("".join(json.dumps(row(*each)) + "\n" for each in said))
    recipe = Recipe.load("tiny", [f"data.ift={file}"])
    tokenizer = Tokenizer(recipe.model)
    rows, counts = _ift_rows(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
    assert counts == {"ift": 2, "ift_cut": 0, "ift_prompt_too_long": 0}
    for made, (prompt, response) in zip(rows, said, strict=True):
        assert made.prompt == tokenizer.chat_prompt(prompt)
        assert made.completion == [*tokenizer.encode(response), tokenizer.eos_id]


@pytest.fixture
def judged_round(tmp_path):
    """A run whose round 1 has two prompts with four judged answers each: `build(*overrides)` makes its pairs."""

    def build(*overrides, agree=True):
        recipe = Recipe.load("tiny", ["gates.min_pairs=1", *overrides])
        files, counts = {}, {}
        names = ("prompts", "candidates", "judgements")
        data = {f"iter_1/{name}.jsonl": [] for name in names}
        for p in ("p", "q"):
            data["iter_1/prompts.jsonl"].append({"id": p, "prompt": "copy a"})
            for i, score in enumerate((5.0, 4.0, 2.0, 1.0)):
                row = {
                    "id": f"{p}-{i}",
                    "prompt_id": p,
                    "prompt": "copy a",
                    "index": i,
                    "text": f"a{i}",
                    "finish_reason": "stop",
                }
                data["iter_1/candidates.jsonl"].append(row | {"token_ids": [9] * (4 - i)})
                for draw in range(3):
                    value = score if agree or draw == 0 else 6 - score
                    data["iter_1/judgements.jsonl"].append(
                        {
                            "id": f"{p}-{i}-{draw}",
                            "candidate_id": f"{p}-{i}",
                            "draw": draw,
                            "score": value,
                            "status": "ok",
                        }
                    )
        directory = SimpleNamespace(write_jsonl=files.__setitem__, file=lambda name: tmp_path / name)
        run = Run(recipe, directory, Tokenizer(recipe.model), NOTHING, NOTHING)
        run.rows = data.__getitem__
        counts = stages.build_pairs(run, 1)
        return counts, files

    return build


def test_every_pair_that_a_prompt_may_have_is_a_row(judged_round):
    counts, files = judged_round("pairs.per_prompt=3")
    assert counts == {"prompts": 2, "pairs": 4, "dropped": {"no_more": 2}}
    assert [row["id"] for row in files["iter_1/pairs.jsonl"]] == ["p", "p+2", "q", "q+2"]
    assert [row["id"] for row in files["iter_1/dropped.jsonl"]] == ["p+3", "q+3"]


def test_length_control_takes_the_rounds_own_rho(judged_round):
    chosen = {}
    for rho in ("null", "[0.3, 0.0]", "[0.0, 0.3]", "0.3"):
        _, files = judged_round(f"pairs.length_control={rho}")
        chosen[rho] = [(row["chosen_index"], row["rejected_index"]) for row in files["iter_1/pairs.jsonl"]]
    assert chosen["null"] == chosen["[0.0, 0.3]"] == [(0, 3)] * 2
    assert chosen["[0.3, 0.0]"] == chosen["0.3"] == [(1, 2)] * 2


def test_consistency_is_measured_or_stops_the_round(judged_round):
    counts, _ = judged_round("pairs.consistency=true")
    assert counts["consistency"] == 1.0
    with pytest.raises(GateError, match=r"no more alike than by chance \(consistency 0.33 of 2 pairs\)"):
        judged_round("pairs.consistency=true", agree=False)


def test_the_rounds_label_smoothing_is_what_consistency_leaves(round_one, monkeypatch):
    run, _, pairs, _ = round_one
    seen = []
    rows = {"iter_1/pairs.jsonl": pairs, "iter_1/candidates.jsonl": run.rows("iter_1/candidates.jsonl")}
    run.rows = rows.__getitem__
    monkeypatch.setattr(run.dir, "counts", lambda stage: {"consistency": 0.9} if stage == "iter_1/pairs" else {})
    monkeypatch.setattr(type(run), "model", lambda self, k: run.recipe.model)
    monkeypatch.setattr(stages, "_train", lambda run, model, rows, config, *rest: seen.append(config) or {"steps": 1})
    stages.train_dpo(run, 1)
    run.recipe = Recipe.load("tiny", ["pairs.consistency=true"])
    stages.train_dpo(run, 1)
    assert [config.label_smoothing for config in seen] == [0.0, pytest.approx(0.1)]
