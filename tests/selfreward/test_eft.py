"""Judge data by the paper's procedure: what agrees with the ranks is kept, everything else is a row with its reason."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from selfreward.eft import DROPPED, select, thin
from selfreward.formats import as_group, read_file

Row = dict[str, Any]


def group(name: str, *ranks: int) -> Row:
    return {"id": name, "prompt": f"ask {name}", "answers": [{"text": f"a{i}", "rank": r} for i, r in enumerate(ranks)]}


def judged(name: str, attempts: list[list[float | None]]) -> list[list[Row]]:
    """[answer][attempt], from the scores of each attempt."""
    return [
        [
            {"id": f"{name}-{answer}-{draw}", "score": scores[answer], "text": f"t{draw}", "token_ids": [draw]}
            for draw, scores in enumerate(attempts)
        ]
        for answer in range(len(attempts[0]))
    ]


def test_the_first_attempt_that_agrees_is_kept_and_every_other_judgement_says_why_not() -> None:
    attempts: list[list[float | None]] = [[2.0, 4.0], [3.0, 3.0], [None, 1.0], [4.0, 2.0], [5.0, 1.0]]
    train, dropped, counts = select([group("g", 0, 1)], {"g": judged("g", attempts)})
    assert [(row["id"], row["score"], row["judgement_id"], row["attempt"]) for row in train] == [
        ("g-0", 4.0, "g-0-3", 3),
        ("g-1", 2.0, "g-1-3", 3),
    ]
    assert [(row["judgement_id"], row["reason"]) for row in dropped] == [
        (f"g-{answer}-{draw}", reason)
        for draw, reason in ((0, "order"), (1, "tie"), (2, "unreadable"), (4, "enough"))
        for answer in (0, 1)
    ]
    assert all(tuple(row) == DROPPED for row in dropped)
    expected = {"order": 1, "tie": 1, "unreadable": 1, "kept": 1, "enough": 1, "judgements": 10, "groups_kept": 1}
    assert +counts == expected


def test_equal_ranks_prove_nothing_and_may_have_any_scores_beside_others() -> None:
    none, dropped, _ = select([group("g", 1, 1)], {"g": judged("g", [[4.0, 2.0]])})
    assert none == [] and {row["reason"] for row in dropped} == {"no_ranks"}
    kept, _, _ = select([group("g", 0, 1, 1)], {"g": judged("g", [[5.0, 1.0, 4.0]])})
    assert len(kept) == 3


def test_the_most_common_score_is_thinned_to_the_second_most_common_last_ones_first() -> None:
    rows = [{"n": n, "score": score} for n, score in enumerate([4.0, 4.0, 2.0, 4.0, 1.0, 2.0])]
    left, gone = thin(rows)
    assert [row["n"] for row in gone] == [3] and [row["n"] for row in left] == [0, 1, 2, 4, 5]
    assert thin(rows[:2]) == (rows[:2], [])  # one score alone: nothing to even out


SCORES = st.sampled_from([None, 0.0, 1.0, 2.0, 3.5, 4.0, 5.0])


@given(data=st.data(), ranks=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=4), max_size=5))
def test_every_judgement_is_kept_or_dropped_once(data: st.DataObject, ranks: list[list[int]]) -> None:
    groups = [group(f"g{i}", *each) for i, each in enumerate(ranks)]
    attempts = data.draw(st.integers(1, 4))
    drawn = {
        g["id"]: judged(
            g["id"],
            data.draw(st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=attempts, max_size=attempts)),
        )
        for g, n in zip(groups, map(len, ranks), strict=True)
    }
    train, dropped, counts = select(groups, drawn)
    given_ids = Counter(row["id"] for answers in drawn.values() for rows in answers for row in rows)
    assert Counter(row["judgement_id"] for row in (*train, *dropped)) == given_ids
    assert sum(given_ids.values()) == counts["judgements"]
    for g in groups:
        kept = {row["rank"]: row["score"] for row in train if row["group"] == g["id"]}
        assert all(kept[a] > kept[b] for a in kept for b in kept if a < b)


def test_the_open_assistant_trees_under_a_judge_that_is_often_right(test_data: Path) -> None:
    """Counts of every step with scores from a seed, where the true order shows in about half of the attempts."""
    groups = read_file(test_data / "oasst/en_100_tree.jsonl", as_group).rows
    chance = random.Random(0)
    drawn = {
        g["id"]: judged(
            g["id"],
            [
                [float(max(0, min(5, 4 - a["rank"] + chance.choice((-1, 0, 0, 0, 1))))) for a in g["answers"]]
                for _ in range(6)
            ],
        )
        for g in groups
    }
    train, dropped, counts = select(groups, drawn)
    assert counts["judgements"] == 330 * 6 == len(train) + len(dropped)
    assert counts["groups_kept"] + counts["groups_without_agreement"] == 99
    assert sum(counts[reason] for reason in ("kept", "enough", "order", "tie")) == 99 * 6
    assert counts["kept"] == counts["groups_kept"] == 90 and counts["thinned"] == len(
        [row for row in dropped if row["reason"] == "thinned"]
    )
