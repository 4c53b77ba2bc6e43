"""Noise and draws in Triton: words against Philox's published vectors, noise against float64, what is kept against the
reference token for token, draws against the reference wherever rounding cannot turn them, and as a distribution.

On a GPU as compiled, elsewhere in Triton's interpreter.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels import gumbel, sample_rows
from engine.kernels.gumbel import gumbel_noise, gumbel_noise_reference, gumbel_of_words, philox_reference
from engine.kernels.sample import DrawRules, kept, ragged, sample_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu_too,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]  # numpy's, of e^1000 and inf - inf

ONES = 0xFFFFFFFF
# Counter, key (key0, key1), result: Random123's known answers for philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
NOISE_ERROR = 2e-5  # of y + noise in fp32, both ways and doubled: below it either of two tokens may be drawn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rules(rows, vocab, forbidden=(), labels=(), seed=7, **columns):
    """`DrawRules` with one value, or a list of one per row, for each truncation."""

    def column(name, default, dtype):
        value = columns.pop(name, default)
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    result = DrawRules(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int64),
        column("top_p", 1.0, torch.float64),
        column("min_p", 0.0, torch.float64),
        torch.full((rows,), seed),
        torch.arange(rows) % 1000,
        torch.arange(rows) // 1000,
        vocab,
        *ragged(forbidden or [()] * rows),
        *ragged(labels or [()] * rows),
    )
    assert not columns
    return DrawRules(*(x if isinstance(x, int) else x.to(DEVICE) for x in result))


def take(given, rows):
    """The rules of some rows, in their order."""

    def entries(offsets, ids):
        return (x.to(DEVICE) for x in ragged([ids[offsets[row] : offsets[row + 1]].tolist() for row in rows]))

    columns = [column[rows] for column in given[:7]]
    return DrawRules(*columns, given.vocab, *entries(*given[8:10]), *entries(*given[10:12]))


CHOICES = [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.999999},
    {"top_p": 1e-9}, {"top_p": 1 - 2**-53}, {"top_k": 1}, {"top_k": 20}, {"top_k": 3, "top_p": 0.5},
    {"top_k": 10**6}, {"top_k": 10**6, "top_p": 0.8}, {"temperature": 2.0, "top_k": 5000, "top_p": 0.7},
    {"min_p": 0.1}, {"min_p": 1.0}, {"min_p": 1e-310}, {"temperature": 0.5, "top_k": 100, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1e-6}, {"temperature": 1e-6, "top_p": 0.9}, {"temperature": 1e-6, "top_k": 7},
    {"temperature": 1e6}, {"temperature": 1e6, "top_p": 0.5}, {"temperature": 1e6, "top_k": 9, "min_p": 0.9},
]  # fmt: skip
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def columns(choices):
    return {name: [choice.get(name, off) for choice in choices] for name, off in DEFAULTS.items()}


def shaped(kind, rows, vocab, seed=0):
    """Logits of an untrained model, in steps so that many are equal, and of a trained model: some that stand out."""
    x = normal(rows, vocab, seed=seed)
    if kind == "flat":
        return x * 0.6
    if kind == "tied":
        return (x * 2).round() / 2
    head = torch.randint(0, vocab, (rows, 50), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return (x * 2.5).scatter(
        1, head, 12 - 1.5 * torch.arange(50.0, device=DEVICE).sqrt() + normal(rows, 50, seed=seed + 1)
    )


def allowed_by(logits, given):
    allowed = logits.double()
    allowed[:, given.vocab :] = -math.inf
    for row, (begin, end) in enumerate(zip(given.forbidden_offsets[:-1], given.forbidden_offsets[1:])):
        allowed[row, given.forbidden[begin:end]] = -math.inf
    return allowed


def tempered(logits, given):
    allowed = allowed_by(logits, given)
    temperature = torch.where(given.temperature == 0, 1.0, given.temperature).double()
    return allowed, (allowed - allowed.amax(1, keepdim=True)) / temperature[:, None]


def agree(found, expected, logits, given):
    """The reference's ids, but where its two best totals are as near as the noise is exact; log-probs near to float64."""
    same = found.ids == expected.ids
    for row in (~same).nonzero()[:, 0].tolist():
        assert given.temperature[row] > 0
        one = take(given, [row])
        allowed, y = tempered(logits[row : row + 1], one)
        noise = gumbel_noise_reference(one.seeds, one.positions, one.candidates, 0, logits.shape[1]).double()
        best = y.masked_fill(~kept(allowed, y, one), -math.inf).add(noise)[0]
        assert best.amax() - best[found.ids[row]] < NOISE_ERROR
    for ours, theirs in ((found.raw[same], expected.raw[same]), (found.sampled[same], expected.sampled[same])):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(found.labels, expected.labels, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert (~same).sum() <= 1 + len(same) // 100


def check(logits, given):
    agree(sample_rows.sample_rows(logits, given), sample_reference(logits, given), logits, given)


# ---- noise -----------------------------------------------------------------------------------------------------------


@triton.jit
def _philox_words(key_ptr, counter_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    key = tl.load(key_ptr + lane)
    c0, c1 = tl.load(counter_ptr + lane), tl.load(counter_ptr + SIZE + lane)
    c2, c3 = tl.load(counter_ptr + 2 * SIZE + lane), tl.load(counter_ptr + 3 * SIZE + lane)
    words = gumbel.philox(key, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))
    for i in tl.static_range(4):
        tl.store(out_ptr + i * SIZE + lane, words[i].to(tl.int64))


@triton.jit
def _noise_of_words(word_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + lane, -tl.log(gumbel.exponential(tl.load(word_ptr + lane).to(tl.uint32))))


@triton.jit
def _token_words(seed_ptr, position_ptr, candidate_ptr, out_ptr, start, STREAM: tl.constexpr, SIZE: tl.constexpr):
    words = gumbel.token_words(tl.load(seed_ptr), tl.load(position_ptr), tl.load(candidate_ptr), start, STREAM, SIZE)
    tl.store(out_ptr + tl.arange(0, SIZE), words.to(tl.int64))


def philox(key, counter):
    """key int64 [n], counter int64 [4, n] -> words int64 [4, n], from a kernel; n a power of two."""
    out = torch.empty_like(counter)
    _philox_words[(1,)](key, counter, out, SIZE=len(key))
    return out


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    key = torch.tensor([key[1] << 32 | key[0]] * 2, dtype=torch.uint64).view(torch.int64)
    found = philox(key.to(DEVICE), torch.tensor(counter)[:, None].repeat(1, 2).to(DEVICE))
    assert found.tolist() == [[word] * 2 for word in words]


def test_philox_gives_the_words_of_the_reference_for_any_key_and_counter():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator).to(DEVICE)
    counter = torch.randint(0, 2**32, (4, 256), generator=generator).to(DEVICE)
    assert torch.equal(philox(key, counter), torch.stack(philox_reference(key, list(counter))))


@pytest.mark.parametrize("stream", [0, 1, ONES])
@pytest.mark.parametrize("start", [0, 4, 2048, 31744])
def test_token_v_takes_word_v_mod_4_of_block_v_div_4(start, stream):
    """Of a counter (position, candidate, block, stream), positions and candidates up to 2^32 - 1, seeds of 64 bits."""
    for seed, position, candidate in ((-3, ONES, 2**31), (2**63 - 1, 0, ONES), (5, 17, 3)):
        scalars = [torch.tensor([value], device=DEVICE) for value in (seed, position, candidate)]
        found = torch.empty(256, dtype=torch.int64, device=DEVICE)
        _token_words[(1,)](*scalars, found, start, STREAM=stream, SIZE=256)
        block = torch.arange(start // 4, start // 4 + 64, device=DEVICE)
        c0, c1, c3 = (torch.full_like(block, value) for value in (position, candidate, stream))
        words = philox_reference(torch.full_like(block, seed), [c0, c1, block, c3])
        assert torch.equal(found, torch.stack(words, dim=1).flatten())


def test_noise_of_words_is_within_its_stated_error():
    """Of 0, 2^32 - 1 and their neighbours; around a half, where the way to it changes; where the noise is 0; of words that
    give the largest noise, in fp32 to the last units; and of any."""
    near = torch.arange(1024)
    zero = int((1 - math.exp(-1)) * 2**32)
    ends = (near, 2**32 - 1 - near, 2**31 - 512 + near, zero - 512 + near, 1257966796 - 512 + near)
    generator = torch.Generator().manual_seed(0)
    words = torch.cat([*ends, 2 ** torch.randint(0, 32, (1024,), generator=generator) - 1])
    words = torch.cat([words, torch.randint(0, 2**32, (2**15 - len(words),), generator=generator)]).to(DEVICE)
    noise = torch.empty(len(words), device=DEVICE)
    _noise_of_words[(len(words) // 1024,)](words, noise, SIZE=1024)
    u = (words.double() + 0.5) * 2.0**-32
    exact = -(-torch.log1p(-u)).log()
    assert noise.isfinite().all()
    assert ((noise.double() - exact).abs() <= 1e-6 + 2.0**-22 * exact.abs()).all()
    assert ((noise.double() - gumbel_of_words(words).double()).abs() <= 1e-6 + 2.0**-22 * exact.abs()).all()


@pytest.mark.parametrize("vocab", [1, 111, 2048, 4099])
def test_noise_of_rows_is_the_reference_s_to_rounding_and_the_same_bits_every_time(vocab):
    seeds, positions, candidates = (
        torch.tensor(x, device=DEVICE) for x in ([0, -1, 2**63 - 1], [0, ONES, 4095], [2**31, 0, 3])
    )
    for stream in (0, ONES):
        noise = gumbel_noise(seeds, positions, candidates, stream, vocab)
        exact = gumbel_noise_reference(seeds, positions, candidates, stream, vocab)
        assert ((noise - exact).abs() <= 1e-6 + 2.0**-22 * exact.abs()).all()
        assert torch.equal(noise, gumbel_noise(seeds, positions, candidates, stream, vocab))
        for row in range(3):
            one = slice(row, row + 1)
            assert torch.equal(noise[one], gumbel_noise(seeds[one], positions[one], candidates[one], stream, vocab))
    assert gumbel_noise(seeds[:0], positions[:0], candidates[:0], 0, vocab).shape == (0, vocab)


def no_worse_than_chance(found, share):
    """Chi-square against the expected shares, rare ones together: at most five standard deviations above its mean."""
    draws = found.sum()
    often = share * draws >= 5
    observed = torch.cat([found[often], found[~often].sum()[None]]).double()
    expected = torch.cat([share[often], share[~often].sum()[None]]) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom >= 4
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom), f"{statistic:.1f} at {freedom} degrees of freedom"


def test_argmax_of_logits_and_noise_is_drawn_from_the_softmax():
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    noise = gumbel_noise(one, 5 * one, one, 0, 2**19).view(-1, 16)  # as 32,768 rows
    logits = normal(16, seed=3)
    no_worse_than_chance(torch.bincount((noise + logits).argmax(1), minlength=16), logits.double().softmax(0))


# ---- what is kept ----------------------------------------------------------------------------------------------------


@triton.jit
def _edges(
    logits_ptr, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, offsets_ptr, forbidden_ptr, edge_ptr, room_ptr, ties_ptr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    begin = tl.load(offsets_ptr + number)
    count = (tl.load(offsets_ptr + number + 1) - begin).to(tl.int32)
    row = (logits_ptr + number.to(tl.int64) * vocab, vocab, forbidden_ptr + begin, count)
    held, _, _, top = sample_rows._statistics(row, vocab, BLOCK, BLOCKS)
    edge, room, ties = sample_rows._cut(
        held, row, top, tl.load(temperature_ptr + number), tl.load(top_k_ptr + number), tl.load(top_p_ptr + number),
        tl.load(min_p_ptr + number), BLOCK, BLOCKS, TILE,
    )  # fmt: skip
    tl.store(edge_ptr + number, edge)
    tl.store(room_ptr + number, room)
    tl.store(ties_ptr + number, ties)


def kept_by_kernel(logits, given):
    rows, vocab = logits.shape
    edge = torch.empty(rows, device=DEVICE)
    room, ties = (torch.empty(rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
    c = sample_rows.config(vocab)
    _edges[(rows,)](
        logits, vocab, given.temperature, given.top_k, given.top_p, given.min_p, given.forbidden_offsets, given.forbidden,
        edge, room, ties, BLOCK=c.block, BLOCKS=c.blocks, TILE=c.tile, num_warps=c.warps,
    )  # fmt: skip
    allowed = allowed_by(logits, given).float()
    edge, room, ties = edge[:, None], room[:, None], ties[:, None]
    tie = allowed == edge
    return ((allowed > edge) | (tie & ((room >= ties) | (tie.cumsum(1) <= room)))) & (allowed > -math.inf)


def same_set(logits, given):
    """The reference's tokens, but for those at a boundary that 1e-12 of the mass decides."""
    found = kept_by_kernel(logits, given)
    allowed, y = tempered(logits, given)
    wrong = found ^ (kept(allowed, y, given) & (allowed > -math.inf))
    for row, token in wrong.nonzero().tolist():
        order = allowed[row].sort(descending=True, stable=True).indices
        top_k = int(given.top_k[row]) or len(order)
        mass = y[row, order[:top_k]].exp()
        place = int((order == token).nonzero())
        assert place < top_k and given.top_p[row] < 1, f"row {row}, token {token}"
        assert abs(mass[:place].sum() / mass.sum() - given.top_p[row]) < 1e-12, f"row {row}, token {token}"


SETS = [
    *(choice for choice in CHOICES if choice.get("temperature") != 0.0),
    {"top_p": 0.99},
    {"top_p": 0.3, "min_p": 0.7},
]


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
@pytest.mark.parametrize("vocab", [1, 111, 2000])
def test_kept_is_what_the_reference_keeps(kind, vocab):
    same_set(shaped(kind, len(SETS), vocab), rules(len(SETS), vocab, **columns(SETS)))


def test_ties_are_cut_by_id():
    """Four likelier tokens among 14 equal ones, the edge behind each or many; by top-k, by top-p, by top-p behind top-k,
    whose boundaries lie in the same tie, and not where min-p lies above the tie that top-k cuts."""
    sizes = [1, 2, 4, 5, 6, 11, 12, 13, 17, 18]
    rows = len(sizes)
    logits = torch.zeros(rows, 18, device=DEVICE)
    logits[:, [3, 7, 13, 17]] = 1.0
    order = [3, 7, 13, 17, *(token for token in range(18) if token not in (3, 7, 13, 17))]
    mass = [math.e] * 4 + [1.0] * 14
    share = [(sum(mass[:size]) - 0.5) / sum(mass) for size in sizes]
    of_12 = [(sum(mass[: min(size, 12)]) - 0.5) / sum(mass[:12]) for size in sizes]
    for choice, kept_sizes in (
        ({"top_k": sizes}, sizes), ({"top_p": share}, sizes), ({"top_k": 12, "top_p": of_12}, [min(n, 12) for n in sizes]),
        ({"top_k": 12, "top_p": of_12, "min_p": 0.36}, [min(n, 12) for n in sizes]),
        ({"top_k": 6, "min_p": 0.37}, [4] * rows), ({"top_k": 6, "min_p": 1.0}, [4] * rows),
    ):  # fmt: skip
        given = rules(rows, 18, **choice)
        for row, size in zip(kept_by_kernel(logits, given), kept_sizes):
            assert set(row.nonzero()[:, 0].tolist()) == set(order[:size]), (choice, size)
        same_set(logits, given)


def test_a_nucleus_of_equal_tokens_holds_exactly_its_share():
    choices = [
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {},
        {"top_k": 777},
        {"top_k": 1000, "top_p": 0.25},
        {"min_p": 1.0},
    ]
    logits = torch.full((len(choices), 2000), 0.3, device=DEVICE)
    found = kept_by_kernel(logits, rules(len(choices), 2000, **columns(choices)))
    for row, size in zip(found, (1000, 1800, 1, 2000, 777, 250, 2000)):
        assert row[:size].all() and not row[size:].any()


def test_zeros_of_both_signs_are_equal_and_denormals_are_not():
    tiny = torch.finfo(torch.float32).smallest_normal / 4
    values = [0.0, -0.0, tiny, -tiny, 2 * tiny, -0.0, 0.0, -math.inf, -1.0, 1.0, -3.4e38, -0.0]
    sizes = list(range(1, 12))
    logits = torch.tensor([values] * 11, device=DEVICE)
    order = sorted(range(12), key=lambda token: (-values[token], token))
    found = kept_by_kernel(logits, rules(11, 12, top_k=sizes))
    for size in sizes:
        assert set(found[size - 1].nonzero()[:, 0].tolist()) == set(order[:size])
    same_set(logits, rules(11, 12, top_p=[size / 11 for size in sizes]))
    same_set(logits, rules(11, 12, top_k=6, top_p=[size / 11 for size in sizes]))
    same_set(logits.abs().neg().clamp(-1e-30), rules(11, 12, temperature=1e-6, top_p=[size / 11 for size in sizes]))


def test_the_edge_is_found_where_fp32_weights_miss_it():
    """Shares that end between two tokens of a tail of thousands that weigh 1e-9 to 1e-7 of the whole, and between two of
    a row so flat that its weights are equal in fp32 up to a few units."""
    vocab = 2000
    logits = torch.cat([normal(4, vocab, seed=2) - 16.0, normal(4, vocab, seed=4) * 1e-6])
    logits[:4, 7] = 2.0
    upto = logits.double().softmax(1).sort(descending=True).values.cumsum(1)
    places = torch.randint(1, vocab - 1, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    share = [(0.5 * (upto[row, place] + upto[row, place - 1])).item() for row, place in enumerate(places)]
    given = rules(8, vocab, top_p=share)
    assert kept_by_kernel(logits, given).sum(1).tolist() == [place + 1 for place in places]
    same_set(logits, given)


def test_masses_are_float64():
    """Boundaries 1e-9 of the mass away from a token: weights or a share in fp32 would cut at another."""
    logits = torch.zeros(2, 2000, device=DEVICE)
    logits[:, ::2] = 1.0
    weight = math.exp(-1 / torch.tensor(0.7).item())
    share = [(1000 + 500 * weight + off) / (1000 + 1000 * weight) for off in (-1e-6, 1e-6)]
    given = rules(2, 2000, temperature=0.7, top_p=share)
    assert kept_by_kernel(logits, given).sum(1).tolist() == [1500, 1501]


def test_min_p_cuts_between_neighbouring_floats():
    values = 1.0 + torch.arange(9) * 2.0**-23
    logits = torch.cat([values, torch.tensor([2.0])]).expand(8, -1).to(DEVICE).contiguous()
    between = [math.exp((1.0 + (place + 0.5) * 2.0**-23 - 2.0) / 0.5) for place in range(8)]
    found = kept_by_kernel(logits, rules(8, 10, temperature=0.5, min_p=between))
    assert found.sum(1).tolist() == [9, 8, 7, 6, 5, 4, 3, 2] and found[:, 8:].all()
    same_set(logits, rules(8, 10, temperature=0.5, min_p=between))


def test_forbidden_ids_do_not_count_in_a_cut_and_a_row_s_are_its_own():
    """Rows of the same logits, which forbid the likeliest tokens or other ones, once, twice or not at all."""
    logits = shaped("peaked", 1, 111, seed=5).expand(len(SETS), -1).contiguous()
    likely = logits[0].sort(descending=True).indices
    forbidden = [likely[row % 5 : row % 5 + row % 4].tolist() + [5, 5] * (row % 2) for row in range(len(SETS))]
    same_set(logits, rules(len(SETS), 111, forbidden, **columns(SETS)))


@pytest.mark.skipif(GPU, reason="counts calls inside the kernel, which Triton's interpreter makes")
def test_top_p_weighs_a_row_once_where_fp32_finds_its_edge(monkeypatch):
    """So that a row is read three times."""
    calls = []
    weigh = sample_rows._weigh
    monkeypatch.setattr(sample_rows, "_weigh", lambda *arguments: calls.append(1) or weigh(*arguments))
    for kind in ("flat", "peaked", "tied"):
        for choice in ({"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.999, "top_k": 100}):
            kept_by_kernel(shaped(kind, 4, 2000, seed=8), rules(4, 2000, **choice))
    assert len(calls) == 24


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
@pytest.mark.parametrize("vocab", [1, 111, 2500])
def test_draws_equal_the_reference(kind, vocab):
    rows = len(CHOICES)
    logits = shaped(kind, rows, vocab, seed=vocab)
    labels = [(vocab - 1, 0, row % vocab, 0)[: row % 5] for row in range(rows)]
    check(logits, rules(rows, vocab, labels=labels, **columns(CHOICES)))


@pytest.mark.parametrize("vocab, rows", [(32000, 24 if GPU else 6), (33000, 24 if GPU else 2)])
def test_draws_equal_the_reference_at_the_vocabulary_of_llama_2_and_where_a_row_is_not_held_at_once(vocab, rows):
    choices = [
        {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.02}, {"top_p": 0.9999},
        {}, {"temperature": 0.0}, {"min_p": 0.05},
    ]  # fmt: skip
    kinds = [shaped(kind, 2, vocab, seed=9) for kind in ("peaked", "flat", "tied")]
    logits = torch.cat(kinds)[[0, 2, 3, 4, 5, 1] * 4][:rows].contiguous()
    check(
        logits, rules(rows, vocab, [[2], []] * (rows // 2), [[0, vocab - 1, 5]] * rows, **columns((choices * 4)[:rows]))
    )


@pytest.mark.parametrize("vocab", [90, 100, 111])
def test_draws_with_forbidden_ids_and_a_padded_head_equal_the_reference(vocab):
    rows = len(CHOICES)
    logits = shaped("peaked", rows, 111)
    logits[:, 100:] += 20.0  # padding that is likelier than anything
    likely = logits[:, :vocab].argmax(dim=1)
    forbidden = [[int(likely[row]), row, 110, 109][: row % 5] for row in range(rows)]
    given = rules(rows, vocab, forbidden, [[110, 5]] * rows, **columns(CHOICES))
    found = sample_rows.sample_rows(logits, given)
    agree(found, sample_reference(logits, given), logits, given)
    assert (found.ids < vocab).all()
    assert not any(token in banned for token, banned in zip(found.ids.tolist(), forbidden))
    raw = logits.double().log_softmax(-1)[:, [110, 5]].float()
    torch.testing.assert_close(found.labels.view(-1, 2), raw, rtol=2e-6, atol=2e-6)


def test_a_row_of_which_nothing_can_be_drawn_and_a_row_that_is_no_distribution_have_nan_log_probs():
    logits = normal(9, 150)
    logits[0] = -math.inf
    logits[1, :130] = -math.inf
    logits[4, 0], logits[5, 149], logits[6, 140], logits[7, 128] = math.nan, math.nan, math.inf, math.inf
    for choice in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1}):
        given = rules(9, 130, [[], [], range(130), range(129), *[[]] * 5], [[3]] * 9, **choice)
        found = sample_rows.sample_rows(logits, given)
        broken = [True, True, True, False, True, True, True, True, False]
        for column in (found.raw, found.labels, found.sampled):
            assert column.isnan().tolist() == broken
        assert found.ids[broken].tolist() == [0] * 7 and found.ids[3] == 129 and found.sampled[3] == 0.0
        alone = sample_rows.sample_rows(logits[[3, 8]], take(given, [3, 8]))
        assert all(torch.equal(ours[[3, 8]], theirs) for ours, theirs in zip(found, alone))
        agree(found, sample_reference(logits, given), logits, given)


def test_one_token_that_stands_out_is_drawn_with_log_prob_zero():
    one_hot = torch.full((len(CHOICES), 50), -1e9, device=DEVICE)
    one_hot[:, 33] = 0.0
    choices = [choice for choice in CHOICES if choice.get("temperature", 1.0) < 1e6]
    found = sample_rows.sample_rows(one_hot[: len(choices)], rules(len(choices), 50, **columns(choices)))
    assert (found.ids == 33).all() and (found.raw == 0).all() and (found.sampled == 0).all()
    some = torch.full((len(CHOICES), 50), -math.inf, device=DEVICE)
    some[:, [7, 20, 41]] = torch.tensor([-1e38, -1e38, -3e38], device=DEVICE)
    check(some, rules(len(CHOICES), 50, **columns(CHOICES)))


def test_greedy_takes_the_lowest_id_of_the_likeliest():
    tops = torch.zeros(20, 300, device=DEVICE)
    for row in range(20):
        tops[row, [15 * row, 299, 15 * row + 1]] = 1.0
    given = rules(
        20, 300, [[15 * row] if row % 2 else [] for row in range(20)], temperature=0.0, top_k=5, top_p=0.1, min_p=0.3
    )
    found = sample_rows.sample_rows(tops, given)
    assert found.ids.tolist() == [15 * row + row % 2 for row in range(20)] and (found.sampled == 0).all()
    assert sample_rows.sample_rows(torch.zeros(1, 300, device=DEVICE), rules(1, 300, temperature=0.0)).ids.item() == 0


@pytest.mark.parametrize("choice", [{}, {"temperature": 1.7, "top_k": 12, "top_p": 0.9}])
def test_frequencies_follow_the_exact_distribution(choice):
    draws, vocab = (50_000, 111) if GPU else (400 if not choice else 70, 18)
    logits = normal(1, vocab, seed=1) * 1.5
    given = rules(draws, vocab, seed=2024, **choice)
    allowed, y = tempered(logits, take(given, [0]))
    share = y.exp() * kept(allowed, y, take(given, [0]))
    share = (share / share.sum())[0]
    found = sample_rows.sample_rows(logits.expand(draws, -1), given)
    assert (share[found.ids] > 0).all()
    torch.testing.assert_close(found.sampled, share[found.ids].log().float(), rtol=2e-6, atol=2e-6)
    no_worse_than_chance(torch.bincount(found.ids, minlength=vocab), share)


def test_the_first_candidates_of_four_are_those_of_two():
    logits = shaped("flat", 1, 111)
    positions = torch.arange(8, device=DEVICE)

    def candidates(n):
        given = rules(8 * n, 111, top_p=0.95)._replace(
            positions=positions.repeat_interleave(n), candidates=torch.arange(n, device=DEVICE).repeat(8)
        )
        return sample_rows.sample_rows(logits.expand(8 * n, -1), given).ids.view(8, n)

    two, four = candidates(2), candidates(4)
    assert torch.equal(two, four[:, :2])
    assert len(set(four.flatten().tolist())) > 10


# ---- memory and bits -------------------------------------------------------------------------------------------------


def mixed(rows, vocab):
    logits = torch.cat([shaped(kind, rows // 3, vocab, seed=3) for kind in ("flat", "peaked", "tied")])
    forbidden = [range(row % 7) if row % 3 else () for row in range(rows)]
    labels = [[token % vocab for token in range(row % 3 * 20)] for row in range(rows)]  # up to 40: more than one tile
    return logits, rules(rows, vocab, forbidden, labels, **columns((CHOICES * 3)[:rows]))


def test_a_row_has_the_same_bits_twice_alone_and_anywhere_in_a_batch():
    logits, given = mixed(24, 111)
    batch = sample_rows.sample_rows(logits, given)
    agree(batch, sample_reference(logits, given), logits, given)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    moved = sample_rows.sample_rows(logits[order], take(given, order))
    assert all(torch.equal(x[order], y) for x, y in zip(batch[:3], moved[:3]))
    for row in range(0, 24, 5):
        alone = sample_rows.sample_rows(logits[[row]], take(given, [row]))
        labels = batch.labels[given.label_offsets[row] : given.label_offsets[row + 1]]
        assert all(torch.equal(x, y) for x, y in zip(alone, (*(x[[row]] for x in batch[:3]), labels)))


def test_nothing_outside_the_logits_is_read_and_nothing_outside_the_results_is_written(monkeypatch):
    """Rows that lie apart with NaN between them, ids and labels with wild ones around, results with canaries."""
    rows, vocab = 24, 111
    logits, given = mixed(rows, vocab)
    apart = torch.full((rows + 2, 137), math.nan, device=DEVICE)
    apart[1:-1, 13 : 13 + vocab] = logits
    wild = torch.full((7,), 77, device=DEVICE)  # a token that is often drawn must not be forbidden by it
    between = [torch.cat([wild, ids, wild])[7:-7] for ids in (given.forbidden, given.label_ids)]
    lone = given._replace(forbidden=between[0], label_ids=between[1])
    expected = sample_rows.sample_rows(logits, given)

    buffers = []
    empty = torch.empty

    def guarded(*shape, dtype, device):
        count = math.prod(shape)
        buffers.append(torch.full((count + 4096,), 99, dtype=dtype, device=device))
        return buffers[-1][2048:-2048].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    found = sample_rows.sample_rows(apart[1:-1, 13 : 13 + vocab], lone)
    gumbel_noise(given.seeds, given.positions, given.candidates, 0, vocab)
    monkeypatch.setattr(torch, "empty", empty)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
    assert len(buffers) == 5
    for buffer in buffers:
        assert (buffer[:2048] == 99).all() and (buffer[-2048:] == 99).all()


def test_no_rows_are_no_error():
    found = sample_rows.sample_rows(torch.zeros(0, 5, device=DEVICE), rules(0, 5))
    assert found.ids.shape == found.labels.shape == (0,)
