"""Needle tests: a request in any company, bit for bit the same as the request alone; and tests that break it on purpose."""

import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from engine import _C, ops
from engine.llm import LLM
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config

CONTEXT = 512
MODELS = [
    random_llama(small_config()),
    random_llama(small_config(n_heads=4, n_kv_heads=4, ffn_dim=200), seed=1),  # MHA
    random_llama(small_config(dim=96, n_heads=6, n_kv_heads=1, head_dim=10, vocab_size=301), seed=2),  # MQA, odd sizes
    random_llama(small_config(dim=72, n_heads=6, n_kv_heads=2, head_dim=12), seed=3, dtype=torch.bfloat16),
]


def bits(output):
    return [(o.token_ids, o.logprobs, o.sampled_logprobs, o.label_logprobs, o.finish_reason) for o in output.outputs]


def prompts_of(rng, count, vocab):
    """Prompts of 1 token to nearly the whole context; most share a beginning of any length with another one."""
    prompts = []
    for _ in range(count):
        longest = CONTEXT - 1 if rng.random() < 0.05 else rng.choice([8, 40, 150])
        head = rng.choice(prompts) if prompts and rng.random() < 0.6 else []
        head = head[: rng.randrange(len(head) + 1)]
        tail = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, longest + 1))]
        prompts.append([*head, *tail][: CONTEXT - 1])
    return prompts


def params_of(rng, vocab):
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3, 8]),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        top_k=rng.choice([0, 0, 5]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        max_tokens=rng.choice([1, 3, 8, 30, 60]),
        min_tokens=rng.choice([0, 1]),
        ignore_eos=rng.random() < 0.3,
        seed=rng.randrange(2**64),
        logprobs=1,
        label_token_ids=rng.choice([(), (5, 7, vocab - 1)]),
    )


class Mix:
    """A random batch on a random engine: budgets, places, a cache that is too small, hits from an earlier call."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.model = rng.choice(MODELS)
        vocab = self.model.config.vocab_size
        self.block_size = rng.choice([8, 16, 64])
        self.prompts = prompts_of(rng, rng.choice([1, 4, 30, 128]), vocab)
        self.params = [params_of(rng, vocab) for _ in self.prompts]
        self.threads = rng.choice([1, 2])
        longest = CONTEXT // self.block_size + 2
        self.options = {
            "block_size": self.block_size,
            "max_batch_tokens": rng.choice([1, 7, 64, 200, 512]) if len(self.prompts) < 30 else rng.choice([64, 300]),
            "max_sequences": rng.choice([1, 5, 40, 256]),
        }
        self.blocks = rng.choice([longest, 2 * longest, 2000])
        self.hopeful = rng.random() < 0.7  # the forecast expects short answers: sequences are preempted
        self.warm = rng.random() < 0.5
        self.chosen = rng.sample(range(len(self.prompts)), min(4, len(self.prompts)))

    def engine(self):
        c = self.model.config
        block = 2 * self.model.embed.itemsize * c.n_layers * c.n_kv_heads * c.head_dim * self.block_size
        return LLM(self.model, kv_cache_gb=self.blocks * block / 2**30, **self.options)

    def run(self):
        """All outputs' bits, and the engine's statistics."""
        llm = self.engine()
        if self.warm:
            llm.generate(self.prompts[::2], SamplingParams(max_tokens=2, seed=1))
        if self.hopeful:
            llm._scheduler.used_share, llm._scheduler.finished_candidates = 0.01, 10**6
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        _C.share_little(True)  # else the kernels leave so small a model to one thread
        try:
            outputs = llm.generate(self.prompts, self.params)
        finally:
            torch.set_num_threads(before)
            _C.share_little(False)
        llm._scheduler.check()
        return [bits(output) for output in outputs], llm.stats()

    def alone(self, index):
        return bits(LLM(self.model, block_size=self.block_size).generate([self.prompts[index]], self.params[index])[0])


@cache
def run_mix(seed):
    """The chosen requests whose bits depend on their company, and the statistics."""
    mix = Mix(seed)
    found, stats = mix.run()
    return [index for index in mix.chosen if found[index] != mix.alone(index)], stats


@pytest.mark.parametrize(
    "seed", [seed if seed < 7 else pytest.param(seed, marks=pytest.mark.full) for seed in range(20)]
)
def test_a_request_in_any_company_equals_the_request_alone(seed):
    assert run_mix(seed)[0] == []


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_200_more_mixes():
    assert [seed for seed in range(100, 300) if run_mix(seed)[0]] == []


def test_the_mixes_cross_what_they_are_meant_to_cross():
    """Preemption, hits, forks and shared chunks all occur in the mixes above."""
    totals = {"preemptions": 0, "recomputed_tokens": 0, "prefix_tokens_saved": 0, "fork_tokens_saved": 0}
    shared = 0
    for seed in range(20):
        _, stats = run_mix(seed)
        for name in totals:
            totals[name] += stats[name]
        shared += stats["kv_bytes_read"] < stats["kv_bytes_ungrouped"]
    assert min(totals.values()) > 10 and shared >= 5


def test_scores_in_any_company_equal_what_generate_reported():
    for seed in (3, 4, 5):
        mix = Mix(seed)
        llm = mix.engine()
        outputs = llm.generate(mix.prompts, mix.params)
        completions = [[answer.token_ids for answer in output.outputs] for output in outputs]
        scores = llm.score(mix.prompts, completions)
        assert scores == [[answer.logprobs for answer in output.outputs] for output in outputs]


# ---- broken on purpose -----------------------------------------------------------------------------------------------


def rowwise_attention(q, key_pages, value_pages, items, positions, threads, common_maximum=False):
    """chunk_attention, every row by itself in products of one shape; common_maximum: rows of an item influence each other."""
    rows, heads, dim = q.shape
    groups, size = key_pages.shape[1], key_pages.shape[3]
    scaled = (q * dim**-0.5).view(rows, groups, heads // groups, dim)
    m = torch.full((rows, groups, heads // groups, 1), -torch.inf)
    total, out = torch.zeros_like(m), torch.zeros_like(scaled)
    for page, chunk, first, last in items.tolist():
        scores = {}
        for row in range(first, last):
            seen = min(size, int(positions[row]) + 1 - chunk * size)
            hidden = torch.arange(size) >= seen
            scores[row] = torch.bmm(scaled[row], key_pages[page]).masked_fill(hidden, -torch.inf)
        for row, score in scores.items():
            top = score.amax(-1, keepdim=True)
            if common_maximum:
                top = torch.stack(list(scores.values())).amax((0, -1))[..., None]
            weights = (score - top).exp()
            new = torch.maximum(m[row], top)
            a, b = (m[row] - new).exp(), (top - new).exp()
            total[row] = a * total[row] + b * weights.sum(-1, keepdim=True)
            out[row] = a * out[row] + b * torch.bmm(weights, value_pages[page])
            m[row] = new
    return (out / total).view(q.shape)


def reversed_for_companions(q, key_pages, value_pages, items, positions, threads):
    """Shared items are folded last and in descending order."""
    alone = items[:, 3] - items[:, 2] == 1
    order = torch.cat((items[alone], items[~alone].flip(0)))
    return rowwise_attention(q, key_pages, value_pages, order, positions, threads)


def companions(n=2, attention=None, linear=None):
    """Whether three requests with a common beginning of two blocks are the same together as alone."""
    rng = random.Random(9)
    model = MODELS[0]
    head = [rng.randrange(3, 111) for _ in range(16)]
    prompts = [[*head, *(rng.randrange(3, 111) for _ in range(5))] for _ in range(3)]
    params = SamplingParams(n=n, max_tokens=12, ignore_eos=True, seed=3, logprobs=1)
    with pytest.MonkeyPatch.context() as patch:
        if attention or linear:
            patch.setattr(ops, "forward_is_native", lambda: False)
        if attention:
            patch.setattr(ops, "chunk_attention", attention)
        if linear:
            patch.setattr(ops, "linear", linear)
        together = [bits(o) for o in LLM(model, block_size=8).generate(prompts, params)]
        return together == [bits(LLM(model, block_size=8).generate([prompt], params)[0]) for prompt in prompts]


def test_companions_do_not_matter_to_the_native_kernels_nor_to_attention_row_by_row():
    assert companions()
    assert companions(attention=rowwise_attention)


def test_inverse_grouping_that_lets_rows_influence_each_other_is_noticed():
    assert not companions(attention=lambda *given: rowwise_attention(*given, common_maximum=True))


def test_inverse_another_merge_order_for_shared_chunks_is_noticed():
    assert companions(n=1, attention=rowwise_attention)
    assert not companions(n=1, attention=reversed_for_companions)


def unpacked(packed):
    return torch.from_numpy(packed.panels).transpose(1, 2).flatten(0, 1)[: packed.outputs]


def test_inverse_a_product_whose_sums_depend_on_the_number_of_rows_is_noticed():
    assert not companions(linear=lambda x, packed, threads: F.linear(x, unpacked(packed)))
