"""The tables of docs/performance.md are those of the records."""

import json
from pathlib import Path

import pytest

from benchmarks import summary


@pytest.mark.parametrize(
    "directory,document", [(summary.RESULTS, "performance.md"), (summary.RESULTS.parent / "h200", "kernels.md")]
)
def test_the_document_has_the_tables_that_the_command_prints(directory, document, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", str(directory)])
    assert summary.main() == 0
    document = (Path(__file__).parents[2] / "docs" / document).read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in document


def test_a_ratio_stands_beside_peers_only_and_nothing_where_nothing_was_measured(tmp_path, capsys, monkeypatch):
    rows = [
        {"engine": engine, "format": "float32", "class": "float32", "tokens_per_second": speed, "our_speed": 300 / speed,
         "share_of_flops": 0.5}
        for engine, speed in (("selfreward", 300.0), ("vllm", 200.0))
    ]  # fmt: skip
    record = {"limits": {"gflops": 1.0, "gbps": 2.0}, "rows": rows}
    (tmp_path / "peers-judging-1.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    assert summary.main() == 0
    out = capsys.readouterr().out
    assert "| selfreward | float32 |  | **300** |" in out and "| vllm | float32 |  | 200 (1.50x) |" in out
    assert "| judging | 1 | 1 | 2.0 | 50% of FLOP/s |" in out


def test_a_directory_with_training_records_alone_has_their_table(tmp_path, capsys, monkeypatch):
    (tmp_path / "train-2.json").write_bytes((summary.RESULTS / "train-2.json").read_bytes())
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    assert summary.main() == 0
    assert "| work | way | ms |" in capsys.readouterr().out


def test_what_failed_or_was_not_begun_is_a_line_with_the_reason():
    row = {"kernel": "rope", "shape": "3 x 2", "ms": 1.5, "share_of_floor": 0.5, "extra_memory": 2e6}
    limits = {"kernel": "limits", "part": "kernels", "device": "a GPU", "gbps": 1.0, "tflops": 2.0, "versions": {}}
    rows = [
        limits,
        {"kernel": "tree", "failed": "ValueError: odd"},
        row,
        {"kernel": "adamw", "skipped": "7 minutes are over"},
    ]
    assert list(summary.gpu(rows))[-3:] == [
        "| tree | ValueError: odd | | | | |",
        "| rope | 3 x 2 | 1.500 | 50% |  | 2 |",
        "| adamw | 7 minutes are over | | | | |",
    ]


def test_a_directory_without_records_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"no peers-WORKLOAD-THREADS\.json, no train-2\.json or logprob-2\.json and no P"
    ):
        summary.main()
