"""The losses, one function each, over per-edge log-probabilities. All return (loss, metrics); metrics are plain floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.tree import Edges


def sft_loss(logp: torch.Tensor, edges: Edges, total_weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted negative log-likelihood, divided by the weight of the *whole* batch, of which this pack is a part.

    logp [E] fp32. Packs of a batch therefore add up to the batch's mean however the rows were packed.
    """
    loss = -(logp * edges.weight).sum() / total_weight
    return loss, {"loss": loss.item()}


def replay_loss(
    logp: torch.Tensor, edges: Edges, total_weight: float, weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """`weight` times the SFT loss of rows that are trained on beside the pairs; `replay_loss` is it before the weight."""
    loss, metrics = sft_loss(logp, edges, total_weight)
    return weight * loss, {"loss": weight * metrics["loss"], "replay_loss": metrics["loss"]}


def sequence_logps(logp: torch.Tensor, edges: Edges, sequences: torch.Tensor) -> torch.Tensor:
    """Sum of weight * logp over the edges of each of `sequences` [S] (sorted ids) -> [S], summed in edge order."""
    place = torch.searchsorted(sequences, edges.sequence)
    return torch.zeros(len(sequences), dtype=logp.dtype, device=logp.device).index_add(0, place, logp * edges.weight)


def dpo_loss(
    logp: torch.Tensor, edges: Edges, reference: torch.Tensor, beta: float, total_pairs: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """-log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), Rafailov et al. 2023, equation 7.

    logp [E] fp32; sequence 2i is the chosen answer of pair i and 2i + 1 the rejected one, both in this pack;
    reference [pairs, 2] fp32: the reference model's sums. The loss is divided by `total_pairs` of the whole batch;
    metrics (TRL's names) are sums over this pack's pairs divided by the same count, so that packs add up.
    """
    sequences = edges.sequence.unique()  # sorted: chosen, rejected, chosen, rejected, ...
    policy = sequence_logps(logp, edges, sequences).view(-1, 2)  # [pairs here, 2]
    rewards = beta * (policy - reference[sequences[::2] // 2])
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -F.logsigmoid(margin).sum() / total_pairs
    sums = {
        "loss": loss * total_pairs,
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": margin.sum(),
        "rewards/accuracies": (margin > 0).sum(),
        "logps/chosen": policy[:, 0].sum(),
        "logps/rejected": policy[:, 1].sum(),
    }
    return loss, {name: value.item() / total_pairs for name, value in sums.items()}
