"""Blocks of 8 tokens cross the paths that the tiny world's short contexts leave out with blocks of 64: many chunks, sharing
and eviction. The block size is part of the numbers, so results agree within bounds, not bit for bit."""

import pytest
import torch

from engine import LLM, SamplingParams, Tokenizer, load_checkpoint, tree_attend
from selfreward.formats import load_prompts
from selfreward.recipe import Recipe

RECIPE = Recipe.load("micro")
TOKENIZER = Tokenizer(RECIPE.model)
MODEL = load_checkpoint(RECIPE.model)
PROMPTS = [TOKENIZER.chat_prompt(row["prompt"]) for row in load_prompts(RECIPE.data.heldout)[:96]]


@pytest.fixture(scope="module")
def blocks_of():
    return {size: LLM(MODEL, tokenizer=TOKENIZER, block_size=size) for size in (8, 64)}


def logits(ids):
    """The trainer's forward over one sequence [tokens, vocab]."""
    with torch.no_grad():
        hidden = MODEL(torch.tensor(ids), torch.arange(len(ids)), tree_attend(torch.full((len(ids),), len(ids))))
        return hidden @ MODEL.head.T


def test_greedy_text_agrees_or_the_top_two_are_as_good_as_equal(blocks_of):
    params = SamplingParams(temperature=0.0, max_tokens=32)
    small, large = (blocks_of[size].generate(PROMPTS, params) for size in (8, 64))
    for prompt, one, two in zip(PROMPTS, small, large, strict=True):
        a, b = one.outputs[0].token_ids, two.outputs[0].token_ids
        if a != b:
            same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            row = logits([*prompt, *a[:same]])[-1]
            top = row.topk(2).values
            assert top[0] - top[1] <= 1e-4 * row.square().mean().sqrt()


def test_teacher_forced_logprobs_agree_within_the_bound(blocks_of):
    sampled = blocks_of[64].generate(PROMPTS, SamplingParams(n=2, max_tokens=32, seed=1))
    answers = [[one.token_ids for one in output.outputs] for output in sampled]
    small, large = (blocks_of[size].score(PROMPTS, answers) for size in (8, 64))
    worst = 0.0
    for prompt, texts, one, two in zip(PROMPTS, answers, small, large, strict=True):
        for text, a, b in zip(texts, one, two, strict=True):
            rms = logits([*prompt, *text]).square().mean().sqrt().item()
            difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
            assert difference <= 2e-5 * max(1.0, rms)
            worst = max(worst, difference)
    assert worst > 0.0  # else both ran with the same blocks


def test_a_cache_of_few_blocks_gives_the_same_bits(blocks_of):
    """Eviction and waiting change nothing: 40 blocks of 8 hold about ten of the 96 requests."""
    bytes_per_block = 2 * 4 * 4 * 4 * 32 * 8  # keys and values, fp32, layers, heads, dims, tokens
    few = LLM(MODEL, tokenizer=TOKENIZER, block_size=8, kv_cache_gb=40 * bytes_per_block / 2**30)
    assert few.stats()["blocks"] == 40
    params = SamplingParams(n=2, max_tokens=32, seed=1, logprobs=1)
    one, two = (
        [[(o.token_ids, o.logprobs) for o in output.outputs] for output in llm.generate(PROMPTS, params)]
        for llm in (few, blocks_of[8])
    )
    assert one == two
