"""Sampling in bf16 on a CPU: how far its numbers lie from the same weights in fp32, and what it holds."""

import pytest
import torch
import torch.nn.functional as F

from engine.llm import LLM
from engine.model import tree_attend
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config, widened

DEEP = small_config(dim=256, n_layers=6, n_heads=8, head_dim=32, ffn_dim=512, vocab_size=1000)
PROMPTS = [[1, *((7 * p + 11 * i) % 100 + 3 for i in range(20 * p))] for p in range(8)]


@torch.no_grad()
def forward_logits(model, ids):
    """The trainer's forward of one sequence."""
    tokens = torch.tensor(ids)
    hidden = model(tokens, torch.arange(len(ids)), tree_attend(torch.full((len(ids),), len(ids))))
    return F.linear(hidden, model.head).float()


@pytest.mark.parametrize(("config", "bound"), [(small_config(), 0.03), (DEEP, 0.15)])
def test_log_probs_lie_nearer_to_fp32_than_those_of_torchs_bf16_forward(config, bound):
    """bound: of the worst token, times rms(logits); measured over four seeds each: 0.027 and 0.123."""
    model = random_llama(config, dtype=torch.bfloat16)
    exact = widened(model)
    ours, torchs = [], []
    for output in LLM(model).generate(PROMPTS, SamplingParams(n=2, max_tokens=40, seed=3, logprobs=1)):
        for answer in output.outputs:
            ids = [*output.prompt_token_ids, *answer.token_ids]
            rows = torch.arange(len(output.prompt_token_ids) - 1, len(ids) - 1)
            logits = forward_logits(exact, ids)
            scale = max(1.0, logits.square().mean().sqrt().item())
            drawn = torch.tensor(answer.token_ids)
            expected, rounded = (x.log_softmax(-1)[rows, drawn] for x in (logits, forward_logits(model, ids)))
            ours.append((torch.tensor(answer.logprobs) - expected) / scale)
            torchs.append((rounded - expected) / scale)
    ours, torchs = torch.cat(ours), torch.cat(torchs)
    assert 0 < ours.abs().max() <= bound
    assert ours.square().mean() < torchs.square().mean()


def test_score_gives_the_bits_that_generate_reported():
    llm = LLM(random_llama(small_config(), dtype=torch.bfloat16))
    outputs = llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=20, seed=3, logprobs=1))
    scores = llm.score(PROMPTS, [[answer.token_ids for answer in output.outputs] for output in outputs])
    assert scores == [[answer.logprobs for answer in output.outputs] for output in outputs]


def test_pages_and_packed_matrices_take_half_the_memory_of_fp32():
    stats = {}
    for dtype in (torch.float32, torch.bfloat16):
        llm = LLM(random_llama(small_config(), dtype=dtype))
        llm.generate(PROMPTS, SamplingParams(max_tokens=8, seed=3, ignore_eos=True))
        assert llm._runner.keys.dtype == llm._runner.values.dtype == dtype
        stats[dtype] = llm.stats()
    for name in ("kv_bytes_read", "packed_bytes"):
        assert stats[torch.float32][name] == 2 * stats[torch.bfloat16][name] > 0
