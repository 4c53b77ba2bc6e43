"""The scheduler: which tokens of which sequences are computed in the next step. Pure Python over integers.

`plan()` = `decide()` (only reads, returns a frozen Plan) + `apply(plan)` (takes the blocks); `commit` takes the sampled
tokens, forks the candidates of a finished prompt, and frees what has ended.

A group is one request: its prompt is computed once by candidate 0; then the other candidates fork: full blocks are
shared, the last, partly filled one is copied. Policy, plain: admission reserves the blocks of the worst case (admitting
by simulated use is to come), so nothing that runs is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.kv_cache import BlockPool


@dataclass(eq=False)
class Sequence:
    """One candidate. The keys and values of tokens[:computed] are in `blocks`."""

    group: Group
    candidate: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    finished: str | None = None

    @property
    def goal(self) -> int:
        """How many tokens are to be computed: a given continuation's last token predicts nothing that is asked for."""
        scoring = self.group.forced is not None and self.group.forked
        return len(self.tokens) - 1 if scoring else len(self.tokens)


@dataclass(eq=False)
class Group:
    """One request. `limits`: per candidate, how many tokens it may add; `forced`: given continuations, to be scored."""

    index: int
    prompt: list[int]
    limits: list[int]
    forced: list[list[int]] | None = None
    chain: list[bytes] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    forked: bool = False  # the prompt is computed and every candidate is a sequence of its own

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def living(self) -> int:
        """Candidates that are or will be computed: a finished one gives its place to a waiting request."""
        return len(self.limits) - sum(sequence.finished is not None for sequence in self.sequences)


@dataclass(frozen=True)
class Work:
    """Compute tokens[start:stop] of a sequence; `draws`: the candidates that need a token from the last row's logits."""

    sequence: Sequence
    start: int
    stop: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Admission:
    group: Group
    shared: tuple[int, ...]  # computed blocks found by content
    reserve: int  # blocks to take now, for the worst case of all candidates


@dataclass(frozen=True)
class Plan:
    admissions: tuple[Admission, ...]
    work: tuple[Work, ...]

    @property
    def rows(self) -> int:
        return sum(work.stop - work.start for work in self.work)


@dataclass(frozen=True)
class Copy:
    """Key/value of the first `tokens` slots of block `source` are to be copied into block `target`."""

    source: int
    target: int
    tokens: int


Drawn = dict[tuple[int, int], tuple[int, str | None]]  # (group index, candidate) -> token, finish reason or None


class Scheduler:
    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self.reserved: dict[int, list[int]] = {}  # group index -> blocks taken for later
        self.prefix_tokens_saved = 0
        self.epoch = 0
        self.fresh: list[int] = []  # blocks handed out since the engine last looked: their content is anything

    def add(self, group: Group) -> None:
        group.chain = self.pool.hash_chain(group.prompt, self.epoch)
        self.waiting.append(group)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def worst_case(self, group: Group) -> int:
        """Blocks that the group can ever hold at once: the shared full blocks of the prompt, and each candidate's own."""
        size = self.pool.block_size
        common = group.prompt_len // size
        return common + sum(-(-(group.prompt_len + limit) // size) - common for limit in group.limits)

    def plan(self) -> Plan:
        plan = self.decide()
        self.apply(plan)
        return plan

    def decide(self) -> Plan:
        """Decode rows first (they finish requests), then running prompts, then new ones while tokens and blocks last."""
        budget = self.max_batch_tokens
        work: list[Work] = []
        active = [sequence for group in self.running for sequence in group.sequences if sequence.finished is None]
        for sequence in sorted(active, key=lambda sequence: sequence.goal - sequence.computed > 1):
            rows = min(sequence.goal - sequence.computed, budget)
            if rows > 0:
                work.append(self._work(sequence, sequence.computed, rows))
                budget -= rows
        admissions = []
        computing = self._keys_being_computed()
        places = self.max_sequences - sum(group.living for group in self.running)
        taken: set[int] = set()
        spare = 0  # blocks promised in this plan
        for group in self.waiting:
            if budget <= 0 or len(group.limits) > places:
                break
            shared = self._findable(group)
            if len(shared) < self._reusable(group) and group.chain[len(shared)] in computing:
                continue  # the block that it needs next is being computed: wait a step instead of computing it twice
            reserve = self.worst_case(group) - len(shared)
            if reserve > self.pool.available(taken | set(shared)) - spare:
                break
            taken |= set(shared)
            spare += reserve
            places -= len(group.limits)
            computing.update(group.chain[len(shared) :])
            start = len(shared) * self.pool.block_size
            rows = min(group.prompt_len - start, budget)
            admissions.append(Admission(group, tuple(shared), reserve))
            work.append(self._work(Sequence(group, 0, list(group.prompt)), start, rows))
            budget -= rows
        return Plan(tuple(admissions), tuple(work))

    def apply(self, plan: Plan) -> None:
        """Take the blocks of the plan's admissions and give the computed sequences the blocks that their rows need."""
        first = {work.sequence.group.index: work.sequence for work in plan.work}
        for admission in plan.admissions:  # all of them before the first `allocate`, which may take any unheld block
            self.pool.hold(admission.shared)
        for admission in plan.admissions:
            group, sequence = admission.group, first[admission.group.index]
            self.waiting.remove(group)
            self.running.append(group)
            reserve = self.pool.allocate(admission.reserve)
            assert reserve is not None, (
                f"group {group.index}: {admission.reserve} blocks were counted but are not there"
            )
            self.reserved[group.index] = reserve
            self.fresh += reserve
            sequence.blocks = list(admission.shared)
            sequence.computed = len(admission.shared) * self.pool.block_size
            group.sequences.append(sequence)
            self.prefix_tokens_saved += sequence.computed
        for work in plan.work:
            self._grow(work.sequence, work.stop)

    def commit(self, plan: Plan, tokens: Drawn) -> list[Copy]:
        """Record what was computed and drawn (nothing is drawn for scored groups).

        Returns the block copies that forks need, to be done before the next step.
        """
        copies: list[Copy] = []
        for work in plan.work:
            sequence = work.sequence
            self._mark(sequence, work.stop)
            sequence.computed = work.stop
            if work.draws and not sequence.group.forked:
                copies += self._fork(sequence)
            if sequence.group.forced is not None:
                self._end_scored(sequence.group)
                continue
            for candidate in work.draws:
                token, finished = tokens[sequence.group.index, candidate]
                child = sequence.group.sequences[candidate]
                child.tokens.append(token)
                child.finished = finished
        self._retire()
        return copies

    def check(self) -> None:
        """Verify the pool against everything that runs."""
        holders = [sequence.blocks for group in self.running for sequence in group.sequences]
        self.pool.check([*holders, *self.reserved.values()])
        for index, blocks in self.reserved.items():
            for block in blocks:
                if self.pool.blocks[block].references != 1:
                    raise AssertionError(f"block {block} is reserved for group {index} and held by another")

    def abort(self, indices: Collection[int] | None) -> list[Group]:
        """End these groups (None: all) between two steps; what their candidates have so far stays. Returns those ended."""
        ended = [g for g in (*self.running, *self.waiting) if indices is None or g.index in indices]
        for group in ended:
            missing = range(len(group.sequences), len(group.limits))
            group.sequences += [Sequence(group, candidate, list(group.prompt)) for candidate in missing]
            group.forked = True
            for sequence in group.sequences:
                sequence.finished = sequence.finished or "abort"
            if group in self.running:
                self.running.remove(group)
                self._free(group)
            else:
                self.waiting.remove(group)
        return ended

    def abort_all(self) -> None:
        """Drop everything that waits or runs and give its blocks back."""
        for group in self.running:
            self._free(group)
        self.running.clear()
        self.waiting.clear()

    def _findable(self, group: Group) -> list[int]:
        return self.pool.find(group.chain[: self._reusable(group)], group.prompt)

    def _reusable(self, group: Group) -> int:
        """Full prompt blocks that may come from the cache: the last token is always computed, for its logits."""
        return (group.prompt_len - 1) // self.pool.block_size

    def _keys_being_computed(self) -> set[bytes]:
        keys = set()
        for group in self.running:
            if not group.forked:
                keys.update(group.chain[group.sequences[0].computed // self.pool.block_size :])
        return keys

    def _work(self, sequence: Sequence, start: int, rows: int) -> Work:
        stop = start + rows
        group = sequence.group
        if stop < len(sequence.tokens):
            draws: tuple[int, ...] = ()
        elif group.forked:
            draws = (sequence.candidate,)
        else:
            draws = tuple(range(len(group.limits)))
        return Work(sequence, start, stop, draws)

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        needed = -(-tokens // self.pool.block_size)
        while len(sequence.blocks) < needed:
            sequence.blocks.append(self.reserved[sequence.group.index].pop())

    def _mark(self, sequence: Sequence, stop: int) -> None:
        """Make the prompt blocks that this step filled findable."""
        size, group = self.pool.block_size, sequence.group
        for number in range(sequence.computed // size, min(stop // size, len(group.chain))):
            tokens = group.prompt[number * size : (number + 1) * size]
            self.pool.mark_computed(sequence.blocks[number], group.chain[number], tokens)

    def _fork(self, first: Sequence) -> list[Copy]:
        group, size = first.group, self.pool.block_size
        common, rest = divmod(group.prompt_len, size)
        copies = []
        for candidate in range(1, len(group.limits)):
            child = Sequence(group, candidate, list(group.prompt), first.blocks[:common], first.computed)
            self.pool.hold(child.blocks)
            if rest:
                child.blocks.append(self.reserved[group.index].pop())
                copies.append(Copy(first.blocks[common], child.blocks[common], rest))
            group.sequences.append(child)
        group.forked = True
        for sequence, continuation in zip(group.sequences, group.forced or (), strict=False):
            sequence.tokens += continuation
        return copies

    def _end_scored(self, group: Group) -> None:
        for sequence in group.sequences:
            if group.forked and sequence.computed >= sequence.goal:
                sequence.finished = "length"

    def _retire(self) -> None:
        for group in self.running:
            for sequence in group.sequences:
                if sequence.finished is not None and sequence.blocks:
                    self.pool.release(sequence.blocks)
                    sequence.blocks = []
        done = [group for group in self.running if group.forked and all(s.finished for s in group.sequences)]
        for group in done:
            self._free(group)
            self.running.remove(group)

    def _free(self, group: Group) -> None:
        for sequence in group.sequences:
            self.pool.release(sequence.blocks)
            sequence.blocks = []
        self.pool.release(self.reserved.pop(group.index, []))
