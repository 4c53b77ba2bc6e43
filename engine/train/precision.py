"""In which numbers a training keeps its weights, computes, and updates.

    fp32             parameters, gradients and AdamW in fp32                                         16 bytes a parameter
    bf16-copy        the same, while forward and backward run in a bf16 copy of the parameters       18
    bf16-stochastic  bf16 parameters and gradients, AdamW in fp32, its write rounded stochastically   12

What cannot be had is bf16 parameters whose write is rounded to nearest: at a weight of 0.02 half a spacing is 6e-5, and an
update of 1e-6, or sixty of them one after the other, is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from engine.copies import copy_in
from engine.errors import InputError
from engine.lora import LoRA
from engine.model import Llama
from engine.train.adamw import StochasticAdamW

if TYPE_CHECKING:
    from engine.train.config import SFTConfig

M = TypeVar("M", bound=Llama | LoRA)
PRECISIONS = ("fp32", "bf16-copy", "bf16-stochastic")
REASON = (
    "a bf16 weight of 0.02 has a half spacing of 6e-5, so that updates at a learning rate of 1e-6, rounded to nearest, "
    "would nearly all be lost"
)
LORA = "a LoRA's adapters are fp32 in any case: take precision='fp32', and load its base as torch.bfloat16 to compute in it"


def check_precision(value: Any) -> None:
    if value in ("bf16", "bfloat16"):
        raise InputError(
            f"precision is {value!r}, and {REASON}: take 'bf16-stochastic', or 'bf16-copy' with fp32 parameters"
        )
    if not isinstance(value, str) or value not in PRECISIONS:
        raise InputError(f"precision is {value!r}; expected one of {', '.join(PRECISIONS)}")


def check_parameters(model: Llama | LoRA, precision: str) -> None:
    """Raise InputError unless the parameters are of the dtype that this precision updates."""
    if isinstance(model, LoRA) and precision != "fp32":
        raise InputError(f"precision is {precision!r}; {LORA}")
    for name, parameter in model.named_parameters():
        if precision == "bf16-stochastic" and parameter.dtype != torch.bfloat16:
            raise InputError(
                f"precision is 'bf16-stochastic' and {name} is {parameter.dtype}; load the model as torch.bfloat16"
            )
        if precision != "bf16-stochastic" and parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"precision is {precision!r} and {name} is {parameter.dtype}; {REASON}: load the model as torch.float32 "
                "(precision='bf16-copy' computes in bf16), or as torch.bfloat16 with precision='bf16-stochastic'"
            )


def compute_model(model: M, precision: str) -> M:
    """The model whose log-probs a training in this precision sees, as they are now: for its reference values."""
    check_precision(precision)
    check_parameters(model, precision)
    return cast(M, copy_in(model, torch.bfloat16)) if precision == "bf16-copy" else model


@contextmanager
def computing(model: Llama | LoRA, precision: str) -> Iterator[Llama | LoRA]:
    """`compute_model`, for forward and backward. What its parameters get as gradients arrives at the given model's, in
    their dtype and added up in it; a copy keeps none, not even for the time of a backward."""
    copy = compute_model(model, precision)
    if copy is model:
        yield model
        return
    hooks = [
        to.register_post_accumulate_grad_hook(partial(_hand_over, parameter))
        for parameter, to in zip(model.parameters(), copy.parameters(), strict=True)
    ]
    try:
        yield copy
    finally:
        for hook in hooks:
            hook.remove()


def _hand_over(parameter: torch.Tensor, copied: torch.Tensor) -> None:
    assert copied.grad is not None
    gradient, copied.grad = copied.grad.to(parameter.dtype), None
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def make_optimizer(model: Llama | LoRA, config: SFTConfig) -> torch.optim.Optimizer:
    """AdamW for the parameters: torch's fused one, or the project's own where the write is rounded stochastically."""
    if config.precision == "bf16-stochastic":
        return StochasticAdamW(model.parameters(), config.seed, config.lr, config.betas, config.weight_decay)
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def clip(model: Llama | LoRA, optimizer: torch.optim.Optimizer, limit: float) -> float:
    """The norm of all gradients; the update is made with them scaled down to `limit` where it is above."""
    if isinstance(optimizer, StochasticAdamW):
        return optimizer.clip(limit)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
