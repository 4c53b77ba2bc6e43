"""The op table: for every operation its backends in order of preference, and why one does not apply.

A backend is `(name, why_not, fn)`; `why_not(case)` returns None or one sentence. `SELFREWARD_BACKEND=torch` forces the
references, `triton` the GPU's kernels (on a CPU: in Triton's interpreter), other names likewise. `backends()` tells which
one each op uses, so that a fallback can be seen and tested.

RMSNorm and SwiGLU have two entries. `rms_norm` and `swiglu` are the trainer's: differentiable, the same function with
and without gradients, so that reference log-probs and the policy's are the same numbers; on a CPU they, `dense`, `rope`,
`tree_attention` and the log-probs are those of `engine/native.py` in fp32. `rms_norm_rows` and `swiglu_rows` are the
sampler's, like `linear`, `rope_write`, `chunk_attention` and `sample_rows`: their native versions
give a row the same bits for any number of rows and threads. The torch versions, there for tests and for a CPU without
the extension's compiler, do not promise that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import engine._C as _C
from engine import native, native_rows
from engine.errors import InputError
from engine.kernels import adamw as _adamw
from engine.kernels import chunk_attention as _chunk
from engine.kernels import dropout as _dropout
from engine.kernels import flash as _flash
from engine.kernels import gumbel as _gumbel
from engine.kernels import jit as _jit
from engine.kernels import linear_bf16 as _linear_bf16
from engine.kernels import linear_int8 as _linear_int8
from engine.kernels import linear_logprob as _logprob
from engine.kernels import rms_norm as _rms_norm
from engine.kernels import rope as _rope
from engine.kernels import rope_write as _rope_write
from engine.kernels import sample as _sample
from engine.kernels import sample_rows as _sample_rows
from engine.kernels import swiglu as _swiglu
from engine.kernels import tree_attention as _tree
from engine.kernels import tree_windows as _windows
from engine.kernels import work_attention as _work
from engine.kernels.adamw import AdamWStep, Place
from engine.kernels.sample import DrawRules, Draws
from engine.kernels.work_attention import Work
from engine.native_rows import PackedWeight
from engine.tree import Edges

sums_in_fp32 = _logprob.sums_in_fp32  # a context: products of 16 bits are summed in fp32 only
rows_from = native_rows.rows_from  # a context: where those kernels write
Recording = _C.Recording  # of the native kernels' calls: engine/replay.py
tiles = _work.tiles  # the wide and the narrow items of a work list
ragged = _sample.ragged  # lists of ids, one per row, as the offsets and ids of `DrawRules`


class Case(NamedTuple):
    """What a choice may depend on: where the tensors are, their dtype, whether a gradient will be asked for, and whether
    the attention's mask is that of plain causal sequences; and the backend that SELFREWARD_BACKEND asks for."""

    device: str
    dtype: torch.dtype
    gradients: bool
    causal: bool = False
    asked: str | None = None


class Backend(NamedTuple):
    name: str
    why_not: Callable[[Case], str | None]
    fn: Callable[..., Any]


def _always(case: Case) -> str | None:
    return None


def _triton(case: Case) -> str | None:
    reason = _jit.why_not(case.device)
    if reason is None and case.device == "cpu" and case.asked != "triton":
        return "Triton's interpreter is for tests: SELFREWARD_BACKEND=triton asks for it"
    return reason


def _native(case: Case) -> str | None:
    return None if case.device == "cpu" else f"the native kernels run on the CPU, the tensors are on {case.device}"


def _native_fp32(case: Case) -> str | None:
    if case.dtype != torch.float32:
        return f"the native kernel computes in torch.float32, the tensors are {case.dtype}"
    if case.gradients:
        return "needs gradients, which the native kernel does not have"
    return _native(case)


def _native_training(case: Case) -> str | None:
    if case.dtype != torch.float32:
        return f"the native kernel computes in torch.float32, the tensors are {case.dtype}"
    return _native(case)


def _without_threads(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A torch reference in the place of a kernel whose last argument is `threads`: torch has a setting of its own."""
    return lambda *given: fn(*given[:-1])


def _tiled_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask) -> torch.Tensor:
    return _tree.tree_attention(q, k, v, mask.tiles)


def _native_tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask) -> torch.Tensor:
    return native.tree_attention(q, k, v, mask.end, mask.trees)


def _windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask) -> torch.Tensor:
    return _windows.tree_attention_windows(q, k, v, mask.windows)


def _flash_attention(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask) -> torch.Tensor:
    varlen = _flash.find(name)
    assert varlen is not None and mask.chains is not None
    return varlen(q, k, v, mask.bounds, max(mask.chains))


def _flash_why_not(name: str, case: Case) -> str | None:
    if case.asked != name:
        return f"{_flash.standing(name)}: SELFREWARD_BACKEND={name} asks for it"
    return _flash.why_not(name, case.device, case.dtype, case.causal)


def _torch_linear(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.weight is not None
    return F.linear(x, packed.weight)


def _torch_linear_bf16(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.weight is not None
    return _linear_bf16.linear_bf16_reference(x, packed.weight)


def _torch_linear_int8(x: torch.Tensor, packed: PackedWeight, threads: int) -> torch.Tensor:
    assert packed.weight is not None
    return _linear_int8.linear_int8_reference(x, packed.weight)


_NATIVE_TILES = native.LogprobTiles()

OPS: dict[str, tuple[Backend, ...]] = {
    "dense": (
        Backend("native", _native_training, native.dense),
        Backend("torch", _always, F.linear),
    ),
    "rms_norm": (
        Backend("triton", _triton, _rms_norm.rms_norm),
        Backend("native", _native_training, native.rms_norm),
        Backend("torch", _always, _rms_norm.rms_norm_reference),
    ),
    "add_rms_norm": (
        Backend("triton", _triton, _rms_norm.add_rms_norm),
        Backend("native", _native_training, native.add_rms_norm),
        Backend("torch", _always, _rms_norm.add_rms_norm_reference),
    ),
    "rope": (
        Backend("triton", _triton, _rope.rope),
        Backend("native", _native_training, native.rope),
        Backend("torch", _always, _rope.rope_reference),
    ),
    "swiglu": (
        Backend("triton", _triton, _swiglu.swiglu),
        Backend("native", _native_training, native.swiglu),
        Backend("torch", _always, _swiglu.swiglu_reference),
    ),
    "tree_attention": (
        Backend("triton", _triton, _tiled_attention),
        *(Backend(name, partial(_flash_why_not, name), partial(_flash_attention, name)) for name in _flash.ADAPTERS),
        Backend("native", _native_training, _native_tree_attention),
        Backend("torch", _always, _windowed_attention),
    ),
    "rms_norm_rows": (
        Backend("triton", _triton, _without_threads(_rms_norm.rms_norm)),
        Backend("native", _native_fp32, native_rows.rms_norm),
        Backend("torch", _always, _without_threads(_rms_norm.rms_norm_reference)),
    ),
    "add_rms_norm_rows": (
        Backend("triton", _triton, _without_threads(_rms_norm.add_rms_norm)),
        Backend("native", _native_fp32, native_rows.add_rms_norm),
        Backend("torch", _always, _without_threads(_rms_norm.add_rms_norm_reference)),
    ),
    "embed_rows": (
        Backend("native", _native, native_rows.embed),
        Backend("torch", _always, _without_threads(lambda tokens, table: F.embedding(tokens, table).float())),
    ),
    "swiglu_rows": (
        Backend("triton", _triton, _without_threads(_swiglu.swiglu)),
        Backend("native", _native_fp32, native_rows.swiglu),
        Backend("torch", _always, _without_threads(_swiglu.swiglu_reference)),
    ),
    "chunk_attention": (
        Backend("native", _native_fp32, native_rows.chunk_attention),
        Backend("torch", _always, _without_threads(_chunk.chunk_attention_reference)),
    ),
    "work_attention": (
        Backend("triton", _triton, _work.work_attention),
        Backend("torch", _always, _work.work_attention_reference),
    ),
    "rope_write": (
        Backend("triton", _triton, _without_threads(_rope_write.rope_write)),
        Backend("native", _native_fp32, native_rows.rope_write),
        Backend("torch", _always, _without_threads(_rope_write.rope_write_reference)),
    ),
    "linear_logprob": (
        Backend("triton", _triton, partial(_logprob.linear_logprob, tiles=_logprob.TRITON)),
        Backend("native", _native_training, partial(_logprob.linear_logprob, tiles=_NATIVE_TILES)),
        Backend("torch", _always, _logprob.linear_logprob),
    ),
    "linear_logprob_loss": (
        Backend("triton", _triton, partial(_logprob.linear_logprob_losses, tiles=_logprob.TRITON)),
        Backend("native", _native_training, partial(_logprob.linear_logprob_losses, tiles=_NATIVE_TILES)),
        Backend("torch", _always, _logprob.linear_logprob_losses),
    ),
    "linear": (
        Backend("native", _native, native_rows.linear),
        Backend("torch", _always, _torch_linear),
    ),
    "linear_bf16": (
        Backend("native", _native, native_rows.linear_bf16),
        Backend("torch", _always, _torch_linear_bf16),
    ),
    "linear_int8": (
        Backend("native", _native, native_rows.linear_int8),
        Backend("torch", _always, _torch_linear_int8),
    ),
    "gumbel_noise": (
        Backend("native", _native, native_rows.gumbel_noise),
        Backend("torch", _always, _gumbel.gumbel_noise_reference),
    ),
    "sample_rows": (
        Backend("triton", _triton, _without_threads(_sample_rows.sample_rows)),
        Backend("native", _native_fp32, native_rows.sample),
        Backend("torch", _always, _without_threads(_sample.sample_reference)),
    ),
    "adamw_bf16": (
        Backend("triton", _triton, _adamw.adamw_bf16),
        Backend("native", _native, native_rows.adamw_bf16),
        Backend("torch", _always, _adamw.adamw_bf16_reference),
    ),
    "dropout_mask": (
        Backend("native", _native, native_rows.dropout_mask),
        Backend("torch", _always, _dropout.dropout_mask_reference),
    ),
}


@cache
def choose(
    op: str, device: str, dtype: torch.dtype = torch.float32, gradients: bool = False, causal: bool = False
) -> Backend:
    """The first backend of `op` that applies on `device` ("cpu", "cuda"); an error with all the reasons if none does.

    Ops whose backends depend on dtype, gradients or the mask pass them; for the others the defaults stand. Remembered
    per case.
    """
    wanted = asked(op)
    case = Case(device, dtype, gradients, causal, wanted)
    reasons = []
    for backend in OPS[op]:
        reason = backend.why_not(case)
        if wanted and backend.name != wanted:
            reason = f"SELFREWARD_BACKEND={wanted} asks for another"
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise InputError(f"no backend of {op} runs on {device} ({'; '.join(reasons)})")


def asked(op: str) -> str | None:
    """SELFREWARD_BACKEND, for the ops that have a backend of that name; several with commas, the first that the op has."""
    names = {backend.name for backends in OPS.values() for backend in backends}
    wanted = [name for name in os.environ.get("SELFREWARD_BACKEND", "").split(",") if name]
    for name in wanted:
        if name not in names:
            raise InputError(f"SELFREWARD_BACKEND asks for {name!r}; expected some of {', '.join(sorted(names))}")
    return next((name for name in wanted if any(name == backend.name for backend in OPS[op])), None)


FORWARD = ("embed_rows", "linear", "linear_bf16", "linear_int8", "rms_norm_rows", "add_rms_norm_rows", "swiglu_rows",
           "rope_write", "chunk_attention")  # fmt: skip


def forward_is_native() -> bool:
    """Whether all that a step on a CPU does to rows before they are drawn from is native kernels."""
    return all(choose(op, "cpu").name == "native" for op in FORWARD)


def _for_rows(op: str, *tensors: torch.Tensor) -> Backend:
    """`choose` for an op of the sampler, from its floating-point arguments; the first one's dtype and device count."""
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return choose(op, tensors[0].device.type, tensors[0].dtype, gradients)


def backends(device: str = "cpu") -> dict[str, str]:
    """Which backend every op uses on this device, for tensors of its usual dtype; where none applies, why."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return {op: _name(op, device, torch.float32 if op == "sample_rows" else dtype) for op in OPS}


def _name(op: str, device: str, dtype: torch.dtype) -> str:
    asked(op)  # a name that no op has is an error here too
    try:
        return choose(op, device, dtype, causal=True).name
    except InputError as error:
        return f"none: {error}"


def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in], weight [out, in] -> x @ weight.T [N, out]: the trainer's linear. Differentiable."""
    return choose("dense", x.device.type, x.dtype).fn(x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., dim], weight [dim] -> [..., dim]."""
    return choose("rms_norm", x.device.type, x.dtype).fn(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and branch [N, dim], weight [dim] -> x + branch, in x's dtype, and its norm, both [N, dim]."""
    return choose("add_rms_norm", x.device.type, x.dtype).fn(x, branch, weight, eps)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [N, heads, D], cos and sin [N, D/2] -> [N, heads, D]."""
    return choose("rope", x.device.type, x.dtype).fn(x, cos, sin)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2 * ffn], gate first -> [..., ffn]."""
    return choose("swiglu", gate_up.device.type, gate_up.dtype).fn(gate_up)


def rms_norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, threads: int = 1) -> torch.Tensor:
    """x [N, dim], weight [dim] -> [N, dim] for sampling. Native: a row's bits depend on the row alone, on no neighbour
    and not on `threads`."""
    return _for_rows("rms_norm_rows", x, weight).fn(x, weight, eps, threads)


def add_rms_norm_rows(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + branch and its norm, with the promise of `rms_norm_rows`."""
    return _for_rows("add_rms_norm_rows", x, branch, weight).fn(x, branch, weight, eps, threads)


def embed_rows(tokens: torch.Tensor, table: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """Rows tokens [N] int64 of table [vocab, dim] as fp32 [N, dim]. On a CPU; not differentiable."""
    return choose("embed_rows", tokens.device.type).fn(tokens, table, threads)


def swiglu_rows(gate_up: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """gate_up [N, 2 * ffn], gate first -> [N, ffn] for sampling, with the promise of `rms_norm_rows`."""
    return _for_rows("swiglu_rows", gate_up).fn(gate_up, threads)


@dataclass(frozen=True)
class TreeMask:
    """Who sees whom in a pack: `Pack.end` [N] int64, and `Pack.chains`, the lengths of its sequences where no tree
    branches. In the form that a backend of `tree_attention` wants it, made once for all layers."""

    end: torch.Tensor
    chains: Sequence[int] | None = None

    @cached_property
    def tiles(self) -> _tree.TreeTiles:
        return _tree.tree_tiles(self.end)

    @cached_property
    def windows(self) -> _windows.TreeWindows:
        return _windows.tree_windows(self.end)

    @cached_property
    def trees(self) -> NDArray[np.int64]:
        return native.windows(self.end)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Where each sequence begins, and their end: int32 [sequences + 1]."""
        assert self.chains is not None
        return torch.tensor([0, *accumulate(self.chains)], dtype=torch.int32, device=self.end.device)


def tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask) -> torch.Tensor:
    """q [N, H, D], k and v [N, G, D] -> [N, H, D]; query i sees key j iff j <= i < end[j]. Differentiable."""
    return choose("tree_attention", q.device.type, q.dtype, causal=mask.chains is not None).fn(q, k, v, mask)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    copies: torch.Tensor,
    threads: int = 1,
) -> torch.Tensor:
    """RoPE of q [N, H, D] and k [N, G, D], which with v [N, G, D] goes to the pages -> q, turned, [N, H, D].

    cos and sin [N, D/2], key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], slots [N] int64: slot s of block b
    is b * B + s; rows that name the same slot hold the same (or the slot is one that nobody reads). copies [C, 3] int64
    of (source, target, tokens): behind all writes, and in this order, the first `tokens` slots of block `source` also
    go to block `target`. q, k and v may be views into one tensor as long as their rows are contiguous. Both backends
    and any `threads` give the same bits.
    """
    backend = _for_rows("rope_write", q, k, v)
    return backend.fn(q, k, v, cos, sin, key_pages, value_pages, slots, copies, threads)


def chunk_attention(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    items: torch.Tensor,
    positions: torch.Tensor,
    threads: int = 1,
) -> torch.Tensor:
    """q [R, H, D] over the pages of each row's context, folded in ascending order -> [R, H, D].

    key_pages [blocks, G, D, B], value_pages [blocks, G, B, D], positions [R] int64. items [I, 4] int64 of (page, chunk,
    first, last): the rows [first, last) have this page as that chunk of their context; items ascend by chunk, and every
    row is in one item of each of its chunks 0 .. position // B. A page is read once for all rows of its item.
    The promise of `rms_norm_rows`, and how rows are grouped into items changes no bit. Slots that no row of an item
    sees are not read, so whatever stale pages hold does no harm.
    """
    backend = _for_rows("chunk_attention", q, key_pages, value_pages)
    return backend.fn(q, key_pages, value_pages, items, positions, threads)


def work_attention(q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, work: Work) -> torch.Tensor:
    """`chunk_attention` of a GPU: the same fold over the work list of `engine/work.py`, and pages with any strides."""
    return choose("work_attention", q.device.type, q.dtype).fn(q, key_pages, value_pages, work)


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and the log of the softmax's sum, fp32, without holding all logits.

    hidden [N, dim], weight [vocab, dim] (the head), targets [N] int64 in [0, vocab) -> logp [N], lse [N].
    Differentiable in hidden and weight, through both outputs. For the edges of a pack pass
    `F.embedding(edges.row, hidden)`: in the backward of `hidden[edges.row]` torch's threads on a CPU add as they come.
    Raises InputError for shapes and dtypes that do not fit, and on a CPU for a target outside the vocabulary; a GPU would
    have to be waited for, and gives NaN there.
    """
    _check_logprob(hidden, weight, targets)
    return choose("linear_logprob", hidden.device.type, hidden.dtype).fn(hidden, weight, targets)


def _check_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    shapes = f"hidden is {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise InputError(f"{shapes}; expected [N, dim], [vocab, dim] and [N]")
    if targets.dtype != torch.int64:
        raise InputError(f"targets are {targets.dtype}; expected torch.int64")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(value) for value in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise InputError(
                f"targets hold {low if low < 0 else high}; expected 0 to {len(weight) - 1}, rows of weight"
            )


def packs(weight: torch.Tensor) -> bool:
    """Whether `pack_linear` makes a copy of this weight that needs it no longer."""
    return choose("linear", weight.device.type).name == "native"


def pack_linear(weight: torch.Tensor, quantization: str | None = None) -> PackedWeight:
    """weight [outputs, depth], packed for `linear`, in its own dtype (fp32, bf16) or as "int8".

    int8: a scale for each output, its largest weight is 127; activations are rounded to 8 bits too, in groups along the
    depth (kernels/linear_int8.py). `engine/quantize.py` measures what that costs.
    """
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(
            f"the weight of a sampler's linear is {weight.dtype}; expected torch.float32 or torch.bfloat16"
        )
    op = "linear_int8" if quantization else "linear" if weight.dtype == torch.float32 else "linear_bf16"
    if choose(op, weight.device.type).name != "native":
        return PackedWeight(op, len(weight), weight, None)
    packed = native_rows.panels(op, *weight.shape)
    repack_linear(packed, weight)
    return packed


repack_linear = native_rows.repack_linear  # replaces some outputs of a weight that `pack_linear` has packed


def linear(x: torch.Tensor, packed: PackedWeight, threads: int = 1) -> torch.Tensor:
    """x [N, depth] fp32 times the weight -> [N, outputs] fp32. A row's bits depend neither on the other rows nor on
    `threads`.

    Not differentiable: for sampling. Only the native backends keep the promise.
    """
    return choose(packed.op, x.device.type).fn(x, packed, threads)


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, depth] times weight [outputs, depth] -> [N, outputs] as it was summed, in fp32: logits are never rounded to
    16 bits, which would cost 0.2 nats over 256 tokens."""
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


Loss = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]


def logprob_loss(
    hidden: torch.Tensor, weight: torch.Tensor, edges: Edges, loss: Loss, linear: bool = False
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """A loss over the log-probs of a pack's edges -> its value, its metrics, logp [E] fp32 (detached).

    hidden [N, dim], weight [vocab, dim] (the head). loss maps logp [E] to (scalar, metrics), as the losses in
    `engine/train/losses.py` do once their other arguments are bound, and depends on weights through logp alone. The
    value is differentiable in hidden and weight, once; no gradient is computed that nobody asks for. linear: the loss is
    linear in logp, as SFT's is (the value is NaN if that turns out to be untrue). Loss and gradients are computed in one
    pass over the head's tiles where all logits fit 256 MB or the loss is linear, elsewhere each tile is made twice; logp
    has the same bits in either case.
    """
    value, (metrics,), logp = logprob_losses(hidden, weight, [(edges, loss)], linear)
    return value, metrics, logp


def logprob_losses(
    hidden: torch.Tensor, weight: torch.Tensor, parts: Sequence[tuple[Edges, Loss]], linear: bool = False
) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
    """The sum of several losses, each over edges of its own, as one call of `logprob_loss` for each would have it -> the
    sum, the metrics of each, logp of all. In the memory of one, and the gradients' once: a loss that is a sum over pairs
    is given in parts of `group_rows` edges, which is as fast (kernels/linear_logprob.py)."""
    fn = choose("linear_logprob_loss", hidden.device.type, hidden.dtype).fn
    return fn(hidden, weight, [(edges.row, edges.target, loss) for edges, loss in parts], linear)


group_rows = _logprob.group_rows  # how many edges a part of `logprob_losses` has, or those of one pair if that has more


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, candidates: torch.Tensor, stream: int, vocab: int
) -> torch.Tensor:
    """Gumbel noise as a function of (seed, position, candidate, token, stream): three [rows] int64 -> fp32 [rows, vocab].

    The noise of `sample_rows`, which makes its own where a token can win, by itself: to check draws, or to draw elsewhere.
    """
    return choose("gumbel_noise", seeds.device.type).fn(seeds, positions, candidates, stream, vocab)


def sample_rows(logits: torch.Tensor, rules: DrawRules, threads: int = 1) -> Draws:
    """Draw a token per row of logits [R, V] fp32; `kernels/sample.py` says what the rules mean and what comes back.

    The promise of `rms_norm_rows`; here the torch backend keeps the ids too. A row that is no distribution has a NaN raw
    log-prob: the caller knows its name. A rule that is out of its range is a ValueError of the native backend.
    """
    return _for_rows("sample_rows", logits).fn(logits, rules, threads)


def dropout_mask(
    key: int, segments: torch.Tensor, positions: torch.Tensor, site: int, units: int, rate: float
) -> torch.Tensor:
    """Which units dropout keeps, as a function of (key, segment, position, site, unit): bool [N, units], True: kept.

    segments and positions [N] int64; key the bit pattern of 64 bits as a signed int; site < 2^16; 0 <= rate < 1.
    """
    threshold = min(round(rate * 2**32), 2**32 - 1)
    return choose("dropout_mask", segments.device.type).fn(key, segments, positions, site, units, threshold)


@cache
def measured_flops(threads: int) -> float:
    """fp32 FLOP/s of this CPU's multiply-adds in registers on `threads` threads: the best of ten runs of half a
    millisecond, once per process."""
    return 1e9 * max(_C.probe_fma(200_000, threads) for _ in range(10))


def adamw_bf16(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: AdamWStep, place: Place
) -> None:
    """One update of AdamW, in place, its write rounded stochastically: weight and grad bf16, mean and square fp32, all
    contiguous and of one shape. `kernels/adamw.py` has the formula; the same bits on every backend and of any part."""
    choose("adamw_bf16", weight.device.type).fn(weight, grad, mean, square, step, place)
