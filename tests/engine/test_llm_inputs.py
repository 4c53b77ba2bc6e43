"""What an LLM refuses: the message names the value, and the engine answers as before."""

import math
import re

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError, InputError
from engine.llm import LLM
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config

MODEL = random_llama(small_config())
PARAMS = SamplingParams(max_tokens=4, seed=0, logprobs=1)


def bits(llm):
    answer = llm.generate([[1, 2, 3]], PARAMS)[0].outputs[0]
    return answer.token_ids, answer.logprobs


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL)


@pytest.fixture(scope="module")
def healthy():
    return bits(LLM(MODEL))


@pytest.mark.parametrize("model", [None, 7, b"m", [1]])
def test_a_model_that_is_neither_directory_nor_llama_is_named(model):
    with pytest.raises(InputError, match=re.escape(f"model is {model!r}; expected a Llama or a LoRA, or the path")):
        LLM(model)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/m: there is no such directory"):
        LLM(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 0}, "max_model_len is 0; expected an integer from 1 to 512"),
        ({"max_model_len": 513}, "max_model_len is 513"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"max_sequences": -1}, "max_sequences is -1"),
        ({"max_sequences": True}, "max_sequences is True"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 1.5}, "block_size is 1.5"),
        ({"kv_cache_gb": -1}, "kv_cache_gb is -1"),
        ({"kv_cache_gb": math.nan}, "kv_cache_gb is nan"),
        ({"tokenizer": "/nowhere"}, "/nowhere: there is no such tokenizer"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(InputError, match=message):
        LLM(MODEL, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [1, -1]], "prompt 1 holds token -1"),
        ([[10**30]], f"prompt 0 holds token {10**30}"),
        ([[1, 2.0]], r"prompt 0 is \[1, 2.0\]; expected text or a list of token ids"),
        ([None], "prompt 0 is None"),
        ([[1, None]], r"prompt 0 is \[1, None\]"),
        ({"prompt": "x"}, "prompt 0 is None"),
        (torch.tensor([1, 2]), r"prompts is tensor\(\[1, 2\]\); expected text, a list of token ids"),
        ([np.array([1, 2])], r"prompt 0 is array\(\[1, 2\]\)"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [1] * 600], "prompt 1 needs 601 tokens"),
    ],
)
def test_a_bad_prompt_is_named_and_the_engine_answers_as_before(llm, healthy, prompts, message):
    for call in (llm.generate, llm.stream):
        with pytest.raises(InputError, match=message):
            call(prompts, PARAMS)
    assert bits(llm) == healthy


@pytest.mark.parametrize("params", [5, "greedy", {"n": 1}, [None]])
def test_params_of_another_type_are_named(llm, healthy, params):
    found = params[0] if isinstance(params, list) else params
    with pytest.raises(InputError, match=f"params of prompt 0 are a {type(found).__name__}; expected SamplingParams"):
        llm.generate([[1, 2]], params)
    assert bits(llm) == healthy


@pytest.mark.parametrize(
    ("prompt", "completions", "message"),
    [
        ([1, 2], [[]], "a completion of prompt 0 is empty"),
        ([1, 2], [[5], [111]], r"a completion of prompt 0 holds token 111; the model's vocabulary is 0\.\.110"),
        ([1, 2], [None], "a completion of prompt 0 is None"),
        ([1, 2], [], "prompt 0 has no completions"),
        ([1, 2], ["text"], "a completion of prompt 0 is text; this LLM has no tokenizer"),
        ([[1]], [[[1]], [[1]]], "1 prompts and 2 lists of completions"),
        ([1] * 500, [[1], [1] * 20], "prompt 0 needs 520 tokens"),
    ],
)
def test_a_bad_completion_is_named_and_the_engine_answers_as_before(llm, healthy, prompt, completions, message):
    with pytest.raises(InputError, match=message):
        llm.score(prompt, completions)
    assert bits(llm) == healthy


def test_an_update_that_makes_nan_names_the_prompt_and_the_next_update_heals(healthy):
    llm = LLM(random_llama(small_config()))
    llm.update_weights({"model.norm.weight": torch.full((64,), math.nan)})
    with pytest.raises(FloatingPointError, match="prompt 0: the logits are NaN or infinite"):
        llm.generate([[1, 2, 3]], PARAMS)
    llm._scheduler.check()
    assert llm._scheduler.idle and len(llm._pool.free) == llm._pool.num_blocks - 1
    llm.update_weights({"model.norm.weight": torch.ones(64)})
    assert bits(llm) == healthy


def test_weights_changed_behind_the_engines_back_within_a_stream_end_it_and_announced_ones_are_used():
    model = random_llama(small_config(), seed=1)
    llm = LLM(model, max_sequences=2)
    stream = llm.stream([[1, 2, 3]] * 8, PARAMS)
    next(stream)
    with torch.no_grad():
        model.head.mul_(1.5)
    with pytest.raises(InputError, match="changed in place without model"):
        list(stream)
    assert len(llm._pool.free) == llm._pool.num_blocks - 1
    model.weights_changed()
    assert bits(llm) == bits(LLM(model))


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate(None),
        lambda llm: llm.generate(5),
        lambda llm: llm.score([1, 2], None),
        lambda llm: llm.score(None, None),
        lambda llm: llm.abort(5),
        lambda llm: llm.update_weights(None),
        lambda llm: llm.update_weights({"model.norm.weight": [1.0] * 64}),
        lambda llm: LLM(MODEL, kv_cache_gb=math.inf),
        lambda llm: LLM(MODEL, kv_cache_gb="1"),
        lambda llm: LLM(MODEL, tokenizer=5),
        lambda llm: LLM(MODEL, seed="x"),
        lambda llm: SamplingParams(stop=5),
        lambda llm: SamplingParams(stop_token_ids=5),
        lambda llm: SamplingParams(ignore_eos="no"),
    ],
)
def test_a_value_of_another_type_is_an_input_error(llm, call):
    with pytest.raises(InputError):
        call(llm)
