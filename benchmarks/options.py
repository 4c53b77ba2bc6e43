"""What several commands ask of their options, checked before anything is measured: a sentence, or None."""

from __future__ import annotations

import os
from pathlib import Path


def bad_threads(threads: int | None) -> str | None:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is None or 1 <= threads <= available:
        return None
    return f"--threads {threads}: expected 1 to {available}, the cores of this process"


def bad_target(path: Path | None) -> str | None:
    if path is None or (path.parent.is_dir() and not path.is_dir()):
        return None
    return f"--json {path}: expected a file in a directory that exists"
