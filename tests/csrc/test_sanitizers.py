"""The kernels of csrc/ under sanitizers, without Python: a driver runs each on odd shapes, at every instruction level."""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
# As setup.py has them, but for the optimisation.
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-iquote", str(KERNELS)]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
MISDEEDS = {  # of misdeeds.cpp, and what is said of them
    "address": {
        "read_behind": "SEGV .* in read_behind",
        "read_slack": "use-after-poison .* in read_slack",
        "read_before": "use-after-poison .* in read_before",
        "read_behind_masked": "SEGV .* in .*maskload|no masked loads",
        "write_slack_masked": "byte 20 of out, which has 20, was written|no masked stores",
        "leave_unwritten": r"out\[0\] is -?nan",
        "use_scratch_unwritten": r"out\[0\] is -?nan",
        "disagree": r"out\[0\] is -0 .*; the first way gave 0 ",
        "overflow": "signed integer overflow",
    },
    "thread": {"race": "data race .* in "},
}


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request, tmp_path_factory):
    """The driver's path, built with one of the sanitizers and named after it."""
    folder, flags = tmp_path_factory.mktemp(request.param), SANITIZERS[request.param]
    if not COMPILER[0]:
        pytest.skip("there is no C++ compiler")
    trial = folder / "trial.cpp"
    trial.write_text("int main() {}\n")
    result = run(*COMPILER, *FLAGS, *flags, trial, "-o", folder / "trial")
    if not result.returncode:
        result = run(folder / "trial")
    if result.returncode:
        pytest.skip(f"{' '.join([*COMPILER, *flags])} makes no program that runs: {result.stderr[-500:]}")

    # The largest first, so that the last one to be ready is not one that takes long.
    sources = [path for path in KERNELS.glob("*.cpp") if path.name != "bindings.cpp"] + list(HERE.glob("*.cpp"))
    sources.sort(key=lambda path: path.stat().st_size, reverse=True)
    objects = [folder / f"{path.parent.name}-{path.stem}.o" for path in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(
            lambda pair: run(*COMPILER, *FLAGS, *flags, "-c", pair[0], "-o", pair[1]),
            zip(sources, objects, strict=True),
        ):
            assert result.returncode == 0, result.stderr
    result = run(*COMPILER, *FLAGS, *flags, *objects, "-o", folder / request.param)
    assert result.returncode == 0, result.stderr
    return folder / request.param


def test_every_kernel_runs_clean(driver):
    result = run(driver)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_misdeeds_are_noticed(driver):
    for misdeed, message in MISDEEDS[driver.name].items():
        result = run(driver, f"misdeed: {misdeed}")
        assert result.returncode != 0 and re.search(message, result.stderr), result.stdout + result.stderr
