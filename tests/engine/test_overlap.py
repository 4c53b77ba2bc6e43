"""Steps that are planned before the last one's tokens are read give every request the same bits."""

import pytest

from engine.llm import LLM
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config
from tests.engine.test_needle import Mix, bits

MODEL = random_llama(small_config())


def engine(overlap, **options):
    llm = LLM(MODEL, block_size=8, **options)
    llm._overlap = overlap
    return llm


def both(prompts, params, **options):
    """Bits of all outputs, with and without overlap, and the overlapped engine."""
    plain = engine(False, **options).generate(prompts, params)
    llm = engine(True, **options)
    overlapped = llm.generate(prompts, params)
    llm._scheduler.check()
    assert llm._pending is None and llm._scheduler._unsettled == 0
    return [bits(output) for output in overlapped], [bits(output) for output in plain], llm


QUICK = 5  # of the twelve mixes; the others take a minute


@pytest.mark.parametrize(
    "seed", [seed if seed < QUICK else pytest.param(seed, marks=pytest.mark.full) for seed in range(12)]
)
def test_a_mix_has_the_bits_of_its_plain_run(seed):
    """Forks, hits, preemptions, tiny budgets, labels, a first call whose blocks are found again."""
    mix = Mix(seed)
    plain, _ = mix.run()
    make = mix.engine

    def overlapping():
        llm = make()
        llm._overlap = True
        return llm

    mix.engine = overlapping
    found, stats = mix.run()
    assert found == plain
    assert stats["new_tokens"] >= sum(len(answer[0]) for output in plain for answer in output)


def stops_in(prompts, params):
    """Token ids that the requests do draw, so that they can be made stops."""
    outputs = engine(False).generate(prompts, params)
    return sorted({answer.token_ids[5] for output in outputs for answer in output.outputs})


def test_stops_are_seen_one_step_late_and_leave_nothing_behind():
    prompts = [[3, 4, 5 + n] for n in range(6)]
    free = SamplingParams(n=3, max_tokens=30, seed=5, ignore_eos=True)
    stops = stops_in(prompts, free)
    params = SamplingParams(
        n=3, max_tokens=30, seed=5, ignore_eos=True, stop_token_ids=stops, logprobs=1, label_token_ids=[7]
    )
    overlapped, plain, llm = both(prompts, params)
    assert overlapped == plain
    assert any(answer[4] == "stop" for output in plain for answer in output)
    wasted = llm.stats()["computed_rows"] - engine_rows(prompts, params)
    assert 0 < wasted <= 2 * 3 * len(prompts)  # a row for each candidate that stopped, and forks that wait a step


def engine_rows(prompts, params):
    llm = engine(False)
    llm.generate(prompts, params)
    return llm.stats()["computed_rows"]


def test_endings_by_length_waste_nothing():
    prompts = [[3, 4, 5 + n] for n in range(6)]
    params = SamplingParams(n=2, max_tokens=9, seed=1, ignore_eos=True)
    overlapped, plain, llm = both(prompts, params)
    assert overlapped == plain
    assert llm.stats()["computed_rows"] == engine_rows(prompts, params)


def test_one_token_and_a_stop_as_the_first_one():
    prompts = [[3, 4], [5, 6, 7]]
    one = SamplingParams(n=4, max_tokens=1, seed=3, logprobs=1)
    assert both(prompts, one)[0] == both(prompts, one)[1]
    first = {answer.token_ids[0] for output in engine(False).generate(prompts, one) for answer in output.outputs}
    early = SamplingParams(n=4, max_tokens=20, seed=3, stop_token_ids=sorted(first), logprobs=1)
    overlapped, plain, _ = both(prompts, early)
    assert overlapped == plain and all(answer[4] == "stop" for output in plain for answer in output)


def test_blocks_that_decoding_filled_are_found_again():
    """A later prompt that continues an answer: its blocks are listed once their tokens are known."""
    llm = engine(True)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([[3, 4, 5]], params)
    saved = llm.stats()["prefix_tokens_saved"]
    again = [3, 4, 5, *output.outputs[0].token_ids, 9]
    (found,) = llm.generate([again], params)
    assert llm.stats()["prefix_tokens_saved"] - saved >= 40
    assert bits(found) == bits(engine(False).generate([again], params)[0])


def test_scores_are_the_same():
    completions = [[4, 5, 6], [9], list(range(20, 60))]
    assert engine(True).score([3, 4], completions) == engine(False).score([3, 4], completions)


def test_an_abort_between_items_ends_with_the_tokens_that_were_drawn():
    llm = engine(True)
    prompts = [[3, 4, n] for n in range(3, 9)]
    params = [SamplingParams(max_tokens=4 if n == 0 else 60, seed=n, ignore_eos=True) for n in range(6)]
    whole = engine(False).generate(prompts, params)
    stream = llm.stream(prompts, params)
    first = next(stream)
    llm.abort()
    rest = list(stream)
    assert {output.index for output in (first, *rest)} == set(range(6))
    for output in rest:
        (answer,) = output.outputs
        assert answer.finish_reason == "abort" and -1 not in answer.token_ids
        assert answer.token_ids == whole[output.index].outputs[0].token_ids[: len(answer.token_ids)]
        assert len(answer.token_ids) >= 4
    llm._scheduler.check()


def test_a_stream_that_is_closed_with_a_step_under_way_leaves_the_engine_usable():
    llm = engine(True)
    prompts = [[3, 4, n] for n in range(3, 9)]
    params = [SamplingParams(max_tokens=3 if n == 0 else 50, seed=n) for n in range(6)]
    stream = llm.stream(prompts, params)
    next(stream)
    assert llm._pending is not None
    stream.close()
    assert llm._pending is None and llm._scheduler.idle
    expected = engine(False).generate(prompts, params)
    assert [bits(output) for output in llm.generate(prompts, params)] == [bits(output) for output in expected]


def test_broken_logits_are_named_and_the_engine_stays_usable():
    model = random_llama(small_config(), seed=4)
    llm = LLM(model, block_size=8)
    llm._overlap = True
    good = model.embed.detach().clone()
    model.embed.data[50] = float("nan")
    model.weights_changed()
    with pytest.raises(FloatingPointError, match="prompt 1"):
        llm.generate([[3, 4], [50]], SamplingParams(max_tokens=5, seed=0))
    model.embed.data.copy_(good)
    model.weights_changed()
    assert llm._pending is None
    plain = LLM(model, block_size=8).generate([[3, 4]], SamplingParams(max_tokens=5, seed=0, logprobs=1))
    assert bits(llm.generate([[3, 4]], SamplingParams(max_tokens=5, seed=0, logprobs=1))[0]) == bits(plain[0])
