"""The recipe of a run: every key with its default, from a YAML file and `key.sub=value` overrides.

Command line beats file beats default. The defaults are the paper's (arXiv 2401.10020, section 3.1) where it states one.
Nothing is coerced: `true` is no string, `"4"` is no number. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from engine import PRESETS, InputError, LlamaConfig
from selfreward.recipe_errors import FORMS, Source, explained
from selfreward.recipe_file import (
    PACKAGE,
    PATH_KEYS,
    TEMPLATE_KEYS,
    at,
    is_path,
    merged,
    parse_override,
    read_yaml,
    recipe_file,
    with_absolute_paths,
)
from selfreward.records import FORMATS

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rho = Annotated[float, Field(ge=0, lt=0.5)]
Shares = Annotated[tuple[Share, Share], Field(strict=False)]  # as for Betas
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML knows lists only; the two numbers stay strict


T = TypeVar("T")
_form = Discriminator(lambda value: FORMS[isinstance(value, list)])
EachRound = Annotated[Annotated[T, Tag(FORMS[0])] | Annotated[list[T], Tag(FORMS[1])], _form]


class Group(BaseModel):
    """Keys that belong together. Those in `per_round` may be a list with a value for each round."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    per_round: ClassVar[tuple[str, ...]] = ()

    def by_round(self) -> dict[str, list[Any]]:
        """The keys that are lists with a value for each round."""
        return {name: value for name in self.per_round if isinstance(value := getattr(self, name), list)}

    def of_round(self, k: int) -> dict[str, Any]:
        """The values as round `k` has them, from 1."""
        return self.model_dump() | {name: values[k - 1] for name, values in self.by_round().items()}


class Init(Group):
    """A Llama with random weights, for trials without a checkpoint: a preset, a shape, or a preset with changes."""

    preset: Literal["7B", "13B", "70B"] | None = None
    dim: Count | None = None
    n_layers: Count | None = None
    n_heads: Count | None = None
    n_kv_heads: Count | None = None
    ffn_dim: Count | None = None
    seed: Steps = 0

    def config(self, vocab_size: int) -> LlamaConfig:
        """The shape, with head_dim = dim / n_heads. InputError if it is incomplete or does not fit together."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.preset is None and len(given) < len(names):
            raise InputError(
                f"without a preset all of {', '.join(names)} are needed; found {', '.join(given) or 'none'}"
            )
        shape = replace(PRESETS[self.preset] if self.preset else LlamaConfig(), vocab_size=vocab_size)
        dim, n_heads = given.get("dim", shape.dim), given.get("n_heads", shape.n_heads)
        if dim % n_heads:
            raise InputError(f"dim is {dim}, not a multiple of n_heads ({n_heads})")
        return replace(shape, **given, head_dim=dim // n_heads)

    @model_validator(mode="after")
    def _fits_together(self) -> Init:
        self.config(vocab_size=32000)
        return self


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


class SFT(Group):
    """engine.SFTConfig without its seed."""

    lr: Rate = 5.5e-6
    min_lr: Rate = 1.1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Steps = 0
    epochs: Count = 1
    max_steps: Count | None = None
    batch_size: Count = 16
    weight_decay: Rate = 0.0
    betas: Betas = (0.9, 0.95)
    clip: Positive = 1.0
    max_pack_tokens: Count = 4096
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    save_every: Count | None = 100  # steps between two saved states, from which an interrupted training goes on
    activation_checkpointing: Literal["none", "full"] = "none"  # full: less memory, a forward more, the same bits
    precision: Literal["fp32", "bf16-copy", "bf16-stochastic"] = "fp32"  # of parameters, forward and update

    @model_validator(mode="after")
    def _rates(self) -> SFT:
        for low, high in zip(_listed(self.min_lr, self.lr), _listed(self.lr, self.min_lr), strict=False):
            if low > high:  # lists of another length than there are rounds are the recipe's to refuse
                raise InputError(f"min_lr is {low}, above lr ({high}); lower min_lr too")
        return self


def _listed(value: float | list[float], other: float | list[float]) -> list[float]:
    """A number as often as the other key has values."""
    if isinstance(value, list):
        return value
    return [value] * (len(other) if isinstance(other, list) else 1)


class DPO(SFT):
    """engine.DPOConfig without its seed. lr, min_lr and beta: a number, or a list with one for each round."""

    per_round = ("lr", "min_lr", "beta")
    lr: EachRound[Rate] = 1e-6  # type: ignore[assignment]
    min_lr: EachRound[Rate] = 1e-7  # type: ignore[assignment]
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    beta: EachRound[Positive] = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # how probable it is that a label is wrong
    nll_weight: Rate = 0.0  # of the chosen answers' loss beside the preference loss
    replay_weight: Rate = 0.0  # of the judge data's loss beside DPO's, which otherwise wears the judge down
    replay_batch_size: Count = 16


class Adapters(Group):
    """engine.LoRA, for SFT and DPO. Its learning rates are higher than those of full fine-tuning: 1e-4 is common."""

    rank: Steps = 0  # 0: all weights are trained
    alpha: Positive = 32.0
    targets: list[Projection] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base: Literal["fp32", "bf16"] = "fp32"  # M0's numbers, which stay as they are, and those of the exported models

    @model_validator(mode="after")
    def _on(self) -> Adapters:
        unused = self.model_fields_set - {"rank"}
        if unused and "rank" not in self.model_fields_set:
            raise InputError(
                f"{' and '.join(sorted(unused))} has no effect without rank, which is missing; set it (0: no LoRA)"
            )
        if not self.targets:
            raise InputError("targets is empty; name at least one projection, or set rank to 0")
        return self


class KeepBest(Group):
    """engine.Heldout, for SFT and DPO: a share of the prompts is measured instead of trained on, and the model ends with the
    weights under which their loss was least. (The paper compares answers to its validation prompts every 200 steps.)"""

    share: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # of instructions, and of a round's prompts with pairs; 0: off
    every: Count = 200  # steps
    patience: Count | None = None  # measurements without a better one after which a training ends; null: never

    @model_validator(mode="after")
    def _on(self) -> KeepBest:
        unused = self.model_fields_set - {"share"}
        if unused and "share" not in self.model_fields_set:
            raise InputError(
                f"{' and '.join(sorted(unused))} has no effect without share, which is missing; set it (0: no keep_best)"
            )
        return self


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


class Recipe(Group):
    """All keys of a run. `model`, `init` or `m1` is where it begins; paths are absolute after `load`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count = 2  # of DPO: M1 -> M_{rounds + 1}
    model: Path | None = None
    tokenizer: Path | None = None  # null: the model's
    init: Init | None = None
    m1: Path | None = None  # begin the rounds with this model: no SFT, no EFT
    judge_model: Path | None = None  # a fixed judge for all rounds; null: each round's own model
    prompt_model: Path | None = None  # a fixed model that writes the prompts of all rounds; null: M1
    method: Literal["dpo", "positives"] = "dpo"  # positives: SFT again, with the perfectly scored answers added
    data: Data = Data()
    sft: SFT = SFT()
    lora: Adapters = Adapters()
    keep_best: KeepBest = KeepBest()
    eft: EFT = EFT()
    prompts: Prompts
    candidates: Candidates = Candidates()
    judge: Judge = Judge()
    pairs: Pairs = Pairs()
    dpo: DPO = DPO()
    gates: Gates = Gates()
    evaluation: Evaluation = Evaluation()
    sampler: Sampler = Sampler()
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of sampler and training; auto: a GPU where there is one
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        begins = [name for name in ("model", "init", "m1") if getattr(self, name) is not None]
        if len(begins) != 1:
            raise InputError(
                f"found {' and '.join(begins) or 'none'} of model, init and m1; set exactly one of them (the others to null)"
            )
        if self.init is not None and self.tokenizer is None:
            raise InputError(
                "init makes a model without a tokenizer; set tokenizer to a tokenizer.model or its directory"
            )
        if self.m1 is None and not self.data.has_ift:
            raise InputError("data.ift is missing; set it, or m1 to begin with a model that is already trained")
        if self.m1 is not None and (self.method == "positives" or self.dpo.replay_weight):
            raise InputError(
                "m1 leaves SFT and EFT out, whose data method 'positives' and dpo.replay_weight need; set model"
            )
        if self.method == "positives" and self.dpo.replay_weight:
            raise InputError("method 'positives' does no DPO, so dpo.replay_weight has no effect; set one of them only")
        if self.dpo.replay_weight and not self.data.has_eft:
            raise InputError("dpo.replay_weight needs judge data; set data.eft, or the weight to 0")
        for group, values in ((name, value) for name, value in self if isinstance(value, Group)):
            for name, each in values.by_round().items():
                if len(each) != self.rounds:
                    raise InputError(
                        f"{group}.{name} has {len(each)} value{'s' * (len(each) != 1)}, rounds is {self.rounds}; give one "
                        "for each round, or a single value for all"
                    )
        for name, training in (("sft", self.sft), ("dpo", self.dpo)):
            if self.lora.rank and training.precision != "fp32":
                raise InputError(
                    f"{name}.precision is {training.precision!r} and lora.rank is {self.lora.rank}; adapters are fp32 in any "
                    "case: leave it out, and set lora.base to bf16 to compute in it"
                )
        if self.prompt_model is not None and self.prompts.mode == "file":
            raise InputError("prompts.mode is 'file', where nothing is written by prompt_model; set one of them only")
        if self.prompts.mode == "few_shot" and not self.data.has_ift:
            raise InputError(
                "prompts.mode 'few_shot' shows the model instructions of data.ift, which is missing; set it, or set "
                "prompts.mode to 'file'"
            )
        if self.judge_model is not None and self.judge.by != "model":
            raise InputError(
                f"judge.by is {self.judge.by!r} and judge_model is set; a judge model needs judge.by 'model'"
            )
        if self.judge.model_template is not None and self.judge_model is None:
            raise InputError("judge.model_template is that of judge_model, which is not set; set judge.template")
        if self.judge.by == "oracle" and self.evaluation.oracle is None:
            raise InputError("judge.by is 'oracle', which only the tiny world has; set evaluation.oracle to tiny too")
        if self.eft.required and self.m1 is None and not self.data.has_eft:
            raise InputError("data.eft is missing; set it, or eft.required to false to go without judge data")
        if self.pairs.consistency and self.dpo.label_smoothing:
            raise InputError("pairs.consistency sets the label smoothing of each round; set dpo.label_smoothing to 0")
        if self.pairs.consistency and self.judge.draws < 2:
            raise InputError("pairs.consistency compares judgements of one answer; set judge.draws to 2 or more")
        if self.method == "positives" and self.pairs.consistency:
            raise InputError("method 'positives' does no DPO, so pairs.consistency has no effect; leave it out")
        for name, draws in (
            ("candidates.n", self.candidates.n),
            ("judge.draws", self.judge.draws),
            ("eft.attempts", self.eft.attempts),
        ):
            if draws > self.sampler.max_sequences:
                raise InputError(
                    f"{name} is {draws}, above sampler.max_sequences ({self.sampler.max_sequences}); raise that"
                )
        if self.data.max_tokens > self.sft.max_pack_tokens:
            raise InputError(
                f"data.max_tokens is {self.data.max_tokens}, above sft.max_pack_tokens ({self.sft.max_pack_tokens}), "
                "which is the most that one forward pass takes; lower the first or raise the second"
            )
        if self.evaluation.oracle is not None and self.data.heldout is None:
            raise InputError("evaluation.oracle needs data.heldout, the instructions to measure on")
        return self

    @classmethod
    def load(cls, name_or_file: str | Path, overrides: Sequence[str] = (), check_files: bool = True) -> Recipe:
        """A shipped recipe ("tiny") or a YAML file, with `key.sub=value` overrides on top.

        Relative paths are relative to the file, on the command line to the working directory; "package:x" is a file
        that ships with this package. InputError names the key, what was found and what was expected; with
        `check_files` also a path that does not exist.
        """
        file = recipe_file(name_or_file)
        values = with_absolute_paths(read_yaml(file), file.parent)
        changed: dict[str, Any] = {}
        for override in overrides:
            changed = merged(changed, parse_override(override))
        source = Source(file, with_absolute_paths(changed, Path.cwd()))
        recipe = cls._build(_with_defaults(merged(values, source.changed), cls), source)
        if check_files:
            recipe._check_files(source)
        return recipe

    @classmethod
    def of_manifest(cls, manifest: Path, values: Any, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe that a run's manifest holds (`dump`), with overrides on top; the keys that it leaves out are as by
        default."""
        if not isinstance(values, dict):
            raise InputError(f"{manifest} holds no recipe; restore it, or name the recipe")
        changed: dict[str, Any] = {}
        for override in overrides:
            changed = merged(changed, parse_override(override))
        source = Source(manifest, with_absolute_paths(changed, Path.cwd()))
        return cls._build(merged(with_absolute_paths(values, PACKAGE), source.changed), source)

    @classmethod
    def _build(cls, values: dict[str, Any], source: Source) -> Recipe:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explained(error, source, recipe_keys()) from None

    def _check_files(self, source: Source) -> None:
        for key, path in self.paths().items():
            if not path.exists():
                raise InputError(
                    f"{source.of(key)}: {key} is {path}, which does not exist; correct it there, or give {key}=PATH on "
                    "the command line"
                )

    def paths(self) -> dict[str, Path]:
        """Every file or directory that the recipe names, by dotted key."""
        values = self.model_dump()
        found = {key: at(values, key) for key in PATH_KEYS}
        return {k: Path(v) for k, v in found.items() if v is not None and (k not in TEMPLATE_KEYS or is_path(v))}

    def dump(self) -> dict[str, Any]:
        """All keys as JSON values, for the manifest; shipped files as "package:x", so that a moved install agrees."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            if isinstance(value, Path) and value.is_relative_to(PACKAGE):
                return f"package:{value.relative_to(PACKAGE).as_posix()}"
            return str(value) if isinstance(value, Path) else value

        return {key: plain(value) for key, value in self.model_dump().items()}


def recipe_keys() -> list[str]:
    """Every dotted key that a recipe may set, in reading order."""
    return list(_keys(Recipe, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        group = _group(field.annotation)
        if group is None:
            yield prefix + name
        else:
            yield from _keys(group, f"{prefix}{name}.")


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group class behind a field's type (`Init | None` too), or None for a plain value."""
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Group)), None)


def _with_defaults(values: dict[str, Any], group: type[BaseModel]) -> dict[str, Any]:
    """Without the keys that are null and cannot be: null means the default, also of a group whose keys are all commented
    out, and so takes back what a file sets."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        field = group.model_fields.get(key)
        inner = None if field is None else _group(field.annotation)
        if value is None and field is not None and field.default is not None:
            if not field.is_required():
                continue
            value = {} if inner else None
        kept[key] = _with_defaults(value, inner) if inner and isinstance(value, dict) else value
    return kept
