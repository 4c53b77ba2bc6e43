"""Pre-train M0, the base model of the tiny world:

    python -m selfreward.tiny.pretrain --out selfreward/tiny/m0 --log selfreward/tiny/m0.log.jsonl

The engine's own trainer on the corpus of `seed`, with loss on every token after BOS. The same seed, thread count, torch
and kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import (
    InputError,
    Llama,
    LlamaConfig,
    SFTConfig,
    SFTRow,
    Tokenizer,
    clear_state,
    content_hash,
    save_checkpoint,
    train,
)
from selfreward.tiny import DATA, reserved_prompts
from selfreward.tiny.corpus import SKILLS, WORLD, Document, Mix, documents

DOCUMENTS_PER_STEP, TOKENS_PER_STEP = 440, 8200  # the second is what the first comes to, within a percent
PACK_TOKENS = 2048  # a fifth faster than 4096 or more on one core
WARMUP_STEPS = 50
REPORT_EVERY = 20  # steps


def model_config(vocab_size: int) -> LlamaConfig:
    """0.82M parameters: the smallest Llama of the trials that learns to answer and to judge."""
    return LlamaConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32, ffn_dim=352, vocab_size=vocab_size, max_seq_len=128
    )


def document_row(document: Document, tokenizer: Tokenizer) -> SFTRow:
    """BOS, then the words to predict, and EOS where the document ends by itself."""
    ids = tokenizer.encode(document.text)
    return SFTRow([tokenizer.bos_id], [*ids, tokenizer.eos_id] if document.stops else ids)


@dataclass(frozen=True)
class Phase:
    """A part of the pre-training: its share of the tokens, its documents, and between which rates a cosine falls."""

    name: str
    share: float
    mix: Mix
    lr: float
    min_lr: float

    def steps(self, tokens: int) -> int:
        return max(1, round(self.share * tokens / TOKENS_PER_STEP))


PHASES = (Phase("skills", 2 / 3, SKILLS, 2e-3, 6e-4), Phase("world", 1 / 3, WORLD, 6e-4, 1e-4))


def train_config(phase: Phase, steps: int, seed: int) -> SFTConfig:
    return SFTConfig(
        lr=phase.lr,
        min_lr=phase.min_lr,
        schedule="cosine",
        warmup_steps=min(WARMUP_STEPS, steps // 10 + 1),
        batch_size=DOCUMENTS_PER_STEP,
        weight_decay=0.1,
        max_pack_tokens=PACK_TOKENS,
        seed=seed,
    )


def pretrain(out: Path, work: Path, tokens: int, seed: int) -> Llama:
    """Train a fresh model on about `tokens` tokens and write it to `out`; an interrupted call goes on from `work`."""
    tokenizer = Tokenizer(DATA / "tokenizer.model")
    model = Llama(model_config(tokenizer.vocab_size)).init_weights(seed)
    start = 0
    for phase in PHASES:
        steps = phase.steps(tokens)
        count = steps * DOCUMENTS_PER_STEP
        print(f"{phase.name}: writing {count:,} documents", flush=True)
        corpus = documents(seed, start, count, reserved_prompts(), phase.mix)
        rows = [document_row(document, tokenizer) for document in corpus]
        train(model, rows, train_config(phase, steps, seed), work / phase.name, on_step=_reporter())
        start += count
    save_checkpoint(model, out, tokenizer)
    return model


def _reporter() -> Callable[[int, int, dict[str, float]], None]:
    started, first = time.perf_counter(), 0

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal first
        first = first or step - 1
        if step % REPORT_EVERY == 0 or step == steps:
            left = (time.perf_counter() - started) / (step - first) * (steps - step)
            print(f"step {step}/{steps}  loss {metrics['loss']:.4f}  {left:.0f} s left", flush=True)

    return on_step


def write_log(work: Path, log: Path, model_hash: str) -> None:
    """Every 20th step's metrics, and the hash of the model that came out."""
    rows: list[dict[str, object]] = []
    for phase in PHASES:
        steps = [json.loads(line) for line in (work / phase.name / "metrics.jsonl").read_text().splitlines()]
        rows += [{"phase": phase.name, **row} for row in steps if row["step"] % REPORT_EVERY == 0 or row is steps[-1]]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"content_hash": model_hash}]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="where an interrupted call goes on")
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the weights' last bits depend on it")
    parser.add_argument("--log", type=Path, help="JSONL file for the metrics of every 20th step and the model's hash")
    options = parser.parse_args(arguments)
    for name in ("tokens", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    torch.set_num_threads(options.threads)
    try:
        if options.log:
            options.log.touch()  # a name that cannot be written must not show after half an hour
        pretrain(options.out, options.work, options.tokens, options.seed)
        if options.log:
            write_log(options.work, options.log, content_hash(options.out))
        for phase in PHASES:
            clear_state(options.work / phase.name)
        print(f"{options.out}: content hash {content_hash(options.out)}")
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
