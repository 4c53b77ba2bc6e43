"""Philox against its published vectors; Gumbel noise against the formula, across backends, and as a distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from engine import _C, ops
from engine.errors import InputError
from engine.kernels.gumbel import gumbel_noise_reference, gumbel_of_words, philox_reference

ALL_ONES = 0xFFFFFFFF
# Counter, key (key0, key1), result: Random123's known answers for philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
EXTREME_WORDS = [0, 1, 2**31, 2**32 - 2, 2**32 - 1]


@pytest.fixture
def fresh_choice():
    """`ops.choose` remembers its answer; forget it before and after a test that changes the environment."""
    ops.choose.cache_clear()
    yield
    ops.choose.cache_clear()


def native(seeds, positions, candidates, stream, vocab, level=""):
    out = np.full((len(seeds), vocab), np.nan, dtype=np.float32)
    _C.gumbel_noise(
        np.array(seeds, dtype=np.int64).view(np.uint64),
        np.array(positions, dtype=np.uint32),
        np.array(candidates, dtype=np.uint32),
        stream,
        out,
        level,
    )
    return out


def reference(seeds, positions, candidates, stream, vocab):
    rows = [torch.tensor(values, dtype=torch.int64) for values in (seeds, positions, candidates)]
    return gumbel_noise_reference(*rows, stream, vocab).numpy()


NOISE = pytest.mark.parametrize("noise", [native, reference])


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_native_philox_gives_the_published_words(counter, key, words):
    assert _C.philox(key[1] << 32 | key[0], *counter) == words


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_reference_philox_gives_the_published_words(counter, key, words):
    bits = np.array([key[1] << 32 | key[0]], dtype=np.uint64).view(np.int64)
    result = philox_reference(torch.from_numpy(bits), [torch.tensor([word]) for word in counter])
    assert tuple(int(word) for word in result) == words


@pytest.mark.parametrize("level", _C.instruction_levels())
@pytest.mark.parametrize("vocab", [1, 5, 111, 32000])
def test_noise_of_every_instruction_level_and_of_the_reference_has_the_same_bits(vocab, level):
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    positions = [0, 1, 2**32 - 1, 4095, 7, 2**31]
    candidates = [0, 3, 2**32 - 1, 0, 2**31, 1]
    for stream in (0, 1, ALL_ONES):
        ours = native(seeds, positions, candidates, stream, vocab, level)
        theirs = reference(seeds, positions, candidates, stream, vocab)
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_noise_takes_token_v_from_word_v_mod_4_of_block_v_div_4():
    key0, key1, position, candidate, stream, vocab = 0xDEADBEEF, 0x01234567, 17, 3, 2, 11
    key = key1 << 32 | key0
    words = [_C.philox(key, position, candidate, token // 4, stream)[token % 4] for token in range(vocab)]
    expected = gumbel_of_words(torch.tensor(words)).numpy()
    np.testing.assert_array_equal(native([key], [position], [candidate], stream, vocab)[0], expected)


def test_noise_of_extreme_words_is_finite_and_within_one_ulp_of_the_truth():
    noise = gumbel_of_words(torch.tensor(EXTREME_WORDS)).numpy()
    assert np.isfinite(noise).all()
    _assert_within_one_ulp(noise, np.array(EXTREME_WORDS))


@NOISE
def test_noise_of_all_words_of_a_row_is_within_one_ulp_of_the_truth(noise):
    vocab = 32000
    words = [word for block in range(vocab // 4) for word in _C.philox(99, 5, 1, block, 0)]
    _assert_within_one_ulp(noise([99], [5], [1], 0, vocab)[0], np.array(words))


def _assert_within_one_ulp(noise, words):
    u = (words.astype(np.longdouble) + np.longdouble(0.5)) / np.longdouble(2**32)
    truth = -np.log(-np.log1p(-u))
    error = np.abs(noise.astype(np.longdouble) - truth) / np.spacing(np.abs(truth.astype(np.float32)))
    assert error.max() <= 1.0


@NOISE
def test_noise_of_a_row_is_the_same_alone_and_in_a_batch(noise):
    seeds, positions, candidates = [5, 5, 9, -3], [0, 1, 0, 70], [0, 2, 1, 1]
    batch = noise(seeds, positions, candidates, 1, 111)
    for row in range(4):
        alone = noise(seeds[row : row + 1], positions[row : row + 1], candidates[row : row + 1], 1, 111)
        np.testing.assert_array_equal(alone[0], batch[row])


@NOISE
def test_noise_of_a_token_does_not_depend_on_the_vocabulary(noise):
    np.testing.assert_array_equal(noise([3], [4], [5], 0, 1001)[:, :111], noise([3], [4], [5], 0, 111))


@NOISE
@pytest.mark.parametrize("changed", ["seed", "seed above 32 bits", "position", "candidate", "stream"])
def test_noise_changes_with_every_part_of_its_key(noise, changed):
    parts = {"seed": 1, "position": 2, "candidate": 3, "stream": 4}
    other = dict(parts)
    if changed == "seed above 32 bits":
        other["seed"] += 1 << 32
    else:
        other[changed] += 1
    first, second = (noise([p["seed"]], [p["position"]], [p["candidate"]], p["stream"], 111) for p in (parts, other))
    assert (first != second).mean() > 0.95


def arguments(**changes):
    values = {
        "seeds": np.zeros(2, np.uint64),
        "positions": np.zeros(2, np.uint32),
        "candidates": np.zeros(2, np.uint32),
        "stream": 0,
        "out": np.zeros((2, 7), np.float32),
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("seeds", np.zeros(2, np.int64), "seeds has dtype int64; expected uint64"),
        ("positions", np.zeros(2, np.int64), "positions has dtype int64; expected uint32"),
        ("candidates", np.zeros(2, np.int32), "candidates has dtype int32; expected uint32"),
        ("out", np.zeros((2, 7), np.float64), "out has dtype float64; expected float32"),
        ("out", np.zeros((7, 2), np.float32).T, r"out has strides \[4, 8\] bytes; expected a C-contiguous array"),
        ("seeds", np.zeros(4, np.uint64)[::2], r"seeds has strides \[16\] bytes; expected a C-contiguous array"),
        ("seeds", np.zeros(3, np.uint64), r"seeds has shape \[3\]; expected \[2\]"),
        ("positions", np.zeros(1, np.uint32), r"positions has shape \[1\]; expected \[2\]"),
        ("candidates", np.zeros((2, 1), np.uint32), r"candidates has shape \[2, 1\]; expected \[2\]"),
        ("out", np.zeros(14, np.float32), r"out has shape \[14\]; expected \[-1, -1\]"),
        ("level", "sse9", "level is 'sse9'; this CPU runs .*portable"),
    ],
)
def test_native_noise_says_what_it_found_and_what_it_expected(name, value, message):
    _C.gumbel_noise(**arguments())
    with pytest.raises(ValueError, match=message):
        _C.gumbel_noise(**arguments(**{name: value}))


def test_native_noise_refuses_an_output_that_overlaps_its_input():
    memory = np.zeros(16, np.uint32)
    out = memory.view(np.float32)[2:].reshape(2, 7)
    _C.gumbel_noise(**arguments(positions=memory[:2], out=out))
    with pytest.raises(ValueError, match="out shares memory with positions"):
        _C.gumbel_noise(**arguments(positions=memory[1:3], out=out))


def test_native_noise_refuses_a_read_only_output():
    out = np.zeros((2, 7), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _C.gumbel_noise(**arguments(out=out))


def test_choose_takes_native_noise_on_the_cpu(fresh_choice, monkeypatch):
    monkeypatch.delenv("SELFREWARD_BACKEND", raising=False)
    assert ops.choose("gumbel_noise", "cpu").name == "native"
    assert ops.choose("gumbel_noise", "cuda").name == "torch"


def test_choose_takes_the_reference_where_the_environment_asks_for_it(fresh_choice, monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "torch")
    backend = ops.choose("gumbel_noise", "cpu")
    assert backend.name == "torch"
    assert backend.fn is gumbel_noise_reference
    assert set(ops.backends().values()) == {"torch"}


def test_a_backend_that_no_op_has_is_refused_by_name(fresh_choice, monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "trtion")
    with pytest.raises(InputError, match=r"SELFREWARD_BACKEND asks for 'trtion'; expected some of .*native.*triton"):
        ops.choose("gumbel_noise", "cpu")


def test_an_op_without_the_backend_that_is_asked_for_takes_its_own(fresh_choice, monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "triton,torch")
    assert ops.choose("rms_norm", "cpu").name == "triton"
    assert ops.choose("dropout_mask", "cpu").name == "torch"
    ops.choose.cache_clear()
    monkeypatch.setenv("SELFREWARD_BACKEND", "triton")
    assert ops.choose("dropout_mask", "cpu").name == "native"


def test_other_peoples_flash_attention_runs_only_where_it_is_asked_for_and_able(fresh_choice, monkeypatch):
    half = torch.bfloat16
    assert ops.choose("tree_attention", "cuda", half, causal=True).name not in ("fa2", "fa3", "torch_varlen")
    ops.choose.cache_clear()
    monkeypatch.setenv("SELFREWARD_BACKEND", "torch_varlen")
    assert ops.choose("tree_attention", "cuda", half, causal=True).name == "torch_varlen"
    with pytest.raises(InputError, match="torch_varlen: FlashAttention knows no trees"):
        ops.choose("tree_attention", "cuda", half, causal=False)


def test_choose_says_why_no_backend_applies(fresh_choice, monkeypatch):
    monkeypatch.setenv("SELFREWARD_BACKEND", "native")
    with pytest.raises(InputError, match=r"native: the native kernels run on the CPU.*torch: SELFREWARD_BACKEND"):
        ops.choose("gumbel_noise", "cuda")


def test_both_backends_of_the_table_give_the_same_bits():
    rows = [torch.tensor(values) for values in ([1, -2, 3], [4, 5, 6], [0, 1, 2])]
    first, second = (backend.fn(*rows, 0, 111) for backend in ops.OPS["gumbel_noise"])
    assert torch.equal(first, second)


def test_argmax_of_logits_and_noise_is_drawn_from_the_softmax():
    vocab, draws = 111, 200_000
    logits = np.random.default_rng(0).normal(0.0, 1.5, vocab).astype(np.float32)
    seeds, positions, candidates = np.full(draws, 2024), np.arange(draws) % 1000, np.arange(draws) // 1000
    picked = (native(seeds, positions, candidates, 0, vocab) + logits).argmax(axis=1)
    weights = np.exp(logits.astype(np.float64))
    expected = draws * weights / weights.sum()
    assert expected.min() >= 5  # where the chi-square approximation holds
    assert stats.chisquare(np.bincount(picked, minlength=vocab), expected).pvalue > 1e-3
