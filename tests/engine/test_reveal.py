"""A model that reveals its keys and values: from the log-probs of a step one reads which tokens were in its context.

One layer. Embeddings are one-hot; keys are constant, so a score depends on the distance alone (RoPE); the value of a token
is a one-hot of its name; the MLP is zero and the head reads what attention wrote. The log-probs of all tokens are then a
known function of the context, counted below in float64 without any of the engine's code. A key of another token, of
another position, twice, or from old weights moves some log-prob by far more than the tolerance.
"""

import random
from functools import cache

import numpy as np
import pytest
import torch

from engine.llm import LLM
from engine.model import Llama
from engine.sampling import SamplingParams
from tests.engine.helpers import small_config

VOCAB = 16
CONTEXT = 128
CONFIG = small_config(
    dim=2 * VOCAB, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=8, vocab_size=VOCAB, max_seq_len=CONTEXT
)
QUERIES = (0.0, 0.6, 0.0, 0.3)  # per head: 0 counts tokens, more weighs them by their distance
KEY = 0.2
OUTPUTS = (3.0, 4.0, 5.0, 6.0)  # per head, so that no head can take another's place
SHARPNESS = 0.7
UNIT = (1 / CONFIG.dim + CONFIG.norm_eps) ** -0.5  # the entry of a one-hot after the norm
TOLERANCE = 2e-5
FREQUENCIES = 10000.0 ** -(np.arange(4) / 4)
TURNED = 2 * np.cos(np.outer(np.arange(CONTEXT), FREQUENCIES)).sum(-1)  # ones by ones turned by a distance


def values_of(names):
    """v projection: the value of token t is the one-hot of names[t]; head g holds the names from 8 g on."""
    weight = torch.zeros(VOCAB, CONFIG.dim)
    weight[torch.tensor(names), torch.arange(VOCAB)] = 1.0
    return weight


def revealing_model(names):
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        model.embed[:, :VOCAB] = torch.eye(VOCAB)
        model.head[:, VOCAB:] = SHARPNESS * torch.eye(VOCAB)
        attention = model.blocks[0].attention
        q, k, v = attention.qkv.split([32, 16, 16])
        q[:, :VOCAB] = torch.tensor(QUERIES).repeat_interleave(8)[:, None]
        k[:, :VOCAB] = KEY
        v.copy_(values_of(names))
        for head, scale in enumerate(OUTPUTS):
            group = head // 2
            for channel in range(8):
                attention.o[VOCAB + 8 * group + channel, 8 * head + channel] = scale
    model.weights_changed()
    return model


def true_logprobs(context, names):
    """[len(context), VOCAB] float64: log-probs behind every token, by counting."""
    places = np.arange(len(context))
    distance = places[:, None] - places[None, :]
    one_hot = np.zeros((len(context), VOCAB))
    one_hot[places, np.array(names)[context]] = UNIT
    written = np.zeros((len(context), VOCAB))
    for head, (query, scale) in enumerate(zip(QUERIES, OUTPUTS, strict=True)):
        scores = TURNED[abs(distance)] * (query * UNIT) * (KEY * UNIT) / 8**0.5
        weights = np.exp(scores) * (distance >= 0)
        channels = slice(8 * (head // 2), 8 * (head // 2) + 8)
        written[:, channels] += scale * (weights @ one_hot[:, channels]) / weights.sum(-1, keepdims=True)
    squares = 1 + np.square(written).sum(-1, keepdims=True)  # 1: the token itself
    logits = SHARPNESS * written / np.sqrt(squares / CONFIG.dim + CONFIG.norm_eps)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def worst_error(output, names):
    """The largest difference of any log-prob of any step of any candidate from the counted one."""
    errors = [0.0]
    for answer in output.outputs:
        ids, prompt = answer.token_ids, output.prompt_token_ids
        if ids:
            exact = true_logprobs([*prompt, *ids[:-1]], names)[len(prompt) - 1 :]
            assert np.shape(answer.label_logprobs) == exact.shape
            errors.append(abs(np.array(answer.label_logprobs) - exact).max())
    return np.max(errors)  # NaN if there is one


def random_prompts(rng, count):
    """Many share a beginning of any length with another one."""
    prompts = []
    for _ in range(count):
        head = rng.choice(prompts) if prompts and rng.random() < 0.7 else []
        head = head[: rng.randrange(len(head) + 1)]
        tail = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, rng.choice([4, 12, 50])))]
        prompts.append([*head, *tail][: CONTEXT - 30])
    return prompts


def random_params(rng):
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3, 8]),
        temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
        max_tokens=rng.choice([1, 3, 10, 25]),
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(2**64),
        label_token_ids=tuple(range(VOCAB)),
    )


@cache
def run_mix(seed):
    """Some calls on one engine; the largest error of them all, and what the engine went through."""
    rng = random.Random(seed)
    names = list(range(VOCAB))
    size = rng.choice([2, 8])
    blocks = CONTEXT // size + rng.choice([1, 10, 100])
    llm = LLM(
        revealing_model(names),
        block_size=size,
        kv_cache_gb=(blocks + 0.5) * 2 * 4 * 2 * 8 * size / 2**30,
        max_batch_tokens=rng.choice([10, 40, 300]),
        max_sequences=rng.choice([4, 20, 256]),
    )
    pool = random_prompts(rng, 30)
    errors, aborted = [], 0
    for _ in range(3):
        event = rng.choice(["none", "reset", "update"])
        if event == "reset":
            llm.reset_prefix_cache()
        if event == "update":
            rng.shuffle(names)
            llm.update_weights({"model.layers.0.self_attn.v_proj.weight": values_of(names)})
        llm._scheduler.used_share, llm._scheduler.finished_candidates = rng.choice([(1.0, 0), (0.01, 10**6)])
        prompts = rng.sample(pool, 12)
        stops_some = rng.random() < 0.5
        seen = set()
        for output in llm.stream(prompts, [random_params(rng) for _ in prompts]):
            assert output.index not in seen
            seen.add(output.index)
            errors.append(worst_error(output, names))
            aborted += sum(answer.finish_reason == "abort" for answer in output.outputs)
            if stops_some and rng.random() < 0.2:
                llm.abort(rng.sample(range(12), 2))
            if rng.random() < 0.05:
                llm.reset_prefix_cache()  # what runs keeps its blocks
            llm._scheduler.check()
        assert len(seen) == 12
        assert len(llm._pool.free) == llm._pool.num_blocks - 1
    return np.max(errors), {**llm.stats(), "aborted": aborted}


@pytest.mark.parametrize("seed", range(24))
def test_every_log_prob_is_that_of_the_true_context(seed):
    assert run_mix(seed)[0] <= TOLERANCE


@pytest.mark.full
def test_200_more_mixes():
    assert [seed for seed in range(100, 300) if not run_mix(seed)[0] <= TOLERANCE] == []


def test_the_mixes_cross_what_they_are_meant_to_cross():
    names = ("preemptions", "recomputed_tokens", "prefix_tokens_saved", "fork_tokens_saved", "aborted")
    totals = {name: sum(run_mix(seed)[1][name] for seed in range(24)) for name in names}
    assert min(totals.values()) >= 10, totals


def test_one_wrong_key_in_the_longest_context_shows():
    """Another token, another order, one token twice, one left out, at the place where it matters least."""
    rng = random.Random(0)
    names = list(range(VOCAB))
    context = [rng.randrange(VOCAB) for _ in range(CONTEXT - 1)]
    context[60:62] = 4, 5  # tokens of one head, at a distance
    true = true_logprobs(context, names)[-1]
    for wrong in (
        [*context[:60], 6, *context[61:]],
        [*context[:60], 5, 4, *context[62:]],
        [*context[:60], 4, 4, *context[61:]],
        [*context[:60], *context[61:]],
    ):
        assert abs(true_logprobs(wrong, names)[-1] - true).max() > 10 * TOLERANCE
