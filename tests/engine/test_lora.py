"""LoRA: adapters beside a frozen base, merged for export and sampling, trained by the same loop, in PEFT's format."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import (
    LLM,
    CheckpointError,
    DPOConfig,
    InputError,
    Llama,
    LlamaConfig,
    LoRA,
    SamplingParams,
    SFTConfig,
    SFTRow,
    TrainingInterrupted,
    copy_in,
    load_adapter,
    load_checkpoint,
    reference_logprobs,
    save_adapter,
    save_checkpoint,
    train,
    tree_attend,
)
from engine.lora import PROJECTIONS
from engine.train.packs import Batch
from engine.train.trainer import _backward
from tests.engine.test_train import pairs, with_reference
from tests.engine.test_train_precision import one_thread  # noqa: F401 (a fixture, used by all)
from tests.engine.test_train_resume import stop_at

CONFIG = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=29, max_seq_len=64)
IDS = torch.tensor([3, 7, 1, 22, 9, 14, 5, 28])


def base(dtype=torch.float32, **changes):
    config = LlamaConfig(**(vars(CONFIG) | changes))
    return Llama(config, dtype).init_weights(seed=1, std=0.2)


def adapted(llama=None, rank=3, alpha=5.0, targets=PROJECTIONS):
    """A LoRA whose B are no zeros."""
    lora = LoRA(llama or base(), rank, alpha, targets)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, adapter in lora.adapters():
            adapter.B.copy_(0.3 * torch.randn(adapter.B.shape, generator=generator))
    lora.weights_changed()
    return lora


def logits(model, ids=IDS):
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), tree_attend(torch.full((len(ids),), len(ids))))
        return (hidden @ model.head.T).double()


def plain_logits(lora):
    """By hand, in float64: the weights of every projection, with alpha / rank * B A added."""
    llama, scale = base(torch.float64, **vars(lora.config)), lora.alpha / lora.rank
    q, kv, ffn = 32, 16, 48
    places = {
        "q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv), "o_proj": slice(None),
        "gate_proj": slice(0, ffn), "up_proj": slice(ffn, 2 * ffn), "down_proj": slice(None),
    }  # fmt: skip
    with torch.no_grad():
        for to, of in zip(llama.parameters(), lora.base.parameters()):
            to.copy_(of)
        for block, adapters in zip(llama.blocks, lora.layers):
            for name, adapter in adapters.items():
                held = block.attention if name[0] in "qkv" or name[0] == "o" else block.mlp
                weight = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "g": "gate_up", "u": "gate_up", "d": "down"}
                update = scale * adapter.B.double() @ adapter.A.double()
                getattr(held, weight[name[0]])[places[name]] += update
    return logits(llama)


@pytest.mark.parametrize(
    "targets", [PROJECTIONS, ("q_proj", "v_proj"), ("k_proj",), ("o_proj", "up_proj"), ("down_proj",)]
)
def test_the_forward_and_the_merged_model_are_the_formula_to_rounding(targets):
    lora = adapted(targets=targets)
    expected = plain_logits(lora)
    bound = 2e-5 * max(1.0, expected.square().mean().sqrt().item())
    assert (logits(lora.base) - expected).abs().max() > 100 * bound  # the adapters do something
    for model in (lora, lora.merged(), copy_in(lora, torch.float32)):
        assert (logits(model) - expected).abs().max() <= bound


def test_a_fresh_lora_is_its_base_bit_for_bit_and_begins_as_peft_begins():
    llama = base()
    lora = LoRA(llama, rank=4)
    assert torch.equal(logits(lora), logits(llama))
    for _, adapter in lora.adapters():
        bound = adapter.A.shape[1] ** -0.5
        assert 0.8 * bound < adapter.A.abs().max() <= bound and not adapter.B.any()
    same, other = LoRA(llama, rank=4), LoRA(llama, rank=4, seed=1)
    assert torch.equal(same.layers[0]["q_proj"].A, lora.layers[0]["q_proj"].A)
    assert not torch.equal(other.layers[0]["q_proj"].A, lora.layers[0]["q_proj"].A)


def test_a_deep_copy_has_a_base_and_adapters_of_its_own():
    lora = adapted()
    again = copy.deepcopy(lora)
    assert torch.equal(logits(again), logits(lora))
    before = logits(lora)
    with torch.no_grad():
        again.base.embed.zero_()
        again.layers[1]["o_proj"].B.zero_()
    assert torch.equal(logits(lora), before) and not torch.equal(logits(again), before)


def test_gradients_are_those_of_the_formula_in_float64_and_the_base_gets_none():
    lora = adapted(base(torch.float64))
    parameters = list(lora.parameters())
    assert all(parameter.dtype == torch.float64 for parameter in parameters) and len(parameters) == 2 * 7 * 2

    def loss():
        hidden = lora(IDS, torch.arange(8), tree_attend(torch.full((8,), 8)))
        return (hidden @ lora.head.T).sin().sum()

    loss().backward()
    assert all(parameter.grad is None for parameter in lora.base.parameters())
    chance = torch.Generator().manual_seed(2)
    for parameter in parameters:
        direction = torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
        found = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = float(loss())
            parameter -= 2e-6 * direction
            below = float(loss())
            parameter += 1e-6 * direction
        assert found == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


def test_a_bf16_base_has_fp32_adapters_and_computes_in_bf16():
    lora = adapted(base(torch.bfloat16))
    assert all(parameter.dtype == torch.float32 for parameter in lora.parameters())
    hidden = lora(IDS, torch.arange(8), tree_attend(torch.full((8,), 8)))
    assert hidden.dtype == torch.bfloat16
    expected, rms = plain_logits(lora), plain_logits(lora).square().mean().sqrt()
    assert (logits(lora.merged(torch.float32)) - expected).abs().max() <= 2e-5 * max(1.0, rms)
    assert (logits(lora) - expected).abs().max() <= 0.1 * rms
    assert lora.merged().embed.dtype == torch.bfloat16


# ---- training ---------------------------------------------------------------------------------------------------------


def rows(llama, count=8):
    return with_reference(pairs(count), reference_logprobs(llama, pairs(count)))


def test_dpo_with_lora_lowers_the_loss_and_leaves_the_base_alone():
    llama, logged = base(), []
    before = [parameter.detach().clone() for parameter in llama.parameters()]
    lora = LoRA(llama, rank=4, alpha=8)
    given = rows(llama)  # of the base, adapters off: no second model
    assert given == rows(lora)
    config = DPOConfig(lr=1e-2, min_lr=1e-2, epochs=15, batch_size=8)
    epoch = lora.weight_epoch
    result = train(lora, given, config, on_step=lambda *step: logged.append(step[2]))
    assert logged[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert logged[-1]["loss"] < 0.3 and logged[-1]["rewards/accuracies"] == 1.0
    assert result.weight_epoch == lora.weight_epoch == epoch + 15
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), before))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in llama.parameters())


def test_one_pack_and_many_have_the_same_gradient():
    given, gradients = rows(base()), []
    for budget in (4096, 22):
        lora, config = adapted(), DPOConfig(batch_size=8, max_pack_tokens=budget)
        _backward(lora, Batch.take(given, (), config, 0, range(8)), config)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in lora.parameters()]))
    assert gradients[0].abs().max() > 0.05
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6


def trained(out_dir, stops=(), **options):
    config = DPOConfig(
        **{"lr": 1e-2, "epochs": 2, "batch_size": 2, "dropout": 0.1, "max_pack_tokens": 40, "save_every": 2} | options
    )
    given = rows(base()), config, out_dir
    for step in stops:
        with pytest.raises(TrainingInterrupted):
            train(LoRA(base(), rank=4), *given, should_stop=stop_at(step))
    lora = LoRA(base(), rank=4)
    result = train(lora, *given)
    return (
        [parameter.detach() for parameter in lora.parameters()],
        result.metrics_path.read_bytes(),
        result.weight_epoch,
    )


def test_a_resume_has_the_bits_of_the_unbroken_run_and_stores_adapters_only(tmp_path):
    expected, found = trained(tmp_path / "whole"), trained(tmp_path / "broken", stops=(1, 4, 2))
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0])) and found[1:] == expected[1:]
    assert trained(tmp_path / "again", activation_checkpointing="full")[1] == expected[1]
    (file,) = (tmp_path / "broken/state").glob("*.safetensors")
    stored = load_file(file)
    parameters = {name.split("layers.")[-1] for name, _ in LoRA(base(), rank=4).named_parameters()}
    assert {name.split("layers.")[-1] for name in stored} == parameters and len(stored) == 4 * len(parameters)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: LoRA(base(), rank=5), r"lora\.rank was 4, is 5"),
        (lambda: LoRA(base(), rank=4, targets=["q_proj"]), r"lora\.targets was"),
        (lambda: LoRA(base().init_weights(seed=2), rank=4), "the model holds other weights"),
        (base, "lora was {"),
    ],
)
def test_a_state_of_another_lora_or_base_is_refused(other, said, tmp_path):
    given = rows(base()), DPOConfig(lr=1e-2, epochs=2, batch_size=2), tmp_path
    with pytest.raises(TrainingInterrupted):
        train(LoRA(base(), rank=4), *given, should_stop=stop_at(2))
    with pytest.raises(InputError, match=said):
        train(other(), *given)


def test_other_precisions_are_refused_for_adapters():
    for precision in ("bf16-copy", "bf16-stochastic"):
        with pytest.raises(InputError, match="adapters are fp32 in any case: take precision='fp32'"):
            train(LoRA(base()), [SFTRow([1], [2])], SFTConfig(precision=precision))


# ---- sampling ---------------------------------------------------------------------------------------------------------

PROMPTS = [[3, 7, 1], [4, 4]]
PARAMS = SamplingParams(n=2, temperature=1.0, max_tokens=12, seed=5, logprobs=1, ignore_eos=True)


def samples(llm):
    return [(c.token_ids, c.logprobs) for output in llm.generate(PROMPTS, PARAMS) for c in output.outputs]


def test_llm_samples_the_merged_model_and_follows_the_training():
    lora = adapted()
    llm = LLM(lora, kv_cache_gb=0.01)
    assert llm.model.embed is lora.base.embed  # shared, what has no adapter
    assert samples(llm) == samples(LLM(lora.merged(), kv_cache_gb=0.01))
    first = samples(llm)
    train(lora, [SFTRow([3, 7], [1, 2, 3])], SFTConfig(lr=0.05, max_steps=3))
    assert samples(llm) != first and samples(llm) == samples(LLM(lora.merged(), kv_cache_gb=0.01))
    outputs = llm.generate(PROMPTS, PARAMS)
    assert outputs[0].outputs[0].weight_epoch == lora.weight_epoch == llm.weight_epoch
    with pytest.raises(InputError, match="this LLM samples a LoRA, merged"):
        llm.update_weights({})
    with torch.no_grad():
        lora.layers[0]["q_proj"].B.add_(1.0)
    with pytest.raises(InputError, match=r"layers\.0\.q_proj\.B was changed in place"):
        llm.generate(PROMPTS, PARAMS)


def test_llm_samples_a_live_model_in_bf16_through_the_trainers_copy():
    llama = base()
    llm = LLM(llama, dtype="bfloat16", kv_cache_gb=0.01)
    assert llm.model is copy_in(llama, torch.bfloat16)
    train(llama, [SFTRow([3, 7], [1, 2, 3])], SFTConfig(lr=0.01, max_steps=3, precision="bf16-copy"))
    found, rounded = samples(llm), base(torch.bfloat16)
    with torch.no_grad():
        for to, of in zip(rounded.parameters(), llama.parameters()):
            to.copy_(of)
    rounded.weights_changed()
    assert found == samples(LLM(rounded, kv_cache_gb=0.01))
    llm.update_weights(dict(base().named_parameters()))  # goes to the model that the copy is of
    assert torch.equal(llama.embed, base().embed)
    assert samples(llm) == samples(LLM(base(torch.bfloat16), kv_cache_gb=0.01))


# ---- PEFT's files -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_no_adapters(tmp_path):
    with pytest.raises(InputError, match=r"the model is a LoRA; a checkpoint holds a Llama .*merged"):
        save_checkpoint(LoRA(base()), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_that_was_saved_is_the_same_when_it_is_loaded(tmp_path):
    for targets in (PROJECTIONS, ("v_proj", "q_proj")):
        lora = adapted(targets=targets)
        save_adapter(lora, tmp_path / "adapter")  # the second replaces the first
        again = load_adapter(base(), tmp_path / "adapter")
        assert (again.rank, again.alpha, again.targets) == (lora.rank, lora.alpha, lora.targets)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lora.parameters(), strict=True))
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1  # all for whom the umask lets
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(InputError, match="notes holds files but no adapter and would be replaced whole"):
        save_adapter(lora, tmp_path / "notes")
    with pytest.raises(InputError, match=r"a\.txt is a file; an adapter is a directory"):
        save_adapter(lora, tmp_path / "notes/a.txt")


def hf_logits(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0].double()


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_ours_and_we_load_pefts_with_the_same_logits(tied, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_checkpoint(base(tie_embeddings=tied), tmp_path / "model")
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    lora = adapted(load_checkpoint(tmp_path / "model"))
    save_adapter(lora, tmp_path / "ours", base_model=str(tmp_path / "model"))
    expected = logits(lora)
    bound = 2e-5 * max(1.0, expected.square().mean().sqrt().item())
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "ours")
    assert (hf_logits(theirs) - expected).abs().max() <= bound
    assert (hf_logits(theirs.merge_and_unload()) - logits(lora.merged())).abs().max() <= bound

    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["v_proj", "q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load_checkpoint(tmp_path / "model"), tmp_path / "theirs")
    assert ours.targets == ("q_proj", "v_proj", "down_proj") and (ours.rank, ours.alpha) == (5, 7.0)
    found = hf_logits(model.eval())
    assert (logits(ours) - found).abs().max() <= 2e-5 * max(1.0, found.square().mean().sqrt().item())


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def edit_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), r"bin is a pickle"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"xx"), "is truncated or corrupt"),
        (lambda d: edit_config(d, use_dora=True), "use_dora is True; this engine has plain LoRA"),
        (lambda d: edit_config(d, rank_pattern={"q_proj": 4}), "rank_pattern is"),
        (lambda d: edit_config(d, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda d: edit_config(d, peft_type="LOHA"), "peft_type is 'LOHA'"),
        (lambda d: edit_config(d, r=None), r"adapter_config\.json: rank is None"),
        (lambda d: edit_config(d, lora_alpha="x"), "alpha is 'x'; expected a finite number"),
        (lambda d: edit_config(d, r=2), r"lora_A\.weight has shape \[3, 32\]; .* ask for \[2, 32\]"),
        (lambda d: edit_tensors(d, lambda t: t.pop(NAME)), r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing"),
        (lambda d: edit_tensors(d, lambda t: t[NAME].fill_(torch.nan)), "holds something else than finite"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({NAME.replace("q_proj", "x"): t[NAME].clone()})),
            "x.lora_A.weight is no",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({NAME.replace("1", "x"): t[NAME].clone()})),
            r"layers\.x\.self_attn\.q_proj\.lora_A\.weight is no adapter",
        ),
        (lambda d: edit_tensors(d, lambda t: t.clear()), r"adapter_model\.safetensors holds no adapters"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({NAME.replace("1", "2"): t[NAME].clone()})),
            r"layers\.2\..* is no",
        ),
        (
            lambda d: edit_tensors(d, lambda t: [t.pop(name) for name in list(t) if "layers.0.mlp.up" in name]),
            "layer 0 has no adapter of up_proj",
        ),
    ],
)
def test_a_damaged_or_unknown_adapter_is_named(damage, said, tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError, match=said):
        load_adapter(base(), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 0; expected an integer from 1 to the model's dim"),
        ({"rank": True}, "rank is True"),
        ({"rank": 33}, r"rank is 33; .* \(32\)"),
        ({"alpha": 0}, "alpha is 0; expected a finite number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": "q_proj"}, "targets is 'q_proj'; expected some of q_proj, k_proj"),
        ({"targets": []}, r"targets is \[\]"),
        ({"targets": ["lm_head"]}, "targets is .'lm_head'.; expected some of"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected an integer from 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(InputError, match=said):
        LoRA(base(), **options)
    with pytest.raises(InputError, match="base is a str; expected a Llama"):
        LoRA("7B")
