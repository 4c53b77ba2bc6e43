"""Which new prompts may join: the same as one comparison after the other says, and Self-Instruct's own words."""

import random

import pytest

from benchmarks.prompts import texts
from engine import InputError
from selfreward.filters import BLOCK, PART, Rouge, Sieve, _code, rouge_l, word_count, wording, words


def lcs(a, b):
    """Length of the longest common subsequence, by the definition."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def f_measure(a, b):
    a, b = words(a), words(b)
    return 2 * lcs(a, b) / (len(a) + len(b)) if a or b else 0.0


def one_by_one(pool, new, limit):
    """(kept, highest F against all that came before) of each text."""
    pool, found = list(pool), []
    for text in new:
        best = max((f_measure(text, other) for other in pool), default=0.0)
        found.append((best <= limit, best))
        if best <= limit:
            pool.append(text)
    return found


def some_texts(count, seed):
    """Texts of few words, so that much is alike and some of it exactly at the limit."""
    rng = random.Random(seed)
    return list(dict.fromkeys(" ".join(rng.choices("abcdefgh", k=rng.randint(1, 12))) for _ in range(count)))


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.7, 1.0])
def test_the_sieve_keeps_what_one_comparison_after_the_other_keeps(limit):
    pool, new = some_texts(40, 0), [text for text in some_texts(300, 1) if text not in set(some_texts(40, 0))]
    found = Sieve(pool, "similar", limit).sift(new)
    assert [(one.reason is None, one.rouge) for one in found] == one_by_one(pool, new, limit)
    assert {one.reason for one in found} <= {None, "similar"}
    assert all((one.like is None) == (one.reason is None) for one in found)
    assert all(f_measure(text, one.like) == one.rouge for text, one in zip(new, found) if one.like is not None)


def test_blocks_and_parts_do_not_show(monkeypatch):
    pool, new = some_texts(40, 0), some_texts(150, 2)
    whole = Sieve(pool, "similar").sift(new)
    monkeypatch.setattr("selfreward.filters.BLOCK", 7)
    monkeypatch.setattr("selfreward.filters.PART", 5)
    assert Sieve(pool, "similar").sift(new) == whole
    sieve = Sieve(pool, "similar")
    assert [one for text in new for one in sieve.sift([text])] == whole  # one call after the other
    assert BLOCK > 7 and PART > 5


def test_the_load_of_the_benchmark_is_filtered_exactly():
    pool, new = texts(60, 0), texts(120, 1)
    found = Sieve(pool, "similar").sift(new)
    plain = [one.reason in ("known", "duplicate", "near_duplicate") for one in found]
    expected = iter(one_by_one(pool, [text for text, repeated in zip(new, plain) if not repeated], 0.7))
    assert sum(one.reason == "similar" for one in found) > 0 and any(plain)
    assert all((one.reason is None, one.rouge) == next(expected) for one, repeated in zip(found, plain) if not repeated)


def test_a_measure_at_the_limit_is_not_above_it():
    shared = " ".join(f"s{i}" for i in range(7))  # 2 * 7 / 20
    a, b = (shared + " " + " ".join(f"{name}{i}" for i in range(3)) for name in "ab")
    (verdict,) = Sieve([a], "similar", 0.7).sift([b])
    assert verdict.rouge == 0.7 and verdict.reason is None
    assert Sieve([a], "similar", 0.699).sift([b])[0].reason == "similar"


def test_the_measure_is_rouge_scores_by_hand():
    rouge = Rouge()
    assert rouge.highest([rouge.spelled("a b")])[0].tolist() == [0.0]  # an empty pool
    rouge.add(rouge.spelled("The cat sat, on the mat!"))
    best, place = rouge.highest([rouge.spelled("the dog sat on a MAT"), rouge.spelled("..."), rouge.spelled("")])
    assert best.tolist() == [2 * 4 / 12, 0.0, 0.0] and place.tolist()[0] == 0
    assert rouge_l([""], [""]).tolist() == [[0.0]]  # no word is nothing in common


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't sum 3.5 to_day", ["don", "t", "sum", "3", "5", "to", "day"]),
        ("Gr\u00fc\u00dfe aus K\u00f6ln", ["gr\u00fc\u00dfe", "aus", "k\u00f6ln"]),
        ("\u041f\u0435\u0441\u043d\u044f, \u043c\u0438\u0440", ["\u043f\u0435\u0441\u043d\u044f", "\u043c\u0438\u0440"]),
        ("\u5199\u4e00\u9996\u8bd7", ["\u5199", "\u4e00", "\u9996", "\u8bd7"]),
        ("\u0926\u0940 \u092e\u0947\u0902", ["\u0926\u0940", "\u092e\u0947\u0902"]),  # vowel signs do not end a word
        ("cafe\u0301 \u2764\ufe0f tree", ["cafe\u0301", "tree"]),
        ("?!", []),
    ],
)  # fmt: skip
def test_words_are_found_in_every_script(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three colours", "too_short"),
        ("Name three bright colours", None),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "too_long"),
        ("Describe the Image above, please", "keyword"),
        ("Tell me where to go to tonight", "keyword"),
        ("Explain what imagery means to poets", None),
        ("Undo the drawing of a card", None),
        ("Write a program that sorts numbers", "program"),
        ("write A program that sorts numbers", "program"),  # the original capitalises first
        ("Write programs that sort numbers", None),
        ('"Quote" this line in full', "punctuation"),
        ("\u00c9crire un petit po\u00e8me \u00e0 Paris", "non_ascii"),
        ("\u5199\u4e00\u9996\u8bd7", "non_ascii"),  # four words
        ("\u5199\u4e00\u8bd7", "too_short"),
    ],
)
def test_self_instructs_own_rules(text, reason):
    assert wording(text) == reason


def test_word_count_is_by_blanks():
    assert word_count("don't  stop\nnow") == 3


def test_every_text_has_one_verdict_and_each_level_drops_more():
    new = ["Name four bright colours", "old one it is", "name  four bright COLOURS", "Name four bright colours", "", "a b",
           "Name four very bright colours", "Say why the sky is blue"]  # fmt: skip
    reasons = {level: [one.reason for one in Sieve({"old one it is"}, level).sift(new)] for level in
               ("none", "similar", "self_instruct")}  # fmt: skip
    assert reasons["none"] == [None, "known", None, "duplicate", "invalid", None, None, None]
    assert reasons["similar"] == [None, "known", "near_duplicate", "duplicate", "invalid", None, "similar", None]
    assert reasons["self_instruct"] == [
        *(None, "known", "near_duplicate", "duplicate", "invalid", "too_short", "similar", None)
    ]
    assert all(one.rouge is None for one in Sieve((), "none").sift(new))


def test_a_well_formedness_check_is_asked_and_what_comes_after_enough_is_not_kept():
    sieve = Sieve((), "similar", is_valid=lambda text: text != "b")
    assert [one.reason for one in sieve.sift(["a", "b", "c", "d", "e"], most=2)] == [
        None,
        "invalid",
        None,
        *["enough"] * 2,
    ]
    assert [one.reason for one in sieve.sift(["d"], most=0)] == ["enough"]
    assert [one.reason for one in sieve.sift(["d"])] == [None]  # what was not kept is new


def test_a_words_character_is_no_surrogate_and_their_number_ends():
    assert _code(0xD7FF) == 0xD7FF and _code(0xD800) == 0xE000 and _code(1_112_063) == 0x10FFFF
    with pytest.raises(InputError, match="different words"):
        _code(1_112_064)
