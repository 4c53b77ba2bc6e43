"""The benchmark of LoRA's steps runs, and keeps what it prints."""

import json

import pytest

from benchmarks.lora import main


def test_every_step_has_a_row(tmp_path, capsys):
    assert main(["--smoke", "--json", str(tmp_path / "lora.json")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == json.loads((tmp_path / "lora.json").read_text())["rows"]
    found = [(row["what"], row.get("activation_checkpointing")) for row in rows]
    assert found == [("reference", None), ("SFT", "none"), ("DPO", "none"), ("SFT", "full"), ("DPO", "full")]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "torch finds no GPU here" in capsys.readouterr().err
