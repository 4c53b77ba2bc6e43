"""What a step costs beside time: the work of `timing.jsonl`.

flops    of the model by formula. Forward: 2 for each weight and token of the products, the head at the rows of its edges
         only; 4 * heads * head_dim for each query and key that see each other, a layer. Backward: as much again for the
         gradients of the products' inputs, and again for those of the weights; twice the forward for attention. So three
         times the forward. Of a LoRA: the base's weights and its head get no gradient, so their products count twice, the
         adapters' (2 for each of their numbers and token) and attention three times. (Nothing asks for the gradient of
         what goes into the first block, which is counted: of q, k and v 0.4% at 7B.)
         What is computed again (log-prob tiles, blocks with activation_checkpointing "full") is not counted, as in every
         MFU (Chowdhery et al., 2022): it is no progress. With "full" the device runs a forward more than is counted.
mfu      flops over the seconds and over what the device can do. A CPU is measured when training begins: fp32
         multiply-adds in registers on as many threads as torch has, which no product reaches. A GPU is looked up: the
         16-bit tensor-core figure of its data sheet. null for a GPU that is not in the list.
memory   the most there was so far: a CPU process's resident set since it began (not only of training), a GPU's
         allocations of this process.
"""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import torch

from engine import ops
from engine.config import LlamaConfig
from engine.lora import LoRA
from engine.model import Llama
from engine.tree import Pack

GPUS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by their data sheets; H100 is the SXM one


class Work(NamedTuple):
    tokens: int = 0
    flops: int = 0

    def and_of(self, pack: Pack, model: Llama | LoRA) -> Work:
        """With what a forward and backward of `pack` adds."""
        return Work(self.tokens + len(pack), self.flops + training_flops(pack, model))


def training_flops(pack: Pack, model: Llama | LoRA) -> int:
    products, attention = forward_flops(pack, model.config)
    if isinstance(model, Llama):
        return 3 * (products + attention)
    adapters = 2 * len(pack) * sum(parameter.numel() for parameter in model.parameters())
    return 2 * products + 3 * (adapters + attention)


def forward_flops(pack: Pack, config: LlamaConfig) -> tuple[int, int]:
    """Of the products, the head's among them, and of attention."""
    attention = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    block = attention + 3 * config.dim * config.ffn_dim  # weights of its products
    seen = int((pack.position + 1).sum())  # pairs of a query and a key: a token sees what leads to it, and itself
    products = 2 * (len(pack) * config.n_layers * block + len(pack.edges) * config.vocab_size * config.dim)
    return products, 4 * config.n_layers * config.n_heads * config.head_dim * seen


def peak_flops(device: torch.device) -> float | None:
    if device.type == "cpu":
        return ops.measured_flops(torch.get_num_threads())
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in GPUS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated(device)


def timing_row(
    step: int, work: Work, seconds: float, peak: float | None, device: torch.device
) -> dict[str, float | None]:
    return {
        "step": step,
        "tokens": work.tokens,
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "flops": work.flops,
        "mfu": work.flops / seconds / peak if peak else None,
        "peak_memory_bytes": peak_memory(device),
    }
