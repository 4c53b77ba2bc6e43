"""How a token is drawn from logits: parameters, truncations, and the pick by Gumbel noise.

Plain functions over [rows, vocab], one row per (sequence, candidate); every operation works row by row, so a row's
result does not depend on its neighbours. Order: temperature, then top-k, then top-p over what is left, then min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """What to sample. `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0` switch a truncation off.

    `logprobs=1` returns the raw log-prob (temperature 1, before truncation) of every sampled token, `label_token_ids` those
    of the given tokens at every step. `seed=None` draws a
    seed from the engine's request counter, so results then depend on the order of requests. In the first `min_tokens`
    tokens EOS and `stop_token_ids` cannot be drawn, and stop strings are not looked for.
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
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        self._integer("n", 1)
        self._integer("top_k", 0)
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


@dataclass(frozen=True)
class RowParams:
    """The truncation parameters of a tile, one value per row: all [rows, 1]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> RowParams:
        def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)[:, None]

        return RowParams(
            column([p.temperature for p in params], torch.float32),
            column([p.top_k for p in params], torch.int64),
            column([p.top_p for p in params], torch.float64),
            column([p.min_p for p in params], torch.float64),
        )

    @property
    def cuts(self) -> torch.Tensor:
        """Which rows cut anything off: bool [rows, 1]."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    @property
    def truncates(self) -> bool:
        """Whether any row of the tile cuts anything off (a row that does not gets the same bits either way)."""
        return bool(self.cuts.any())


def tempered(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """log-probs [rows, vocab] fp32 at each row's temperature; a greedy row at temperature 1 (its pick ignores them)."""
    greedy = params.temperature == 0
    return torch.log_softmax(logits / torch.where(greedy, 1.0, params.temperature), dim=-1)


def kept(logp: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Which tokens survive top-k, top-p and min-p: bool [rows, vocab]; at least the likeliest one always does.

    top-p keeps the smallest set of likeliest tokens whose mass reaches top_p, of what top-k left, renormalised. Among
    equally likely tokens the lower id comes first, so ties at a boundary are cut by id. min-p keeps what is at least
    min_p times as likely as the likeliest. Masses are summed in fp64: fp32 resolves 6e-8, and the tokens at the
    boundary of a wide nucleus weigh less.
    """
    order = torch.sort(logp, dim=-1, descending=True, stable=True)
    ranks = torch.arange(logp.shape[-1], device=logp.device)[None, :]
    by_k = (params.top_k == 0) | (ranks < params.top_k)
    likelihood = (order.values.double() - order.values[:, :1]).exp()  # relative to the likeliest token
    mass = torch.where(by_k, likelihood, 0.0)
    upto = mass.cumsum(dim=-1)
    before = F.pad(upto[:, :-1], (1, 0))  # mass of the likelier tokens
    by_p = (params.top_p >= 1) | (before < params.top_p * upto[:, -1:])
    by_min = likelihood >= params.min_p
    keep = by_k & by_p & by_min  # the first rank passes all three: at least one token stays
    return torch.zeros_like(keep).scatter(1, order.indices, keep)


def forbid(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """A copy of logits [rows, vocab] in which row i cannot draw the ids of tokens[i]; logits itself if there are none."""
    places = [(row, token) for row, banned in enumerate(tokens) for token in banned if token < logits.shape[1]]
    if not places:
        return logits
    rows, ids = zip(*places, strict=True)
    return logits.index_put((torch.tensor(rows), torch.tensor(ids)), torch.tensor(-math.inf))


def sample(
    logits: torch.Tensor, params: RowParams, noise: torch.Tensor, forbidden: Sequence[Sequence[int]] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token per row: argmax of the kept log-probs plus Gumbel noise; greedy rows take the likeliest token.

    logits and noise [rows, vocab] fp32 -> ids int64 [rows]; raw log-prob (temperature 1, untruncated) [rows]; log-prob
    under the distribution that was sampled [rows] (0 for greedy rows). The lowest id wins ties. forbidden: ids that row i
    must not draw (nothing, or one sequence per row). A row that holds NaN or +inf, or nothing above -inf, has a NaN raw
    log-prob: the caller knows the row's name.
    """
    raw = torch.log_softmax(logits, dim=-1)
    logits = forbid(logits, forbidden)
    logp = tempered(logits, params)
    if params.truncates:
        logp = logp.masked_fill(~kept(logp, params), -math.inf)
    greedy = params.temperature == 0
    ids = torch.where(greedy, logits, logp + noise).argmax(dim=-1, keepdim=True)
    drawn = logp.gather(1, ids)
    if params.truncates:  # rows that do not truncate keep their bits: the sum's log is 0 only to rounding
        drawn = torch.where(params.cuts, drawn - torch.logsumexp(logp, dim=-1, keepdim=True), drawn)
    return ids.squeeze(1), raw.gather(1, ids).squeeze(1), torch.where(greedy, 0.0, drawn).squeeze(1)
