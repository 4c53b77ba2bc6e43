"""Nothing is lost: runs of `micro` that are killed, stopped or starved of disk end with the bytes of an unbroken run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

BLOCK_SIZES = (64, 8)
EXCEPTED = {"timing.jsonl", "report.html", ".lock"}  # the only places of times, and the lock


def command(out, block_size, *more):
    """`micro` in one thread: a start costs three seconds, and two of them would fight over the cores."""
    words = ["--recipe", "micro", "--out", str(out), "threads=1", f"sampler.block_size={block_size}", *more]
    return [sys.executable, "-m", "selfreward.run", *words]


class Process:
    """A running command whose stages can be waited for."""

    def __init__(self, words):
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self.lines.append(None)
            self._news.notify_all()

    def wait_for(self, stage):
        """Until the stage begins, was finished before, or the process ends."""
        wanted = {f"{stage} ...", f"{stage}: finished before", None}
        with self._news:
            self._news.wait_for(lambda: wanted & set(self.lines), timeout=300)

    def end(self):
        """Exit code and everything that was said."""
        code = self.process.wait(timeout=300)
        self._reader.join()
        return code, "\n".join(line for line in self.lines if line is not None)


def artefacts(out):
    """Every file's bytes, but for times."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in EXCEPTED
    }
    report = json.loads(found.pop("report.json"))
    del report["timing"]
    return found | {"report.json": report}


def assert_same(one, two):
    assert set(one) == set(two)
    assert [name for name in one if one[name] != two[name]] == []


@pytest.fixture(scope="module", params=BLOCK_SIZES)
def unbroken(request, tmp_path_factory):
    """(block size, artefacts, seconds of each stage) of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    code, said = Process(command(out, request.param)).end()
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    return request.param, artefacts(out), {row["stage"]: row["seconds"] for row in rows}


def interrupt(out, block_size, stage, delay, number):
    """Start or resume the run, and send the signal `delay` seconds into the stage. Returns exit code and what was said."""
    running = Process(command(out, block_size))
    running.wait_for(stage)
    time.sleep(delay)
    running.process.send_signal(number)
    return running.end()


def moments(seconds, half, rng):
    """Every other stage, and one training stage twice: (stage, seconds into it), in the order of the run."""
    stages = list(seconds)[half::2]
    twice = next(stage for stage in stages if stage.startswith("iter_") and stage.endswith("/model"))
    return [(s, rng.uniform(0, seconds[s])) for stage in stages for s in [stage] * (2 if stage == twice else 1)]


@pytest.mark.parametrize("half", [0, 1])
def test_a_run_that_is_killed_ten_times_or_more_ends_with_the_same_bytes(unbroken, half, tmp_path):
    block_size, expected, seconds = unbroken
    plan = moments(seconds, half, random.Random(half))
    assert len(plan) >= 10
    for stage, delay in plan:
        code, said = interrupt(tmp_path / "run", block_size, stage, delay, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"the run ended with {code} before it could be killed in {stage}: {said}"
    code, said = Process(command(tmp_path / "run", block_size)).end()
    assert code == 0, said
    assert_same(artefacts(tmp_path / "run"), expected)


def test_a_run_with_prompts_by_example_that_is_killed_ends_with_the_same_bytes(tmp_path):
    template = tmp_path / "tiny.jinja"
    template.write_text("{% for i in instructions %}[INST] {{ i }} [/INST] {% endfor %}[INST]\n")
    words = ["prompts.mode=few_shot", f"prompts.template={template}", "prompts.count=100", "prompts.filter=similar"]
    words += ["prompts.valid=null", "gates.min_readable=0", "gates.min_pairs=1", "evaluation.prompts=20"]
    code, said = Process(command(tmp_path / "unbroken", 64, *words)).end()
    assert code == 0, said
    for stage in ("iter_1/prompts", "iter_2/prompts"):
        for delay in (0.5, 1.0):  # of about three seconds
            running = Process(command(tmp_path / "killed", 64, *words))
            running.wait_for(stage)
            time.sleep(delay)
            running.process.send_signal(signal.SIGKILL)
            assert running.end()[0] == -signal.SIGKILL
    code, said = Process(command(tmp_path / "killed", 64, *words)).end()
    assert code == 0, said
    assert_same(artefacts(tmp_path / "killed"), artefacts(tmp_path / "unbroken"))


@pytest.mark.parametrize("variant", [["dpo.replay_weight=1"], ["method=positives"]], ids=["replay", "positives"])
def test_a_variants_training_that_is_killed_ends_with_the_same_bytes(variant, tmp_path):
    words = ["rounds=1", "evaluation.prompts=20", *variant]
    code, said = Process(command(tmp_path / "unbroken", 64, *words)).end()
    assert code == 0, said
    for delay in (0.2, 0.5):
        running = Process(command(tmp_path / "killed", 64, *words))
        running.wait_for("iter_1/model")
        time.sleep(delay)
        running.process.send_signal(signal.SIGKILL)
        assert running.end()[0] == -signal.SIGKILL
    code, said = Process(command(tmp_path / "killed", 64, *words)).end()
    assert code == 0, said
    assert_same(artefacts(tmp_path / "killed"), artefacts(tmp_path / "unbroken"))


def test_a_run_that_is_stopped_says_how_to_go_on_and_ends_with_the_same_bytes(unbroken, tmp_path):
    block_size, expected, seconds = unbroken
    rng = random.Random(2)
    for stage in ("sft/model", "eft", "iter_1/judgements", "iter_1/model", "evaluation/M2"):
        code, said = interrupt(tmp_path / "run", block_size, stage, rng.uniform(0, seconds[stage] / 2), signal.SIGTERM)
        assert code == 128 + signal.SIGTERM and "the same command goes on there" in said, said
    code, said = Process(command(tmp_path / "run", block_size)).end()
    assert code == 0, said
    assert_same(artefacts(tmp_path / "run"), expected)


@contextmanager
def small_disk(path, megabytes):
    """A tmpfs at `path`, where the system lets us mount one."""
    path.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("making a small disk needs root and mount")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True)
    if made.returncode:
        pytest.skip(f"this system does not let root mount a tmpfs: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill(path):
    """A file that takes all the room that is left."""
    with path.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


def test_a_full_disk_is_a_clear_error_and_with_room_again_the_run_ends_with_the_same_bytes(unbroken, tmp_path):
    block_size, expected, _ = unbroken
    if block_size != BLOCK_SIZES[0]:
        pytest.skip("the disk knows no block size")
    with small_disk(tmp_path / "disk", 100) as disk:
        out, ballast = disk / "run", disk / "ballast"
        for stage in ("eft", "iter_1/model", "iter_2/judgements"):
            running = Process(command(out, block_size))
            running.wait_for(stage)
            fill(ballast)
            code, said = running.end()
            assert code == 2 and "No space left on device" in said and "Traceback" not in said, said
            assert str(out) in said.splitlines()[-1]
            ballast.unlink()
        code, said = Process(command(out, block_size)).end()
        assert code == 0, said
        assert_same(artefacts(out), expected)


def test_a_read_only_directory_is_one_sentence(tmp_path):
    if Path("/proc").is_dir():
        code, said = Process(command(Path("/proc/run"), 64)).end()
        assert code == 2 and "/proc/run cannot be written" in said and "Traceback" not in said
    (tmp_path / "run").write_text("a file")
    code, said = Process(command(tmp_path / "run", 64)).end()
    assert code == 2 and "is a file" in said and len(said.splitlines()) == 1
