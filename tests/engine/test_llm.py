"""The sampler: a request's bits do not depend on its company, and they are the trainer's numbers."""

import gc
import io
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer

from engine.checkpoint import hf_tensors, save_checkpoint, update_tensors
from engine.errors import InputError, NotBuiltError
from engine.llm import LLM
from engine.model import Llama, tree_attend
from engine.requests import Request
from engine.sampling import SamplingParams
from engine.scheduler import Group
from engine.train.batches import DPORow
from engine.train.trainer import reference_logprobs
from tests.engine.helpers import random_llama, small_config

MODEL = random_llama(small_config())
GQA = MODEL.config.n_heads // MODEL.config.n_kv_heads
assert GQA == 2


def random_prompts(count, low=1, high=150, seed=0):
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, 111) for _ in range(rng.randrange(low, high)))] for _ in range(count)]


def random_params(count, seed=1):
    rng = random.Random(seed)
    return [
        SamplingParams(
            n=rng.choice([1, 1, 2, 4]),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 0, 5]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            max_tokens=rng.choice([1, 3, 8, 20]),
            seed=rng.randrange(2**64),
            logprobs=1,
        )
        for _ in range(count)
    ]


def bits(output):
    return [
        (answer.token_ids, answer.logprobs, answer.sampled_logprobs, answer.finish_reason) for answer in output.outputs
    ]


PROMPTS, PARAMS = random_prompts(100), random_params(100)
CHOSEN = (0, 17, 63, 99)


@pytest.fixture(scope="module")
def batch():
    return [bits(output) for output in LLM(MODEL).generate(PROMPTS, PARAMS)]


def test_a_request_alone_equals_the_same_request_in_a_batch_of_100(batch):
    llm = LLM(MODEL)
    for index in CHOSEN:
        assert bits(llm.generate([PROMPTS[index]], PARAMS[index])[0]) == batch[index]


def test_order_chunk_budget_and_company_do_not_matter(batch):
    order = list(range(100))
    random.Random(5).shuffle(order)
    llm = LLM(MODEL, max_batch_tokens=70, max_sequences=9)
    outputs = llm.generate([PROMPTS[i] for i in order[:40]], [PARAMS[i] for i in order[:40]])
    for place, index in enumerate(order[:40]):
        assert bits(outputs[place]) == batch[index]


def test_a_cache_hit_does_not_matter(batch):
    llm = LLM(MODEL)
    first = [bits(o) for o in llm.generate(PROMPTS[:20], PARAMS[:20])]
    saved = llm.stats()["prefix_tokens_saved"]
    again = [bits(o) for o in llm.generate(PROMPTS[:20], PARAMS[:20])]
    assert first == again == batch[:20]
    assert llm.stats()["prefix_tokens_saved"] > saved


@pytest.mark.parametrize("threads", [1, 2])
def test_the_thread_count_does_not_matter_and_stays(batch, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        outputs = LLM(MODEL).generate(PROMPTS[:30], PARAMS[:30])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [bits(output) for output in outputs] == batch[:30]


def test_log_probs_are_the_trainers():
    prompts, params = (
        random_prompts(8, seed=3),
        [SamplingParams(n=2, max_tokens=40, seed=i, logprobs=1) for i in range(8)],
    )
    outputs = LLM(MODEL).generate(prompts, params)
    rows = [DPORow(o.prompt_token_ids, o.outputs[0].token_ids, o.outputs[1].token_ids) for o in outputs]
    for output, sums in zip(outputs, reference_logprobs(MODEL, rows), strict=True):
        for answer, expected in zip(output.outputs, sums, strict=True):
            assert abs(answer.cumulative_logprob - expected) <= 2e-5 * len(answer.token_ids) * max(1.0, rms(output))


def rms(output):
    ids = torch.tensor(output.prompt_token_ids)
    return logits_of(MODEL, ids).square().mean().sqrt().item()


def logits_of(model: Llama, ids):
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), tree_attend(torch.full((len(ids),), len(ids))))
        return F.linear(hidden, model.head)


def test_score_equals_the_full_forward_and_what_generate_reported():
    llm = LLM(MODEL)
    prompts = random_prompts(6, seed=4)
    outputs = llm.generate(prompts, SamplingParams(n=3, max_tokens=70, seed=7, logprobs=1, ignore_eos=True))
    llm.reset_prefix_cache()
    scores = llm.score(prompts, [[answer.token_ids for answer in output.outputs] for output in outputs])
    for prompt, output, given in zip(prompts, outputs, scores, strict=True):
        for answer, logps in zip(output.outputs, given, strict=True):
            assert logps == answer.logprobs  # bit for bit: prefill and decode fold the same chunks
            assert_the_full_forwards(MODEL, prompt, answer)
    assert llm.score(prompts[0], [[5, 6], [7]]) == llm.score([prompts[0]], [[[5, 6], [7]]])[0]


def assert_the_full_forwards(model, prompt, answer):
    ids = torch.tensor([*prompt, *answer.token_ids])
    logits = logits_of(model, ids)
    exact = torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None]).squeeze(1)[len(prompt) - 1 :]
    bound = 2e-5 * max(1.0, logits.square().mean().sqrt().item())
    assert (torch.tensor(answer.logprobs) - exact).abs().max() <= bound


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
def test_log_probs_up_to_the_full_context_after_hits_and_forks_are_the_full_forwards(heads):
    model = random_llama(small_config(n_heads=heads[0], n_kv_heads=heads[1]), seed=sum(heads))
    (head,) = random_prompts(1, low=399, high=400, seed=6)
    prompts = [[*head[:shared], 5, 6][:size] for shared, size in ((0, 1), (63, 63), (63, 65), (130, 130), (400, 402))]
    llm = LLM(model)
    llm.generate([head], SamplingParams(max_tokens=2, seed=1))
    params = SamplingParams(n=3, temperature=0.9, max_tokens=110, ignore_eos=True, seed=5, logprobs=1)
    outputs = llm.generate(prompts, params)
    stats = llm.stats()
    assert stats["prefix_tokens_saved"] >= 500 and stats["fork_tokens_saved"] >= 1000
    assert max(len(prompt) for prompt in prompts) + 110 == 512
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
        for answer in output.outputs:
            assert len(answer.token_ids) == 110
            assert_the_full_forwards(model, prompt, answer)


def test_greedy_follows_the_full_forward():
    for output in LLM(MODEL).generate(
        random_prompts(6, seed=8), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    ):
        ids = list(output.prompt_token_ids)
        for token in output.outputs[0].token_ids:
            logits = logits_of(MODEL, torch.tensor(ids))[-1]
            assert logits[token] >= logits.max() - 1e-4 * logits.square().mean().sqrt()
            ids.append(token)


def test_blocks_of_8_and_64_give_the_same_numbers_to_rounding():
    prompts, params = (
        random_prompts(5, seed=9),
        SamplingParams(temperature=0, max_tokens=25, logprobs=1, ignore_eos=True),
    )
    for small, large in zip(
        LLM(MODEL, block_size=8).generate(prompts, params), LLM(MODEL).generate(prompts, params), strict=True
    ):
        assert small.outputs[0].token_ids == large.outputs[0].token_ids
        a, b = torch.tensor(small.outputs[0].logprobs), torch.tensor(large.outputs[0].logprobs)
        assert (a - b).abs().max() <= 2e-5 * max(1.0, rms(large))


def test_the_first_two_of_four_candidates_equal_those_of_two():
    llm = LLM(MODEL)
    two = llm.generate(PROMPTS[3], SamplingParams(n=2, max_tokens=12, seed=11, logprobs=1))[0]
    four = llm.generate(PROMPTS[3], SamplingParams(n=4, max_tokens=12, seed=11, logprobs=1))[0]
    assert bits(four)[:2] == bits(two)
    assert len({tuple(answer.token_ids) for answer in four.outputs}) > 1


def test_a_prompt_is_computed_once_for_its_candidates():
    llm = LLM(MODEL)
    llm.generate(PROMPTS[0], SamplingParams(n=8, max_tokens=1, seed=0))
    assert llm.stats()["computed_rows"] == len(PROMPTS[0])


def test_many_prompts_under_one_beginning_compute_it_once():
    rng = random.Random(2)
    shared = [rng.randrange(3, 111) for _ in range(128)]
    tails = [[rng.randrange(3, 111) for _ in range(10)] for _ in range(12)]
    llm = LLM(MODEL)
    llm.generate([shared + tail for tail in tails], SamplingParams(max_tokens=1, seed=0))
    assert llm.stats()["computed_rows"] == 128 + 12 * 10


def test_nan_in_unused_pages_changes_nothing(batch):
    llm = LLM(MODEL)
    llm._runner.keys.fill_(float("nan"))
    llm._runner.values.fill_(float("nan"))
    assert [bits(output) for output in llm.generate(PROMPTS[:10], PARAMS[:10])] == batch[:10]


def test_the_pool_is_clean_after_everything_and_after_a_closed_stream():
    llm = LLM(MODEL, max_sequences=8)
    llm.generate(PROMPTS[:15], PARAMS[:15])
    llm._scheduler.check()
    stream = llm.stream(PROMPTS[:15], PARAMS[:15])
    next(stream)
    with pytest.raises(InputError, match="earlier stream"):
        llm.generate([[1, 2]])
    stream.close()
    llm._scheduler.check()
    assert len(llm._pool.free) == llm._pool.num_blocks - 1


def test_new_weights_are_never_mixed_with_old_keys():
    model = random_llama(small_config(), seed=3)
    llm = LLM(model)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    llm.generate(PROMPTS[5], params)
    with torch.no_grad():
        model.blocks[0].attention.qkv.mul_(1.5)
    with pytest.raises(InputError, match="was changed in place"):
        llm.generate(PROMPTS[5], params)
    epoch = model.weights_changed()
    output = llm.generate(PROMPTS[5], params)[0]
    assert bits(output) == bits(LLM(model).generate(PROMPTS[5], params)[0])
    assert output.outputs[0].weight_epoch == epoch == llm.weight_epoch


def test_stopping():
    llm = LLM(MODEL)
    free = llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))[0].outputs[0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 10)
    stop = free.token_ids[4]
    stopped = llm.generate(
        PROMPTS[2], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    )[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    full = LLM(MODEL, max_model_len=20)
    cut = full.generate([[1] * 15], SamplingParams(max_tokens=50, ignore_eos=True, seed=1))[0].outputs[0]
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)


def test_no_stop_token_is_drawn_before_min_tokens():
    llm = LLM(MODEL)
    stops = tuple(range(3, 60))  # half the vocabulary: without the rule an answer ends at once
    free, held = (
        llm.generate([[1, 5, 6]], SamplingParams(n=16, max_tokens=12, seed=3, stop_token_ids=stops, min_tokens=least))
        for least in (0, 8)
    )
    assert min(len(answer.token_ids) for answer in free[0].outputs) < 8
    for answer in held[0].outputs:
        assert not {*stops, 2} & {*answer.token_ids[:8]}
        assert len(answer.token_ids) >= 8
    assert any(answer.finish_reason == "stop" for answer in held[0].outputs)


def test_without_a_seed_every_request_draws_its_own():
    llm = LLM(MODEL)
    drawn = {tuple(o.outputs[0].token_ids) for o in llm.generate([PROMPTS[1]] * 6, SamplingParams(max_tokens=10))}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], SamplingParams(), "prompt 0 is empty"),
        ([[1, 2], [1, 111]], SamplingParams(), r"prompt 1 holds token 111; the model's vocabulary is 0\.\.110"),
        ([[1] * 512], SamplingParams(), "prompt 0 needs 513 tokens"),
        (["text"], SamplingParams(), "prompt 0 is text; this LLM has no tokenizer"),
        ([[1, True]], SamplingParams(), "expected text or a list of token ids"),
        ([[1]], SamplingParams(stop="x"), "no tokenizer"),
        ([[1], [2]], [SamplingParams()], "2 prompts and 1 SamplingParams"),
    ],
)
def test_bad_input_is_named_and_the_engine_stays_usable(prompts, params, message):
    llm = LLM(MODEL)
    with pytest.raises(InputError, match=message):
        llm.generate(prompts, params)
    assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, seed=0))


def test_options_that_are_not_built_say_so():
    with pytest.raises(InputError, match="quantization is 'int4'; expected None or 'int8'"):
        LLM(MODEL, quantization="int4")
    with pytest.raises(NotBuiltError, match="dtype is 'float16'; a CPU samples in float32 or bfloat16"):
        LLM(random_llama(MODEL.config, dtype=torch.float16))


def test_device_and_dtype_are_checked_against_the_model_and_the_machine():
    with pytest.raises(InputError, match="device is 'tpu'; expected auto, cpu or cuda"):
        LLM(MODEL, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch finds no GPU here"):
            LLM(MODEL, device="cuda")
    with pytest.raises(InputError, match="dtype is 'int8'; expected auto, float32"):
        LLM(MODEL, dtype="int8")
    with pytest.raises(InputError, match="deterministic"):
        LLM(MODEL, deterministic=False)
    with pytest.raises(InputError, match="raise kv_cache_gb"):
        LLM(MODEL, kv_cache_gb=1e-5)


def test_a_small_cache_makes_requests_wait_not_fail(batch):
    block = 2 * 4 * 2 * 2 * 16 * 64  # keys and values, fp32, 2 layers, 2 heads of 16, 64 tokens
    llm = LLM(MODEL, kv_cache_gb=20 * block / 2**30)
    outputs = llm.generate(PROMPTS[:25], PARAMS[:25])
    assert [bits(output) for output in outputs] == batch[:25]
    llm._scheduler.check()


def test_a_request_larger_than_the_cache_is_named():
    block = 2 * 4 * 2 * 2 * 16 * 64
    llm = LLM(MODEL, kv_cache_gb=3 * block / 2**30)
    with pytest.raises(InputError, match="prompt 0 may need 4 KV blocks"):
        llm.generate([[1] * 200], SamplingParams(max_tokens=8))


def test_nan_weights_are_reported_with_the_prompt():
    model = random_llama(small_config())
    with torch.no_grad():
        model.head.fill_(float("nan"))
    model.weights_changed()
    llm = LLM(model)
    with pytest.raises(FloatingPointError, match="prompt 0"):
        llm.generate([[1, 2]], SamplingParams(max_tokens=2))
    llm._scheduler.check()


def test_weights_that_change_between_two_items_of_a_stream_are_an_error():
    model = random_llama(small_config(), seed=4)
    llm = LLM(model, max_sequences=2)
    stream = llm.stream(PROMPTS[:8], SamplingParams(max_tokens=3, seed=0))
    next(stream)
    model.weights_changed()
    with pytest.raises(InputError, match="while a stream was running"):
        list(stream)
    assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, seed=0))


def test_completions_that_are_no_list_are_named():
    llm = LLM(MODEL)
    for completions in ("abc", [5, 6]):
        with pytest.raises(InputError, match="expected a list of completions"):
            llm.score([1, 2], completions)


# ---- labels, weights, sleep, abort -----------------------------------------------------------------------------------


def test_label_logprobs_are_the_raw_ones_of_the_given_tokens_at_every_step():
    labels = (7, 3, 110)
    params = [SamplingParams(n=2, max_tokens=5, temperature=t, seed=4, label_token_ids=labels) for t in (0.0, 0.7)]
    for output in LLM(MODEL).generate([PROMPTS[0]] * 2, params):
        for answer in output.outputs:
            ids = [*PROMPTS[0], *answer.token_ids]
            expected = torch.log_softmax(logits_of(MODEL, torch.tensor(ids)), -1)[
                len(PROMPTS[0]) - 1 : -1, list(labels)
            ]
            assert torch.tensor(answer.label_logprobs).shape == (len(answer.token_ids), 3)
            assert (torch.tensor(answer.label_logprobs) - expected).abs().max() <= 2e-5 * max(1.0, rms(output))


def test_labels_do_not_change_what_is_drawn_and_are_none_unless_asked_for():
    plain, labelled = (
        LLM(MODEL).generate(PROMPTS[:5], SamplingParams(max_tokens=6, seed=2, logprobs=1, label_token_ids=ids))
        for ids in ((), (5,))
    )
    assert [bits(output) for output in plain] == [bits(output) for output in labelled]
    assert plain[0].outputs[0].label_logprobs is None
    with pytest.raises(InputError, match="label_token_ids holds 111"):
        LLM(MODEL).generate([[1]], SamplingParams(label_token_ids=(111,)))


def greedy_bits(llm, count=6):
    return [
        bits(output)
        for output in llm.generate(PROMPTS[:count], SamplingParams(temperature=0, max_tokens=6, logprobs=1))
    ]


@pytest.mark.parametrize("names", ["hf", "own"])
def test_updated_weights_are_another_models_and_old_keys_are_not_found(names):
    target = random_llama(small_config(), seed=0)
    other = random_llama(small_config(), seed=5)
    tensors = dict(hf_tensors(other)) if names == "hf" else dict(other.named_parameters())
    llm = LLM(target)
    before, epoch = greedy_bits(llm), llm.weight_epoch
    llm.update_weights(tensors.items())
    assert llm.weight_epoch == epoch + 1
    assert greedy_bits(llm) == greedy_bits(LLM(other)) != before


def test_a_part_of_the_weights_may_be_updated():
    llm, norm = LLM(random_llama(small_config(), seed=0)), torch.full((64,), 0.5)
    llm.update_weights({"model.norm.weight": norm})
    assert torch.equal(llm.model.norm.weight, norm)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weigth": torch.ones(64)}, "did you mean 'model.norm.weight'"),
        ({"model.norm.weight": torch.ones(63)}, r"has shape \[63\]; the model's is \[64\]"),
        ({"model.norm.weight": torch.ones(64).int()}, "is torch.int32"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(tensors, message):
    llm = LLM(random_llama(small_config(), seed=0))
    before = greedy_bits(llm)
    with pytest.raises(InputError, match=message):
        llm.update_weights({"model.embed_tokens.weight": torch.zeros(111, 64)} | tensors)
    assert llm.weight_epoch == 1 and greedy_bits(llm) == before


@pytest.mark.parametrize("source", ["directory", "live"])
def test_an_interrupted_update_is_told_until_it_is_made_again(tmp_path, source, monkeypatch):
    model, other = random_llama(small_config(), seed=0), random_llama(small_config(), seed=5)
    save_checkpoint(model, tmp_path / "m")
    llm = LLM(model if source == "live" else tmp_path / "m")
    tensors = dict(other.named_parameters())

    class Interrupted(dict):
        def items(self):
            yield from list(super().items())[:3]
            if self.asked:  # the first time names and shapes are checked
                raise KeyboardInterrupt
            self.asked = True
            yield from list(super().items())[3:]

    stopped = Interrupted(tensors)
    stopped.asked = False
    with pytest.raises(KeyboardInterrupt):
        update_tensors(llm.model, stopped, llm._packed.write)
    for _ in range(2):
        with pytest.raises(InputError, match="partly old and partly new: give all of its tensors again"):
            llm.generate([[1, 2]])
    llm.update_weights(tensors)
    assert greedy_bits(llm) == greedy_bits(LLM(other))


def test_a_model_that_is_converted_behind_the_llms_back_is_named():
    model = random_llama(small_config())
    llm = LLM(model)
    model.bfloat16()
    model.weights_changed()
    with pytest.raises(InputError, match=r"converted from torch\.float32 to torch\.bfloat16 since this LLM was made"):
        llm.generate([[1, 2]])


def test_a_model_that_is_converted_to_its_copys_dtype_is_named():
    """The copy that this LLM samples would not be written again."""
    model = random_llama(small_config())
    llm = LLM(model, dtype="bfloat16")
    llm.generate([[1, 2]])
    model.bfloat16()
    model.weights_changed()
    with pytest.raises(InputError, match=r"to torch\.bfloat16 since this LLM was made: make a new one"):
        llm.generate([[1, 2]])


def test_what_a_generator_of_tensors_raises_is_told():
    def tensors():
        raise ValueError("no broadcast")
        yield

    with pytest.raises(InputError, match="no broadcast"):
        LLM(random_llama(small_config())).update_weights(tensors())


def test_sleep_frees_the_cache_and_wake_gives_the_same_bits():
    llm = LLM(random_llama(small_config(), seed=0))
    before = greedy_bits(llm)
    llm.sleep()
    assert llm._runner.keys.numel() == llm._runner.values.numel() == 0
    with pytest.raises(InputError, match="asleep; call wake"):
        llm.generate([[1]])
    llm.update_weights({"model.norm.weight": torch.ones(64)})  # while the cache sleeps: normal
    llm.wake()
    assert greedy_bits(llm) == before
    llm.wake()


def test_weights_sleep_only_if_they_can_be_loaded_again(tmp_path):
    save_checkpoint(random_llama(small_config(), seed=0), tmp_path / "m")
    llm = LLM(str(tmp_path / "m"))
    before = greedy_bits(llm)
    llm.sleep(weights=True)
    assert sum(parameter.numel() for parameter in llm.model.parameters()) == 0
    with pytest.raises(InputError, match="the weights are asleep"):
        llm.update_weights({})
    llm.wake()
    assert greedy_bits(llm) == before
    llm.update_weights({"model.norm.weight": torch.ones(64)})
    with pytest.raises(InputError, match="were updated since they were loaded"):
        llm.sleep(weights=True)
    with pytest.raises(InputError, match="belong to the caller"):
        LLM(MODEL).sleep(weights=True)


def test_aborted_requests_come_with_what_they_have_and_the_others_do_not_change(batch):
    llm, found = LLM(MODEL, max_sequences=16), {}
    for output in llm.stream(PROMPTS[:40], PARAMS[:40]):
        found[output.index] = output
        if len(found) == 10:
            running = [sequence.group.index for sequence in llm._scheduler.running]
            ended = {running[0], 39}
            llm.abort(ended)
    assert sorted(found) == list(range(40)) and llm._scheduler.idle
    for index, output in found.items():
        reasons = {answer.finish_reason for answer in output.outputs}
        assert ("abort" in reasons) == (index in ended) and len(output.outputs) == PARAMS[index].n
        if index not in ended:
            assert bits(output) == batch[index]
        for answer, (tokens, *_) in zip(output.outputs, batch[index], strict=True):
            assert answer.token_ids == tokens[: len(answer.token_ids)]
    assert found[39].outputs[0].token_ids == []
    llm._scheduler.check()


def test_abort_without_indices_ends_everything_and_the_engine_is_usable(batch):
    llm = LLM(MODEL)
    outputs = []
    for output in llm.stream(PROMPTS[:30], PARAMS[:30]):
        outputs.append(output)
        llm.abort()
    assert sorted(output.index for output in outputs) == list(range(30))
    assert [bits(output) for output in llm.generate(PROMPTS[:5], PARAMS[:5])] == batch[:5]


def test_abort_works_from_another_thread():
    llm = LLM(MODEL)
    timer = threading.Timer(0.3, llm.abort)
    timer.start()
    params = SamplingParams(n=8, max_tokens=400, ignore_eos=True, seed=1)
    outputs = llm.generate(PROMPTS[:20], params)
    timer.join()
    reasons = [answer.finish_reason for output in outputs for answer in output.outputs]
    assert len(reasons) == 160 and "abort" in reasons


def test_weights_cannot_change_or_sleep_while_a_stream_runs():
    llm = LLM(random_llama(small_config(), seed=0))
    stream = llm.stream(PROMPTS[:30], PARAMS[:30])
    next(stream)
    for call in (lambda: llm.update_weights({}), llm.sleep):
        with pytest.raises(InputError, match="stream is running"):
            call()
    stream.close()
    llm.sleep()


def test_ids_beyond_the_tokenizers_pieces_are_never_drawn(tmp_path):
    """Llama checkpoints may have padded embeddings, rows without a token."""
    with io.BytesIO() as proto:
        words = [f"w{i}" for i in range(20)]
        options = {"model_type": "word", "vocab_size": 23, "hard_vocab_limit": True, "pad_id": -1, "minloglevel": 2}
        SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(words[: i + 1]) for i in range(20)), model_writer=proto, **options
        )
        (tmp_path / "tokenizer.model").write_bytes(proto.getvalue())
    llm = LLM(random_llama(small_config(vocab_size=64)), tokenizer=tmp_path / "tokenizer.model")
    params = SamplingParams(n=8, temperature=5.0, max_tokens=20, ignore_eos=True, seed=1)
    drawn = {
        token for output in llm.generate([[1, 2]] * 4, params) for one in output.outputs for token in one.token_ids
    }
    assert max(drawn) == 22  # the last piece comes, none of the 41 rows behind it


def test_a_stream_forgets_the_requests_that_it_has_yielded():
    """Or their tokens and log-probs stay until the last one: 3 KB a request, 30 MB after ten thousand."""
    alive = []
    stream = LLM(MODEL, max_sequences=20).stream([[1, 2, 3]] * 200, SamplingParams(max_tokens=5, seed=0))
    for number, _ in enumerate(stream, start=1):
        if number in (1, 200):
            gc.collect()
            alive.append(sum(type(found) in (Request, Group) for found in gc.get_objects()))
    assert alive[0] - alive[1] >= 300


def test_a_stream_that_is_not_exhausted_keeps_others_out_until_it_is_closed():
    """Also between its last step and its last item, when the scheduler has nothing left to do."""
    llm = LLM(MODEL)
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=0)
    outer = llm.stream([[1, 2], [3, 4]], params)
    next(outer)
    assert llm._scheduler.idle
    for call in (lambda: next(llm.stream([[5, 6]], params)), lambda: llm.update_weights({}), llm.sleep):
        with pytest.raises(InputError, match="stream"):
            call()
    assert [output.index for output in outer] == [1]
    assert [output.index for output in llm.stream([[5, 6]], params)] == [0]


def test_every_token_may_be_forbidden_only_by_mistake_and_the_message_says_so():
    llm = LLM(MODEL)
    with pytest.raises(FloatingPointError, match="no token may be drawn"):
        llm.generate([[1, 2]], SamplingParams(min_tokens=1, stop_token_ids=tuple(range(111))))
    with pytest.raises(InputError, match="stop_token_ids holds 111"):
        llm.generate([[1, 2]], SamplingParams(stop_token_ids=(111,)))
    assert llm.generate([[1, 2]], SamplingParams(max_tokens=2, seed=0))


def test_an_abort_while_nothing_runs_does_not_reach_the_next_call():
    llm = LLM(MODEL)
    llm.abort()
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=0)
    assert llm.generate([[1, 2]], params)[0].outputs[0].finish_reason == "length"
    stream = llm.stream([[1, 2], [3, 4]], params)
    llm.abort([0])  # before the first item: the stream is there
    assert {output.index: output.outputs[0].finish_reason for output in stream} == {0: "abort", 1: "length"}


def test_sleeping_twice_does_not_forget_that_the_weights_sleep(tmp_path):
    save_checkpoint(MODEL, tmp_path / "model")
    llm = LLM(tmp_path / "model")
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=0)
    before = bits(llm.generate([[1, 2]], params)[0])
    llm.sleep(weights=True)
    llm.sleep()
    llm.wake()
    assert bits(llm.generate([[1, 2]], params)[0]) == before
