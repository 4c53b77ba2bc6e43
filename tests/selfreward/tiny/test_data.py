"""The shipped data files and tokenizer: made again byte for byte, disjoint, correctly ranked, every word a piece."""

import json
from collections import Counter
from typing import Any

import pytest
import sentencepiece

from engine import Tokenizer
from selfreward.tiny import DATA, grade, is_valid, reserved_prompts
from selfreward.tiny.corpus import WORDS, answer_text, documents, judge_text, verdict_text
from selfreward.tiny.make_data import jsonl, rows, tokenizer_model

FILES = ("ift.jsonl", "eft.jsonl", "eft_heldout.jsonl", "heldout.jsonl")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_the_shipped_rows_are_what_make_data_writes() -> None:
    made = rows()
    assert set(made) == set(FILES)
    for name in FILES:
        assert (DATA / name).read_bytes() == jsonl(made[name]).encode(), name


def test_the_shipped_tokenizer_has_the_pieces_that_make_data_trains() -> None:
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    made = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())
    assert [shipped.id_to_piece(i) for i in range(len(shipped))] == [made.id_to_piece(i) for i in range(len(made))]


def test_no_instruction_occurs_twice_in_any_file() -> None:
    prompts = Counter(row["prompt"] for name in FILES for row in read(name))
    assert max(prompts.values()) == 1
    assert reserved_prompts() == frozenset(prompts)
    assert all(is_valid(prompt) for prompt in prompts)


def test_every_row_has_an_id_of_its_own() -> None:
    ids = [row["id"] for name in FILES for row in read(name)]
    assert len(set(ids)) == len(ids)


def test_files_hold_as_many_rows_as_the_loop_needs() -> None:
    assert len(read("ift.jsonl")) == 48
    assert len(read("eft.jsonl")) >= 120
    assert len(read("eft_heldout.jsonl")) >= 100
    assert len(read("heldout.jsonl")) >= 1200


def test_ift_responses_are_right() -> None:
    assert all(grade(row["prompt"], row["response"]) == 5 for row in read("ift.jsonl"))


@pytest.mark.parametrize("name", ["eft.jsonl", "eft_heldout.jsonl"])
def test_ranks_follow_the_oracle_without_ties_and_not_the_order_of_drawing(name: str) -> None:
    first: Counter[int] = Counter()
    for row in read(name):
        ranked = sorted(row["answers"], key=lambda answer: answer["rank"])
        assert [answer["rank"] for answer in ranked] == [0, 1, 2, 3]
        grades = [grade(row["prompt"], answer["text"]) for answer in ranked]
        assert grades == sorted(set(grades), reverse=True) and len(grades) == 4
        first[row["answers"][0]["rank"]] += 1
    assert min(first[rank] for rank in range(4)) > 0.1 * len(read(name))


def test_longer_wins_is_a_weak_judge_of_the_heldout_groups() -> None:
    pairs = [
        (len(better["text"].split()), len(worse["text"].split()))
        for row in read("eft_heldout.jsonl")
        for better in row["answers"]
        for worse in row["answers"]
        if better["rank"] < worse["rank"]
    ]
    assert 0.3 < sum(better > worse for better, worse in pairs) / len(pairs) < 0.6


def test_every_word_is_one_piece_and_no_piece_is_left_over() -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    assert [model.encode(word) for word in WORDS] == [[3 + place] for place in range(len(WORDS))]
    assert len(model) == 3 + len(WORDS) and 50 <= len(model) <= 64


def test_text_is_tokenised_alike_in_segments_and_as_a_whole() -> None:
    tokenizer = Tokenizer(DATA / "tokenizer.model")
    whole = tokenizer.encode(judge_text("copy a b c", "a b") + " " + verdict_text((True, True, False, True, False)))
    parts = ["judge :", " copy a b c", " | a b", " =>", " yes yes no yes no Score: 3"]
    assert [token for i, part in enumerate(parts) for token in tokenizer.encode(part, continuation=i > 0)] == whole
    chat = tokenizer.chat_prompt("copy a b c") + tokenizer.encode(" a b c", continuation=True)
    assert chat == [tokenizer.bos_id, *tokenizer.encode(answer_text("copy a b c", "a b c"))]


def test_documents_survive_the_tokenizer() -> None:
    tokenizer = Tokenizer(DATA / "tokenizer.model")
    for document in documents(seed=12, start=0, count=500):
        ids = tokenizer.encode(document.text)
        assert tokenizer.unk_id not in ids and len(ids) == len(document.text.split())
        assert tokenizer.decode(ids) == document.text
