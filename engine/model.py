"""Llama 2: one forward for trainer, sampler and judge (DESIGN idea "one forward").

Shapes: N = rows (tokens, packed without padding), H = query heads, G = key/value heads, D = head dim.
What differs between training and sampling comes in as arguments of `Llama.forward`:
  attend(layer, q [N, H, D], k [N, G, D], v [N, G, D], cos, sin [N, D/2]) -> [N, H, D]
      turns q and k by their positions, then tree attention, or write-pages-and-fold-chunks
  kernels: embed, linear(x [N, in], weight [out, in]) -> [N, out], rms_norm, swiglu
      differentiable ones, or ones that give a row the same bits for any number of rows
  dropout(site, x [N, dim]) -> [N, dim]
      nothing but in training; site 0 is the embedding, 2 * layer + 1 and 2 * layer + 2 what attention and MLP add to the
      residual stream
  run(block, *its arguments) -> what the block returns
      calls it; or `recomputed`, which keeps for the backward what goes into a block and nothing of what is in it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine import ops
from engine.config import LlamaConfig
from engine.errors import InputError

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Dropout = Callable[[int, torch.Tensor], torch.Tensor]
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Kernels(NamedTuple):
    """The operations of a forward that the sampler has versions of its own of."""

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids [N], table [ids, dim] -> its rows [N, dim]
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x, weight
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # x, weight, eps
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # x, branch, weight, eps -> their sum, its norm
    swiglu: Callable[[torch.Tensor], torch.Tensor]  # [N, 2 * ffn], gate first


TRAINING = Kernels(F.embedding, ops.dense, ops.rms_norm, ops.add_rms_norm, ops.swiglu)


def keep(site: int, x: torch.Tensor) -> torch.Tensor:
    """No dropout."""
    return x


def plainly(block: nn.Module, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return block(*given)


def recomputed(block: nn.Module, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bits for a forward more; the backward makes a block's activations again. Dropout is a
    function of what a token is, so there is no generator to set back."""
    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None = None, kernels: Kernels = TRAINING
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x [N, dim], with `branch` added, and its norm."""
        if branch is None:
            return x, kernels.rms_norm(x, self.weight, self.eps)
        return kernels.add_rms_norm(x, branch, self.weight, self.eps)


class Attention(nn.Module):
    """`qkv` holds the query, key and value projections one below the other: [(H + 2G) * D, dim]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Parameter(torch.empty(sum(self.heads) * config.head_dim, config.dim))
        self.o = nn.Parameter(torch.empty(config.dim, config.n_heads * config.head_dim))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: int, attend: Attend, kernels: Kernels
    ) -> torch.Tensor:
        qkv = kernels.linear(x, self.qkv).view(len(x), -1, self.head_dim)  # [N, H + 2G, D]
        q, k, v = qkv.split(self.heads, dim=1)
        out = attend(layer, q, k, v, cos, sin)  # [N, H, D]
        return kernels.linear(out.reshape(len(x), -1), self.o)


class MLP(nn.Module):
    """`gate_up` holds the gate projection above the up projection: [2 * ffn, dim]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * config.ffn_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.dim, config.ffn_dim))

    def forward(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return kernels.linear(kernels.swiglu(kernels.linear(x, self.gate_up)), self.down)


class Block(nn.Module):
    """What a block adds to the residual stream waits for the norm that reads it, here or in the next block: the addition
    and the norm are one kernel where the device has one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: int,
        attend: Attend,
        kernels: Kernels,
        dropout: Dropout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, dim] and what is to be added to it (None: nothing) -> the same for the next block."""
        x, normed = self.attention_norm(x, branch, kernels)
        branch = dropout(2 * layer + 1, self.attention(normed, cos, sin, layer, attend, kernels))
        x, normed = self.mlp_norm(x, branch, kernels)
        return x, dropout(2 * layer + 2, self.mlp(normed, kernels))


class Weights(nn.Module):
    """Parameters with an epoch, `weight_epoch`, which counts their updates. Whoever changes them in place calls
    `weights_changed()`; a change that nobody announced is found by `check_weights()`, because every in-place write raises
    a tensor's version."""

    weight_epoch = 0
    half_updated = False  # an update that was interrupted has written some of its tensors
    _announced: list[int]

    def weights_changed(self) -> int:
        """Raise and return the weight epoch: everything cached from the old weights (KV blocks, packed copies) is stale."""
        self.weight_epoch += 1
        self.half_updated = False
        self._announced = self._versions()
        return self.weight_epoch

    def check_weights(self) -> None:
        """Raise InputError if a parameter was written in place since the last announced change (`.data` escapes this)."""
        if self.half_updated:
            raise InputError(
                "an update of the weights was interrupted, they are partly old and partly new: give all of its tensors again"
            )
        for (name, _), found, announced in zip(self.named_parameters(), self._versions(), self._announced, strict=True):
            if found != announced:
                raise InputError(
                    f"the parameter {name} was changed in place without model.weights_changed(): "
                    "cached keys and values would be stale; call it after every update"
                )

    def _versions(self) -> list[int]:
        if any(parameter.is_inference() for parameter in self.parameters()):
            raise InputError(
                "the model's parameters are inference tensors, whose changes cannot be seen; make the model outside "
                "torch.inference_mode()"
            )
        return [parameter._version for parameter in self.parameters()]


class Llama(Weights):
    """Llama 2. Parameters are created uninitialised: load a checkpoint, or call `init_weights`."""

    def __init__(
        self, config: LlamaConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = self.embed if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.to(device=device, dtype=dtype)
        self.rope_cos, self.rope_sin = cos.to(device), sin.to(device)  # angles stay fp32
        self._announced = self._versions()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        kernels: Kernels = TRAINING,
        dropout: Dropout = keep,
        run: Run = plainly,
    ) -> torch.Tensor:
        """tokens [N] int64, positions [N] int64 -> hidden states after the last norm [N, dim]. The head is the caller's:
        `token_logprobs(hidden, model.head, targets)`, or `kernels.linear(hidden, model.head)` for logits [N, vocab]."""
        if kernels is TRAINING and any(map(given_up, self.blocks[0].parameters())):
            raise InputError(
                "this model's matrices were packed for sampling and given up: load_checkpoint gives one to train or score"
            )
        x = dropout(0, kernels.embed(tokens, self.embed))  # [N, dim]
        cos, sin = kernels.embed(positions, self.rope_cos), kernels.embed(positions, self.rope_sin)  # [N, D/2]
        branch = None
        for layer, block in enumerate(self.blocks):
            x, branch = run(block, x, branch, cos, sin, layer, attend, kernels, dropout)
        return self.norm(x, branch, kernels)[1]

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> Llama:
        """Normal(0, std) for matrices, ones for norms, from `seed` alone. Returns the model."""
        generator = torch.Generator(device=self.embed.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
        self.weights_changed()
        return self


def given_up(parameter: torch.Tensor) -> bool:
    """Whether a weight's memory was given up for a packed copy: its shape is left, over one NaN."""
    return parameter.numel() > 1 and not any(parameter.stride())


def give_up(parameter: torch.nn.Parameter) -> None:
    parameter.data = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def rope_tables(config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_seq_len, D/2], fp32, by the same fp32 products as HF's LlamaRotaryEmbedding."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponent)
    angle = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * inverse[None, :]
    return angle.cos(), angle.sin()


def tree_attend(end: torch.Tensor, chains: Sequence[int] | None = None) -> Attend:
    """The trainer's `attend`: tree attention over one pack, by its `Pack.end` [N] int64 and `Pack.chains`."""
    mask = ops.TreeMask(end, chains)

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        return ops.tree_attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v, mask)

    return attend
