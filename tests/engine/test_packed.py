"""Packed weights: what is copied, what is given up, and that it is the same model."""

import pytest
import torch

from engine import ops
from engine.checkpoint import hf_tensors, load_checkpoint, save_checkpoint
from engine.errors import InputError
from engine.llm import LLM
from engine.model import given_up, tree_attend
from engine.packed import PackedWeights
from engine.quantize import quantization_error
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config, widened

KINDS = [("float32", None), ("float32", "int8"), ("bfloat16", None), ("bfloat16", "int8")]
PROMPTS = [[1, *range(3, 3 + length)] for length in (5, 40, 70)]


def answers(llm):
    params = SamplingParams(n=2, max_tokens=6, seed=3, logprobs=1)
    return [[(a.token_ids, a.logprobs) for a in out.outputs] for out in llm.generate(PROMPTS, params)]


@pytest.fixture
def directory(tmp_path):
    save_checkpoint(random_llama(small_config(), seed=2), tmp_path / "m")
    return tmp_path / "m"


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2 and p is not model.embed]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_they_serve_a_models_forward_and_its_head(dtype, bound):
    """bf16: the same weights in fp32, so what differs is the rounding of rows to bf16 before each product."""
    model = random_llama(small_config(), dtype=dtype)
    exact = widened(model)
    packed = PackedWeights()
    tokens, positions, attend = torch.arange(9), torch.arange(9), tree_attend(torch.full((9,), 9))
    hidden = model(tokens, positions, attend, packed.kernels(threads=2))
    logits, expected = packed(hidden, model.head), exact(tokens, positions, attend) @ exact.head.T
    assert hidden.dtype == logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= bound * expected.abs().max()
    assert packed.bytes() == dtype.itemsize * sum(-(-len(p) // 64) * 64 * p.shape[1] for p in matrices(model))


@torch.no_grad()
def test_a_live_models_weights_are_copied_once_and_again_after_an_update():
    model, packed, x = random_llama(small_config()), PackedWeights(), torch.ones(3, 64)
    packed.follow(model.weight_epoch)
    before = packed(x, model.head)
    model.head.mul_(2)
    assert torch.equal(packed(x, model.head), before)  # nobody told
    packed.follow(model.weights_changed())
    assert torch.equal(packed(x, model.head), 2 * before)
    packed.clear()
    assert packed.bytes() == 0 and not any(given_up(p) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_packing_refuses_other_dtypes(dtype, quantization):
    with pytest.raises(InputError, match=rf"{dtype}; expected torch.float32 or torch.bfloat16"):
        ops.pack_linear(torch.zeros(3, 4, dtype=dtype), quantization)


@pytest.mark.parametrize(("dtype", "quantization"), KINDS)
def test_of_a_directory_only_packed_matrices_are_kept_and_it_is_the_same_model(directory, dtype, quantization):
    llm = LLM(directory, dtype=dtype, quantization=quantization)
    live = LLM(load_checkpoint(directory, getattr(torch, dtype)), quantization=quantization)
    assert all(map(given_up, matrices(llm.model))) and not any(map(given_up, matrices(live.model)))
    assert llm.model.embed.isfinite().all() and all(p.isnan().all() for p in matrices(llm.model))
    assert answers(llm) == answers(live)
    assert llm.stats()["packed_bytes"] == live.stats()["packed_bytes"] > 0


@pytest.mark.parametrize(("dtype", "quantization"), KINDS)
@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj", "down", "", "own"])
def test_updates_reach_packed_matrices_also_by_parts(directory, dtype, quantization, part):
    """k and up are in the middle of a fused matrix."""
    other = random_llama(small_config(), seed=5)
    tensors = dict(other.named_parameters()) if part == "own" else dict(hf_tensors(other))
    tensors = {name: tensor for name, tensor in tensors.items() if part in name or part == "own"}
    llm = LLM(directory, dtype=dtype, quantization=quantization)
    live = LLM(load_checkpoint(directory, getattr(torch, dtype)), quantization=quantization)
    before = answers(llm)
    llm.update_weights(tensors)
    live.update_weights(tensors)
    assert answers(llm) == answers(live) != before


def test_a_tied_head_is_packed_beside_the_embedding(tmp_path):
    save_checkpoint(random_llama(small_config(tie_embeddings=True)), tmp_path / "m")
    llm = LLM(tmp_path / "m")
    assert not given_up(llm.model.head)
    assert answers(llm) == answers(LLM(load_checkpoint(tmp_path / "m")))


def test_matrices_that_were_given_up_are_not_trained_scored_or_saved(directory, tmp_path):
    model = LLM(directory).model
    with pytest.raises(InputError, match="packed for sampling and given up: load_checkpoint gives one"):
        model(torch.arange(3), torch.arange(3), tree_attend(torch.full((3,), 3)))
    with pytest.raises(InputError, match="packed for sampling only"):
        save_checkpoint(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_packed_matrices_survive_a_sleeping_cache_and_come_back_with_the_weights(directory):
    llm = LLM(directory)
    before, held = answers(llm), llm.stats()["packed_bytes"]
    llm.sleep()
    assert llm.stats()["packed_bytes"] == held
    llm.wake()
    assert answers(llm) == before
    llm.sleep(weights=True)
    assert llm.stats()["packed_bytes"] == 0 and not sum(p.numel() for p in llm.model.parameters())
    llm.wake()
    assert all(map(given_up, matrices(llm.model))) and llm.stats()["packed_bytes"] == held
    assert answers(llm) == before


@pytest.mark.parametrize("threads", [1, 2])
def test_int8_gives_a_request_the_same_bits_in_any_company(threads):
    llm = LLM(random_llama(small_config()), quantization="int8", max_batch_tokens=64)
    params = [SamplingParams(n=2, max_tokens=6, seed=seed, logprobs=1) for seed in range(len(PROMPTS))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = llm.generate(PROMPTS, params)
        for output, prompt, asked in zip(together, PROMPTS, params):
            alone = LLM(llm.model, quantization="int8").generate(prompt, asked)[0]
            assert [(a.token_ids, a.logprobs) for a in alone.outputs] == [
                (a.token_ids, a.logprobs) for a in output.outputs
            ]
    finally:
        torch.set_num_threads(before)


def test_int8_is_near_the_model_and_its_error_is_told():
    model = random_llama(small_config())
    found = quantization_error(model, PROMPTS)
    assert found.tokens == sum(map(len, PROMPTS))
    assert 0 < found.kl < 2e-3 and found.kl <= found.worst_kl < 0.05 and found.top1 > 0.9 and 0 < found.logprob < 0.05
    assert quantization_error(model, PROMPTS, quantization=None) == (found.tokens, 0, 0, 1, 0)
    with pytest.raises(InputError, match="no sequence of two tokens or more"):
        quantization_error(model, [[1]])
