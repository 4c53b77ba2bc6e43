"""The tiny world: a stand-in for instructions, humans and truth, small enough that a program can grade every answer.

The loop may use `is_valid` (is this text an instruction at all?) and `reserved_prompts` (which ones are taken); `grade`
is the truth, for reports and tests only.
"""

from __future__ import annotations

import json
from pathlib import Path

from selfreward.tiny.oracle import grade
from selfreward.tiny.tasks import parse, solve

DATA = Path(__file__).parent / "data"

__all__ = ["DATA", "grade", "is_valid", "parse", "reserved_prompts", "solve"]


def is_valid(text: str) -> bool:
    """Whether `text` is a well-formed instruction, spelt as the world spells it. Says nothing about answers."""
    instruction = parse(text)
    return instruction is not None and instruction.text == text


def reserved_prompts() -> frozenset[str]:
    """The instructions of every data file: M0's corpus and the loop's new prompts leave them out."""
    files = ("ift.jsonl", "eft.jsonl", "eft_heldout.jsonl", "heldout.jsonl")
    lines = (line for name in files for line in (DATA / name).read_text(encoding="utf-8").splitlines())
    return frozenset(json.loads(line)["prompt"] for line in lines)
