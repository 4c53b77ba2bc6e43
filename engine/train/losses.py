"""The losses, one function each, over per-edge log-probabilities. All return (loss, metrics); metrics are plain floats.

Every loss is divided by a count of the *whole* batch (target tokens, or pairs), of which a pack is a part: packs add up
to the batch's mean however the rows were packed. What can stand in a row, and what it then does:
  a token whose mask is off     is context: no edge, no loss; a row with all of them off adds nothing, and is not counted
  an answer of one token        one edge, from the prompt's last token; IPO's average over it is that edge
  an answer cut at the context  trained on as it is, without an EOS to learn: the caller cuts it, a longer one is an error
  chosen equal to rejected      is stored once: its reward cancels, the pair has a constant loss (ln 2 where the references
                                agree) and adds no gradient but that of the NLL term
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.tree import Edges


def sft_loss(logp: torch.Tensor, edges: Edges, total_weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted negative log-likelihood, divided by the weight of the whole batch's edges. logp [E] fp32."""
    loss = -(logp * edges.weight).sum() / total_weight
    return loss, {"loss": loss.item()}


def replay_loss(
    logp: torch.Tensor, edges: Edges, total_weight: float, weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """`weight` times the SFT loss of rows that are trained on beside the pairs; `replay_loss` is it before the weight."""
    loss, metrics = sft_loss(logp, edges, total_weight)
    return weight * loss, {"loss": weight * metrics["loss"], "replay_loss": metrics["loss"]}


def sequence_logps(logp: torch.Tensor, edges: Edges, sequences: torch.Tensor) -> torch.Tensor:
    """Sum of weight * logp over the edges of each of `sequences` [S] (sorted ids) -> [S], summed in one order: on a GPU
    `index_add` would add as its threads come."""
    place, values = torch.searchsorted(sequences, edges.sequence), logp * edges.weight
    sums = torch.zeros(len(sequences), dtype=logp.dtype, device=logp.device)
    return sums.index_put((place,), values, accumulate=True) if sums.is_cuda else sums.index_add(0, place, values)


def dpo_loss(
    logp: torch.Tensor,
    edges: Edges,
    reference: torch.Tensor,
    beta: float,
    total_pairs: int,
    label_smoothing: float = 0.0,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """-log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), Rafailov et al. 2023, equation 7.

    With label smoothing e (Mitchell 2023, conservative DPO: a label is wrong with probability e) it is (1 - e) times that
    plus e times the same of the pair the other way round.

    logp [E] fp32. sequences [P, 2] int64: of each pair of this pack the sequences of its chosen and its rejected answer,
    and reference [P, 2] fp32 the reference model's sums of them. None: sequence 2i is the chosen and 2i + 1 the rejected
    answer of pair i, of all pairs in `reference` those that are in this pack. The loss is divided by `total_pairs` of the
    whole batch; metrics (TRL's names) are sums over this pack's pairs divided by the same count, so that packs add up.
    """
    policy, reference, _ = _pairs(logp, edges, reference, sequences)
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -F.logsigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    loss = losses.sum() / total_pairs
    return loss, _metrics(loss, policy, rewards, total_pairs)


def ipo_loss(
    logp: torch.Tensor,
    edges: Edges,
    reference: torch.Tensor,
    beta: float,
    total_pairs: int,
    label_smoothing: float = 0.0,
    sequences: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(h - 1 / (2 beta))^2, Azar et al. 2023, equation 17 (beta is their tau), arguments as in `dpo_loss`.

    h is the difference of the answers' log ratios, each averaged over the answer's tokens: as in TRL, and according to it
    as in the paper's experiments. Label smoothing e: (1 - e) times that plus e times the same of -h.
    """
    policy, reference, lengths = _pairs(logp, edges, reference, sequences)
    rewards = beta * (policy - reference)
    averages = (policy - reference) / lengths
    difference, goal = averages[:, 0] - averages[:, 1], 1 / (2 * beta)
    losses = (difference - goal) ** 2
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (-difference - goal) ** 2
    loss = losses.sum() / total_pairs
    return loss, _metrics(loss, policy, rewards, total_pairs)


def chosen_nll(
    logp: torch.Tensor, edges: Edges, total_tokens: int, sequences: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Negative log-likelihood of the chosen answers per token of all the batch's chosen answers, `total_tokens`: the term
    of Pang et al. 2024 (iterative reasoning preference optimisation), with TRL's mean (its losses "sigmoid" and "sft").
    A chosen answer that several pairs share counts in each. sequences as in `dpo_loss`."""
    present = edges.sequence.unique()
    chosen = (present[::2] if sequences is None else sequences[:, 0]).contiguous()
    loss = -sequence_logps(logp, edges, present)[torch.searchsorted(present, chosen)].sum() / total_tokens
    return loss, {"nll_loss": loss.item()}


PREFERENCE = {"sigmoid": dpo_loss, "ipo": ipo_loss}  # by TRL's names


def _pairs(
    logp: torch.Tensor, edges: Edges, reference: torch.Tensor, sequences: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of the policy and of the reference, and tokens, of the answers of this pack's pairs, all [P, 2]."""
    present = edges.sequence.unique()  # sorted
    if sequences is None:
        sequences, reference = present.view(-1, 2), reference[present[::2] // 2]
    place = torch.searchsorted(present, sequences)
    lengths = torch.zeros_like(present).index_add(
        0, torch.searchsorted(present, edges.sequence), torch.ones_like(edges.sequence)
    )
    return sequence_logps(logp, edges, present)[place], reference, lengths[place]


def _metrics(loss: torch.Tensor, policy: torch.Tensor, rewards: torch.Tensor, total_pairs: int) -> dict[str, float]:
    margin = rewards[:, 0] - rewards[:, 1]
    sums = {
        "loss": loss * total_pairs,
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": margin.sum(),
        "rewards/accuracies": (margin > 0).sum(),
        "logps/chosen": policy[:, 0].sum(),
        "logps/rejected": policy[:, 1].sum(),
    }
    return {name: value.item() / total_pairs for name, value in sums.items()}
