"""What every stage of a run shares: the recipe, the directory, the tokenizer, the loaded model, and the wish to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch

from engine import LLM, InputError, Llama, LoRA, Tokenizer, load_adapter, load_checkpoint, read_config
from selfreward.device import find_device, free_memory, sampler_dtype
from selfreward.few_shot import PromptTemplate
from selfreward.formats import read_jsonl
from selfreward.judge import JudgeTemplate
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.state import RunDir, row_seed
from selfreward.verdict import PairwiseTemplate

Row = dict[str, Any]
SPENT = ("seconds", "computed_rows", "new_tokens", "prefix_tokens_saved", "fork_tokens_saved")


class GateError(Exception):
    """The run must not go on: what was found and what to do next (exit code 3)."""


@contextmanager
def keys_named(where: str = "") -> Iterator[None]:
    """The sampler's complaints with the recipe's names of its knobs."""
    try:
        yield
    except InputError as error:
        raise InputError(where + str(error).replace("kv_cache_gb", "sampler.kv_cache_gb")) from None


class Stopped(Exception):
    """The run was asked to end; what was finished is saved."""


class Reached(Exception):
    """The one stage that was asked for is finished."""


@dataclass
class Run:
    """One run of the loop. `stop` is set by a signal and looked at between groups of rows and between training steps."""

    recipe: Recipe
    dir: RunDir
    tokenizer: Tokenizer
    template: JudgeTemplate
    report: Reporter
    stop: Event = field(default_factory=Event)
    judge_model_template: JudgeTemplate | None = None  # of recipe.judge_model; None: `template`
    prompt_template: PromptTemplate | None = None  # of prompts.mode few_shot
    pairwise_template: PairwiseTemplate | None = None  # of evaluation.head_to_head pairwise
    until: str | None = None  # the stage behind which the loop ends; None: it runs to its end
    _loaded: tuple[Path, LLM] | None = field(default=None)
    _spent: Counter[str] = field(default_factory=Counter)  # by samplers that are no longer loaded

    @property
    def base(self) -> Path:
        """M0's directory."""
        return self.recipe.model if self.recipe.model is not None else self.dir.file("m0/model")

    @property
    def start(self) -> Path:
        """The model that the run begins with: M0 or the given M1."""
        return self.base if self.recipe.m1 is None else self.recipe.m1

    @property
    def device(self) -> str:
        """cpu or cuda, where this run samples and trains."""
        return find_device(self.recipe)

    @property
    def rough_sampler(self) -> bool:
        """Whether the sampler rounds to bf16 or 8 bits."""
        return sampler_dtype(self.recipe) != "float32" or self.recipe.sampler.quantization is not None

    @property
    def context(self) -> int:
        """Tokens that the models of this run can see."""
        return read_config(self.start).max_seq_len

    def model(self, number: int) -> Path:
        """Directory of M_number: M1 is given or comes out of SFT, M_{k+1} out of round k."""
        if number > 1:
            return self.dir.file(f"iter_{number - 1}/model")
        if self.recipe.m1 is not None:
            return self.recipe.m1
        return self.dir.file(self.dir.counts("m1/model").get("same_as", "m1/model"))

    @property
    def prompt_model(self) -> Path:
        """The model that writes the prompts of all rounds."""
        return self.recipe.prompt_model or self.model(1)

    def llm(self, path: Path) -> LLM:
        """The sampler on a model of the run; the last one stays loaded."""
        if self._loaded is None or self._loaded[0] != path:
            self._free()
            with keys_named():
                settings = self.recipe.sampler.model_dump() | {"dtype": sampler_dtype(self.recipe)}
                self._loaded = (path, LLM(path, self.tokenizer_of(path), device=self.device, **settings))
        return self._loaded[1]

    def tokenizer_of(self, path: Path) -> Tokenizer:
        """The run's, but for a judge or a writer of prompts from elsewhere, which speaks its own vocabulary."""
        elsewhere = path in (self.recipe.judge_model, self.recipe.prompt_model)
        return Tokenizer(path) if elsewhere and (path / "tokenizer.model").is_file() else self.tokenizer

    def spent(self) -> Counter[str]:
        """What all samplers of this process have done: SPENT of `LLM.stats()`."""
        stats = {} if self._loaded is None else self._loaded[1].stats()
        return self._spent + Counter({name: stats.get(name, 0) for name in SPENT})

    def _free(self) -> None:
        """Give up the loaded weights and their KV cache before others take the memory."""
        self._spent, self._loaded = self.spent(), None
        free_memory(self.device)

    def fresh(self, path: Path, precision: str) -> Llama | LoRA:
        """A copy of a model that training may change, with the parameters that it updates in this precision: of a recipe
        with a LoRA the model that the run begins with, and the adapters beside `path`, or new ones."""
        self._free()
        options = self.recipe.lora
        if not options.rank:
            dtype = torch.bfloat16 if precision == "bf16-stochastic" else torch.float32
            return load_checkpoint(path, dtype, self.device)
        base = load_checkpoint(self.start, torch.bfloat16 if options.base == "bf16" else torch.float32, self.device)
        if path != self.start:
            return load_adapter(base, path.with_name("adapter"))
        seed = row_seed(self.recipe.seed, 0, "lora", 0) >> 1
        return LoRA(base, options.rank, options.alpha, options.targets, seed)

    def rows(self, name: str) -> list[Row]:
        return read_jsonl(self.dir.file(name))

    def check_stop(self) -> None:
        """Raise Stopped if a signal asked for it."""
        if self.stop.is_set():
            raise Stopped
