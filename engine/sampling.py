"""What is asked of a token: a user's parameters, and the rules for a batch of rows that `ops.sample_rows` draws by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import NamedTuple

import torch

from engine import ops
from engine.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """What to sample. `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0` switch a truncation off.

    `logprobs=1` returns the raw log-prob (temperature 1, before truncation) of every sampled token, `label_token_ids`
    those of the given tokens at every step. `seed=None` draws a seed from the engine's request counter, so results then
    depend on the order of requests. In the first `min_tokens` tokens EOS and `stop_token_ids` cannot be drawn, and stop
    strings are not looked for.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int = 0
    label_token_ids: Sequence[int] | None = ()

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "label_token_ids"):  # None, as in vLLM, is no restriction
            value = getattr(self, name)
            if not isinstance(value, (str, Sequence, NoneType)):
                raise InputError(f"SamplingParams.{name} is {value!r}; expected a list")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"SamplingParams.ignore_eos is {self.ignore_eos!r}; expected True or False")
        self._integer("n", 1)
        self._integer("top_k", 0, 2**31 - 1)  # 0 is off
        self._integer("max_tokens", 1)
        self._integer("min_tokens", 0, self.max_tokens)
        self._integer("logprobs", 0, 1)
        self._number("temperature", 0.0, 1e6)
        if 0.0 < self.temperature < 1e-6:  # logits / temperature must stay finite in fp32
            raise InputError(
                f"SamplingParams.temperature is {self.temperature!r}; expected 0 (greedy) or at least 1e-6"
            )
        self._number("top_p", 0.0, 1.0, open_below=True)
        self._number("min_p", 0.0, 1.0)
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1)
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise InputError(f"SamplingParams.stop holds {text!r}; expected non-empty strings")
        for name in ("stop_token_ids", "label_token_ids"):
            for token in getattr(self, name):
                if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                    raise InputError(f"SamplingParams.{name} holds {token!r}; expected token ids")

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            limit = f"{low}..{high}" if high is not None else f"of at least {low}"
            raise InputError(f"SamplingParams.{name} is {value!r}; expected an integer {limit}")

    def _number(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (open_below and value == low):
            raise InputError(
                f"SamplingParams.{name} is {value!r}; expected {'above' if open_below else 'from'} {low} to {high}"
            )


GREEDY = SamplingParams(temperature=0.0)


class Query(NamedTuple):
    """One token to draw, or only log-probs to read (`labels`), from the logits of a computed row."""

    row: int
    params: SamplingParams = GREEDY
    seed: int = 0
    position: int = 0  # of the token in its sequence
    candidate: int = 0
    forbidden: Sequence[int] = ()
    labels: Sequence[int] = ()


def draw_rules(queries: Sequence[Query], vocab: int) -> ops.DrawRules:
    """The rules of all queries; ids from `vocab` on are never drawn."""
    params = [query.params for query in queries]
    forbidden_offsets, forbidden = ops.ragged([query.forbidden for query in queries])
    label_offsets, label_ids = ops.ragged([query.labels for query in queries])
    return ops.DrawRules(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        seeds=torch.tensor([_signed(query.seed) for query in queries]),
        positions=torch.tensor([query.position for query in queries]),
        candidates=torch.tensor([query.candidate for query in queries]),
        vocab=vocab,
        forbidden_offsets=forbidden_offsets,
        forbidden=forbidden,
        label_offsets=label_offsets,
        label_ids=label_ids,
    )


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what an int64 tensor holds."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
