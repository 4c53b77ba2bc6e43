"""A replayed forward is the forward: the same bits for any number of rows, and what it could not replay is an error."""

import threading

import numpy as np
import pytest
import torch

from engine import _C, ops
from engine.batch import Batch
from engine.llm import LLM
from engine.packed import PackedWeights
from engine.replay import Replay
from engine.runner import CpuRunner
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config

PROMPTS = [[1, *((5 * p + 7 * i) % 100 + 3 for i in range(30 * p))] for p in range(6)]
PARAMS = SamplingParams(n=3, max_tokens=9, seed=3, logprobs=1, ignore_eos=True)


def answers(llm):
    return [[(a.token_ids, a.logprobs) for a in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


def called_one_by_one(model, **options):
    llm = LLM(model, **options)
    llm._runner.replays = False
    return answers(llm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("budget", [7, 300])
def test_answers_are_the_same_bits_as_call_by_call(dtype, quantization, budget):
    model = random_llama(small_config(), dtype=dtype)
    llm = LLM(model, quantization=quantization, max_batch_tokens=budget)
    assert llm._runner.replays
    assert answers(llm) == called_one_by_one(model, quantization=quantization, max_batch_tokens=budget)
    assert llm._runner._replay is not None


def test_new_weights_and_new_pages_are_recorded_anew():
    model, other = random_llama(small_config()), random_llama(small_config(), seed=5)
    llm = LLM(model)
    before = answers(llm)
    llm.sleep()
    llm.wake()
    assert answers(llm) == before
    llm.update_weights(dict(other.named_parameters()))
    assert answers(llm) == called_one_by_one(other) != before
    with torch.no_grad():
        model.embed.mul_(0.5)
        model.norm.weight.mul_(2)
    model.weights_changed()
    assert answers(llm) == called_one_by_one(model)


def test_rows_need_no_more_memory_for_more_layers():
    def floats(layers):
        llm = LLM(random_llama(small_config(n_layers=layers)), max_batch_tokens=100)
        answers(llm)
        return sum(piece.numel() for piece in llm._runner._replay._memory._pieces)

    assert floats(2) == floats(6) > 0


# ---- what cannot be replayed -----------------------------------------------------------------------------------------


MODEL = random_llama(small_config())
PAGES = torch.zeros(9, 2, 16, 64), torch.zeros(9, 2, 64, 16)


def record(rows=4, **changed):
    kernels = PackedWeights().kernels(1)
    kernels = kernels._replace(**{name: change(getattr(kernels, name)) for name, change in changed.items()})

    def forward(tokens, positions):
        def attend(layer, q, k, v, cos, sin):
            q = ops.rope_write(q, k, v, cos, sin, *PAGES, positions, torch.empty(0, 3, dtype=torch.int64))
            return ops.chunk_attention(q, *PAGES, torch.empty(0, 4, dtype=torch.int64), positions)

        return MODEL(tokens, positions, attend, kernels)

    with torch.no_grad():
        return Replay(forward, rows)


def step(**changed):
    """Three rows of one sequence in block 4."""
    ints = {
        "tokens": [5, 6, 7],
        "positions": [0, 1, 2],
        "slots": [256, 257, 258],
        "items": [[4, 0, 0, 3]],
        "copies": np.empty((0, 3)),
        **changed,
    }
    return Batch.empty()._replace(**{name: torch.from_numpy(np.array(x, np.int64)) for name, x in ints.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": [5, 111, 7]}, r"tokens\[1\] is 111; expected 0 or more and below 111"),
        ({"positions": [0, 1, 512]}, r"positions\[2\] is 512; expected 0 or more and below 512"),
        ({"slots": [0, 1, 9 * 64]}, r"slots\[2\] is 576; expected 0 or more and below 576"),
        ({"slots": [0, 1]}, r"slots has shape \[2\]; expected \[3\]"),
        ({"copies": [[1, 9, 3]]}, r"copies\[0\] has block 9"),
        ({"items": [[9, 0, 0, 3]]}, r"items\[0\] has page 9; expected 0 or more and below 9"),
        ({"items": [[4, 0, 0, 2]]}, "items have 0 chunks of row 2; expected 1"),
        ({"tokens": [5] * 5}, r"tokens is \[5\]; expected at most 4, the rows of the recording"),
    ],
)
def test_a_step_is_checked_before_anything_is_computed(changed, message):
    replay, batch = record(), step(**changed)
    with pytest.raises(ValueError, match=message):
        replay(batch.tokens, batch, 1)
    batch = step()
    assert replay(batch.tokens, batch, 1).isfinite().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("linear", lambda linear: lambda x, weight: linear(x * 2, weight)),
        ("swiglu", lambda swiglu: lambda x: swiglu(x).clone()),
        ("linear", lambda linear: lambda x, weight: linear(x.flip(0), weight)),
    ],
)
def test_work_that_is_not_recorded_is_an_error(name, change):
    with pytest.raises(ValueError, match="something in between was not recorded"):
        record(**{name: change})


def test_a_call_for_some_of_the_rows_is_an_error():
    def some(norm):
        return lambda x, weight, eps: norm(x[:2], weight, eps)

    with pytest.raises(ValueError, match="a recorded call's rows is 2; expected 4"):
        record(rms_norm=some)


def test_ids_of_another_array_are_an_error():
    with pytest.raises(ValueError, match="expected the recording's tokens or positions"):
        record(embed=lambda embed: lambda ids, table: embed(ids + 1, table))


def test_another_threads_calls_are_made_while_one_records():
    made = []

    def elsewhere(norm):
        def run(x, weight, eps):
            thread = threading.Thread(target=lambda: made.append(ops.rms_norm_rows(torch.ones(2, 64), weight, eps)))
            with torch.no_grad():
                thread.start()
                thread.join()
            return norm(x, weight, eps)

        return run

    weight = MODEL.norm.weight.detach()
    expected = ops.rms_norm_rows(torch.ones(2, 64), weight, MODEL.norm.eps)

    def detached(norm):
        return lambda x, w, eps: elsewhere(norm)(x, w.detach(), eps)

    record(rms_norm=detached)
    assert made and all(torch.equal(x, expected) for x in made)


def test_one_thread_records_once_at_a_time():
    ids = np.zeros(2, np.int64)
    with _C.Recording(ids, ids + 0), pytest.raises(ValueError, match="this thread records already"):  # noqa: SIM117
        with _C.Recording(ids, ids + 0):
            pass
    assert torch.equal(ops.rms_norm_rows(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))


def test_a_forward_of_other_backends_is_not_replayed(monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "torch")
    ops.choose.cache_clear()
    try:
        assert not CpuRunner(MODEL, PackedWeights(), 64, 111, 8).replays
    finally:
        monkeypatch.undo()
        ops.choose.cache_clear()
