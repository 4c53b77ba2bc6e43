"""The load of `python -m benchmarks prompts`; that it is filtered exactly is in tests/selfreward/test_filters.py."""

import re

import pytest

from benchmarks import prompts


def test_every_new_text_is_counted_once(capsys):
    assert prompts.main(["--new", "60", "--pool", "30"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("60 new texts of ") and " against 30 and those kept before them: " in line
    assert sum(map(int, re.findall(r"[a-z_]+ (\d+)", line.split("; ")[-1]))) == 60


def test_a_share_of_the_texts_is_near_an_earlier_one():
    assert prompts.texts(50, seed=3) == prompts.texts(50, seed=3) != prompts.texts(50, seed=4)
    assert all(4 <= len(text.split()) <= 150 for text in prompts.texts(200, seed=0))


def test_a_load_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        prompts.main(["--new", "0"])
    assert "--new 0: expected at least 1" in capsys.readouterr().err
