"""`LLM`: batched sampling and scoring on paged keys and values.

A step: the scheduler plans rows (integers only), `make_batch` turns them into tensors, the model runs on all of them at
once, tokens are drawn, the scheduler commits. Every operation gives a row the same bits for any number of rows
(kernels/linear.py, rms_norm, swiglu, chunk_attention, sample), so a request's bits do not depend on its company.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import ops
from engine.answers import Answers, Asked, Drawing, Scoring
from engine.batch import make_batch
from engine.checkpoint import load_checkpoint, reload_checkpoint, update_tensors
from engine.copies import copy_in
from engine.errors import InputError, NotBuiltError
from engine.kv_cache import BlockPool
from engine.lora import LoRA
from engine.model import Llama
from engine.packed import PackedWeights
from engine.requests import Prompt, Reader, Request, RequestOutput
from engine.runner import CpuRunner, Done
from engine.runner_gpu import GpuRunner, Pending
from engine.sampling import SamplingParams
from engine.scheduler import Group, Plan, Scheduler
from engine.tokenizer import Tokenizer


class LLM:
    """An offline engine for many candidates per prompt and many prompts with a common beginning.

    model: a directory in HF's or Meta's layout, or a live Llama, whose parameters are used in place, or a live LoRA, of
    which a merged copy is sampled. On a CPU products read packed matrices: copies of a live model's; those of a directory
    are packed as they are read, and nothing else is kept of them. dtype: of weights, keys and values; on a CPU "float32"
    or "bfloat16", and the rows between products are float32 in either; "auto": a live model's own, of a directory float32
    on a CPU and bfloat16 on a GPU. A live model of another dtype is sampled through a copy, the trainer's own where it
    computes in one. Copies follow the model's weight epoch.
    quantization: "int8", on a CPU: matrices, and the rows they are multiplied with, are rounded to 8 bits.
    kv_cache_gb None: room for `max_sequences` full contexts, at most a quarter of the free memory, of a GPU's nine tenths
    less what a step takes. max_batch_tokens: rows computed in one step; max_sequences: candidates in flight.
    """

    def __init__(
        self,
        model: str | Path | Llama | LoRA,
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
        _check_options(quantization, block_size)
        self._packed = PackedWeights(quantization)
        self.model = _find_model(model, str(device), str(dtype).removeprefix("torch."), self._packed)
        self.device, self._dtype = self.model.embed.device, self.model.embed.dtype
        if quantization and self._on_gpu:
            raise NotBuiltError(f"quantization is {quantization!r}; on a GPU only None is built so far")
        _check_deterministic(deterministic, self.device.type)
        ops.backends(self.device.type)  # a SELFREWARD_BACKEND that nothing has is refused here, not in the first step
        if self._on_gpu and block_size not in GPU_BLOCKS:
            raise InputError(f"block_size is {block_size}; on a GPU expected one of {GPU_BLOCKS}")
        self.tokenizer = _find_tokenizer(model, tokenizer)
        config = self.model.config
        if self.tokenizer and self.tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} pieces, the model {config.vocab_size}: they do not match"
            )
        self.max_model_len = _limit("max_model_len", max_model_len, config.max_seq_len, config.max_seq_len)
        self.max_batch_tokens = _limit("max_batch_tokens", max_batch_tokens, 8192 if self._on_gpu else 512)
        self.max_sequences = _limit("max_sequences", max_sequences, 256)
        self.block_size = block_size
        self._reader = Reader(self.tokenizer, config.vocab_size, self.max_model_len, seed)
        vocab = self.tokenizer.vocab_size if self.tokenizer else config.vocab_size  # rows behind it are no tokens
        self._runner = (
            GpuRunner(self.model, block_size, vocab, self.max_model_len)
            if self._on_gpu
            else CpuRunner(self.model, self._packed, block_size, vocab)
        )
        self._stats: dict[str, float] = dict.fromkeys(_COUNTERS, 0)
        blocks = self._block_count(kv_cache_gb)
        self._pool = BlockPool(blocks, block_size)
        self._scheduler = Scheduler(self._pool, self.max_batch_tokens, self.max_sequences)
        self._overlap = self._on_gpu  # plan the next step before the last one's tokens are read; the same results
        self._pending: _Launched | None = None
        self._grouped = True  # read a shared chunk once for all its rows; off only to measure what that saves
        self._runner.allocate(blocks)
        self._asleep: str | None = None
        self._source = None if isinstance(model, (Llama, LoRA)) else Path(model)
        self._live = model if isinstance(model, (Llama, LoRA)) else self.model  # what `self.model` is, or is a copy of
        self._loaded_epoch = self.model.weight_epoch
        self._running: object | None = None  # the call of `_run` that is not over yet
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
                print(
                    f"\r{done}/{len(requests)} requests",
                    end="\n" if done == len(requests) else "",
                    file=sys.stderr,
                    flush=True,
                )
        finished = [output for output in outputs if output is not None]
        assert len(finished) == len(requests), "a request was lost"
        return finished

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
        for _ in self._run(groups, Scoring(scores)):
            pass
        results = list(scores.values())
        return results[0] if single else results

    def stats(self) -> dict[str, Any]:
        """Counters since construction, and the backend of every op.

        computed_rows: tokens that went through the model, recomputed_tokens among them; head_rows: of those, through the
        head; prefix_tokens_saved: prompt tokens that other requests had computed, fork_tokens_saved: that a request's first
        candidate had computed for the others. prefill_tokens: prompt tokens computed, which without preemptions are those of
        full blocks that nobody had asked for before (block_tokens) and of every request's last, partial block (tail_tokens),
        less what was copied from another request's block (copied_tokens); a prompt that others had computed to its end
        computes its last token again. seconds: time spent in steps; host_seconds: of it outside the model's
        operations, among them scheduler_seconds, for planning, laying out and committing. tokens_per_second: new tokens;
        scoring has none. kv_bytes_read: keys and values of the items of attention, each once; kv_bytes_ungrouped: what
        they would be if every sequence read its own. replayed_steps: whose kernels were launched all at once, on a GPU as
        a graph.
        """
        scheduler, stats = self._scheduler, self._stats
        return {
            **stats,
            "head_rows": self._runner.head_rows,
            "replayed_steps": self._runner.replayed_steps,
            "prefix_tokens_saved": scheduler.prefix_tokens_saved,
            "fork_tokens_saved": scheduler.fork_tokens_saved,
            "prefill_tokens": scheduler.prefill_tokens,
            "block_tokens": scheduler.block_tokens,
            "tail_tokens": scheduler.tail_tokens,
            "copied_tokens": scheduler.copied_tokens,
            "preemptions": scheduler.preemptions,
            "recomputed_tokens": scheduler.recomputed_tokens,
            "tokens_per_second": stats["new_tokens"] / stats["seconds"] if stats["seconds"] else 0.0,
            "blocks": self._pool.num_blocks - 1,
            "packed_bytes": self._runner.packed_bytes(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "quantization": self._packed.quantization,
            "backends": ops.backends(self.device.type),
        }

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def weight_epoch(self) -> int:
        return self._live.weight_epoch

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
        if self._running:
            raise InputError("a stream is running on the old weights; finish or close it before the update")
        try:
            tensors = dict(named_tensors)
        except (TypeError, ValueError) as error:
            raise InputError(f"named_tensors is {named_tensors!r:.60}; expected tensors by name ({error})") from error
        if isinstance(self._live, LoRA):
            raise InputError(
                "this LLM samples a LoRA, merged; update its adapters or its base, and call weights_changed()"
            )
        update_tensors(self._live, tensors, self._packed.write)

    def sleep(self, weights: bool = False) -> None:
        """Free the KV cache and packed copies of weights until `wake()`.

        weights=True: also the weights themselves, if this LLM loaded them and they are unchanged.
        """
        if self._running:
            raise InputError("a stream is running; finish or close it before sleep()")
        if weights and (self._source is None or self.model.weight_epoch != self._loaded_epoch):
            whose = "belong to the caller" if self._source is None else "were updated since they were loaded"
            raise InputError(f"the weights {whose}, so wake() could not load them again; call sleep() without weights")
        self._pool.reset()
        self._runner.release()
        if weights:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.new_empty(0)
            self._packed.forget()
        self._asleep = "weights" if weights or self._asleep == "weights" else "cache"

    def wake(self) -> None:
        """Take the memory that `sleep` gave back and load the weights if they slept. Awake already: nothing happens."""
        if self._asleep == "weights":
            assert self._source is not None
            reload_checkpoint(self.model, self._source, self._packed.take)
            self._loaded_epoch = self.model.weight_epoch
        if self._asleep:
            self._runner.allocate(self._pool.num_blocks)
        self._asleep = None

    def abort(self, indices: Iterable[int] | None = None) -> None:
        """End requests of the running generate or stream (None: all of them) after the step that is being computed.

        May be called from another thread, between two items of a stream, or before its first. Their outputs come with what
        they have so far, unfinished candidates with finish_reason "abort". Indices of no running request are ignored.
        """
        if indices is not None and not isinstance(indices, Iterable):
            raise InputError(f"indices is {indices!r}; expected the indices of requests, or None for all")
        with self._abort_lock:
            if indices is None:
                self._to_abort = None
            elif self._to_abort is not None:
                self._to_abort = self._to_abort | set(indices)

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        requests = self._reader.requests(prompts, params)
        for request in requests:
            self._check_fit(request.group, request.group.prompt_len + 1)
        if not self._running:
            with self._abort_lock:
                self._to_abort = set()  # what was asked while nothing ran is nothing to these requests
        return requests

    def _check_fit(self, group: Group, tokens: int) -> None:
        if tokens > self.max_model_len:
            raise InputError(
                f"prompt {group.index} needs {tokens} tokens ({group.prompt_len} of the prompt); the context holds "
                f"{self.max_model_len}: shorten it"
            )
        needed, there = self._scheduler.worst_case(group), self._pool.num_blocks - 1
        if needed > there:
            raise InputError(
                f"prompt {group.index} may need {needed} KV blocks of {self.block_size} tokens; there are {there}: "
                "raise kv_cache_gb, or lower max_tokens"
            )

    @property
    def _slot_bytes(self) -> int:
        """Of a token's keys and values, all layers."""
        config = self.model.config
        return 2 * self.model.embed.itemsize * config.n_layers * config.n_kv_heads * config.head_dim

    def _block_count(self, kv_cache_gb: float | None) -> int:
        block_bytes = self._slot_bytes * self.block_size
        full = self.max_sequences * -(-self.max_model_len // self.block_size)
        available = available_memory(self.device)
        if kv_cache_gb is None:
            if isinstance(self._runner, GpuRunner):
                room = int(0.9 * available) - self._runner.step_bytes(self.max_batch_tokens, self.max_sequences)
            else:
                room = available // 4
            blocks = min(full, max(0, room) // block_bytes)
        elif not isinstance(kv_cache_gb, (int, float)) or isinstance(kv_cache_gb, bool) or not kv_cache_gb > 0:
            raise InputError(f"kv_cache_gb is {kv_cache_gb!r}; expected a size above 0")
        elif kv_cache_gb * 2**30 > available:
            raise InputError(f"kv_cache_gb is {kv_cache_gb}; {available / 2**30:.1f} GB of memory are free: lower it")
        else:
            blocks = int(kv_cache_gb * 2**30) // block_bytes
        if blocks < 1:
            raise InputError(f"the KV cache holds no block of {block_bytes / 2**20:.1f} MB; raise kv_cache_gb")
        return int(blocks) + 1  # and block 0

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _stream(self, requests: list[Request]) -> Iterator[RequestOutput]:
        by_index = {request.group.index: request for request in requests}
        del requests  # so that what has been yielded can be forgotten: 3 KB a request
        groups = [request.group for request in by_index.values()]
        for group in self._run(groups, Drawing(by_index, self.tokenizer)):
            output = by_index.pop(group.index).output(self.tokenizer, self._scheduler.epoch)
            group.sequences.clear()  # they point back to the group: a cycle would stay until the garbage collector comes
            yield output

    def _run(self, groups: list[Group], reader: Drawing | Scoring) -> Iterator[Group]:
        """Run all groups to their end; yields each when it is finished. Empties the list: the scheduler has them."""
        if self._asleep:
            raise InputError("this LLM is asleep; call wake() first")
        if self._running:
            raise InputError("this LLM is still running an earlier stream; exhaust or close it first")
        if self.model.embed.dtype != self._dtype or copy_in(self._live, self._dtype) is not self.model:
            raise InputError(
                f"the model was converted from {self._dtype} to {self._live.embed.dtype} since this LLM was made: make a new one"
            )
        if self._scheduler.epoch != self.model.weight_epoch:
            self._pool.reset()  # old blocks could not be found any more; make room for new ones
            self._scheduler.epoch = self.model.weight_epoch
        self._runner.follow_weights()
        self._running = object()
        try:
            self._scheduler.add(groups)
            self._count(requests=len(groups), prompt_tokens=sum(group.prompt_len for group in groups))
            groups.clear()
            while not self._scheduler.idle:
                if self._to_abort != set():
                    done = self._settle(reader) + self._take_aborts(reader)
                elif self._overlap:
                    done = self._overlapped_step(reader)
                else:
                    done = self._step(reader)
                if done:
                    yield from done
                    self._check_epoch()
            self._settle(reader)  # what was under way for sequences that had ended
        finally:
            self._wait()
            self._scheduler.abort_all()  # an error or a closed stream must leave nothing behind
            with self._abort_lock:
                self._to_abort = set()
            self._running = None

    def _take_aborts(self, reader: Drawing | Scoring) -> list[Group]:
        """End what `abort` asked for; scored groups run to their end."""
        with self._abort_lock:
            wanted, self._to_abort = self._to_abort, set()
        indices = reader.requests.keys() if wanted is None else wanted & reader.requests.keys()
        return self._scheduler.abort(indices) if indices else []

    def _check_epoch(self) -> None:
        """Between two items of a stream the caller may train: what runs then holds keys and values of the old weights."""
        if self._scheduler.idle:
            return
        self._live.check_weights()
        if self._scheduler.epoch != self.weight_epoch:
            raise InputError(
                f"the weights went from epoch {self._scheduler.epoch} to {self.weight_epoch} while a stream was "
                "running: finish or close the stream before the update"
            )

    def _step(self, reader: Drawing | Scoring) -> list[Group]:
        """A step from plan to tokens."""
        self._pending = self._launch(reader)
        assert self._pending, "the scheduler planned nothing although requests are waiting"
        self._scheduler.advance(self._pending.plan)
        return self._settle(reader)

    def _overlapped_step(self, reader: Drawing | Scoring) -> list[Group]:
        """The same parts in another order: the step before is read when this one is under way."""
        launched = self._launch(reader)
        assert launched or self._pending, "the scheduler planned nothing although requests are waiting"
        done = self._settle(reader)
        if launched:
            self._scheduler.advance(launched.plan)
        self._pending = launched
        return done

    def _launch(self, reader: Drawing | Scoring) -> _Launched | None:
        """Plan a step and send it on its way; None if nothing can be planned before the last step's tokens are known."""
        started = time.perf_counter()
        plan = self._scheduler.plan()
        if not plan.work:
            self._scheduler.drop(plan)
            return None
        before = self._pending
        drawing = {} if before is None else before.draws()
        batch = make_batch(plan, self.block_size, self._grouped, drawing)
        planned = time.perf_counter()
        asked = reader.ask(plan)
        kernels = self._runner.seconds
        running = self._runner.launch(batch, asked.queries)
        ended = time.perf_counter()
        self._count(
            steps=1,
            computed_rows=plan.rows,
            kv_bytes_read=batch.slots_read * self._slot_bytes,
            kv_bytes_ungrouped=batch.slots_ungrouped * self._slot_bytes,
            seconds=ended - started,
            scheduler_seconds=planned - started,
            host_seconds=ended - started - (self._runner.seconds - kernels),
        )
        return _Launched(plan, asked, running)

    def _settle(self, reader: Drawing | Scoring) -> list[Group]:
        """Read the step that is under way, if there is one; returns the groups that are done."""
        launched, self._pending = self._pending, None
        if launched is None:
            return []
        started = time.perf_counter()
        answers = Answers(*(column.tolist() for column in launched.running.read()))
        read = time.perf_counter()
        drawn = reader.take(launched.asked, answers)
        taken = time.perf_counter()
        done = self._scheduler.settle(launched.plan, drawn)
        ended = time.perf_counter()
        self._count(
            new_tokens=len(drawn),
            seconds=ended - started,
            scheduler_seconds=ended - taken,
            host_seconds=ended - read,
        )
        return done

    def _wait(self) -> None:
        """Let a step end that nobody will read: what it was copied from may then be written again."""
        launched, self._pending = self._pending, None
        if launched:
            with suppress(Exception):  # it may be the step that failed
                launched.running.read()

    def _count(self, **counts: float) -> None:
        for name, count in counts.items():
            self._stats[name] += count


class _Launched(NamedTuple):
    """A step that is under way."""

    plan: Plan
    asked: Asked
    running: Done | Pending

    def draws(self) -> dict[tuple[int, int], int]:
        """(group index, candidate) -> the number of its query."""
        wanted = [(work.sequence.group.index, candidate) for work in self.plan.work for candidate in work.draws]
        return {draw: number for number, draw in enumerate(wanted)}


_COUNTERS = (
    "requests",
    "prompt_tokens",
    "new_tokens",
    "computed_rows",
    "steps",
    "kv_bytes_read",
    "kv_bytes_ungrouped",
    "seconds",
    "scheduler_seconds",
    "host_seconds",
)


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken: of a GPU, or without swapping, where the page cache counts as it does in MemAvailable."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch's allocator keeps after that lies in pieces
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit(name: str, value: int | None, default: int, most: int | None = None) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        raise InputError(f"{name} is {value!r}; expected an integer from 1{f' to {most}' if most else ''}")
    return value


def _find_model(model: str | Path | Llama | LoRA, device: str, dtype: str, packed: PackedWeights) -> Llama:
    """The model on its device, loaded there if it is a directory; on a CPU `packed` takes its matrices."""
    if not isinstance(model, (str, Path, Llama, LoRA)):
        raise InputError(f"model is {model!r:.60}; expected a Llama or a LoRA, or the path of a checkpoint's directory")
    if device.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {device!r}; expected auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, and torch finds no GPU here: leave device out for the CPU")
    if dtype not in ("auto", *DTYPES):
        hint = "; 8 bits are quantization='int8'" if dtype == "int8" else ""
        raise InputError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}{hint}")
    if isinstance(model, (str, Path)):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        wanted = dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        _check_cpu_dtype(device, wanted)
        if ":" in device and torch.device(device).index != torch.cuda.current_device():
            raise InputError(f"device is {device!r}; call torch.cuda.set_device of it and give 'cuda'")
        return load_checkpoint(model, DTYPES[wanted], device, packed.take)
    if model.embed.is_cuda and model.embed.device.index != torch.cuda.current_device():
        raise InputError(f"the model is on {model.embed.device}; call torch.cuda.set_device of it first")
    place, found = model.embed.device, str(model.embed.dtype).removeprefix("torch.")
    if device != "auto" and torch.device(device).type != place.type:
        raise InputError(f"device is {device!r} and the model is on {place}: move one of them")
    wanted = found if dtype == "auto" else dtype
    _check_cpu_dtype(place.type, wanted)
    return copy_in(model, DTYPES[wanted])


GPU_BLOCKS = (8, 16, 32, 64, 128)  # tiles of its kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_cpu_dtype(device: str, dtype: str) -> None:
    if device == "cpu" and dtype not in ("float32", "bfloat16"):
        raise NotBuiltError(f"dtype is {dtype!r}; a CPU samples in float32 or bfloat16: load the model as one of them")


def _check_deterministic(deterministic: bool | None, device: str) -> None:
    if deterministic not in (None, True, False):
        raise InputError(f"deterministic is {deterministic!r}; expected None, True or False")
    if deterministic is False and device == "cpu":
        raise InputError("deterministic=False has no meaning on a CPU, where results are always batch-invariant")
    if deterministic and device == "cpu" and ops.choose("linear", "cpu").name != "native":
        raise InputError("deterministic=True needs the native kernels, and SELFREWARD_BACKEND asks for others")
    if deterministic and device == "cuda":
        raise NotBuiltError("deterministic=True is not built for a GPU: its products round by the batch; leave it out")


def _check_options(quantization: str | None, block_size: int) -> None:
    if quantization not in (None, "int8"):
        raise InputError(f"quantization is {quantization!r}; expected None or 'int8'")
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise InputError(f"block_size is {block_size!r}; expected a positive number of tokens")


def _find_tokenizer(model: Any, tokenizer: Tokenizer | str | Path | None) -> Tokenizer | None:
    if isinstance(tokenizer, (str, Path)):
        return Tokenizer(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer is {tokenizer!r}; expected a Tokenizer or the path of one")
    if tokenizer is None and isinstance(model, (str, Path)) and (Path(model) / "tokenizer.model").is_file():
        return Tokenizer(model)
    return tokenizer
