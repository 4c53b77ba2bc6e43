"""The GPU's sampler against the CPU's: on a GPU as it runs there, elsewhere its kernels in Triton's interpreter and its
graphs replayed by computing again. Same tokens, log-probs within the contract's bound."""

import pytest
import torch

from engine import ops
from engine.graphs import map_tensors
from engine.llm import LLM
from engine.runner_gpu import BUCKETS, GpuRunner
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config

pytestmark = pytest.mark.gpu_too

GPU = torch.cuda.is_available()
CONFIG = small_config(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=128)
MODEL = random_llama(CONFIG, seed=2)
SHARED = list(range(3, 40))


def replayed(run):
    """A capture without a GPU: computes again, into the same result."""
    result = run()

    def replay():
        fresh = []
        map_tensors(run(), lambda x: (fresh.append(x), x)[1])
        map_tensors(result, lambda x: x.copy_(fresh.pop(0)))

    return replay, result


@pytest.fixture
def gpu(monkeypatch):
    """Makes an LLM whose steps are the GPU's."""
    if not GPU:
        monkeypatch.setenv("SELFREWARD_BACKEND", "triton")
    ops.choose.cache_clear()

    def make(**options):
        if GPU:
            model = random_llama(CONFIG, seed=2).to("cuda")
            return LLM(model, block_size=8, kv_cache_gb=0.001, **options)
        llm = LLM(MODEL, block_size=8, kv_cache_gb=0.001, **options)
        llm._overlap = True
        llm._runner = GpuRunner(MODEL, 8, CONFIG.vocab_size, llm.max_model_len, capture=lambda: replayed)
        llm._runner.allocate(llm._pool.num_blocks)
        llm._runner.keys.fill_(float("nan"))  # no slot is read before it is written
        llm._runner.values.fill_(float("nan"))
        return llm

    yield make
    ops.choose.cache_clear()


def requests():
    params = SamplingParams(n=3, max_tokens=6, temperature=0.8, top_p=0.9, seed=11, logprobs=1, label_token_ids=[5, 9])
    greedy = SamplingParams(max_tokens=5, temperature=0.0, seed=1, logprobs=1)
    held = SamplingParams(max_tokens=6, min_tokens=4, stop_token_ids=list(range(20, 60)), seed=3, logprobs=1)
    return [[*SHARED, 50], [*SHARED, 51, 52], [7, 8], [1]], [params, params, greedy, held]


def check(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine.outputs, theirs.outputs, strict=True):
            assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert a.sampled_logprobs == pytest.approx(b.sampled_logprobs, abs=1e-4)
            for mine_labels, their_labels in zip(a.label_logprobs or [], b.label_logprobs or [], strict=True):
                assert mine_labels == pytest.approx(their_labels, abs=1e-4)


def test_a_gpus_steps_draw_what_a_cpus_do(gpu):
    """Prompts, forks inside a block, decoding in graphs, labels, stops."""
    prompts, params = requests()
    expected = LLM(random_llama(CONFIG, seed=2), block_size=8, device="auto" if not GPU else "cpu").generate(
        prompts, params
    )
    llm = gpu()
    check(llm.generate(prompts, params), expected)
    captured = llm._runner._captured
    assert captured and {rows for rows, _ in captured} <= set(BUCKETS)
    assert llm.stats()["backends"]["work_attention"] == "triton"


def test_graphs_and_grouping_are_no_part_of_the_result(gpu):
    prompts, params = requests()
    outputs = []
    for graphs, grouped in ((True, True), (False, True), (True, False)):
        llm = gpu()
        llm._runner.graphs, llm._grouped = graphs, grouped
        outputs.append([[o.token_ids for o in output.outputs] for output in llm.generate(prompts, params)])
        assert bool(llm._runner._captured) == graphs
    assert outputs[0] == outputs[1] == outputs[2]


def test_three_spellings_of_six_scores_fit_the_graphs(gpu):
    """A judge's labels in a full bucket: at 110M on an H200 steps without graphs take twice as long."""
    llm = gpu()
    llm.generate([[3, 4, 5]], SamplingParams(n=2, max_tokens=4, seed=4, label_token_ids=range(3, 21)))
    assert llm.stats()["replayed_steps"] == 3  # all but the prompt's


def test_more_draws_in_a_step_than_there_was_room_for(gpu, monkeypatch):
    """The prompt's step draws a token for every candidate; what they draw is where the next step looks for it."""
    monkeypatch.setattr("engine.runner_gpu.BUCKETS", (1, 2))
    params = SamplingParams(n=5, max_tokens=3, seed=4, logprobs=1)
    check(
        gpu().generate([[3, 4, 5]], params),
        LLM(random_llama(CONFIG, seed=2), block_size=8).generate([[3, 4, 5]], params),
    )


def test_weights_that_moved_end_the_graphs(gpu):
    llm = gpu()
    params = SamplingParams(max_tokens=3, temperature=0.0)
    (before,) = llm.generate([[3, 4]], params)
    assert llm._runner._captured
    moved = llm.model.blocks[0].mlp.down
    moved.data = moved.data.clone()
    llm._runner.follow_weights()
    assert not llm._runner._captured
    assert llm.generate([[3, 4]], params)[0].outputs[0].token_ids == before.outputs[0].token_ids


def test_scoring_gives_the_cpus_log_probs(gpu):
    completions = [[4, 5, 6], [9], list(range(60, 75))]
    expected = LLM(random_llama(CONFIG, seed=2), block_size=8).score(SHARED, completions)
    for mine, theirs in zip(gpu().score(SHARED, completions), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_what_was_captured_follows_an_update_of_the_weights_and_ends_with_sleep(gpu):
    llm = gpu()
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1)
    (before,) = llm.generate([[3, 4]], params)
    other = random_llama(CONFIG, seed=5)
    saved = {name: x.detach().clone() for name, x in llm.model.named_parameters()}
    llm.update_weights({name: x.detach() for name, x in other.named_parameters()})
    (after,) = llm.generate([[3, 4]], params)
    (expected,) = LLM(other, block_size=8).generate([[3, 4]], params)
    assert after.outputs[0].token_ids == expected.outputs[0].token_ids
    assert after.outputs[0].logprobs == pytest.approx(expected.outputs[0].logprobs, abs=1e-4)
    assert after.outputs[0].logprobs != before.outputs[0].logprobs
    llm.update_weights(saved)
    llm.sleep()
    assert not llm._runner._captured and not llm._runner.keys.numel()
    llm.wake()
    (again,) = llm.generate([[3, 4]], params)
    assert again.outputs[0].token_ids == before.outputs[0].token_ids
