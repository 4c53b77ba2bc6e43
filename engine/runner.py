"""A step on a CPU: rows through the model, then what is asked of their logits.

`launch` takes a step, `read` gives what it drew: two calls, because on a GPU (`engine/runner_gpu.py`) the host goes on in
between. Here everything is done when `launch` returns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine import ops
from engine.batch import Batch, known_tokens
from engine.model import Attend, Llama, given_up
from engine.packed import PackedWeights
from engine.replay import Replay
from engine.sampling import Query, draw_rules

HEAD_ROWS = 256  # rows of logits at a time: at 32,000 tokens 33 MB


class Done:
    """A step that is computed: one entry of `draws` per query, their labels one after the other."""

    def __init__(self, draws: ops.Draws) -> None:
        self._draws = draws

    def read(self) -> ops.Draws:
        return self._draws


class CpuRunner:
    """The steps of one `LLM`. vocab: ids from here on are no tokens; seconds: of all operations of the model so far.
    replays: whether a step makes recorded calls; where it cannot (other backends, hooks in the model), and to measure
    what it gives, kernels are called from Python one by one."""

    def __init__(self, model: Llama, packed: PackedWeights, block_size: int, vocab: int) -> None:
        self.model, self.packed, self.block_size, self.vocab = model, packed, block_size, vocab
        self.replays = ops.forward_is_native()
        self._replay: Replay | None = None
        self._recorded_for: list[int] = []
        self.replayed_steps = 0
        self.keys = self.values = torch.empty(0)
        self.drawn = torch.zeros(1, dtype=torch.int64)  # ids of the last step, by query
        self.seconds = 0.0
        self.head_rows = 0

    def allocate(self, blocks: int) -> None:
        self._replay = None
        config, size = self.model.config, self.block_size
        pages = (config.n_layers, blocks, config.n_kv_heads)
        # Not cleared, so that memory is taken as it is used: no slot is read before it is written.
        dtype = self.model.embed.dtype
        self.keys = torch.empty(*pages, config.head_dim, size, dtype=dtype)  # [layers, blocks, G, D, B]
        self.values = torch.empty(*pages, size, config.head_dim, dtype=dtype)  # [layers, blocks, G, B, D]

    def release(self) -> None:
        """Give back the pages and copies of weights that are held elsewhere too."""
        self._replay = None
        self.packed.clear()
        self.keys = self.values = torch.empty(0)

    def follow_weights(self) -> None:
        """Pack anew what was updated; record anew where the model's memory moved, as by `share_memory()`, or has hooks."""
        model = self.model
        self.packed.follow(model.weight_epoch)
        memory = [x.data_ptr() for x in (*model.parameters(), model.rope_cos, model.rope_sin) if not given_up(x)]
        found = [model.weight_epoch, self._hooked(), *memory]
        if found != self._recorded_for:
            self._replay = None
            self._recorded_for = found

    def packed_bytes(self) -> int:
        """Memory of the packed weights."""
        return self.packed.bytes()

    def launch(self, batch: Batch, queries: Sequence[Query]) -> Done:
        with torch.no_grad(), one_thread() as threads:
            began = time.perf_counter()
            hidden = self._forward(batch, threads)
            self.seconds += time.perf_counter() - began
            parts = [
                self._draw(hidden, queries[start : start + HEAD_ROWS], threads)
                for start in range(0, len(queries), HEAD_ROWS)
            ]
        draws = ops.Draws(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else _NOTHING
        self.drawn = draws.ids if len(draws.ids) else self.drawn
        return Done(draws)

    def _forward(self, batch: Batch, threads: int) -> torch.Tensor:
        """Hidden states of all rows [R, dim]."""
        tokens = known_tokens(batch.tokens, batch.from_draws, self.drawn)
        replay = self._replay_of(len(tokens)) if self.replays else None
        if replay is None:
            return self.model(tokens, batch.positions, self._attend(batch, threads), self.packed.kernels(threads))
        self.replayed_steps += 1
        return replay(tokens, batch, threads)

    def _replay_of(self, rows: int) -> Replay | None:
        if self._replay and self._replay.rows >= rows:
            return self._replay
        self._replay = None
        if not self._hooked():
            try:
                self._replay = Replay(self._record, 1 << (rows - 1).bit_length())
            except ValueError:  # something in this model does more than a replay would do again
                self.replays = False
        return self._replay

    def _hooked(self) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules())

    def _record(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nothing = Batch.empty()._replace(tokens=tokens, positions=positions, slots=positions)
        return self.model(tokens, positions, self._attend(nothing, 1), self.packed.kernels(1))

    def _attend(self, batch: Batch, threads: int) -> Attend:
        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
        ) -> torch.Tensor:
            pages = self.keys[layer], self.values[layer]
            q = ops.rope_write(q, k, v, cos, sin, *pages, batch.slots, batch.copies, threads)
            return ops.chunk_attention(q, *pages, batch.items, batch.positions, threads)

        return attend

    def _draw(self, hidden: torch.Tensor, queries: Sequence[Query], threads: int) -> ops.Draws:
        rows = sorted({query.row for query in queries})
        place = {row: number for number, row in enumerate(rows)}
        rules = draw_rules(queries, self.vocab)
        began = time.perf_counter()
        logits = self.packed(hidden[torch.tensor(rows)], self.model.head, threads)
        if len(rows) < len(queries):  # the candidates of a prompt draw from one row
            logits = logits[torch.tensor([place[query.row] for query in queries])]
        draws = ops.sample_rows(logits, rules, threads)
        self.seconds += time.perf_counter() - began
        self.head_rows += len(rows)
        return draws


_NOTHING = ops.Draws(torch.empty(0, dtype=torch.int64), *torch.empty(3, 0, dtype=torch.float32))


@contextmanager
def one_thread() -> Iterator[int]:
    """Keep torch's small operations on one thread; yields the user's setting, which the kernels get.

    The setting is the process's: another thread's torch operations run on one thread meanwhile, too.
    Two threads that meet after every addition wait for each other: beside other work on two cores a step of the tiny
    model took 26 ms so, 7 ms with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
