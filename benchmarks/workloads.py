"""What the loop spends its time on, as token ids: candidates for prompts, judgements under one rubric, and two extremes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from engine import SamplingParams


class Workload(NamedTuple):
    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]  # one per prompt; EOS is ignored, so that the work does not depend on the weights
    shared: int = 0  # tokens that all prompts begin with

    @property
    def new_tokens(self) -> int:
        return sum(params.n * params.max_tokens for params in self.params)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def distinct_prompt_tokens(self) -> int:
        """What an engine computes that shares everything."""
        return self.prompt_tokens - self.shared * (len(self.prompts) - 1)

    @property
    def prompt_tokens_per_candidate(self) -> int:
        """What an engine computes that shares nothing."""
        return sum(len(prompt) * params.n for prompt, params in zip(self.prompts, self.params, strict=True))

    def shortened(self, new: int) -> Workload:
        """The same prompts with at most `new` tokens each."""
        return self._replace(params=[replace(params, max_tokens=min(new, params.max_tokens)) for params in self.params])


def sampling(seed: int, scale: float = 1.0, prompts: int = 32) -> Workload:
    """32 prompts of 128 tokens, 4 candidates each, 128 new tokens."""
    rng = random.Random(seed)
    return _workload("sampling", [_ids(rng, 128) for _ in range(_scaled(prompts, scale))], 4, 128, rng)


def judging(seed: int, scale: float = 1.0, prompts: int = 48) -> Workload:
    """48 judge prompts of 512 tokens of which the first 256 are the same rubric, 3 draws each, 64 new tokens."""
    rng = random.Random(seed)
    rubric = _ids(rng, 256)
    asked = [[*rubric, *_ids(rng, 256)] for _ in range(_scaled(prompts, scale))]
    return _workload("judging", asked, 3, 64, rng)._replace(shared=256)


def prefill(seed: int, scale: float = 1.0) -> Workload:
    """8 prompts of 512 tokens, one new token: the products at their largest."""
    rng = random.Random(seed)
    return _workload("prefill", [_ids(rng, 512) for _ in range(_scaled(8, scale))], 1, 1, rng, temperature=0.0)


def single(seed: int, scale: float = 1.0) -> Workload:
    """One prompt of 128 tokens, 128 new ones, greedy: every weight is read for every token."""
    rng = random.Random(seed)
    return _workload("single", [_ids(rng, 128)], 1, 128, rng, temperature=0.0)


def _workload(
    name: str, prompts: list[list[int]], n: int, new: int, rng: random.Random, temperature: float = 0.7
) -> Workload:
    top_p = 0.9 if temperature else 1.0
    params = [
        SamplingParams(
            n=n, temperature=temperature, top_p=top_p, max_tokens=new, ignore_eos=True, seed=rng.randrange(2**63)
        )
        for _ in prompts
    ]
    return Workload(name, prompts, params)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 32000) for _ in range(count)]


def _scaled(count: int, scale: float) -> int:
    return max(2, round(count * scale))


ABLATED: dict[str, Callable[[int, float], Workload]] = {
    "sampling": sampling,
    "judging": judging,
}  # large enough that every idea has something to do
COMPARED: dict[str, Callable[[int, float], Workload]] = {  # small enough for engines that take minutes
    "sampling": partial(sampling, prompts=8),
    "judging": partial(judging, prompts=8),
    "prefill": prefill,
    "single": single,
}
