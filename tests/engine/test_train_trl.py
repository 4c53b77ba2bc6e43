"""The losses against TRL's DPOTrainer: the same model, pairs and reference, its collator, padding and `compute_loss`."""

import pytest
import torch

from engine import DPOConfig, DPORow, load_checkpoint, reference_logprobs, save_checkpoint
from engine.train.packs import Batch
from engine.train.trainer import _backward
from tests.engine.test_train import model, pairs

pytest.importorskip("trl")
EOS = 2


def rows():
    """Pairs of which every answer ends with EOS, which TRL would put there."""
    return [DPORow(row.prompt, [*row.chosen, EOS], [*row.rejected, EOS]) for row in pairs(6)]


def word_tokenizer(vocab_size):
    """The word <id> for every token id, so that TRL's own tokenisation gives back the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(vocab_size)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{EOS}>", pad_token="<0>", unk_token="<0>")


def text(ids):
    return "".join(f" <{token}>" for token in ids)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Policy and reference, saved: two models."""
    places = [tmp_path_factory.mktemp("trl") / name for name in ("policy", "reference")]
    for seed, place in enumerate(places):
        save_checkpoint(model().init_weights(seed, std=0.2), place)
    return places


@pytest.fixture(scope="module")
def trainer(directories, tmp_path_factory):
    import trl
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    policy, reference = (LlamaForCausalLM.from_pretrained(place, dtype=torch.float32) for place in directories)
    records = [{name: text(getattr(row, name)) for name in ("prompt", "chosen", "rejected")} for row in rows()]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False,
    )  # fmt: skip
    return trl.DPOTrainer(
        model=policy, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(records),
        processing_class=word_tokenizer(policy.config.vocab_size),
    )  # fmt: skip


# Ours, and the attributes that TRL's trainer has for its options of these names.
CASES = {
    "sigmoid": ({}, {"loss_types": ["sigmoid"]}),
    "sigmoid, another beta": ({"beta": 0.7}, {"loss_types": ["sigmoid"], "beta": 0.7}),
    "ipo": ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
    "sigmoid + NLL": ({"nll_weight": 0.3}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "ipo + NLL": ({"loss": "ipo", "nll_weight": 2.0}, {"loss_types": ["ipo", "sft"], "loss_weights": [1.0, 2.0]}),
    # TRL smooths labels in some losses only: of a single pair this one is cDPO, as sorting one value does nothing.
    "smoothed, one pair": ({"label_smoothing": 0.2}, {"loss_types": ["aot_unpaired"], "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_trls(case, directories, trainer):
    ours, theirs = CASES[case]
    for name, value in ({"loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0} | theirs).items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    data = rows()[: 1 if "one pair" in case else None]
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(len(data))])
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    theirs_reference = trainer.compute_ref_log_probs(trainer.ref_model, inputs)

    policy, reference = map(load_checkpoint, directories)
    values = reference_logprobs(reference, data)
    torch.testing.assert_close(torch.tensor(values).T, torch.stack(theirs_reference), rtol=1e-5, atol=1e-4)
    data = [DPORow(row.prompt, row.chosen, row.rejected, value) for row, value in zip(data, values, strict=True)]
    config = DPOConfig(**ours, max_pack_tokens=40)
    metrics, _ = _backward(policy, Batch.take(data, (), config, 0, range(len(data))), config)

    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    logged = trainer._metrics["train"]
    for name in set(metrics) - {"loss", "nll_loss"}:
        assert metrics[name] == pytest.approx(logged[name][-1], rel=1e-5, abs=1e-4), name
    for ours_grad, theirs_grad in (
        (policy.embed.grad, trainer.model.model.embed_tokens.weight.grad),
        (policy.head.grad, trainer.model.lm_head.weight.grad),
        (policy.blocks[0].mlp.down.grad, trainer.model.model.layers[0].mlp.down_proj.weight.grad),
    ):
        assert theirs_grad.abs().max() > 1e-3
        assert (ours_grad - theirs_grad).abs().max() <= 1e-5 * max(1.0, theirs_grad.abs().max().item())
