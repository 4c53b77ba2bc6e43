"""The reference model's log-probs of the pairs, kept in a file: DPO then needs no second model.

One JSON object a line and pair, in TRL's column names, with what the numbers are of:

    {"ref_chosen_logps": -9.1, "ref_rejected_logps": -8.7, "model_hash": "...", "template_hash": "...", "data_hash": "..."}

`model_hash` is of the weights' bits, `template_hash` of the vocabulary and chat layout (`Tokenizer.template_hash`),
`data_hash` of the pair's three token lists. A file of other weights, another template or other pairs is an error that says
which, never computed anew in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.lora import LoRA
from engine.model import Llama
from engine.train.batches import DPORow, check_kinds
from engine.train.checks import check_references
from engine.train.state import rows_hash, weights_hash
from engine.train.trainer import reference_logprobs

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"
KEYS = ("model_hash", "template_hash", "data_hash")
_SHOWN_DIFFERENCES = 5


def cached_reference(
    path: str | Path, model: Llama | LoRA, rows: Sequence[DPORow], template_hash: str = "", max_pack_tokens: int = 4096
) -> list[DPORow]:
    """The rows with their log-probs under `model`: from `path`, which is computed and written where it does not exist.

    InputError: the file is of something else (`load_reference`), or a row cannot be computed (`reference_logprobs`).
    """
    if not Path(path).exists():
        values = reference_logprobs(model, rows, max_pack_tokens)
        referenced = [replace(row, reference=value) for row, value in zip(rows, values, strict=True)]
        save_reference(path, model, referenced, template_hash)
    return load_reference(path, model, rows, template_hash)


def save_reference(path: str | Path, model: Llama | LoRA, rows: Sequence[DPORow], template_hash: str = "") -> None:
    """Write the `reference` of every row, with the keys. The file is complete or not there, whenever the process dies."""
    check_references(rows)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            for row, keys in zip(rows, _keys(model, rows, template_hash), strict=True):
                assert row.reference is not None
                file.write(
                    json.dumps(dict(zip((CHOSEN, REJECTED), map(float, row.reference), strict=True)) | keys) + "\n"
                )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); make room or give another file") from None


def load_reference(
    path: str | Path, model: Llama | LoRA, rows: Sequence[DPORow], template_hash: str = ""
) -> list[DPORow]:
    """The rows with the file's log-probs. `model`: the reference model, or the policy before its first step.

    InputError: the file is damaged, has no keys, or was made with another model, template or other pairs: says which.
    """
    path = Path(path)
    check_kinds(rows, DPORow, "expected a DPORow")
    lines = _read(path)
    expected = list(_keys(model, rows, template_hash))
    differences = [] if len(lines) == len(rows) else [f"it has {len(lines)} pairs, there are {len(rows)}"]
    for key, what in (("model_hash", "the model's weights"), ("template_hash", "the template")):
        found, now = {str(line[key]) for line in lines}, {keys[key] for keys in expected}
        if lines and found != now:
            differences.append(f"{what} had the hash {', '.join(sorted(found))}, now {', '.join(now)}")
    others = [
        number for number, (line, keys) in enumerate(zip(lines, expected, strict=False))
        if line["data_hash"] != keys["data_hash"]
    ]  # fmt: skip
    if others:
        shown = ", ".join(map(str, others[:_SHOWN_DIFFERENCES]))
        more = f" and {len(others) - _SHOWN_DIFFERENCES} more" if len(others) > _SHOWN_DIFFERENCES else ""
        differences.append(f"the tokens of pair {shown}{more} are others")
    if differences:
        raise InputError(
            f"{path} holds the reference of something else: {'; '.join(differences)}. "
            "Restore what it was made from, or remove it to compute it again"
        )
    referenced = [replace(row, reference=(line[CHOSEN], line[REJECTED])) for row, line in zip(rows, lines, strict=True)]
    check_references(referenced)
    return referenced


def reference_gap(model: Llama | LoRA, rows: Sequence[DPORow], pairs: int = 64) -> float:
    """How far the log-probs of the first `pairs` rows' answers are from `reference` under `model`, at most, in nats.

    Before the first step of a DPO whose reference is the model itself they are rounding apart: more than 1e-3 in fp32 says
    that weights, template or numbers are not those of the reference. NaN if one of them is.
    """
    first = rows[:pairs]
    check_references(first)
    size = max((len(row.prompt) + len(row.chosen) + len(row.rejected) for row in first), default=1)
    gaps = [
        abs(now - then)
        for values, row in zip(reference_logprobs(model, first, size), first, strict=True)
        for now, then in zip(values, row.reference or (), strict=True)
    ]
    return next((gap for gap in gaps if gap != gap), max(gaps))  # max() alone would pass over NaN


def _keys(model: Llama | LoRA, rows: Sequence[DPORow], template_hash: str) -> Iterator[dict[str, str]]:
    model_hash = weights_hash(model)
    for row in rows:
        data_hash = rows_hash([replace(row, reference=None)])
        yield dict(zip(KEYS, (model_hash, template_hash, data_hash), strict=True))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it to compute it again") from None
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {CHOSEN, REJECTED} <= set(row):
            raise InputError(f"{path}, line {number}: expected {CHOSEN} and {REJECTED}; remove it to compute it again")
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise InputError(
                f"{path}, line {number} does not say what it is of: no {', '.join(missing)}. Pairs with TRL's columns come "
                "in by rows_from_trl, which trusts them"
            )
        lines.append(row)
    return lines
