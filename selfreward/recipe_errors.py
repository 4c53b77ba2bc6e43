"""What is wrong with a recipe, said in one sentence: which key, where it was set, what was found and what is expected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine import InputError

FORMS = ("one value", "a value for each round")  # of a per-round key
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "path_type": "a path",
    "is_instance_of": "a path",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
}


class Source:
    """Where each key came from: the command line's own keys, else the file."""

    def __init__(self, file: Path, changed: dict[str, Any]) -> None:
        self.file, self.changed = file, changed

    def of(self, key: str) -> str:
        """`key` is dotted; the empty key is the recipe as a whole."""
        here: Any = self.changed
        for part in key.split("."):
            if not isinstance(here, dict):
                break  # an override of the whole group or list
            if part not in here:
                return f"recipe {self.file}" + (" and command line" if self.changed and not key else "")
            here = here[part]
        return "command line"


def explained(error: ValidationError, source: Source, keys: Sequence[str]) -> InputError:
    """The first mistake as one sentence (an unknown key before anything else), and how many more there are."""
    mistakes = sorted(error.errors(include_url=False), key=lambda m: m["type"] != "extra_forbidden")
    first = mistakes[0]
    parts = [str(part) for part in first["loc"] if part not in FORMS]
    key = ".".join(parts)
    more = f" ({len(mistakes) - 1} more after this one)" if len(mistakes) > 1 else ""
    cause = first.get("ctx", {}).get("error")
    return InputError(f"{source.of(key)}: {_complaint(first, key, cause, keys)}{more}")


def _complaint(mistake: Any, key: str, cause: Any, keys: Sequence[str]) -> str:
    if cause is not None:  # raised by our own checks above, which name the key within their group
        return f"{key}: {cause}" if key else str(cause)
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, keys)}"
    if ".split" in key:
        return f"data.split: found {shown(mistake['input'])}; expected a list of two shares, each between 0 and 1"
    if ".betas." in key or mistake["type"] in ("tuple_type", "too_long"):
        return f"{key.partition('.betas')[0]}.betas: found {shown(mistake['input'])}; expected a list of two numbers"
    if mistake["type"] == "missing":
        return f"{key} is missing; set it"
    expected = _EXPECTED.get(mistake["type"]) or mistake["msg"].removeprefix("Input should be ")
    return f"{key} is {shown(mistake['input'])}; expected {expected}"


def nearest(key: str, known: Sequence[str]) -> str:
    """A question for the nearest known key, by its last part first: `lr` means sft.lr or dpo.lr."""
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
