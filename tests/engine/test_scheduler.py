"""The scheduler against a model of what a request must see, with tiny blocks so that everything collides."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_cache import BlockPool
from engine.scheduler import Group, Scheduler


class Pages:
    """What the engine would write: the token of every slot. Reveals any mix-up of blocks."""

    def __init__(self, blocks, size):
        self.slots = [[None] * size for _ in range(blocks)]
        self.size = size

    def compute(self, work):
        for position in range(work.start, work.stop):
            block = work.sequence.blocks[position // self.size]
            self.slots[block][position % self.size] = work.sequence.tokens[position]
            seen = [self.slots[work.sequence.blocks[p // self.size]][p % self.size] for p in range(position + 1)]
            assert seen == work.sequence.tokens[: position + 1]

    def copy(self, copy):
        self.slots[copy.target][: copy.tokens] = self.slots[copy.source][: copy.tokens]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=12),  # prompt over two tokens: many common beginnings
        st.lists(st.integers(1, 6), min_size=1, max_size=3),  # what each candidate may add
        st.booleans(),  # scored or sampled
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(3, 6),
    st.integers(14, 40),
    st.randoms(use_true_random=False),
)
def test_every_row_sees_its_own_tokens_and_every_request_ends(waves, budget, places, blocks, rng):
    pool, pages = BlockPool(blocks, 2), Pages(blocks, 2)
    scheduler = Scheduler(pool, budget, places)
    for wave in waves:  # the later ones find the cached blocks of the earlier ones
        groups = []
        for index, (prompt, limits, scored) in enumerate(wave):
            forced = [[rng.randrange(2) for _ in range(limit)] for limit in limits] if scored else None
            group = Group(index, prompt, limits, forced)
            if scheduler.worst_case(group) <= blocks - 1:
                groups.append(group)
                scheduler.add(group)
        run_to_the_end(scheduler, pages, budget, rng)
        assert scheduler.idle and not scheduler.reserved
        assert len(pool.free) == blocks - 1
        for group in groups:
            assert all(sequence.finished for sequence in group.sequences)
            for sequence, limit in zip(group.sequences, group.limits, strict=True):
                added = sequence.tokens[group.prompt_len :]
                assert 1 <= len(added) <= limit
                assert group.forced is None or added == group.forced[sequence.candidate]


def run_to_the_end(scheduler, pages, budget, rng):
    for _ in range(2000):
        if scheduler.idle:
            break
        plan = scheduler.plan()
        assert 0 < plan.rows <= budget
        drawn = {}
        for work in plan.work:
            pages.compute(work)
            if work.sequence.group.forced is None:
                for candidate in work.draws:
                    length = len(work.sequence.tokens) + 1 - work.sequence.group.prompt_len
                    last = length >= work.sequence.group.limits[candidate] or rng.random() < 0.2
                    drawn[work.sequence.group.index, candidate] = (rng.randrange(2), "stop" if last else None)
        for copy in scheduler.commit(plan, drawn):
            pages.copy(copy)
        scheduler.check()


def run_alone(scheduler, group):
    """Run one sampled request to its end, one token per candidate."""
    scheduler.add(group)
    while not scheduler.idle:
        plan = scheduler.plan()
        draws = {(work.sequence.group.index, c): (1, "stop") for work in plan.work for c in work.draws}
        scheduler.commit(plan, draws)
        scheduler.check()


def test_an_admission_does_not_take_the_cached_blocks_that_a_later_one_of_the_same_plan_shares():
    scheduler = Scheduler(BlockPool(9, 2), 100, 10)
    run_alone(scheduler, Group(0, [7, 7, 7, 7, 1], [1]))  # its two full blocks are the oldest that can be reused
    run_alone(scheduler, Group(1, [5, 5, 6, 6, 8, 8, 9], [1]))
    scheduler.add(Group(2, [0, 1, 0, 1, 1], [4]))  # needs five new blocks
    scheduler.add(Group(3, [7, 7, 7, 7, 2], [1]))  # finds the two oldest
    plan = scheduler.plan()
    scheduler.check()
    first, second = (set(work.sequence.blocks) for work in plan.work)
    assert len(plan.admissions) == 2 and not (first | set(scheduler.reserved[2])) & second


def test_check_finds_a_block_that_is_reserved_and_held_by_another():
    scheduler = Scheduler(BlockPool(9, 2), 100, 10)
    scheduler.add(Group(0, [1, 2, 3], [3]))
    scheduler.add(Group(1, [4, 5, 6], [3]))
    plan = scheduler.plan()
    stolen = scheduler.reserved[0][0]
    scheduler.pool.hold([stolen])
    plan.work[1].sequence.blocks.append(stolen)
    with pytest.raises(AssertionError, match=f"block {stolen} is reserved"):
        scheduler.check()


def test_a_request_that_does_not_fit_yet_waits_for_blocks():
    scheduler = Scheduler(BlockPool(5, 2), 100, 10)  # four blocks
    for index in range(2):
        scheduler.add(Group(index, [index] * 4, [4]))  # four blocks each
    plan = scheduler.plan()
    assert [work.sequence.group.index for work in plan.work] == [0]
    assert len(scheduler.waiting) == 1


def test_a_shared_beginning_is_computed_by_one_and_awaited_by_the_others():
    scheduler = Scheduler(BlockPool(50, 2), 100, 10)
    for index in range(3):
        scheduler.add(Group(index, [7, 7, 7, 7, index], [1]))
    first = scheduler.plan()
    assert [work.sequence.group.index for work in first.work] == [0]
    scheduler.commit(first, {(0, 0): (1, "stop")})
    second = scheduler.plan()
    assert [(work.sequence.group.index, work.start) for work in second.work] == [(1, 4), (2, 4)]
    assert scheduler.prefix_tokens_saved == 8


def test_decide_only_reads():
    scheduler = Scheduler(BlockPool(50, 2), 3, 10)
    scheduler.add(Group(0, [1, 2, 3, 4, 5], [2, 2]))
    plan = scheduler.decide()
    assert plan.admissions and plan.work
    assert scheduler.waiting and not scheduler.running and len(scheduler.pool.free) == 49


def test_pool_and_scheduler_need_no_torch():
    code = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('engine'); package.__path__ = ['engine']; sys.modules['engine'] = package\n"
        "import engine.scheduler\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_finished_candidate_gives_its_place_to_a_waiting_request():
    scheduler = Scheduler(BlockPool(50, 2), 100, 2)
    scheduler.add(Group(0, [1, 2, 3], [4, 4]))
    scheduler.add(Group(1, [4, 5, 6], [4]))
    first = scheduler.plan()
    assert [work.sequence.group.index for work in first.work] == [0]
    scheduler.commit(first, {(0, 0): (1, "stop"), (0, 1): (1, None)})
    second = scheduler.plan()
    assert [work.sequence.group.index for work in second.work] == [0, 1]
    scheduler.check()


def test_an_aborted_group_keeps_what_its_candidates_had_and_gives_its_blocks_back():
    scheduler = Scheduler(BlockPool(30, 2), 100, 10)
    running, waiting = Group(0, [1, 2, 3], [4, 4]), Group(1, [4, 5], [9] * 9)
    scheduler.add(running)
    scheduler.add(waiting)  # nine candidates do not fit beside two
    plan = scheduler.plan()
    scheduler.commit(plan, {(0, 0): (7, "stop"), (0, 1): (8, None)})
    assert scheduler.abort({1, 5}) == [waiting] and scheduler.abort(None) == [running]
    scheduler.check()
    assert scheduler.idle and len(scheduler.pool.free) == 29
    assert [(s.tokens, s.finished) for s in running.sequences] == [([1, 2, 3, 7], "stop"), ([1, 2, 3, 8], "abort")]
    assert [s.finished for s in waiting.sequences] == ["abort"] * 9
