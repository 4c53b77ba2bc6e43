"""The directory of a run: what stands in it is whole, belongs to this recipe, and is written by one process at a time.

manifest.json   what the run is (the caller's dictionary: recipe, hashes, versions); a resume must agree with it
stages.json     the finished stages, in order, with their counts and the hashes of what they left for later ones
timing.jsonl    the only place for times, so that all other files are the same bytes in every run

Files are written whole (`write_json`, `write_jsonl`, `write_bytes`) or grow by whole groups of rows (`append_group`,
`kept_groups`), so that a run that was killed at any moment goes on behind its last whole group.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from engine import InputError

MANIFEST, STAGES, TIMING, LOCK = "manifest.json", "stages.json", "timing.jsonl", ".lock"
FILES = "files"  # of a stage in stages.json, beside its counts: name -> hash
_SHOWN_DIFFERENCES = 20


def row_seed(run_seed: int, round: int, stage: str, row_id: str | int) -> int:
    """A 64-bit seed that depends on these four and nothing else: not on order, batch, process or machine."""
    key = json.dumps([run_seed, round, stage, row_id], ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


class RunDir:
    """A run's directory: made, or resumed if its manifest agrees. Use it as a context manager, or `close` it.

    InputError: the path is no directory; it holds files but no manifest; its manifest or stages cannot be read or
    differ (every difference is listed); another process has it open. `compared(manifest)` is what must agree (default:
    all of it), `otherwise` what the error advises where it does not.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        compared: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        otherwise: str = "give a new directory",
    ) -> None:
        self.path = Path(path)
        self._otherwise = otherwise
        self._compared = compared
        self.manifest: dict[str, Any] = json.loads(_json(manifest))  # as it will be read back: tuples are lists
        self.resumed = self._inspect()
        self._lock = self._take_lock()
        try:
            self.resumed = self._inspect()  # another run may have written since
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open the directory."""
        self._lock.close()

    def file(self, name: str) -> Path:
        """The absolute path of a file in the run, such as "iter_1/pairs.jsonl"."""
        return self.path.absolute() / name

    def write_json(self, name: str, value: Any) -> None:
        """Write a whole JSON file: after a kill at any moment the old or the new one stands there, never a part."""
        self.write_bytes(name, (_json(value, indent=2) + "\n").encode("utf-8"))

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all rows of a JSON lines file, like `write_json`."""
        _write(self.file(name), ((_json(row) + "\n").encode("utf-8") for row in rows))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file of any kind, like `write_json`."""
        _write(self.file(name), [content])

    def append_group(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a group of rows to a JSON lines file and bring it to the disk."""
        path = self.file(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("ab") as file:
                file.write("".join(_json(row) + "\n" for row in rows).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync_directory(path.parent)
        except OSError as error:
            raise _write_error(path, error) from None

    def kept_groups(self, name: str, sizes: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
        """The rows of a file that an interrupted stage appended to, and how many whole groups they are.

        sizes: rows of each group, in order. What a kill left behind the last whole group is cut off the file.
        """
        path = self.file(name)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last line feed is torn
        whole = groups = 0
        for size in sizes:
            if whole + size > len(lines):
                break
            whole, groups = whole + size, groups + 1
        kept = lines[:whole]
        try:
            rows = [json.loads(line) for line in kept]
            if path.exists():
                os.truncate(path, sum(len(line) + 1 for line in kept))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); remove it, and the stage begins again") from None
        except OSError as error:
            raise _write_error(path, error) from None
        return rows, groups

    def done(self, stage: str) -> bool:
        """Whether the stage is finished and need not run again."""
        return stage in self._stages

    def counts(self, stage: str) -> dict[str, Any]:
        """What `mark_done` recorded for a finished stage."""
        return {name: count for name, count in self._stages[stage].items() if name != FILES}

    def finished(self) -> dict[str, dict[str, Any]]:
        """The counts of every finished stage, in the order in which they ended."""
        return {stage: self.counts(stage) for stage in self._stages}

    def mark_done(self, stage: str, counts: Mapping[str, Any], files: Iterable[str] = ()) -> None:
        """Record a stage as finished, after all of its files are written. Counts hold no times. Of `files` (names in the
        run, not directories) what they hold is recorded too."""
        hashes = {name: file_hash(self.file(name)) for name in files}
        self._stages[stage] = json.loads(_json(dict(counts) | ({FILES: hashes} if hashes else {})))
        self.write_json(STAGES, self._stages)

    def changed(self, stage: str) -> list[Path]:
        """The files of a finished stage that no longer hold what `mark_done` found in them. None of a stage that recorded
        none, as those of older versions."""
        recorded = self._stages[stage].get(FILES, {})
        return [self.file(name) for name, known in recorded.items() if file_hash(self.file(name)) != known]

    def append_timing(self, row: Mapping[str, Any]) -> None:
        """Add a row to timing.jsonl; a last line torn by a kill is cut first."""
        path = self.file(TIMING)
        try:
            with path.open("a+b") as file:
                _cut_torn_line(file)
                file.write((_json(row) + "\n").encode("utf-8"))
        except OSError as error:
            raise _write_error(path, error) from None

    # -- opening --

    def _inspect(self) -> bool:
        """Whether there is a run to resume. Changes nothing, so that a directory of something else stays as it is."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; expected a new or empty directory, or one of an earlier run")
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK and not _is_temporary(entry))
        if not found:
            return False
        if MANIFEST not in found:
            raise InputError(
                f"{self.path} is not empty ({found[0]}) and has no {MANIFEST}, so it is not a run; give a new directory"
            )
        there = read_json(self.file(MANIFEST))
        differences = list(_differences(self._compared(there), self._compared(self.manifest), ""))
        if differences:
            more = len(differences) - _SHOWN_DIFFERENCES
            raise InputError(
                f"{self.path} holds another run; {self._otherwise}, or undo: "
                + "; ".join(differences[:_SHOWN_DIFFERENCES])
                + (f"; and {more} more" if more > 0 else "")
            )
        return True

    def _take_lock(self) -> BinaryIO:
        """An advisory lock on `.lock`, which the system frees when the process ends, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("ab")
        except OSError as error:
            raise _write_error(self.path, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InputError(
                f"{self.path} is in use by another run; wait for it to end, or give another directory"
            ) from None
        return lock

    def _open(self) -> None:
        for left_over in self.path.rglob(".*.tmp"):
            if left_over.is_file() and not self._of_a_run_inside(left_over):
                left_over.unlink()
        if not self.resumed:
            self.write_json(MANIFEST, self.manifest)
        stages = self.file(STAGES)
        self._stages: dict[str, Any] = read_json(stages) if stages.exists() else {}
        for name, counts in self._stages.items():
            if not isinstance(counts, dict):
                raise InputError(
                    f"{stages}: {name!r} is no object of counts; restore it, or start again in a new directory"
                )

    def _of_a_run_inside(self, file: Path) -> bool:
        """Whether it is the file of a run below this one (`eval` makes such), which may be writing it now."""
        return any((folder / LOCK).exists() for folder in file.parents if self.path in folder.parents)


def written_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the run that stands in `path`; empty if none does."""
    file = Path(path) / MANIFEST
    return read_json(file) if file.is_file() else {}


def _differences(there: Any, here: Any, key: str) -> Iterator[str]:
    """One line per value that differs, by dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            dotted = f"{key}.{name}" if key else name
            if name not in here or name not in there:
                where, value = ("there", there[name]) if name in there else ("here", here[name])
                yield f"{dotted} is only {where} ({_short(value)})"
            else:
                yield from _differences(there[name], here[name], dotted)
    elif type(there) is not type(here) or there != here:
        yield f"{key} is {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _json(value: Any, indent: int | None = None) -> str:
    """Keys keep their order. NaN and infinity raise ValueError: they are not JSON, and a count or score is neither."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a run holds. InputError says what to do where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it, or start again in a new directory") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; restore it, or start again in a new directory")
    return value


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """Into a temporary name beside the file, to the disk, then renamed: a reader sees the old or the new file."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(path, error) from None
        raise


def _sync_directory(directory: Path) -> None:
    """The rename itself must reach the disk too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror}; make room or give another directory, then resume")


def _cut_torn_line(file: BinaryIO) -> None:
    """Drop what stands after the last line feed. The file is open for reading and appending."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes, for the manifest."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def own_version() -> str:
    """Of this package; of a source tree that is not installed there is none."""
    try:
        return metadata.version("selfreward")
    except metadata.PackageNotFoundError:
        return "not installed"
