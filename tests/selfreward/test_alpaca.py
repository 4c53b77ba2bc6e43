"""AlpacaEval's annotations: every kind of preference worked out by hand, every damage one sentence."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from engine import InputError
from selfreward import alpaca
from selfreward.alpaca import length_controlled, model_outputs, read_annotations, win_rate
from selfreward.run import main


def row(preference: Any, **changed: Any) -> dict[str, Any]:
    texts = {
        "instruction": "Say hi.",
        "generator_1": "base",
        "output_1": "hi",
        "generator_2": "ours",
        "output_2": "hello",
    }
    return texts | {"annotator": "judge", "preference": preference} | changed


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


EVERY_KIND = [row(1), row(2, output_2="hello there"), row(1.37), row(0), row(None, output_2="")]


def test_every_kind_of_preference_counts_as_alpaca_eval_counts_it() -> None:
    found = win_rate(EVERY_KIND)
    values = [0, 1, 0.37, 0.5]  # 0 is a tie, null is left out
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert found["win_rate"] == pytest.approx(100 * mean) and found["standard_error"] == pytest.approx(100 * error)
    counts = ("n", "n_wins", "n_wins_base", "n_draws", "n_null")
    assert [found[key] for key in counts] == [4, 1, 2, 1, 1]
    assert found["discrete_win_rate"] == 100 * 1.5 / 4
    assert (found["mean_length"], found["mean_length_base"]) == ((5 + 11 + 5 + 5 + 0) / 5, 2)


def test_the_command_prints_one_json_object_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "annotations.json", EVERY_KIND)
    assert main(["eval", "--annotations", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 4 and found["win_rate"] == pytest.approx(46.75) and found["generator"] == "ours"
    assert main(["eval", "--annotations", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "46.75" in shown and "ours" in shown and "base" in shown


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(1), {"instruction": "x"}], "annotations.json:2: 'generator_1' is missing"),
        ([row(1, output_2=True)], "annotations.json:1: 'output_2' is the boolean true; expected a string"),
        ([row(1), row(1, generator_2="other")], "annotations.json:2: 'generator_2' is 'other'"),
        ([row(1), row(1, generator_2=None)], "annotations.json:2: 'generator_2' is missing or null"),
        ([row(1), row(1, annotator="other")], "annotations.json:2: 'annotator' is 'other'"),
        ([row(True)], "annotations.json:1: 'preference' is the boolean true"),
        ([row("2")], "annotations.json:1: 'preference' is a string"),
        ([row(3)], "annotations.json:1: 'preference' is 3; expected"),
        ([{key: value for key, value in row(1).items() if key != "preference"}], ":1: 'preference' is missing"),
        ([row(None)], "none of the 1 annotations has a preference"),
        ([], "holds no annotations"),
        (["text"], "annotations.json:1: the row is a string"),
    ],
)
def test_damage_is_one_sentence_and_exit_code_2(
    rows: list[Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "annotations.json", rows)
    assert main(["eval", "--annotations", str(path)]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1


def test_a_file_that_is_not_there_or_no_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('[{"a": 1')
    for name, said in (("nowhere.json", "nowhere.json"), ("torn.json", "not JSON")):
        with pytest.raises(InputError, match=said):
            read_annotations(tmp_path / name)


def test_the_length_controlled_figure_is_theirs_and_never_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("alpaca_eval.metrics")
    monkeypatch.setitem(sys.modules, "alpaca_eval", types.ModuleType("alpaca_eval"))
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", theirs)
    monkeypatch.setattr(alpaca, "ALPACA_EVAL", alpaca.instructions_hash(EVERY_KIND))
    assert "pip install" in str(length_controlled(EVERY_KIND)[1])  # it has no such function
    theirs.get_length_controlled_winrate = lambda rows, save_weights_dir: {  # type: ignore[attr-defined]
        "length_controlled_winrate": 40 + len(rows),
        "lc_standard_error": 1.5,
    }
    assert length_controlled(EVERY_KIND) == ({"length_controlled_winrate": 45.0, "lc_standard_error": 1.5}, None)

    def fails(rows: Any, save_weights_dir: Any) -> Any:
        raise ValueError("no difficulty\nfor these")

    theirs.get_length_controlled_winrate = fails  # type: ignore[attr-defined]
    found, said = length_controlled(EVERY_KIND)
    assert found["length_controlled_winrate"] is None and "no difficulty)" in str(said)


def test_no_length_controlled_figure_is_asked_for_other_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpaca_eval looks a difficulty up by the row's number, whatever stands in the row."""
    theirs: Any = types.ModuleType("alpaca_eval.metrics")
    theirs.get_length_controlled_winrate = lambda *a, **k: pytest.fail("asked")
    monkeypatch.setitem(sys.modules, "alpaca_eval", types.ModuleType("alpaca_eval"))
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", theirs)
    found, said = length_controlled(EVERY_KIND)
    assert set(found.values()) == {None} and "AlpacaEval's 805 instructions in its order" in str(said)
    two = [row(1, instruction="a"), row(2, instruction="b")]
    assert alpaca.instructions_hash(two) != alpaca.instructions_hash(two[::-1])


def test_outputs_have_the_four_columns_that_alpaca_eval_reads() -> None:
    found = model_outputs(
        "M1", [{"prompt": "Say hi.", "text": "hi", "token_ids": [5]}, {"prompt": "p", "text": ""}], "set"
    )
    assert found[0] == {"dataset": "set", "instruction": "Say hi.", "output": "hi", "generator": "M1"}
    assert [row["output"] for row in found] == ["hi", ""]
