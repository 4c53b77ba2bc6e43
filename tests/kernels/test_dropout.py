"""The dropout mask: native equals reference bit for bit, every part of its key counts, the rate is right."""

import numpy as np
import pytest
import torch
from scipy import stats

from engine import _C, native_rows, ops
from engine.kernels.dropout import dropout_mask_reference

N = 40
SEGMENTS = torch.randint(-(2**62), 2**62, (N,), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(N)
BASE = {"key": 3, "segments": SEGMENTS, "positions": POSITIONS, "site": 2, "units": 33, "rate": 0.3}


def both(**changes):
    """The mask by either backend, after asserting that they agree."""
    given = BASE | changes
    threshold = min(round(given.pop("rate") * 2**32), 2**32 - 1)
    native = native_rows.dropout_mask(**given, threshold=threshold)
    assert torch.equal(native, dropout_mask_reference(**given, threshold=threshold))
    return native


@pytest.mark.parametrize("units", [1, 3, 4, 31, 64, 65, 200])
@pytest.mark.parametrize("key", [0, 2**63 - 1, -(2**63), -1])
def test_native_and_reference_give_the_same_mask(units, key):
    mask = both(units=units, key=key, site=80)
    assert mask.shape == (N, units) and torch.equal(mask[:, :1], both(units=1, key=key, site=80))


@pytest.mark.parametrize(
    "change",
    [
        {"key": 4}, {"key": 3 + 2**32}, {"segments": SEGMENTS + 1}, {"segments": SEGMENTS + 2**32},
        {"positions": POSITIONS + 1}, {"site": 3}, {"rate": 0.31},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_part_of_the_key_changes_the_mask(change):
    assert not torch.equal(both(), both(**change))


def test_a_unit_has_a_word_of_its_own():
    words = _C.philox(3, 7, 5, 0, 2 << 16 | 1)  # position 7, segment 5, site 2, units 4 to 7
    for unit, word in enumerate(words, start=4):
        at = {"segments": torch.tensor([5]), "positions": torch.tensor([7]), "units": 8}
        assert both(**at, rate=word / 2**32)[0, unit] and not both(**at, rate=(word + 1) / 2**32)[0, unit]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1 - 2**-40])
def test_units_fall_out_at_the_rate_and_independently_of_their_neighbours(rate):
    kept = both(segments=torch.arange(500), positions=torch.arange(500) % 7, units=400, rate=rate)
    dropped = int((~kept).sum())
    assert abs(dropped - rate * kept.numel()) <= 4 * (kept.numel() * rate * (1 - rate)) ** 0.5 + 1e-3
    if rate in (0.1, 0.5):
        for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 4:], kept[:, :-4])):
            table = np.array([[(x & y).sum() for y in (b, ~b)] for x in (a, ~a)])
            assert stats.chi2_contingency(table).pvalue > 1e-4


def test_ops_takes_the_native_mask_on_the_cpu():
    assert ops.backends("cpu")["dropout_mask"] == "native"
    assert torch.equal(ops.dropout_mask(**BASE), both())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"segments": np.zeros(3, np.int64)}, "segments has dtype int64; expected uint64"),
        ({"positions": np.zeros(4, np.uint32)}, r"positions has shape \[4\]; expected \[3\]"),
        ({"out": np.zeros((3, 8), np.uint8)}, "out has dtype uint8; expected bool"),
        ({"out": np.zeros((8, 3), bool).T}, "out has strides"),
    ],
)
def test_the_native_mask_names_a_wrong_argument(change, said):
    given = {"segments": np.zeros(3, np.uint64), "positions": np.zeros(3, np.uint32), "out": np.zeros((3, 8), bool)}
    given |= change
    with pytest.raises(ValueError, match=said):
        _C.dropout_mask(0, given["segments"], given["positions"], 0, 1, given["out"])
