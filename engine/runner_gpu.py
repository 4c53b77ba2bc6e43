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
from engine.sampling import Query, draw_rules
from engine.work import Capacity, WorkDoesNotFit, make_work

BUCKETS = (1, 2, 4, 8, *range(16, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64))
FORBIDDEN = 8  # ids for each row of a bucket: EOS and stop ids while `min_tokens` lasts
LABELS = 16  # for each row of a bucket
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
        capture: Callable[..., Any] | None = None,
    ) -> None:
        """vocab: ids from here on are no tokens; capture: another than CUDA's, for tests."""
        self.model, self.block_size, self.vocab = model, block_size, vocab
        self.device = model.embed.device
        self.seconds = 0.0  # of operations that the host waits for: none
        self.head_rows = 0
        self.graphs = True  # off only to measure what they give
        self.keys = self.values = torch.empty(0)
        self._drawn = torch.zeros(BUCKETS[-1], dtype=torch.int64, device=self.device)  # by the last step, by query
        self._chunks = -(-max_model_len // block_size)
        self._capture = capture or CudaCapture()
        self._captured: dict[int, Graph] = {}

    def allocate(self, blocks: int) -> None:
        """Pages for every layer. Graphs hold the addresses of earlier ones, so they are captured anew."""
        config = self.model.config
        shape = (config.n_layers, blocks, config.n_kv_heads, self.block_size, config.head_dim)
        keys, self.values = (torch.empty(shape, dtype=self.model.embed.dtype, device=self.device) for _ in range(2))
        self.keys = keys.transpose(-1, -2)  # [layers, blocks, G, D, B], but a token's key lies together
        self._captured.clear()

    def release(self) -> None:
        self._captured.clear()
        self.keys = self.values = torch.empty(0)

    def packed_bytes(self) -> int:
        """The weights are used as they are."""
        return 0

    @torch.no_grad()
    def launch(self, batch: Batch, queries: Sequence[Query]) -> Pending:
        labels = sum(len(query.labels) for query in queries)
        decoding = self._decoding(batch, queries)
        if decoding is None:
            return Pending(self._launch_eagerly(batch, queries), len(queries), labels)
        rows = len(decoding.step.tokens)
        graph = self._captured.get(rows)
        if graph is None:
            nothing = self._padded(Batch.empty(), [], rows)  # padding alone, which writes no page
            drawn = self._drawn.clone()  # but it draws, and this step may be waiting for what the last one drew
            graph = self._captured[rows] = Graph(self._decode, nothing, self.device, self._capture)
            self._drawn.copy_(drawn)
        self.head_rows += rows
        return Pending([graph.launch(decoding)], len(queries), labels)

    # ---- kernel by kernel -------------------------------------------------------------------------------------------

    def _launch_eagerly(self, batch: Batch, queries: Sequence[Query]) -> list[ops.Draws]:
        if len(queries) > len(self._drawn):
            self._drawn = F.pad(self._drawn, (0, len(queries) - len(self._drawn)))
            self._captured.clear()  # they hold the address of the old ones
        hidden = self._forward(map_tensors(self._step(batch, None), self._upload))
        parts = []
        for start in range(0, len(queries), HEAD_ROWS):
            part = queries[start : start + HEAD_ROWS]
            rows = self._upload(torch.tensor([query.row for query in part]))
            parts.append(self._draw(hidden[rows], map_tensors(draw_rules(part, self.vocab), self._upload), start))
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
        return self._padded(batch, queries, next(size for size in BUCKETS if rows <= size))

    def _padded(self, batch: Batch, queries: Sequence[Query], bucket: int) -> Decoding | None:
        """None where a list is longer than the bucket's."""
        rows = len(batch.tokens)
        rules = draw_rules([*queries, *(Query(row) for row in range(rows, bucket))], self.vocab)
        forbidden, labels = FORBIDDEN * bucket - len(rules.forbidden), LABELS * bucket - len(rules.label_ids)
        if forbidden < 0 or labels < 0:
            return None
        try:
            step = self._step(batch, Capacity.of(bucket, self._chunks, self.model.config.n_kv_heads))
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

    def _draw(self, hidden: torch.Tensor, rules: ops.DrawRules, start: int) -> ops.Draws:
        """start: the number of the first query among all of the step."""
        draws = ops.sample_rows(ops.wide_linear(hidden, self.model.head), rules)
        if start + len(draws.ids) <= len(
            self._drawn
        ):  # a step that scores reads more than can be drawn, and draws nothing
            self._drawn[start : start + len(draws.ids)] = draws.ids
        return draws


def _pad(x: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.from_numpy(np.pad(x.numpy(), (0, length - len(x)), constant_values=value))
