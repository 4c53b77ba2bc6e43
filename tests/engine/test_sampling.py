"""What is asked of a token: parameters that are refused by name, and rules that say what was asked."""

import math

import pytest
import torch

from engine import ops
from engine.errors import InputError
from engine.sampling import Query, SamplingParams, draw_rules


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 0}, "n is 0; expected an integer of at least 1"),
        ({"n": True}, "n is True"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 1e-7}, "temperature is 1e-07; expected 0 \\(greedy\\) or at least 1e-6"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; expected an integer 0..8"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0.0 to 1.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": 2**64}, "seed is"),
        ({"stop": ""}, "stop holds ''"),
        ({"stop": ["a", 3]}, "stop holds 3"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids holds -1"),
        ({"logprobs": 5}, "logprobs is 5"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value(bad, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**bad)


def test_a_single_stop_string_is_taken_as_one():
    assert SamplingParams(stop="abc").stop == ("abc",)


def test_the_rules_say_what_the_queries_ask():
    given = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    queries = [
        Query(4, given, 2**64 - 1, position=7, candidate=2, forbidden=(2,), labels=(5, 6)),
        Query(4, labels=(1,)),
    ]
    rules = draw_rules(queries, 50)
    columns = {name: value.tolist() for name, value in rules._asdict().items() if name != "vocab"}
    assert columns["min_p"] == [0.1, 0.0] and columns["top_p"] == [0.9, 1.0]
    assert columns["temperature"] == [0.5, 0.0] and columns["top_k"] == [3, 0]
    assert columns["seeds"] == [-1, 0] and columns["positions"] == [7, 0] and columns["candidates"] == [2, 0]
    assert columns["forbidden_offsets"] == [0, 1, 1] and columns["forbidden"] == [2]
    assert columns["label_offsets"] == [0, 2, 3] and columns["label_ids"] == [5, 6, 1]


def test_a_query_without_parameters_is_greedy_and_reads_its_labels():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    draws = ops.sample_rows(logits, draw_rules([Query(0, labels=(2, 0))], 3))
    assert draws.ids.tolist() == [1]
    assert torch.allclose(draws.labels, logits.log_softmax(-1)[0, [2, 0]])
