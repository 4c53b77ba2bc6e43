"""LoRA: a frozen Llama and two small trained matrices beside each of some of its projections (Hu et al., 2021).

    y = W x + (alpha / rank) * B (A x),   A [rank, inputs], B [outputs, rank]

`LoRA` runs the one forward of `engine/model.py`; what differs comes in as its `kernels`: a `linear` that knows which
adapters stand beside which parameter. The model knows nothing of it, and without adapters nothing is paid. `base` itself is
the model with its adapters off, so that a policy's reference needs no second model.

A projection has PEFT's name (q_proj, ...) although the parameters are fused: an adapter stands beside those rows of qkv or
gate_up that are its projection. `save_adapter` and `load_adapter` keep PEFT's file format.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint import hf_rows, replacing
from engine.config import LlamaConfig, read_json
from engine.errors import CheckpointError, InputError
from engine.model import TRAINING, Attend, Dropout, Kernels, Llama, Run, Weights, given_up, keep, plainly

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before HF's names
# What adapter_config.json may say of a LoRA that this engine has: anything else in these changes the arithmetic.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "use_bdlora": (False,),
    "arrow_config": ({},),
    "monteclora_config": ({},),
    "kasa_config": ({},),
    "velora_config": ({},),
    # Other initialisations (PiSSA, OLoRA, LoftQ, ...) change the base, which the file does not hold.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


class Adapter(nn.Module):
    def __init__(self, rank: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, scale: float, kernels: Kernels) -> torch.Tensor:
        """x [N, inputs] -> [N, outputs] in x's dtype."""
        narrow = kernels.linear(x, self.A.to(x.dtype)) * scale  # [N, rank]
        return kernels.linear(narrow, self.B.to(x.dtype))


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that are one projection, and the adapter beside them, if it has one."""

    hf_name: str  # model.layers.0.self_attn.q_proj
    rows: slice
    outputs: int
    adapter: Adapter | None


class LoRA(Weights):
    """`base` with adapters beside its `targets`; only they are its parameters, and only they are trained.

    rank, alpha: the adapters' update of a weight is alpha / rank * B A, of rank `rank`. targets: of PROJECTIONS, in every
    layer. A begins uniform in +-1 / sqrt(inputs) (PEFT's Kaiming uniform) from `seed`, B as zeros, so that the model begins
    as its base. Adapters are fp32 also where the base is bf16; their products are in the base's dtype. The base is shared,
    not copied; who changes it changes this model too. `train`, `reference_logprobs` and `LLM` take it as they take a Llama.
    """

    def __init__(
        self,
        base: Llama,
        rank: int = 16,
        alpha: float = 32.0,
        targets: Sequence[str] = PROJECTIONS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(base, Llama):
            raise InputError(f"base is a {type(base).__name__}; expected a Llama, as load_checkpoint returns it")
        if any(given_up(parameter) for parameter in base.parameters()):
            raise InputError(
                "the base's matrices were packed for sampling and given up: load_checkpoint gives another one"
            )
        _check_shape(base.config, rank, alpha, targets)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed!r}; expected an integer from 0, below 2**63")
        self._base = (base,)  # in a tuple, so that its parameters are not this module's
        self.rank, self.alpha = rank, float(alpha)
        self.targets = tuple(name for name in PROJECTIONS if name in targets)
        dtype = torch.promote_types(base.embed.dtype, torch.float32)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in base.blocks)
        self._parts: dict[nn.Parameter, list[Part]] = {}
        for name, parameter, rows in hf_rows(base):
            layer, projection = _place(name)
            if projection not in PROJECTIONS:
                continue
            outputs, adapter = len(parameter[rows]), None
            if projection in self.targets:
                adapter = Adapter(rank, parameter.shape[1], outputs, dtype, parameter.device)
                self.layers[layer].add_module(projection, adapter)
            self._parts.setdefault(parameter, []).append(Part(name.removesuffix(".weight"), rows, outputs, adapter))
        self._own_epoch = 0
        self.init_weights(seed)

    @property
    def base(self) -> Llama:
        """The model with its adapters off."""
        return self._base[0]

    @property
    def config(self) -> LlamaConfig:
        return self.base.config

    @property
    def embed(self) -> torch.Tensor:
        return self.base.embed.detach()

    @property
    def head(self) -> torch.Tensor:
        return self.base.head.detach()

    @property
    def weight_epoch(self) -> int:
        """Counts the updates of the adapters and of the base."""
        return self._own_epoch + self.base.weight_epoch

    @weight_epoch.setter
    def weight_epoch(self, value: int) -> None:
        self._own_epoch = value - self.base.weight_epoch

    def check_weights(self) -> None:
        self.base.check_weights()
        super().check_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> LoRA:
        generator = torch.Generator().manual_seed(seed)
        for _, adapter in self.adapters():
            bound = 1.0 / math.sqrt(adapter.A.shape[1])
            drawn = torch.rand(adapter.A.shape, generator=generator, dtype=torch.float32)
            adapter.A.copy_((2.0 * drawn - 1.0) * bound)
            adapter.B.zero_()
        self.weights_changed()
        return self

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        kernels: Kernels = TRAINING,
        dropout: Dropout = keep,
        run: Run = plainly,
    ) -> torch.Tensor:
        """`Llama.forward`, with adapters; differentiable in them alone."""
        return self.base(tokens, positions, attend, self.beside(kernels), dropout, run)

    def beside(self, kernels: Kernels) -> Kernels:
        """These kernels, with adapters beside the products and without gradients of the base."""

        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            out = kernels.linear(x, weight.detach())
            assert isinstance(weight, nn.Parameter)
            if not self.adapts(weight):
                return out
            scale = self.alpha / self.rank
            updates = [
                x.new_zeros(()).expand(len(x), part.outputs)
                if part.adapter is None
                else part.adapter(x, scale, kernels)
                for part in self._parts[weight]
            ]
            return out + torch.cat(updates, dim=1)

        return Kernels(
            embed=lambda tokens, weight: kernels.embed(tokens, weight.detach()),
            linear=linear,
            rms_norm=lambda x, weight, eps: kernels.rms_norm(x, weight.detach(), eps),
            add_rms_norm=lambda x, branch, weight, eps: kernels.add_rms_norm(x, branch, weight.detach(), eps),
            swiglu=kernels.swiglu,
        )

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """HF's name of each projection that has one, and its adapter."""
        for parts in self._parts.values():
            yield from ((part.hf_name, part.adapter) for part in parts if part.adapter is not None)

    def adapts(self, parameter: nn.Parameter) -> bool:
        """Whether an adapter stands beside any rows of this parameter of the base."""
        return any(part.adapter is not None for part in self._parts.get(parameter, []))

    @torch.no_grad()
    def merged_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter of the base with its adapters added, in fp32; itself where it has none."""
        if not self.adapts(parameter):
            return parameter.detach()
        wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for part in self._parts[parameter]:
            if part.adapter is not None:
                wide[part.rows].addmm_(part.adapter.B, part.adapter.A, alpha=self.alpha / self.rank)
        return wide

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Llama:
        """A Llama of its own with the adapters added to the weights, rounded once to `dtype` (the base's): for export."""
        model = Llama(self.config, dtype or self.base.embed.dtype, self.base.embed.device)
        for to, of in zip(model.parameters(), self.base.parameters(), strict=True):
            to.copy_(self.merged_weight(of))
        model.weights_changed()
        return model


def save_adapter(lora: LoRA, directory: str | Path, base_model: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them. base_model: the name or path of the base
    for PEFT's own loaders. An adapter that stood there is replaced whole; any other directory with files in it is refused."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for name, adapter in lora.adapters():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.A.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.B.detach()
    with replacing(Path(directory), CONFIG, "an adapter") as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, str(temporary / TENSORS), metadata={"format": "pt"})
        shutil.copymode(temporary / CONFIG, temporary / TENSORS)  # safetensors makes its file for the owner alone


def load_adapter(base: Llama, directory: str | Path) -> LoRA:
    """`base` with the adapters of a directory that PEFT or `save_adapter` wrote.

    Raises CheckpointError naming file, key or tensor: one that is missing, damaged or misshapen, kinds of LoRA that change
    the arithmetic (DoRA, rank-stabilised, ranks of their own per module, trained biases or embeddings), targets that are no
    projection of a Llama or not the same in all layers.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    for key, plain in PLAIN.items():
        if config.get(key, plain[0]) not in (*plain, None):
            raise CheckpointError(
                f"{directory / CONFIG}: {key} is {config[key]!r}; this engine has plain LoRA ({plain[0]!r}): merge the "
                "adapter with PEFT and load the merged model"
            )
    tensors = _read_tensors(directory)
    targets = _targets(tensors, base.config, directory / TENSORS)
    try:
        lora = LoRA(base, config.get("r"), config.get("lora_alpha"), targets)  # type: ignore[arg-type]
    except InputError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    with torch.no_grad():
        for name, adapter in lora.adapters():
            for kind, parameter in (("lora_A", adapter.A), ("lora_B", adapter.B)):
                _fill(parameter, tensors, f"{PREFIX}{name}.{kind}.weight", directory / TENSORS)
    lora.weights_changed()
    return lora


def _check_shape(config: LlamaConfig, rank: Any, alpha: Any, targets: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= config.dim:
        raise InputError(f"rank is {rank!r}; expected an integer from 1 to the model's dim ({config.dim})")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise InputError(f"alpha is {alpha!r}; expected a finite number above 0")
    names = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, str) else []
    if not names or not all(name in PROJECTIONS for name in names):
        raise InputError(f"targets is {targets!r}; expected some of {', '.join(PROJECTIONS)}")


def _place(hf_name: str) -> tuple[int, str]:
    """Layer and projection of HF's model.layers.0.self_attn.q_proj.weight."""
    parts = hf_name.split(".")
    return (int(parts[2]), parts[4]) if len(parts) == 6 and parts[2].isdecimal() else (-1, "")


def _read_tensors(directory: Path) -> Mapping[str, torch.Tensor]:
    path = directory / TENSORS
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        advice = "adapter_model.bin is a pickle, which is not opened" if pickled.is_file() else "copy the whole adapter"
        raise CheckpointError(f"{path} is missing; {advice}: save the adapter with safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error


def _targets(tensors: Mapping[str, torch.Tensor], config: LlamaConfig, path: Path) -> list[str]:
    """The projections that the tensors stand beside, which must be the same in all layers."""
    found: dict[str, set[int]] = {}
    for name in tensors:
        layer, projection = _place(name.removeprefix(PREFIX).replace(".lora_A.", ".").replace(".lora_B.", "."))
        if not name.startswith(PREFIX) or projection not in PROJECTIONS or not 0 <= layer < config.n_layers:
            raise CheckpointError(
                f"{path}: {name} is no adapter of a projection of this model ({config.n_layers} layers; "
                f"{', '.join(PROJECTIONS)}); is it of another model?"
            )
        found.setdefault(projection, set()).add(layer)
    if not found:
        raise CheckpointError(f"{path} holds no adapters; copy it again")
    for projection, layers in found.items():
        if len(layers) != config.n_layers:
            missing = min(set(range(config.n_layers)) - layers)
            raise CheckpointError(
                f"{path}: layer {missing} has no adapter of {projection}; expected one in every layer"
            )
    return list(found)


def _fill(parameter: nn.Parameter, tensors: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    if name not in tensors:
        raise CheckpointError(f"{path}: {name} is missing; copy the adapter again")
    tensor = tensors[name]
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensor.shape)}; the model and the adapter's r ask for {list(parameter.shape)}"
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds something else than finite floating-point numbers; copy it again")
    parameter.copy_(tensor)
