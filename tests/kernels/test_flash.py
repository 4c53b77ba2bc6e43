"""FlashAttention's adapters: what they call, with which arguments, checked against stand-ins that compute the real thing."""

import sys
import types

import pytest
import torch

from engine import ops
from engine.kernels import flash
from engine.kernels.tree_attention import tree_attention_reference

BOUNDS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
END = torch.tensor([5] * 5 + [6] + [13] * 7)


def qkv(heads=4, groups=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(13, h, 8, generator=generator, dtype=torch.float64) for h in (heads, groups, groups)]


def causal_attention(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
    """What every library promises for causal=True: each sequence by itself, lower triangle."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and bounds_q.tolist() == bounds_k.tolist()
    lengths = bounds_q.diff()
    assert longest_q == longest_k == int(lengths.max())
    ends = torch.repeat_interleave(bounds_q[1:].long(), lengths)
    return tree_attention_reference(q, k, v, ends)


def fa(tuple_result):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, deterministic=False
    ):
        assert causal is True and deterministic is True
        out = causal_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (out, None) if tuple_result else out

    return flash_attn_varlen_func


def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return causal_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal is True and query.shape[1] == key.shape[1]
    return causal_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


STAND_INS = {
    "fa2": ("fa2", fa(False)),
    "fa3": ("fa3", fa(False)),
    "fa3 with lse": ("fa3", fa(True)),
    "torch 2.13": ("torch_varlen", varlen_2_13),
    "torch 2.10": ("torch_varlen", varlen_2_10),
}


def install(name, function, monkeypatch):
    module, attribute, _ = flash.ADAPTERS[name]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{attribute: function}))


@pytest.fixture(params=STAND_INS)
def adapter(request, monkeypatch):
    name, function = STAND_INS[request.param]
    install(name, function, monkeypatch)
    flash.find.cache_clear()
    yield flash.find(name)
    flash.find.cache_clear()


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_every_convention_gives_the_trees_attention(adapter, groups):
    q, k, v = qkv(groups=groups)
    torch.testing.assert_close(adapter(q, k, v, BOUNDS, 7), tree_attention_reference(q, k, v, END))


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_who_repeats_keys_and_values_for_grouped_heads_is_known(stand_in, monkeypatch):
    install(*STAND_INS[stand_in], monkeypatch)
    assert flash.repeats(STAND_INS[stand_in][0]) == (stand_in == "torch 2.10")


def test_what_was_measured_says_so():
    assert "1.4 to 1.9 times its time" in ops._flash_why_not(
        "torch_varlen", ops.Case("cuda", torch.bfloat16, True, causal=True)
    )
    assert "not measured" in ops._flash_why_not("fa3", ops.Case("cuda", torch.bfloat16, True, causal=True))


def test_torchs_own_has_the_arguments_that_the_adapter_passes():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = list(inspect.signature(varlen_attn).parameters)
    assert known[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(known)
    assert flash.find("torch_varlen") is not None


def test_what_is_not_installed_says_so():
    flash.find.cache_clear()
    reason = flash.why_not("fa3", "cuda", torch.bfloat16, causal=True)
    assert reason is None or "flash_attn_interface is not installed" in reason


@pytest.mark.parametrize(
    "device,dtype,causal,words",
    [
        ("cuda", torch.bfloat16, False, "the pack has branches"),
        ("cpu", torch.bfloat16, True, "the tensors are on cpu"),
        ("cuda", torch.float32, True, "the tensors are torch.float32"),
    ],
)
def test_the_reasons_not_to_take_it(device, dtype, causal, words):
    assert words in flash.why_not("torch_varlen", device, dtype, causal)
