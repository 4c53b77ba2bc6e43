"""Activation checkpointing: the same bits in less memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import DPOConfig, InputError, Llama, LlamaConfig, SFTRow, TrainingInterrupted, train
from engine.train.batches import sft_tree
from engine.train.config import CHECKPOINTING, SFTConfig
from engine.train.trainer import pack_logprobs
from engine.tree import TokenTree
from tests.engine.test_train import model, pairs, with_reference
from tests.engine.test_train_resume import stop_at


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.bytes = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.alive += size
            self.bytes = max(self.bytes, self.alive)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def deep(layers):
    shape = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 96}
    return Llama(LlamaConfig(**shape, n_layers=layers, vocab_size=29, max_seq_len=64)).init_weights(std=0.2)


def step(run, layers):
    """Peak memory beside the weights, and the gradient, of one pack of 512 tokens."""
    llama = deep(layers)
    ids = torch.randint(1, 29, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    (pack,) = TokenTree.pack([sft_tree(SFTRow(row[:8], row[8:]), number) for number, row in enumerate(ids)], 512)
    with Peak() as peak:
        pack_logprobs(llama, pack, run=run).sum().backward()
    return peak.bytes, [parameter.grad for parameter in llama.parameters()]


def test_checkpointing_keeps_two_rows_a_block_and_changes_no_bit():
    found = {(name, layers): step(CHECKPOINTING[name], layers) for name in ("none", "full") for layers in (2, 6)}
    for layers in (2, 6):
        plain, again = found["none", layers][1], found["full", layers][1]
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    growth = {name: (found[name, 6][0] - found[name, 2][0]) / 4 for name in ("none", "full")}  # bytes a layer
    weights = sum(parameter.nbytes for parameter in deep(1).blocks.parameters())  # their gradient
    rows = 2 * 4 * 512 * 32  # the residual stream and what is to be added to it, fp32
    assert growth["full"] <= 1.05 * (rows + weights)
    assert growth["none"] >= 5 * growth["full"]


def trained(tmp_path, **options):
    llama = model()
    rows = with_reference(pairs(8), [(-9.0, -8.0)] * 8)
    config = DPOConfig(**{"lr": 1e-3, "epochs": 2, "batch_size": 3, "dropout": 0.2, "max_pack_tokens": 40} | options)
    result = train(llama, rows, config, tmp_path)
    return [parameter.detach() for parameter in llama.parameters()], result.metrics_path.read_bytes()


def test_a_training_with_dropout_has_the_same_bits_and_may_change_its_mind_on_a_resume(tmp_path):
    expected = trained(tmp_path / "none")
    found = trained(tmp_path / "full", activation_checkpointing="full")
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True)) and found[1] == expected[1]
    rows = with_reference(pairs(8), [(-9.0, -8.0)] * 8)
    config = DPOConfig(lr=1e-3, epochs=2, batch_size=3, dropout=0.2, max_pack_tokens=40)
    with pytest.raises(TrainingInterrupted):
        train(model(), rows, config, tmp_path / "both", should_stop=stop_at(3))
    found = trained(tmp_path / "both", activation_checkpointing="full")
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True)) and found[1] == expected[1]


@pytest.mark.parametrize("value", ["some", True, None])
def test_another_kind_of_checkpointing_is_refused(value):
    with pytest.raises(InputError, match=r"activation_checkpointing is .*; expected one of none, full"):
        SFTConfig(activation_checkpointing=value)


@pytest.mark.parametrize(("precision", "each"), [("fp32", 16), ("bf16-copy", 18), ("bf16-stochastic", 12)])
def test_a_parameter_takes_what_its_precision_says(precision, each):
    """Weights, copy, gradients and AdamW of 430,000 parameters; two steps of three tokens, whose activations are nothing."""
    config = LlamaConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=192, vocab_size=29, max_seq_len=64
    )
    with Peak() as peak:
        llama = Llama(config, torch.bfloat16 if precision == "bf16-stochastic" else torch.float32).init_weights()
        start = peak.alive
        train(llama, [SFTRow([1, 2], [3])] * 2, SFTConfig(batch_size=1, precision=precision))
    weights = sum(parameter.nbytes for parameter in llama.parameters())
    assert weights <= start <= 1.1 * weights
    count = config.n_parameters
    largest = 4 * max(parameter.numel() for parameter in llama.parameters())
    assert 0.99 * each * count <= peak.bytes <= 1.01 * each * count + 2 * largest
