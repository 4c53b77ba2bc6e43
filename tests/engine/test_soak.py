"""Thousands of requests through a cache that holds a twentieth of what they need: nothing is lost, mixed up or kept."""

import os
import random
from pathlib import Path

import pytest

from engine.llm import LLM
from engine.sampling import SamplingParams

M0 = Path(__file__).parents[2] / "selfreward" / "tiny" / "m0"
BLOCK = 4
VOCAB, CONTEXT = 54, 128
SLOT_BYTES = 2 * 4 * 4 * 4 * 32  # keys and values, fp32, 4 layers, 4 heads of 32


def random_request(rng):
    prompt = [1, *(rng.randrange(3, VOCAB) for _ in range(rng.randrange(rng.choice([4, 20, 70]))))]
    return prompt, SamplingParams(
        n=rng.choice([1, 1, 1, 2, 4, 8]),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        max_tokens=rng.choice([1, 5, 12, 40, 80]),
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(2**64),
        logprobs=1,
    )


def blocks_needed(requests):
    return sum(params.n * -(-min(len(prompt) + params.max_tokens, CONTEXT) // BLOCK) for prompt, params in requests)


def bits(output):
    return [(o.token_ids, o.logprobs, o.sampled_logprobs, o.text, o.finish_reason) for o in output.outputs]


def check_counts(output, prompt, params):
    assert output.prompt_token_ids == prompt
    assert [answer.index for answer in output.outputs] == list(range(params.n))
    limit = min(params.max_tokens, CONTEXT - len(prompt))
    for answer in output.outputs:
        ids, ended = answer.token_ids, answer.token_ids[-1] == 2 and not params.ignore_eos
        assert len(ids) == len(answer.logprobs) == len(answer.sampled_logprobs)
        assert 2 not in ids[:-1] or params.ignore_eos
        assert answer.finish_reason == ("stop" if ended else "length")
        assert 1 <= len(ids) <= limit and (ended or len(ids) == limit)


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(count, streams, seed, share=20):
    """`count` requests in some streams on one engine whose cache holds one `share`-th of what a stream needs; the resident
    memory behind every thousand requests."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(count)]
    parts = [requests[start::streams] for start in range(streams)]
    blocks = max(blocks_needed(part) for part in parts) // share
    llm = LLM(M0, block_size=BLOCK, kv_cache_gb=(blocks + 0.5) * BLOCK * SLOT_BYTES / 2**30)
    alone = LLM(M0, block_size=BLOCK, kv_cache_gb=300 * BLOCK * SLOT_BYTES / 2**30)
    for engine in (llm, alone):  # memory is taken as it is used: use all of it now
        engine._runner.keys.zero_()
        engine._runner.values.zero_()
    memory = []
    for part in parts:
        chosen = dict.fromkeys(rng.sample(range(len(part)), 20 // streams))
        seen = set()
        for output in llm.stream([prompt for prompt, _ in part], [params for _, params in part]):
            assert output.index not in seen
            seen.add(output.index)
            check_counts(output, *part[output.index])
            if output.index in chosen:
                chosen[output.index] = bits(output)
            if len(seen) % 100 == 0:
                llm._scheduler.check()
            if len(seen) % 1000 == 0:
                memory.append(resident())
            if len(seen) // 100 % 2:
                llm._scheduler.used_share = 0.0  # too hopeful: sequences are preempted
        assert len(seen) == len(part)
        llm._scheduler.check()
        assert llm._scheduler.idle and len(llm._pool.free) == llm._pool.num_blocks - 1 == blocks
        for index, found in chosen.items():
            assert found == bits(alone.generate([part[index][0]], part[index][1])[0])
    assert llm.stats()["requests"] == count and llm.stats()["preemptions"] > 0
    return memory


def test_500_requests():
    soak(500, 2, seed=0)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: resident memory cannot be read")
@pytest.mark.parametrize(("streams", "share"), [(10, 20), (1, 200)], ids=["ten streams", "one stream, half a percent"])
def test_10000_requests_leave_no_memory_behind(streams, share):
    memory = soak(10_000, streams, seed=1, share=share)
    assert len(memory) == 10
    assert max(memory[5:]) <= max(memory[:5]) + 4 * 2**20
