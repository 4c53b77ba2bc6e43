"""Every key strict, every mistake named, command line over file over default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import selfreward.recipe as recipe_module
from engine import PRESETS, DPOConfig, InputError, LlamaConfig, SFTConfig
from selfreward.filters import LEVELS
from selfreward.judge import JudgeTemplate
from selfreward.recipe import Recipe, recipe_keys
from selfreward.recipe_file import recipe_names
from selfreward.recipe_stages import Prompts
from selfreward.recipe_training import DPO, SFT

SMALL = """
model: m0
data: {ift: ift.jsonl}
eft: {required: false}
prompts: {mode: file, file: prompts.jsonl}
"""


def write(tmp_path: Path, text: str = SMALL) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def load(tmp_path: Path, *overrides: str, text: str = SMALL) -> Recipe:
    return Recipe.load(write(tmp_path, text), overrides, check_files=False)


def complaint(tmp_path: Path, *overrides: str, text: str = SMALL) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *overrides, text=text)
    return str(caught.value)


FEW_SHOT = ["prompts.file=null", "prompts.mode=few_shot", "prompts.count=8"]

# Frozen on purpose: each new key is a decision, made here too.
KEYS = """
seed rounds model tokenizer init.preset init.dim init.n_layers init.n_heads init.n_kv_heads init.ffn_dim init.seed
m1 judge_model prompt_model method
data.ift data.ift_limit data.eft data.eft_limit data.eft_heldout data.heldout data.ranked data.split
data.language data.format.ift data.format.eft data.format.eft_heldout data.format.heldout data.format.ranked
data.format.prompts data.max_tokens
sft.lr sft.min_lr sft.schedule sft.warmup_steps sft.epochs sft.max_steps sft.batch_size sft.weight_decay sft.betas
sft.clip sft.max_pack_tokens sft.dropout sft.save_every sft.activation_checkpointing sft.precision
lora.rank lora.alpha lora.targets lora.base
keep_best.share keep_best.every keep_best.patience
eft.temperature eft.top_p eft.required eft.attempts eft.max_tokens
prompts.temperature prompts.top_p prompts.mode prompts.file prompts.count prompts.max_tokens prompts.valid
prompts.template prompts.shots_seed prompts.shots_generated prompts.filter prompts.rouge
candidates.temperature candidates.top_p candidates.n candidates.max_tokens
judge.temperature judge.top_p judge.by judge.template judge.model_template judge.draws judge.max_tokens
judge.min_valid_draws judge.score judge.duplicates
pairs.allow_truncated_chosen pairs.tie_break pairs.length_control pairs.per_prompt pairs.consistency
dpo.lr dpo.min_lr dpo.schedule dpo.warmup_steps dpo.epochs dpo.max_steps dpo.batch_size dpo.weight_decay dpo.betas
dpo.clip dpo.max_pack_tokens dpo.dropout dpo.save_every dpo.activation_checkpointing dpo.precision dpo.beta dpo.loss
dpo.label_smoothing dpo.nll_weight dpo.replay_weight dpo.replay_batch_size
gates.min_readable gates.min_score_entropy gates.max_length_drift gates.min_pairs gates.step0_tolerance gates.parity_tolerance
evaluation.oracle evaluation.prompts evaluation.temperature evaluation.greedy evaluation.max_tokens
evaluation.judge_groups evaluation.head_to_head evaluation.pairwise_template
sampler.dtype sampler.quantization sampler.kv_cache_gb sampler.max_batch_tokens sampler.max_sequences
sampler.block_size
device threads
"""


def test_the_keys_are_these_and_no_others() -> None:
    assert recipe_keys() == KEYS.split()


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.rounds, recipe.candidates.n, recipe.judge.draws) == (2, 4, 3)
    for sampling in (recipe.candidates, recipe.judge):
        assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    assert (recipe.prompts.temperature, recipe.prompts.top_p) == (0.6, 0.9)
    assert (recipe.sft.lr, recipe.sft.min_lr, recipe.sft.schedule, recipe.sft.batch_size) == (
        5.5e-6,
        1.1e-6,
        "cosine",
        16,
    )
    assert (recipe.dpo.lr, recipe.dpo.min_lr, recipe.dpo.beta, recipe.dpo.batch_size) == (1e-6, 1e-7, 0.1, 16)


@pytest.mark.parametrize(("group", "config"), [(SFT, SFTConfig), (DPO, DPOConfig)])
def test_training_keys_are_the_engines_options_with_its_defaults(group: Any, config: Any) -> None:
    ours = group().model_dump()
    theirs = {field.name: field.default for field in dataclasses.fields(config) if field.name != "seed"}
    assert ours == theirs
    config(**ours, seed=0)


def test_a_list_has_a_value_for_each_round_and_a_number_is_for_all(tmp_path: Path) -> None:
    recipe = load(tmp_path, "rounds=3", "dpo.beta=[0.3, 0.2, 1]", "dpo.lr=[3e-6, 2e-6, 1e-6]")
    found = [recipe.dpo.of_round(k) for k in (1, 2, 3)]
    assert [(each["beta"], each["lr"], each["min_lr"]) for each in found] == [
        (0.3, 3e-6, 1e-7),
        (0.2, 2e-6, 1e-7),
        (1.0, 1e-6, 1e-7),
    ]
    assert all(DPOConfig(**each) for each in found)


@pytest.mark.parametrize("name", ["tiny", "micro", "llama2-7b", "llama2-13b", "trial"])
def test_shipped_recipes_are_valid_and_name_a_shipped_template(name: str) -> None:
    assert name in recipe_names()
    recipe = Recipe.load(name, check_files=False)
    JudgeTemplate(recipe.judge.template)


def test_tiny_holds_the_settled_settings() -> None:
    tiny = Recipe.load("tiny", check_files=False)
    assert tiny.model == recipe_module.PACKAGE / "tiny" / "m0"
    assert (tiny.data.ift_limit, tiny.data.eft_limit, tiny.eft.attempts, tiny.eft.temperature) == (24, 120, 6, 1.0)
    assert (tiny.prompts.mode, tiny.prompts.count, tiny.prompts.temperature, tiny.prompts.top_p) == (
        "continue",
        800,
        1,
        1,
    )
    assert (tiny.candidates.n, tiny.judge.draws) == (4, 3)
    assert (tiny.sft.lr, tiny.dpo.lr, tiny.dpo.beta, tiny.dpo.epochs) == (6e-5, 3e-5, 0.1, 1)
    assert tiny.evaluation.oracle == "tiny" and tiny.evaluation.prompts >= 500


def test_the_example_for_real_weights_says_which_path_to_fill() -> None:
    with pytest.raises(InputError, match=r"llama2-7b.yaml: model is .*llama-2-7b-hf, which does not exist.*model=PATH"):
        Recipe.load("llama2-7b")


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    text = SMALL + "dpo: {lr: 2e-6, beta: 0.2}\n"
    recipe = load(tmp_path, "dpo.lr=3e-6", "dpo.lr=4e-6", text=text)
    assert (recipe.dpo.lr, recipe.dpo.beta, recipe.dpo.batch_size) == (4e-6, 0.2, 16)
    assert load(tmp_path, "dpo={lr: 1e-5}", text=text).dpo.beta == 0.2  # laid over the file's group, not in its place


@given(value=st.floats(min_value=1e-300, max_value=1e300) | st.integers(1, 10**6))
def test_a_number_written_by_python_is_read_as_that_number(value: float) -> None:
    overrides = [
        "model=m",
        "data.ift=i",
        "eft.required=false",
        "prompts={mode: continue, count: 1}",
        f"dpo.beta={value!r}",
    ]
    assert Recipe.load("tiny", overrides, check_files=False).dpo.beta == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("1.e-6", 1e-6), (".5", 0.5), ("+2.5", 2.5), ("1.5e+3", 1500.0), ("3", 3.0)],
)
def test_a_number_may_be_written_as(text: str, value: float, tmp_path: Path) -> None:
    assert load(tmp_path, text=SMALL + f"dpo: {{beta: {text}}}\n").dpo.beta == value
    assert load(tmp_path, f"dpo.beta={text}").dpo.beta == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.beta=1e", 'dpo.beta is "1e"; expected a number'),
        ("dpo.beta='0.1'", 'dpo.beta is "0.1"; expected a number'),
        ("dpo.beta=true", "dpo.beta is true; expected a number"),
        ("dpo.beta=.nan", "dpo.beta is NaN; expected"),
        ("dpo.beta=[0.1, x]", 'dpo.beta.1 is "x"; expected a number'),
        ("dpo.beta=[0.1, 0]", "dpo.beta.1 is 0; expected greater than 0"),
        ("dpo={lr: [1e-6, 2e-6], min_lr: [1e-7, 3e-6]}", "dpo: min_lr is 3e-06, above lr (2e-06)"),
        ("dpo={lr: [1e-6, 2e-6], min_lr: 2e-6}", "dpo: min_lr is 2e-06, above lr (1e-06)"),
        ("sft.lr=[1e-6, 2e-6]", "sft.lr is [1e-06, 2e-06]; expected a number"),
        ("seed=1.0", "seed is 1.0; expected an integer"),
        ("seed=010", 'seed is "010"; expected an integer'),
        ("seed=true", "seed is true; expected an integer"),
        ("seed=-1", "seed is -1; expected greater than or equal to 0"),
        ("eft.required=yes", 'eft.required is "yes"; expected true or false'),
        ("eft.required=1", "eft.required is 1; expected true or false"),
        ("judge.template=true", "judge.template is true; expected a string"),
        ("model=3", "model is 3; expected a path"),
        ("data.ift=", "data.ift is missing"),
        ("sft.dropout=1", "sft.dropout is 1; expected less than 1"),
        ("sft.betas=[0.9, 1.0]", "sft.betas: found 1.0"),
        ("threads=100000000", "threads is 100000000; expected less than or equal to 1024"),
        ("sft=3", "sft is 3; expected a group of keys"),
        ("sft.betas=[true, 0.9]", "sft.betas: found true; expected a list of two numbers"),
        ("sft.betas=[0.9]", "sft.betas: found [0.9]; expected a list of two numbers"),
        ("sft.betas=0.9", "sft.betas: found 0.9; expected a list of two numbers"),
        ("dpo.schedule=poly", "dpo.schedule is \"poly\"; expected 'cosine', 'linear' or 'constant'"),
        ("candidates.n=1", "candidates.n is 1; expected greater than or equal to 2"),
        ("judge.top_p=1.5", "judge.top_p is 1.5; expected less than or equal to 1"),
        ("judge.min_valid_draws=4", "judge: min_valid_draws is 4, above draws (3)"),
        ("candidates.temperature=0", "candidates: temperature is 0, which makes all candidates"),
        ("sft.min_lr=1", "sft: min_lr is 1.0, above lr"),
        ("lora.alpha=8", "lora: alpha has no effect without rank"),
        ("lora={rank: 4, targets: []}", "lora: targets is empty"),
        ("lora={rank: 4, targets: q_proj}", 'lora.targets is "q_proj"; expected a list'),
        ("lora={rank: 4, targets: [q_proj, lm_head]}", "lora.targets.1 is \"lm_head\"; expected 'q_proj', 'k_proj'"),
        ("lora.rank=-1", "lora.rank is -1; expected greater than or equal to 0"),
        ("prompts.mode=continue", "prompts: mode is 'continue' and file is"),
        ("prompts={mode: continue, file: null}", "prompts: mode 'continue' needs count"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(override: str, message: str, tmp_path: Path) -> None:
    assert f"command line: {message}" in complaint(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.bta=1", "unknown key 'dpo.bta'; did you mean dpo.beta?"),
        ("lr=1", "unknown key 'lr'; did you mean sft.lr or dpo.lr?"),
        ("prompts_file=x", "unknown key 'prompts_file'; did you mean prompts.file?"),
        ("sft.beta=1", "unknown key 'sft.beta'; did you mean dpo.beta?"),
        ("init.layers=1", "unknown key 'init.layers'; did you mean init.n_layers?"),
        ("quetzalcoatl=1", "unknown key 'quetzalcoatl'"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, message: str, tmp_path: Path) -> None:
    assert f"command line: {message}" in complaint(tmp_path, override)


def test_a_mistake_in_the_file_names_the_file_and_the_rest_is_counted(tmp_path: Path) -> None:
    found = complaint(tmp_path, "dpo.beta=0.2", text=SMALL + "sedd: 1\nthreads: two\n")
    assert found.startswith(f"recipe {tmp_path / 'recipe.yaml'}: unknown key 'sedd'; did you mean")
    assert found.endswith("(1 more after this one)")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=null"], "found none of model, init and m1"),
        (["init.preset=7B"], "found model and init of model, init and m1"),
        (["m1=x"], "found model and m1 of model, init and m1"),
        (["model=null", "m1=x", "method=positives"], "m1 leaves SFT and EFT out"),
        (["model=null", "m1=x", "dpo.replay_weight=1"], "m1 leaves SFT and EFT out"),
        (["dpo.replay_weight=1"], "dpo.replay_weight needs judge data"),
        (["method=positives", "dpo.replay_weight=1"], "method 'positives' does no DPO"),
        (
            ["lora.rank=4", "dpo.precision=bf16-copy"],
            "dpo.precision is 'bf16-copy' and lora.rank is 4; adapters are fp32",
        ),
        (["dpo.beta=[0.1]"], "dpo.beta has 1 value, rounds is 2; give one for each round, or a single value for all"),
        (["dpo.lr=[]"], "dpo.lr has 0 values, rounds is 2"),
        (["dpo.min_lr=[0, 0, 0]", "rounds=1"], "dpo.min_lr has 3 values, rounds is 1"),
        (["judge.by=random", "judge_model=x"], "a judge model needs judge.by 'model'"),
        (["judge.by=oracle"], "set evaluation.oracle to tiny too"),
        (["judge.by=random", "judge.score=expected"], "by is 'random', which has no distribution of scores"),
        (["evaluation.pairwise_template=x.jinja"], "head_to_head is scores, where pairwise_template has no effect"),
        (["evaluation.head_to_head=pairwise"], "'pairwise', which compares answers to data.heldout; set that"),
        (["judge.model_template=tiny"], "judge.model_template is that of judge_model, which is not set"),
        (["data.max_tokens=5000"], "above sft.max_pack_tokens (4096)"),
        (["candidates.n=300"], "candidates.n is 300, above sampler.max_sequences (256)"),
        (["judge.draws=300"], "judge.draws is 300, above sampler.max_sequences (256)"),
        (["prompts.mode=continue"], "mode is 'continue' and file is set"),
        (["prompts.file=null"], "mode is 'file' and file is not set"),
        (["prompts.top_p=0.5"], "mode is 'file', where top_p has no effect"),
        (["prompts.template=plain"], "mode is 'file', where template has no effect"),
        (["prompts={mode: continue, count: 1, shots_seed: 1}"], "mode is 'continue' and file is set"),
        (["prompts.file=null", "prompts.mode=few_shot"], "mode 'few_shot' needs count"),
        ([*FEW_SHOT, "prompts.shots_seed=0", "prompts.shots_generated=0"], "shots_seed and shots_generated are both 0"),
        ([*FEW_SHOT, "model=null", "m1=x", "data.ift=null"], "shows the model instructions of data.ift"),
        ([*FEW_SHOT, "prompts.filter=none", "prompts.rouge=0.5"], "rouge has no effect without a filter"),
        (["prompts.rouge=0.5"], "rouge has no effect without a filter"),
        (["prompt_model=x"], "nothing is written by prompt_model"),
        (["model=null", "init.preset=7B"], "set tokenizer"),
        (["eft.required=true"], "data.eft is missing"),
        (["evaluation.oracle=tiny"], "evaluation.oracle needs data.heldout"),
    ],
)
def test_keys_that_need_each_other_are_checked(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.beta", "is not of the form key.sub=value"),
        ("=1", "is not of the form key.sub=value"),
        ("dpo..beta=1", "is not of the form key.sub=value"),
        ("dpo.beta={", "the value is not YAML"),
    ],
)
def test_an_override_of_another_form_is_refused(override: str, message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "recipe.yaml, line 2: the key 'seed' stands twice"),
        ("seed: [1\n", "recipe.yaml, line 2: .*expected YAML"),
        ("1: 2\n", "recipe.yaml, line 1: the key 1 is no plain word"),
        ("- seed\n", r'recipe.yaml holds \["seed"\]; expected keys and values'),
        ("", "recipe.yaml holds null; expected keys and values"),
        ("seed: !!python/object/apply:os.getcwd []\n", "recipe.yaml, line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, text=text)


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tiney' is not shipped; did you mean tiny.*use one of.*llama2-7b"):
        Recipe.load("tiney")
    with pytest.raises(InputError, match=r"nowhere.yaml cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_new_prompts_are_filtered_where_a_model_writes_them_by_example_or_where_it_is_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path).prompts.level == "none"
    assert load(tmp_path, *FEW_SHOT).prompts.level == "self_instruct"
    assert load(tmp_path, *FEW_SHOT, "prompts.filter=none").prompts.level == "none"
    asked = load(tmp_path, "prompts.filter=similar", "prompts.rouge=0.5").prompts
    assert (asked.level, asked.rouge) == ("similar", 0.5)
    shown = load(tmp_path, *FEW_SHOT).prompts
    assert (shown.template, shown.shots_seed, shown.shots_generated, shown.rouge) == ("chat", 6, 2, 0.7)
    assert get_args(Prompts.model_fields["filter"].annotation)[0] == Literal[LEVELS]


def test_an_empty_group_means_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, text=SMALL + "dpo:\n  # lr: 1\n").dpo == DPO()


def test_paths_are_relative_to_the_file_or_on_the_command_line_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = tmp_path / "caller"
    caller.mkdir()
    monkeypatch.chdir(caller)
    recipe = load(tmp_path, "tokenizer=t.model", "judge.template=./my.jinja", "data.heldout=package:tiny/x.jsonl")
    assert recipe.paths() == {
        "model": tmp_path / "m0",
        "tokenizer": caller / "t.model",
        "data.ift": tmp_path / "ift.jsonl",
        "data.heldout": recipe_module.PACKAGE / "tiny" / "x.jsonl",
        "prompts.file": tmp_path / "prompts.jsonl",
        "judge.template": caller / "my.jinja",
    }


def test_a_path_that_does_not_exist_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "m0").mkdir()
    with pytest.raises(InputError, match=r"recipe.yaml: data.ift is .*ift.jsonl, which does not exist"):
        Recipe.load(write(tmp_path))
    (tmp_path / "ift.jsonl").touch()
    (tmp_path / "prompts.jsonl").touch()
    assert Recipe.load(write(tmp_path)).model == tmp_path / "m0"
    with pytest.raises(InputError, match=r"command line: judge.template is .*gone.jinja, which does not exist"):
        Recipe.load(write(tmp_path), [f"judge.template={tmp_path}/gone.jinja"])


def test_the_dump_is_json_names_shipped_files_by_package_and_loads_again(tmp_path: Path) -> None:
    recipe = Recipe.load("tiny", ["dpo.lr=1e-5", "sft.betas=[0.9, 0.99]", "dpo.beta=[1, 0.2]"], check_files=False)
    dump = json.loads(json.dumps(recipe.dump()))
    assert dump["model"] == "package:tiny/m0" and dump["data"]["ift"] == "package:tiny/data/ift.jsonl"
    assert dump["dpo"]["lr"] == 1e-5 and dump["sft"]["betas"] == [0.9, 0.99]
    assert dump["dpo"]["beta"] == [1.0, 0.2]
    assert Recipe.load(write(tmp_path, json.dumps(dump)), check_files=False) == recipe


def test_a_random_llama_takes_a_preset_a_shape_or_both(tmp_path: Path) -> None:
    def init(text: str) -> LlamaConfig:
        made = load(tmp_path, "model=null", "tokenizer=t", f"init={text}").init
        assert made is not None
        return made.config(vocab_size=111)

    assert init("{preset: 13B}") == dataclasses.replace(PRESETS["13B"], vocab_size=111)
    assert init("{preset: 7B, n_layers: 2}") == dataclasses.replace(PRESETS["7B"], vocab_size=111, n_layers=2)
    shape = init("{dim: 64, n_layers: 1, n_heads: 4, n_kv_heads: 2, ffn_dim: 96}")
    assert (shape.dim, shape.head_dim, shape.n_kv_heads, shape.ffn_dim) == (64, 16, 2, 96)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("{dim: 64}", "init: without a preset all of dim, n_layers, .* are needed; found dim"),
        ("{preset: 7B, n_heads: 7}", "init: dim is 4096, not a multiple of n_heads"),
        ("{preset: 7B, n_kv_heads: 5}", "init: .*not a multiple of n_kv_heads"),
        ("{preset: 8B}", "init.preset is \"8B\"; expected '7B', '13B' or '70B'"),
        ("{preset: 7B, dropout: 0}", "unknown key 'init.dropout'"),
    ],
)
def test_a_random_llama_that_does_not_fit_is_refused(init: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"command line: {message}"):
        load(tmp_path, "model=null", "tokenizer=t", f"init={init}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pairs.length_control=[0.1, 0.2, 0.3]"],
            "pairs.length_control has 3 values, rounds is 2; give one for each round, or a single value for all",
        ),
        (["pairs.length_control=0.5"], "pairs.length_control is 0.5; expected less than 0.5"),
        (["pairs.length_control=x"], 'pairs.length_control is "x"; expected a number'),
        (["pairs.tie_break=first"], "pairs.tie_break is \"first\"; expected 'index' or 'variance'"),
        (["pairs.per_prompt=0"], "pairs.per_prompt is 0; expected greater than or equal to 1"),
        (
            ["pairs.consistency=true", "dpo.label_smoothing=0.1"],
            "pairs.consistency sets the label smoothing of each round",
        ),
        (["pairs.consistency=true", "judge.draws=1"], "pairs.consistency compares judgements of one answer"),
        (["pairs.consistency=true", "method=positives"], "so pairs.consistency has no effect; leave it out"),
        (["data.format.ift=csv"], "data.format: ift is 'csv', which is not read; use one of text, open_assistant"),
        (["data.split=[0.9, 0.2]"], "split says how `ranked` is divided, which is not set"),
        (["data=&a {ift: *a}"], "*a is not read; write it out"),
    ],
)
def test_a_wrong_key_of_data_and_pairs_is_named(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, *overrides)


def test_null_takes_back_what_the_file_sets(tmp_path: Path) -> None:
    recipe = load(tmp_path, "dpo.beta=", "dpo=null", "candidates={n: null, temperature: 0.9}")
    assert recipe.dpo == DPO() and recipe.candidates.n == 4 and recipe.candidates.temperature == 0.9
    given = ["prompts.mode=file", f"prompts.file={tmp_path}", "prompts.count=null"]
    with pytest.raises(
        InputError, match=r"where max_tokens and temperature and top_p has no effect; leave it out, or set"
    ):
        Recipe.load("micro", given)
    taken_back = [f"prompts.{key}=null" for key in ("max_tokens", "temperature", "top_p")]
    assert Recipe.load("micro", [*given, *taken_back]).prompts.temperature == 0.6


def test_null_is_a_value_where_a_key_has_one(tmp_path: Path) -> None:
    recipe = load(tmp_path, "evaluation.head_to_head=null", "sft={save_every: null}", "dpo.save_every=")
    assert recipe.evaluation.head_to_head is None
    assert recipe.sft.save_every is None and recipe.dpo.save_every is None


@pytest.mark.parametrize("name", ["tiny", "micro", "trial", "llama2-7b"])
def test_a_recipe_comes_back_from_its_manifest(name: str) -> None:
    recipe = Recipe.load(name, ["judge.draws=5"], check_files=False)
    again = Recipe.of_manifest(Path("manifest.json"), json.loads(json.dumps(recipe.dump())))
    assert again.dump() == recipe.dump()


def test_a_value_for_all_rounds_or_one_for_each(tmp_path: Path) -> None:
    one, each, none = (load(tmp_path, f"pairs.length_control={v}").pairs for v in ("0.1", "[0.1, 0]", "null"))
    found = [[pairs.of_round(k)["length_control"] for k in (1, 2)] for pairs in (one, each, none)]
    assert found == [[0.1, 0.1], [0.1, 0.0], [None, None]]
