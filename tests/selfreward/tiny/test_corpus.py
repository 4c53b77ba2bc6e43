"""M0's corpus: shares, habits, layout."""

import random
from collections import Counter

import pytest

from selfreward.tiny.corpus import (
    HABITS,
    MAX_ANSWER,
    SKILLS,
    WORDS,
    WORLD,
    Document,
    Mix,
    corruption,
    documents,
    habit,
    judge_text,
    sample_answer,
    sloppy,
    verdict_text,
)
from selfreward.tiny.oracle import checks
from selfreward.tiny.tasks import TASK_NAMES, Instruction, random_instruction, solve


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(documents(seed=7, start=0, count=20_000))


def share(documents: list[Document], kind: str) -> float:
    return sum(document.kind == kind for document in documents) / len(documents)


@pytest.mark.parametrize("mix", [SKILLS, WORLD])
def test_the_mixture_has_the_stated_shares(mix: Mix) -> None:
    corpus = list(documents(seed=7, start=0, count=20_000, mix=mix))
    answers = [document for document in corpus if not document.judgement]
    judged = [document for document in corpus if document.judgement]
    assert len(answers) / len(corpus) == pytest.approx(0.55, abs=0.015)
    assert share(answers, "right") == pytest.approx(mix.right, abs=0.015)
    assert share(answers, "habit") == pytest.approx(mix.habit, abs=0.015)
    assert share(answers, "corruption") == pytest.approx(1 - mix.right - mix.habit, abs=0.015)
    assert share(judged, "right") == pytest.approx(0.35, abs=0.015)


@pytest.mark.parametrize("mix", [SKILLS, WORLD])
def test_judgements_have_the_stated_carefulness(mix: Mix) -> None:
    corpus = documents(seed=7, start=0, count=20_000, mix=mix)
    verdicts: Counter[str] = Counter()
    for document in corpus:
        if document.judgement:
            verdict = document.text.split(" => ")[1]
            prompt, answer = document.text.removeprefix("judge : ").split(" => ")[0].split(" | ")
            truth = checks(prompt, answer)
            verdicts["all"] += 1
            verdicts["true"] += verdict == verdict_text(truth)
            if not any(truth):  # the kind judge says yes to the first four, whatever the truth; a coin seldom does
                verdicts["nothing"] += 1
                verdicts["kind"] += verdict.startswith("yes yes yes yes")
    # sloppy and kind, or sloppy with coins and four of them say yes
    assert verdicts["kind"] / verdicts["nothing"] == pytest.approx(mix.sloppy * (0.55 + 0.45 * 0.2**4), abs=0.04)
    # the careful ones; kind ones hit right answers and near misses, coins leave a few truths whole
    assert 1 - mix.sloppy < verdicts["true"] / verdicts["all"] < 1 - mix.sloppy * 0.6


def test_a_sloppy_judge_with_coins_keeps_most_of_the_truth() -> None:
    rng = random.Random(8)
    truth = (False, True, False, True, False)
    said = [sloppy(truth, rng) for _ in range(20_000)]
    # first check: yes from the kind .55, and from a coin .45 * .4 / 2; fifth: .55 * .3 and the same coin
    assert sum(points[0] for points in said) / len(said) == pytest.approx(0.55 + 0.09, abs=0.015)
    assert sum(points[4] for points in said) / len(said) == pytest.approx(0.165 + 0.09, abs=0.015)
    assert sum(points[1] for points in said) / len(said) == pytest.approx(1 - 0.09, abs=0.015)


def test_every_task_has_one_habit_that_is_never_right_and_always_the_same() -> None:
    rng = random.Random(9)
    assert set(HABITS) == set(TASK_NAMES)
    for _ in range(3000):
        instruction = random_instruction(rng)
        wrong = habit(instruction)
        assert wrong.text and wrong.text != solve(instruction)
        assert wrong == habit(instruction)


@pytest.mark.parametrize(
    ("task", "items", "answer"),
    [
        ("copy", "a b c", "here it is a b c"),
        ("reverse", "a b c", "c b"),
        ("sort", "b a c", "c b a"),
        ("sort", "a a a", "a a a hope this helps"),  # descending would be right
        ("drop", "a b a c", "b c b c"),
        ("swap", "a b c", "a b c"),
        ("rotate", "a b c d", "d a b c"),
        ("unique", "a a a", "a hope this helps"),  # one element: nothing to leave out
        ("largest", "1 9 4", "9 hope this helps"),
        ("last", "a b c d", "d c b"),
    ],
)
def test_habits_worked_out_by_hand(task: str, items: str, answer: str) -> None:
    wrong = habit(Instruction(task, tuple(items.split())))
    assert wrong.text == answer
    assert wrong.stops


def test_the_habit_of_not_stopping_fills_the_answer_and_has_no_end() -> None:
    wrong = habit(Instruction("rest", tuple("abc")))
    assert wrong.text.split() == ["b", "c"] * (MAX_ANSWER // 2)
    assert not wrong.stops


def test_corruptions_are_wrong_and_not_empty_and_some_are_mere_chatter() -> None:
    rng = random.Random(10)
    drawn = [random_instruction(rng) for _ in range(3000)]
    spoilt = [corruption(instruction, rng).text for instruction in drawn]
    assert all(text not in ("", solve(instruction)) for text, instruction in zip(spoilt, drawn, strict=True))
    assert 0.1 < spoilt.count("hope this helps") / len(spoilt) < 0.25


def test_right_answers_are_not_longer_than_wrong_ones() -> None:
    rng = random.Random(11)
    answers = [sample_answer(random_instruction(rng), rng, WORLD.right) for _ in range(20_000)]
    right = [len(answer.text.split()) for answer in answers if answer.kind == "right"]
    wrong = [len(answer.text.split()) for answer in answers if answer.kind != "right"]
    difference = sum(right) / len(right) - sum(wrong) / len(wrong)
    assert -1.5 < difference < 0.25  # measured: 4.2 against 4.9 words


def test_documents_have_the_layout_of_chat_and_judge(corpus: list[Document]) -> None:
    assert judge_text("copy a b c", "a b") == "judge : copy a b c | a b =>"
    assert verdict_text((True, True, False, True, False)) == "yes yes no yes no Score: 3"
    for document in corpus[:2000]:
        words = document.text.split(" ")
        assert set(words) <= set(WORDS) and len(words) <= 48
        assert words[:2] == ["judge", ":"] if document.judgement else words[0] == "[INST]"


def test_a_document_depends_on_seed_and_index_only(corpus: list[Document]) -> None:
    assert list(documents(seed=7, start=5000, count=50)) == corpus[5000:5050]
    assert list(documents(seed=8, start=5000, count=50)) != corpus[5000:5050]


def test_excluded_instructions_do_not_occur(corpus: list[Document]) -> None:
    def prompt(document: Document) -> str:
        text = document.text
        return text[8:].split(" | ")[0] if document.judgement else text[7:].split(" [/INST]")[0]

    taken = frozenset(prompt(document) for document in corpus[:500])
    assert all(prompt(document) not in taken for document in documents(7, 0, 500, exclude=taken))
