"""Write the tiny world's tokenizer and data files into `selfreward/tiny/data`, the same bytes every time:

    python -m selfreward.tiny.make_data

ift.jsonl          {"id", "prompt", "response"}           instructions with right answers
eft.jsonl          {"id", "prompt", "answers": [{"text", "rank"}, ...]}   four answers, rank 0 the best, no ties
eft_heldout.jsonl  the same; never trained on: the judge's accuracy is measured there
heldout.jsonl      {"id", "prompt"}                       instructions for true quality
tokenizer.model    SentencePiece, one piece per word

No instruction occurs twice, in one file or in two; M0's corpus and the loop's prompts leave all of them out.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from selfreward.tiny import DATA
from selfreward.tiny.corpus import WORDS, sample_answer
from selfreward.tiny.oracle import grade
from selfreward.tiny.tasks import Instruction, random_instructions, solve

SEED = 20401
IFT_ROWS, EFT_GROUPS, EFT_HELDOUT_GROUPS, HELDOUT_ROWS = 48, 400, 150, 1500
EFT_RIGHT_SHARE = 0.40  # of the slots, before groups with equal grades are thrown back
ANSWERS_PER_GROUP = 4

Row = dict[str, Any]


def tokenizer_model() -> bytes:
    """A SentencePiece model of type `word`: ids unk 0, bos 1, eos 2, then every word of the world in its own order."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # a word's id follows its frequency, so the first word occurs most often
        sentence_iterator=iter(" ".join(WORDS[: size + 1]) for size in range(len(WORDS))),
        model_writer=model,
        model_type="word",
        vocab_size=len(WORDS) + 3,
        hard_vocab_limit=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,  # a segment that continues a text begins with its space
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def rows() -> dict[str, list[Row]]:
    """The rows of every JSONL file, by file name."""
    rng = random.Random(SEED)
    total = IFT_ROWS + EFT_GROUPS + EFT_HELDOUT_GROUPS + HELDOUT_ROWS
    fresh = iter(random_instructions(rng, total))
    return {
        "ift.jsonl": [_ift_row(number, i) for number, i in _take(fresh, IFT_ROWS)],
        "eft.jsonl": [_ranked_row(f"eft-{number:04}", i, rng) for number, i in _take(fresh, EFT_GROUPS)],
        "eft_heldout.jsonl": [
            _ranked_row(f"eft-heldout-{number:04}", i, rng) for number, i in _take(fresh, EFT_HELDOUT_GROUPS)
        ],
        "heldout.jsonl": [{"id": f"heldout-{number:04}", "prompt": i.text} for number, i in _take(fresh, HELDOUT_ROWS)],
    }


def _take(instructions: Iterator[Instruction], count: int) -> Iterator[tuple[int, Instruction]]:
    return ((number, next(instructions)) for number in range(count))


def _ift_row(number: int, instruction: Instruction) -> Row:
    return {"id": f"ift-{number:04}", "prompt": instruction.text, "response": solve(instruction)}


def _ranked_row(name: str, instruction: Instruction, rng: random.Random) -> Row:
    """Four answers in the order they were drawn, ranked by the oracle as a human would rank them, without ties."""
    while True:
        texts = [sample_answer(instruction, rng, EFT_RIGHT_SHARE).text for _ in range(ANSWERS_PER_GROUP)]
        grades = [grade(instruction.text, text) for text in texts]
        if len(set(grades)) == ANSWERS_PER_GROUP:
            break
    order = sorted(grades, reverse=True)
    answers = [{"text": text, "rank": order.index(points)} for text, points in zip(texts, grades, strict=True)]
    return {"id": name, "prompt": instruction.text, "answers": answers}


def jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="write the tiny world's tokenizer and data files")
    parser.add_argument("--out", type=Path, default=DATA)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(tokenizer_model())
    for name, content in rows().items():
        (out / name).write_text(jsonl(content), encoding="utf-8")
        print(f"{out / name}: {len(content)} rows")


if __name__ == "__main__":
    main()
