"""What the training stages do with odd rows, the step-0 and parity gates; the loop as a whole is in test_run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from engine import DPOConfig, DPORow, InputError, Tokenizer, load_checkpoint, reference_logprobs
from selfreward import training
from selfreward.context import GateError, Run
from selfreward.recipe import Recipe
from selfreward.training import _apart, _check_step_zero, _parity, _with_reference, ift_examples

NOTHING: Any = None  # the parts of a run that these stages do not touch


def test_instruction_rows_are_cut_and_prompts_that_leave_no_room_are_counted(tmp_path):
    file = tmp_path / "ift.jsonl"
    given = [("copy a b c", "a b c"), ("copy a b c d e f g", "a"), ("copy a b c", "a b c d e f g a b c")]
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in given))
    recipe = Recipe.load("tiny", [f"data.ift={file}", "data.max_tokens=11"])
    tokenizer = Tokenizer(recipe.model)
    rows, counts = ift_examples(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
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
            {"id": f"p{number}", "prompt_id": f"p{number}", "prompt": [{"content": prompt}],
             "chosen_index": 1, "rejected_index": 0, "chosen_token_ids": answers[0], "rejected_token_ids": answers[1]}
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
    monkeypatch.setattr(training, "reference_logprobs", NOTHING)  # not asked for a second time
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
    assert _parity(run, 1, pairs, rows, rough=True)["parity_max"] == 2.5e-2
    candidates[3]["logprob"] -= 0.4
    path.write_text("".join(json.dumps(row) + "\n" for row in candidates))
    with pytest.raises(GateError, match=r"1.2e-01 nats a token from the trainer's, allowed are 1e-01"):
        _parity(run, 1, pairs, rows, rough=True)


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
    rows, counts = ift_examples(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
    assert counts == {"ift": 2, "ift_cut": 0, "ift_prompt_too_long": 0}
    for made, (prompt, response) in zip(rows, said, strict=True):
        assert made.prompt == tokenizer.chat_prompt(prompt)
        assert made.completion == [*tokenizer.encode(response), tokenizer.eos_id]


def test_the_rounds_label_smoothing_is_what_consistency_leaves(round_one, monkeypatch):
    run, _, pairs, _ = round_one
    seen = []
    rows = {"iter_1/pairs.jsonl": pairs, "iter_1/candidates.jsonl": run.rows("iter_1/candidates.jsonl")}
    run.rows = rows.__getitem__
    monkeypatch.setattr(run.dir, "counts", lambda stage: {"consistency": 0.9} if stage == "iter_1/pairs" else {})
    monkeypatch.setattr(type(run), "model", lambda self, k: run.recipe.model)
    monkeypatch.setattr(training, "_train", lambda run, model, rows, config, *rest: seen.append(config) or {"steps": 1})
    training.train_dpo(run, 1)
    run.recipe = Recipe.load("tiny", ["pairs.consistency=true"])
    training.train_dpo(run, 1)
    assert [config.label_smoothing for config in seen] == [0.0, pytest.approx(0.1)]


def keeping(*options, tmp_path, decode=str):
    recipe = Recipe.load("tiny", options)
    directory: Any = SimpleNamespace(file=lambda name: tmp_path / name)
    return Run(recipe, directory, SimpleNamespace(decode=decode), NOTHING, NOTHING)


def test_whole_prompts_are_held_out_the_same_ones_in_any_company(tmp_path):
    run = keeping("keep_best={share: 0.25, every: 7, patience: 2}", tmp_path=tmp_path)
    rows = [DPORow([1, n], [5, answer], [6]) for answer in (8, 9) for n in range(3, 43)]
    kept, held = _apart(run, rows)
    assert held is not None and (held.every, held.keep_best, held.patience, held.by) == (7, True, 2, "loss")
    assert len(held.rows) == 20 and sorted(map(repr, [*kept, *held.rows])) == sorted(map(repr, rows))
    out = {tuple(row.prompt) for row in held.rows}
    assert len(out) == 10 and not out & {tuple(row.prompt) for row in kept}
    _, again = _apart(run, rows[::-1])
    assert again is not None and {tuple(row.prompt) for row in again.rows} == out
    assert _apart(keeping("keep_best.share=0", tmp_path=tmp_path), rows) == (rows, None)
    with pytest.raises(GateError, match="one prompt only"):
        _apart(run, rows[:1])


def test_prompts_that_are_one_to_a_reader_are_held_out_together(tmp_path):
    def decode(ids):
        return f"[INST] {('Name tree', 'name  Tree')[ids[1] % 2]} {ids[1] // 2} [/INST]"

    run = keeping("keep_best.share=0.25", tmp_path=tmp_path, decode=decode)
    rows = [DPORow([1, n], [5], [6]) for n in range(2, 42)]
    kept, held = _apart(run, rows)
    assert held is not None and len(held.rows) == 10 and len(kept) == 30
    assert not {row.prompt[1] // 2 for row in held.rows} & {row.prompt[1] // 2 for row in kept}
    with pytest.raises(GateError, match="one prompt only"):
        _apart(run, rows[:2])
