"""A token drawn per row of logits: temperature, then top-k, then top-p over what is left, then min-p, then the pick.

x [R, V] fp32 -> y = (x - max) / temperature over the tokens that may be drawn; draw = argmax over those kept of
y + Gumbel noise (kernels/gumbel.py, stream 0), the lowest id on ties. Temperature 0 is greedy: argmax x.

- top-k keeps the k likeliest. top-p keeps the smallest set of likeliest tokens whose mass reaches top_p, of what top-k
  left, renormalised. Among equal logits the lower id comes first, so ties at a boundary are cut by id. min-p keeps what
  is at least min_p times as likely as the likeliest. The likeliest always stays.
- Masses and totals are float64: fp32 resolves 6e-8, and the tokens at the boundary of a wide nucleus weigh less.
- Forbidden ids and ids >= vocab (a padded head) are never drawn, but count in raw log-probs.

The reference sorts; csrc/sample.cpp draws the same tokens without, and so does kernels/sample_rows.py on a GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .gumbel import gumbel_noise_reference


class DrawRules(NamedTuple):
    """How each of R rows is drawn. Row r's forbidden ids are forbidden[forbidden_offsets[r] : forbidden_offsets[r + 1]],
    and likewise its labels, the ids whose raw log-probs are wanted; `ragged` makes both tensors from lists."""

    temperature: torch.Tensor  # fp32 [R]; 0: greedy
    top_k: torch.Tensor  # int64 [R]; 0: off
    top_p: torch.Tensor  # float64 [R]; 1: off
    min_p: torch.Tensor  # float64 [R]; 0: off
    seeds: torch.Tensor  # int64 [R], the bit pattern of the 64-bit seed
    positions: torch.Tensor  # int64 [R], below 2^32
    candidates: torch.Tensor  # int64 [R], below 2^32
    vocab: int
    forbidden_offsets: torch.Tensor  # int64 [R + 1]
    forbidden: torch.Tensor  # int64
    label_offsets: torch.Tensor  # int64 [R + 1]
    label_ids: torch.Tensor  # int64 [L]


class Draws(NamedTuple):
    """raw: log-prob at temperature 1 over all columns, before anything is forbidden or cut off. sampled: log-prob under
    the distribution that was sampled, renormalised over what was kept; 0 for greedy rows. A row that holds NaN or +inf,
    or nothing above -inf that may be drawn, has NaN for all its log-probs, and id 0."""

    ids: torch.Tensor  # int64 [R]
    raw: torch.Tensor  # fp32 [R]
    sampled: torch.Tensor  # fp32 [R]
    labels: torch.Tensor  # fp32 [L], raw


def ragged(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids, one per row -> offsets int64 [R + 1], ids int64, as `DrawRules` wants them."""
    offsets = [0]
    ids: list[int] = []
    for row in rows:
        ids.extend(row)
        offsets.append(len(ids))
    return torch.tensor(offsets), torch.tensor(ids, dtype=torch.int64)


def sample_reference(logits: torch.Tensor, rules: DrawRules) -> Draws:
    width = logits.shape[1]
    x = logits.double()
    allowed = x.clone()
    allowed[:, rules.vocab :] = -torch.inf
    allowed[_row_of(rules.forbidden_offsets), rules.forbidden] = -torch.inf
    top = allowed.amax(dim=-1, keepdim=True)
    broken = (x.isnan() | (x == torch.inf)).any(dim=-1) | (top[:, 0] == -torch.inf)

    greedy = rules.temperature == 0
    y = (allowed - top) / torch.where(greedy, 1.0, rules.temperature).double()[:, None]
    y = y.masked_fill(~kept(allowed, y, rules), -torch.inf)
    noise = gumbel_noise_reference(rules.seeds, rules.positions, rules.candidates, 0, width)
    ids = torch.where(greedy[:, None], allowed, y + noise.double()).argmax(dim=-1)
    ids = ids.masked_fill(broken, 0)

    raw = torch.log_softmax(x, dim=-1)
    sampled = torch.log_softmax(y, dim=-1).gather(1, ids[:, None])[:, 0].masked_fill(greedy, 0.0)
    label_rows = _row_of(rules.label_offsets)
    return Draws(
        ids,
        raw.gather(1, ids[:, None])[:, 0].masked_fill(broken, torch.nan).float(),
        sampled.masked_fill(broken, torch.nan).float(),
        raw[label_rows, rules.label_ids].masked_fill(broken[label_rows], torch.nan).float(),
    )


def kept(allowed: torch.Tensor, y: torch.Tensor, rules: DrawRules) -> torch.Tensor:
    """Which tokens survive top-k, top-p and min-p: bool [R, V]."""
    order = allowed.sort(dim=-1, descending=True, stable=True).indices
    top_k, top_p, min_p = (column[:, None] for column in (rules.top_k, rules.top_p, rules.min_p))
    by_k = (top_k == 0) | (torch.arange(y.shape[1], device=y.device) < top_k)
    likelihood = y.gather(1, order).exp()  # relative to the likeliest token
    upto = torch.where(by_k, likelihood, 0.0).cumsum(dim=-1)
    before = F.pad(upto[:, :-1], (1, 0))  # mass of the likelier tokens
    by_p = (top_p >= 1) | (before < top_p * upto[:, -1:])
    keep = by_k & by_p & (likelihood >= min_p)  # the first passes all three: at least one token stays
    return torch.zeros_like(keep).scatter(1, order, keep)


def _row_of(offsets: torch.Tensor) -> torch.Tensor:
    """The row of every entry."""
    return torch.repeat_interleave(offsets.diff())
