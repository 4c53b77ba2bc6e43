"""The scheduler: which tokens of which sequences are computed in the next step. Pure Python over integers.

`plan()` gives running sequences the blocks that they need, admits waiting ones, and returns rows to compute; `advance`
records that they are under way, forks the candidates of a finished prompt, and lets every draw add a token that is not
known yet; `settle` takes the tokens and frees what has ended. One step may be planned before the one before is settled:
a device then has its next step while the host reads. What that step computes for a sequence that turns out to have ended
is wasted, no more: the row has its true token, which is read on the device, and whoever gets the freed blocks writes to
them later than the step does, because a device runs steps in their order. The rules:
  - Running sequences come first, those that decode before those that still compute their prompt: they finish requests.
  - A sequence is admitted when a forecast of all block use says that it will fit; nothing is reserved.
  - Where the forecast was wrong, the youngest sequence gives its blocks up and waits; what it had drawn it keeps.
  - What a sequence needs is looked up in the pool first, so a prompt that many share is computed once, also in one step.
  - Candidates of a request fork by being admitted: they find the prompt that the first of them has computed.
Requests that share a beginning stand together in the order of service, so they run, and are released, together.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from engine.forecast import Forecast
from engine.kv_cache import BlockPool

UNKNOWN = -1  # a token that is drawn but not read yet: the last one of a sequence at most


@dataclass(eq=False, slots=True)
class Sequence:
    """One candidate; while its group is not forked, the first one computes the prompt for all.

    The keys and values of tokens[:computed] are in `blocks`; `chain` holds the hashes of the full blocks of `tokens`.
    """

    group: Group
    candidate: int
    tokens: list[int]
    chain: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    reached: int = 0  # the most tokens that were ever computed: what is computed below it again is a preemption's price
    finished: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """The place in the order of service."""
        return self.group.order, self.candidate

    @property
    def goal(self) -> int:
        """How many tokens are to be computed: the last one that may be added predicts nothing that is asked for, nor does a
        given continuation's."""
        added = len(self.tokens) - len(self.group.prompt)
        return len(self.tokens) - (self.scored or added >= self.group.limits[self.candidate])

    @property
    def scored(self) -> bool:
        """Whether its own tokens are given: then the log-probs behind every one of them are asked for."""
        return self.group.forced is not None and self.group.forked

    @property
    def asked(self) -> int:
        """The first token that has to be computed here, whoever has computed it before, for its logits."""
        return min(self.group.prompt_len, self.goal - 1) if self.scored else self.goal - 1


@dataclass(eq=False, slots=True)
class Group:
    """One request. `limits`: per candidate, how many tokens it may add; `forced`: given continuations, to be scored."""

    index: int
    prompt: list[int]
    limits: list[int]
    forced: list[list[int]] | None = None
    order: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    forked: bool = False  # the prompt is computed and every candidate is a sequence of its own

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    def ended(self, candidate: int) -> bool:
        """Whether a candidate of a forked group is finished; a group that was handed out may have forgotten its sequences."""
        return not self.sequences or self.sequences[candidate].finished is not None

    @property
    def done(self) -> bool:
        return self.forked and all(sequence.finished is not None for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens[start:stop] of a sequence; `draws`: the candidates that need a token from the last row's logits."""

    sequence: Sequence
    start: int
    stop: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Keys and values of the first `tokens` slots of block `source` also belong into block `target`.

    To be done in every layer after the step's keys and values are written: the source may be computed in the same step.
    """

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Rows in the order of service: neighbours share the most blocks."""

    work: tuple[Work, ...]
    copies: tuple[Copy, ...]

    @property
    def rows(self) -> int:
        return sum(work.stop - work.start for work in self.work)


Drawn = dict[tuple[int, int], tuple[int, str | None]]  # (group index, candidate) -> token, finish reason or None


class Scheduler:
    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()  # those that have run before, then new ones; each in order of service
        self.running: list[Sequence] = []  # in order of service
        self.epoch = 0
        self.used_share = 1.0  # of the tokens that a candidate may add, what finished ones did add on average
        self.finished_candidates = 0
        self.preemptions = 0
        self.prefix_tokens_saved = 0  # prompt tokens that another request had computed
        self.fork_tokens_saved = 0  # prompt tokens that candidates found computed by the first one
        self.recomputed_tokens = 0  # computed a second time after a preemption
        self.prefill_tokens = 0  # prompt tokens computed; without preemptions block + tail - copied, of these three:
        self.block_tokens = 0  # prompt tokens in full blocks that nobody had asked for before
        self.tail_tokens = 0  # prompt tokens behind the last full block, of every request
        self.copied_tokens = 0  # of both, those whose keys and values are copied from another request's block
        self._step: Plan | None = None  # planned, not yet under way
        self._unsettled = 0  # steps planned or under way: until they are settled, what the pool says may not be true
        self._unlisted: list[tuple[Sequence, int]] = []  # blocks that decoding filled with a token not known yet
        self._order = 0
        self._longest = 0  # the most blocks that a candidate of any group so far can come to hold

    # ---- what comes in and out --------------------------------------------------------------------------------------

    def add(self, groups: Iterable[Group]) -> None:
        """Let these groups wait, those with a common beginning side by side at the place of the first of them."""
        arrivals = []
        for group in groups:
            self._longest = max(self._longest, self.worst_case(group))
            sequence = Sequence(group, 0, list(group.prompt))
            self.pool.extend_chain(sequence.chain, sequence.tokens, self.epoch)
            group.sequences = [sequence]
            arrivals.append(sequence)
        for sequence in in_tree_order(arrivals):
            sequence.group.order = self._order = self._order + 1
            self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def worst_case(self, group: Group) -> int:
        """Blocks that one candidate of the group can ever hold; it runs alone if need be. Its last token is not computed."""
        return max(-(-(group.prompt_len + limit - 1) // self.pool.block_size) for limit in group.limits)

    def abort(self, indices: Collection[int] | None) -> list[Group]:
        """End these groups (None: all) between two steps; what their candidates have so far stays. Returns those ended."""
        present = {s.group.index: s.group for s in (*self.running, *self.waiting)}
        ended = [group for index, group in sorted(present.items()) if indices is None or index in indices]
        for group in ended:
            missing = range(len(group.sequences), len(group.limits))
            group.sequences += [Sequence(group, candidate, list(group.prompt)) for candidate in missing]
            group.forked = True
            for sequence in group.sequences:
                self._give_up(sequence)
                sequence.finished = sequence.finished or "abort"
        self.running = [sequence for sequence in self.running if sequence.finished is None]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.finished is None)
        return ended

    def abort_all(self) -> None:
        """Drop everything that waits or runs and give its blocks back. After a step that failed anywhere, nothing that the
        pool says can be trusted (blocks are marked as filled that were not): it begins anew."""
        if self._unsettled:
            self.pool.clear()
        else:
            for sequence in self.running:
                self._give_up(sequence)
        self._step, self._unsettled = None, 0
        self._unlisted.clear()
        self.running.clear()
        self.waiting.clear()

    def check(self) -> None:
        """Verify the pool against everything that runs."""
        sources = [[copy.source for copy in self._step.copies]] if self._step else []
        self.pool.check([*(sequence.blocks for sequence in self.running), *sources])
        for sequence in self.running:
            if len(sequence.blocks) * self.pool.block_size < sequence.computed:
                raise AssertionError(
                    f"sequence {sequence.key} has computed {sequence.computed} tokens in {len(sequence.blocks)} blocks"
                )
        held = [sequence.key for sequence in self.waiting if sequence.blocks]
        if held:
            raise AssertionError(f"sequence {held[0]} waits and holds blocks")
        for name, sequences in (("running", self.running), ("waiting", self.waiting)):
            if len({sequence.key for sequence in sequences}) != len(sequences):
                raise AssertionError(f"a sequence is {name} twice")
        if [sequence.key for sequence in self.running] != sorted(sequence.key for sequence in self.running):
            raise AssertionError("the running sequences are out of order")

    # ---- a step -----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Rows of the next step, at most `max_batch_tokens`; none if all that waits has a token that is not known yet. Blocks
        count as filled from here on; `advance` must follow, and one step before may still have to be settled."""
        assert self._step is None and self._unsettled < 2, (
            "the step before was not advanced, or the one before that settled"
        )
        self._unsettled += 1
        self._make_room()
        budget = self.max_batch_tokens
        work: list[Work] = []
        rows = [(sequence, sequence.goal - sequence.computed) for sequence in self.running]
        decoding = [sequence for sequence, missing in rows if missing == 1]
        for sequence in decoding + [sequence for sequence, missing in rows if missing > 1]:
            if budget <= 0:
                break
            work.append(self._advance(sequence, budget))
            budget -= work[-1].stop - work[-1].start
        copies: list[Copy] = []
        forecast: Forecast | None = None
        used = sum([self._places(sequence) for sequence in self.running])
        while budget > 0 and self.waiting:
            sequence = self.waiting[0]
            places = self._places(sequence)
            if (self.running and used + places > self.max_sequences) or sequence.tokens[-1] == UNKNOWN:
                break
            found = self.pool.find(sequence.chain, sequence.tokens)
            new = -(-sequence.goal // self.pool.block_size) - len(found)
            if new > len(self.pool.free) - sum(block in self.pool.free for block in found):
                break
            if (used + places) * self._longest >= self.pool.num_blocks:  # otherwise there is room for the worst case
                grown = (forecast or self._forecast()).copy()
                grown.held += new + sum(block in self.pool.free for block in found)
                self._add_to(grown, sequence, new, len(found) + new)
                if grown.peak() > self.pool.num_blocks - 1 and self.running:  # whoever is alone fits
                    break
                forecast = grown
            self.waiting.popleft()
            used += places
            copies += self._admit(sequence, found, new)
            work.append(self._advance(sequence, budget))
            budget -= work[-1].stop - work[-1].start
        work.sort(key=lambda item: item.sequence.key)
        self._step = Plan(tuple(work), tuple(copies))
        return self._step

    def advance(self, plan: Plan) -> None:
        """Record that the planned step is under way, before its tokens are known. Steps are settled in their order: the one
        before is settled first."""
        assert plan is self._step and self._unsettled == 1
        self._step = None
        self.pool.release([copy.source for copy in plan.copies])
        forked: list[Sequence] = []
        for work in plan.work:
            group = work.sequence.group
            if work.draws and not group.forked:
                forked += self._fork(work.sequence)
            for candidate in work.draws:
                if group.forced is None and not group.ended(candidate):
                    group.sequences[candidate].tokens.append(UNKNOWN)
        self._requeue(forked)

    def drop(self, plan: Plan) -> None:
        """A plan without work is not computed."""
        assert plan is self._step and not plan.work
        self._step = None
        self._unsettled -= 1

    def settle(self, plan: Plan, drawn: Drawn) -> list[Group]:
        """Take what was drawn in a step (nothing for scored groups, nor for sequences that had ended when the step was on its
        way). Returns the groups that are done."""
        self._unsettled -= 1
        ended: list[Sequence] = []
        for work in plan.work:
            group = work.sequence.group
            for candidate in work.draws:
                if group.ended(candidate):
                    continue
                sequence = group.sequences[candidate]
                if group.forced is None:
                    sequence.tokens[-1], sequence.finished = drawn[group.index, candidate]
                elif work.stop >= sequence.goal:
                    sequence.finished = "length"
                if sequence.finished is not None:
                    ended.append(sequence)
        for sequence, number in self._unlisted:
            if number < len(sequence.blocks):  # it was not preempted meanwhile
                self._list(sequence, number)
        self._unlisted.clear()
        return self._retire(ended)

    def commit(self, plan: Plan, drawn: Drawn) -> list[Group]:
        """`advance` and `settle` of a step that was computed at once."""
        self.advance(plan)
        return self.settle(plan, drawn)

    # ---- the rules --------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Give every running sequence the blocks of its next rows, the oldest first; if there is none, the youngest waits."""
        number = 0
        while number < len(self.running):
            sequence = self.running[number]
            missing = -(-sequence.goal // self.pool.block_size) - len(sequence.blocks)
            if missing > 0:
                blocks = self.pool.allocate(missing)
                if blocks is None:
                    self._preempt(self.running[-1])
                    continue
                sequence.blocks += blocks
            number += 1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_up(sequence)
        self._requeue([sequence])
        self.preemptions += 1

    def _places(self, sequence: Sequence) -> int:
        """How many of `max_sequences` it takes: whoever computes a prompt takes those of all its candidates."""
        return 1 if sequence.group.forked else min(len(sequence.group.limits), self.max_sequences)

    def _forecast(self) -> Forecast:
        forecast = Forecast(self.pool.num_blocks - 1 - len(self.pool.free), self.pool.block_size)
        for sequence in self.running:
            own = 0
            for block in reversed(sequence.blocks):
                if self.pool.blocks[block].references > 1:
                    break
                own += 1
            self._add_to(forecast, sequence, own, len(sequence.blocks))
        return forecast

    def _add_to(self, forecast: Forecast, sequence: Sequence, own: int, blocks: int) -> None:
        """Candidates that are not forked yet are not counted: each of them is admitted by a forecast of its own."""
        forecast.add(own, blocks, len(sequence.tokens), self._expected_end(sequence))

    def _expected_end(self, sequence: Sequence) -> int:
        """How many tokens will be computed in the end: up to the limit, scaled by what finished candidates used of theirs."""
        group = sequence.group
        limit = group.limits[sequence.candidate] - 1
        if group.forced is not None:
            return group.prompt_len + limit
        added = len(sequence.tokens) - group.prompt_len + self.pool.block_size
        return group.prompt_len + min(limit, max(added, round(self.used_share * limit)))

    def _admit(self, sequence: Sequence, found: list[int], new: int) -> list[Copy]:
        """Take the blocks of all known tokens and list the new ones; returns the copy that saves a common head."""
        size, known = self.pool.block_size, sequence.tokens[: sequence.goal]
        self.pool.hold(found)
        parent = sequence.chain[len(found) - 1] if found else self.pool.root(self.epoch)
        source, head = self.pool.find_head(parent, known[len(found) * size :]) if new else (0, 0)
        if head and self.pool.blocks[source].references == 0 and len(self.pool.free) == new:
            head = 0  # the source itself is needed as a block
        if head:
            self.pool.hold([source])
        if not sequence.group.forked:
            tail = len(known) % size
            self.block_tokens += (new - (tail > 0)) * size
            self.tail_tokens += tail
            self.copied_tokens += head
        blocks = self.pool.allocate(new)
        assert blocks is not None, f"sequence {sequence.key}: {new} blocks were counted but are not there"
        sequence.blocks = found + blocks
        for number in range(len(found), len(sequence.blocks)):
            self._list(sequence, number)
        bisect.insort(self.running, sequence, key=lambda other: other.key)
        if not head:
            return []
        self.pool.fill(blocks[0], head)
        return [Copy(source, blocks[0], head)]

    def _list(self, sequence: Sequence, number: int) -> None:
        size, chain = self.pool.block_size, sequence.chain
        if len(chain) < len(sequence.tokens) // size:
            self.pool.extend_chain(chain, sequence.tokens, self.epoch)
        tokens = sequence.tokens[number * size : min((number + 1) * size, sequence.goal)]
        parent = chain[number - 1] if number else self.pool.root(self.epoch)
        self.pool.list_block(sequence.blocks[number], parent, tokens, chain[number] if len(tokens) == size else None)

    def _advance(self, sequence: Sequence, budget: int) -> Work:
        """The next rows of a sequence, from the first token that nobody has computed or whose logits are asked for."""
        size, goal, blocks = self.pool.block_size, sequence.goal, self.pool.blocks
        start = sequence.computed
        if start < goal - 1:
            start = self._first_missing(sequence)
        stop = min(goal, start + budget)
        for number in range(start // size, (stop - 1) // size + 1):
            block = sequence.blocks[number]
            self.pool.fill(block, min(stop - number * size, size))
            if blocks[block].filled == size and len(blocks[block].tokens) < size:  # filled by decoding
                if sequence.tokens[stop - 1] == UNKNOWN:
                    self._unlisted.append((sequence, number))
                else:
                    self._list(sequence, number)
        if start < sequence.group.prompt_len:
            self.prefill_tokens += min(stop, sequence.group.prompt_len) - start
        if start > sequence.computed or start < sequence.reached:
            self._count(sequence, start, stop)
        sequence.computed = stop
        sequence.reached = max(sequence.reached, stop)
        group = sequence.group
        if stop < goal:
            draws: tuple[int, ...] = ()
        elif group.forked:
            draws = (sequence.candidate,)
        else:
            draws = tuple(range(len(group.limits)))
        return Work(sequence, start, stop, draws)

    def _first_missing(self, sequence: Sequence) -> int:
        size, start, asked = self.pool.block_size, sequence.computed, sequence.asked
        while start < asked:
            filled = self.pool.blocks[sequence.blocks[start // size]].filled
            if filled <= start % size:
                break
            start = min(asked, start - start % size + filled)
        return start

    def _count(self, sequence: Sequence, start: int, stop: int) -> None:
        """Tokens that others had computed, and tokens that this sequence had computed before it was preempted."""
        saved = max(0, start - max(sequence.computed, sequence.reached))
        if sequence.group.forked:
            self.fork_tokens_saved += saved
        else:
            self.prefix_tokens_saved += saved
        self.recomputed_tokens += max(0, min(stop, sequence.reached) - start)

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The prompt is computed: every candidate becomes a sequence of its own; returns those that are to be admitted."""
        group = first.group
        group.forked = True
        group.sequences += [
            Sequence(group, candidate, list(group.prompt), list(first.chain))
            for candidate in range(1, len(group.limits))
        ]
        for sequence, continuation in zip(group.sequences, group.forced or (), strict=False):
            sequence.tokens += continuation
            self.pool.extend_chain(sequence.chain, sequence.tokens, self.epoch)
        return group.sequences[1:]

    def _requeue(self, sequences: Iterable[Sequence]) -> None:
        """Before all that have never run, in order of service."""
        again = [sequence for sequence in sequences if sequence.finished is None]
        if not again:
            return
        while self.waiting and (self.waiting[0].group.forked or self.waiting[0].reached):
            again.append(self.waiting.popleft())
        self.waiting.extendleft(sorted(again, key=lambda sequence: sequence.key, reverse=True))

    def _give_up(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _retire(self, ended: list[Sequence]) -> list[Group]:
        if not ended:
            return []
        for sequence in ended:
            self._give_up(sequence)
            group = sequence.group
            if group.forced is None:
                self.finished_candidates += 1
                used = (len(sequence.tokens) - group.prompt_len) / group.limits[sequence.candidate]
                self.used_share += (used - self.used_share) / min(self.finished_candidates + 8, 256)
        self.running = [sequence for sequence in self.running if sequence.finished is None]
        again = list(takewhile(lambda waits: waits.group.forked or waits.reached, self.waiting))
        if any(sequence.finished is not None for sequence in again):  # forked or preempted before its token was known
            self.waiting = deque(sequence for sequence in self.waiting if sequence.finished is None)
        groups = {sequence.group.index: sequence.group for sequence in ended}
        return [group for group in groups.values() if group.done]


def in_tree_order(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Sequences with the same first blocks side by side, otherwise in the order given: a walk through their prefix tree."""
    number: dict[object, int] = {}
    places = []
    for sequence in sequences:
        path = [number.setdefault(key, len(number)) for key in sequence.chain]
        places.append(([*path, number.setdefault(id(sequence), len(number))], sequence))
    return [sequence for _, sequence in sorted(places, key=lambda place: place[0])]
