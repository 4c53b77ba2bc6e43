"""The two things that the loop spends its time on, as token ids: candidates for prompts, and judgements under one rubric."""

from __future__ import annotations

import random
from typing import NamedTuple

from engine import SamplingParams


class Workload(NamedTuple):
    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]  # one per prompt; EOS is ignored, so that the work does not depend on the weights

    @property
    def new_tokens(self) -> int:
        return sum(params.n * params.max_tokens for params in self.params)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def prompt_tokens_per_candidate(self) -> int:
        """What an engine computes that shares nothing."""
        return sum(len(prompt) * params.n for prompt, params in zip(self.prompts, self.params, strict=True))


def sampling(seed: int, scale: float = 1.0) -> Workload:
    """32 prompts of 128 tokens, 4 candidates each, 128 new tokens."""
    rng = random.Random(seed)
    return _workload("sampling", [_ids(rng, 128) for _ in range(_scaled(32, scale))], 4, 128, rng)


def judging(seed: int, scale: float = 1.0) -> Workload:
    """48 judge prompts of 512 tokens of which the first 256 are the same rubric, 3 draws each, 64 new tokens."""
    rng = random.Random(seed)
    rubric = _ids(rng, 256)
    return _workload("judging", [[*rubric, *_ids(rng, 256)] for _ in range(_scaled(48, scale))], 3, 64, rng)


def _workload(name: str, prompts: list[list[int]], n: int, new: int, rng: random.Random) -> Workload:
    params = [
        SamplingParams(n=n, temperature=0.7, top_p=0.9, max_tokens=new, ignore_eos=True, seed=rng.randrange(2**63))
        for _ in prompts
    ]
    return Workload(name, prompts, params)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 32000) for _ in range(count)]


def _scaled(count: int, scale: float) -> int:
    return max(2, round(count * scale))


WORKLOADS = {"sampling": sampling, "judging": judging}
