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
    found = answers(llm)
    assert llm.stats()["replayed_steps"] == 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("budget", [7, 300])
def test_answers_are_the_same_bits_as_call_by_call(dtype, quantization, budget):
    model = random_llama(small_config(), dtype=dtype)
    llm = LLM(model, quantization=quantization, max_batch_tokens=budget)
    assert answers(llm) == called_one_by_one(model, quantization=quantization, max_batch_tokens=budget)
    assert llm.stats()["replayed_steps"] == llm.stats()["steps"] > 0


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    model, before = random_llama(small_config()), torch.get_num_threads()
    expected = called_one_by_one(model)
    torch.set_num_threads(threads)
    _C.share_little(True)
    try:
        assert answers(LLM(model)) == expected
    finally:
        _C.share_little(False)
        torch.set_num_threads(before)


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


def test_weights_that_move_are_read_where_they_are():
    """Torch frees what was there, without a new version of the tensor."""
    model = random_llama(small_config())
    llm = LLM(model)
    before = answers(llm)
    model.share_memory()
    llm.reset_prefix_cache()
    assert answers(llm) == before
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    model.weights_changed()
    assert answers(llm) == called_one_by_one(model) != before


@pytest.mark.parametrize("name", ["norm", "blocks.1.mlp"])
@pytest.mark.parametrize("work", ["in place", "of its own", "looks"])
def test_hooks_in_a_model_do_their_work_in_every_step(name, work):
    seen = []

    def hook(module, given, out):
        x = out[1] if name == "norm" else out
        if work == "looks":
            seen.append(x)
        elif work == "in place":
            x.mul_(-3)
        else:
            return (out[0], x * -3) if name == "norm" else x * -3

    model = random_llama(small_config())
    llm = LLM(model)
    plain = answers(llm)
    handle = model.get_submodule(name).register_forward_hook(hook)
    model.weights_changed()
    hooked = answers(llm)
    assert hooked == called_one_by_one(model)
    assert len(seen) > 3 and hooked == plain if work == "looks" else hooked != plain
    handle.remove()
    model.weights_changed()
    assert answers(llm) == plain


def test_a_model_whose_forward_does_more_is_called_kernel_by_kernel(monkeypatch):
    model = random_llama(small_config())
    inner = type(model.blocks[0].mlp).forward
    monkeypatch.setattr(type(model.blocks[0].mlp), "forward", lambda self, x, kernels: inner(self, x, kernels) * 2)
    llm = LLM(model)
    assert answers(llm) == called_one_by_one(model)
    assert llm.stats()["replayed_steps"] == 0 < llm.stats()["steps"]


def test_the_default_dtype_of_torch_does_not_matter():
    model = random_llama(small_config())
    expected = answers(LLM(model))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert answers(LLM(model)) == expected
    finally:
        torch.set_default_dtype(before)


def test_rows_need_no_more_memory_for_more_layers():
    def floats(layers):
        llm = LLM(random_llama(small_config(n_layers=layers)), max_batch_tokens=100)
        answers(llm)
        return sum(piece.numel() for piece, _ in llm._runner._replay._memory.pieces)

    assert floats(2) == floats(6) > 0


# ---- what cannot be replayed -----------------------------------------------------------------------------------------


CANARY = 12345.0
MODEL = random_llama(small_config())
PAGES = torch.zeros(9, 2, 16, 64), torch.zeros(9, 2, 64, 16)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def record(rows=4, lists=None, **changed):
    """lists: copies, items and positions of attention that are not the recording's."""
    kernels = PackedWeights().kernels(1)
    kernels = kernels._replace(**{name: change(getattr(kernels, name)) for name, change in changed.items()})

    def forward(tokens, positions):
        def attend(layer, q, k, v, cos, sin):
            given = {"copies": ints(0, 3), "items": ints(0, 4), "positions": positions, **(lists or {})}
            q = ops.rope_write(q, k, v, cos, sin, *PAGES, positions, given["copies"])
            return ops.chunk_attention(q, *PAGES, given["items"], given["positions"])

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
    for pages in PAGES:
        pages.fill_(CANARY)
    replay, batch = record(), step(**changed)
    with pytest.raises(ValueError, match=message):
        replay(batch.tokens, batch, 1)
    assert all((pages == CANARY).all() for pages in PAGES)
    batch = step()
    assert replay(batch.tokens, batch, 1).isfinite().all()
    assert not all((pages == CANARY).all() for pages in PAGES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linear": lambda linear: lambda x, weight: linear(x * 2, weight)}, "aten.mul.Tensor on rows is no native"),
        ({"swiglu": lambda swiglu: lambda x: swiglu(x).clone()}, "aten.clone.default on rows"),
        ({"swiglu": lambda swiglu: lambda x: swiglu(x).mul_(2)}, "aten.mul_.Tensor on rows"),
        ({"linear": lambda linear: lambda x, weight: linear(torch.ones(4, 64), weight)}, "x is in other memory"),
        ({"rms_norm": lambda norm: lambda x, weight, eps: norm(x[:2], weight, eps)}, "rows is 2; expected 4"),
        ({"embed": lambda embed: lambda ids, table: embed(ids + 1, table)}, "the recording's tokens or positions"),
    ],
)
def test_what_a_replay_would_leave_out_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        record(**changed)


def test_a_result_that_no_kernel_wrote_is_an_error():
    with pytest.raises(ValueError, match="is not what its last kernel writes"):
        Replay(lambda tokens, positions: torch.zeros(4, 64), 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [("positions", "positions is another array"), ("items", "items or copies is"), ("copies", "items or copies is")],
)
def test_lists_of_its_own_are_an_error(name, message):
    """A replay would use the step's."""
    given = {"positions": ints(4), "items": ints(1, 4), "copies": ints(1, 3)}
    with pytest.raises(ValueError, match=message):
        record(lists={name: given[name]})


def test_another_threads_calls_are_made_while_one_records():
    weight, made = MODEL.norm.weight.detach(), []

    def call():
        made.append(ops.rms_norm_rows(torch.ones(2, 64), weight, MODEL.norm.eps))

    def with_thread(norm):
        def run(*given):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            return norm(*given)

        return run

    call()
    record(rms_norm=with_thread)
    assert len(made) > 1 and all(torch.equal(x, made[0]) for x in made)


def test_one_thread_records_once_at_a_time():
    def again(norm):
        return lambda *given: [record(), norm(*given)][1]

    with pytest.raises(ValueError, match="this thread records already"):
        record(rms_norm=again)
    assert torch.equal(ops.rms_norm_rows(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))


def test_a_forward_of_other_backends_is_not_replayed(monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "torch")
    ops.choose.cache_clear()
    try:
        assert not CpuRunner(MODEL, PackedWeights(), 64, 111).replays
    finally:
        monkeypatch.undo()
        ops.choose.cache_clear()
