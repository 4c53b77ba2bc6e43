"""A run's directory: whole files, one writer, resumed only by the same run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InputError
from selfreward.formats import read_jsonl
from selfreward.state import RunDir, row_seed

MANIFEST: dict[str, Any] = {"recipe": {"seed": 0, "sft": {"lr": 6e-5, "betas": (0.9, 0.95)}}, "torch": "2.13.0"}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_new_directory_gets_its_manifest(tmp_path: Path) -> None:
    with RunDir(tmp_path / "deep" / "run", MANIFEST) as run:
        assert not run.resumed and not run.done("sft")
    assert json.loads((tmp_path / "deep/run/manifest.json").read_text()) == json.loads(json.dumps(MANIFEST))


def test_a_run_with_the_same_manifest_is_resumed_at_its_stages(tmp_path: Path) -> None:
    with RunDir(tmp_path, MANIFEST) as run:
        run.write_jsonl("iter_1/pairs.jsonl", [{"id": "a"}, {"id": "b\u2028"}])
        run.mark_done("iter_1/pairs", {"in": 3, "pairs": 2, "tie": 1})
    before = files(tmp_path)
    with RunDir(tmp_path, MANIFEST) as run:
        assert run.resumed and run.done("iter_1/pairs") and not run.done("iter_1/dpo")
        assert run.counts("iter_1/pairs") == {"in": 3, "pairs": 2, "tie": 1}
        assert read_jsonl(run.file("iter_1/pairs.jsonl")) == [{"id": "a"}, {"id": "b\u2028"}]
    assert files(tmp_path) == before


def test_a_run_with_another_manifest_is_refused_with_every_difference(tmp_path: Path) -> None:
    RunDir(tmp_path, MANIFEST).close()
    before = files(tmp_path)
    other = {"recipe": {"seed": 1, "sft": {"lr": 6e-5, "betas": (0.9, 0.99)}, "threads": 2}}
    with pytest.raises(InputError) as caught:
        RunDir(tmp_path, other)
    for difference in (
        "recipe.seed is 0 there, 1 here",
        "recipe.sft.betas is [0.9, 0.95] there, [0.9, 0.99] here",
        "recipe.threads is only here (2)",
        'torch is only there ("2.13.0")',
    ):
        assert difference in str(caught.value)
    assert "recipe.sft.lr" not in str(caught.value)
    assert files(tmp_path) == before


def test_what_a_manifest_is_compared_by_may_be_less_than_what_it_says(tmp_path: Path) -> None:
    def compared(manifest: Any) -> Any:
        return {**manifest, "place": None}

    RunDir(tmp_path, {"place": "a", "hash": 1}).close()
    RunDir(tmp_path, {"place": "b", "hash": 1}, compared).close()
    with pytest.raises(InputError, match=r"undo: hash is 1 there, 2 here$"):
        RunDir(tmp_path, {"place": "b", "hash": 2}, compared)


def test_true_is_not_one_in_a_manifest(tmp_path: Path) -> None:
    RunDir(tmp_path, {"required": True}).close()
    with pytest.raises(InputError, match=r"required is true there, 1 here"):
        RunDir(tmp_path, {"required": 1})


def test_a_long_list_of_differences_is_counted(tmp_path: Path) -> None:
    RunDir(tmp_path, {f"k{i}": 0 for i in range(30)}).close()
    with pytest.raises(InputError, match=r"k19 is 0 there, 1 here; and 10 more$"):
        RunDir(tmp_path, {f"k{i}": 1 for i in range(30)})


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"is not empty \(thesis.tex\) and has no manifest.json"):
        RunDir(tmp_path, MANIFEST)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match=r"run is a file; expected a new or empty directory"):
        RunDir(tmp_path / "run", MANIFEST)
    with pytest.raises(InputError, match=r"cannot be written: Not a directory"):
        RunDir(tmp_path / "run" / "below", MANIFEST)


@pytest.mark.parametrize("content", [b"", b'{"recipe": {"se', b"[]", b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", ["manifest.json", "stages.json"])
def test_a_torn_manifest_or_stage_list_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    RunDir(tmp_path, MANIFEST).close()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} .*restore it, or start again in a new directory"):
        RunDir(tmp_path, MANIFEST)
    assert (tmp_path / name).read_bytes() == content


def test_a_stage_without_counts_is_named(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", {}) as run:
        run.mark_done("sft/model", {"rows": 1})
    (tmp_path / "run/stages.json").write_text('{"sft/model": 3}')
    with pytest.raises(InputError, match=r"stages.json: 'sft/model' is no object of counts; restore it"):
        RunDir(tmp_path / "run", {})


def test_a_kill_before_the_manifest_leaves_a_directory_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.tmp").write_text('{"rec')
    with RunDir(tmp_path, MANIFEST) as run:
        assert not run.resumed
    assert sorted(files(tmp_path)) == ["manifest.json"]


def test_left_over_temporary_files_of_a_kill_are_removed(tmp_path: Path) -> None:
    with RunDir(tmp_path, MANIFEST) as run:
        run.write_jsonl("iter_1/pairs.jsonl", [])
    (tmp_path / "iter_1" / ".pairs.jsonl.tmp").write_text("{")
    RunDir(tmp_path, MANIFEST).close()
    assert sorted(files(tmp_path)) == ["iter_1/pairs.jsonl", "manifest.json"]


def test_a_directory_in_use_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    first = RunDir(tmp_path, MANIFEST)
    with pytest.raises(InputError, match=r"is in use by another run"):
        RunDir(tmp_path, MANIFEST)
    first.close()
    RunDir(tmp_path, MANIFEST).close()


HOLDER = """
import sys, time
from selfreward.state import RunDir
run = RunDir(sys.argv[1], {"a": 1})
print("open", flush=True)
for i in range(10**6):
    run.write_jsonl("rows.jsonl", [{"i": i}] * 200)
"""


def test_a_killed_process_frees_the_directory_and_leaves_whole_files(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=r"in use by another run"):
            RunDir(tmp_path, {"a": 1})
        deadline = time.monotonic() + 30
        while not (tmp_path / "rows.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunDir(tmp_path, {"a": 1}) as run:
        assert run.resumed
        rows = read_jsonl(run.file("rows.jsonl"))
    assert len(rows) == 200 and len({row["i"] for row in rows}) == 1
    assert sorted(files(tmp_path)) == ["manifest.json", "rows.jsonl"]


def test_rows_that_fail_half_way_leave_the_old_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"score": 1.0}
        yield {"score": float("nan")}

    with RunDir(tmp_path, MANIFEST) as run:
        run.write_jsonl("rows.jsonl", [{"old": 1}])
        with pytest.raises(ValueError, match=r"JSON"):
            run.write_jsonl("rows.jsonl", rows())
    assert sorted(files(tmp_path)) == ["manifest.json", "rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == '{"old": 1}\n'


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDir(tmp_path, MANIFEST) as run:
        run.write_json("report.json", {"old": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"report.json cannot be written: No space left on device; make room"):
            run.write_json("report.json", {"new": 1})
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}
    assert sorted(files(tmp_path)) == ["manifest.json", "report.json"]


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, rename = os.fsync, os.replace
    with RunDir(tmp_path, MANIFEST) as run:
        monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
        monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
        run.write_json("x.json", {})
    assert calls == ["fsync", "rename", "fsync"]  # the file, its name, the directory


def test_timing_is_appended_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    with RunDir(tmp_path, MANIFEST) as run:
        run.append_timing({"stage": "sft", "seconds": 1.5})
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"stage": "e')
    with RunDir(tmp_path, MANIFEST) as run:
        run.append_timing({"stage": "eft", "seconds": 2.5})
    assert read_jsonl(tmp_path / "timing.jsonl") == [
        {"stage": "sft", "seconds": 1.5},
        {"stage": "eft", "seconds": 2.5},
    ]


def test_row_seed_has_these_values() -> None:
    """Fixed for ever: a run resumed by a later version must draw the same tokens."""
    assert row_seed(0, 1, "candidates", "p-7") == 5738953399239707189
    assert row_seed(2**63 - 1, 3, "judge", 12) == 4295881153315050112


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.text(max_size=3), st.text(max_size=3) | st.integers()))
)
def test_row_seeds_differ_wherever_any_of_the_four_does(keys: list[tuple[int, int, str, str | int]]) -> None:
    seeds = {key: row_seed(*key) for key in keys}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds.values())


def test_what_a_run_inside_is_writing_stays(tmp_path: Path) -> None:
    """`eval` writes below a run's directory, also while that run is resumed."""
    RunDir(tmp_path, MANIFEST).close()
    with RunDir(tmp_path / "eval/ask-p", MANIFEST) as inside:
        writing, torn = inside.file("answers/.A.json.tmp"), tmp_path / "iter_1/.pairs.jsonl.tmp"
        for file in (writing, torn):
            file.parent.mkdir(parents=True)
            file.write_text("half")
        RunDir(tmp_path, MANIFEST).close()
        assert writing.exists() and not torn.exists()
    RunDir(tmp_path / "eval/ask-p", MANIFEST).close()
    assert not writing.exists()
