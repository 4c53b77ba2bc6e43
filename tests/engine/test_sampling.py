"""Parameters that name what is wrong. How tokens are drawn: tests/kernels/test_sample.py."""

import math

import pytest

from engine.errors import InputError
from engine.sampling import SamplingParams


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
