"""The keys of data and of what a round does with it: data, eft, prompts, candidates, judge, sampler, pairs, gates, evaluation.

Defaults are the paper's where it states one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine import InputError
from selfreward.recipe_group import Count, EachRound, Group, Positive, Rate, Share, Steps
from selfreward.records import FORMATS

TopP = Annotated[float, Field(gt=0, le=1)]
Rho = Annotated[float, Field(ge=0, lt=0.5)]
Shares = Annotated[tuple[Share, Share], Field(strict=False)]  # as for Betas


class Formats(Group):
    """The format of all rows of a file (records.FORMATS); null: each row is recognised by its keys."""

    ift: str | None = None
    eft: str | None = None
    eft_heldout: str | None = None
    heldout: str | None = None
    ranked: str | None = None
    prompts: str | None = None  # of prompts.file

    @model_validator(mode="after")
    def _known(self) -> Formats:
        for key, name in self.model_dump().items():
            if name is not None and name not in FORMATS:
                raise InputError(f"{key} is {name!r}, which is not read; use one of {', '.join(FORMATS)}")
        return self


class Data(Group):
    ift: Path | None = None  # instructions with human answers; this or `ranked` is needed unless m1 is given
    ift_limit: Count | None = None
    eft: Path | None = None  # ranked answers to build judge data from
    eft_limit: Count | None = None
    eft_heldout: Path | None = None  # ranked answers that measure the judge
    heldout: Path | None = None  # instructions that measure the answers; never used as prompts
    ranked: Path | None = None  # ranked answers for all of ift, eft and eft_heldout (seeds.split)
    split: Shares = (
        0.15,
        0.05,
    )  # of its prompts with ranks for eft and eft_heldout (about the paper's), the rest is ift
    language: str | None = None  # rows that state another one are left out (Open Assistant trees do)
    format: Formats = Formats()
    max_tokens: Annotated[int, Field(ge=2)] = 2048  # prompt + response are cut here

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        given = [name for name in ("ift", "eft", "eft_heldout") if getattr(self, name) is not None]
        if self.ranked is not None and given:
            raise InputError(
                f"ranked gives ift, eft and eft_heldout, and {given[0]} is set too; set one of them to null"
            )
        if self.ranked is None and self.split != type(self).model_fields["split"].default:
            raise InputError("split says how `ranked` is divided, which is not set; leave it out")
        if sum(self.split) >= 1:
            raise InputError(f"split is {list(self.split)}, which leaves nothing for ift; lower the two shares")
        return self

    @property
    def has_ift(self) -> bool:
        return self.ift is not None or self.ranked is not None

    @property
    def has_eft(self) -> bool:
        return self.eft is not None or self.ranked is not None


class Sampling(Group):
    temperature: Rate = 0.7
    top_p: TopP = 0.9


class EFT(Sampling):
    """Judge data: the SFT baseline writes judgements of ranked answers, those that agree with the ranks are kept."""

    required: bool = True
    attempts: Count = 6  # per group
    max_tokens: Count = 256

    @property
    def draws(self) -> int:
        """An attempt is one draw of every answer of a group."""
        return self.attempts

    @property
    def score(self) -> Literal["mean"]:
        """What is written is trained on, so what is written must agree with the ranks."""
        return "mean"


class Prompts(Sampling):
    mode: Literal["few_shot", "continue", "file"] = "few_shot"
    file: Path | None = None
    count: Count | None = None  # per round; null with a file: all of it
    temperature: Rate = 0.6
    max_tokens: Count = 256
    valid: Literal["tiny"] | None = None  # well-formedness check
    template: str = "chat"  # of few_shot: a shipped name ("plain" for a base model), or the path of a .jinja file
    shots_seed: Steps = 6  # instructions of the seed data that a request shows
    shots_generated: Steps = 2  # and new prompts; as long as there are fewer, more of the seed data
    filter: Literal["none", "similar", "self_instruct"] | None = None  # null: self_instruct in few_shot, else none
    rouge: Share = 0.7  # a prompt with a higher ROUGE-L against any other is dropped, unless the filter is none

    @property
    def level(self) -> str:
        """The filter, of filters.LEVELS."""
        return self.filter or ("self_instruct" if self.mode == "few_shot" else "none")

    @model_validator(mode="after")
    def _source(self) -> Prompts:
        if (self.mode == "file") != (self.file is not None):
            raise InputError(
                f"mode is {self.mode!r} and file is {'not ' if self.file is None else ''}set; a file belongs to mode "
                "'file', and only there"
            )
        changed = {name for name, value in self if value != type(self).model_fields[name].default}
        unused = changed & {"temperature", "top_p", "max_tokens"}
        if unused and self.mode == "file":
            raise InputError(
                f"mode is 'file', where {' and '.join(sorted(unused))} has no effect; leave it out, or set it to null"
            )
        if self.mode != "file" and self.count is None:
            raise InputError(f"mode {self.mode!r} needs count, the number of new prompts in each round")
        unused = changed & {"template", "shots_seed", "shots_generated"}
        if unused and self.mode != "few_shot":
            raise InputError(
                f"mode is {self.mode!r}, where {' and '.join(sorted(unused))} has no effect; leave it out, or set mode to "
                "few_shot"
            )
        if self.shots_seed + self.shots_generated == 0:
            raise InputError("shots_seed and shots_generated are both 0; few_shot shows at least one instruction")
        if "rouge" in changed and self.level == "none":
            raise InputError("rouge has no effect without a filter; set filter to similar or self_instruct")
        return self


class Candidates(Sampling):
    n: Annotated[int, Field(ge=2)] = 4
    max_tokens: Count = 1024

    @model_validator(mode="after")
    def _differ(self) -> Candidates:
        if self.temperature == 0:
            raise InputError("temperature is 0, which makes all candidates of a prompt equal; set it above 0")
        return self


class Judge(Sampling):
    by: Literal["model", "random", "oracle"] = (
        "model"  # the last two are controls: any score, and the tiny world's truth
    )
    template: str = "llama2"  # a shipped name, or the path of a .jinja file
    model_template: str | None = None  # of judge_model; null: `template`, which the run's models have
    draws: Count = 3
    max_tokens: Count = 256
    min_valid_draws: Count = 1
    score: Literal["mean", "expected"] = "mean"  # of the drawn scores, or of the means of their distributions
    duplicates: Literal["apart", "once"] = (
        "apart"  # answers to a prompt that have the same text: draws for each, or shared
    )

    @model_validator(mode="after")
    def _enough_draws(self) -> Judge:
        if self.score == "expected" and self.by != "model":
            raise InputError(f"by is {self.by!r}, which has no distribution of scores; set score to mean")
        if self.min_valid_draws > self.draws:
            raise InputError(f"min_valid_draws is {self.min_valid_draws}, above draws ({self.draws})")
        return self


class Sampler(Group):
    """engine.LLM's knobs."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights, keys, values; auto: bfloat16 on a GPU alone
    quantization: Literal["int8"] | None = None  # of matrices, on a CPU
    kv_cache_gb: Positive | None = None  # null: room for max_sequences, at most a quarter of a CPU's free memory
    max_batch_tokens: Count | None = None  # rows computed in one step; null: 512, on a GPU 8192
    max_sequences: Count = 256  # candidates in flight
    block_size: Count = 64  # tokens in a block of the KV cache; part of the numbers


class Pairs(Group):
    """pairs.Rules, and what follows from how far the judge agrees with itself."""

    allow_truncated_chosen: bool = False
    tie_break: Literal["index", "variance"] = "index"
    per_round = ("length_control",)
    length_control: EachRound[Rho] | None = None  # rho; null: off
    per_prompt: Count = 1  # most pairs that a prompt gives
    consistency: bool = False  # the round's label smoothing is 1 - the mean of the pairs' consistency


class Gates(Group):
    min_readable: Share = 0.5  # of all judgements
    min_score_entropy: Rate = 0.25  # bits, of the readable scores: below it one score has 96% of them or more
    max_length_drift: Positive = (
        3.0  # mean answer tokens against round 1's; the paper's M3 has 2.3 times M1's characters
    )
    min_pairs: Count = 1
    step0_tolerance: Positive = 1e-3  # nats per sequence
    parity_tolerance: Positive = 1e-3  # nats per token between the sampler's log-probs and the trainer's


class Evaluation(Group):
    oracle: Literal["tiny"] | None = None
    prompts: Count = 500
    temperature: Rate = 0.7
    greedy: bool = False  # answer a second time, greedily
    max_tokens: Count = 1024
    judge_groups: Count | None = None  # null: all held-out ones
    head_to_head: Literal["scores", "pairwise"] | None = "scores"  # how each model is compared with those before it
    pairwise_template: str = "llama2"  # of pairwise: a shipped name, or the path of a .jinja file

    @model_validator(mode="after")
    def _compared(self) -> Evaluation:
        if self.head_to_head != "pairwise" and self.pairwise_template != "llama2":
            raise InputError(
                f"head_to_head is {self.head_to_head or 'null'}, where pairwise_template has no effect; leave it out, or set "
                "head_to_head to pairwise"
            )
        return self
