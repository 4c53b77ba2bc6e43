"""One way to compute a DPO step, in a process of its own: benchmarks/training.py starts it and asks for steps.

A line of JSON in is a work load, {"pairs", "prompt", "answer", "seed"}; a line out is what it took. All ways compute the
same loss, sigmoid DPO with reference log-probs of zero, of the same model on the same tokens, with torch's fp32 parameters.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.models import random_model
from engine import Llama, TokenTree, ops, save_checkpoint
from engine.model import tree_attend
from engine.train.batches import edge_groups
from engine.tree import Edges

BETA = 0.1
Work = dict[str, int]
Sequences = torch.Tensor  # [2 * pairs, prompt + answer] int64, the chosen ones first


def sequences(work: Work, vocab: int) -> Sequences:
    generator = torch.Generator().manual_seed(work["seed"])
    prompt = torch.randint(3, vocab, (work["pairs"], work["prompt"]), generator=generator)
    answers = torch.randint(3, vocab, (2 * work["pairs"], work["answer"]), generator=generator)
    return torch.cat((torch.cat((prompt, prompt)), answers), dim=1)


def hidden_of(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [sequences, length] -> [sequences, length, dim]: Llama as it is mostly written in torch."""
    config, (rows, length) = model.config, tokens.shape
    cos, sin = (torch.cat((table[:length],) * 2, dim=-1) for table in (model.rope_cos, model.rope_sin))

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    x = F.embedding(tokens, model.embed)
    for block in model.blocks:
        qkv = F.linear(norm(x, block.attention_norm.weight), block.attention.qkv)
        q, k, v = qkv.view(rows, length, -1, config.head_dim).transpose(1, 2).split(block.attention.heads, dim=1)
        out = F.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        x = x + F.linear(out.transpose(1, 2).flatten(2), block.attention.o)
        gate, up = F.linear(norm(x, block.mlp_norm.weight), block.mlp.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, block.mlp.down)
    return norm(x, model.norm.weight)


def dpo(logps: torch.Tensor) -> torch.Tensor:
    """logps [2 * pairs], the chosen ones first."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def predicting(hidden: torch.Tensor, tokens: torch.Tensor, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that predict answers [sequences, targets, dim], and what [sequences, targets]."""
    first = max(1, work["prompt"])
    return hidden[:, first - 1 : -1], tokens[:, first:]


class Selfreward:
    """This engine as its trainer does it: prompts once, no padding, the head in one pass, as many pairs at a time as fit.

    Without a prompt a pair is two trees, and in one group because the trainer's 524 rows hold one pair's 2 x 255 and not
    three answers'; a pair that is cut is an error."""

    def hidden(self, model: Llama, tokens: Sequences, work: Work) -> Any:
        split, trees = work["prompt"], []
        for number, (chosen, rejected) in enumerate(zip(*tokens.chunk(2), strict=True)):
            answers = [TokenTree(x[split:].tolist(), 1.0, 2 * number + i) for i, x in enumerate((chosen, rejected))]
            trees.extend([TokenTree(chosen[:split].tolist(), children=tuple(answers))] if split else answers)
        (pack,) = TokenTree.pack(trees, 1 << 20)
        return model(pack.tokens, pack.position, tree_attend(pack.end, pack.chains)), pack

    def loss(self, model: Llama, hidden: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        rows, pack = hidden
        groups = edge_groups(pack, ops.group_rows(model.head))
        parts = [(edges, partial(self._group, edges=edges, pairs=work["pairs"])) for edges in groups]
        return ops.logprob_losses(rows, model.head, parts)[0]

    @staticmethod
    def _group(logp: torch.Tensor, edges: Edges, pairs: int) -> tuple[torch.Tensor, None]:
        present, sequence = edges.sequence.unique(return_inverse=True)
        if not torch.equal(present[::2] + 1, present[1::2]) or bool((present[::2] % 2).any()):
            raise ValueError(f"a group has the answers {present.tolist()}; expected those of whole pairs")
        logps = torch.zeros(len(present)).index_add(0, sequence, logp)
        return dpo(torch.cat((logps[::2], logps[1::2]))) * len(present) / (2 * pairs), None


class Recompute(Selfreward):
    """The head through `token_logprobs`, which knows nothing of the loss: every tile is made twice."""

    def loss(self, model: Llama, hidden: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        rows, edges = hidden[0], hidden[1].edges
        logp, _ = ops.token_logprobs(rows[edges.row], model.head, edges.target)
        logps = torch.zeros(2 * work["pairs"]).index_add(0, edges.sequence, logp)
        return dpo(torch.cat((logps[::2], logps[1::2])))


class Eager:
    """All logits, log-softmax, gather."""

    def hidden(self, model: Llama, tokens: Sequences, work: Work) -> Any:
        return hidden_of(model, tokens)

    def loss(self, model: Llama, hidden: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        rows, targets = predicting(hidden, tokens, work)
        logits = F.linear(rows, model.head)
        return dpo(logits.log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2).sum(1))


class LinearCrossEntropy(Eager):
    """torch's, in chunks as it chooses them, once for all tokens: a call for each sequence, whose sum it can give, keeps a
    gradient of the head for each (2,040 tokens: 11.9 s and 789 MB instead of 3.7 and 103)."""

    def loss(self, model: Llama, hidden: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        rows, targets = predicting(hidden, tokens, work)
        options = torch.nn.LinearCrossEntropyOptions()
        nll = F.linear_cross_entropy(
            rows.flatten(0, 1), model.head, targets.flatten(), reduction="none", options=options
        )
        return dpo(-nll.view(targets.shape).sum(1))


class Liger(Eager):
    """Its chunked DPO loss, a pair at a time, as TRL calls it; not compiled, which on a CPU took longer."""

    def loss(self, model: Llama, hidden: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        rows, targets = predicting(hidden, tokens, work)
        loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=False)
        return loss(model.head, rows.contiguous(), targets.contiguous())[0]


class Trl:
    """What DPOTrainer.compute_loss of TRL 1.16 does: transformers' Llama behind TRL's fused head, which also makes what its
    metrics want. Forward is hidden states and head together."""

    def prepare(self, model: Llama) -> Any:
        import transformers
        from trl.trainer.utils import add_fused_lm_head

        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(model, Path(directory) / "model")
            theirs = transformers.LlamaForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32)
        add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        return theirs.train()

    def hidden(self, model: Any, tokens: Sequences, work: Work) -> Any:
        labels = tokens.clone()
        labels[:, : work["prompt"]] = -100
        mask = torch.ones_like(tokens)
        return model(tokens, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False).log_probs

    def loss(self, model: Any, logps: Any, tokens: Sequences, work: Work) -> torch.Tensor:
        return dpo(logps.sum(1))


WAYS: dict[str, Any] = {
    "selfreward": Selfreward,
    "recompute": Recompute,
    "eager": Eager,
    "linear_cross_entropy": LinearCrossEntropy,
    "liger": Liger,
    "trl": Trl,
}


def status(name: str) -> int:
    """Bytes of VmRSS or VmHWM, the highest since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Give unused memory back, forget the highest use -> what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def step(way: Any, model: Llama, work: Work, cold: int) -> dict[str, float]:
    """A whole step but the optimiser's: gradients are there at the end. cold: bytes in use before the first step of the
    process, so that what a way keeps from one step to the next is counted as its memory."""
    tokens = sequences(work, model.config.vocab_size)
    model.zero_grad(set_to_none=True)
    reset_peak()
    times = [time.perf_counter()]
    hidden = way.hidden(model, tokens, work)
    times.append(time.perf_counter())
    loss = way.loss(model, hidden, tokens, work)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    parts = {"hidden": times[1] - times[0], "loss": times[2] - times[1], "backward": times[3] - times[2]}
    peak = status("VmHWM") - cold
    return {"seconds": times[-1] - times[0], **parts, "peak": peak, "value": loss.item(), "norm": norm.item()}


def head(way: Any, model: Llama, work: Work, cold: int) -> dict[str, float]:
    """The loss alone, forward and backward, on given hidden states; peak, as `step` has it, is besides these, their
    gradient and the head's."""
    tokens = sequences(work, model.config.vocab_size)
    shape = (2 * work["pairs"], work["prompt"] + work["answer"], model.config.dim)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(work["seed"]))
    if isinstance(way, Selfreward):  # one answer after the other, pair by pair
        states = states.view(2, work["pairs"], *shape[1:]).transpose(0, 1).flatten(0, 2)
    states.requires_grad_()
    given: Any = states
    if isinstance(way, Selfreward):
        given = states, way.hidden(_Flat(), tokens, {**work, "prompt": 0})[1]
    model.head.grad = None
    reset_peak()
    start = time.perf_counter()
    loss = way.loss(model, given, tokens, work)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - cold - 4 * (2 * states.numel() + model.head.numel())
    assert states.grad is not None and model.head.grad is not None
    norms = {"norm": states.grad.norm().item(), "head_norm": model.head.grad.norm().item()}
    return {"seconds": seconds, "peak": peak, "value": loss.item(), **norms}


class _Flat:
    """In the place of a model whose hidden states are given."""

    def __call__(self, *_: Any) -> None:
        return None


def main() -> None:
    name, model_name, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    way, model = WAYS[name](), random_model(model_name)
    if isinstance(way, Trl):
        model = way.prepare(model)
    cold = reset_peak()
    print(json.dumps({"ready": name, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        kind = {"step": step, "head": head}[work.pop("kind")]
        print(json.dumps(kind(way, model, work, cold)), flush=True)


if __name__ == "__main__":
    main()
