"""Other engines at the same work, driven as their users would. Optional installs; one that is missing is an error."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib import import_module, metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.workloads import Workload
from engine import InputError, Llama, save_checkpoint


class Peer(NamedTuple):
    name: str
    version: str
    run: Callable[[Workload], float]  # seconds


def load_peer(name: str, model: Llama) -> Peer:
    if name not in PEERS:
        raise InputError(f"peer is {name!r}; expected one of {', '.join(PEERS)}")
    try:
        import_module(name)
    except ImportError as error:
        raise InputError(f"the peer {name} is not installed ({error}): pip install {name}") from error
    return Peer(name, metadata.version(name), PEERS[name](model))


def _transformers(model: Llama) -> Callable[[Workload], float]:
    """`generate` with num_return_sequences: one batch of all candidates, which repeats every prompt."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(model, Path(directory) / "model")
        peer: Any = AutoModelForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32).eval()

    def run(workload: Workload) -> float:
        started = time.perf_counter()
        order = sorted(zip(workload.prompts, workload.params, strict=True), key=lambda pair: len(pair[0]))
        for _, pairs in groupby(order, key=lambda pair: len(pair[0])):  # one length, so no padding
            prompts, params = zip(*pairs, strict=True)
            first = params[0]
            with torch.no_grad():
                ids = peer.generate(
                    torch.tensor(prompts),
                    attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
                    do_sample=True,
                    temperature=first.temperature,
                    top_p=first.top_p,
                    top_k=0,
                    min_new_tokens=first.max_tokens,
                    max_new_tokens=first.max_tokens,
                    num_return_sequences=first.n,
                    pad_token_id=0,
                )
            if ids.shape != (len(prompts) * first.n, len(prompts[0]) + first.max_tokens):
                raise AssertionError(f"transformers returned {tuple(ids.shape)}")
        return time.perf_counter() - started

    return run


PEERS = {"transformers": _transformers}
