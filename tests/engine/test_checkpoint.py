"""Checkpoints: what is saved is loaded, whatever the sharding and dtype; every kind of damage is named."""

import json
import os
import re
import resource

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import content_hash, load_checkpoint, save_checkpoint
from engine.errors import CheckpointError, InputError
from engine.tokenizer import Tokenizer
from tests.engine.helpers import random_llama, small_config

UP = "model.layers.1.mlp.up_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 60_000


@pytest.fixture
def saved(tmp_path):
    """A single-file checkpoint, to be damaged."""
    save_checkpoint(random_llama(small_config()), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    save_checkpoint(random_llama(small_config()), tmp_path / "s", max_shard_bytes=SHARD_BYTES)
    return tmp_path / "s"


class FakeTokenizer:
    """The part of a tokenizer that a checkpoint asks for, and no files."""

    path = "tokenizer.model"
    bos_id, eos_id = 5, 6

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def save(self, directory):
        pass


def assert_equal_models(first, second):
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def edit_tensors(directory, edit):
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rejected(directory, *parts):
    """Loading raises one line that names every one of `parts`, and leaves the directory as it was."""
    before = {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")} == before


# What is saved is loaded


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, SHARD_BYTES, 1], ids=["single", "sharded", "one tensor each"])
def test_a_saved_model_is_loaded_equal(tmp_path, tied, shard_bytes):
    model = random_llama(small_config(tie_embeddings=tied))
    save_checkpoint(model, tmp_path / "m", max_shard_bytes=shard_bytes)
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.config == model.config
    assert (loaded.head is loaded.embed) == tied
    assert_equal_models(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_files_keep_the_models_dtype_and_are_widened_exactly(tmp_path, dtype):
    model = random_llama(small_config()).to(dtype)
    save_checkpoint(model, tmp_path / "m")
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / SINGLE).values()} == {dtype}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]
    kept = load_checkpoint(tmp_path / "m", dtype=None)
    assert kept.embed.dtype == dtype
    assert_equal_models(kept, model)
    wide = load_checkpoint(tmp_path / "m")
    assert wide.embed.dtype == torch.float32
    assert_equal_models(wide, model.float())


def test_loading_fp32_files_as_bf16_rounds_to_nearest(tmp_path):
    model = random_llama(small_config())
    save_checkpoint(model, tmp_path / "m")
    assert_equal_models(load_checkpoint(tmp_path / "m", dtype=torch.bfloat16), model.to(torch.bfloat16))


def test_shards_hold_no_more_than_asked_and_the_index_names_every_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (sharded / SINGLE).exists()
    held = {}
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_BYTES
        held |= dict.fromkeys(tensors, shard.name)
        assert shard.name.endswith(f"-of-{len(shards):05d}.safetensors")
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * random_llama(small_config()).config.n_parameters


def test_a_tied_model_has_no_head_in_its_files_and_one_that_is_there_is_ignored(tmp_path):
    model = random_llama(small_config(tie_embeddings=True))
    save_checkpoint(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / SINGLE)
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(111, 64)}))
    assert_equal_models(load_checkpoint(tmp_path / "m"), model)


def test_rotary_frequencies_of_old_files_are_ignored(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(saved, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert_equal_models(load_checkpoint(saved), random_llama(small_config()))


def test_config_json_tells_rope_theta_to_either_version_of_transformers(tmp_path):
    save_checkpoint(random_llama(small_config(rope_theta=50.0)), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_parameters"]["rope_theta"]) == (50.0, 50.0)
    edit_config(tmp_path / "m", rope_parameters=None)
    assert load_checkpoint(tmp_path / "m").config.rope_theta == 50.0


def test_a_loaded_model_accepts_its_weights_as_announced(saved):
    load_checkpoint(saved).check_weights()


# The hash


def test_content_hash_does_not_depend_on_sharding(saved, sharded):
    assert content_hash(saved) == content_hash(sharded)


def test_content_hash_changes_with_one_value(saved):
    before = content_hash(saved)
    assert content_hash(saved) == before

    def edit(tensors):
        tensors[UP][3, 5] = torch.nextafter(tensors[UP][3, 5], torch.tensor(9.0))

    edit_tensors(saved, edit)
    assert content_hash(saved) != before


def test_content_hash_changes_with_the_config_and_with_swapped_tensors(saved):
    hashes = {content_hash(saved)}
    edit_config(saved, rms_norm_eps=1e-4)
    hashes.add(content_hash(saved))

    def swap(tensors):
        gate = UP.replace("up_proj", "gate_proj")
        tensors[UP], tensors[gate] = tensors[gate], tensors[UP]

    edit_tensors(saved, swap)
    hashes.add(content_hash(saved))
    assert len(hashes) == 3


# Writing


def test_save_replaces_an_existing_directory_whole_and_leaves_nothing_behind(tmp_path, sharded):
    (sharded / "stale.txt").write_text("from before")
    other = random_llama(small_config(), seed=1)
    save_checkpoint(other, sharded)
    assert_equal_models(load_checkpoint(sharded), other)
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", "generation_config.json", SINGLE]
    assert [path.name for path in tmp_path.iterdir()] == [sharded.name]


def test_a_failed_save_keeps_the_old_directory_and_leaves_nothing_behind(tmp_path, saved):
    class FullDisk:
        bos_id, eos_id, vocab_size = 1, 2, 111

        def save(self, directory):
            raise OSError("no space left on device")

    before = content_hash(saved)
    with pytest.raises(InputError, match=r"/m cannot be written \(no space left on device\); make room"):
        save_checkpoint(random_llama(small_config(), seed=1), saved, tokenizer=FullDisk())
    assert content_hash(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.parametrize("limit", [100, 20_000, 200_000], ids=["config", "first tensor", "third shard"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, saved, limit):
    """A limit on the size of a file stands in for the disk: the write fails in the middle, in this process alone."""
    before = content_hash(saved)
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous[1]))
    try:
        with pytest.raises(InputError, match=r"/m cannot be written \(.*too large.*\); make room") as caught:
            save_checkpoint(random_llama(small_config(), seed=1), saved, max_shard_bytes=300_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert "\n" not in str(caught.value)
    assert content_hash(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file/m cannot be written \(.*(Not a directory|File exists)"):
        save_checkpoint(random_llama(small_config()), tmp_path / "file" / "m")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_without_permission_is_one_sentence(tmp_path, monkeypatch):
    """Tests often run as root, whom no mode stops: the refusal is injected where the system would give it."""

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(InputError, match=r"/m cannot be written \(.*Permission denied"):
        save_checkpoint(random_llama(small_config()), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_failed_swap_puts_the_old_directory_back(tmp_path, saved, monkeypatch):
    before = content_hash(saved)
    rename = type(saved).rename

    def refuse(path, target):
        if path.name.endswith(".tmp"):
            raise OSError("the rename failed")
        return rename(path, target)

    monkeypatch.setattr(type(saved), "rename", refuse)
    with pytest.raises(InputError, match=r"/m cannot be written \(the rename failed\)"):
        save_checkpoint(random_llama(small_config(), seed=1), saved)
    assert content_hash(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.parametrize("old_is_in_place", [True, False])
def test_a_save_after_a_killed_one_cleans_up(tmp_path, saved, old_is_in_place):
    (tmp_path / ".m.tmp").mkdir()  # killed while it wrote
    (tmp_path / ".m.tmp" / SINGLE).write_bytes(b"half")
    if not old_is_in_place:  # killed between the two renames
        saved.rename(tmp_path / ".m.old")
        rejected(saved, "no such directory", ".m.old", "rename it")
    other = random_llama(small_config(), seed=1)
    save_checkpoint(other, saved)
    assert_equal_models(load_checkpoint(saved), other)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_after_a_killed_one_brings_the_old_directory_back(tmp_path, saved):
    before = content_hash(saved)
    saved.rename(tmp_path / ".m.old")
    with pytest.raises(CheckpointError, match="has 112 pieces"):
        save_checkpoint(random_llama(small_config(), seed=1), saved, tokenizer=FakeTokenizer(112))
    assert content_hash(saved) == before


def test_save_refuses_to_replace_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="thesis holds files but no checkpoint"):
        save_checkpoint(random_llama(small_config()), tmp_path / "thesis")
    with pytest.raises(InputError, match=r"chapter\.txt is a file"):
        save_checkpoint(random_llama(small_config()), tmp_path / "thesis" / "chapter.txt")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_checkpoint(random_llama(small_config()), tmp_path / "empty")
    assert_equal_models(load_checkpoint(tmp_path / "empty"), random_llama(small_config()))


def test_save_through_a_link_keeps_the_link(tmp_path, saved):
    (tmp_path / "link").symlink_to(saved)
    other = random_llama(small_config(), seed=1)
    save_checkpoint(other, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal_models(load_checkpoint(saved), other)


def test_a_model_in_float64_is_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"the model is torch\.float64"):
        save_checkpoint(random_llama(small_config()).to(torch.float64), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_generation_config_has_the_tokenizers_ids_and_the_callers_values(tmp_path):
    model = random_llama(small_config())
    save_checkpoint(model, tmp_path / "m", FakeTokenizer(111), generation_config={"temperature": 0.7})
    written = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 5, "eos_token_id": 6, "temperature": 0.7}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, 6)


def test_a_tokenizer_larger_than_the_model_is_named(tmp_path, saved):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 9),
        model_prefix=str(saved / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = Tokenizer(saved).vocab_size
    assert pieces > 111
    rejected(saved, "tokenizer.model", f"{pieces} pieces", "111 embeddings")


def test_weights_have_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(random_llama(small_config()), tmp_path / "model")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()} == {"0o640"}


def test_save_creates_missing_parents(tmp_path):
    save_checkpoint(random_llama(small_config()), tmp_path / "a" / "b" / "m")
    assert_equal_models(load_checkpoint(tmp_path / "a" / "b" / "m"), random_llama(small_config()))


# Damage


def test_a_missing_directory_is_named(tmp_path):
    rejected(tmp_path / "nowhere", "nowhere", "no such directory")


def test_a_missing_config_is_named(saved):
    (saved / "config.json").unlink()
    rejected(saved, "config.json is missing")


@pytest.mark.parametrize("content", [b'{"hidden_size": 64,', b"\xff\xfe", b"[1, 2]", b""])
def test_a_config_that_is_no_json_object_is_named(saved, content):
    (saved / "config.json").write_bytes(content)
    rejected(saved, "config.json", "JSON")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_without_a_needed_key_names_it(saved, key):
    edit_config(saved, **{key: None})
    rejected(saved, "config.json", f"has no {key}")


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "64"),
        ("num_hidden_layers", 2.5),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", "small"),
        ("rope_parameters", [1]),
    ],
)
def test_a_config_with_an_impossible_value_is_rejected(saved, key, value):
    edit_config(saved, **{key: value})
    rejected(saved, "config.json")


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope type 'llama3'"),
    ],
)
def test_a_model_that_is_not_plain_llama_2_is_rejected(saved, changes, part):
    edit_config(saved, **changes)
    rejected(saved, "config.json", part)


def test_a_directory_without_weights_is_named(saved):
    (saved / SINGLE).unlink()
    rejected(saved, str(saved), "neither model.safetensors nor an index")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(saved, keep):
    path = saved / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    rejected(saved, SINGLE, "truncated or corrupt")


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-00002-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    rejected(sharded, shard.name, "truncated or corrupt")


def test_an_index_to_a_missing_file_is_named(sharded):
    shard = sorted(sharded.glob("model-00002-*.safetensors"))[0]
    shard.unlink()
    rejected(sharded, INDEX, shard.name, "missing")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_a_broken_index_is_named(sharded, content):
    (sharded / INDEX).write_text(content)
    rejected(sharded, INDEX)


def test_an_index_that_names_the_wrong_shard_names_file_and_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    wrong = next(name for name in index["weight_map"].values() if name != index["weight_map"][UP])
    index["weight_map"][UP] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    rejected(sharded, wrong, UP)


def test_values_too_large_for_the_dtype_asked_for_are_named(saved):
    edit_tensors(saved, lambda tensors: tensors[UP][7, 3].fill_(-70000.0))
    load_checkpoint(saved, dtype=torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=rf"{SINGLE}: {re.escape(UP)} reaches 7e\+04, too large for torch\.float16"
    ):
        load_checkpoint(saved, dtype=torch.float16)


def test_shapes_are_checked_before_memory_is_taken(saved):
    edit_config(saved, vocab_size=1 << 50)
    rejected(saved, SINGLE, "model.embed_tokens.weight", "[111, 64]", f"[{1 << 50}, 64]")


def test_a_config_that_cannot_be_read_is_named(saved):
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    rejected(saved, "config.json cannot be read")


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop(UP))
    rejected(saved, UP, "lacks 1 tensor")


def test_a_missing_embedding_is_named_when_the_files_decide_the_dtype(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=re.escape("model.embed_tokens.weight")):
        load_checkpoint(saved, dtype=None)


def test_an_extra_tensor_is_named(saved):
    name = "model.layers.1.self_attn.q_proj.bias"
    edit_tensors(saved, lambda tensors: tensors.update({name: torch.zeros(64)}))
    rejected(saved, name, "has 1 tensor")


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    edit_tensors(saved, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
    rejected(saved, SINGLE, UP, "[64, 96]", "[96, 64]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_is_not_a_weights_is_named(saved, dtype):
    edit_tensors(saved, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    rejected(saved, SINGLE, UP, str(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(saved, value):
    def edit(tensors):
        tensors[UP][7, 3] = value

    edit_tensors(saved, edit)
    rejected(saved, SINGLE, UP, "NaN or infinity")
    with pytest.raises(CheckpointError, match=re.escape(UP)):
        content_hash(saved)
