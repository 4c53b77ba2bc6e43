"""Truncations against plain Python, the pick against exact distributions, and parameters that name what is wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine import ops
from engine.errors import InputError
from engine.sampling import RowParams, SamplingParams, kept, sample, tempered


def noise(rows, vocab, seed=0):
    index = torch.arange(rows)
    return ops.gumbel_noise(torch.full((rows,), seed), index, torch.zeros_like(index), 0, vocab)


def plain_kept(logp, top_k, top_p, min_p):
    """Sort by hand, cut by hand."""
    order = sorted(range(len(logp)), key=lambda token: (-logp[token], token))
    if top_k:
        order = order[:top_k]
    best = max(logp)
    weight = [math.exp(value - best) for value in logp]
    total = sum(weight[token] for token in order)
    keep, mass = [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        keep.append(token)
        mass += weight[token]
    return {token for token in keep if weight[token] >= min_p}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -1.0, 0.0, 0.3, 0.7, 1.1, 2.0]), min_size=2, max_size=9),
    st.integers(0, 4),
    st.sampled_from([1.0, 0.93, 0.61, 0.23]),
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


@pytest.mark.parametrize("vocab", [111, 32000])
def test_a_rows_result_does_not_depend_on_its_place(vocab):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(2)) * 3
    choices = [SamplingParams(top_p=0.8), SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams()]
    params = [choices[i % 4] for i in range(64)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    plain = sample(logits, RowParams.of(params), noise(64, vocab))
    moved = sample(logits[order], RowParams.of([params[i] for i in order.tolist()]), noise(64, vocab)[order])
    for a, b in zip(plain, moved, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("top_p", [0.9, 0.999999])
def test_the_nucleus_of_a_large_vocabulary_is_cut_at_the_right_token(top_p):
    """Masses in fp32, or top_p rounded to it, would cut at another token of the long tail."""
    rows = RowParams.of([SamplingParams(top_p=top_p)])
    logp = tempered(torch.randn(1, 32000, generator=torch.Generator().manual_seed(5)) * 4, rows)
    keep = set(kept(logp, rows)[0].nonzero().flatten().tolist())
    assert keep == plain_kept(logp[0].double().tolist(), 0, top_p, 0.0)


def test_a_nucleus_of_equal_tokens_holds_exactly_its_share():
    for top_p, size in ((0.5, 16000), (0.9, 28800), (1e-9, 1), (1.0, 32000)):
        rows = RowParams.of([SamplingParams(top_p=top_p)])
        keep = kept(tempered(torch.full((1, 32000), 0.3), rows), rows)[0]
        assert keep.sum() == size
        assert keep[:size].all()  # the lowest ids


def test_the_lowest_temperature_is_finite_and_picks_the_likeliest():
    rows = RowParams.of([SamplingParams(temperature=1e-6, top_p=0.9)])
    token, raw, sampled = sample(torch.tensor([[-3e4, 2e4, 1e4, 3e4]]), rows, noise(1, 4))
    assert token.item() == 3 and raw.item() == 0.0 and sampled.item() == 0.0


def test_two_candidates_of_four_draw_the_noise_of_two():
    def candidates(count):
        index = torch.arange(count)
        return ops.gumbel_noise(torch.full((count,), 9), torch.full((count,), 5), index, 0, 111)

    assert torch.equal(candidates(4)[:2], candidates(2))
    assert not torch.equal(candidates(2)[0], candidates(2)[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_has_a_nan_log_prob_and_leaves_the_others_alone(bad, temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(4))
    rows = RowParams.of([SamplingParams(temperature=temperature, top_p=0.9)] * 3)
    plain = sample(logits, rows, noise(3, 50))
    broken = logits.clone()
    broken[1, 7] = bad
    for a, b in zip(plain[:2], sample(broken, rows, noise(3, 50))[:2]):
        assert torch.equal(a[::2], b[::2])
    assert sample(broken, rows, noise(3, 50))[1][1].isnan()
    broken[1] = -math.inf
    assert sample(broken, rows, noise(3, 50))[1][1].isnan()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_ids_are_never_drawn_and_do_not_touch_the_raw_log_prob(temperature):
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]]).repeat(32, 1)
    rows = RowParams.of([SamplingParams(temperature=temperature)] * 64)
    ids, raw, sampled = sample(logits, rows, noise(64, 3), [(1, 99), ()] * 32)
    assert 1 not in ids[::2] and (ids[1::2] == 1).any()
    assert torch.equal(raw, torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0])
    if temperature:
        cut = torch.log_softmax(torch.tensor([0.0, -math.inf, 1.0]), 0)
        assert torch.allclose(sampled[::2], cut[ids[::2]], atol=1e-6)


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


def test_a_row_that_is_not_truncated_reports_the_same_bits_beside_one_that_is():
    logits = torch.randn(64, 111, generator=torch.Generator().manual_seed(5)) * 3
    free, cut = SamplingParams(), SamplingParams(top_p=0.5)
    alone = sample(logits, RowParams.of([free] * 64), noise(64, 111))
    beside = sample(logits, RowParams.of([free] * 63 + [cut]), noise(64, 111))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one[:63], other[:63])
