"""The GPU's work list, item by item against a plain enumeration: every row meets each of its chunks exactly once."""

import random

import numpy as np
import pytest
import torch

from engine import ops
from engine.batch import Layout
from engine.work import PROGRAMS, Capacity, WorkDoesNotFit, make_work
from tests.engine.helpers import small_config

BLOCK = 8


def layout_of(sequences):
    """sequences: (position of the first row, rows, pages)."""
    offsets = lambda counts: np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return Layout(
        offsets([rows for _, rows, _ in sequences]),
        np.array([start for start, _, _ in sequences], dtype=np.int64),
        offsets([len(pages) for _, _, pages in sequences]),
        np.array([page for _, _, pages in sequences for page in pages], dtype=np.int64),
    )


def random_layout(seed, sequences=40):
    """Trees of shared pages, as an order of service has them: neighbours share the most. Some rows belong to prompts."""
    rng = random.Random(seed)
    page = iter(range(1, 10_000))
    found, path = [], []
    for _ in range(sequences):
        path = path[: rng.randint(0, len(path))]
        path = path + [next(page) for _ in range(rng.randint(0 if path else 1, 6))]
        own = [next(page)]
        last = len(path) * BLOCK + rng.randrange(BLOCK)  # position of the last row, in its own page
        rows = rng.choice([1, 1, 1, 1, 2, 5, 40])
        start = max(last + 1 - rows, 0)
        found.append((start, last + 1 - start, path + own))
    return layout_of(found)


def expected(layout):
    """(row, chunk) -> page, for every row and every chunk that it sees."""
    met = {}
    for w, start in enumerate(layout.starts):
        pages = layout.pages[layout.first_page[w] : layout.first_page[w + 1]]
        for number, row in enumerate(range(layout.first_row[w], layout.first_row[w + 1])):
            for chunk in range((start + number) // BLOCK + 1):
                met[row, chunk] = pages[chunk]
    return met


def walk(work, wide_rows, narrow_rows):
    """(row, chunk) -> page by the list's own words, with each rule that the kernel relies on."""
    met, stored = {}, {}
    fold, positions, pages = work.fold.tolist(), work.positions.tolist(), work.pages.tolist()
    for items, most in ((work.wide.tolist(), wide_rows), (work.narrow.tolist(), narrow_rows)):
        for place, chunks, first, row, rows, whole in items:
            assert rows <= most and (chunks > 0 or not rows)
            for r in range(row, row + rows):
                base, first_slot, count = fold[r]
                last = positions[r] // BLOCK
                assert (
                    most == wide_rows or first + chunks <= last + 1
                )  # a narrow item's rows see something of each chunk
                for chunk in range(first, min(first + chunks, last + 1)):
                    assert (r, chunk) not in met
                    met[r, chunk] = pages[place + chunk - first]
                    if first > 0:
                        stored.setdefault(r, {})[chunk] = base + chunk
                if first == 0:
                    assert bool(whole) == (count == 0)
                    assert not whole or chunks > last
                    if not whole:
                        stored.setdefault(r, {})[chunks - 1] = base + chunks - 1
    for r, (_, first_slot, count) in enumerate(fold):
        slots = [slot for _, slot in sorted(stored.get(r, {}).items())]
        assert slots == list(range(first_slot, first_slot + count))  # in ascending order of chunks, none missing
        assert all(slot < work.slots for slot in slots)
    taken = [slot for of_row in stored.values() for slot in of_row.values()]
    assert len(taken) == len(set(taken))
    return met


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_row_meets_each_of_its_chunks_once(kv_heads, grouped, dtype):
    config = small_config(n_kv_heads=kv_heads)
    for seed in range(20):
        layout = random_layout(seed)
        work = make_work(layout, BLOCK, config, dtype, grouped=grouped)
        assert walk(work, *(tile.rows for tile in ops.tiles(4 // kv_heads, BLOCK, dtype))) == expected(layout)


def items(work):
    return [tuple(item) for item in work.narrow.tolist() if item[4]]


def test_candidates_of_a_prompt_read_its_chunks_once():
    """8 rows behind 3 shared chunks and a chunk of their own each: few chunks, so runs are cut to one chunk an item."""
    layout = layout_of([(27, 1, [1, 2, 3, 10 + n]) for n in range(8)])
    work = make_work(layout, BLOCK, small_config(n_kv_heads=4), torch.bfloat16)
    shared = [item for item in items(work) if item[4] == 8]
    assert [item[2] for item in shared] == [0, 1, 2]
    assert len(items(work)) == 3 + 8
    alone = make_work(layout, BLOCK, small_config(n_kv_heads=4), torch.bfloat16, grouped=False)
    assert all(item[4] == 1 for item in items(alone)) and len(items(alone)) == 8 * 4


def test_many_unshared_rows_are_each_one_run_that_stores_its_result_at_once():
    layout = layout_of([(30, 1, list(range(4 * n, 4 * n + 4))) for n in range(200)])
    work = make_work(layout, BLOCK, small_config(n_kv_heads=4), torch.bfloat16)
    assert items(work) == [(4 * n, 4, 0, n, 1, 1) for n in range(200)]
    assert work.slots == 0


def test_one_long_row_is_cut_so_that_the_gpu_is_busy():
    layout = layout_of([(1023, 1, list(range(128)))])
    work = make_work(layout, BLOCK, small_config(n_kv_heads=4), torch.bfloat16)
    assert len(items(work)) * 4 >= PROGRAMS // 2
    assert {item[1] for item in items(work)} == {1}


def test_a_prompt_is_cut_into_wide_tiles_the_longest_context_first():
    layout = layout_of([(16, 200, list(range(27)))])
    work = make_work(layout, BLOCK, small_config(n_kv_heads=4), torch.bfloat16)
    assert [item[1:] for item in work.wide.tolist()] == [[27, 0, 128, 72, 1], [18, 0, 0, 128, 1]]
    assert not len(work.narrow) and work.slots == 0


def test_a_capacity_pads_every_array_and_changes_nothing_else():
    config = small_config()
    layout = layout_of([(20, 1, [1, 2, 3]), (21, 1, [1, 2, 4]), (5, 1, [9])])
    exact = make_work(layout, BLOCK, config, torch.bfloat16)
    room = Capacity.of(8, 64, 2)
    work = make_work(layout, BLOCK, config, torch.bfloat16, room)
    assert [len(x) for x in work[:5]] == [room.pages, 0, room.items, room.rows, room.rows]
    assert work.slots == room.slots
    assert items(work) == items(exact)
    for name in ("pages", "positions", "fold"):
        given, padded = getattr(exact, name), getattr(work, name)
        assert torch.equal(padded[: len(given)], given) and not padded[len(given) :].any()


def test_what_does_not_fit_says_so():
    layout = layout_of([(63, 1, list(range(8)))])
    for field in ("items", "pages"):
        room = Capacity.of(1, 8, 2)._replace(**{field: 1})
        with pytest.raises(WorkDoesNotFit):
            make_work(layout, BLOCK, small_config(), torch.bfloat16, room)
    with pytest.raises(WorkDoesNotFit):  # prompts are no graph's
        many = layout_of([(0, 40, list(range(5)))])
        make_work(many, BLOCK, small_config(), torch.bfloat16, Capacity.of(64, 8, 2))


def test_decoding_steps_of_trees_fit_the_capacity_of_their_rows():
    config = small_config(n_kv_heads=4)
    for seed in range(30):
        rng = random.Random(seed)
        page, sequences = iter(range(1, 10_000)), []
        for _ in range(rng.randint(1, 6)):
            rubric = [next(page) for _ in range(rng.randint(0, 5))]
            for _ in range(rng.randint(1, 5)):
                prompt = rubric + [next(page) for _ in range(rng.randint(0, 5))]
                for _ in range(rng.randint(1, 8)):
                    own = prompt + [next(page) for _ in range(rng.randint(1, 4))]
                    sequences.append((len(own) * BLOCK - 1 - rng.randrange(BLOCK), 1, own))
        layout = layout_of(sequences)
        make_work(layout, BLOCK, config, torch.bfloat16, Capacity.of(len(sequences), 16, 4))
