"""Logits against transformers' LlamaForCausalLM, through directories written by either side."""

import shutil
from dataclasses import replace

import pytest
import torch

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config import PRESETS
from engine.llm import LLM
from engine.model import tree_attend
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config
from tests.engine.meta_layout import save_meta

transformers = pytest.importorskip("transformers", reason="transformers is not installed; nothing to compare with")

SHAPES = pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
LENGTH = 70


def tokens():
    return torch.randint(0, 111, (LENGTH,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model):
    hidden = model(tokens(), torch.arange(LENGTH), tree_attend(torch.full((LENGTH,), LENGTH)))
    return hidden @ model.head.T


@torch.no_grad()
def their_logits(model):
    return model(tokens()[None]).logits[0]


def assert_equal_logits(ours, theirs):
    assert ours.shape == theirs.shape
    assert len(ours) == LENGTH
    rms = theirs.pow(2).mean().sqrt().item()
    assert rms > 0.1  # the comparison is about something
    assert (ours - theirs).abs().max().item() <= 2e-5 * max(1.0, rms)


def their_model(config, **changes):
    torch.manual_seed(0)
    values = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.1,
        **changes,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()


@SHAPES
@TIED
def test_our_logits_of_a_directory_saved_by_transformers_are_theirs(tmp_path, kv_heads, tied):
    theirs = their_model(small_config(n_kv_heads=kv_heads, tie_embeddings=tied))
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert (ours.head is ours.embed) == tied
    assert_equal_logits(our_logits(ours), their_logits(theirs))


@SHAPES
@TIED
def test_their_logits_of_a_directory_saved_by_us_are_ours(tmp_path, kv_heads, tied):
    ours = random_llama(small_config(n_kv_heads=kv_heads, tie_embeddings=tied))
    save_checkpoint(ours, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert_equal_logits(our_logits(ours), their_logits(theirs))


def test_norm_eps_rope_theta_and_head_dim_reach_the_arithmetic_both_ways(tmp_path):
    config = small_config(norm_eps=0.1, rope_theta=50.0, head_dim=24)
    rope = {"rope_type": "default", "rope_theta": 50.0}
    theirs = their_model(config, rms_norm_eps=0.1, rope_theta=50.0, rope_parameters=rope)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs")
    assert ours.config == config
    assert_equal_logits(our_logits(ours), their_logits(theirs))
    save_checkpoint(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_equal_logits(our_logits(ours), their_logits(again))


def test_a_sharded_directory_of_ours_is_loaded_by_transformers(tmp_path):
    ours = random_llama(small_config())
    save_checkpoint(ours, tmp_path / "m", max_shard_bytes=60_000)
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert_equal_logits(our_logits(ours), their_logits(theirs))


def test_a_sharded_directory_of_theirs_is_loaded_by_us(tmp_path):
    theirs = their_model(small_config())
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_equal_logits(our_logits(load_checkpoint(tmp_path)), their_logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["mha", "gqa", "mqa"])
@TIED
@pytest.mark.parametrize("layout", ["single", "sharded", 1, 2, 8])
def test_every_layout_and_dtype_gives_their_logits(tmp_path, layout, tied, kv_heads, dtype):
    """`layout`: HF's, or the number of Meta's files. The arithmetic is fp32; the files are in `dtype`."""
    config = small_config(n_heads=8, n_kv_heads=kv_heads, head_dim=8, vocab_size=112, tie_embeddings=tied)
    theirs = their_model(config, rms_norm_eps=config.norm_eps).to(dtype)
    if layout in ("single", "sharded"):
        theirs.save_pretrained(tmp_path, max_shard_size="30KB" if layout == "sharded" else "1GB")
        assert (tmp_path / "model.safetensors").is_file() == (layout == "single")
    else:
        save_meta(theirs.state_dict(), config, tmp_path, layout)
    assert load_checkpoint(tmp_path, dtype=None).embed.dtype == dtype
    wide = their_model(
        config, rms_norm_eps=config.norm_eps
    )  # not theirs.float(): their rotary table would stay rounded
    wide.load_state_dict(theirs.state_dict())
    assert_equal_logits(our_logits(load_checkpoint(tmp_path)), their_logits(wide))


@pytest.mark.parametrize("head_dim", [2, 6, 18])
def test_any_head_dim_rope_theta_and_eps_in_metas_layout_give_their_logits(tmp_path, head_dim):
    config = small_config(dim=4 * head_dim, head_dim=head_dim, norm_eps=0.1, rope_theta=50.0)
    rope = {"rope_type": "default", "rope_theta": 50.0}
    wide = {"initializer_range": 0.5}  # or the logits of 8 channels are too small to compare
    theirs = their_model(config, rms_norm_eps=0.1, rope_theta=50.0, rope_parameters=rope, **wide)
    save_meta(theirs.state_dict(), config, tmp_path)
    assert_equal_logits(our_logits(load_checkpoint(tmp_path)), their_logits(theirs))


@pytest.mark.full
@pytest.mark.parametrize(
    "name, count, params",
    [
        ("7B", 1, {"multiple_of": 256, "ffn_dim_multiplier": None, "n_kv_heads": None}),
        ("13B", 2, {"multiple_of": 256, "ffn_dim_multiplier": None, "n_kv_heads": None}),
        ("70B", 8, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
    ],
)
def test_a_layer_at_full_width_gives_their_logits_in_both_layouts(tmp_path, name, count, params):
    """One layer of random weights, in Meta's files as that size was released and in HF's shards; 70B: 3.4 GB of each."""
    config = replace(PRESETS[name], n_layers=1, vocab_size=112)
    theirs = their_model(config, rms_norm_eps=config.norm_eps, initializer_range=0.02)
    expected = their_logits(theirs)
    save_meta(theirs.state_dict(), config, tmp_path / "meta", count, rope_theta=None, **params)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="1GB")
    del theirs
    for layout in ("meta", "hf"):
        ours = load_checkpoint(tmp_path / layout)
        assert ours.config == config
        assert_equal_logits(our_logits(ours), expected)
        del ours
        shutil.rmtree(tmp_path / layout)  # not three of these on disk until the session ends


def test_transformers_finds_the_ids_to_stop_at_and_the_callers_sampling_in_our_directory(tmp_path):
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    save_checkpoint(random_llama(small_config()), tmp_path / "m", generation_config=sampling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    found = theirs.generation_config
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert (found.do_sample, found.temperature, found.top_p) == (True, 0.7, 0.9)


@SHAPES
def test_greedy_tokens_are_those_of_their_generate(tmp_path, kv_heads):
    """Equal, or at the first difference their two best logits lie within 1e-4 rms (DESIGN, section 6)."""
    theirs = their_model(small_config(n_kv_heads=kv_heads))
    theirs.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [[1, *torch.randint(3, 111, (n,), generator=generator).tolist()] for n in (1, 20, 63, 64, 130)]
    outputs = LLM(tmp_path).generate(prompts, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ours = output.outputs[0].token_ids
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        assert_greedy(ours, logits)
        reply = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        reply = reply[0, len(prompt) :].tolist()
        assert len(ours) == len(reply) == 100
        differs = next((at for at in range(100) if ours[at] != reply[at]), None)
        if differs is not None:
            assert_near_tie(logits[differs])


def assert_greedy(ids, logits):
    """Every token is the best of its logits (teacher forcing), or nearly tied with it."""
    for token, row in zip(ids, logits, strict=True):
        if row.argmax().item() != token:
            assert (row.max() - row[token]).item() <= 1e-4 * row.pow(2).mean().sqrt().item()


def assert_near_tie(row):
    best, second = row.topk(2).values.tolist()
    assert best - second <= 1e-4 * row.pow(2).mean().sqrt().item()
