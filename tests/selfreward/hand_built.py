"""A model that nobody trained and that judges readably: after whatever it is given it says "Score: " and a number from 0 to
5, each as likely, and stops. It carries the loop through every stage where no real weights are at hand.

    python -m tests.selfreward.hand_built OUT --tokenizer tokenizer.model [--preset 7B] [--layers 2] [--seed 0]

The next token depends on the last one alone. Each of the tokens that are said has a direction of its own in the embedding,
all others share one; attention and MLP add nothing (their last matrices are zero, the others random, so that they cost what
they cost); the head looks at the direction of the last token and prefers what comes next by GAP nats.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from engine import PRESETS, InputError, Llama, LlamaConfig, Tokenizer, save_checkpoint

GAP = 30.0  # nats between what may come next and all else: 32,000 other tokens then have 3e-9 together
NOISE = 0.02


def chain(tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of "Score: d" by place: one for each, then the six digits, then the end."""
    spelled = [tokenizer.encode(f"Score: {digit}") for digit in range(6)]
    before = spelled[0][:-1]
    if any(ids[:-1] != before for ids in spelled) or len({ids[-1] for ids in spelled}) != 6:
        raise InputError(f"{tokenizer.path} does not spell each of the scores as one token behind 'Score: '")
    if len(set(before)) != len(before):
        raise InputError(f"{tokenizer.path} spells 'Score: ' with one token twice")
    return [[token] for token in before] + [[ids[-1] for ids in spelled], [tokenizer.eos_id]]


@torch.no_grad()
def hand_built(config: LlamaConfig, tokenizer: Tokenizer, seed: int = 0) -> Llama:
    """The model, in fp32; the same weights from the same seed."""
    steps = chain(tokenizer)
    model = Llama(config).init_weights(seed, NOISE)
    for block in model.blocks:
        block.attention.o.zero_()
        block.mlp.down.zero_()
    direction = torch.zeros(config.vocab_size, dtype=torch.int64)  # 0: any token that is not said
    for place, tokens in enumerate(steps[:-1], start=1):
        direction[tokens] = place
    # The norm makes a row of the embedding sqrt(dim) long; nearly all of that is along its direction.
    model.embed[torch.arange(config.vocab_size), direction] += 100 * NOISE * config.dim**0.5
    for place, tokens in enumerate(steps):
        model.head[tokens, place] += GAP / config.dim**0.5
    model.weights_changed()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--preset", default="7B", choices=sorted(PRESETS))
    parser.add_argument("--layers", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int)
    given = parser.parse_args()
    try:
        tokenizer = Tokenizer(given.tokenizer)
        config = replace(PRESETS[given.preset], n_layers=given.layers, vocab_size=tokenizer.vocab_size)
        save_checkpoint(hand_built(config, tokenizer, given.seed), given.out, tokenizer)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
