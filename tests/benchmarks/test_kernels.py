"""`python -m benchmarks kernels` and `quantization`, at toy size: every case runs, and what is below its bar is named."""

import json

import pytest

from benchmarks import kernels, quantization


@pytest.fixture
def toy(monkeypatch):
    for name, value in {
        "COLD": 1 << 20,
        "SHAPES": ((64, 70),),
        "ROWS": (1, 64),
        "HEADS": ((2, 8),),
        "SECONDS": 0.0,
    }.items():
        monkeypatch.setattr(kernels, name, value)


def test_every_kernel_has_rows_with_its_limit_and_its_competitor(toy, tmp_path, capsys):
    assert kernels.main(["--threads", "1", "--json", str(tmp_path / "rows.json")]) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["command"] == "python -m benchmarks kernels --threads 1"
    rows = result["rows"]
    found = {row["kernel"] for row in rows}
    linears = {"linear fp32", "linear bf16", "linear widened", "linear int8"}
    assert found >= linears | {"attention fp32", "rms_norm", "add_rms_norm", "swiglu", "rope_write", "sample"}
    assert all(row["microseconds"] > 0 and row["share"] > 0 and row["times_as_fast_as"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)  # printed as they come


def test_a_bar_that_is_missed_is_named():
    case = kernels.Case(
        "1",
        1,
        {"own": lambda turn: None, "other": lambda turn: None},
        [kernels.Row("k", "own", "fma", 0.0, ["other"], {"share": 0.5})],
    )
    (row,) = kernels._run(case, kernels.Probes(1))
    assert row["missed"] == ["share 0.00 < 0.50"] and "share 0.00 < 0.50" in kernels.line(row)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["linears"])
    assert "linears: expected some of linear, attention, rows, sample" in capsys.readouterr().err


def test_quantization_prints_what_int8_costs(capsys):
    assert quantization.main(["--texts", "2", "--tokens", "8"]) == 0
    assert "int8 beside fp32, selfreward/tiny/m0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads 0: expected 1 to"),
        (["--threads", "-1"], "--threads -1: expected 1 to"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: expected a file in a directory that exists"),
    ],
)
def test_options_are_checked_before_anything_is_measured(words, message, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda *given: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        kernels.main(words)
    assert message in capsys.readouterr().err
