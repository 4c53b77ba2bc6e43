"""The draws of `sample.py` on a GPU: one program a row, no sorting, at most three passes over the logits in memory.

    y = (x - top) / temperature,   kept = {x > edge} and the first `room` ids of {x = edge},   draw = argmax y + noise

Pass 1 loads the row into registers (32,768 logits are 64 registers in each thread of 16 warps): the largest, the sum of
the raw log-prob, and by halving the range of floats, counted in order, the edge of top-k, exactly, and then that of top-p
to fp32: the logits make room for their weights e^y, and a step of the search is three instructions a token. Pass 2, for
rows with top-p alone, weighs in float64 what lies above and below a window of a few fp32 roundings around that edge, a
tile at a time. Almost always the window holds one value and the nucleus ends in it; if not, each further step of a search
from there is a further pass. Pass 3 draws: with E = e^-noise, exponentially distributed, the argmax is the argmin of
E e^-y, which saves a logarithm. Tiles without a token that is kept make no noise; each lane keeps its best, and lanes are
compared once, at the end. Ids decide only where ties are cut: there a running count finds the ones kept.

Which tokens are kept is the reference's choice, but for boundaries that rounding in float64 decides there too: top-k
compares logits, top-p float64 sums of float64 masses (to 1e-12 of the total), min-p the logit top + temperature *
log(min_p) in float64. Noise is fp32 (kernels/gumbel.py), and so is y: of two tokens whose y + noise lie within 1e-5 of
each other either may be drawn. Log-probs are near to float64 as the CPU's are. A row's bits depend on its logits, its
rules, V and the distance of rows alone: one program takes all its sums, in a fixed order.

Why a row is not shared out: it would take a second launch, or a wait for other programs. Why registers: the 28 steps of a
search for top-p would read the row 28 times. Rows above 32,768 logits do just that, one block of registers after the
other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gumbel import exponential, token_words
from .jit import jit, power_of_two, tl
from .sample import DrawRules, Draws

HELD = 32768  # logits that a program holds in registers


@dataclass(frozen=True)
class Config:
    block: int  # logits held at once
    blocks: int  # of a row
    tile: int  # of passes 2 and 3
    warps: int


def config(width: int) -> Config:
    """16 warps hold 64 logits a thread and have as many registers left; 32 warps would have half of each to work with.
    Tiles of 4 tokens a thread: a Philox counter, and a load of 128 bits. Nothing spills, on sm_90."""
    if width > HELD:
        return Config(HELD // 4, -(-width // (HELD // 4)), 2048, 8)
    block = max(128, power_of_two(width))
    warps = max(4, min(16, block // 1024))
    return Config(block, 1, min(block, 128 * warps), warps)


# `row`: pointer to its logits, how many of them are tokens, pointer to its forbidden ids, how many.


@jit
def _allowed(row, start, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits from `start` on, -inf where they may not be drawn."""
    x_ptr, vocab, _, _ = row
    token = start + tl.arange(0, SIZE)
    x = tl.load(x_ptr + token, mask=token < vocab, other=float("-inf"))
    return _without(x, row, start, SIZE)


@jit
def _without(x, row, start, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, forbidden_ptr, forbidden = row
    token = start + tl.arange(0, SIZE)
    for entry in range(forbidden):
        x = tl.where(token == tl.load(forbidden_ptr + entry).to(tl.int32), float("-inf"), x)
    return x


@jit
def _place(x):  # type: ignore[no-untyped-def]
    """Floats in order, as int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@jit
def _at(place):  # type: ignore[no-untyped-def]
    bits = place.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@jit
def _statistics(row, width, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last block of what may be drawn; of all columns the largest and log sum e^(x - largest), NaN if one is
    NaN or +inf; the largest of what may be drawn."""
    x_ptr, vocab, _, _ = row
    x = tl.full((BLOCK,), float("-inf"), tl.float32)
    largest = tl.full((), -3.4028234663852886e38, tl.float32)
    total = tl.full((), 0.0, tl.float64)
    top = tl.full((), float("-inf"), tl.float32)
    for block in range(BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token, mask=token < width, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total *= tl.exp((largest - larger).to(tl.float64))
        total += tl.sum(tl.exp(x - larger), axis=0).to(tl.float64)  # +inf - +inf is NaN
        largest = larger
        x = _without(tl.where(token < vocab, x, float("-inf")), row, block * BLOCK, BLOCK)
        top = tl.maximum(top, tl.max(x, axis=0))
    return x, largest.to(tl.float64), tl.log(total), top


@jit
def _weight(x, edge, top, scale):  # type: ignore[no-untyped-def]
    return tl.where(x >= edge, tl.exp((x - top) * scale), 0.0)


@jit
def _number_from(held, row, edge, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many logits reach `edge`."""
    number = tl.full((), 0, tl.int32)
    for block in range(BLOCKS):
        x = held if BLOCKS == 1 else _allowed(row, block * BLOCK, BLOCK)
        number += tl.sum((x >= edge).to(tl.int32), axis=0)
    return number


@jit
def _weight_from(  # type: ignore[no-untyped-def]
    held, row, edge, least, top, scale, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """What the weights weigh that reach `edge`, of logits from `least` on."""
    weight = tl.full((), 0.0, tl.float32)
    for block in range(BLOCKS):
        w = held if BLOCKS == 1 else _weight(_allowed(row, block * BLOCK, BLOCK), least, top, scale)
        weight += tl.sum(tl.where(w >= edge, w, 0.0), axis=0)
    return weight


@jit
def _cut_by_number(held, row, top, k, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The k-th largest logit, how many of its value belong to the first k, and how many there are."""
    low, high = _place(tl.full((), float("-inf"), tl.float32)), _place(top) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = _number_from(held, row, _at(middle), BLOCK, BLOCKS) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above = _number_from(held, row, _at(high), BLOCK, BLOCKS)
    return _at(low), (k - above).to(tl.int32), _number_from(held, row, _at(low), BLOCK, BLOCKS) - above


@jit
def _rough_edge(  # type: ignore[no-untyped-def]
    held, row, edge, room, ties, top, scale, top_p, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """The weight at which top-p cuts, to fp32. `held`: the weights of the logits from `edge` on."""
    _, vocab, _, _ = row
    total = _weight_from(held, row, 0.0, edge, top, scale, BLOCK, BLOCKS)
    total -= (ties - room).to(tl.float32) * tl.exp((edge - top) * scale)
    # All tokens with less than this hold less than 1 - top_p together.
    least = ((1.0 - top_p) * 0.99 / vocab).to(tl.float32) * total
    target = top_p.to(tl.float32) * total
    low, high = _place(least), _place(tl.full((), 1.0, tl.float32)) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = _weight_from(held, row, _at(middle), edge, top, scale, BLOCK, BLOCKS) >= target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return tl.maximum(_at(low), 1e-38)


@jit
def _weigh(row, edge, first, second, top, scale, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float64 masses of the logits above `edge`, from `first` on and from `second` on; the numbers of the latter two; the
    smallest logit from `first` on and the largest below `second`."""
    _, vocab, _, _ = row
    mass0, mass1, mass2 = (tl.zeros((TILE,), tl.float64),) * 3
    number1, number2 = (tl.zeros((TILE,), tl.int32),) * 2
    smallest, largest = tl.full((TILE,), float("inf"), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        x = _allowed(row, start, TILE)
        mass = tl.exp((x.to(tl.float64) - top) * scale)
        in1, in2 = x >= first, x >= second
        mass0 += tl.where(x > edge, mass, 0.0)
        mass1 += tl.where(in1, mass, 0.0)
        mass2 += tl.where(in2, mass, 0.0)
        number1 += in1.to(tl.int32)
        number2 += in2.to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(in1, x, float("inf")))
        largest = tl.maximum(largest, tl.where(in2, float("-inf"), x))
    return (
        tl.sum(mass0, axis=0), tl.sum(mass1, axis=0), tl.sum(mass2, axis=0),
        tl.sum(number1, axis=0), tl.sum(number2, axis=0), tl.min(smallest, axis=0), tl.max(largest, axis=0),
    )  # fmt: skip


@jit
def _cut_by_mass(row, edge, room, ties, top, temperature, top_p, rough, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where top-p cuts what the cut (edge, room) of `ties` left, as `_cut_by_number`: the largest logit from which on the
    mass reaches the target lies in low, ..., high, places of floats, first looked for around `rough`."""
    scale, wide = 1.0 / temperature.to(tl.float64), top.to(tl.float64)
    log = tl.log(rough.to(tl.float64))
    guess = wide + temperature * log
    error = temperature * (1.0 - log) * 2.5e-7 + tl.abs(guess) * 1.2e-7  # of a weight in fp32, as a logit
    first, second = _place((guess - error).to(tl.float32)), _place((guess + error).to(tl.float32))
    low, high = _place(edge), _place(top)
    number, over, above = ties, tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)  # from low on; above high
    target = top_p * room  # where the top is all that top-k left
    while low < high:
        first, second = tl.minimum(tl.maximum(first, low + 1), high), tl.minimum(tl.maximum(second, low + 1), high)
        mass0, mass1, mass2, number1, number2, smallest, largest = _weigh(
            row, edge, _at(first), _at(second), wide, scale, TILE
        )
        target = top_p * (mass0 + room * tl.exp((edge.to(tl.float64) - wide) * scale))
        if mass2 >= target:
            low, number = second, number2
        elif mass1 >= target:
            low, number = _place(smallest), number1
            high, over, above = _place(largest), number2, mass2
        else:
            high, over, above = first - 1, number1, mass1
        first, second = low + (high - low + 2) // 3, low + (2 * (high - low) + 2) // 3
    at = _at(low)
    mass = tl.exp((at.to(tl.float64) - wide) * scale)
    needed = tl.ceil((target - above) / tl.maximum(mass, 1e-300))
    needed = tl.minimum(tl.maximum(needed, 1.0), 1e9).to(tl.int32)
    if at == edge:
        needed = tl.minimum(needed, room)
        number, over = ties, tl.full((), 0, tl.int32)
    return at, needed, number - over


@jit
def _cut(  # type: ignore[no-untyped-def]
    held, row, top, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr
):
    """What is kept: logits above `edge`, and the first `room` of the `ties` that equal it (all where room >= ties)."""
    edge = tl.full((), float("-inf"), tl.float32)
    room, ties = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    scale = 1.0 / temperature
    if (top_k > 0) & (top_k < row[1]):
        edge, room, ties = _cut_by_number(held, row, top, top_k, BLOCK, BLOCKS)
    if top_p < 1.0:
        weights = _weight(held, edge, top, scale)
        rough = _rough_edge(weights, row, edge, room, ties, top, scale, top_p, BLOCK, BLOCKS)
        edge, room, ties = _cut_by_mass(row, edge, room, ties, top, temperature, top_p, rough, TILE)
    if min_p > 0.0:
        exact = top.to(tl.float64) + temperature * tl.log(min_p)
        least = exact.to(tl.float32)
        least = tl.where(least < exact, _at(_place(least) + 1), least)
        room = tl.where(least > edge, ties, room)
        edge = tl.maximum(edge, least)
    return edge, room, ties


@jit
def _draw(row, noise_key, edge, room, ties, top, scale, end, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best of what is kept among the ids below `end`, and the sum of e^y over it."""
    seed, position, candidate = noise_key
    best = tl.full((TILE,), float("inf"), tl.float32)
    best_id = tl.full((TILE,), 0x7FFFFFFF, tl.int32)
    mass = tl.zeros((TILE,), tl.float32)
    seen = tl.full((), 0, tl.int32)
    cut = (room < ties) & (edge > float("-inf"))
    for start in range(0, end, TILE):
        x = _allowed(row, start, TILE)
        keep = x >= edge
        if cut:
            tie = (x == edge).to(tl.int32)
            keep = keep & ((x > edge) | (seen + tl.cumsum(tie, axis=0) <= room))
            seen += tl.sum(tie, axis=0)
        if tl.max(keep.to(tl.int32), axis=0) > 0:
            y = tl.where(keep, (x - top) * scale, float("-inf"))
            mass += tl.exp(y)
            arrival = exponential(token_words(seed, position, candidate, start, 0, TILE)) * tl.exp(-y)
            better = arrival < best  # of equals the first, which has the lower id
            best = tl.where(better, arrival, best)
            best_id = tl.where(better, start + tl.arange(0, TILE), best_id)
    first = tl.min(best, axis=0)
    return tl.min(tl.where(best == first, best_id, 0x7FFFFFFF), axis=0), tl.sum(mass.to(tl.float64), axis=0)


@jit
def _sample(  # type: ignore[no-untyped-def]
    logits_ptr, stride, width, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    seeds_ptr, positions_ptr, candidates_ptr, forbidden_offsets_ptr, forbidden_ptr, label_offsets_ptr, label_ids_ptr,
    ids_ptr, raw_ptr, sampled_ptr, labels_ptr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + number * stride
    begin = tl.load(forbidden_offsets_ptr + number)
    count = (tl.load(forbidden_offsets_ptr + number + 1) - begin).to(tl.int32)
    row = (x_ptr, vocab, forbidden_ptr + begin, count)
    held, largest, log_total, top = _statistics(row, width, BLOCK, BLOCKS)

    temperature = tl.load(temperature_ptr + number)
    broken = (log_total != log_total) | (top == float("-inf"))
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    edge, room, ties = top, tl.full((), 1, tl.int32), tl.full((), 2, tl.int32)  # greedy: the first of the likeliest
    if (broken | greedy) == 0:
        rules = tl.load(top_k_ptr + number), tl.load(top_p_ptr + number), tl.load(min_p_ptr + number)
        edge, room, ties = _cut(held, row, top, temperature, rules[0], rules[1], rules[2], BLOCK, BLOCKS, TILE)

    noise_key = (tl.load(seeds_ptr + number), tl.load(positions_ptr + number), tl.load(candidates_ptr + number))
    end = tl.where(broken, 0, vocab)
    id, mass = _draw(row, noise_key, edge, room, ties, top, 1.0 / temperature, end, TILE)
    broken = broken | (id >= vocab)  # rules that are no numbers: nothing was drawn
    id = tl.where(broken, 0, id)
    x = tl.load(x_ptr + id).to(tl.float64)
    nan = tl.full((), float("nan"), tl.float32)
    sampled = (x - top) / temperature - tl.log(tl.where(broken, 1.0, mass))
    tl.store(ids_ptr + number, id.to(tl.int64))
    tl.store(raw_ptr + number, tl.where(broken, nan, ((x - largest) - log_total).to(tl.float32)))
    tl.store(sampled_ptr + number, tl.where(broken, nan, sampled.to(tl.float32)))
    for start in range(tl.load(label_offsets_ptr + number), tl.load(label_offsets_ptr + number + 1), 32):
        entry = start + tl.arange(0, 32)
        inside = entry < tl.load(label_offsets_ptr + number + 1)
        label = tl.load(x_ptr + tl.load(label_ids_ptr + entry, mask=inside, other=0), mask=inside, other=0.0)
        value = ((label.to(tl.float64) - largest) - log_total).to(tl.float32)
        tl.store(labels_ptr + entry, tl.where(broken, nan, value), mask=inside)


def sample_rows(logits: torch.Tensor, rules: DrawRules) -> Draws:
    """logits [R, V] fp32, V adjacent in memory; the rules' tensors on its device. `kernels/sample.py` says what the rules
    mean and what comes back."""
    rows, width = logits.shape
    device = logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    raw, sampled, labels = (
        torch.empty(count, dtype=torch.float32, device=device) for count in (rows, rows, len(rules.label_ids))
    )
    if rows:
        c = config(width)
        _sample[(rows,)](
            logits, logits.stride(0), width, rules.vocab, rules.temperature, rules.top_k, rules.top_p, rules.min_p,
            rules.seeds, rules.positions, rules.candidates, rules.forbidden_offsets, rules.forbidden,
            rules.label_offsets, rules.label_ids, ids, raw, sampled, labels,
            BLOCK=c.block, BLOCKS=c.blocks, TILE=c.tile, num_warps=c.warps,
        )  # fmt: skip
    return Draws(ids, raw, sampled, labels)


def bytes(rows: int, width: int, passes: int = 3) -> int:
    """Logits alone: 3 passes with top-p, else 2."""
    return passes * rows * width * 4
