"""TRL's data formats as rows: what trains there trains here.

    preference            prompt, chosen, rejected; beside them, if known, ref_chosen_logps and ref_rejected_logps
    prompt-completion     prompt, completion
each of them as text ("standard"), as lists of messages ("conversational"), or as token ids under TRL's own names after its
tokenisation: prompt_ids, chosen_ids, rejected_ids; and input_ids with completion_mask.

Text is tokenised as TRL does it with a Llama tokenizer, BOS before the prompt and EOS behind the answer, but prompt and
answer apart: a prompt's tokens are never merged with an answer's. Messages get Llama 2's chat layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import InputError
from engine.tokenizer import Tokenizer
from engine.train.batches import DPORow, SFTRow
from engine.train.reference import CHOSEN, REJECTED


def rows_from_trl(records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer | None = None) -> list[Any]:
    """Records as JSON or `datasets` give them -> DPORows, or SFTRows. Other columns are passed over.

    The reference's columns are taken as they are: `reference_gap` tells whether they are a model's. InputError: a record
    has none of the formats, mixes them, or is text and there is no tokenizer.
    """
    rows = [_row(number, record, tokenizer) for number, record in enumerate(records)]
    kinds = {type(row) for row in rows}
    if len(kinds) > 1:
        raise InputError("some records are preferences and some are not; give each kind by itself")
    return rows


def _row(number: int, record: Mapping[str, Any], tokenizer: Tokenizer | None) -> DPORow | SFTRow:
    has = lambda *names: all(record.get(name) is not None for name in names)  # noqa: E731
    if has("prompt_ids", "chosen_ids", "rejected_ids"):
        prompt, chosen, rejected = (list(record[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return DPORow(prompt, chosen, rejected, _reference(record))
    if has("input_ids", "completion_mask"):
        return _masked(number, list(record["input_ids"]), list(record["completion_mask"]))
    if has("prompt", "chosen", "rejected"):
        prompt = _prompt(number, record["prompt"], tokenizer)
        chosen, rejected = (_answer(number, name, record[name], tokenizer) for name in ("chosen", "rejected"))
        return DPORow(prompt, chosen, rejected, _reference(record))
    if has("prompt", "completion"):
        prompt = _prompt(number, record["prompt"], tokenizer)
        return SFTRow(prompt, _answer(number, "completion", record["completion"], tokenizer))
    raise InputError(
        f"record {number} has {', '.join(record) or 'nothing'}; expected prompt with chosen and rejected or with completion, "
        "or prompt_ids, chosen_ids and rejected_ids, or input_ids and completion_mask"
    )


def _masked(number: int, ids: list[int], mask: list[int]) -> SFTRow:
    """What stands before the first target is the prompt."""
    if len(ids) != len(mask) or 1 not in mask[1:]:
        raise InputError(f"record {number}: completion_mask has no 1 behind the first of the {len(ids)} input_ids")
    first = mask.index(1, 1)
    rest = [bool(on) for on in mask[first:]]
    return SFTRow(ids[:first], ids[first:], None if all(rest) else rest)


def _reference(record: Mapping[str, Any]) -> tuple[float, float] | None:
    if record.get(CHOSEN) is None or record.get(REJECTED) is None:
        return None
    return float(record[CHOSEN]), float(record[REJECTED])


def _prompt(number: int, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    tokenizer = _needed(number, tokenizer)
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return tokenizer.chat(_messages(number, "prompt", prompt))


def _answer(number: int, name: str, answer: Any, tokenizer: Tokenizer | None) -> list[int]:
    tokenizer = _needed(number, tokenizer)
    if isinstance(answer, str):
        return [*tokenizer.encode(answer, continuation=True), tokenizer.eos_id]
    messages = _messages(number, name, answer)
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise InputError(f"record {number}: {name} is {answer!r}; expected one message of the assistant")
    return [*tokenizer.encode(str(messages[0]["content"]).strip()), tokenizer.eos_id]


def _messages(number: int, name: str, value: Any) -> list[Mapping[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise InputError(f"record {number}: {name} is a {type(value).__name__}; expected text or a list of messages")
    return value


def _needed(number: int, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"record {number} is text; give the model's Tokenizer")
    return tokenizer
