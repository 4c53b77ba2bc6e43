"""A model that compares two answers is asked in both orders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import LlamaConfig, Tokenizer, save_checkpoint
from selfreward import pairwise
from selfreward.pairwise import majority
from selfreward.recipe import PACKAGE, Recipe
from selfreward.run import main
from selfreward.verdict import PairwiseTemplate
from tests.selfreward import hand_built

M0 = PACKAGE / "tiny/m0"

TINY = (
    "{% block rubric %}judge :{% endblock %}{% block prompt %} {{ prompt }} |{% endblock %}"
    "{% block first %} {{ first }} |{% endblock %}{% block second %} {{ second }}{% endblock %}{% block cue %} =>{% endblock %}"
)


Judge = Callable[[str, str], list[str]]  # (first, second) -> what it writes in each draw


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Outcomes of by_pairs with a judge that is a function of the two answers that stand in its prompt."""

    def run_with(answers: dict[str, list[dict[str, Any]]], judge: Judge) -> Any:
        tokenizer, file = Tokenizer(M0), tmp_path / "pairwise.jinja"
        file.write_text(TINY)
        tokens: list[list[int]] = []

        def sample(run: Any, name: str, model: Any, groups: Any) -> list[dict[str, Any]]:
            rows = []
            for one in (one for group in groups for one in group):
                tokens.append(one.ids)
                asked = tokenizer.decode(one.ids).removeprefix("judge :").removesuffix("=>").split("|")
                texts = judge(*(text.strip() for text in asked[1:]))
                outputs = [
                    SimpleNamespace(index=i, text=text, finish_reason="stop", token_ids=[])
                    for i, text in enumerate(texts)
                ]
                rows += one.rows(SimpleNamespace(outputs=outputs))
            return rows

        monkeypatch.setattr(pairwise, "sample_groups", sample)
        recipe = Recipe.load("tiny", [])
        run: Any = SimpleNamespace(recipe=recipe, tokenizer_of=lambda path: tokenizer)
        run_with.tokens = tokens  # type: ignore[attr-defined]
        return pairwise.by_pairs(run, M0, PairwiseTemplate(file), answers)

    return run_with


def rows(*texts: str) -> list[dict[str, Any]]:
    return [{"id": str(i), "prompt": "copy a", "text": text} for i, text in enumerate(texts)]


def test_a_judge_that_prefers_a_place_decides_nothing(compared: Any) -> None:
    answers = {"A": rows("a", "a b"), "B": rows("b", "a")}
    assert compared(answers, lambda first, second: ["Verdict: A"] * 3) == {("B", "A"): [0, 0]}
    assert compared(answers, lambda first, second: ["Verdict: B"] * 3) == {("B", "A"): [0, 0]}


def test_the_outcome_is_that_of_the_model_named_first_and_equal_texts_are_not_asked(compared: Any) -> None:
    longer = lambda first, second: [f"Verdict: {'A' if len(first) > len(second) else 'B'}"] * 3
    answers = {"SFT": rows("a", "a b c", "c"), "M1": rows("a b", "a b", "c"), "M2": rows("a b c", "a", "d e")}
    assert compared(answers, longer) == {
        ("M1", "SFT"): [1, -1, 0],
        ("M2", "M1"): [1, -1, 1],
        ("M2", "SFT"): [1, -1, 1],
    }
    assert len(compared.tokens) == 2 * (2 + 3 + 3)


def test_most_of_the_readable_draws_decide() -> None:
    drawn = lambda *winners: [{"winner": winner} for winner in winners]
    assert majority(drawn("first", "second", "first")) == "first"
    assert majority(drawn("first", "second", None)) == "tie"
    assert majority(drawn(None, "second", None)) == "second"
    assert majority(drawn(None, None)) is None and majority([]) is None
    assert majority(drawn("tie", "tie", "first")) == "tie"


def test_an_order_that_cannot_be_read_leaves_the_prompt_out(compared: Any) -> None:
    half = lambda first, second: ["no idea"] * 3 if first == "a" else ["Verdict: A"] * 3
    assert compared({"A": rows("a"), "B": rows("b")}, half) == {("B", "A"): [None]}


def test_a_model_compares_in_both_orders_and_goes_on_where_it_was(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model built to say "Verdict: A" or "Verdict: B", each as likely, as the judge of two others."""
    tokenizer = Tokenizer(test_data / "llama2/tokenizer.model")
    *before, first = tokenizer.encode("Verdict: A")
    words = {"judge": [*([token] for token in before), [first, tokenizer.encode("Verdict: B")[-1]], [tokenizer.eos_id]]}
    *said, digits, end = hand_built.chain(tokenizer)
    words |= {"one": [*said, digits[:3], end], "two": [*said, digits[3:], end]}
    config = LlamaConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=96, vocab_size=32000, max_seq_len=1024
    )
    for seed, (name, chain) in enumerate(words.items()):
        monkeypatch.setattr(hand_built, "chain", lambda tokenizer, chain=chain: chain)
        save_checkpoint(hand_built.hand_built(config, tokenizer, seed), tmp_path / name, tokenizer)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(40)))
    command = [
        "eval",
        "--compare",
        str(prompts),
        "--recipe",
        "llama2-7b",
        "--out",
        str(out),
        "--json",
        "--pairwise",
        "llama2",
    ]
    command += [
        "--model",
        f"one={tmp_path / 'one'}",
        "--model",
        f"two={tmp_path / 'two'}",
        f"judge_model={tmp_path / 'judge'}",
    ]
    command += ["judge.draws=1", "device=cpu", "sampler.kv_cache_gb=0.2"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    (match,) = found["matches"]
    assert (match["n"], match["unread"]) == (40, 0)
    (file,) = (out / "eval/answers-p/compare").glob("pairwise-llama2-by-judge-*/one,two/comparisons.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"} and {row["winner"] for row in rows} == {"first", "second"}
    assert len({row["comparison_id"] for row in rows}) == len(rows) == 80
    assert match["win"] > 0 and match["tie"] > 0 and match["loss"] > 0  # of coins: 1/4, 1/2, 1/4
    assert found["judging"]["prefix_tokens_saved"] > 60 * len(rows)  # the rubric fills the first block of 64 tokens
    assert main([*command, "--quiet"]) == 0 and json.loads(capsys.readouterr().out)["matches"] == [match]


def test_where_it_has_no_effect_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--ask", "x"], ["--compare", "x", "--judge-command", "x"]):
        assert main(["eval", *more, "--pairwise", "llama2"]) == 2
        assert "--pairwise is how the judge model of --compare is asked" in capsys.readouterr().err
