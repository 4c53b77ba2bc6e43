"""New prompts by example: a model is shown a numbered list of instructions and goes on with it.

Self-Instruct's way (arXiv 2212.10560), as "Self-Rewarding Language Models" uses it (section 3.1.3): eight instructions, six
of the seed data and two that were generated before. Models list several, write a separator, or begin to answer (its
appendix A.5): `listed` takes the instructions out of what was written. No models here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from engine import InputError, Tokenizer
from selfreward.filters import MAX_WORDS, word_count
from selfreward.template_files import read_template, sandbox, template_line, template_path

Row = dict[str, Any]
MARKS = ("[INST]", "[/INST]")  # of the chat layout: where one of them is written, the list is over

_NUMBER = re.compile(
    r"^[ \t>*#_-]{0,8}(?:(?:task|instruction|prompt|question)[ \t]?#?)?[ \t]?([0-9]{1,4})[ \t]?[.):](?![0-9])\**",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"\n[ \t]*\n"  # a blank line
    r"|^[ \t]*(?:[-=*_#~][ \t]?){3,}$"  # a separator
    r"|^[ \t>*#_]{0,8}(?:answer|response|output|solution|explanation|a)[ \t]?[0-9]*[ \t]?\**:"  # an answer
    r"|^[ \t>*#_]{0,8}(?:user|human|assistant|ai)[ \t]?\**:|\[/?INST\]|</?s>|<</?SYS>>",  # another turn
    re.MULTILINE | re.IGNORECASE,
)


class PromptTemplate:
    """A Jinja file that turns `instructions`, a list of texts of one line, into the text that a model continues.

    `path_or_name` is a file, or the name of a shipped template ("chat", "plain"). BOS comes before the text; a line end at
    the end of the file does not count. Where the text ends in the number of the next instruction, as the shipped ones do,
    `numbered` is true. Raises InputError naming file and line.
    """

    def __init__(self, path_or_name: str | Path) -> None:
        self.path = template_path("prompts", path_or_name)
        text, self.hash = read_template("prompts", self.path)
        self._template = self._compile(text.removesuffix("\n"))
        self.numbered = bool(re.search(r"(?<![0-9])4[ \t]?[.):]\s*$", self.text(["a", "b", "c"])))

    def _compile(self, text: str) -> jinja2.Template:
        environment, name = sandbox(), str(self.path)
        try:
            used = meta.find_undeclared_variables(environment.parse(text, name=name, filename=name))
            code = environment.compile(text, name=name, filename=name)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"prompts template {name}, line {error.lineno}: {error.message}; correct the syntax"
            ) from None
        used -= set(environment.globals)
        if used != {"instructions"}:
            raise InputError(
                f"prompts template {name} uses the variables {', '.join(sorted(used)) or '(none)'}; expected "
                "`instructions` alone, the texts to show: write {% for instruction in instructions %}"
            )
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def text(self, instructions: Sequence[str]) -> str:
        """Instructions are data: Jinja syntax in them stays as it is."""
        try:
            context = self._template.new_context({"instructions": list(instructions)})
            return "".join(self._template.root_render_func(context))
        except Exception as error:  # a user's template can raise anything; the sandbox keeps it from doing more
            line = template_line(error, self._template)
            raise InputError(f"prompts template {self.path}{line}: {error}; correct the template") from None

    def token_ids(self, tokenizer: Tokenizer, instructions: Sequence[str]) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(self.text(instructions))]


_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


def one_line(text: str) -> str:
    """As it stands in a list."""
    return " ".join(text.split())


def showable(rows: Sequence[Row]) -> list[Row]:
    """Rows whose prompt may be shown: of at most 150 words, which is also the longest that Self-Instruct keeps. A page of
    text in a list of tasks teaches nothing about the list and fills the context."""
    return [row | {"prompt": one_line(row["prompt"])} for row in rows if word_count(row["prompt"]) <= MAX_WORDS]


def shots(seed: int, seeds: Sequence[Row], generated: Sequence[Row], wanted: tuple[int, int]) -> list[Row]:
    """The rows to show in a request, in random order; a function of its arguments alone.

    wanted: how many of the seeds and how many generated ones. Seeds take the places of generated ones that there are not
    yet.
    """
    rng = random.Random(seed)  # only random() is used, whose numbers Python promises to keep
    new = _drawn(rng, generated, min(wanted[1], len(generated)))
    old = _drawn(rng, seeds, min(sum(wanted) - len(new), len(seeds)))
    return _drawn(rng, new + old, len(new) + len(old))


def _drawn(rng: random.Random, rows: Sequence[Row], count: int) -> list[Row]:
    """`count` different ones of the rows."""
    places: list[int] = []
    while len(places) < count:
        place = int(rng.random() * len(rows))
        if place not in places:
            places.append(place)
    return [rows[place] for place in places]


def stops(shown: int) -> tuple[str, ...]:
    """Strings at which a request with so many instructions ends: no more new ones than were shown, nearer to one another
    than to the list the further they go, and no talk."""
    return (*MARKS, f"\n{2 * shown + 1}.")


def listed(text: str, first: int | None, cut: bool) -> list[tuple[str, str | None]]:
    """The instructions in a completion, each on one line, with the reason why one is dropped or None.

    first: the number that the request ended in, so that the text begins within that instruction; None: it ended without
    one. cut: the completion ended at max_tokens. An instruction is numbered one above the one before it, and ends at the
    next, at a blank line, at a separator, or where an answer or another turn begins. Reasons: `preamble` (text before the
    first number), `empty`, `truncated`, `unfinished` (it ends in a colon: what it speaks of stood behind its end, or it
    announces the list). A text without numbers is one instruction; there is always at least one entry.
    """
    again = _NUMBER.match(text.lstrip())
    if first is not None and not (again and int(again[1]) == first):
        text = f"{first}. {text}"
    begins: list[re.Match[str]] = []
    for match in _NUMBER.finditer(text):
        if not begins or int(match[1]) == int(begins[-1][1]) + 1:
            begins.append(match)
    preamble = one_line(text[: begins[0].start()]) if begins else ""
    found: list[tuple[str, str | None]] = [(preamble, "preamble")] if preamble else []
    ends = [*(match.start() for match in begins[1:]), len(text)]
    bodies = [text[match.end() : end] for match, end in zip(begins, ends, strict=False)] or [text]
    for number, body in enumerate(bodies):
        end = _END.search(body := body.strip())
        instruction = _bare(one_line(body[: end.start()] if end else body))
        reason = None if instruction else "empty"
        if cut and end is None and number == len(bodies) - 1:
            reason = "truncated"
        elif instruction.endswith((":", "\uff1a")):
            reason = "unfinished"
        found.append((instruction, reason))
    return found


def _bare(text: str) -> str:
    """Without the marks of bold print and the quotes that models put around an instruction: it is dropped with them, since
    Self-Instruct's filter takes nothing that begins with punctuation."""
    if text.startswith("**") or text.endswith("**"):
        text = one_line(text.replace("**", " "))
    quoted = _QUOTED.fullmatch(text)
    return (quoted[1] or quoted[2]).strip() if quoted else text
