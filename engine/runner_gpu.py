"""A step on a GPU: what is planned goes up, what is drawn comes back, and the host waits for nothing in between.

Steps in which every row belongs to another sequence and draws one token (decoding, which is nearly all of a loop's time)
run as a CUDA graph, forward and draw together, one for each number of rows in BUCKETS; a step is padded to the next one.
Others (prompts, scoring, forks) are launched kernel by kernel: they have enough work for each launch. The ids that were
drawn last stay on the device, so that a step can be launched before the host has read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engine import ops
from engine.batch import Batch, known_tokens
from engine.graphs import CudaCapture, Graph, map_tensors
from engine.model import Llama
from engine.sampling import GREEDY, Query, draw_rules
from engine.work import Capacity, WorkDoesNotFit, make_work

BUCKETS = (1, 2, 4, 8, *range(16, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64))
FORBIDDEN = 8  # ids for each row of a bucket: EOS and stop ids while `min_tokens` lasts
LABELS = 24  # for each row of a bucket: six scores with three spellings each are 18
HEAD_ROWS = 2048  # rows of logits at a time outside graphs: at 32,000 tokens 262 MB


class Step(NamedTuple):
    """One step's tensors, on the host where they are made and then on the device."""

    tokens: torch.Tensor  # [R] int64
    from_draws: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [R] int64
    slots: torch.Tensor  # [R] int64, -1: a padded row, which is written nowhere
    copies: torch.Tensor  # [C, 3] int64
    work: ops.Work


class Decoding(NamedTuple):
    """A step in which row r is query r."""

    step: Step
    rules: ops.DrawRules


class Pending:
    """What a launched step has drawn, on its way to the host."""

    def __init__(self, parts: list[ops.Draws], queries: int, labels: int) -> None:
        self._queries, self._labels = queries, labels  # what is behind them is padding
        self._parts = [map_tensors(part, lambda x: x.to("cpu", non_blocking=True, copy=True)) for part in parts]
        self._event = torch.cuda.Event() if parts and parts[0].ids.is_cuda else None
        if self._event:
            self._event.record()

    def read(self) -> ops.Draws:
        """Waits for the step."""
        if self._event:
            self._event.synchronize()
        if not self._parts:
            return ops.Draws(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0), torch.empty(0))
        ids, raw, sampled, labels = (torch.cat(column) for column in zip(*self._parts, strict=True))
        count = self._queries
        return ops.Draws(ids[:count], raw[:count], sampled[:count], labels[: self._labels])


class GpuRunner:
    """The steps of one `LLM` for a model on a GPU, as `CpuRunner` has them for a CPU."""

    def __init__(
        self,
        model: Llama,
        block_size: int,
        vocab: int,
        max_model_len: int,
        capture: Callable[[], Any] = CudaCapture,
    ) -> None:
        """vocab: ids from here on are no tokens; capture: another than CUDA's, for tests."""
        self.model, self.block_size, self.vocab = model, block_size, vocab
        self.device = model.embed.device
        self.seconds = 0.0  # of operations that the host waits for: none
        self.head_rows = 0
        self.replayed_steps = 0
        self.graphs = True  # off only to measure what they give
        self.keys = self.values = torch.empty(0)
        self._drawn = torch.zeros(BUCKETS[-1], dtype=torch.int64, device=self.device)  # by the last step, by query
        self._chunks = -(-max_model_len // block_size)
        self._make_capture = capture
        self._captured: dict[tuple[int, int], Graph] = {}  # by rows and items
        self._weights: list[int] = []  # their addresses when the graphs were captured
        self._forget_graphs()

    def allocate(self, blocks: int) -> None:
        """Pages for every layer. Graphs hold the addresses of earlier ones, so they are captured anew."""
        config = self.model.config
        shape = (config.n_layers, blocks, config.n_kv_heads, self.block_size, config.head_dim)
        keys, self.values = (torch.empty(shape, dtype=self.model.embed.dtype, device=self.device) for _ in range(2))
        self.keys = keys.transpose(-1, -2)  # [layers, blocks, G, D, B], but a token's key lies together
        self._forget_graphs()

    def release(self) -> None:
        self._forget_graphs()
        self.keys = self.values = torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def follow_weights(self) -> None:
        """Graphs read the weights where they were: parameters that moved (to another device and back, say) end them."""
        found = [parameter.data_ptr() for parameter in self.model.parameters()]
        if found != self._weights:
            self._forget_graphs()
            self._weights = found

    def step_bytes(self, max_batch_tokens: int, max_sequences: int) -> int:
        """An upper bound of what a step takes beside weights and pages: activations, logits, slots of attention."""
        config, size = self.model.config, self.model.embed.itemsize
        activations = max_batch_tokens * (12 * config.dim + 4 * config.ffn_dim) * size
        logits = 2 * HEAD_ROWS * config.vocab_size * 4
        bucket = next((rows for rows in BUCKETS if rows >= max_sequences), BUCKETS[-1])
        slots = bucket * self._chunks * config.n_heads * (config.head_dim + 2) * 4
        return activations + logits + 2 * slots

    def _forget_graphs(self) -> None:
        self._captured.clear()
        self._capture: Any = None  # and its memory pool, which must not outlive them

    def packed_bytes(self) -> int:
        """The weights are used as they are."""
        return 0

    @torch.no_grad()
    def launch(self, batch: Batch, queries: Sequence[Query]) -> Pending:
        with ops.sums_in_fp32():
            return self._launch(batch, queries)

    def _launch(self, batch: Batch, queries: Sequence[Query]) -> Pending:
        labels = sum(len(query.labels) for query in queries)
        decoding = self._decoding(batch, queries)
        if decoding is None:
            return Pending(self._launch_eagerly(batch, queries), len(queries), labels)
        rows, items = len(decoding.step.tokens), len(decoding.step.work.narrow)
        graph = self._captured.get((rows, items))
        if graph is None:
            self._capture = self._capture or self._make_capture()
            nothing = self._padded(Batch.empty(), [], rows, items)  # padding alone, which writes no page
            drawn = self._drawn.clone()  # but it draws, and this step may be waiting for what the last one drew
            graph = self._captured[rows, items] = Graph(self._decode, nothing, self.device, self._capture)
            self._drawn.copy_(drawn)
        self.head_rows += rows
        self.replayed_steps += 1
        return Pending([graph.launch(decoding)], len(queries), labels)

    # ---- kernel by kernel -------------------------------------------------------------------------------------------

    def _launch_eagerly(self, batch: Batch, queries: Sequence[Query]) -> list[ops.Draws]:
        draws = any(query.params is not GREEDY for query in queries)  # those of a scoring step are all the default
        if draws and len(queries) > len(self._drawn):
            self._drawn = F.pad(self._drawn, (0, len(queries) - len(self._drawn)))
            self._forget_graphs()  # they hold the address of the old ones
        hidden = self._forward(map_tensors(self._step(batch, None), self._upload))
        parts = []
        for start in range(0, len(queries), HEAD_ROWS):
            part = queries[start : start + HEAD_ROWS]
            rows = self._upload(torch.tensor([query.row for query in part]))
            rules = map_tensors(draw_rules(part, self.vocab), self._upload)
            parts.append(self._draw(hidden[rows], rules, start if draws else None))
            self.head_rows += len(part)
        return parts

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        """Pinned, so that the copy waits for nothing and nothing waits for it."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    # ---- as a graph -------------------------------------------------------------------------------------------------

    def _decoding(self, batch: Batch, queries: Sequence[Query]) -> Decoding | None:
        """The step padded to a bucket, or None if it is not one of those that a graph runs."""
        rows = len(batch.tokens)
        alike = len(queries) == rows <= BUCKETS[-1] and all(query.row == row for row, query in enumerate(queries))
        if not (self.graphs and alike) or len(batch.copies):
            return None
        bucket = next(size for size in BUCKETS if rows <= size)
        tight, wide = (Capacity.items_of(bucket, per_row, self.model.config.n_kv_heads) for per_row in (1, 4))
        return self._padded(batch, queries, bucket, tight) or self._padded(batch, queries, bucket, wide)

    def _padded(self, batch: Batch, queries: Sequence[Query], bucket: int, items: int) -> Decoding | None:
        """None where a list is longer than the bucket's."""
        rows = len(batch.tokens)
        rules = draw_rules([*queries, *(Query(row) for row in range(rows, bucket))], self.vocab)
        forbidden, labels = FORBIDDEN * bucket - len(rules.forbidden), LABELS * bucket - len(rules.label_ids)
        if forbidden < 0 or labels < 0:
            return None
        try:
            step = self._step(batch, Capacity(bucket, items, bucket * self._chunks, bucket * self._chunks))
        except WorkDoesNotFit:
            return None
        step = step._replace(
            tokens=_pad(step.tokens, bucket, 0),
            from_draws=_pad(step.from_draws, bucket, -1),
            positions=_pad(step.positions, bucket, 0),
            slots=_pad(step.slots, bucket, -1),
        )
        return Decoding(
            step,
            rules._replace(
                forbidden=_pad(rules.forbidden, FORBIDDEN * bucket, 0),
                label_ids=_pad(rules.label_ids, LABELS * bucket, 0),
            ),
        )

    def _decode(self, decoding: Decoding) -> ops.Draws:
        return self._draw(self._forward(decoding.step), decoding.rules, 0)

    # ---- both -------------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch, capacity: Capacity | None) -> Step:
        model = self.model
        work = make_work(batch.layout, self.block_size, model.config, model.embed.dtype, capacity, batch.grouped)
        return Step(batch.tokens, batch.from_draws, batch.positions, batch.slots, batch.copies, work)

    def _forward(self, step: Step) -> torch.Tensor:
        """Hidden states of all rows [R, dim]."""

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
        ) -> torch.Tensor:
            pages = self.keys[layer], self.values[layer]
            q = ops.rope_write(q, k, v, cos, sin, *pages, step.slots, step.copies)
            return ops.work_attention(q, *pages, step.work)

        tokens = known_tokens(step.tokens, step.from_draws, self._drawn)
        return self.model(tokens, step.positions, attend)

    def _draw(self, hidden: torch.Tensor, rules: ops.DrawRules, start: int | None) -> ops.Draws:
        """start: the number of the first query among all of the step, where tokens are drawn."""
        draws = ops.sample_rows(ops.wide_linear(hidden, self.model.head), rules)
        if start is not None:
            self._drawn[start : start + len(draws.ids)] = draws.ids
        return draws


def _pad(x: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.from_numpy(np.pad(x.numpy(), (0, length - len(x)), constant_values=value))
