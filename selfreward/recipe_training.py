"""The keys of models and of how they are trained: init, sft, lora, keep_best, dpo. Defaults are the paper's."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from engine import PRESETS, InputError, LlamaConfig
from selfreward.recipe_group import Count, EachRound, Group, Positive, Rate, Steps, Switched

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML knows lists only; the two numbers stay strict
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Init(Group):
    """A Llama with random weights, for trials without a checkpoint: a preset, a shape, or a preset with changes."""

    preset: Literal["7B", "13B", "70B"] | None = None
    dim: Count | None = None
    n_layers: Count | None = None
    n_heads: Count | None = None
    n_kv_heads: Count | None = None
    ffn_dim: Count | None = None
    seed: Steps = 0

    def config(self, vocab_size: int) -> LlamaConfig:
        """The shape, with head_dim = dim / n_heads. InputError if it is incomplete or does not fit together."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.preset is None and len(given) < len(names):
            raise InputError(
                f"without a preset all of {', '.join(names)} are needed; found {', '.join(given) or 'none'}"
            )
        shape = replace(PRESETS[self.preset] if self.preset else LlamaConfig(), vocab_size=vocab_size)
        dim, n_heads = given.get("dim", shape.dim), given.get("n_heads", shape.n_heads)
        if dim % n_heads:
            raise InputError(f"dim is {dim}, not a multiple of n_heads ({n_heads})")
        return replace(shape, **given, head_dim=dim // n_heads)

    @model_validator(mode="after")
    def _fits_together(self) -> Init:
        self.config(vocab_size=32000)
        return self


class SFT(Group):
    """engine.SFTConfig without its seed."""

    lr: Rate = 5.5e-6
    min_lr: Rate = 1.1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Steps = 0
    epochs: Count = 1
    max_steps: Count | None = None
    batch_size: Count = 16
    weight_decay: Rate = 0.0
    betas: Betas = (0.9, 0.95)
    clip: Positive = 1.0
    max_pack_tokens: Count = 4096
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    save_every: Count | None = 100  # steps between two saved states, from which an interrupted training goes on
    activation_checkpointing: Literal["none", "full"] = "none"  # full: less memory, a forward more, the same bits
    precision: Literal["fp32", "bf16-copy", "bf16-stochastic"] = "fp32"  # of parameters, forward and update

    @model_validator(mode="after")
    def _rates(self) -> SFT:
        for low, high in zip(_listed(self.min_lr, self.lr), _listed(self.lr, self.min_lr), strict=False):
            if low > high:  # lists of another length than there are rounds are the recipe's to refuse
                raise InputError(f"min_lr is {low}, above lr ({high}); lower min_lr too")
        return self


def _listed(value: float | list[float], other: float | list[float]) -> list[float]:
    """A number as often as the other key has values."""
    if isinstance(value, list):
        return value
    return [value] * (len(other) if isinstance(other, list) else 1)


class DPO(SFT):
    """engine.DPOConfig without its seed. lr, min_lr and beta: a number, or a list with one for each round."""

    per_round = ("lr", "min_lr", "beta")
    lr: EachRound[Rate] = 1e-6  # type: ignore[assignment]
    min_lr: EachRound[Rate] = 1e-7  # type: ignore[assignment]
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    beta: EachRound[Positive] = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # how probable it is that a label is wrong
    nll_weight: Rate = 0.0  # of the chosen answers' loss beside the preference loss
    replay_weight: Rate = 0.0  # of the judge data's loss beside DPO's, which otherwise wears the judge down
    replay_batch_size: Count = 16


class Adapters(Switched):
    """engine.LoRA, for SFT and DPO. Its learning rates are higher than those of full fine-tuning: 1e-4 is common."""

    switch, off = "rank", "no LoRA"
    rank: Steps = 0  # 0: all weights are trained
    alpha: Positive = 32.0
    targets: list[Projection] = Field(default=list(get_args(Projection)))  # all of them
    base: Literal["fp32", "bf16"] = "fp32"  # M0's numbers, which stay as they are, and those of the exported models

    @model_validator(mode="after")
    def _targeted(self) -> Adapters:
        if not self.targets:
            raise InputError("targets is empty; name at least one projection, or set rank to 0")
        return self


class KeepBest(Switched):
    """engine.Heldout, for SFT and DPO: a share of the prompts is measured instead of trained on, and the model ends with the
    weights under which their loss was least. (The paper compares answers to its validation prompts every 200 steps.)"""

    switch, off = "share", "no keep_best"
    share: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # of instructions, and of a round's prompts with pairs; 0: off
    every: Count = 200  # steps
    patience: Count | None = None  # measurements without a better one after which a training ends; null: never
