"""The shape of a model: HF's config.json of both generations of transformers, presets, and impossible values."""

import json
from dataclasses import replace

import pytest

from engine.config import PRESETS, LlamaConfig
from engine.errors import CheckpointError, InputError
from tests.engine.helpers import small_config

# What Llama 2 7B's config.json says in transformers 4, and the same in transformers 5
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
IN_TRANSFORMERS_5 = {
    **{name: value for name, value in LLAMA_2_7B.items() if name not in ("rope_scaling", "torch_dtype")},
    "dtype": "float16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


@pytest.mark.parametrize("values", [LLAMA_2_7B, IN_TRANSFORMERS_5], ids=["transformers 4", "transformers 5"])
def test_llama_2_7b_is_read_from_either_generation(values):
    assert LlamaConfig.from_hf(values) == PRESETS["7B"]


@pytest.mark.parametrize("name, billions", [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192)])
def test_presets_have_the_published_number_of_parameters(name, billions):
    assert PRESETS[name].n_parameters == billions


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), small_config(), small_config(tie_embeddings=True, rope_theta=5e5, norm_eps=1e-6, head_dim=24)],
)
def test_what_is_written_is_read(config):
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_contents_file_and_directory_are_the_same_source(tmp_path):
    config = small_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert LlamaConfig.from_hf(tmp_path) == LlamaConfig.from_hf(str(tmp_path / "config.json")) == config


def test_what_hf_leaves_out_or_writes_as_null_has_hfs_default():
    left_out = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    expected = replace(PRESETS["7B"], norm_eps=1e-6)
    assert LlamaConfig.from_hf({k: v for k, v in LLAMA_2_7B.items() if k not in left_out}) == expected
    assert LlamaConfig.from_hf({**LLAMA_2_7B, **dict.fromkeys([*left_out, "head_dim", "rope_theta"])}) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
    ],
)
def test_rope_theta_is_found_wherever_it_stands(changes):
    assert LlamaConfig.from_hf({**LLAMA_2_7B, **changes}) == replace(PRESETS["7B"], rope_theta=5e5)


def test_written_ids_and_dtype_are_the_callers():
    values = small_config().to_hf("bfloat16", bos_id=7, eos_id=8)
    assert (values["torch_dtype"], values["bos_token_id"], values["eos_token_id"]) == ("bfloat16", 7, 8)
    assert values["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_missing_size_is_named_once(name):
    with pytest.raises(CheckpointError) as caught:
        LlamaConfig.from_hf({k: v for k, v in LLAMA_2_7B.items() if k != name}, where="some.json")
    assert str(caught.value) == f"some.json has no {name}; a Llama config needs it"


@pytest.mark.parametrize("model_type", [None, "mistral"])
def test_another_model_type_is_named(model_type):
    with pytest.raises(CheckpointError, match=f"config.json: model_type is {model_type!r}"):
        LlamaConfig.from_hf({**LLAMA_2_7B, "model_type": model_type})


def test_a_missing_model_type_is_named():
    with pytest.raises(CheckpointError, match="model_type is None"):
        LlamaConfig.from_hf({name: value for name, value in LLAMA_2_7B.items() if name != "model_type"})


def test_a_type_error_of_json_is_named():
    with pytest.raises(CheckpointError, match=r"config\.json: LlamaConfig\.tie_embeddings is 'false'"):
        LlamaConfig.from_hf({**LLAMA_2_7B, "tie_word_embeddings": "false"})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaled_rotary_embedding_is_named(name, key):
    with pytest.raises(CheckpointError, match="rope type 'dynamic'"):
        LlamaConfig.from_hf({**LLAMA_2_7B, name: {key: "dynamic", "factor": 2.0}})


def test_metas_layout_is_told_apart_and_its_file_beside_hfs_does_no_harm(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Meta's layout and has no config"):
        LlamaConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    assert LlamaConfig.from_hf(tmp_path) == PRESETS["7B"]


# What params.json of the released models says
META_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
META_13B = {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1}
META_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}


@pytest.mark.parametrize("name, params", [("7B", META_7B), ("13B", META_13B), ("70B", META_70B)])
def test_metas_params_of_the_released_models_are_the_presets(tmp_path, name, params):
    assert LlamaConfig.from_meta(params, vocab_size=32000) == PRESETS[name]
    (tmp_path / "params.json").write_text(json.dumps({**params, "vocab_size": 32000}))
    assert LlamaConfig.from_meta(tmp_path / "params.json") == PRESETS[name]


def test_what_metas_params_may_add_is_taken():
    added = {"rope_theta": 1000000, "max_seq_len": 2048, "head_dim": 64, "norm_eps": None, "vocab_size": None}
    expected = replace(PRESETS["7B"], rope_theta=1e6, max_seq_len=2048, head_dim=64)
    assert LlamaConfig.from_meta({**META_7B, **added}, vocab_size=32000) == expected


def test_a_vocabulary_left_to_the_tokenizer_is_asked_for():
    with pytest.raises(CheckpointError, match=r"params\.json: vocab_size is -1"):
        LlamaConfig.from_meta(META_7B)


def test_integers_and_floats_are_one_config():
    assert repr(LlamaConfig(rope_theta=10000)) == repr(LlamaConfig(rope_theta=10000.0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 0}, "dim is 0; expected a positive integer"),
        ({"n_layers": True}, "n_layers is True"),
        ({"ffn_dim": 96.0}, "ffn_dim is 96.0"),
        ({"norm_eps": 0}, "norm_eps is 0; expected a positive number"),
        ({"norm_eps": True}, "norm_eps is True"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1; expected true or false"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_heads is 4, not a multiple of n_kv_heads \(3\)"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even number"),
    ],
)
def test_an_impossible_value_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        small_config(**changes)
