"""The native gather of embeddings: the table's rows, widened, and nothing else touched."""

import numpy as np
import pytest
import torch

from engine import _C

from .test_native_rows import LEVEL, call, normal, same


@pytest.fixture(autouse=True)
def threads_share_little():
    """Else so little work stays on one thread whatever is asked for."""
    _C.share_little(True)
    yield
    _C.share_little(False)


def tables(vocab, dim):
    """The same numbers in both types: one as the kernel gets it, one in fp32."""
    table = normal(vocab, dim)
    rounded = table.bfloat16()
    return (table, table), (rounded.view(torch.uint16), rounded.float())


@LEVEL
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, 7, 16, 127, 129, 768])
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_rows_of_the_table_come_out_bit_for_bit(rows, dim, threads, level):
    tokens = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(1))
    tokens[:2] = torch.tensor([0, 49])[:rows]
    for given, wide in tables(50, dim):
        assert same(call(_C.embed, (rows, dim), tokens, given, threads=threads, level=level), wide[tokens])


@LEVEL
def test_every_bf16_is_widened_to_its_own_number(level):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(256, 256)
    out = call(_C.embed, (256, 256), torch.arange(256), bits, level=level)
    assert torch.equal(out.view(torch.int32), torch.arange(2**16, dtype=torch.int32).view(256, 256) << 16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", np.array([0, 5]), r"tokens\[1\] is 5; expected 0 or more and below 5, the rows of table"),
        ("tokens", np.array([-1, 0]), r"tokens\[0\] is -1; expected 0 or more"),
        ("tokens", np.array([0, 1], np.int32), "tokens has dtype int32; expected int64"),
        ("tokens", np.array([0, 1, 2]), r"out has shape \[2, 7\]; expected \[3, 7\]"),
        (
            "table",
            np.zeros((5, 7), np.float16),
            "table has dtype float16; expected float32, or uint16 for the bits of bf",
        ),
        ("table", np.zeros((7, 5), np.uint16).T, "table has strides"),
        ("out", np.zeros((2, 8), np.float32), r"out has shape \[2, 8\]; expected \[2, 7\]"),
        ("threads", 0, "threads is 0; expected at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(name, value, message):
    good = {"tokens": np.array([0, 4]), "table": np.zeros((5, 7), np.uint16), "out": np.zeros((2, 7), np.float32)}
    _C.embed(**good, threads=1)
    with pytest.raises(ValueError, match=message):
        _C.embed(**(good | {"threads": 1} | {name: value}))
    with pytest.raises(ValueError, match="out shares memory with table"):
        table = np.zeros((5, 7), np.float32)
        _C.embed(np.array([0, 4]), table, table[:2], 1)
