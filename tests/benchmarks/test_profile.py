"""`python -m benchmarks.profile`: every part of a run is named, and they add up to it."""

import pytest

from benchmarks import profile
from engine import ops
from tests.engine.helpers import random_llama, small_config

MODEL = random_llama(small_config(vocab_size=32000, max_seq_len=1024, dim=32, ffn_dim=64))


def test_the_parts_are_named_and_add_up(monkeypatch, capsys):
    for name in profile.TIMED:
        monkeypatch.setattr(ops, name, getattr(ops, name))  # to have them back
    monkeypatch.setattr(profile, "random_model", lambda name: MODEL)
    monkeypatch.setattr("sys.argv", ["profile", "single", "1"])
    assert profile.main() == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[4:]]
    assert {name.strip() for name, _, _ in rows} == {*profile.TIMED, "everything else"}
    assert sum(float(share.strip(" %")) for _, _, share in rows) == pytest.approx(100, abs=1)


def test_a_training_steps_operations_add_up(monkeypatch, capsys):
    monkeypatch.setattr(profile, "random_model", lambda name: MODEL)
    monkeypatch.setattr("sys.argv", ["profile", "train", "1"])
    assert profile.main() == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[4:]]
    assert {"_TreeAttention", "head and loss in one pass", "everything else"} <= {name.strip() for name, _, _ in rows}
    assert sum(float(share.strip(" %")) for _, _, share in rows) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("words", [[], ["sampling", "two"], ["nothing"]])
def test_other_words_are_told_the_usage(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["profile", *words])
    with pytest.raises(SystemExit, match=r"usage: python -m benchmarks\.profile"):
        profile.main()
