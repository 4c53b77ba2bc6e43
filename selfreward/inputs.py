"""What a run is given, looked at before anything is computed: a mistake must not show after hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engine import InputError, LlamaConfig, Tokenizer, read_config
from selfreward.expected import score_labels
from selfreward.few_shot import PromptTemplate
from selfreward.filters import MAX_WORDS
from selfreward.judge import JudgeTemplate
from selfreward.prompts import seed_rows, take_prompts
from selfreward.recipe import Recipe
from selfreward.seeds import (
    eft_groups,
    file_of,
    heldout_groups,
    heldout_prompts,
    ift_rows,
    known_prompts,
    prompt_pool,
    same,
)
from selfreward.state import file_hash
from selfreward.verdict import PairwiseTemplate

Row = dict[str, Any]
OTHERS = ("judge_model", "prompt_model")  # models that may come from elsewhere


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    """The run's tokenizer, once every model is seen to be a checkpoint with an embedding for each of its pieces."""
    configs = {}
    for key in ("model", "m1", *OTHERS):
        path = getattr(recipe, key)
        if path is not None:
            with _key_named(key, "the directory of a Llama 2 checkpoint"):
                configs[key] = path, read_config(path)
    key = next((key for key in ("tokenizer", "model", "m1") if getattr(recipe, key) is not None), "tokenizer")
    with _key_named("tokenizer", "a tokenizer.model or its directory"):
        tokenizer = Tokenizer(getattr(recipe, key))
    for key, (path, config) in configs.items():
        if key in OTHERS and (path / "tokenizer.model").is_file():
            with _key_named(key, "a model with its own tokenizer.model, or with none"):
                Tokenizer(path)
            continue  # it speaks its own vocabulary
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, {key} ({path}) {config.vocab_size} embeddings: they "
                "do not belong together; give the one that this model was trained with (tokenizer=PATH)"
            )
    return tokenizer


@contextmanager
def _key_named(key: str, expected: str) -> Iterator[None]:
    """What the engine says of a file, with the key of the recipe that led there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}; give {key}=PATH, {expected}") from None


class Templates(NamedTuple):
    """What a run asks with; None where it has no use for one."""

    judge: JudgeTemplate
    judge_model: JudgeTemplate | None
    prompts: PromptTemplate | None
    pairwise: PairwiseTemplate | None


def load_templates(recipe: Recipe) -> Templates:
    """Read and checked."""
    of_model, judge, prompts = recipe.judge.model_template, JudgeTemplate(recipe.judge.template), recipe.prompts
    evaluation = recipe.evaluation
    return Templates(
        judge,
        None if of_model is None else JudgeTemplate(of_model),
        PromptTemplate(prompts.template) if prompts.mode == "few_shot" else None,
        PairwiseTemplate(evaluation.pairwise_template) if evaluation.head_to_head == "pairwise" else None,
    )


def check_inputs(recipe: Recipe, tokenizer: Tokenizer, template: JudgeTemplate) -> list[str]:
    """Read every data file. InputError names what a run cannot use; the sentences returned, what it will use less of
    than one might think."""
    dim = _start_config(recipe, tokenizer).dim
    if recipe.lora.rank > dim:
        raise InputError(f"lora.rank is {recipe.lora.rank}, above the model's dim ({dim}); lower it (16 is common)")
    trained = recipe.m1 is None  # else instructions and ranked answers only tell which prompts are known
    texts: dict[str, list[tuple[str, str]]] = {}  # file or template -> (row, text) of all that is tokenised
    odd = []
    if trained and recipe.data.has_ift:
        said = [(row["id"], row[key]) for row in ift_rows(recipe) for key in ("prompt", "response")]
        texts[str(file_of(recipe, "data.ift"))] = said
    groups, heldout = eft_groups(recipe), heldout_groups(recipe)
    _check_apart(recipe, groups, heldout)
    if recipe.data.ranked is not None and recipe.eft.required and trained and not groups:
        raise InputError(
            f"{recipe.data.ranked}: a share of {recipe.data.split[0]} of its prompts with ranks is no judge data at all; raise "
            "the first number of data.split, give more rows, or set eft.required to false"
        )
    for key, ranked in (("data.eft", groups if trained else []), ("data.eft_heldout", heldout)):
        if ranked:
            path = str(file_of(recipe, key))
            texts.setdefault(path, []).extend((g["id"], text) for g in ranked for text in (g["prompt"], *_answers(g)))
            odd += _tied(key, path, ranked)
    if recipe.data.heldout:
        texts[str(recipe.data.heldout)] = [(row["id"], row["prompt"]) for row in heldout_prompts(recipe)]
    if trained:
        odd += _overlaps(
            {"data.ift": ift_rows(recipe), "data.eft": groups},
            {"data.eft_heldout": heldout, "data.heldout": heldout_prompts(recipe)},
        )
    known = known_prompts(recipe)
    if recipe.prompts.file is not None:
        take_prompts(recipe, 1, known)
        texts[str(recipe.prompts.file)] = [(row["id"], row["prompt"]) for row in prompt_pool(recipe)]
    odd += _shots(recipe, tokenizer, texts)
    if groups or heldout or (recipe.judge.by == "model" and recipe.judge_model is None):
        rubric, _, _, cue = template.segments("a prompt", "an answer")
        texts[f"judge template {template.path}"] = [("the rubric", rubric), ("the cue", cue)]
    if recipe.judge.score == "expected":
        for speaks in _judges_tokenizers(recipe, tokenizer, bool(heldout)):
            score_labels(speaks)  # refuses one without the digits
    odd += [said for where, rows_of in texts.items() for said in _unknown(tokenizer, where, rows_of)]
    return odd + _beyond_context(recipe, tokenizer)


def _shots(recipe: Recipe, tokenizer: Tokenizer, texts: dict[str, list[tuple[str, str]]]) -> list[str]:
    """What a few-shot request needs: enough instructions, and room for them; its text joins `texts`."""
    options, template = recipe.prompts, load_templates(recipe).prompts
    if template is None:
        return []
    seeds = [row["prompt"] for row in seed_rows(recipe)]
    if len(seeds) < max(options.shots_seed, 1):
        raise InputError(
            f"{file_of(recipe, 'data.ift')} has {len(seeds)} different instructions of at most {MAX_WORDS} words, and "
            f"prompts.shots_seed is {options.shots_seed}; give more of them, or lower it"
        )
    if recipe.prompt_model and (recipe.prompt_model / "tokenizer.model").is_file():
        tokenizer = Tokenizer(recipe.prompt_model)
    else:  # the tokenizer whose words are looked at
        texts[f"prompts template {template.path}"] = [
            ("the text", template.text([""] * (options.shots_seed + options.shots_generated)))
        ]
    config = read_config(recipe.prompt_model) if recipe.prompt_model else _start_config(recipe, tokenizer)
    shown, ordered = options.shots_seed + options.shots_generated, sorted(seeds, key=len)
    least, most = (len(template.token_ids(tokenizer, some)) for some in (ordered[:shown], ordered[-shown:]))
    said = f"{shown} of the instructions of {file_of(recipe, 'data.ift')} are a request of {least} to {most} tokens, "
    room = config.max_seq_len
    if least >= room:
        raise InputError(f"{said}above the context of {room}; lower prompts.shots_seed and prompts.shots_generated")
    if most + options.max_tokens > room:
        return [
            f"{said}prompts.max_tokens is {options.max_tokens} and the context {room}: what has no room is cut or left out"
        ]
    return []


def _judges_tokenizers(recipe: Recipe, tokenizer: Tokenizer, measured: bool) -> Iterator[Tokenizer]:
    """Of the round's judge, and of the models that are measured as judges."""
    own = recipe.judge_model is not None and (recipe.judge_model / "tokenizer.model").is_file()
    if own and recipe.judge_model is not None:
        yield Tokenizer(recipe.judge_model)
    if measured or not own:
        yield tokenizer


def _check_apart(recipe: Recipe, groups: list[Row], heldout: list[Row]) -> None:
    held = {group["prompt"].strip() for group in heldout}
    shared = next((group["id"] for group in groups if group["prompt"].strip() in held), None)
    if shared is not None:
        raise InputError(
            f"{recipe.data.eft}: group {shared} has a prompt of {recipe.data.eft_heldout}; keep them apart"
        )


def _overlaps(trained: dict[str, list[Row]], measured: dict[str, list[Row]]) -> list[str]:
    """Prompts that are trained on and measured on, to case and blanks: what is measured there says too much."""
    prompts = {key: {same(row["prompt"]) for row in rows} for key, rows in (trained | measured).items()}
    shared = {(a, b): len(prompts[a] & prompts[b]) for a in trained for b in measured}
    return [f"{count} prompts of {a} are in {b} too; keep them apart" for (a, b), count in shared.items() if count]


def _answers(group: Row) -> list[str]:
    return [answer["text"] for answer in group["answers"]]


def _tied(key: str, path: str, groups: list[Row]) -> list[str]:
    """Groups whose answers all have one rank say nothing: any judgement agrees with them."""
    tied = [group["id"] for group in groups if len({answer["rank"] for answer in group["answers"]}) < 2]
    if len(tied) == len(groups):
        raise InputError(
            f"{path}: in each of the {len(groups)} groups all answers have the same rank, which says nothing about a "
            f"judge; rank them (0 the best), or set {key} to null and go without"
        )
    if tied:
        return [
            f"{path}: {len(tied)} of {len(groups)} groups are of no use, first {tied[0]}: their answers have one rank"
        ]
    return []


def _unknown(tokenizer: Tokenizer, where: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence if some words are unknown; InputError if half of them are, since then nothing can be learned.

    Words, not tokens: SentencePiece makes one <unk> of neighbouring unknown ones.
    """
    known: dict[str, bool] = {}
    unknown, total, first = 0, 0, ""
    for row, text in rows:
        for word in text.split():
            if word not in known:
                known[word] = tokenizer.unk_id not in tokenizer.encode(word)
            total += 1
            if not known[word]:
                unknown += 1
                first = first or f"{word[:20]!r} in {row}"
    if not unknown:
        return []
    said = f"{where}: {unknown} of {total} words ({unknown / total:.1%}) are unknown to {tokenizer.path}, first {first}"
    if 2 * unknown >= total:
        raise InputError(f"{said}; give text in the words of this tokenizer, or the model whose tokenizer knows these")
    return [f"{said}; the model sees <unk> there"]


def context_of(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Tokens that the model of the run can see, before there is one."""
    return _start_config(recipe, tokenizer).max_seq_len


def _beyond_context(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """The lengths that the recipe asks for and the model cannot reach."""
    context, own_prompts = context_of(recipe, tokenizer), recipe.prompt_model is None
    lengths = {
        "data.max_tokens": recipe.data.max_tokens if recipe.m1 is None else 0,
        "eft.max_tokens": recipe.eft.max_tokens if recipe.m1 is None and recipe.data.has_eft else 0,
        "prompts.max_tokens": recipe.prompts.max_tokens if recipe.prompts.mode == "continue" and own_prompts else 0,
        "candidates.max_tokens": recipe.candidates.max_tokens,
        "judge.max_tokens": recipe.judge.max_tokens if recipe.judge.by == "model" and not recipe.judge_model else 0,
        "evaluation.max_tokens": recipe.evaluation.max_tokens if recipe.data.heldout else 0,
    }
    beyond = [f"{key} is {length}" for key, length in lengths.items() if length > context]
    if not beyond:
        return []
    return [f"{', '.join(beyond)}, above the model's context of {context} tokens: longer texts are cut there"]


def _start_config(recipe: Recipe, tokenizer: Tokenizer) -> LlamaConfig:
    start = recipe.model or recipe.m1
    if start is not None:
        return read_config(start)
    assert recipe.init is not None
    return recipe.init.config(tokenizer.vocab_size)


def tokenizer_hash(model: Path | None) -> str | None:
    """Of the vocabulary that a model from elsewhere brings, if it does."""
    file = model / "tokenizer.model" if model else None
    return file_hash(file) if file and file.is_file() else None
