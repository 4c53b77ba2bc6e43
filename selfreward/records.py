"""The formats in which people keep instructions, conversations and preferences, all read into one kind of record.

What each format looks like is in docs/data.md. A format is recognised row by row, by the keys that a row has.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

Row = dict[str, Any]
Turn = tuple[str, str]  # role ("user" or "assistant"), text


@dataclass(frozen=True)
class Record:
    """What was asked, and the answers to it. A system message stands in the prompt, as Llama 2's layout has it."""

    prompt: str
    answers: tuple[Answer, ...] = ()  # none: a prompt by itself
    id: str | None = None
    language: str | None = None
    later_turns: int = 0  # of the conversation, left out
    unread: Refused | None = None  # why the answers are not read; the prompt is all the same


class Answer(NamedTuple):
    text: str
    rank: int  # 0 the best; equal ranks are equals


class Refused(Exception):
    """A row that gives no record. `broken`: it is not what its format says; else it is well-formed and of no use."""

    def __init__(self, reason: str, said: str, broken: bool = True) -> None:
        super().__init__(said)
        self.reason, self.said, self.broken = reason, said, broken


# ---------------------------------------------------------------------------------------------------------------------
# Which format


def format_of(row: Any) -> str | None:
    """The first of FORMATS whose keys the row has (null is as good as missing), or None."""
    return next((name for name, (recognised, _) in FORMATS.items() if recognised(row)), None)


def read_record(row: Any, name: str) -> Record:
    """The row as a record, read as this format. Refused says why it gives none."""
    if name != "text" and not isinstance(row, dict):
        raise Refused("wrong_type", f"the row is {kind(row)}; expected a JSON object")
    return FORMATS[name][1](row)


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda row: isinstance(row, dict) and all(row.get(key) is not None for key in keys)


def _is_tree(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("prompt"), dict)


def _is_conversational(row: Any) -> bool:
    return _has("prompt", "chosen", "rejected")(row) and isinstance(row["chosen"], list)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def _answered(prompt: str, id: str | None, answers: Callable[[], tuple[Answer, ...]], **more: Any) -> Record:
    """A record whose prompt may be used though its answers cannot be read: what is wrong with them is kept."""
    try:
        return Record(prompt, answers(), id, **more)
    except Refused as why:
        return Record(prompt, id=id, unread=why, **more)


def _text_row(row: Any) -> Record:
    return Record(_text({"prompt": row}, "prompt"))


def _prompt_row(row: Row) -> Record:
    key = next((key for key in ("prompt", "text", "instruction") if row.get(key) is not None), "prompt")
    if isinstance(row.get(key), list):
        system, turns = _conversation(row, key)
        return Record(_asked(system, turns), id=_id(row))
    if key == "instruction":
        return Record(_instruction(row), id=_id(row))
    return Record(_text(row, key), id=_id(row))


def _tree(row: Row) -> Record:
    """An Open Assistant tree: the first prompt and its ranked replies; deleted ones and the turns below are left out."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Refused("wrong_type", f"'prompt' is {kind(root)}; expected the root message of an Open Assistant tree")
    if root.get("deleted") is True:
        raise Refused("deleted", "the tree's first message is deleted", broken=False)
    asked = (_text(root, "text"), _id(row, "message_tree_id"))
    return _answered(*asked, lambda: _replies(root.get("replies")), language=_optional(root, "lang"))


def _replies(replies: Any) -> tuple[Answer, ...]:
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise Refused("wrong_type", f"'prompt.replies' is {kind(replies)}; expected a list of messages")
    ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("deleted") is not True]
    if not ranked:
        raise Refused("no_ranked_reply", f"of the tree's {len(replies)} replies none is ranked", broken=False)
    return tuple(Answer(_text(reply, "text"), _rank(reply)) for reply in ranked)


def _ranked(row: Row) -> Record:
    return _answered(_text(row, "prompt"), _id(row), lambda: _ranked_answers(row.get("answers")))


def _ranked_answers(answers: Any) -> tuple[Answer, ...]:
    if not isinstance(answers, list):
        raise Refused("wrong_type", f"'answers' is {kind(answers)}; expected a list of objects with 'text' and 'rank'")
    for place, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise Refused(
                "wrong_type", f"'answers[{place}]' is {kind(answer)}; expected an object with 'text' and 'rank'"
            )
    if len(answers) < 2:
        found = "one entry" if answers else "no entries"
        raise Refused("one_answer", f"'answers' has {found}; expected two or more")
    return tuple(Answer(_text(answer, "text", may_be_empty=True), _rank(answer)) for answer in answers)


def _completion(row: Row) -> Record:
    """TRL's prompt and completion, text or messages; `response` is another name for the completion."""
    if isinstance(row.get("prompt"), list):
        return _answered(_asked(*_conversation(row, "prompt")), _id(row), lambda: _completed(row, _answer))
    return _answered(_text(row, "prompt"), _id(row), lambda: _completed(row, _text))


def _completed(row: Row, read: Callable[[Row, str], str]) -> tuple[Answer, ...]:
    if row.get("label") is False:
        raise Refused("labelled_bad", "'label' is false: the answer is an example of a bad one", broken=False)
    return (Answer(read(row, "response" if row.get("completion") is None else "completion"), 0),)


def _preference(row: Row) -> Record:
    """TRL's chosen and rejected: text or messages, the prompt beside them or, implicit, what both begin with."""
    if isinstance(row.get("chosen"), list) or isinstance(row.get("prompt"), list):
        return _messages_preference(row)
    if row.get("prompt") is not None:
        return _answered(_text(row, "prompt"), _id(row), lambda: _pair(*_texts(row)))
    prompt, chosen, rejected = _common_start(*_texts(row))
    if not prompt.strip():
        raise Refused("empty", "'chosen' and 'rejected' begin with no common prompt, and there is none beside them")
    return _answered(prompt, _id(row), lambda: _pair(chosen, rejected))


def _texts(row: Row) -> tuple[str, str]:
    return _text(row, "chosen"), _text(row, "rejected", may_be_empty=True)


def _messages_preference(row: Row) -> Record:
    """Messages whose prompt is a list beside them, or what both begin with (then a prompt as text is a copy of it)."""
    if isinstance(row.get("prompt"), list):
        return _answered(_asked(*_conversation(row, "prompt")), _id(row), lambda: _pair(*_messages(row)))
    (system, chosen), (_, rejected) = _conversation(row, "chosen"), _conversation(row, "rejected")
    shared = _in_common(chosen, rejected)
    if shared == len(chosen) == len(rejected):
        raise Refused("identical", "'chosen' and 'rejected' are the same", broken=False)
    asked = chosen[: min(shared, len(chosen) - 1, len(rejected) - 1)]
    if [len(chosen) - len(asked), len(rejected) - len(asked)] != [1, 1]:
        raise Refused("several_turns", "'chosen' and 'rejected' differ in more than the last message", broken=False)
    return _answered(_asked(system, asked), _id(row), lambda: _pair(chosen[-1][1], rejected[-1][1]))


def _messages(row: Row) -> tuple[str, str]:
    return _answer(row, "chosen"), _answer(row, "rejected")


def _common_start(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts with one beginning.

    As TRL does, the longest common beginning without a space at its end is the prompt, but only whole words of it (TRL
    would leave "our." of "Four." after "Five."); answers that begin alike lose these words to the prompt. Where the texts
    are dialogues ("Human: ... Assistant: ..."), the prompt ends at the last mark that both have.
    """
    start = chosen[: _in_common(chosen, rejected)]
    if chosen == rejected:
        raise Refused("identical", "'chosen' and 'rejected' are the same", broken=False)
    human, assistant = "\n\nHuman:", "\n\nAssistant:"
    if start.startswith(human) and assistant in start:
        end = start.rindex(assistant)
        asked = start[len(human) : end]
        if human in asked or human in chosen[end:] or human in rejected[end:]:
            raise Refused("several_turns", "the dialogue has several turns", broken=False)
        return asked.strip(), chosen[end + len(assistant) :].strip(), rejected[end + len(assistant) :].strip()
    if any(re.match(r"\w\w", start[-1:] + text[len(start) :][:1]) for text in (chosen, rejected)):
        start = re.sub(r"\S+$", "", start)
    start = start.removesuffix(" ")
    return start, chosen[len(start) :], rejected[len(start) :]


def _in_common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _pair(chosen: str, rejected: str) -> tuple[Answer, ...]:
    if not chosen.strip():
        raise Refused("empty", "'chosen' is empty; write the text or remove the row")
    if chosen == rejected:
        raise Refused("identical", "'chosen' and 'rejected' are the same", broken=False)
    return Answer(chosen, 0), Answer(rejected, 1)


def _chat(row: Row) -> Record:
    return _first_exchange(row, "messages")


def _sharegpt(row: Row) -> Record:
    return _first_exchange(row, "conversations")


def _sharegpt_preference(row: Row) -> Record:
    return _answered(_asked(*_conversation(row, "conversations")), _id(row), lambda: _pair(*_messages(row)))


def _pandalm(row: Row) -> Record:
    """PandaLM's test set: two answers and three people's votes (1 or 2: the better answer, 0: equals); most votes decide."""
    return _answered(_instruction(row), _id(row, "idx"), lambda: _voted(row))


def _voted(row: Row) -> tuple[Answer, ...]:
    votes = [_choice(row, f"annotator{number}", (0, 1, 2)) for number in (1, 2, 3)]
    vote, count = Counter(votes).most_common(1)[0]
    answers = tuple(_text(row, f"response{number}", may_be_empty=True) for number in (1, 2))
    if count < 2:
        raise Refused("undecided", f"the three annotators say {votes}; no two agree", broken=False)
    return _two(answers, vote)


def _llmbar(row: Row) -> Record:
    """LLMBar: two outputs for one input, and which is the better one."""
    return _answered(_text(row, "input"), _id(row), lambda: _labelled(row))


def _labelled(row: Row) -> tuple[Answer, ...]:
    answers = tuple(_text(row, f"output_{number}", may_be_empty=True) for number in (1, 2))
    return _two(answers, _choice(row, "label", (1, 2)))


def _two(texts: Sequence[str], better: int) -> tuple[Answer, ...]:
    """Two answers of which the first or the second (1, 2) is better, or neither (0)."""
    return tuple(Answer(text, int(better not in (0, number))) for number, text in enumerate(texts, start=1))


def _alpaca(row: Row) -> Record:
    return _answered(_instruction(row), _id(row), lambda: (Answer(_text(row, "output"), 0),))


def _alpaca_preference(row: Row) -> Record:
    return _answered(_instruction(row), _id(row), lambda: _pair(*_texts(row)))


# Name -> (is it this format, its reader). The first that fits is taken, so what has more keys stands first.
FORMATS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Record]]] = {
    "text": (lambda row: isinstance(row, str), _text_row),
    "open_assistant": (_is_tree, _tree),
    "ranked": (_has("prompt", "answers"), _ranked),
    "pandalm": (_has("instruction", "response1", "response2", "annotator1"), _pandalm),
    "llmbar": (_has("input", "output_1", "output_2", "label"), _llmbar),
    "sharegpt_preference": (_has("conversations", "chosen", "rejected"), _sharegpt_preference),
    "alpaca_preference": (_has("instruction", "chosen", "rejected"), _alpaca_preference),
    "preference_conversational": (_is_conversational, _preference),
    "preference": (_has("prompt", "chosen", "rejected"), _preference),
    "preference_implicit": (_has("chosen", "rejected"), _preference),
    "messages": (_has("messages"), _chat),
    "sharegpt": (_has("conversations"), _sharegpt),
    "prompt_completion": (
        lambda row: _has("prompt", "completion")(row) or _has("prompt", "response")(row),
        _completion,
    ),
    "alpaca": (_has("instruction", "output"), _alpaca),
    "prompt": (lambda row: any(_has(key)(row) for key in ("prompt", "text", "instruction")), _prompt_row),
}


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}


def _first_exchange(row: Row, key: str) -> Record:
    """The first question with its answer; what comes later is counted and left out, as the paper does with its data."""
    system, turns = _conversation(row, key)
    if len(turns) < 2:
        return Record(_asked(system, turns), id=_id(row))
    return Record(_asked(system, turns[:1]), (Answer(turns[1][1], 0),), _id(row), later_turns=len(turns) - 2)


def _conversation(row: Row, key: str) -> tuple[str | None, list[Turn]]:
    """(system message, turns): user and assistant in turn, the user first."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        empty = isinstance(messages, list) and not messages
        raise Refused("wrong_type", f"'{key}' is {'an empty list' if empty else kind(messages)}; expected messages")
    turns = [_message(message, f"{key}[{place}]") for place, message in enumerate(messages)]
    system = turns.pop(0)[1] if turns[0][0] == "system" else _system(row)
    for place, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            said = f"turn {place + 1} of '{key}' is by the {role}; expected the {expected}"
            raise Refused("turn_order", said, broken=False)
    if not turns:
        raise Refused("turn_order", f"'{key}' has no message by the user", broken=False)
    return system, turns


def _message(message: Row, name: str) -> Turn:
    """{"role", "content"}, or ShareGPT's {"from", "value"}. Content may be a list of parts that are all text."""
    by, said = ("role", "content") if message.get("from") is None else ("from", "value")
    role, content = message.get(by), message.get(said)
    if not isinstance(role, str):
        raise Refused("wrong_type", f"'{name}.{by}' is {kind(role)}; expected a string")
    if role.lower() not in ROLES:
        raise Refused("role", f"'{name}' is by {role[:40]!r}; read are {', '.join(ROLES)}", broken=False)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Refused("not_text", f"'{name}.{said}' has parts that are no text", broken=False)
        content = "".join(part["text"] for part in content)
    return ROLES[role.lower()], _text({said: content}, said, name=f"{name}.{said}", may_be_empty=role == "assistant")


def _asked(system: str | None, turns: Sequence[Turn]) -> str:
    """The one question of a conversation that waits for its answer."""
    if not turns or turns[-1][0] != "user":
        raise Refused("turn_order", "the prompt does not end with the user's message", broken=False)
    if len(turns) > 1:
        raise Refused("several_turns", f"the prompt has {len(turns)} turns; the loop asks once", broken=False)
    return with_system(system, turns[0][1])


def with_system(system: str | None, prompt: str) -> str:
    """The prompt with a system message as Llama 2's layout writes it, so that its ids are those of the two messages."""
    return prompt if not system or not system.strip() else f"<<SYS>>\n{system.strip()}\n<</SYS>>\n\n{prompt.strip()}"


def _answer(row: Row, key: str) -> str:
    """An answer as text, as a message, or as a list of one message."""
    value = row.get(key)
    if isinstance(value, str):
        return _text(row, key, may_be_empty=True)
    messages = value if isinstance(value, list) else [value]
    if len(messages) > 1:
        raise Refused("several_turns", f"'{key}' has {len(messages)} messages; expected one", broken=False)
    if not messages or not isinstance(messages[0], dict):
        raise Refused("wrong_type", f"'{key}' is {kind(value)}; expected text or a message of the assistant")
    role, text = _message(messages[0], key)
    if role != "assistant":
        raise Refused("turn_order", f"'{key}' is by the {role}; expected the assistant", broken=False)
    return text


def _instruction(row: Row) -> str:
    """Alpaca's instruction, and below it its input if there is one."""
    if row.get("history"):
        raise Refused("several_turns", "'history' holds earlier turns; the loop asks once", broken=False)
    text, given = _text(row, "instruction"), row.get("input")
    if given is not None:
        given = _text(row, "input", may_be_empty=True)
    return with_system(_system(row), f"{text}\n{given}" if given and given.strip() else text)


def _system(row: Row) -> str | None:
    return None if row.get("system") is None else _text(row, "system", may_be_empty=True)


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def text_field(row: Row, key: str, may_be_empty: bool = False) -> str:
    """A field that must be text which a file can hold. Refused says what it is instead."""
    return _text(row, key, may_be_empty)


def _text(row: Row, key: str, may_be_empty: bool = False, name: str = "") -> str:
    name, value = name or key, row.get(key)
    if not isinstance(value, str):
        raise Refused("missing" if value is None else "wrong_type", f"'{name}' is {kind(value)}; expected a string")
    if not may_be_empty and not value.strip():
        raise Refused("empty", f"'{name}' is empty; write the text or remove the row")
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can spell these, UTF-8 cannot
        raise Refused("surrogate", f"'{name}' holds half of a surrogate pair; expected text that UTF-8 can encode")
    return value


def _rank(answer: Row) -> int:
    rank = answer.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise Refused("wrong_type", f"'rank' is {kind(rank)}; expected an integer, 0 the best")
    return rank


def _choice(row: Row, key: str, choices: Sequence[int]) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value not in choices:
        said = f"'{key}' is {kind(value)}; expected {', '.join(map(str, choices[:-1]))} or {choices[-1]}"
        raise Refused("missing" if value is None else "wrong_type", said)
    return value


def _id(row: Row, *names: str) -> str | None:
    """The first of these that the row has: a string or an integer."""
    for name in (*names, "id", "prompt_id", "conversation_id"):
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return _text({name: str(value)}, name)
        if value is not None:
            raise Refused("wrong_type", f"'{name}' is {kind(value)}; expected a string or an integer")
    return None


def _optional(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key)


def kind(value: Any) -> str:
    """What a value is, in words that name the value where it is short."""
    if value is None:
        return "missing or null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"  # Parquet knows dates and bytes


def unknown(row: Any) -> NoReturn:
    """The refusal of a row that has no format's keys."""
    found = f"an object with the keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else kind(row)
    raise Refused("unknown_format", f"the row is {found}, a format that is not read; read here: {', '.join(FORMATS)}")


def renamed(record: Record, name: str) -> Record:
    return record if record.id is not None else replace(record, id=name)
