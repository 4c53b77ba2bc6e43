"""What AlpacaEval's and FastChat's own code makes of the files that ours writes, and of the same annotations.

Their packages are installed beside this environment without what they need to call a judge (make test-full does it); what is
missing for that is replaced by mocks, nothing of which the readers use.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfreward import alpaca, mt_bench

pytestmark = pytest.mark.full

READ = """
import importlib, json, sys
from unittest.mock import MagicMock

def theirs(name):
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] in ("alpaca_eval", "fastchat", "pandas", "numpy", "scipy", "datasets"):
                raise
            sys.modules[error.name] = MagicMock(__path__=[])
            for begun in [each for each in sys.modules if each.split(".")[0] in ("alpaca_eval", "fastchat")]:
                del sys.modules[begun]

get_winrate = theirs("alpaca_eval.metrics.winrate").get_winrate
common, utils = theirs("fastchat.llm_judge.common"), theirs("alpaca_eval.utils")

outputs, annotations, questions, answers = sys.argv[1:]
table = utils.load_or_convert_to_dataframe(outputs)
found = {"generator": utils.get_generator_name(None, table), "rows": table.to_dict("records")}
found["winrate"] = [get_winrate(part) for part in json.load(open(annotations))]
asked, given = common.load_questions(questions, None, None), common.load_model_answers(answers)
common.check_data(asked, given, {}, list(given), {})
found["turns"] = {m: [rows[q["question_id"]]["choices"][0]["turns"] for q in asked] for m, rows in given.items()}
found["models"] = common.get_model_list(answers)
found["temperatures"] = common.temperature_config
print(json.dumps(found, default=float))
"""


def theirs(outputs: Path, annotations: Path, questions: Path, answers: Path) -> Any:
    packages = os.environ.get("SELFREWARD_READERS")
    if not packages:
        pytest.skip("SELFREWARD_READERS is not set; make test-full installs alpaca_eval and fschat there")
    command = [sys.executable, "-c", READ, *map(str, (outputs, annotations, questions, answers))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": packages})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_they_read_what_we_write_and_find_the_same_win_rates(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"Say {i}.", "text": f"{i}, \u00e9 and a \u201cquote\u201d"} for i in range(5)]
    outputs = tmp_path / "model_outputs.json"
    outputs.write_text(json.dumps(alpaca.model_outputs("M3", rows, "mine")))

    def annotated(values: list[float | None]) -> list[dict[str, Any]]:
        rows = [{"instruction": f"Say {i}.", "preference": value} for i, value in enumerate(values)]
        both = {"output_1": "a", "output_2": "bb", "generator_1": "base", "generator_2": "M3", "annotator": "x"}
        return [row | both for row in rows]

    kinds: list[float | None] = [1, 2, 1.37, 1.5, 0, None]
    parts = [annotated([*kinds, *(rng.choice([*kinds, 1 + rng.random()]) for _ in range(30))]) for _ in range(20)]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(parts))

    questions, folder = tmp_path / "question.jsonl", tmp_path / "model_answer"
    asked = [{"question_id": 81 + i, "category": "writing", "turns": ["a?", "b?"]} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    folder.mkdir()
    turns = [[f"first {i}", f"second {i}\nline"] for i in range(3)]
    answered = [{"question_id": row["question_id"], "turns": each} for row, each in zip(asked, turns, strict=True)]
    written = mt_bench.model_answers("M3", answered[::-1])
    (folder / "M3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))

    found = theirs(outputs, annotations, questions, folder)
    assert found["generator"] == "M3" and found["models"] == ["M3"] and found["turns"] == {"M3": turns}
    assert found["temperatures"] == mt_bench.TEMPERATURES
    read = [(row["instruction"], row["output"], row["dataset"]) for row in found["rows"]]
    assert read == [(row["prompt"], row["text"], "mine") for row in rows]
    for part, other in zip(parts, found["winrate"], strict=True):
        (tmp_path / "part.json").write_text(json.dumps(part))
        ours = alpaca.win_rate(alpaca.read_annotations(tmp_path / "part.json"))
        for name in ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "discrete_win_rate"):
            assert ours[name] == pytest.approx(other[name], abs=1e-9), name
        assert ours["n"] == other["n_total"]
