"""`LLM`: batched sampling and scoring on paged keys and values.

A step: the scheduler plans rows (integers only), rows are laid out in tiles of exactly 64, the whole model runs on each
tile under one torch thread, tokens are drawn, the scheduler commits. Fixed shapes are what makes a request's bits
independent of its batch: torch's CPU operations give a row other bits in other shapes, and a row's place in a tile of
one shape does not matter. Native kernels with that property for any number of rows will replace the tiles.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine import ops
from engine.checkpoint import load_checkpoint, update_tensors
from engine.errors import InputError, NotBuiltError
from engine.kv_cache import BlockPool
from engine.model import Attend, Llama
from engine.requests import Prompt, Reader, Request, RequestOutput, stop_ids
from engine.sampling import RowParams, SamplingParams, sample
from engine.scheduler import Copy, Drawn, Group, Plan, Scheduler, Work
from engine.tokenizer import Tokenizer

TILE = 64
# Two tiles on two threads pay from about this width on; below it Python's share of a tile is too large.
PARALLEL_DIM = 512


class LLM:
    """An offline engine for many candidates per prompt and many prompts with a common beginning.

    model: a directory in HF layout, or a live Llama, whose parameters are used in place, never copied.
    kv_cache_gb None: room for `max_sequences` full contexts, at most a quarter of the free memory.
    max_batch_tokens: rows computed in one step; max_sequences: candidates in flight.
    """

    def __init__(
        self,
        model: str | Path | Llama,
        tokenizer: Tokenizer | str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        deterministic: bool | None = None,
        kv_cache_gb: float | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        max_sequences: int | None = None,
        seed: int = 0,
        block_size: int = 64,
    ) -> None:
        _check_options(device, dtype, quantization, deterministic, block_size)
        self.model = model if isinstance(model, Llama) else load_checkpoint(model)
        if self.model.embed.dtype != torch.float32:
            raise NotBuiltError(f"the model is {self.model.embed.dtype}; sampling runs in fp32 so far: load it as fp32")
        self.tokenizer = _find_tokenizer(model, tokenizer)
        config = self.model.config
        if self.tokenizer and self.tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} pieces, the model {config.vocab_size}: they do not match"
            )
        self.max_model_len = _limit("max_model_len", max_model_len, config.max_seq_len, config.max_seq_len)
        self.max_batch_tokens = _limit("max_batch_tokens", max_batch_tokens, 512)
        self.max_sequences = _limit("max_sequences", max_sequences, 256)
        self.block_size = block_size
        self._reader = Reader(self.tokenizer, config.vocab_size, self.max_model_len, seed)
        self._stats = {"requests": 0, "prompt_tokens": 0, "new_tokens": 0, "computed_rows": 0, "steps": 0}
        self._seconds = 0.0
        self._pool_of_threads: tuple[int, ThreadPoolExecutor] | None = None
        blocks = self._block_count(kv_cache_gb)
        self._pool = BlockPool(blocks, block_size)
        self._scheduler = Scheduler(self._pool, self.max_batch_tokens, self.max_sequences)
        self._allocate_pages()
        self._asleep: str | None = None
        self._source = None if isinstance(model, Llama) else Path(model)
        self._loaded_epoch = self.model.weight_epoch
        self._abort_lock = threading.Lock()
        self._to_abort: set[int] | None = set()  # indices of requests to end before the next step; None: all

    # ---- public -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Sample `params.n` candidates of every prompt; outputs in input order. A string prompt gets a BOS."""
        requests = self._requests(prompts, params)
        outputs: list[RequestOutput | None] = [None] * len(requests)
        for done, output in enumerate(self._stream(requests), start=1):
            outputs[output.index] = output
            if progress:
                print(f"\r{done}/{len(requests)} requests", end="\n" if done == len(requests) else "", flush=True)
        return [output for output in outputs if output is not None]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Like `generate`, each output once, as soon as all its candidates are finished."""
        return self._stream(self._requests(prompts, params))

    def score(self, prompt: Any, completions: Any) -> Any:
        """Raw fp32 log-probs of given completions: one list of floats per completion; a prompt is computed once.

        prompt and completions: one prompt and a list of completions, or a list of prompts and a list of such lists.
        Completions are strings (tokenised as continuations) or token ids, at least one token each.
        """
        groups, single = self._reader.scored(prompt, completions)
        for group in groups:
            self._check_fit(group, group.prompt_len + max(group.limits))
        scores = {index: [[0.0] * limit for limit in group.limits] for index, group in enumerate(groups)}
        for _ in self._run(groups, {}, scores):
            pass
        results = [scores[index] for index in range(len(groups))]
        return results[0] if single else results

    def stats(self) -> dict[str, Any]:
        """Counters since construction, tokens per second of time spent inside, and the backend of every op."""
        rate = self._stats["new_tokens"] / self._seconds if self._seconds else 0.0
        return {
            **self._stats,
            "prefix_tokens_saved": self._scheduler.prefix_tokens_saved,
            "preemptions": 0,  # admission reserves the worst case
            "seconds": self._seconds,
            "tokens_per_second": rate,
            "blocks": self._pool.num_blocks - 1,
            "backends": ops.backends("cpu"),
        }

    @property
    def weight_epoch(self) -> int:
        return self.model.weight_epoch

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of finished requests."""
        self._pool.reset()

    def update_weights(self, named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors into the model, in place, by HF's names or its own (`update_tensors`); raises `weight_epoch`.

        Keys and values of the old weights are not found any more. Works while the KV cache sleeps; InputError where the
        weights themselves sleep, or a stream is running.
        """
        if self._asleep == "weights":
            raise InputError("the weights are asleep; call wake() before update_weights()")
        if not self._scheduler.idle:
            raise InputError("a stream is running on the old weights; finish, close or abort it before the update")
        update_tensors(self.model, dict(named_tensors))

    def sleep(self, weights: bool = False) -> None:
        """Free the KV cache until `wake()`. weights=True: also the weights, if this LLM loaded them and they are unchanged."""
        if not self._scheduler.idle:
            raise InputError("a stream is running; finish, close or abort it before sleep()")
        if weights and (self._source is None or self.model.weight_epoch != self._loaded_epoch):
            whose = "belong to the caller" if self._source is None else "were updated since they were loaded"
            raise InputError(f"the weights {whose}, so wake() could not load them again; call sleep() without weights")
        self._pool.reset()
        self._keys = self._values = torch.empty(0)
        if weights:
            for parameter in self.model.parameters():
                parameter.data = torch.empty(0)
        self._asleep = "weights" if weights else "cache"

    def wake(self) -> None:
        """Take the memory that `sleep` gave back and load the weights if they slept. Awake already: nothing happens."""
        if self._asleep == "weights":
            assert self._source is not None
            fresh = dict(load_checkpoint(self._source).named_parameters())
            for name, parameter in self.model.named_parameters():
                parameter.data = fresh[name].data
            self._loaded_epoch = self.model.weights_changed()
        if self._asleep:
            self._allocate_pages()
        self._asleep = None

    def abort(self, indices: Iterable[int] | None = None) -> None:
        """End requests of the running generate or stream (None: all of them) after the step that is being computed.

        May be called from another thread, or between two items of a stream. Their outputs come with what they have so
        far, unfinished candidates with finish_reason "abort". Indices of no running request are ignored.
        """
        with self._abort_lock:
            if indices is None:
                self._to_abort = None
            elif self._to_abort is not None:
                self._to_abort = self._to_abort | set(indices)

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        requests = self._reader.requests(prompts, params)
        for request in requests:
            self._check_fit(request.group, request.group.prompt_len + 1)
        return requests

    def _check_fit(self, group: Group, tokens: int) -> None:
        if tokens > self.max_model_len:
            raise InputError(
                f"prompt {group.index} needs {tokens} tokens ({group.prompt_len} of the prompt); the context holds "
                f"{self.max_model_len}: shorten it"
            )
        if len(group.limits) > self.max_sequences:
            raise InputError(
                f"prompt {group.index} asks for {len(group.limits)} candidates; max_sequences is {self.max_sequences}"
            )
        needed, there = self._scheduler.worst_case(group), self._pool.num_blocks - 1
        if needed > there:
            raise InputError(
                f"prompt {group.index} may need {needed} KV blocks of {self.block_size} tokens; there are {there}: "
                "raise kv_cache_gb, or lower max_tokens or n"
            )

    def _block_count(self, kv_cache_gb: float | None) -> int:
        config = self.model.config
        block_bytes = 2 * 4 * config.n_layers * config.n_kv_heads * config.head_dim * self.block_size
        full = self.max_sequences * -(-self.max_model_len // self.block_size)
        if kv_cache_gb is None:
            blocks = min(full, available_memory() // 4 // block_bytes)
        elif not kv_cache_gb > 0:
            raise InputError(f"kv_cache_gb is {kv_cache_gb}; expected a size above 0")
        else:
            blocks = int(kv_cache_gb * 2**30) // block_bytes
        if blocks < 1:
            raise InputError(f"the KV cache holds no block of {block_bytes / 2**20:.1f} MB; raise kv_cache_gb")
        return int(blocks) + 1  # and the scratch block

    def _allocate_pages(self) -> None:
        config, size = self.model.config, self.block_size
        pages = (config.n_layers, self._pool.num_blocks, config.n_kv_heads)
        self._keys = torch.zeros(*pages, config.head_dim, size)
        self._values = torch.zeros(*pages, size, config.head_dim)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _stream(self, requests: list[Request]) -> Iterator[RequestOutput]:
        by_index = {request.group.index: request for request in requests}
        for group in self._run([request.group for request in requests], by_index, {}):
            yield by_index[group.index].output(self.tokenizer, self.model.weight_epoch)

    def _run(
        self, groups: list[Group], requests: dict[int, Request], scores: dict[int, list[list[float]]]
    ) -> Iterator[Group]:
        """Run all groups to their end; yields each when it is finished. Scored groups have no entry in `requests`."""
        if self._asleep:
            raise InputError("this LLM is asleep; call wake() first")
        self.model.check_weights()
        if not self._scheduler.idle:
            raise InputError("this LLM is still running an earlier stream; exhaust or close it first")
        if self._scheduler.epoch != self.model.weight_epoch:
            self._pool.reset()  # old blocks could not be found any more; make room for new ones
            self._scheduler.epoch = self.model.weight_epoch
        for group in groups:
            self._scheduler.add(group)
            self._stats["requests"] += 1
            self._stats["prompt_tokens"] += group.prompt_len
        self._to_abort = set()  # what an earlier call was asked to end is over
        try:
            while not self._scheduler.idle:
                yield from self._take_aborts(requests)
                if self._scheduler.idle:
                    break
                self._check_epoch()
                started = time.perf_counter()
                running = self._step(requests, scores)
                self._seconds += time.perf_counter() - started
                yield from (group for group in running if all(s.finished for s in group.sequences) and group.forked)
        finally:
            self._scheduler.abort_all()  # an error or a closed stream must leave nothing behind

    def _take_aborts(self, requests: dict[int, Request]) -> list[Group]:
        """End what `abort` asked for; scored groups run to their end."""
        with self._abort_lock:
            wanted, self._to_abort = self._to_abort, set()
        indices = requests.keys() if wanted is None else wanted & requests.keys()
        return self._scheduler.abort(indices) if indices else []

    def _check_epoch(self) -> None:
        """Between two items of a stream the caller may train: what runs then holds keys and values of the old weights."""
        self.model.check_weights()
        if self._scheduler.epoch != self.model.weight_epoch:
            raise InputError(
                f"the weights went from epoch {self._scheduler.epoch} to {self.model.weight_epoch} while a stream was "
                "running: finish or close the stream before the update"
            )

    def _step(self, requests: dict[int, Request], scores: dict[int, list[list[float]]]) -> list[Group]:
        plan = self._scheduler.plan()
        running = list(self._scheduler.running)
        assert plan.rows, "the scheduler planned nothing although requests are waiting"
        self._values[:, self._scheduler.fresh] = 0.0  # stale NaN times a zero weight would be NaN
        self._scheduler.fresh.clear()
        with one_thread() as threads, torch.no_grad():
            hidden = self._forward(plan, threads)
            if requests:
                drawn = self._draw(plan, hidden, requests)
            else:
                drawn = {}
                self._score(plan, hidden, scores)
        for copy in self._scheduler.commit(plan, drawn):
            self._copy(copy)
        self._stats["steps"] += 1
        self._stats["computed_rows"] += plan.rows
        self._stats["new_tokens"] += len(drawn)
        return running

    def _copy(self, copy: Copy) -> None:
        self._keys[:, copy.target, :, :, : copy.tokens] = self._keys[:, copy.source, :, :, : copy.tokens]
        self._values[:, copy.target, :, : copy.tokens] = self._values[:, copy.source, :, : copy.tokens]

    def _forward(self, plan: Plan, threads: int) -> torch.Tensor:
        """Hidden states of all rows of the plan, in order [rows, dim]."""
        rows = [(work, position) for work in plan.work for position in range(work.start, work.stop)]
        tiles = [rows[start : start + TILE] for start in range(0, len(rows), TILE)]
        out = torch.empty(len(tiles) * TILE, self.model.config.dim)

        def run(strand: list[int]) -> None:
            with torch.no_grad():  # the setting is per thread
                for tile in strand:
                    out[tile * TILE : (tile + 1) * TILE] = self._tile(tiles[tile])

        strands = _strands(tiles)
        if threads > 1 and len(strands) > 1 and self.model.config.dim >= PARALLEL_DIM:
            list(self._workers(threads).map(run, strands))
        else:
            for strand in strands:
                run(strand)
        return out[: len(rows)]

    def _workers(self, threads: int) -> ThreadPoolExecutor:
        """Kept between steps: each of its threads owns the buffers into which it gathers pages."""
        if self._pool_of_threads is None or self._pool_of_threads[0] != threads:
            executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            self._pool_of_threads = (threads, executor)
        return self._pool_of_threads[1]

    def _tile(self, rows: list[tuple[Work, int]]) -> torch.Tensor:
        """The whole model on 64 rows, padded with token 0 at position 0 of the scratch block."""
        size = self.block_size
        pad = TILE - len(rows)
        tokens = torch.tensor([work.sequence.tokens[position] for work, position in rows] + [0] * pad)
        positions = torch.tensor([position for _, position in rows] + [0] * pad)
        blocks = torch.tensor([work.sequence.blocks[position // size] for work, position in rows] + [0] * pad)
        chunks = max(position // size for _, position in rows) + 1
        tables = torch.tensor(
            [(work.sequence.blocks[: position // size + 1] + [0] * chunks)[:chunks] for work, position in rows]
            + [[0] * chunks] * pad
        )
        return self.model(tokens, positions, self._attend(blocks, positions, tables), F.linear)

    def _attend(self, blocks: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor) -> Attend:
        slots = positions % self.block_size

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[blocks, :, :, slots] = k
            values[blocks, :, slots] = v
            return ops.chunk_attention(q, keys, values, tables, positions)

        return attend

    def _draw(self, plan: Plan, hidden: torch.Tensor, requests: dict[int, Request]) -> Drawn:
        """Sample for every (last row, candidate) of the plan, in tiles of 64."""
        drawn: Drawn = {}
        queries = [(row, work, candidate) for row, work in _last_rows(plan) for candidate in work.draws]
        for start in range(0, len(queries), TILE):
            tile = queries[start : start + TILE]
            logits = self._logits(hidden, [row for row, _, _ in tile])
            owners = [requests[work.sequence.group.index] for _, work, _ in tile]
            params = RowParams.of([owner.params for owner in owners] + [SamplingParams()] * (TILE - len(tile)))
            noise = torch.zeros_like(logits)
            noise[: len(tile)] = ops.gumbel_noise(
                torch.tensor([_signed(owner.seed) for owner in owners]),
                torch.tensor([len(work.sequence.tokens) for _, work, _ in tile]),
                torch.tensor([candidate for _, _, candidate in tile]),
                0,
                logits.shape[1],
            )
            stops = [
                stop_ids(owner.params, self.tokenizer)
                if len(work.sequence.tokens) - owner.group.prompt_len < owner.params.min_tokens
                else ()
                for owner, (_, work, _) in zip(owners, tile, strict=True)
            ]
            if self.tokenizer:  # rows of the head beyond the vocabulary are padding: they are no tokens
                logits[:, self.tokenizer.vocab_size :] = -math.inf
            ids, raw, sampled = (x[: len(tile)].tolist() for x in sample(logits, params, noise, stops))
            labelled = any(owner.params.label_token_ids for owner in owners)
            everything = torch.log_softmax(logits, dim=-1) if labelled else logits
            for number, ((_, work, candidate), owner) in enumerate(zip(tile, owners, strict=True)):
                if owner.params.label_token_ids:
                    owner.labels[candidate].append(everything[number, list(owner.params.label_token_ids)].tolist())
                self._refuse_nan(raw[number], owner.group.index)
                owner.raw[candidate].append(raw[number])
                owner.sampled[candidate].append(sampled[number])
                token = ids[number]
                before = work.sequence.tokens[owner.group.prompt_len :]
                drawn[owner.group.index, candidate] = (token, owner.finish(candidate, [*before, token], self.tokenizer))
        return drawn

    def _score(self, plan: Plan, hidden: torch.Tensor, scores: dict[int, list[list[float]]]) -> None:
        """Log-probs of the given next tokens of every computed row that has one."""
        queries: list[tuple[int, int, int, int, int]] = []  # row, group, candidate, place in the completion, token
        row = 0
        for work in plan.work:
            group = work.sequence.group
            assert group.forced is not None
            if group.forked:
                for position in range(work.start, work.stop):
                    place = position + 1 - group.prompt_len
                    token = work.sequence.tokens[position + 1]
                    queries.append((row + position - work.start, group.index, work.sequence.candidate, place, token))
            else:
                last = row + work.stop - work.start - 1
                queries += [(last, group.index, c, 0, group.forced[c][0]) for c in work.draws]
            row += work.stop - work.start
        for start in range(0, len(queries), TILE):
            tile = queries[start : start + TILE]
            logp = torch.log_softmax(self._logits(hidden, [query[0] for query in tile]), dim=-1)
            for number, (_, group_index, candidate, place, token) in enumerate(tile):
                value = logp[number, token].item()
                self._refuse_nan(value, group_index)
                scores[group_index][candidate][place] = value

    def _refuse_nan(self, logp: float, index: int) -> None:
        if logp != logp:
            raise FloatingPointError(f"prompt {index}: the model's logits are NaN; are its weights?")

    def _logits(self, hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """fp32 logits [64, vocab] of these rows, padded with repetitions of the first."""
        tile = hidden[torch.tensor(rows + rows[:1] * (TILE - len(rows)))]
        return F.linear(tile, self.model.head)


@contextmanager
def one_thread() -> Iterator[int]:
    """Run torch's operations on one thread, so that sums are split the same way whatever the user's setting (yielded)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def available_memory() -> int:
    """Bytes that can be taken without swapping: the page cache counts as available, as it does in MemAvailable."""
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _strands(tiles: list[list[tuple[Work, int]]]) -> list[list[int]]:
    """Runs of neighbouring tiles that share a sequence (they must run in order); different strands are independent."""
    strands: list[list[int]] = []
    for number, tile in enumerate(tiles):
        if number and tiles[number - 1][-1][0] is tile[0][0]:
            strands[-1].append(number)
        else:
            strands.append([number])
    return strands


def _last_rows(plan: Plan) -> Iterator[tuple[int, Work]]:
    row = 0
    for work in plan.work:
        row += work.stop - work.start
        yield row - 1, work


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what an int64 tensor holds."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _limit(name: str, value: int | None, default: int, most: int | None = None) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        raise InputError(f"{name} is {value!r}; expected an integer from 1{f' to {most}' if most else ''}")
    return value


def _check_options(
    device: str, dtype: str, quantization: str | None, deterministic: bool | None, block_size: int
) -> None:
    if device not in ("auto", "cpu"):
        raise NotBuiltError(f"device is {device!r}; the sampler runs on the CPU so far")
    if dtype not in ("auto", "float32"):
        raise NotBuiltError(f"dtype is {dtype!r}; the sampler runs in float32 so far")
    if quantization is not None:
        raise NotBuiltError(f"quantization is {quantization!r}; only None is built so far")
    if deterministic not in (None, True, False):
        raise InputError(f"deterministic is {deterministic!r}; expected None, True or False")
    if deterministic is False:
        raise InputError("deterministic=False has no meaning on a CPU, where results are always batch-invariant")
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise InputError(f"block_size is {block_size!r}; expected a positive number of tokens")


def _find_tokenizer(model: Any, tokenizer: Tokenizer | str | Path | None) -> Tokenizer | None:
    if isinstance(tokenizer, (str, Path)):
        return Tokenizer(tokenizer)
    if tokenizer is None and not isinstance(model, Llama) and (Path(model) / "tokenizer.model").is_file():
        return Tokenizer(model)
    return tokenizer
