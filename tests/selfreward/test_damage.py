"""Damaged checkpoints, recipes, templates and data: each is one sentence that names the culprit, exit code 2, and no file."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfreward.recipe import PACKAGE
from selfreward.run import main

RECIPE = """model: m0
data: {ift: ift.jsonl, eft: eft.jsonl, eft_heldout: eft_heldout.jsonl, heldout: heldout.jsonl}
prompts: {mode: file, file: prompts.jsonl}
judge: {template: judge.jinja}
"""


@pytest.fixture
def world(tmp_path):
    """A folder with everything that a run is given: a checkpoint, a recipe, a template and data files."""
    shutil.copytree(PACKAGE / "tiny/m0", tmp_path / "m0")
    for name in ("ift", "eft", "eft_heldout", "heldout"):
        lines = (PACKAGE / f"tiny/data/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "prompts.jsonl").write_text("".join(f'"copy a b c {letter}"\n' for letter in "abcdef"))
    shutil.copy(PACKAGE / "templates/judge_tiny.jinja", tmp_path / "judge.jinja")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


# ---- ways to damage ---------------------------------------------------------------------------------------------------


def cut(name, keep):
    """The file's first bytes (a negative number: all but the last)."""
    return lambda world: (world / name).write_bytes((world / name).read_bytes()[:keep])


def content(name, data):
    return lambda world: (world / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def second_line(name, line):
    def damage(world):
        lines = (world / name).read_bytes().split(b"\n")
        lines[1] = line if isinstance(line, bytes) else line.encode()
        (world / name).write_bytes(b"\n".join(lines))

    return damage


def remove(name):
    return lambda world: (world / name).unlink()


def tensors(change):
    """Write model.safetensors again after `change(tensors)`."""

    def damage(world):
        path = world / "m0/model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return damage


def config(**values):
    """Set keys of config.json; None removes one."""

    def damage(world):
        path = world / "m0/config.json"
        held = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return damage


def recipe(before, after):
    return lambda world: (world / "recipe.yaml").write_text(RECIPE.replace(before, after))


def nan(held):
    held["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan


def infinite(held):
    held["model.norm.weight"][0] = torch.inf


def index(world):
    (world / "m0/model.safetensors").unlink()
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (world / "m0/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shared_prompt(world):
    line = (world / "eft_heldout.jsonl").read_text().splitlines(keepends=True)[0].replace("eft-heldout", "eft-again")
    (world / "eft.jsonl").write_text((world / "eft.jsonl").read_text() + line)


WEIGHTS, NORM = "m0/model.safetensors", "model.norm.weight"

DAMAGES = {
    # checkpoints
    "weights cut by 100 bytes": (cut(WEIGHTS, -100), "model.safetensors is truncated or corrupt"),
    "weights cut in the header": (cut(WEIGHTS, 300), "model.safetensors is truncated or corrupt"),
    "weights cut in the header's length": (cut(WEIGHTS, 5), "model.safetensors is truncated or corrupt"),
    "weights empty": (cut(WEIGHTS, 0), "model.safetensors is truncated or corrupt"),
    "header longer than the file": (content(WEIGHTS, struct.pack("<Q", 1 << 40) + b"{}"), "model.safetensors is trunc"),
    "header is no JSON": (
        content(WEIGHTS, struct.pack("<Q", 4) + b"oops"),
        "model.safetensors is truncated or corrupt",
    ),
    "weights missing": (remove(WEIGHTS), "has neither model.safetensors nor an index"),
    "index without its shard": (index, "model-00001-of-00002.safetensors, which is missing"),
    "NaN weight": (tensors(nan), "model.layers.2.mlp.up_proj.weight holds NaN or infinity"),
    "infinite weight": (tensors(infinite), "model.norm.weight holds NaN or infinity"),
    "tensor missing": (tensors(lambda held: held.pop(NORM)), f"first {NORM}"),
    "tensor too many": (tensors(lambda held: held.update(bias=torch.zeros(3))), "first bias"),
    "tensor misshapen": (tensors(lambda held: held.update({NORM: torch.zeros(7)})), f"{NORM} has shape [7]"),
    "tensor of integers": (tensors(lambda held: held.update({NORM: torch.zeros(128).int()})), f"{NORM} is torch.int32"),
    "config missing": (remove("m0/config.json"), "config.json is missing"),
    "config is no JSON": (cut("m0/config.json", 50), "config.json is not JSON"),
    "config is a list": (content("m0/config.json", "[]"), "config.json holds a list"),
    "config without a size": (config(hidden_size=None), "config.json has no hidden_size"),
    "config with a text for a size": (config(hidden_size="128"), "config.json: hidden_size is '128'"),
    "heads that do not divide": (config(num_key_value_heads=3), "n_heads is 4, not a multiple of n_kv_heads (3)"),
    "another architecture": (config(model_type="gpt2"), "model_type is 'gpt2'"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "scaled rope": (config(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn'"),
    "another vocabulary": (config(vocab_size=40), "40 embeddings: they do not belong together"),
    "tokenizer cut": (cut("m0/tokenizer.model", 100), "tokenizer.model is not a SentencePiece model"),
    "tokenizer missing": (remove("m0/tokenizer.model"), "tokenizer.model: there is no such tokenizer"),
    # recipes
    "recipe with an unknown key": (recipe("model:", "modle: m1\nmodel:"), "unknown key 'modle'; did you mean model?"),
    "recipe that is no YAML": (recipe("}", ""), "recipe.yaml"),
    "recipe with a key twice": (recipe("model: m0", "model: m0\nmodel: m0"), "'model' stands twice"),
    "recipe that is a list": (content("recipe.yaml", "- model"), "recipe.yaml"),
    "recipe that is not text": (content("recipe.yaml", b"\xff\xfe\x00"), "recipe.yaml"),
    "recipe with a wrong type": (recipe("m0\n", "m0\nrounds: two\n"), 'rounds is "two"; expected an integer'),
    "recipe with a number out of range": (recipe("m0\n", "m0\ncandidates: {top_p: 0}\n"), "candidates.top_p is 0"),
    "recipe that names no file": (recipe("ift.jsonl", "nowhere.jsonl"), "nowhere.jsonl, which does not exist"),
    "recipe with two beginnings": (recipe("m0\n", "m0\nm1: m0\n"), "found model and m1"),
    "template without a block": (
        content("judge.jinja", "{% block rubric %}x{% endblock %}"),
        "expected exactly rubric",
    ),
    "template with a syntax error": (content("judge.jinja", "{% block rubric %}"), "judge.jinja, line 1"),
    # data
    "row that is no JSON": (second_line("ift.jsonl", '{"prompt": '), "ift.jsonl:2: not JSON"),
    "row that is no object": (second_line("ift.jsonl", "3"), "ift.jsonl:2: the row is the number 3"),
    "boolean for a text": (
        second_line("ift.jsonl", '{"prompt": true, "response": "x"}'),
        "'prompt' is the boolean true",
    ),
    "empty answer": (second_line("ift.jsonl", '{"prompt": "x", "response": " "}'), "ift.jsonl:2: 'response' is empty"),
    "answer missing": (second_line("ift.jsonl", '{"prompt": "x"}'), "ift.jsonl:2: the row has a prompt and no answer"),
    "NaN in a row": (second_line("ift.jsonl", '{"prompt": NaN}'), "ift.jsonl:2"),
    "row that is not UTF-8": (second_line("ift.jsonl", b'{"prompt": "\xff"}'), "ift.jsonl:2: not UTF-8 at byte 13"),
    "half a surrogate pair": (second_line("heldout.jsonl", '{"prompt": "\\ud800"}'), "heldout.jsonl:2"),
    "the same id twice": (second_line("heldout.jsonl", '{"id": "heldout-0000", "prompt": "x"}'), "'heldout-0000'"),
    "file without rows": (content("eft_heldout.jsonl", "\n"), "eft_heldout.jsonl holds no usable rows"),
    "one ranked answer": (
        second_line("eft.jsonl", '{"prompt": "x", "answers": [{"text": "a", "rank": 0}]}'),
        "eft.jsonl:2: 'answers' has one entry",
    ),
    "rank that is no number": (
        second_line("eft.jsonl", '{"prompt": "x", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": true}]}'),
        "eft.jsonl:2: 'rank' is the boolean true",
    ),
    "unknown format": (content("prompts.jsonl", '{"question": "x"}\n'), "prompts.jsonl:1"),
    "too few prompts": (content("prompts.jsonl", '"copy a b c"\n'), "prompts.jsonl has 1 usable prompts"),
    "held-out prompt among the judge data": (shared_prompt, "eft.jsonl: group eft-again"),
}


def run(world, capsys):
    code = main(
        ["--quiet", "--recipe", str(world / "recipe.yaml"), "--out", str(world / "out"), "gates.min_pairs=1000"]
    )
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_that_names_the_culprit(name, world, capsys):
    damage, culprit = DAMAGES[name]
    damage(world)
    before = sorted(world.rglob("*"))
    code, said = run(world, capsys)
    assert code == 2 and culprit in said, said
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and "Traceback" not in said
    assert (
        sorted(world.rglob("*")) == before
    )  # not even the directory of the run: it can be started when this is mended


def test_at_least_forty_kinds_of_damage_are_known():
    assert len(DAMAGES) >= 40


def test_the_undamaged_world_goes_through_to_a_gate(world, capsys):
    """What the damaged ones are compared with: all files are read, SFT runs, and the first gate is reached."""
    (world / "recipe.yaml").write_text(RECIPE + "sft: {max_steps: 1}\neft: {attempts: 1, max_tokens: 2}\n")
    code, said = run(world, capsys)
    *warnings, stopped = said.splitlines()
    assert code == 3 and stopped.startswith("stopped: no judgement of the SFT baseline agrees")
    assert [line[:9] for line in warnings] == ["warning: "]  # the lengths, which are set for larger models
