"""The table of matches, worked out by hand; the oracle grades the answers that stand in the files."""

import json

import pytest

from selfreward.tiny import matches
from selfreward.tiny.oracle import grade


@pytest.fixture
def run(tmp_path):
    """Four prompts `copy a b c`: M2 right and M1 wrong, the other way round, the same text, and one unread score."""
    folder = tmp_path / "evaluation"
    texts = {"M2": ["a b c", "c c", "a b c", "a b c"], "M1": ["c c", "a b c", "a b c", "c c"]}
    texts |= {"M3": texts["M2"], "SFT": texts["M1"]}
    scores = {"M2": [5, 4, 3, 5], "M1": [1, 4, 5, None]}
    scores |= {"M3": scores["M2"], "SFT": scores["M1"]}
    judged = []
    for name in texts:
        rows = [{"id": str(i), "prompt": "copy a b c", "text": text} for i, text in enumerate(texts[name])]
        (folder / name).mkdir(parents=True)
        (folder / name / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged += [{"candidate_id": f"{i}-{name}", "score": score} for i, score in enumerate(scores[name])]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    (folder / "head_to_head.jsonl").write_text("")
    return tmp_path


def test_outcomes_are_the_judges_and_the_truth_of_the_same_answers(run):
    assert grade("copy a b c", "a b c") > grade("copy a b c", "c c")
    assert matches.outcomes(run, "M2", "M1") == [(1, 1), (0, -1), (0, 0)]
    assert matches.outcomes(run, "M3", "M2") == [(0, 0)] * 4  # equal texts tie whatever the scores


def test_a_row_of_the_table(run):
    first, second, third = matches.table_rows([run, run])
    assert first == ["M2 against M1", "+0.33 +- 0.00", "+0.00 +- 0.00", "0 of 2", "100.0%", "50.0%"]
    assert second == ["M3 against M2", "+0.00 +- 0.00", "+0.00 +- 0.00", "2 of 2", "", ""]
    assert third[0] == "M3 against SFT" and len(third) == len(matches.HEADING)
