"""The kernels' cases for `benchmarks/gpu.py`: one `setup` per subject, for time, memory, correctness and smoke alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_bench import Bench, Case
from engine.batch import Layout
from engine.config import LlamaConfig
from engine.graphs import map_tensors
from engine.kernels import adamw as updates
from engine.kernels import flash, linear_logprob, sample_rows, tree_attention, work_attention
from engine.kernels import rms_norm as norms
from engine.kernels import rope as ropes
from engine.kernels import rope_write as writes
from engine.kernels import swiglu as swiglus
from engine.kernels.sample import DrawRules, ragged
from engine.tree import TokenTree
from engine.work import make_work

PAGE = 64


def random(bench: Bench, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> torch.Tensor:
    x = torch.randn(shape, device=bench.device, dtype=torch.float32).to(dtype or bench.dtype)
    return x.requires_grad_(grad)


def gradient(
    fn: Callable[..., Any], inputs: list[torch.Tensor], upstream: list[torch.Tensor]
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The backward of fn(*inputs) alone."""
    out = fn(*inputs)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(outs, wanted, upstream, retain_graph=True)


def rms_norm(bench: Bench) -> Iterator[Case]:
    rows, dim = (4, 64) if bench.smoke else (8192, 4096)
    x, branch, weight = (random(bench, *shape, grad=True) for shape in ((rows, dim), (rows, dim), (dim,)))
    up = random(bench, rows, dim)
    size, shape, half = x.element_size(), f"{rows} x {dim}", x.element_size()
    ours, eager = (lambda x, w: norms.rms_norm(x, w, 1e-5)), (lambda x, w: norms.rms_norm_reference(x, w, 1e-5))
    torchs = lambda: F.rms_norm(x, (dim,), weight, 1e-5)  # noqa: E731
    peers = {"eager": lambda: eager(x, weight), "F.rms_norm": torchs}
    yield Case(
        "rms_norm", shape, lambda: ours(x, weight), peers, lambda: eager(x, weight), norms.bytes(rows, dim, size)
    )
    back, their = gradient(ours, [x, weight], [up]), gradient(eager, [x, weight], [up])
    fused = gradient(lambda x, w: F.rms_norm(x, (dim,), w, 1e-5), [x, weight], [up])
    moved = norms.bytes(rows, dim, half, backward=True)
    yield Case("rms_norm backward", shape, back, {"eager": their, "F.rms_norm": fused}, their, moved)
    both = lambda: norms.add_rms_norm(x, branch, weight, 1e-5)  # noqa: E731
    apart = lambda: norms.add_rms_norm_reference(x, branch, weight, 1e-5)  # noqa: E731
    yield Case("add + rms_norm", shape, both, {"eager": apart}, apart, norms.bytes(rows, dim, size, add=True))


def rope(bench: Bench) -> Iterator[Case]:
    rows, heads, dim = (3, 2, 16) if bench.smoke else (8192, 32, 128)
    x, angle = random(bench, rows, heads, dim), random(bench, rows, dim // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    eager = lambda: ropes.rope_reference(x, cos, sin)  # noqa: E731
    moved = ropes.bytes(rows, heads, dim, x.element_size())
    yield Case("rope", f"{rows} x {heads} x {dim}", lambda: ropes.rope(x, cos, sin), {"eager": eager}, eager, moved)


def swiglu(bench: Bench) -> Iterator[Case]:
    rows, ffn = (3, 40) if bench.smoke else (8192, 11008)
    x, up = random(bench, rows, 2 * ffn, grad=True), random(bench, rows, ffn)
    shape, size = f"{rows} x {ffn}", x.element_size()
    eager = lambda: swiglus.swiglu_reference(x)  # noqa: E731
    yield Case("swiglu", shape, lambda: swiglus.swiglu(x), {"eager": eager}, eager, swiglus.bytes(rows, ffn, size))
    back, their = gradient(swiglus.swiglu, [x], [up]), gradient(swiglus.swiglu_reference, [x], [up])
    yield Case("swiglu backward", shape, back, {"eager": their}, their, swiglus.bytes(rows, ffn, size, backward=True))


def attention_case(bench: Bench, name: str, pack: Any, heads: int, kv_heads: int, dim: int) -> Iterator[Case]:
    """Forward and backward over one pack, beside torch's varlen FlashAttention over its sequences, prompts repeated."""
    tokens, end = len(pack), pack.end.to(bench.device)
    q, k, v = (random(bench, tokens, h, dim, grad=True) for h in (heads, kv_heads, kv_heads))
    up, tiles = random(bench, tokens, heads, dim), tree_attention.tree_tiles(end)
    pairs, shape = tree_attention.pairs(end), f"{name}, {tokens} tokens, {heads}/{kv_heads} x {dim}"
    ours = lambda q, k, v: tree_attention.tree_attention(q, k, v, tiles)  # noqa: E731
    small = tokens <= 4096  # the reference holds all scores
    reference = (lambda: tree_attention.tree_attention_reference(q, k, v, end)) if small else None
    forward_peers: dict[str, Callable[[], Any]] = {}
    backward_peers: dict[str, Callable[[], Any]] = {}
    if pack.chains and len({*pack.chains}) == 1:  # a batch of equal sequences
        whole = lambda q, k, v: causal(q, k, v, len(pack.chains))  # noqa: E731
        reference = forward_peers["SDPA"] = lambda: whole(q, k, v)
        backward_peers["SDPA"] = gradient(whole, [q, k, v], [up])
    varlen = flash.find("torch_varlen") if bench.device.type == "cuda" else None
    if varlen is not None:
        lengths = pack.chains or paths(pack)
        bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=bench.device)
        rows = int(bounds[-1])
        qf, kf, vf = (random(bench, rows, h, dim, grad=True) for h in (heads, kv_heads, kv_heads))
        other = lambda q, k, v: varlen(q, k, v, bounds, max(lengths))  # noqa: E731
        repeats = heads != kv_heads and flash.repeats("torch_varlen")
        title = "varlen FlashAttention" + (", K and V repeated" if repeats else "")
        forward_peers[title] = lambda: other(qf, kf, vf)
        backward_peers[title] = gradient(other, [qf, kf, vf], [random(bench, rows, heads, dim)])
    size = q.element_size()
    moved, work = (
        tree_attention.bytes(tokens, heads, kv_heads, dim, size),
        tree_attention.flops(tokens, pairs, heads, dim),
    )
    yield Case("tree_attention", shape, lambda: ours(q, k, v), forward_peers, reference, moved, work)
    moved = tree_attention.bytes(tokens, heads, kv_heads, dim, size, backward=True)
    work = tree_attention.flops(tokens, pairs, heads, dim, backward=True)
    theirs = backward_peers.get("SDPA")
    if theirs is None and small:
        theirs = gradient(lambda q, k, v: tree_attention.tree_attention_reference(q, k, v, end), [q, k, v], [up])
    yield Case(
        "tree_attention backward",
        shape,
        gradient(ours, [q, k, v], [up]),
        backward_peers,
        theirs,
        moved,
        work,
        bound=3e-2,
    )


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: int) -> torch.Tensor:
    """torch's attention over sequences of one length that lie one after the other."""
    q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)


def paths(pack: Any) -> list[int]:
    """Lengths of the sequences of a pack, each with its own copy of what it shares: one per leaf."""
    position, end = pack.position.tolist(), pack.end.tolist()
    last = [i for i in range(len(end)) if i + 1 == len(end) or position[i + 1] <= position[i]]
    return [position[i] + 1 for i in last]


def tree(bench: Bench) -> Iterator[Case]:
    length, count, heads, dim = (20, 2, 2, 16) if bench.smoke else (4096, 4, 32, 128)
    chains = TokenTree.pack([TokenTree([1] * length) for _ in range(count)], length * count)[0]
    yield from attention_case(bench, "causal", chains, heads, heads, dim)
    prompt, answer = (9, 5) if bench.smoke else (1024, 512)
    pair = TokenTree([1] * prompt, children=(TokenTree([1] * answer), TokenTree([1] * answer)))
    yield from attention_case(bench, "DPO pairs", TokenTree.pack([pair] * (count // 2), 1 << 20)[0], heads, heads, dim)
    length, count, heads, kv_heads = (7, 2, 4, 2) if bench.smoke else (256, 16, 64, 8)
    short = TokenTree.pack([TokenTree([1] * length) for _ in range(count)], 1 << 20)[0]
    yield from attention_case(bench, "causal, short", short, heads, kv_heads, dim)


def layout_of(contexts: list[int], shared: int, group: int) -> Layout:
    """Decoding sequences; each `group` of them has its first `shared` chunks in common."""
    pages: list[int] = []
    first_page, unused = [0], 1
    heads: dict[int, list[int]] = {}
    for number, context in enumerate(contexts):
        if shared and number // group not in heads:
            heads[number // group] = list(range(unused, unused + shared))
            unused += shared
        own = -(-context // PAGE) - shared
        pages += [*heads.get(number // group, []), *range(unused, unused + own)]
        unused += own
        first_page.append(len(pages))
    rows = np.arange(len(contexts) + 1)
    return Layout(rows, np.array(contexts) - 1, np.array(first_page), np.array(pages))


def decode_case(
    bench: Bench, name: str, layout: Layout, heads: int, kv_heads: int, dim: int, grouped: bool = True
) -> Iterator[Case]:
    config = LlamaConfig(heads * dim, 1, heads, kv_heads, dim, 64, 64, 1 << 16)
    work = make_work(layout, PAGE, config, bench.dtype, grouped=grouped)
    narrow, counts = work.narrow, work.fold[:, 2]
    tokens = int((narrow[:, 1] * PAGE).sum() + (work.wide[:, 1] * PAGE).sum())
    slots = int(counts.sum())
    work = map_tensors(work, lambda x: x.to(bench.device))
    rows, blocks = int(layout.first_row[-1]), int(layout.pages.max()) + 1
    q = random(bench, rows, heads, dim)
    keys, values = (random(bench, blocks, kv_heads, PAGE, dim) for _ in range(2))
    ours = lambda: work_attention.work_attention(q, keys.transpose(-1, -2), values, work)  # noqa: E731
    peers: dict[str, Callable[[], Any]] = {}
    lengths = np.diff(layout.first_page)
    if (
        rows == len(layout.starts) and (lengths == lengths[0]).all()
    ):  # contiguous keys, as a cache without pages has them
        group = heads // kv_heads
        table = torch.from_numpy(layout.pages.reshape(rows, -1)).to(bench.device)
        k, v = (x[table].permute(0, 2, 1, 3, 4).flatten(2, 3) for x in (keys, values))  # [rows, G, T, D]
        mask = (
            torch.arange(k.shape[2], device=bench.device) <= torch.from_numpy(layout.starts).to(bench.device)[:, None]
        )
        attend = lambda: F.scaled_dot_product_attention(  # noqa: E731
            q[:, :, None], k, v, attn_mask=mask[:, None, None], enable_gqa=group > 1
        )
        peers["SDPA, contiguous"] = attend
        reference = lambda: attend()[:, :, 0]  # noqa: E731
    else:
        reference = lambda: work_attention.work_attention_reference(  # noqa: E731
            q, keys.transpose(-1, -2), values, work
        )
    moved = work_attention.bytes(tokens, rows, slots, heads, kv_heads, dim, q.element_size())
    shape = f"{name}, {heads}/{kv_heads} x {dim}"
    yield Case("work_attention", shape, ours, peers, reference, moved)


def decode(bench: Bench) -> Iterator[Case]:
    sizes = [(2, 100)] if bench.smoke else [(1, 512), (1, 2048), (32, 512), (32, 2048), (128, 512), (256, 512)]
    for heads, kv_heads, dim in [(2, 1, 16)] if bench.smoke else [(32, 32, 128), (64, 8, 128)]:
        for batch, context in sizes:
            layout = layout_of([context] * batch, 0, 1)
            yield from decode_case(bench, f"batch {batch}, context {context}", layout, heads, kv_heads, dim)


def grouped(bench: Bench) -> Iterator[Case]:
    """32 prompts of 512 tokens, 8 samples each, half of 256 new tokens there."""
    groups, samples, shared, own = (2, 2, 1, 1) if bench.smoke else (32, 8, 8, 2)
    heads, dim = (2, 16) if bench.smoke else (32, 128)
    layout = layout_of([(shared + own) * PAGE] * (groups * samples), shared, samples)
    for together in (True, False):
        name = f"{groups} x {samples} samples, {'grouped' if together else 'apart'}"
        yield from decode_case(bench, name, layout, heads, heads, dim, together)


def prefill(bench: Bench) -> Iterator[Case]:
    tokens, heads, dim = (40, 2, 16) if bench.smoke else (2048, 32, 128)
    pages = np.arange(1, -(-tokens // PAGE) + 1)
    layout = Layout(np.array([0, tokens]), np.array([0]), np.array([0, len(pages)]), pages)
    for case in decode_case(bench, f"prefill {tokens}", layout, heads, heads, dim):
        yield case._replace(
            bytes=0, flops=work_attention.flops(tokens * (tokens + 1) // 2, heads, dim), reference=case.reference
        )


def rope_write(bench: Bench) -> Iterator[Case]:
    rows, heads, dim = (3, 2, 16) if bench.smoke else (8192, 32, 128)
    qkv, angle = random(bench, rows, 3 * heads, dim), random(bench, rows, dim // 2, dtype=torch.float32)
    q, k, v = qkv.split(heads, dim=1)
    keys, values = (random(bench, rows // PAGE + 1, heads, PAGE, dim) for _ in range(2))
    slots = torch.randperm(rows, device=bench.device)
    copies = torch.empty(0, 3, dtype=torch.int64, device=bench.device)
    given = (q, k, v, angle.cos(), angle.sin(), keys.transpose(-1, -2), values, slots, copies)
    eager = lambda: writes.rope_write_reference(*given)  # noqa: E731
    moved = writes.bytes(rows, heads, heads, dim, q.element_size())
    yield Case(
        "rope_write", f"{rows} x {heads} x {dim}", lambda: writes.rope_write(*given), {"eager": eager}, eager, moved
    )


def others(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The same log-probs, differentiable, from what is installed of others."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        found["F.linear_cross_entropy"] = lambda: -F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    if hidden.is_cuda and find_spec("cut_cross_entropy"):
        cut = import_module("cut_cross_entropy").linear_cross_entropy
        found["cut_cross_entropy"] = lambda: -cut(hidden, weight, targets, reduction="none")
    return found


def logprob(bench: Bench) -> Iterator[Case]:
    """`eager`: products in the dtype, logits widened, log-softmax, gather."""
    edges, dim, vocab = (5, 16, 40) if bench.smoke else (8192, 4096, 32000)
    hidden, weight = random(bench, edges, dim, grad=True), (random(bench, vocab, dim) * dim**-0.5).requires_grad_()
    targets = torch.randint(vocab, (edges,), device=bench.device)
    coefficient = torch.randn(edges, device=bench.device)

    def eager() -> torch.Tensor:
        return (hidden @ weight.T).float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return linear_logprob.linear_logprob(hidden, weight, targets, linear_logprob.TRITON)[0]

    def recompute() -> tuple[torch.Tensor, ...]:
        logp = linear_logprob.linear_logprob(hidden, weight, targets, linear_logprob.TRITON)[0]
        return torch.autograd.grad((logp * coefficient).sum(), (hidden, weight))

    def one_pass() -> tuple[torch.Tensor, ...]:
        def loss(logp: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return (logp * coefficient).sum(), {}

        value = linear_logprob.linear_logprob_loss(hidden, weight, targets, loss, True, linear_logprob.TRITON)[0]
        return torch.autograd.grad(value, (hidden, weight))

    both = lambda: torch.autograd.grad((eager() * coefficient).sum(), (hidden, weight))  # noqa: E731
    forward_peers, peers = {"eager": eager}, {"eager": both}
    for name, logp in others(hidden, weight, targets).items():
        forward_peers[name] = torch.no_grad()(logp)
        peers[name] = lambda logp=logp: torch.autograd.grad((logp() * coefficient).sum(), (hidden, weight))  # type: ignore[misc]
    if find_spec("liger_kernel"):  # it has the mean over tokens alone, and so no coefficients to read
        mean = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        peers["Liger, mean"] = lambda: torch.autograd.grad(mean(weight, hidden, targets), (hidden, weight))
    shape, cost = f"{edges} x {dim} x {vocab}", 2 * edges * dim * vocab
    yield Case("linear_logprob forward", shape, forward, forward_peers, eager, 0, cost)
    yield Case("linear_logprob recompute", shape, recompute, peers, both, 0, 4 * cost, bound=5e-2)
    yield Case("linear_logprob one pass", shape, one_pass, peers, both, 0, 3 * cost, bound=5e-2)


def sampling(bench: Bench) -> Iterator[Case]:
    """`sorted`: what a sampler does that sorts the vocabulary."""
    vocab = 200 if bench.smoke else 32000
    for rows in (2,) if bench.smoke else (1, 32, 256):
        for name, top_k, top_p in (("plain", 0, 1.0), ("top-p 0.9", 0, 0.9), ("top-k 50", 50, 1.0)):
            logits = 3 * random(bench, rows, vocab, dtype=torch.float32)
            whole = torch.arange(rows)
            offsets, none = ragged([[]] * rows)
            rules = DrawRules(
                torch.full((rows,), 0.7), torch.full((rows,), top_k), torch.full((rows,), top_p, dtype=torch.float64),
                torch.zeros(rows, dtype=torch.float64), whole, whole, whole, vocab, offsets, none, offsets, none,
            )  # fmt: skip
            rules = map_tensors(rules, lambda x: x.to(bench.device))
            ours = lambda logits=logits, rules=rules: sample_rows.sample_rows(logits, rules).raw  # noqa: E731

            def by_sorting(logits: torch.Tensor = logits, top_k: int = top_k, top_p: float = top_p) -> torch.Tensor:
                ordered, index = (logits / 0.7).sort(dim=-1, descending=True)
                weights = ordered.softmax(dim=-1)
                keep = (weights.cumsum(dim=-1) - weights < top_p) & (
                    torch.arange(vocab, device=logits.device) < (top_k or vocab)
                )
                picked = torch.multinomial(weights * keep, 1)
                return logits.log_softmax(dim=-1).gather(1, index.gather(1, picked))

            ids = sample_rows.sample_rows(logits, rules).ids
            exact = lambda logits=logits, ids=ids: (  # noqa: E731
                logits.double().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
            )
            moved = sample_rows.bytes(rows, vocab, 1)  # the logits once: further passes are the kernel's own affair
            shape = f"{rows} x {vocab}, {name}"
            yield Case("sample_rows", shape, ours, {"sorted": by_sorting}, exact, moved, bound=1e-4)


def adamw(bench: Bench) -> Iterator[Case]:
    """Rounded stochastically, 22 bytes read and written a parameter, beside torch's fused update of fp32 parameters, 28.
    It is in place: checked on other, fewer numbers, bit for bit."""
    step = updates.AdamWStep(0.9, 0.95, 1e-8, 1.0, 1e-6, 1.0, 1.0)
    place = updates.Place(1, 0)

    def numbers(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, gradient = (random(bench, count, dtype=torch.bfloat16) for _ in range(2))
        mean, square = (torch.zeros(count, device=bench.device) for _ in range(2))
        return weight, gradient, mean, square

    few = numbers(5000)
    weight, gradient, mean, square = (x.clone() for x in few)
    updates.adamw_bf16(*few, step, place)
    updates.adamw_bf16_reference(weight, gradient, mean, square, step, place)
    for name, mine, exact in zip(("weight", "mean", "square"), (few[0], *few[2:]), (weight, mean, square), strict=True):
        if not torch.equal(mine, exact):
            raise AssertionError(f"adamw_bf16 5000: {name} is not the reference's")
    count = 1000 if bench.smoke else 1 << 27
    weight, gradient, mean, square = numbers(count)
    wide = random(bench, count, dtype=torch.float32, grad=True)
    wide.grad = random(bench, count, dtype=torch.float32)
    fused = torch.optim.AdamW([wide], lr=1e-6, weight_decay=0.0, fused=True)
    ours = lambda: updates.adamw_bf16(weight, gradient, mean, square, step, place)  # noqa: E731
    yield Case("adamw_bf16", f"{count}", ours, {"torch fused, fp32": fused.step}, None, 22 * count)


MAKERS: list[Callable[[Bench], Iterator[Case]]] = [
    rms_norm,
    rope,
    swiglu,
    tree,
    decode,
    grouped,
    prefill,
    rope_write,
    logprob,
    sampling,
    adamw,
]
