"""The parser against what judges really write; the template against what users write."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InputError, Tokenizer
from selfreward.judge import STATUSES, Judgement, JudgeTemplate, judge_status, mean_score, parse_score
from tests.selfreward.linear_time import assert_linear

DATA = os.environ.get("SELFREWARD_TEST_DATA")

READ = [
    # explicit totals
    ("Score: 4", 4),
    ("score: 4", 4),
    ("SCORE:4", 4),
    ("Score : 4", 4),
    ("Score: 4.", 4),
    ("Score: 4/5", 4),
    ("Score: 4 / 5", 4),
    ("Score: **4**", 4),
    ("**Score:** 4", 4),
    ("**Score: 4**", 4),
    ("**Score**: **4/5**", 4),
    ("Score: <4>", 4),
    ("<score>4</score>", 4),
    ("Score: [4]", 4),
    ("Rating: [[4]]", 4),
    ('Score: "4"', 4),
    ('{"reasoning": "fine", "score": 4}', 4),
    ("Score: $\\boxed{4}$", 4),
    ("Score \u2013 4", 4),
    ("Score - 4", 4),
    ("Score \u2014 4", 4),
    ("Score-4", 4),
    ("Score = 4", 4),
    ("Score -> 4", 4),
    ("Score 4", 4),
    ("(Score 4)", 4),
    ("Score:4", 4),
    ("Score: 4 points", 4),
    ("Score: 4 points.", 4),
    ("Score: 4 points out of 5", 4),
    ("Score: 4 of 5", 4),
    ("Score (out of 5): 4", 4),
    ("Score (0-5): 4", 4),
    ("Score out of 5: 4", 4),
    ("Score: (4/5)", 4),
    ("Score:\n4", 4),
    ("**Score:**\n\n4\n", 4),
    ("Score:\n4/5", 4),
    ("### Final score\nTotal: 4", 4),
    ("Score: 0", 0),
    ("Score: 5", 5),
    ("Score: 4.5", 4.5),
    ("Score: 4.50", 4.5),
    ("Score: 3.75/5", 3.75),
    ("a score of 4.5", 4.5),
    ("I would give this response a score of 3.", 3),
    ("The score is 4.", 4),
    ("The score is: 4", 4),
    ("The total score is therefore 3", 3),
    ("total 4", 4),
    ("Total: 4", 4),
    ("Total points: 4", 4),
    ("Total points awarded: 4", 4),
    ("a total of 4 points", 4),
    ("The total comes to 4.", 4),
    ("Final rating: 4", 4),
    ("Overall score: 4", 4),
    ("Total score for this response: 4", 4),
    ("| Total | 4 |", 4),
    ("4/5", 4),
    ("**4**/5", 4),
    ("I rate it 4/5.", 4),
    ("4 out of 5", 4),
    ("4.5 out of 5 stars", 4.5),
    ("It earns 3 out of a possible 5.", 3),
    ("3 of the 5 points", 3),
    ("Score: 1 + 1 + 1 + 0 + 0 = 3", 3),
    ("+1 +1 +1 = 3/5", 3),
    # first, last, repeated
    ("4/5\n\nThe answer is relevant and clear, but it leaves out the second step.", 4),
    ("Score: 3\nThe response is relevant (+1), substantial (+1) and useful (+1).", 3),
    ("It is relevant and well organised.\n\nScore: 3", 3),
    ("Score: 4\nA good answer.\nScore: 4/5, that is 4 points", 4),
    ("Score: 4\r\n", 4),
    # criteria and other numbers are no totals
    ("1 point for relevance, 1 point for coverage. Score: 2", 2),
    ("Relevance score: 1\nCoverage score: 1\nClarity score: 0\nTotal score: 2", 2),
    ("Maximum score: 5. Score: 2", 2),
    ("It does not deserve a perfect score of 5.\nScore: 3", 3),
    ("Not quite 5/5. Score: 4", 4),
    ("A score of 5 or higher is out of reach. Score: 4", 4),
    ("In step 1 it cites 2023 and 8/10 experts. Score: 2", 2),
    ("It covered 4/5 of the question. Score: 3", 3),
    ("Open 24/7 since 4/5/2023. Score: 3", 3),
    ("4 points? No: score: 3", 3),  # the explicit rank wins
    ("7\nScore: 3", 3),
    # n points
    ("4 points", 4),
    ("I would award 4 points.", 4),
    ("4 pts", 4),
    ("4.5 points", 4.5),
    ("1 point", 1),
    ("Points: 4", 4),
    ("3 points\n7", 3),  # points win over a bare number
    ("At first 2 points, with the example 3 points.", 3),  # the last counts
    ("Relevant (1 point). Substantial (1 point). Useful (1 point). In all 3 points.", 3),
    ("On a 5 point scale: 1 point for relevance, another 1 point, so I award 2 points", 2),
    # a number on its own line
    ("4", 4),
    ("4.", 4),
    ("(4)", 4),
    ("**4**", 4),
    ("4.5", 4.5),
    ("[[4]]", 4),
    ("The answer is good.\n\n4", 4),
    ("4\nThe answer is good.", 4),
    ("2\nOn reflection:\n3", 3),
    # verdicts in words, labels, tables, what comes before and after
    ("**Total Score: 4/5**", 4),
    ("Score: 4 (out of 5)", 4),
    ("Score: 4.0/5.0", 4),
    ("Score: 4.0", 4),
    ("4/5 stars", 4),
    ("Rating: 4 stars", 4),
    ("I'd give it a 4.", 4),
    ("I would rate this response a 4.", 4),
    ("I would rate this response as a 4 out of 5.", 4),
    ("I would give this response a 4/5.", 4),
    ("Overall, I would rate the response 4/5.", 4),
    ("Final Score: 4 - Good", 4),
    ("Score: 4, because it is clear.", 4),
    ("Score: 4; it is clear.", 4),
    ("Score: 4 out of 5 points", 4),
    ("Score: 4 / 5 points", 4),
    ("Total Points: 4 out of 5", 4),
    ("Total: 4/5 points", 4),
    ("Total = 1 + 1 + 1 + 1 + 0 = 4", 4),
    ("Total: 1+1+1+1 = 4 points", 4),
    ("Relevance: 1/1\nCoverage: 1/1\nUsefulness: 1/1\nClarity: 0/1\nExpertise: 0/1\nTotal: 3/5", 3),
    ("1. Relevance: 1 point\n2. Coverage: 1 point\n3. Usefulness: 0 points\nTotal: 2 points", 2),
    ("Relevance: 1\nCoverage: 1\nClarity: 1\nScore: 3", 3),
    ("| Criterion | Points |\n|---|---|\n| Relevance | 1 |\n| Total | 3 |", 3),
    ("The response scores 4 out of 5.", 4),
    ("This response deserves 3 points.", 3),
    ("The response earns a total of 4 points.", 4),
    ("So the total is 4 points out of 5.", 4),
    ("In total: 3", 3),
    ("Sum: 4", 4),
    ("Points total: 4", 4),
    ("The final score would be 4.", 4),
    ("My score: 4", 4),
    ("Score awarded: 4", 4),
    ("Awarded score: 4", 4),
    ("Assigned score: 3", 3),
    ("Score given: 3", 3),
    ("Score for the response: 3", 3),
    ("Quality score: 3", 3),
    ("Score is 3/5", 3),
    ("Score of 3", 3),
    ("Score: 4 \n\nJustification: The response mentions 3 of the 5 steps.", 4),
    ("Score: 4\n\nExplanation: in 2 sentences it covers 100% of it.", 4),
    ("Score: 5/5. The response is perfect.", 5),
    ("Score: 2\n\n[INST] Review the user's question", 2),
    ("Score: 4</s>", 4),
    ("Score: 4\n\nScore: 4", 4),
    ("Score: 4\n\nScore: 4/5", 4),
    ("### Score: 4", 4),
    ("## Score\n4", 4),
    ("# Score\n\n**4**", 4),
    ("Score\n4", 4),
    ("Final answer: 4", 4),
    ("Final Answer: Score: 4", 4),
    ("Answer: 4/5", 4),
    ("(4/5)", 4),
    ("[4/5]", 4),
    ("4/5.", 4),
    ("- 4/5", 4),
    ("* Score: 4", 4),
    ("> Score: 4", 4),
    ("Score: \u201c4\u201d", 4),
    ("Score: '4'", 4),
    ("Score: `4`", 4),
    ("Score:  4", 4),
    ("Score:\t4", 4),
    ("score=4", 4),
    ("'score': 4", 4),
    ('{"score": "4"}', 4),
    ("Score: 4.5.", 4.5),
    ("Score: 4/5 (80%)", 4),
    ("Score\uff1a4", 4),
    ("I award one point for relevance and one point for coverage, for a total of 2.", 2),
    ("It gets 1 point for relevance, 1 for coverage, for a total score of 2.", 2),
    ("First point: yes. Second point: yes. Third point: no. Score: 2", 2),
    ("It passes 3 of 5 checks. Score: 3", 3),
    ("3 of the 5 checks pass, so 3 points.", 3),
    ("Checks 1, 2 and 3 pass. Score: 3", 3),
    ("The user asked for 5 tips; it has 4. Score: 3", 3),
    ("Score: 3 (1 for relevance, 1 for coverage, 1 for clarity)", 3),
    ("Score: 3 (1+1+1)", 3),
    ("Score: 1+1+1=3", 3),
    ("Score: 3. I deducted 2 points for missing details.", 3),
    ("I deduct 1 point. Score: 4", 4),
    ("Minus 1 point: Score: 4", 4),
    ("Score: 4 (I would have given 5 with an example)", 4),
    ("Score: Total points: 4", 4),
    ("Score: Total = 4", 4),
    ("Score: total 4", 4),
    ("Score: [Total Points: 4]", 4),
    ("Score: <total points: 4>", 4),
    ("Score: {4}", 4),
    ("Therefore, the score is:\n\n4", 4),
    ("Therefore the score is\n\n4/5", 4),
    ("Score :\n\n 4 / 5", 4),
    ("The answer merits a 3", 3),
    ("I'd say 3 out of 5", 3),
    ("3 points out of 5", 3),
    ("Overall: 4/5", 4),
    ("Overall rating: 4", 4),
    ("Overall: 4", 4),
    ("Verdict: 4", 4),
    ("Grade: 4", 4),
    ("Mark: 4/5", 4),
    ("Result: 4", 4),
    ("Evaluation: 4", 4),
    ("Score: -0", 0),
    ("Score: 0/5", 0),
    ("0 points", 0),
    ("No points. Score: 0", 0),
    ("SCORE - 4", 4),
    ("Score -- 4", 4),
    ("Score 4/5", 4),
    ("Scored 4 out of 5", 4),
    ("I score it 4", 4),
    ("I score this 4/5", 4),
    ("Total score: 3.5/5 (rounded: 4)", 3.5),
    ("Score: 3.5, rounded to 4", 3.5),
    ("Score: 3.33", 3.33),
    ("This gets a 4 because it is clear.", 4),
    ("I would only give this response a 2!", 2),
    ("I'd give it a 3; no, I'd give it a 4.", 4),
    ("Verdict: 4\nI'd give it a 3.", 3),
    ("I'd give it a 4. Score: 3", 3),
    ("My verdict: 4", 4),
    ("Result: 4\nScore: 3", 3),
    ("| Total | 4 | 5 |", 4),
    ("Score: 4 - good", 4),
    ("I'd give it a 2. So 3 points.", 2),
    # a criterion's score, what was missed, and numbers of the answer's own
    ("Relevance: 5/5\nClarity: 4/5\nOverall: 4/5", 4),
    ("Relevance (5/5), depth (2/5). Score: 3", 3),
    ("Helpfulness: 4/5\nScore: 3", 3),
    ("4/5 for clarity, 2/5 for depth. Score: 3", 3),
    ("A score of 4 for clarity, a score of 2 for depth: score: 3", 3),
    ("This is almost a 5/5. Score: 4", 4),
    ("Close to 5/5, but the last step is missing. Score: 4", 4),
    ("Score: 3\n\nTo reach a score of 5 it needs an example.", 3),
    ("Score: 3. A score of 5 would need an example.", 3),
    ("It would have been a 5/5 with an example. Score: 3", 3),
    ("A score of 4 would be fair.", 4),
    ("4 out of 5 people agree, it says. Score: 2", 2),
    ("2 out of 5 steps are missing, therefore 3 points.", 3),
    ("The user asked for 5 points and the response lists 4 points. In all 3 points.", 3),
    ("Therefore I award it 4.", 4),
    ("I assign it a 4.", 4),
    ("That makes 3 points in total.", 3),
    ("Score \u2192 4", 4),
    # sums, scales and criteria written out
    ("Total: 1 (relevance) + 1 (coverage) = 2", 2),
    ("Score: (1+1+1+1+0) = 4", 4),
    ("Score: 5 - 1 = 4", 4),
    ("Score: 5 minus 1 = 4", 4),
    ("Score [0-5]: 3", 3),
    ("Score [1..5]: 3", 3),
    ("Total points earned: 3", 3),
    ("Points earned: 3 out of 5", 3),
    ("The response gets 4 out of the 5 possible points.", 4),
    ("Score: 4 (very good), because it is helpful", 4),
    ("Score: 4 (very good)", 4),
    ("Score: 4, since 1 point is missing", 4),
    ("Score: 3 (relevance 1, coverage 1, utility 1)", 3),
    ("A total of 4 reflects this.", 4),
    ("which results in 3 points.", 3),
    ("2 points were not awarded. Score: 3", 3),
    ("The response explains how to score 3 goals. I give it a 2.", 2),
    ("It addresses 4 out of 5 questions. Score: 3", 3),
    ("1\n1\n1\n0\n0\nTotal: 3", 3),
    ("A perfect score would be 5. Score: 3", 3),
    ("Relevance: 1\n\nCoverage: 1\n\nUtility: 0\n\nFinal: 2", 2),
    ("Final: 4", 4),
    ("The detail is great. 4/5", 4),
    ("Given its clarity, I give it a 4.", 4),
    ("Points: 4 for this response", 4),
    ("Score: 3 => The response is okay", 3),
    ("Score: 3 \u2192 okay", 3),
    ("Score: 3 total points", 3),
    ("5 points minus 1 point = 4 points", 4),
    ("4/5 in my opinion", 4),
]

UNREAD = [
    ("", "no_score"),
    ("   \n", "no_score"),
    ("The response is relevant and clear.", "no_score"),
    ("Score:", "no_score"),
    ("Score: <total>", "no_score"),
    ("Score: N/A", "no_score"),
    ("Score: four", "no_score"),
    ("Score: 4,5", "no_score"),
    ("Score: 3rd", "no_score"),
    ("Score: 1.2.3", "no_score"),
    ("Score: 1 + 1 + 1", "no_score"),
    ("+1 for relevance, +1 for coverage", "no_score"),
    ("+1", "no_score"),
    ("Score 1: a start", "no_score"),
    ("1 point for relevance, 1 point for coverage", "no_score"),
    ("Relevant: 1 point\nSubstantial: 1 point\nUseful: 1 point", "no_score"),
    ("It adds 1 point.", "no_score"),
    ("3 points deducted", "no_score"),
    ("a 5-point scale", "no_score"),
    ("a scale of 0 to 5 points", "no_score"),
    ("Relevance score: 1", "no_score"),
    ("step 1", "no_score"),
    ("Step 1: read the request.\nStep 2: compare.", "no_score"),
    ("1. relevant\n2. substantial\n3. useful", "no_score"),
    ("1.\nrelevant\n2.\nsubstantial", "no_score"),
    ("2023", "no_score"),
    ("In 2023 the answer was 4 apples.", "no_score"),
    ("3/4 cup of flour, open 24/7", "no_score"),
    ("It is not a 5/5", "no_score"),
    ("The score cannot be above 3", "no_score"),
    ("underscore: 4", "no_score"),
    ("Score: \u0664", "no_score"),  # Arabic-Indic four
    ("Score: \uff14", "no_score"),  # full-width four
    ("Score: 4\u0664", "no_score"),
    ("Score: 4\u00bd", "no_score"),
    ("\u096a/5", "no_score"),
    ("\u2605\u2605\u2605\u2605\u2606", "no_score"),
    ("Score: 4\n\nScore: 3", "ambiguous"),
    ("Score: 4/5, or rather 3/5", "ambiguous"),
    ("4/5 for content. Total: 3", "ambiguous"),
    ("Score: 3-4", "ambiguous"),
    ("Score: 6", "out_of_range"),
    ("Score: 5.5", "out_of_range"),
    ("Score: -1", "out_of_range"),
    ("Score: \u22121", "out_of_range"),
    ("Score: 100", "out_of_range"),
    ("Score: 8/10", "out_of_range"),
    ("Score: 4/10", "out_of_range"),
    ("Score (out of 10): 4", "out_of_range"),
    ("Score: 4%", "out_of_range"),
    ("8/10", "out_of_range"),
    ("4/10", "out_of_range"),
    ("8 out of 10", "out_of_range"),
    ("14/5", "out_of_range"),
    ("10 points", "out_of_range"),
    ("7", "out_of_range"),
    ("-1", "out_of_range"),
    ("4 points, on reflection 9 points", "out_of_range"),
    # no number at all, one of something else, or one that is cut
    ("Score: ~4", "no_score"),
    ("Score: about 4", "no_score"),
    ("Score: approximately 4", "no_score"),
    ("Score: between 3 and 4", "no_score"),
    ("Score: 3/4", "out_of_range"),
    ("Score: 3 or 4", "ambiguous"),
    ("Score: 4+", "no_score"),
    ("Score: 4-", "no_score"),
    ("Score: .5", "no_score"),
    ("Score: 4th", "no_score"),
    ("Score: IV", "no_score"),
    ("Score: four out of five", "no_score"),
    ("80%", "no_score"),
    ("Score: 80/100", "out_of_range"),
    ("B+", "no_score"),
    ("Score: A", "no_score"),
    ("\u5206\u6570\uff1a4", "no_score"),
    ("Punktzahl: 4", "no_score"),
    ("Score: \u2463", "no_score"),
    ("It could be a 5/5 with an example. Score: 4", "ambiguous"),
    ("Score: 4/5. With an example it would be 5/5.", "ambiguous"),
    ("zero points", "no_score"),
    ("Score: 5+", "no_score"),
    ("Score: 6/5", "out_of_range"),
    ("Score: 10", "out_of_range"),
    ("Score... 4", "no_score"),
    ("Score 1: 4\nScore 2: 3", "no_score"),
    ("Score: 3 1/2", "no_score"),
    ("I would not give it a 5.", "no_score"),
    ("I would give it 1 point for relevance, 1 point for clarity", "no_score"),
    ("The response gives 4, which is wrong.", "no_score"),
    ("The answer gives a 4-step plan.", "no_score"),
    ("It gets a 1 for relevance.", "no_score"),
    ("Rate it 0 to 5.", "no_score"),
    ("Overall: 4 of the steps", "no_score"),
    ("Score: 4\u2013 ", "no_score"),
    ("4 stars", "no_score"),
    ("Relevance: 1\nCoverage: 1", "no_score"),
    ("I would give it a 7.", "out_of_range"),
    ("Final answer: 42", "out_of_range"),
    ("Relevance: 5/5", "no_score"),
    ("Relevance - 1 point", "no_score"),  # cut before the other criteria
    ("Score: 4 for relevance", "no_score"),
    ("Score: 3 and a half", "no_score"),
    ("Score: 3 -> 4", "ambiguous"),
    ("Score: 3 \u2192 4", "ambiguous"),
    ("nearly 4/5", "no_score"),
    ("4 out of 5 dentists recommend it.", "no_score"),
    ("There are 3 points to consider.", "no_score"),
    ("The response lists 4 points: a, b, c, d.", "no_score"),
    ("The article covers 5 points.", "no_score"),
    # of one criterion, lists of points, counts of something else, arithmetic that is not finished
    ("Style: 4/5", "no_score"),
    ("Clarity gets a 4.", "no_score"),
    ("Clarity scores 4 out of 5.", "no_score"),
    ("The second criterion gets 1 point.", "no_score"),
    ("Score: 1, 1, 0, 0, 0", "no_score"),
    ("Score: 1 point (relevance), 1 point (coverage), 0 points (utility)", "no_score"),
    ("Scores: 4 (relevance), 3 (clarity)", "no_score"),
    ("Points awarded: 1 for relevance, 1 for coverage. 2 in total.", "no_score"),
    ("Points: 1/1, 1/1, 0/1", "no_score"),
    ("Scores:\n1\n1\n0", "no_score"),
    ("1\n1\n1\n0\n0", "no_score"),
    ("The answer covers 3 of 5 points raised by the user.", "no_score"),
    ("It addresses 4 out of 5 requirements.", "no_score"),
    ("The response has a total of 3 errors.", "no_score"),
    ("In total 3 sources are cited.", "no_score"),
    ("In total 3 of them are wrong", "no_score"),
    ("Total: 3 hours", "no_score"),
    ("A grade 5 reading level.", "no_score"),
    ("Score: 4 -> revised to 3", "no_score"),
    ("Score: 2 (changed to 3)", "no_score"),
    ("Score: 4 minus 1", "no_score"),
    ("Score: 5 (minus 1 for length) = 4", "no_score"),
    ("Starting from 5 points, I deduct 1 point for the example.", "no_score"),
    ("Score: 4:30 pm", "no_score"),
    ("Score: 4/5/10", "no_score"),
    ("Score: 0 1 2 3 4 5", "no_score"),
    ("Rating: 4 of 10", "no_score"),
    ("Score: 4 von 10", "no_score"),
    ("Use 4/5 cup of sugar.", "no_score"),
    ("4/5 of users like it.", "no_score"),
    ("Step 4/5: mix", "no_score"),
    ("A perfect score is 5.", "no_score"),
    ("It misses 2 points.", "no_score"),
    ("2 points are missing.", "no_score"),
    ("It makes 3 points.", "no_score"),
    ("The response is organised in 5 points.", "no_score"),
]


@pytest.mark.parametrize(("text", "score"), READ, ids=[repr(t)[:40] for t, _ in READ])
def test_parser_reads_the_score_of(text: str, score: float) -> None:
    assert parse_score(text) == Judgement(float(score), "ok")


@pytest.mark.parametrize(("text", "score"), READ, ids=[repr(t)[:40] for t, _ in READ])
def test_parser_says_where_the_score_stands(text: str, score: float) -> None:
    span = parse_score(text).span
    assert span is not None and float(text[slice(*span)]) == score


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("Score: 4\n\nScore: 4/5", 7),  # equal totals: where it was decided
        ("4/5, so the score: 4", 0),
        ("2 points, no: 3 points, yes 3 points", 14),  # the last value counts, from where it is kept
        ("3 points, no: 2 points, or 3 points", 27),
        ("**Score:**\r\n\r\n  <4>  ", 17),
        ("Total = 1 + 1 + 1 + 1 + 0 = 4", 28),
    ],
)
def test_of_scores_that_agree_the_first_place_counts(text: str, begin: int) -> None:
    assert parse_score(text).span == (begin, begin + 1)


@pytest.mark.parametrize(("text", "status"), UNREAD, ids=[repr(t)[:40] for t, _ in UNREAD])
def test_parser_gives_no_number_for(text: str, status: str) -> None:
    assert parse_score(text) == Judgement(None, status)
    assert parse_score(text).span is None


@given(st.text(max_size=200) | st.text(alphabet="0123456789 score:/.-+%tof5pin\n*<>()|", max_size=200))
def test_parser_never_raises_and_never_leaves_the_scale(text: str) -> None:
    judgement = parse_score(text)
    assert judgement.status in STATUSES
    assert (judgement.score is not None) == (judgement.status == "ok")
    assert judgement.score is None or 0 <= judgement.score <= 5
    assert (judgement.span is not None) == (judgement.status == "ok")
    if judgement.span is not None and "=" not in (written := text[slice(*judgement.span)]):  # "-1+1=0" is a 0
        assert float(written) == judgement.score


WORDS = st.text(alphabet="abcdeghijklm ,\n", max_size=80)  # cannot spell a score, a number or a negation


@given(
    before=WORDS,
    after=WORDS,
    quarters=st.integers(0, 20),
    bold=st.sampled_from(["{}", "**{}**", "{}/5", "{} out of 5"]),
)
def test_parser_reads_a_score_line_wherever_it_stands(before: str, after: str, quarters: int, bold: str) -> None:
    score = quarters / 4
    assert parse_score(f"{before}\nScore: {bold.format(score)}\n{after}") == Judgement(score, "ok")


@given(first=st.integers(0, 5), second=st.integers(0, 5))
def test_two_explicit_totals_agree_or_are_ambiguous(first: int, second: int) -> None:
    expected = Judgement(float(first), "ok") if first == second else Judgement(None, "ambiguous")
    assert parse_score(f"Score: {first}\nIn all, {second}/5") == expected


@pytest.mark.parametrize(
    "unit",
    [
        "1+",
        "score ",
        "score: ",
        "4 ",
        "4/",
        "9",
        " ",
        "\n",
        "point ",
        "total score: 1-",
        "(",
        "<4",
        "give it ",
        "overall ",
    ],
)
def test_parser_takes_linear_time_on_hostile_text(unit: str) -> None:
    assert_linear(parse_score, unit)


def test_status_tells_empty_truncated_and_unscored_apart() -> None:
    assert judge_status(" \n", "length") == Judgement(None, "empty")
    assert judge_status("The response is", "length") == Judgement(None, "truncated")
    assert judge_status("The response is", "stop") == Judgement(None, "no_score")
    assert judge_status("Score: 4. The response is", "length") == Judgement(4.0, "ok")
    assert judge_status("Score: 4", "stop") == Judgement(4.0, "ok")
    assert judge_status("Score: 4", "length") == Judgement(None, "truncated")  # of 4.5, of 4/10
    assert judge_status("Score: 4\nScore: 4", "length") == Judgement(4.0, "ok")  # the first decided
    assert judge_status("4", "length") == judge_status(" 4", "length") == Judgement(4.0, "ok")
    assert judge_status("Score: 9. The response is", "length") == Judgement(None, "out_of_range")
    assert judge_status("Score: 4 Score: 3", "length") == Judgement(None, "ambiguous")


def test_mean_is_over_readable_draws_and_not_floored() -> None:
    draws = [Judgement(4.0, "ok"), Judgement(None, "no_score"), Judgement(5.0, "ok"), Judgement(5.0, "ok")]
    assert mean_score(draws) == pytest.approx(14 / 3, abs=1e-12)
    assert mean_score([Judgement(0.0, "ok"), Judgement(None, "ambiguous")]) == 0.0
    assert mean_score([Judgement(None, "empty")]) is None
    assert mean_score([]) is None
    assert mean_score(draws, min_valid=3) is not None
    assert mean_score(draws, min_valid=4) is None


# ---------------------------------------------------------------------------------------------------------------------
# The template


class CharTokenizer:
    """One id per character; a first segment gets the dummy prefix space that SentencePiece adds."""

    bos_id = 1

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        return [ord(c) for c in (text if continuation else " " + text)]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "judge.jinja"
    path.write_text(text)
    return path


GOOD = (
    "{% block rubric %}R{% endblock %}\n{% block prompt %}P {{ prompt }}{% endblock %}\n"
    "{% block answer %}A {{ answer }}{% endblock %}\n{% block cue %}C{% endblock %}\n"
)


def test_tiny_template_is_one_line_of_four_segments() -> None:
    assert JudgeTemplate("tiny").segments("copy : a b", "a b") == ["judge :", " copy : a b", " | a b", " =>"]


@pytest.mark.parametrize("score", range(6))
def test_every_judgement_of_the_tiny_world_is_read(score: int) -> None:
    for checks in itertools.product(("yes", "no"), repeat=5):
        assert parse_score(" ".join((*checks, f"Score: {score}"))) == Judgement(float(score), "ok")


@pytest.mark.skipif(DATA is None, reason="SELFREWARD_TEST_DATA is not set: the genuine tokenizer is not at hand")
@given(prompt=st.text("ab \n[]<>\u00e9", max_size=20), answer=st.text("ab \n[]<>\u00e9", max_size=20))
def test_ids_by_the_genuine_tokenizer_spell_the_whole_judge_prompt(prompt: str, answer: str) -> None:
    template, tokenizer = JudgeTemplate("llama2"), _llama2_tokenizer()
    ids = template.token_ids(tokenizer, prompt, answer)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids[1:]) == "".join(template.segments(prompt, answer))


@functools.cache
def _llama2_tokenizer() -> Tokenizer:
    return Tokenizer(Path(DATA or "") / "llama2" / "tokenizer.model")


def test_llama2_template_stands_in_one_instruction_and_asks_for_the_score_line() -> None:
    template = JudgeTemplate("llama2")
    segments = template.segments("Why is the sky blue?", "Rayleigh scattering.")
    whole = "".join(segments)
    assert whole.startswith("[INST] ") and whole.endswith(" [/INST]") and whole.count("INST]") == 2
    assert "Score: <total>" in segments[3] and "100 words" in segments[3]
    assert segments[0].count("\n- One ") == 5
    assert "Why is the sky blue?" in segments[1] and "Rayleigh scattering." in segments[2]
    assert parse_score(whole).status == "no_score"  # an echo of the rubric is no verdict


def test_template_ids_are_bos_and_the_segments_encoded_apart() -> None:
    ids = JudgeTemplate("tiny").token_ids(CharTokenizer(), "p", "a")
    assert ids == [1] + [ord(c) for c in " judge : p | a =>"]


@given(prompt=st.text(max_size=40), answers=st.lists(st.text(max_size=40), min_size=2, max_size=2))
def test_judge_prompts_share_the_rubric_and_the_prompt_token_for_token(prompt: str, answers: list[str]) -> None:
    template, tokenizer = JudgeTemplate("llama2"), CharTokenizer()
    shared = 2 + sum(len(s) for s in template.segments(prompt, "")[:2])
    first, second = (template.token_ids(tokenizer, prompt, a)[:shared] for a in answers)
    assert first == second


def test_jinja_in_user_text_is_inert() -> None:
    text = "{{ 7 * 7 }} {% raw %} {# x #} {{ answer }} {% endblock %}"
    segments = JudgeTemplate("tiny").segments(text, text)
    assert segments[1] == " " + text and segments[2] == " | " + text


def test_template_hash_follows_the_file(tmp_path: Path) -> None:
    first = JudgeTemplate(write(tmp_path, GOOD)).hash
    assert JudgeTemplate(write(tmp_path, GOOD)).hash == first
    assert JudgeTemplate(write(tmp_path, GOOD.replace("}C{", "}D{"))).hash != first


BAD = {
    "missing block": (GOOD.replace("block cue", "block queue"), "line 4.*rubric, prompt, answer, queue.*expected"),
    "wrong order": (
        "\n".join(reversed(GOOD.splitlines())),
        "line 4: found the blocks cue, answer, prompt, rubric; expected",
    ),
    "text outside": (
        GOOD.replace("%}\n{% block answer", "%}\n\nlost\n{% block answer"),
        "line 4: text or code outside",
    ),
    "code outside": ("{% set x = 1 %}" + GOOD, "line 1: text or code outside"),
    "unknown variable": (GOOD.replace("{{ answer }}", "\n{{ reply }}"), "line 4.*'answer' uses 'reply'"),
    "answer in prompt": (GOOD.replace("P {{", "{{ answer }} {{"), "line 2.*'prompt' uses 'answer'.*may use prompt"),
    "prompt in rubric": (GOOD.replace("}R{", "}{{ prompt }}{"), "line 1.*'rubric' uses 'prompt'.*no variable"),
    "unused answer": (GOOD.replace("{{ answer }}", ""), "line 3.*does not use its variable"),
    "syntax": (GOOD.replace("{{ answer }}", "{{ answer "), "line 3"),
    "unknown filter": (GOOD.replace("{{ answer }}", "{{ answer | shuffle }}"), "line 3.*shuffle"),
    "random filter": (GOOD.replace("{{ answer }}", "{{ answer | random }}"), "line 3.*random"),
    "unknown attribute": (GOOD.replace("{{ answer }}", "{{ answer.words }}"), "line 3.*words"),
    "sandbox": (GOOD.replace("{{ answer }}", "{{ answer.__class__.__mro__ }}"), "line 3.*unsafe"),
    "endless loop": (GOOD.replace("}C{", "}{% for i in range(10**9) %}x{% endfor %}{"), "line 4.*[Rr]ange"),
    "include": (GOOD.replace("}C{", "}{% include '/etc/passwd' %}{"), "line 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_template_is_refused_naming_file_and_line(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    with pytest.raises(InputError, match=f"(?s)judge.jinja, {message}" if message.startswith("line") else message):
        JudgeTemplate(write(tmp_path, text))


def test_missing_template_names_what_is_shipped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'lama2' is not shipped; use one of llama2, tiny"):
        JudgeTemplate("lama2")
    with pytest.raises(InputError, match=r"nowhere.jinja cannot be read"):
        JudgeTemplate(tmp_path / "nowhere.jinja")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"bytes.jinja cannot be read"):
        JudgeTemplate(tmp_path / "bytes.jinja")
