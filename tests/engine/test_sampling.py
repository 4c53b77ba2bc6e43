"""Truncations against plain Python, the pick against exact distributions, and parameters that name what is wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine import ops
from engine.errors import InputError, NotBuiltError
from engine.sampling import RowParams, SamplingParams, kept, sample, tempered


def noise(rows, vocab, seed=0):
    index = torch.arange(rows)
    return ops.gumbel_noise(torch.full((rows,), seed), index, torch.zeros_like(index), 0, vocab)


def plain_kept(logp, top_k, top_p, min_p):
    """Sort by hand, cut by hand."""
    order = sorted(range(len(logp)), key=lambda token: (-logp[token], token))
    if top_k:
        order = order[:top_k]
    total = sum(math.exp(logp[token]) for token in order)
    keep, mass = [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        keep.append(token)
        mass += math.exp(logp[token])
    best = logp[keep[0]]
    return {token for token in keep if min_p == 0 or math.exp(logp[token] - best) >= min_p}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -1.0, 0.0, 0.3, 0.7, 1.1, 2.0]), min_size=2, max_size=9),
    st.integers(0, 4),
    st.sampled_from([1.0, 0.93, 0.61, 0.2]),
    st.sampled_from([0.0, 0.07, 0.4]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_truncation_equals_cutting_by_hand(values, top_k, top_p, min_p, temperature):
    params = RowParams.of([SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)])
    logp = tempered(torch.tensor([values]), params)
    expected = plain_kept(logp[0].double().tolist(), top_k, top_p, min_p)
    assert set(kept(logp, params)[0].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("vocab", [111, 32000])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(top_k=20)]
)
def test_frequencies_follow_the_exact_distribution_and_stay_inside_the_nucleus(vocab, params):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    rows = RowParams.of([params])
    logp = tempered(logits[None], rows)
    inside = kept(logp, rows)[0]
    exact = logp[0].double().exp() * inside
    exact = exact / exact.sum()
    draws = torch.cat(
        [sample(logits.expand(50, -1), RowParams.of([params] * 50), noise(50, vocab, seed))[0] for seed in range(60)]
    )
    assert inside[draws].all()
    top = exact.topk(10).indices  # the likeliest ten, and all others together
    observed = torch.tensor([(draws == token).sum() for token in top] + [0.0])
    expected = torch.cat([exact[top], (1 - exact[top].sum()).clamp(min=0)[None]]) * len(draws)
    observed[-1] = len(draws) - observed.sum()
    keep = expected > 5
    observed = torch.cat([observed[keep], observed[~keep].sum()[None]])
    expected = torch.cat([expected[keep], expected[~keep].sum()[None] + 1e-9])
    if expected[-1] < 1e-6:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-4


def test_a_rows_result_does_not_depend_on_its_place():
    logits = torch.randn(64, 111, generator=torch.Generator().manual_seed(2)) * 3
    choices = [SamplingParams(top_p=0.8), SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams()]
    params = [choices[i % 4] for i in range(64)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    plain = sample(logits, RowParams.of(params), noise(64, 111))
    moved = sample(logits[order], RowParams.of([params[i] for i in order.tolist()]), noise(64, 111)[order])
    for a, b in zip(plain, moved, strict=True):
        assert torch.equal(a[order], b)


def test_special_rows():
    one_hot = torch.full((1, 50), -1e9)
    one_hot[0, 33] = 0.0
    equal = torch.zeros(1, 50)
    for params in (SamplingParams(), SamplingParams(top_p=0.01), SamplingParams(min_p=1.0), SamplingParams(top_k=1)):
        rows = RowParams.of([params])
        assert sample(one_hot, rows, noise(1, 50))[0].item() == 33
        assert kept(tempered(equal, rows), rows).any()
    assert sample(equal, RowParams.of([SamplingParams(temperature=0)]), noise(1, 50))[0].item() == 0  # lowest id
    assert (
        kept(tempered(equal, RowParams.of([SamplingParams(top_k=3)])), RowParams.of([SamplingParams(top_k=3)])).sum()
        == 3
    )


def test_log_probs_of_the_draw():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    params = RowParams.of([SamplingParams(temperature=2.0, top_k=2)])
    token, raw, sampled = sample(logits, params, noise(1, 4))
    assert raw.item() == pytest.approx(torch.log_softmax(logits, -1)[0, token].item(), abs=1e-6)
    cut = torch.log_softmax(logits[:, :2] / 2, -1)
    assert sampled.item() == pytest.approx(cut[0, token].item(), abs=1e-6)
    assert sample(logits, RowParams.of([SamplingParams(temperature=0)]), noise(1, 4))[2].item() == 0.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 0}, "n is 0; expected an integer of at least 1"),
        ({"n": True}, "n is True"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
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


def test_what_is_not_built_says_so():
    for params in ({"label_token_ids": (1,)}, {"min_tokens": 2}):
        with pytest.raises(NotBuiltError, match="not built"):
            SamplingParams(**params)


def test_a_single_stop_string_is_taken_as_one():
    assert SamplingParams(stop="abc").stop == ("abc",)
