"""The recipe of a run: every key with its default, from a YAML file and `key.sub=value` overrides.

Command line beats file beats default. The defaults are the paper's (arXiv 2401.10020, section 3.1) where it states one.
Nothing is coerced: `true` is no string, `"4"` is no number. An unknown key is an error that names the nearest one.

The keys of a group, such as `sft.lr`, stand in recipe_training.py and recipe_stages.py; here is what groups have to do with
one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from engine import InputError
from selfreward.recipe_errors import Source, explained
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
from selfreward.recipe_group import Count, Group
from selfreward.recipe_stages import EFT, Candidates, Data, Evaluation, Gates, Judge, Pairs, Prompts, Sampler
from selfreward.recipe_training import DPO, SFT, Adapters, Init, KeepBest


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
        if self.evaluation.head_to_head == "pairwise" and self.data.heldout is None:
            raise InputError(
                "evaluation.head_to_head is 'pairwise', which compares answers to data.heldout; set that, or leave it out"
            )
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


def _may_be_null(annotation: Any) -> bool:
    """Whether null is a value of its own, as for `save_every`."""
    return type(None) in getattr(annotation, "__args__", ())


def _with_defaults(values: dict[str, Any], group: type[BaseModel]) -> dict[str, Any]:
    """Without the keys that are null and cannot be: null means the default, also of a group whose keys are all commented
    out, and so takes back what a file sets."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        field = group.model_fields.get(key)
        inner = None if field is None else _group(field.annotation)
        if value is None and field is not None and not _may_be_null(field.annotation):
            if not field.is_required():
                continue
            value = {} if inner else None
        kept[key] = _with_defaults(value, inner) if inner and isinstance(value, dict) else value
    return kept
