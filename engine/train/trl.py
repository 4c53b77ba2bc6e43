"""TRL's data formats as rows: what trains there trains here.

    preference            prompt, chosen, rejected; beside them, if known, ref_chosen_logps and ref_rejected_logps
    prompt-completion     prompt, completion
each of them as text ("standard"), as lists of messages ("conversational"), or as token ids under TRL's own names after its
tokenisation: prompt_ids, chosen_ids, rejected_ids; and input_ids with completion_mask.

Text is tokenised as TRL does it with a Llama tokenizer, BOS before the prompt and EOS behind the answer, but prompt and
answer apart: a prompt's tokens are never merged with an answer's. Messages get Llama 2's chat layout.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from reprlib import repr as shown  # cut where it is long
from typing import Any

from engine.errors import InputError
from engine.tokenizer import Tokenizer
from engine.train.batches import DPORow, SFTRow
from engine.train.reference import CHOSEN, REJECTED


def rows_from_trl(records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer | None = None) -> list[Any]:
    """Records as JSON or `datasets` give them -> DPORows, or SFTRows. Other columns are passed over.

    The reference's columns are taken as they are: `reference_gap` tells whether they are a model's. A message's content is
    text, or a list of parts that are text. InputError naming record and column: a record has none of the formats, mixes
    them, holds something else in a column, or is text and there is no tokenizer.
    """
    rows = []
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise InputError(f"record {number} is a {type(record).__name__}; expected a mapping of columns")
        try:
            rows.append(_row(record, tokenizer))
        except InputError as error:
            raise InputError(f"record {number}: {error}") from None
    kinds = {type(row) for row in rows}
    if len(kinds) > 1:
        raise InputError("some records are preferences and some are not; give each kind by itself")
    return rows


def _row(record: Mapping[str, Any], tokenizer: Tokenizer | None) -> DPORow | SFTRow:
    has = lambda *names: all(record.get(name) is not None for name in names)  # noqa: E731
    if has("prompt_ids", "chosen_ids", "rejected_ids"):
        prompt, chosen, rejected = (_integers(record, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return DPORow(prompt, chosen, rejected, _reference(record))
    if has("input_ids", "completion_mask"):
        return _masked(_integers(record, "input_ids"), _integers(record, "completion_mask", "0 and 1"))
    if has("prompt", "chosen", "rejected"):
        prompt = _prompt(record, tokenizer)
        chosen, rejected = (_answer(record, name, tokenizer) for name in ("chosen", "rejected"))
        return DPORow(prompt, chosen, rejected, _reference(record))
    if has("prompt", "completion"):
        return SFTRow(_prompt(record, tokenizer), _answer(record, "completion", tokenizer))
    columns = f"its columns are {', '.join(map(str, record))}" if record else "it has no columns"
    raise InputError(
        f"{columns}; expected prompt with chosen and rejected or with completion, "
        "or prompt_ids, chosen_ids and rejected_ids, or input_ids and completion_mask"
    )


def _integers(record: Mapping[str, Any], name: str, what: str = "token ids") -> list[int]:
    value = record[name]
    try:
        if not isinstance(value, (str, bytes)):
            return [operator.index(number) for number in value]
    except TypeError:
        pass
    raise InputError(f"{name} is {shown(value)}; expected a list of {what}")


def _masked(ids: list[int], mask: list[int]) -> SFTRow:
    """What stands before the first target is the prompt."""
    if len(ids) != len(mask) or 1 not in mask[1:]:
        raise InputError(f"completion_mask has no 1 behind the first of the {len(ids)} input_ids")
    first = mask.index(1, 1)
    rest = [bool(on) for on in mask[first:]]
    return SFTRow(ids[:first], ids[first:], None if all(rest) else rest)


def _reference(record: Mapping[str, Any]) -> tuple[float, float] | None:
    if record.get(CHOSEN) is None or record.get(REJECTED) is None:
        return None
    return _number(record, CHOSEN), _number(record, REJECTED)


def _number(record: Mapping[str, Any], name: str) -> float:
    try:
        if not isinstance(record[name], (str, bytes)):
            return float(record[name])
    except TypeError:
        pass
    raise InputError(f"{name} is {shown(record[name])}; expected a number")


def _prompt(record: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    prompt, tokenizer = record["prompt"], _needed("prompt", tokenizer)
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return tokenizer.chat(_messages("prompt", prompt))


def _answer(record: Mapping[str, Any], name: str, tokenizer: Tokenizer | None) -> list[int]:
    answer, tokenizer = record[name], _needed(name, tokenizer)
    if isinstance(answer, str):
        return [*tokenizer.encode(answer, continuation=True), tokenizer.eos_id]
    messages = _messages(name, answer)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(f"{name} is {shown(answer)}; expected one message of the assistant")
    return [*tokenizer.encode(messages[0]["content"].strip()), tokenizer.eos_id]


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise InputError(f"{name} is {shown(value)}; expected text or a list of messages")
    return [
        {key: _text(name, number, message, key) for key in ("role", "content")} for number, message in enumerate(value)
    ]


def _text(name: str, number: int, message: Mapping[str, Any], key: str) -> str:
    if key not in message:
        raise InputError(f"{name}: message {number} has no {key}")
    value = message[key]
    if isinstance(value, str):
        return value
    parts = value if key == "content" and isinstance(value, list) else []
    texts: list[Any] = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if not texts or len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: the {key} of message {number} is {shown(value)}; expected text")
    return "".join(texts)


def _needed(name: str, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"{name} needs the model's Tokenizer to become token ids; give it")
    return tokenizer
