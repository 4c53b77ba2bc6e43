"""What a training writes down to go on after an interruption as if there had been none: `out_dir/state`.

    state.json            which step it was written after, what was being trained, the checksum of the tensors, and how far
                          training has come besides: tokens, the best held-out measure and where it was
    step-<n>.safetensors  parameters under their names (a LoRA's: its adapters alone), AdamW's tensors as
                          `adam.exp_avg.<name>` and so on; of the best step too, where the best is kept

Nothing else is state: the order of the rows and dropout are functions of (seed, step). The tensors are on the disk under
a name of their own before state.json, which names their step, is renamed into place, so a kill at any moment leaves the
old or the new state. At 12 bytes a parameter in fp32 both are on the disk for a moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine import ops
from engine.errors import InputError
from engine.lora import LoRA
from engine.model import Llama
from engine.train.batches import DPORow, SFTRow

FORMAT = 2
STATE, METRICS, TIMING = "state.json", "metrics.jsonl", "timing.jsonl"
NO_NUMBERS = ("save_every", "activation_checkpointing")  # what may be another on a resume
KINDS = {"format": int, "step": int, "weight_epoch": int, "weights": dict, "checksum": str, "best_checksum": str,
         "progress": dict, "training": dict}  # fmt: skip
ADAM = ("step", "exp_avg", "exp_avg_sq")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN_DIFFERENCES = 10
WHY = {
    "threads": " (the last bits of torch's sums depend on it: torch.set_num_threads)",
    "backends": " (the last bits depend on it: SELFREWARD_BACKEND)",
}


@dataclass
class Progress:
    """What a training has come to beside weights and step: tokens that it ran through, its best held-out measure, after
    which step that was, and how many measurements in a row were no better."""

    num_tokens: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0


def clear_state(out_dir: str | Path) -> None:
    """Remove the state that `train` left in `out_dir`, once the model is exported. Logs stay; no state is no error."""
    directory = Path(out_dir) / "state"
    (directory / STATE).unlink(missing_ok=True)  # first: without it the tensors are nothing
    _remove_tensors(directory)
    with contextlib.suppress(OSError):  # not there, or it holds something that is not ours
        directory.rmdir()


def identity(
    model: Llama | LoRA, rows: Sequence[SFTRow | DPORow], replay: Sequence[SFTRow], config: Any
) -> dict[str, Any]:
    """All that the numbers of a training depend on beside its starting weights. A resume must agree with every entry."""
    options = {name: value for name, value in asdict(config).items() if name not in NO_NUMBERS}
    device = model.embed.device
    found = {
        "config": {"kind": type(config).__name__, **options},
        "rows": rows_hash(rows),
        "replay": rows_hash(replay),
        "model": asdict(model.config),
        "dtype": str(model.embed.dtype),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backends": ops.backends(device.type),
    }
    if isinstance(model, LoRA):
        found["lora"] = {"rank": model.rank, "alpha": model.alpha, "targets": model.targets}
    return json.loads(json.dumps(found))  # as it will be read back: tuples are lists


def rows_hash(rows: Sequence[SFTRow | DPORow]) -> str:
    """blake2b over every field of every row; tokens may be any sequence of ints."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for part in fields(row):
            value = getattr(row, part.name)
            array = np.asarray([] if value is None else value, np.float64 if part.name == "reference" else np.int64)
            digest.update(f"{part.name} {array.size} ".encode() + array.tobytes())
    return digest.hexdigest()


def weights_hash(model: Llama | LoRA) -> str:
    """A hash of all that a model's log-probs depend on: its config, a LoRA's rank, alpha and targets, and two sums over the
    bit patterns of each parameter, a LoRA's base among them. In one sum rows count by their place, in the other columns,
    so that the same numbers in another order are another model; exact in any order of adding, at the speed of memory.
    It tells models apart that were mistaken for each other, not ones made to deceive."""
    parameters = [*model.parameters(), *(model.base.parameters() if isinstance(model, LoRA) else ())]
    found: list[Any] = [asdict(model.config), [_sums(p.detach()) for p in parameters]]
    if isinstance(model, LoRA):
        found.append([model.rank, model.alpha, list(model.targets)])
    return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()


def _sums(x: torch.Tensor) -> list[int]:
    """Of the bits of x [..., columns], rows and columns counted by their place; whole numbers modulo 2^64."""
    bits = x.view(_BITS[x.element_size()]).view(-1, x.shape[-1] if x.ndim > 1 else 1)
    places = torch.arange(1, max(bits.shape) + 1, device=x.device)
    return [int((bits.sum(dim=1 - side, dtype=torch.int64) * places[: bits.shape[side]]).sum()) for side in range(2)]


class StateDir:
    """The directory of one training: `begin` once, then `log` every step and `save` now and then.

    keep_best: the tensors of `progress.best_step`, which was saved, stay until there is a better one; `load_best`.
    """

    def __init__(
        self,
        out_dir: Path,
        model: Llama | LoRA,
        optimizer: torch.optim.Optimizer,
        about: dict[str, Any],
        keep_best: bool = False,
    ) -> None:
        self.out_dir, self.directory = out_dir, out_dir / "state"
        self.model, self.optimizer, self.about = model, optimizer, about
        self.keep_best, self.best = keep_best, {"checksum": "", "weights": ""}  # of the best step
        self.progress = Progress()
        self.start = weights_hash(model)

    def begin(self, resume: bool) -> int:
        """Restore the saved state, if there is one, and return how many steps it has seen. Cuts the logs to them.

        InputError: the state is damaged, or of another training.
        """
        with _writing(self.out_dir):
            self.out_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            clear_state(self.out_dir)
        step = self._restore() if (self.directory / STATE).exists() else 0
        for name in (METRICS, TIMING):
            _cut(self.out_dir / name, step)
        return step

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """One line more in metrics.jsonl and timing.jsonl."""
        for name, row in ((METRICS, metrics), (TIMING, timing)):
            with _writing(self.out_dir / name), (self.out_dir / name).open("a") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, step: int) -> None:
        """Write the state after `step` steps. The logs are synced before it: it vouches for their first `step` lines."""
        tensors, path = self._file(step), self.directory / STATE
        with _writing(tensors):
            self.directory.mkdir(exist_ok=True)
            for name in (METRICS, TIMING):
                _sync(self.out_dir / name)
            save_file(self._tensors(), str(tensors))
            _sync(tensors)
            checksum = _checksum(tensors)
        now = weights_hash(self.model)
        if step == self.progress.best_step:
            self.best = {"checksum": checksum, "weights": now}
        state = {
            "format": FORMAT,
            "step": step,
            "weight_epoch": self.model.weight_epoch,
            "weights": {"start": self.start, "now": now, "best": self.best["weights"]},
            "checksum": checksum,
            "best_checksum": self.best["checksum"],
            "progress": asdict(self.progress),
            "training": self.about,
        }
        with _writing(path):
            temporary = path.with_name(f".{STATE}.tmp")
            temporary.write_text(json.dumps(state, indent=2) + "\n")
            _sync(temporary)
            temporary.replace(path)
            _sync(self.directory)
        best = [self._file(self.progress.best_step)] if self.keep_best and self.progress.best_step else []
        _remove_tensors(self.directory, keep=[tensors, *best])

    def load_best(self) -> None:
        """Give the model the weights of `progress.best_step`, whose tensors are kept."""
        assert self.keep_best and self.progress.best_step is not None
        self._checked_load(self._file(self.progress.best_step), self.best["checksum"], optimizer=False)
        self.model.weights_changed()

    def _file(self, step: int) -> Path:
        return self.directory / f"step-{step}.safetensors"

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"adam.{kind}.{name}": self.optimizer.state[parameter][kind] for kind in ADAM}
        return tensors

    def _restore(self) -> int:
        state = _read(self.directory / STATE)
        self._check_same(state)
        step: int = state["step"]
        self._checked_load(self._file(step), state["checksum"])
        self.progress = Progress(**state["progress"])
        self.best = {"checksum": state["best_checksum"], "weights": state["weights"]["best"]}
        self.start = state["weights"]["start"]
        # The epoch of the unbroken run, but above the present one: what was cached of the present weights is stale.
        self.model.weight_epoch = max(state["weight_epoch"] - 1, self.model.weight_epoch)
        self.model.weights_changed()
        return step

    def _check_same(self, state: dict[str, Any]) -> None:
        differences = list(_differences(state["training"], self.about, ""))
        if self.start not in state["weights"].values():
            differences.append("the model holds other weights than at the start")
        if differences:
            more = len(differences) - _SHOWN_DIFFERENCES
            raise InputError(
                f"{self.directory} holds the state of another training: {'; '.join(differences[:_SHOWN_DIFFERENCES])}"
                + (f"; and {more} more" if more > 0 else "")
                + ". Undo that to go on, or begin anew: remove the directory, or pass resume=False"
            )

    def _checked_load(self, path: Path, checksum: str, optimizer: bool = True) -> None:
        try:
            if _checksum(path) != checksum:
                raise _damaged(path, "its checksum is another")
            self._load(path, optimizer)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None

    @torch.no_grad()
    def _load(self, path: Path, optimizer: bool) -> None:
        """Copy tensor by tensor out of the file, mapped anew for each parameter so that what was read leaves memory:
        nothing but AdamW's own state is allocated."""
        for name, parameter in self.model.named_parameters():
            with safe_open(str(path), framework="pt") as file:
                parameter.copy_(file.get_tensor(name))
                if optimizer:
                    self.optimizer.state[parameter] = {
                        kind: file.get_tensor(f"adam.{kind}.{name}").to(parameter.device, copy=True) for kind in ADAM
                    }


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        if state["format"] != FORMAT:
            raise _damaged(path, f"its format is {state['format']!r}, this version reads {FORMAT}")
        wrong = next(_wrong(state, KINDS), "")
        wrong = wrong or next(_wrong(state["weights"], dict.fromkeys(("start", "now", "best"), str), "weights."), "")
        wrong = wrong or next(_wrong(state["progress"], get_type_hints(Progress), "progress."), "")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, repr(error)) from None
    if wrong:
        raise _damaged(path, wrong)
    return state


def _wrong(found: dict[str, Any], kinds: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """One phrase per entry that is missing, of another kind, or unknown."""
    for name in dict.fromkeys([*kinds, *found]):
        if name not in found:
            yield f"{place}{name} is missing"
        elif name not in kinds or not isinstance(found[name], kinds[name]):
            yield f"{place}{name} is {found[name]!r}"


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}); remove {path.parent} and train from the start")


def _differences(there: Any, here: Any, key: str) -> Iterator[str]:
    """One phrase per value that differs, by dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif there != here and key in ("rows", "replay", "heldout.rows"):
        yield "the rows are others" if key == "rows" else f"the {key.removesuffix('.rows')} rows are others"
    elif there != here:
        why = WHY.get(key.split(".")[0], "")
        yield f"{key} was {there!r}, is {here!r}{why}"


def _remove_tensors(directory: Path, keep: Sequence[Path] = ()) -> None:
    """Every tensor file but those, and what a killed write left (safetensors writes to `.tmp*` beside the file)."""
    for pattern in ("step-*.safetensors", ".tmp*", f".{STATE}.tmp"):
        for path in directory.glob(pattern):
            if path not in keep:
                path.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    """blake2b of the file, about 1 GB/s: safetensors itself would not notice a flipped bit."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _cut(path: Path, lines: int) -> None:
    """Leave the first `lines` lines of a log; what follows, or a torn tail, is of steps that are done again."""
    with _writing(path), path.open("a+b") as file:
        file.seek(0)
        found = 0
        while found < lines and file.readline().endswith(b"\n"):
            found += 1
        if found < lines:
            raise InputError(
                f"{path} has {found} of the {lines} lines that {path.parent / 'state'} goes with; "
                "restore it, or remove both and train from the start"
            )
        file.truncate(file.tell())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be written ({error}); make room or give another directory, then resume"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
