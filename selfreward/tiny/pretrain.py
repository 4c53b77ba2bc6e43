"""Pre-train M0, the base model of the tiny world:

    python -m selfreward.tiny.pretrain --out selfreward/tiny/m0 --tokens 12_000_000 --seed 0 --threads 1

Step s trains on documents s * DOCUMENTS_PER_STEP onwards of the corpus of `seed`, with loss on every token after BOS.
The same seed, thread count and torch give the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from engine import InputError, Llama, LlamaConfig, Tokenizer, TokenTree, save_checkpoint, token_logprobs, tree_attend
from selfreward.tiny import DATA, reserved_prompts
from selfreward.tiny.corpus import Document, documents

DOCUMENTS_PER_STEP, TOKENS_PER_STEP = 440, 8200  # the second is what the first comes to, within a percent
PACK_TOKENS = 2048  # a fifth faster than 4096 or more on one core
PEAK_LR, FINAL_SHARE, WARMUP_STEPS = 2e-3, 0.1, 50
REPORT_EVERY, SAVE_EVERY = 10, 200  # steps


def model_config(vocab_size: int) -> LlamaConfig:
    """0.82M parameters: the smallest Llama of the trials that learns to answer and to judge."""
    return LlamaConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32, ffn_dim=352, vocab_size=vocab_size, max_seq_len=128
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last step. `step` counts from 0."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return PEAK_LR * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def document_tree(document: Document, tokenizer: Tokenizer) -> TokenTree:
    """BOS, the words, and EOS where the document ends by itself; every token but BOS is predicted."""
    ids = [tokenizer.bos_id, *tokenizer.encode(document.text)]
    return TokenTree([*ids, tokenizer.eos_id] if document.stops else ids, weight=1.0)


def train_step(model: Llama, optimizer: torch.optim.Optimizer, trees: list[TokenTree]) -> float:
    """One update on `trees`; returns the mean loss per predicted token, in nats."""
    optimizer.zero_grad(set_to_none=True)
    targets = sum(len(tree) - 1 for tree in trees)
    total = 0.0
    for pack in TokenTree.pack(trees, PACK_TOKENS):
        hidden = model(pack.tokens, pack.position, tree_attend(pack.end))  # [N, dim]
        logp, _ = token_logprobs(hidden[pack.edges.row], model.head, pack.edges.target)
        loss = -logp.sum() / targets
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {total}, gradient norm {norm}: lower the learning rate")
    optimizer.step()
    model.weights_changed()
    return total


def pretrain(out: Path, tokens: int, seed: int, log: TextIO | None = None) -> Llama:
    """Train a fresh model on about `tokens` tokens and write it to `out`, as it stands every SAVE_EVERY steps."""
    tokenizer = Tokenizer(DATA / "tokenizer.model")
    model = Llama(model_config(tokenizer.vocab_size)).init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    exclude, steps = reserved_prompts(), max(1, round(tokens / TOKENS_PER_STEP))
    started, seen = time.perf_counter(), 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = documents(seed, step * DOCUMENTS_PER_STEP, DOCUMENTS_PER_STEP, exclude)
        trees = [document_tree(document, tokenizer) for document in batch]
        loss = train_step(model, optimizer, trees)
        seen += sum(map(len, trees))
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            _report(log, step + 1, steps, loss, seen, time.perf_counter() - started)
        if (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(model, out, tokenizer)
    save_checkpoint(model, out, tokenizer)
    return model


def _report(log: TextIO | None, step: int, steps: int, loss: float, seen: int, seconds: float) -> None:
    rate, left = seen / seconds, seconds / step * (steps - step)
    print(f"step {step}/{steps}  loss {loss:.4f}  {seen:,} tokens  {rate:,.0f} tokens/s  {left:.0f} s left", flush=True)
    if log:
        row: dict[str, Any] = {"step": step, "loss": loss, "tokens": seen, "seconds": round(seconds, 2)}
        log.write(json.dumps(row) + "\n")
        log.flush()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="pre-train M0, the base model of the tiny world")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint, replaced if it exists")
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the weights' last bits depend on it")
    parser.add_argument("--log", type=Path, help="JSONL file for step, loss, tokens and seconds")
    options = parser.parse_args(arguments)
    for name in ("tokens", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    torch.set_num_threads(options.threads)
    try:
        with options.log.open("w") if options.log else contextlib.nullcontext() as log:
            pretrain(options.out, options.tokens, options.seed, log)
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
