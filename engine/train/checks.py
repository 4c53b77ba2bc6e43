"""What is refused before a training begins: a model, rows, replay rows or held-out rows that do not fit its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.lora import LoRA
from engine.model import Llama
from engine.train.batches import DPORow, Rows, SFTRow, check_kinds, check_rows
from engine.train.config import DPOConfig, SFTConfig
from engine.train.heldout import Heldout
from engine.train.precision import check_parameters


def check_model(model: Any) -> None:
    if not isinstance(model, (Llama, LoRA)):
        raise InputError(f"model is {model!r}; expected a Llama, as load_checkpoint returns it, or a LoRA")


def check_data(model: Llama | LoRA, rows: Rows, replay: Sequence[SFTRow], config: SFTConfig) -> None:
    check_model(model)
    if not isinstance(config, SFTConfig):
        raise InputError(f"config is a {type(config).__name__}; expected an SFTConfig or a DPOConfig")
    kind = DPORow if isinstance(config, DPOConfig) else SFTRow
    check_kinds(rows, kind, f"{type(config).__name__} trains on {kind.__name__}")
    check_parameters(model, config.precision)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise InputError(f"{name} asks for no gradient; all parameters are trained: ask for it, or train a LoRA")
    check_rows(rows, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens)
    check_references([row for row in rows if isinstance(row, DPORow)])
    weight = config.replay_weight if isinstance(config, DPOConfig) else 0.0
    if bool(replay) != (weight > 0):
        raise InputError(
            f"there are {len(replay)} replay rows and replay_weight is {weight}; give both (in a DPOConfig) or neither"
        )
    if replay:
        check_kinds(replay, SFTRow, "replay trains on SFTRow", "replay row")
        check_rows(replay, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens, "replay row")


def check_heldout(model: Llama | LoRA, heldout: Any, config: SFTConfig, out_dir: str | Path | None) -> None:
    if not isinstance(heldout, Heldout):
        raise InputError(f"heldout is a {type(heldout).__name__}; expected a Heldout(rows, every)")
    kind = DPORow if isinstance(config, DPOConfig) else SFTRow
    check_kinds(heldout.rows, kind, f"{type(config).__name__} trains on {kind.__name__}", "held-out row")
    check_rows(heldout.rows, model.config.vocab_size, model.config.max_seq_len, config.max_pack_tokens, "held-out row")
    check_references([row for row in heldout.rows if isinstance(row, DPORow)], "held-out row")
    if heldout.by != "loss" and not isinstance(config, DPOConfig):
        raise InputError(f"the held-out measure is {heldout.by!r}, which SFT does not have; use 'loss'")
    if heldout.keep_best and out_dir is None:
        raise InputError("keep_best needs an out_dir, where the best weights are kept")


def check_references(rows: Sequence[DPORow], kind: str = "row") -> None:
    """Raise InputError naming the first row whose `reference` is not two finite numbers."""
    for number, row in enumerate(rows):
        _check_reference(f"{kind} {number}", row.reference)


def _check_reference(row: str, reference: Any) -> None:
    if reference is None:
        raise InputError(f"{row} has no reference log-probs; compute them with reference_logprobs(model, rows)")
    try:
        fits = len(reference) == 2 and all(math.isfinite(value) for value in reference)
    except TypeError:
        fits = False
    if not fits:
        raise InputError(f"{row}: reference is {reference!r}; expected two finite numbers (chosen, rejected)")
