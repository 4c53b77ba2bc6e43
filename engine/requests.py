"""What a caller asks of the sampler, read and checked, and what comes back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from engine.errors import InputError
from engine.sampling import Query, SamplingParams
from engine.scheduler import Group
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class CompletionOutput:
    """One candidate. `token_ids` include the stop token if the answer ended by itself; `text` does not.

    `logprobs`: raw log-prob of each token (temperature 1, before truncation: the trainer's), `sampled_logprobs` under
    the distribution that was sampled; both None unless asked for. `cumulative_logprob`: the sum of the raw ones.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    sampled_logprobs: list[float] | None
    cumulative_logprob: float
    weight_epoch: int
    label_logprobs: list[list[float]] | None = None  # [steps, labels]; raw; None unless label_token_ids are given


@dataclass(frozen=True)
class RequestOutput:
    """One request: `index` is its place in the input."""

    index: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Request:
    """A request under way: its group in the scheduler, and per candidate what has been drawn so far.

    stops: token ids that end an answer.
    """

    def __init__(self, group: Group, params: SamplingParams, seed: int, stops: Sequence[int]) -> None:
        self.group, self.params, self.seed, self.stops = group, params, seed, tuple(stops)
        self.raw: list[list[float]] = [[] for _ in range(params.n)]
        self.sampled: list[list[float]] = [[] for _ in range(params.n)]
        self.labels: list[list[list[float]]] = [[] for _ in range(params.n)]  # per step
        self.cut: list[str | None] = [None] * params.n  # the text up to the stop string that was found

    def query(self, row: int, candidate: int, position: int) -> Query:
        """For the token at `position` of a candidate, from the logits of `row`."""
        early = position - self.group.prompt_len < self.params.min_tokens
        labels = self.params.label_token_ids or ()
        return Query(row, self.params, self.seed, position, candidate, self.stops if early else (), labels)

    def take(
        self,
        candidate: int,
        tokens: list[int],
        place: int,
        token: int,
        raw: float,
        sampled: float,
        labels: list[float],
        tokenizer: Tokenizer | None,
    ) -> str | None:
        """Keep what was drawn behind tokens[:place]; returns why the candidate ends with it, or None."""
        self.raw[candidate].append(raw)
        self.sampled[candidate].append(sampled)
        if labels:
            self.labels[candidate].append(labels)
        if token in self.stops:
            return "stop"
        if self.params.stop and tokenizer:
            generated = [*tokens[self.group.prompt_len : place], token]
            self.cut[candidate] = _before_stop(generated, self.params, tokenizer)
            if self.cut[candidate] is not None:
                return "stop"
        added = place + 1 - self.group.prompt_len
        return "length" if added >= self.group.limits[candidate] else None

    def output(self, tokenizer: Tokenizer | None, weight_epoch: int) -> RequestOutput:
        outputs = []
        for sequence in self.group.sequences:
            c, ids = sequence.candidate, sequence.tokens[self.group.prompt_len :]
            outputs.append(
                CompletionOutput(
                    index=c,
                    text=self._text(c, ids, sequence.finished, tokenizer),
                    token_ids=ids,
                    finish_reason=sequence.finished or "length",
                    logprobs=self.raw[c] if self.params.logprobs else None,
                    sampled_logprobs=self.sampled[c] if self.params.logprobs else None,
                    cumulative_logprob=sum(self.raw[c]),
                    weight_epoch=weight_epoch,
                    label_logprobs=self.labels[c] if self.params.label_token_ids else None,
                )
            )
        return RequestOutput(self.group.index, self.group.prompt, outputs)

    def _text(self, candidate: int, ids: list[int], reason: str | None, tokenizer: Tokenizer | None) -> str:
        if tokenizer is None:
            return ""
        cut = self.cut[candidate]
        if cut is not None:
            return cut
        return tokenizer.decode(ids[:-1] if reason == "stop" else ids)


def _before_stop(generated: list[int], params: SamplingParams, tokenizer: Tokenizer) -> str | None:
    """The text before the first stop string behind the first `min_tokens` tokens, or None.

    While nothing is found only the end is decoded: as many tokens as it takes to have the longest stop string's
    characters and a few more, since the first character may be a part of one, or a space that decoding drops.
    """
    stops = params.stop or ()
    enough = max(len(stop) for stop in stops) + 4
    count = 2 * enough
    tail = tokenizer.decode(generated[-count:])
    while len(tail) < enough and count < len(generated):
        count *= 2
        tail = tokenizer.decode(generated[-count:])
    if not any(stop in tail for stop in stops):
        return None
    text = tokenizer.decode(generated)
    before = tokenizer.decode(generated[: params.min_tokens]) if params.min_tokens else ""
    # A character of which only some bytes are there is not there yet.
    begin = len(os.path.commonprefix([before, text]))  # noqa: RUF071 (character by character is wanted)
    found = min((at for at in (text.find(stop, begin) for stop in stops) if at >= 0), default=None)
    return None if found is None else text[:found]


def stop_ids(params: SamplingParams, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids that end an answer: those asked for, and EOS (without a tokenizer Llama's, 2) unless it is ignored."""
    ids = list(params.stop_token_ids or ())
    return ids if params.ignore_eos else [*ids, tokenizer.eos_id if tokenizer else 2]


class Reader:
    """Turns what a caller gives into requests; InputError names the prompt, what was found and what was expected."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int, seed: int) -> None:
        if not isinstance(seed, int):
            raise InputError(f"seed is {seed!r}; expected an integer")
        self.tokenizer, self.vocab_size, self.max_model_len, self.seed = tokenizer, vocab_size, max_model_len, seed
        self._number = count()

    def requests(self, prompts: Any, params: Any) -> list[Request]:
        many = [prompts] if isinstance(prompts, (str, Mapping)) or _is_ids(prompts) else prompts
        if not isinstance(many, Sequence):
            raise InputError(f"prompts is {prompts!r:.60}; expected text, a list of token ids, or a list of those")
        each = list(params) if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise InputError(
                f"there are {len(many)} prompts and {len(each)} SamplingParams; give one, or one per prompt"
            )
        return [self._request(index, prompt, one) for index, (prompt, one) in enumerate(zip(many, each, strict=True))]

    def scored(self, prompt: Any, completions: Any) -> tuple[list[Group], bool]:
        """Groups with given continuations, and whether a single prompt was asked for."""
        single = isinstance(prompt, (str, Mapping)) or _is_ids(prompt)
        prompts, answers = ([prompt], [completions]) if single else (prompt, completions)
        for name, given in (("prompt", prompts), ("completions", answers)):
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InputError(
                    f"{name} is {given!r:.60}; expected one prompt and a list of completions, or lists of both"
                )
        if len(prompts) != len(answers):
            raise InputError(f"there are {len(prompts)} prompts and {len(answers)} lists of completions")
        groups = []
        for index, (one, given) in enumerate(zip(prompts, answers, strict=True)):
            ids = self._prompt_ids(one, index)
            if isinstance(given, str) or not isinstance(given, Sequence) or _is_ids(given):
                raise InputError(f"the completions of prompt {index} are {given!r:.40}; expected a list of completions")
            forced = [self._completion_ids(text, index) for text in given]
            if not forced:
                raise InputError(f"prompt {index} has no completions to score")
            groups.append(Group(index, ids, [len(tokens) for tokens in forced], forced))
        return groups, single

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        if not isinstance(params, SamplingParams):
            raise InputError(f"the params of prompt {index} are a {type(params).__name__}; expected SamplingParams")
        if params.stop and self.tokenizer is None:
            raise InputError(f"prompt {index} asks for stop strings; this LLM has no tokenizer to find them with")
        ids = self._prompt_ids(prompt, index)
        for name in ("label_token_ids", "stop_token_ids"):
            bad = next((token for token in getattr(params, name) if token >= self.vocab_size), None)
            if bad is not None:
                raise InputError(f"prompt {index}: {name} holds {bad}; {self._vocabulary()}")
        limit = min(params.max_tokens, self.max_model_len - len(ids))
        seed = params.seed if params.seed is not None else self._own_seed()
        stops = [token for token in stop_ids(params, self.tokenizer) if token < self.vocab_size]  # EOS may be beyond
        return Request(Group(index, ids, [limit] * params.n), params, seed, stops)

    def _own_seed(self) -> int:
        digest = hashlib.blake2b(f"{self.seed} {next(self._number)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _prompt_ids(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(f"prompt {index} is text; this LLM has no tokenizer: give token ids")
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
        return self._checked(ids, f"prompt {index}")

    def _completion_ids(self, completion: str | Sequence[int], index: int) -> list[int]:
        if isinstance(completion, str):
            if self.tokenizer is None:
                raise InputError(f"a completion of prompt {index} is text; this LLM has no tokenizer: give token ids")
            completion = self.tokenizer.encode(completion, continuation=True)
        return self._checked(completion, f"a completion of prompt {index}")

    def _checked(self, ids: Any, name: str) -> list[int]:
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise InputError(f"{name} is {ids!r:.60}; expected text or a list of token ids")
        if not ids:
            raise InputError(f"{name} is empty; give at least one token")
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"{name} holds token {bad}; {self._vocabulary()}")
        return list(ids)

    def _vocabulary(self) -> str:
        return f"the model's vocabulary is 0..{self.vocab_size - 1}"


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, (list, tuple)) and bool(prompts) and type(prompts[0]) is int
