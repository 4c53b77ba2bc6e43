"""The same preference pairs trained in TRL and here: our files unchanged in TRL, TRL's rows and reference values in ours.

    pip install trl
    python examples/pairs_in_trl.py

Both take three steps of the whole data with the same rate and the same optimizer, from the same checkpoint: their losses
agree to 1e-4. A pairs.jsonl of the loop holds messages instead of these texts (and columns that TRL passes over): TRL puts
them into the chat layout that stands in a model directory's tokenizer_config.json, which
gives the ids that the loop trains on where an answer was sampled in the tokenizer's own tokens.
"""

import json
import tempfile
from pathlib import Path

import sentencepiece
import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import (
    DPOConfig,
    Llama,
    LlamaConfig,
    Tokenizer,
    load_checkpoint,
    reference_gap,
    rows_from_trl,
    save_checkpoint,
    train,
)

PAIRS = [
    {"prompt": "Name a colour.", "chosen": " Blue is one.", "rejected": " Seven, I think."},
    {"prompt": "Name a number.", "chosen": " Seven is one.", "rejected": " Blue, I think."},
    {"prompt": "Name a colour and a number.", "chosen": " Blue and seven.", "rejected": " I think so."},
    {"prompt": "Say nothing.", "chosen": " So be it.", "rejected": " Blue is a colour and seven is a number."},
]
STEPS, RATE = 3, 1e-3


def checkpoint(directory: Path) -> Path:
    """A small Llama with random weights and a BPE tokenizer of the pairs' text."""
    (directory / "text").write_text("\n".join(text for pair in PAIRS for text in pair.values()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=320,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(directory / "tokenizer.model")
    config = LlamaConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=64,
    )
    save_checkpoint(Llama(config).init_weights(seed=0, std=0.1), directory / "model", tokenizer)
    return directory / "model"


def train_in_trl(model: Path, pairs: Path, out: Path) -> tuple[list[float], list[dict]]:
    """Losses, and the rows as TRL has them once it has tokenised them and computed the reference."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.unk_token
    arguments = trl.DPOConfig(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=len(PAIRS), learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta2=0.95, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=True,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(out / "cache"))
    trainer = trl.DPOTrainer(model=policy, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], list(trainer.train_dataset)


def train_here(model: Path, records: list[dict]) -> tuple[list[float], float]:
    """Losses, and how far TRL's reference values are from this model's own, in nats."""
    llama, rows, losses = load_checkpoint(model), rows_from_trl(records), []
    gap = reference_gap(llama, rows)
    config = DPOConfig(lr=RATE, schedule="constant", epochs=STEPS, batch_size=len(rows))
    train(llama, rows, config, on_step=lambda step, steps, metrics: losses.append(metrics["loss"]))
    return losses, gap


def main() -> tuple[list[float], list[float], float]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, pairs = checkpoint(directory), directory / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
        theirs, records = train_in_trl(model, pairs, directory / "out")
        ours, gap = train_here(model, records)
    return theirs, ours, gap


if __name__ == "__main__":
    theirs, ours, gap = main()
    print("TRL: ", *(f"{loss:.6f}" for loss in theirs))
    print("here:", *(f"{loss:.6f}" for loss in ours))
    print(f"reference values differ by at most {gap:.1e} nats")
