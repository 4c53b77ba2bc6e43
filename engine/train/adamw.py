"""AdamW whose bf16 parameters learn: fp32 moments, and a write that is rounded stochastically."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from engine import ops


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) of bf16 parameters with bf16 gradients: 12 bytes a parameter, 8 of them AdamW's.

    `kernels/adamw.py` has the formula and where the random bits come from: a function of (seed, step, parameter, element),
    so they are no state, and a shard of a parameter would draw what the whole draws.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        seed: int,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "eps": eps})
        self.seed = seed
        self._scale = 1.0

    def clip(self, limit: float) -> float:
        """The norm of all gradients, in fp32. The next step scales them down to `limit`: rounded again they are not."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        ratio = limit / (norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s: a NaN stays one
        self._scale = 1.0 if ratio > 1.0 else ratio
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, number, group)
                number += 1

    def _update(self, parameter: torch.nn.Parameter, number: int, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        numbers = ops.AdamWStep(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay=1.0 - group["lr"] * group["weight_decay"],
            rate=group["lr"] / (1.0 - beta1**step),
            root=1.0 / (1.0 - beta2**step) ** 0.5,
            scale=self._scale,
        )
        assert parameter.grad is not None
        gradient = parameter.grad.contiguous()
        place = ops.Place(rounding_key(self.seed, step), number)
        ops.adamw_bf16(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], numbers, place)


def rounding_key(seed: int, step: int) -> int:
    """64 bits (signed) of the training's seed and the step (from 1): others than dropout's."""
    return int.from_bytes(
        hashlib.blake2b(f"rounding {seed} {step}".encode(), digest_size=8).digest(), "big", signed=True
    )
