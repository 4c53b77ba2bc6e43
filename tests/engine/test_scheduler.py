"""The scheduler against a model of what a request must see, with tiny blocks so that everything collides."""

import contextlib
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from engine.kv_cache import BlockPool
from engine.scheduler import UNKNOWN, Group, Scheduler


class Pages:
    """What the engine would write: every slot holds the whole beginning that its key and value depend on."""

    def __init__(self, blocks, size):
        self.size = size
        self.slots = [[None] * size for _ in range(blocks)]

    def run(self, plan, epoch):
        """Writes, then copies, then reads, as in a layer of the model. A token that is not read yet is known to the device."""
        tokens = {id(work.sequence): known(work.sequence) for work in plan.work}
        for work in plan.work:
            for position in range(work.start, work.stop):
                block = work.sequence.blocks[position // self.size]
                self.slots[block][position % self.size] = (epoch, *tokens[id(work.sequence)][: position + 1])
        for copy in plan.copies:
            self.slots[copy.target][: copy.tokens] = self.slots[copy.source][: copy.tokens]
        for work in plan.work:
            for position in range(work.stop):
                seen = self.slots[work.sequence.blocks[position // self.size]][position % self.size]
                assert seen == (epoch, *tokens[id(work.sequence)][: position + 1])


def run_step(scheduler, pages, draw):
    """One step; draw(group, candidate, place) -> (token, finish reason). Returns the plan and the groups that are done."""
    plan = scheduler.plan()
    assert 0 < plan.rows <= scheduler.max_batch_tokens
    assert len(scheduler.running) <= scheduler.max_sequences
    pages.run(plan, scheduler.epoch)
    drawn = {}
    for work in plan.work:
        group = work.sequence.group
        if group.forced is None:
            for c in work.draws:
                drawn[group.index, c] = draw(group, c, len(work.sequence.tokens) - group.prompt_len)
    scheduler.check()
    done = scheduler.commit(plan, drawn)
    scheduler.check()
    return plan, done


def scripted(group, candidate, place):
    """A draw that depends on the request alone: two tokens, sometimes a stop before the limit."""
    noise = hash((group.index, candidate, place))
    stop = noise % 7 == 0 or place + 1 >= group.limits[candidate]
    return noise // 7 % 2, "stop" if stop else None


def known(sequence):
    """Its tokens, with what was drawn and not read yet."""
    if sequence.tokens[-1] != UNKNOWN:
        return sequence.tokens
    place = len(sequence.tokens) - 1 - sequence.group.prompt_len
    return [*sequence.tokens[:-1], scripted(sequence.group, sequence.candidate, place)[0]]


def script(group, candidate):
    tokens, place, finished = [], 0, None
    while finished is None:
        token, finished = scripted(group, candidate, place)
        tokens.append(token)
        place += 1
    return tokens


class Machine(RuleBasedStateMachine):
    """Any mix of requests, steps, aborts, evictions, updates and wrong forecasts: every row sees its own beginning, every
    request ends with its own tokens, and no block is lost."""

    def __init__(self):
        super().__init__()
        self.scheduler = None
        self.count, self.open = 0, {}

    @precondition(lambda self: self.scheduler is None)
    @rule(blocks=st.integers(6, 30), budget=st.integers(1, 9), places=st.integers(1, 6))
    def start(self, blocks, budget, places):
        pool = BlockPool(blocks, 2)
        self.scheduler, self.pages = Scheduler(pool, budget, places), Pages(blocks, 2)

    @precondition(lambda self: self.scheduler)
    @rule(
        requests=st.lists(
            st.tuples(
                st.lists(st.integers(0, 1), min_size=1, max_size=9),  # two tokens: many common beginnings
                st.lists(st.integers(1, 6), min_size=1, max_size=3),  # what each candidate may add
                st.booleans(),  # scored or sampled
            ),
            min_size=1,
            max_size=6,
        ),
        rng=st.randoms(use_true_random=False),
    )
    def add(self, requests, rng):
        groups = []
        for prompt, limits, scored in requests:
            forced = [[rng.randrange(2) for _ in range(limit)] for limit in limits] if scored else None
            group = Group(self.count, prompt, limits, forced)
            if self.scheduler.worst_case(group) < self.scheduler.pool.num_blocks:
                self.count += 1
                groups.append(group)
                self.open[group.index] = group
        self.scheduler.add(groups)

    @precondition(lambda self: self.scheduler and not self.scheduler.idle)
    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        while steps and not self.scheduler.idle:
            _, done = run_step(self.scheduler, self.pages, scripted)
            for group in done:
                self.finish(self.open.pop(group.index))
            steps -= 1

    def finish(self, group):
        expected = group.forced or [script(group, c) for c in range(len(group.limits))]
        assert [sequence.tokens[group.prompt_len :] for sequence in group.sequences] == expected
        assert all(sequence.finished and not sequence.blocks for sequence in group.sequences)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data):
        indices = data.draw(st.sets(st.sampled_from(sorted(self.open)), min_size=1))
        ended = self.scheduler.abort(indices)
        assert [group.index for group in ended] == sorted(indices)
        for group in ended:
            del self.open[group.index]
            for candidate, sequence in enumerate(group.sequences):
                added = sequence.tokens[group.prompt_len :]
                assert group.forced or added == script(group, candidate)[: len(added)]

    @precondition(lambda self: self.scheduler)
    @rule(share=st.sampled_from([0.05, 0.5, 1.0]))
    def expect_other_lengths(self, share):
        self.scheduler.used_share = share  # too hopeful: sequences are preempted

    @precondition(lambda self: self.scheduler and self.scheduler.running)
    @rule()
    def preempt(self):
        self.scheduler._preempt(self.scheduler.running[-1])

    @precondition(lambda self: self.scheduler)
    @rule()
    def reset_prefix_cache(self):
        self.scheduler.pool.reset()

    @precondition(lambda self: self.scheduler and self.scheduler.idle)
    @rule(asleep=st.booleans())
    def update_weights(self, asleep):
        self.scheduler.epoch += 1
        if asleep:  # the pages are given back and taken anew
            self.scheduler.pool.reset()
            self.pages = Pages(self.scheduler.pool.num_blocks, 2)

    @invariant()
    def nothing_is_lost(self):
        if self.scheduler:
            self.scheduler.check()
            held = {s.group.index for s in (*self.scheduler.running, *self.scheduler.waiting)}
            assert held == set(self.open)

    def teardown(self):
        if self.scheduler:
            for _ in range(5000):
                if self.scheduler.idle:
                    break
                self.step(1)
            assert self.scheduler.idle and not self.open
            assert len(self.scheduler.pool.free) == self.scheduler.pool.num_blocks - 1


class Overlapped(Machine):
    """The same histories when every step is planned before the tokens of the one before are read."""

    def __init__(self):
        super().__init__()
        self.pending = None  # plan and draws of the step that is under way

    @precondition(lambda self: self.scheduler and not self.scheduler.idle)
    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        while steps and not self.scheduler.idle:
            self.overlapped_step()
            steps -= 1

    def overlapped_step(self):
        scheduler = self.scheduler
        plan = scheduler.plan()
        assert plan.work or self.pending
        if not plan.work:
            scheduler.drop(plan)
            self.settle()
            return
        self.pages.run(plan, scheduler.epoch)
        drawn = {}
        for work in plan.work:
            if work.sequence.group.forced is None:
                for c in work.draws:
                    place = len(work.sequence.tokens) - work.sequence.group.prompt_len
                    drawn[work.sequence.group.index, c] = scripted(work.sequence.group, c, place)
        scheduler.check()
        self.settle()
        scheduler.advance(plan)
        scheduler.check()
        self.pending = plan, drawn

    def settle(self):
        if self.pending:
            plan, drawn = self.pending
            self.pending = None
            for group in self.scheduler.settle(plan, drawn):
                self.finish(self.open.pop(group.index))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data):
        self.settle()
        if self.open:
            Machine.abort(self, data)

    @precondition(lambda self: self.scheduler and self.scheduler.idle)
    @rule(asleep=st.booleans())
    def update_weights(self, asleep):
        self.settle()
        Machine.update_weights(self, asleep)

    def teardown(self):
        super().teardown()
        if self.scheduler:
            self.settle()
            assert len(self.scheduler.pool.free) == self.scheduler.pool.num_blocks - 1


def run_machine(examples, machine=Machine):
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = settings(max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=health)
    run_state_machine_as_test(machine, settings=options)


def test_any_history_leaves_every_request_its_own_tokens():
    run_machine(150)


def test_any_history_of_overlapped_steps_leaves_every_request_its_own_tokens():
    run_machine(150, Overlapped)


@pytest.mark.full
def test_any_of_2000_histories_of_overlapped_steps_leaves_every_request_its_own_tokens():
    run_machine(2000, Overlapped)


@pytest.mark.full
def test_any_of_2000_histories_leaves_every_request_its_own_tokens():
    run_machine(2000)


def start(blocks=50, budget=100, places=10, size=2):
    return Scheduler(BlockPool(blocks, size), budget, places), Pages(blocks, size)


def one_token(group, candidate, place):
    return 1, "stop"


def endless(group, candidate, place):
    return 1, "length" if place + 1 == group.limits[candidate] else None


def test_a_shared_beginning_is_computed_once_also_in_one_step():
    scheduler, pages = start()
    scheduler.add(Group(index, [7, 7, 7, 7, index], [1]) for index in range(3))
    plan, _ = run_step(scheduler, pages, one_token)
    assert [(work.start, work.stop) for work in plan.work] == [(0, 5), (4, 5), (4, 5)]
    assert scheduler.prefix_tokens_saved == 8


def test_candidates_compute_only_their_own_tokens():
    scheduler, pages = start(budget=100)
    scheduler.add([Group(0, [1, 2, 3, 4, 5], [3] * 4)])
    plans = []
    while not scheduler.idle:
        plans.append(run_step(scheduler, pages, endless)[0])
    assert [plan.rows for plan in plans] == [5, 4, 4]
    assert [len(plan.copies) for plan in plans] == [0, 3, 0]  # the last block of the prompt, for three of the four
    assert scheduler.fork_tokens_saved == 15


def test_prefill_is_full_blocks_once_and_tails_less_what_is_copied():
    scheduler, pages = start(size=4)
    prompts = [[*range(10, 20), 1, 1, 5], [*range(10, 20), 1, 1, 5, 6], [*range(10, 22), 5], [*range(10, 18)]]
    scheduler.add(Group(index, prompt, [3] * 2) for index, prompt in enumerate(prompts))
    while not scheduler.idle:
        run_step(scheduler, pages, endless)
    full = {tuple(p[: end + 4]) for p in prompts for end in range(0, len(p) - 3, 4)}
    assert scheduler.block_tokens == 4 * len(full) == 16
    assert scheduler.tail_tokens == sum(len(p) % 4 for p in prompts) == 1 + 2 + 1 + 0
    assert scheduler.copied_tokens == 1  # the second tail begins with the first; a common 18, 19 is no listed head
    again = 1  # the last prompt is in others' blocks to its end: its last token is computed for its logits
    assert scheduler.prefill_tokens == 16 + 4 - 1 + again and scheduler.preemptions == 0


def test_the_common_head_of_a_partial_block_is_copied_not_computed():
    scheduler, pages = start(size=32)
    head = list(range(10, 30))
    scheduler.add([Group(0, [*head, 1, 2, 3], [1])])
    run_step(scheduler, pages, one_token)
    scheduler.add([Group(1, [*head, 5, 6], [1])])
    plan, _ = run_step(scheduler, pages, one_token)
    assert [(work.start, work.stop) for work in plan.work] == [(20, 22)]
    assert [copy.tokens for copy in plan.copies] == [20]


def test_a_sharer_takes_over_when_the_one_that_computes_is_aborted():
    scheduler, pages = start(budget=4)
    scheduler.add(Group(index, [7] * 9, [1]) for index in range(2))
    scheduler.max_batch_tokens = 5
    run_step(scheduler, pages, one_token)  # five of the first one's nine
    scheduler.max_batch_tokens = 100
    scheduler.abort({0})
    plan, done = run_step(scheduler, pages, one_token)
    assert [(work.start, work.stop) for work in plan.work] == [(5, 9)]  # from the cache, and a copied slot
    assert [group.index for group in done] == [1]


def test_a_request_that_does_not_fit_yet_waits_for_blocks():
    scheduler, pages = start(blocks=5)  # four blocks
    scheduler.add(Group(index, [index] * 4, [4]) for index in range(2))  # four blocks each in the end
    run_step(scheduler, pages, endless)
    assert [sequence.group.index for sequence in scheduler.running] == [0]
    assert len(scheduler.waiting) == 1


def test_admission_looks_ahead_instead_of_reserving_the_worst_case():
    """Six blocks, two requests of four blocks in the end: the second starts when the first one's last blocks are in sight."""
    scheduler, pages = start(blocks=7)
    scheduler.add([Group(0, [0, 0], [6]), Group(1, [1, 1], [6])])
    together = 0
    while not scheduler.idle:
        run_step(scheduler, pages, endless)
        together += len(scheduler.running) == 2
    assert together > 0 and scheduler.preemptions == 0


def test_a_wrong_forecast_preempts_the_youngest_which_keeps_its_tokens():
    scheduler, pages = start(blocks=7)
    scheduler.used_share = 0.01
    scheduler.add(Group(index, [index, index], [8]) for index in range(3))
    ended = []
    while not scheduler.idle:
        ended += [group.index for group in run_step(scheduler, pages, endless)[1]]
        scheduler.used_share = 0.01
    assert scheduler.preemptions > 0 and ended == [0, 1, 2]


def test_requests_with_a_common_beginning_stand_together():
    scheduler, _ = start(places=100)
    prompts = [[1, 1, 5], [2, 2, 5], [3], [1, 1, 6], [2, 2, 6], [1, 1, 5, 5, 5]]
    scheduler.add(Group(index, prompt, [1]) for index, prompt in enumerate(prompts))
    assert [sequence.group.index for sequence in scheduler.waiting] == [0, 3, 5, 1, 4, 2]
    plan = scheduler.plan()
    assert [work.sequence.group.index for work in plan.work] == [0, 3, 5, 1, 4, 2]


def test_decoding_comes_before_prompts_and_prompts_are_computed_in_chunks():
    scheduler, pages = start(budget=4)
    scheduler.add([Group(0, [1, 2], [9])])
    run_step(scheduler, pages, endless)
    scheduler.add([Group(1, [5] * 9, [2])])
    rows = []
    for _ in range(3):
        plan, _ = run_step(scheduler, pages, endless)
        rows.append([(work.sequence.group.index, work.stop - work.start) for work in plan.work])
    assert rows == [[(0, 1), (1, 3)]] * 3


def test_a_step_that_failed_leaves_nothing_to_be_found():
    scheduler, pages = start()
    scheduler.add([Group(0, [1] * 9, [3, 3])])
    scheduler.plan()  # blocks count as filled, then the computation fails
    scheduler.abort_all()
    scheduler.check()
    scheduler.add([Group(1, [1] * 9, [1])])
    plan, _ = run_step(scheduler, pages, one_token)
    assert plan.rows == 9 and not plan.copies


POOL_METHODS = ("find", "find_head", "hold", "allocate", "release", "list_block", "fill")


@pytest.mark.parametrize("at", range(1, 120, 4))
def test_an_interrupt_anywhere_in_a_step_leaves_nothing_to_be_found(at, monkeypatch):
    """Ctrl-C may come between any two operations of the pool; what is generated afterwards must not see half a step."""
    scheduler, pages = start(blocks=20, budget=7)
    prompts = [[7, 7, 7, 7, index % 2, index] for index in range(6)]
    calls = 0

    def interrupted(method):
        def call(*given):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return method(*given)

        return call

    with monkeypatch.context() as patch:
        for name in POOL_METHODS:
            patch.setattr(scheduler.pool, name, interrupted(getattr(scheduler.pool, name)))
        scheduler.add(Group(index, prompt, [3, 3]) for index, prompt in enumerate(prompts))
        with contextlib.suppress(KeyboardInterrupt):
            while not scheduler.idle:
                run_step(scheduler, pages, endless)
    scheduler.abort_all()
    scheduler.check()
    assert len(scheduler.pool.free) == 19
    scheduler.add(Group(10 + index, prompt, [3, 3]) for index, prompt in enumerate(prompts))
    while not scheduler.idle:
        run_step(scheduler, pages, endless)  # finds nothing that was not written


def test_check_notices_a_sequence_without_its_blocks_and_one_that_runs_twice():
    for damage, message in (
        (lambda s: s.running[0].blocks.clear(), "references"),
        (lambda s: s.running.append(s.running[0]), "references|twice"),
        (lambda s: s.running.reverse(), "out of order"),
        (lambda s: setattr(s.running[0], "computed", 99), "has computed 99 tokens"),
    ):
        scheduler, pages = start()
        scheduler.add([Group(0, [1, 2, 3], [3]), Group(1, [4, 5, 6], [3])])
        run_step(scheduler, pages, endless)
        damage(scheduler)
        with pytest.raises(AssertionError, match=message):
            scheduler.check()


def test_pool_and_scheduler_need_no_torch():
    code = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('engine'); package.__path__ = ['engine']; sys.modules['engine'] = package\n"
        "import engine.scheduler\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_finished_candidate_gives_its_place_to_a_waiting_request():
    scheduler, pages = start(places=2)
    scheduler.add([Group(0, [1, 2, 3], [4, 4]), Group(1, [4, 5, 6], [4])])
    run_step(scheduler, pages, lambda group, candidate, place: (1, "stop" if candidate == 0 else None))
    plan, _ = run_step(scheduler, pages, endless)
    assert [work.sequence.group.index for work in plan.work] == [0, 1]


def test_an_aborted_group_keeps_what_its_candidates_had_and_gives_its_blocks_back():
    scheduler, pages = start(blocks=30)
    running, waiting = Group(0, [1, 2, 3], [4, 4]), Group(1, [4, 5], [9] * 9)
    scheduler.add([running, waiting])  # nine candidates do not fit beside two
    run_step(scheduler, pages, lambda group, candidate, place: (7 + candidate, None if candidate else "stop"))
    assert scheduler.abort({1, 5}) == [waiting] and scheduler.abort(None) == [running]
    scheduler.check()
    assert scheduler.idle and len(scheduler.pool.free) == 29
    assert [(s.tokens, s.finished) for s in running.sequences] == [([1, 2, 3, 7], "stop"), ([1, 2, 3, 8], "abort")]
    assert [s.finished for s in waiting.sequences] == ["abort"] * 9
