"""AlpacaEval's two files: the answers that it is given, and the annotations that it writes.

`annotations.json`: a list of {"instruction", "generator_1", "output_1" (the baseline), "generator_2", "output_2" (the
model), "annotator", "preference"}. A preference is from 1 (the baseline's is better) to 2 (the model's is); 1.5 is a tie,
as is 0 in old files, and null means that the annotator gave none. The figures are those of alpaca_eval's `get_winrate`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import InputError
from selfreward.files import Unreadable, read_rows
from selfreward.metrics import mean_and_error
from selfreward.records import Refused, kind, text_field

Row = dict[str, Any]

TEXTS = ("instruction", "generator_1", "output_1", "generator_2", "output_2")
ONE_EACH = ("generator_1", "generator_2", "annotator")
TIE = 1.5
# blake2b of AlpacaEval's 805 instructions, joined by zeros, as its results hold them (tatsu-lab/alpaca_eval, cd543a1).
ALPACA_EVAL = "1fac2cf0ca948b9b8979ec359f15c991"


def model_outputs(generator: str, rows: Sequence[Row], dataset: str) -> list[Row]:
    """`model_outputs.json`: rows of {"prompt", "text"} -> one object per instruction, as alpaca_eval reads them.

    It finds an instruction's partner among the reference outputs by its text.
    """
    return [
        {
            "dataset": dataset,
            "instruction": row["prompt"],
            "output": row["text"],
            "generator": generator,
        }
        for row in rows
    ]


def read_annotations(path: Path) -> list[Row]:
    """The rows of an annotations.json, each seen to be one. InputError names file and row."""
    rows: list[Row] = []
    for where, row in read_rows(path):
        rows.append(_checked(where, row, rows[0] if rows else None))
    if not rows:
        raise InputError(f"{path} holds no annotations; expected a list of them")
    if all(row["preference"] is None for row in rows):
        raise InputError(f"{path}: none of the {len(rows)} annotations has a preference; annotate again")
    return rows


def _checked(where: str, row: Any, first: Row | None) -> Row:
    if isinstance(row, Unreadable):
        raise InputError(f"{where}: {row.said}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: the row is {kind(row)}; expected an annotation, a JSON object")
    for key in (*TEXTS, *(["annotator"] if row.get("annotator") is not None else [])):
        try:
            text_field(row, key, may_be_empty=True)
        except Refused as refused:
            raise InputError(f"{where}: {refused.said}") from None
    if "preference" not in row:
        raise InputError(
            f"{where}: 'preference' is missing; expected a number from 1 to 2, or null where there is none"
        )
    preference = row["preference"]
    if preference is not None and (isinstance(preference, bool) or not isinstance(preference, (int, float))):
        raise InputError(f"{where}: 'preference' is {kind(preference)}; expected a number from 1 to 2, 0 or null")
    if preference is not None and not (preference == 0 or 1 <= preference <= 2):
        raise InputError(f"{where}: 'preference' is {preference}; expected a number from 1 to 2, 0 or null")
    for key in ONE_EACH:
        if first is not None and row.get(key) != first.get(key):
            raise InputError(
                f"{where}: {key!r} is {row.get(key)!r}, in the first row {first.get(key)!r}; a file compares one model "
                "with one baseline by one annotator: split it"
            )
    return row


def win_rate(rows: Sequence[Row]) -> Row:
    """How often the model wins, in percent: the mean of preference - 1 over the rows that have one.

    `standard_error` is that mean's (None for a single row). `n_wins`, `n_wins_base` and `n_draws` add up to `n`, and
    `n_null` rows have no preference. `discrete_win_rate`: every preference taken as a win, a loss or a tie. Lengths are
    in characters, over all rows. At least one row must have a preference, as in what `read_annotations` returns.
    """
    given = [float(row["preference"]) or TIE for row in rows if row["preference"] is not None]
    rate, error = mean_and_error([preference - 1 for preference in given])
    wins, losses = sum(p > TIE for p in given), sum(p < TIE for p in given)
    draws = len(given) - wins - losses
    assert rate is not None
    return {
        "win_rate": 100 * rate,
        "standard_error": None if error is None else 100 * error,
        "n": len(given),
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_null": len(rows) - len(given),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(given),
        "mean_length": math.fsum(len(row["output_2"]) for row in rows) / len(rows),
        "mean_length_base": math.fsum(len(row["output_1"]) for row in rows) / len(rows),
        "generator": rows[0]["generator_2"],
        "baseline": rows[0]["generator_1"],
        "annotator": rows[0].get("annotator"),
    }


def length_controlled(rows: Sequence[Row]) -> tuple[Row, str | None]:
    """alpaca_eval's length-controlled win rate, by its own code where that is installed, else None and why not.

    Its model needs the difficulty of each instruction, which it knows for AlpacaEval's own 805 only and looks up by the
    row's place: of other instructions, or of these in another order, it would make a number without meaning.
    """
    names = ("length_controlled_winrate", "lc_standard_error")
    if instructions_hash(rows) != ALPACA_EVAL:
        said = "the length-controlled win rate is for AlpacaEval's 805 instructions in its order; this file has others"
        return dict.fromkeys(names), said
    try:
        theirs = importlib.import_module("alpaca_eval.metrics")  # no requirement of ours
        compute = theirs.get_length_controlled_winrate
    except (ImportError, AttributeError):
        said = "the length-controlled win rate is alpaca_eval's own; `pip install alpaca_eval` to have it here"
        return dict.fromkeys(names), said
    try:
        found = compute([dict(row) for row in rows], save_weights_dir=None)
    except Exception as error:  # its regression can fail in many ways: other instructions, too few, no network
        return dict.fromkeys(
            names
        ), f"alpaca_eval has no length-controlled win rate for this file ({_first_line(error)})"
    return {name: float(found[name]) for name in names}, None


def instructions_hash(rows: Sequence[Row]) -> str:
    joined = "\0".join(row["instruction"] for row in rows)
    return hashlib.blake2b(joined.encode("utf-8"), digest_size=16).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
