"""Replay: SFT rows trained on beside the pairs, in an order of their own, each as often as the others."""

import math

import pytest
import torch

from engine import DPOConfig, DPORow, InputError, SFTConfig, SFTRow, train
from engine.train import trainer
from engine.train.batches import batch_order, replay_batch
from engine.train.packs import Batch
from engine.train.trainer import _backward
from tests.engine.test_train import model, pairs, plain_logprob, with_reference

REPLAY = [SFTRow(row.prompt, row.rejected) for row in pairs(5)]


def rows():
    return with_reference(pairs(8), [(-9.0, -8.0)] * 8)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def trained(**options):
    """Final weights and the metrics of every step."""
    llama, logged = model(), []
    replay = options.pop("replay", None)
    config = DPOConfig(lr=1e-3, batch_size=3, epochs=2, **options)
    train(llama, rows(), config, on_step=lambda *step: logged.append(step[2]), replay=replay)
    return flat(llama.parameters()), logged


def test_the_gradient_is_that_of_dpo_plus_weight_times_the_mean_nll_of_the_replay_rows():
    def gradient(config, replay):
        llama = model(torch.float64)
        metrics, _ = _backward(llama, Batch.take(rows(), replay, config, 1, [2, 5, 0]), config)
        return metrics, flat(p.grad for p in llama.parameters())

    weight, llama = 0.7, model(torch.float64)
    numbers = replay_batch(5, 3, 0, 1)
    nll = -sum(plain_logprob(llama, REPLAY[n].prompt, REPLAY[n].completion) for n in numbers)
    nll = nll / sum(len(REPLAY[n].completion) for n in numbers)
    plain, without = gradient(DPOConfig(), ())
    options = {"replay_weight": weight, "replay_batch_size": 3}
    for budget in (4096, 24):  # 24: several packs each
        metrics, found = gradient(DPOConfig(**options, max_pack_tokens=budget), REPLAY)
        expected = without + weight * flat(torch.autograd.grad(nll, list(llama.parameters()), retain_graph=True))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert metrics["replay_loss"] == pytest.approx(nll.item(), rel=1e-12)
        assert metrics["loss"] == pytest.approx(plain["loss"] + weight * nll.item(), rel=1e-12)
        assert {name: metrics[name] for name in plain if name != "loss"} == pytest.approx(
            {name: value for name, value in plain.items() if name != "loss"}, rel=1e-9
        )


def test_without_replay_nothing_changes_and_no_replay_loss_is_logged():
    weights, logged = trained()
    off, logged_off = trained(replay_weight=0.0, replay_batch_size=3, replay=[])
    assert torch.equal(weights, off) and logged == logged_off
    assert "replay_loss" not in logged[0]


@pytest.mark.parametrize(
    "change",
    [{"replay_weight": 0.2}, {"replay_batch_size": 3}, {"replay": REPLAY[:4]}, {"replay": REPLAY[::-1]}],
    ids=lambda change: next(iter(change)),
)
def test_every_replay_option_changes_the_result(change):
    base = {"replay_weight": 0.1, "replay_batch_size": 2, "replay": REPLAY}
    weights, logged = trained(**base)
    assert math.isfinite(logged[0]["replay_loss"]) and not torch.equal(weights, trained()[0])
    assert not torch.equal(weights, trained(**(base | change))[0])


def test_replay_holds_what_dpo_alone_forgets():
    last = [
        trained(replay_weight=weight, replay_batch_size=5, replay=REPLAY)[1][-1]["replay_loss"]
        for weight in (1e-9, 1.0)
    ]
    assert last[1] < last[0] - 0.1


@pytest.mark.parametrize(("count", "size"), [(5, 2), (5, 5), (3, 7), (1, 4)])
def test_replay_rows_come_in_whole_permutations_one_after_another(count, size):
    stream = [number for step in range(30) for number in replay_batch(count, size, 4, step)]
    cycles = [tuple(stream[start : start + count]) for start in range(0, len(stream) - count + 1, count)]
    assert all(sorted(cycle) == list(range(count)) for cycle in cycles)
    assert len(stream) == 30 * size
    if count > 1:
        assert len(set(cycles)) > 3 and stream != [n for step in range(30) for n in replay_batch(count, size, 5, step)]


def test_replay_has_an_order_of_its_own_from_the_trainings_seed():
    assert replay_batch(40, 40, 3, 0) != batch_order(40, 40, 1, 3, None)[0]
    for seed in (0, 3):
        config = DPOConfig(replay_weight=0.1, replay_batch_size=3, seed=seed)
        replayed = [number for number, _ in Batch.take(rows(), REPLAY, config, 1, [0]).replay]
        assert replayed == replay_batch(5, 3, seed, 1)
    assert replay_batch(5, 3, 0, 1) != replay_batch(5, 3, 3, 1)


def test_replay_rows_have_dropout_masks_of_their_own(monkeypatch):
    asked = []
    real = trainer.pack_dropout
    monkeypatch.setattr(trainer, "pack_dropout", lambda pack, *key: (asked.append(pack.key), real(pack, *key))[1])
    trained(replay_weight=0.1, replay_batch_size=5, replay=REPLAY, dropout=0.1)
    prompts = {key for pack in asked for key in pack.tolist()}
    assert len(prompts) == 8 * 3 + 5 * 2


def test_mistakes_in_replay_are_named():
    for bad in ({"replay_weight": -1.0}, {"replay_weight": math.inf}, {"replay_batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            DPOConfig(**bad)
    with pytest.raises(InputError, match=r"there are 5 replay rows and replay_weight is 0\.0; give both"):
        train(model(), rows(), DPOConfig(), replay=REPLAY)
    with pytest.raises(InputError, match=r"there are 0 replay rows and replay_weight is 0\.5; give both"):
        train(model(), rows(), DPOConfig(replay_weight=0.5))
    with pytest.raises(InputError, match="there are 5 replay rows"):
        train(model(), REPLAY, SFTConfig(), replay=REPLAY)
    with pytest.raises(InputError, match="replay row 1: completion has no tokens"):
        train(model(), rows(), DPOConfig(replay_weight=0.5), replay=[REPLAY[0], SFTRow([1], [])])
    with pytest.raises(InputError, match="replay row 0 is a DPORow; replay trains on SFTRow"):
        train(model(), rows(), DPOConfig(replay_weight=0.5), replay=[DPORow([1], [2], [3])])


def test_a_non_finite_step_names_the_replay_rows_too():
    llama = model()
    with torch.no_grad():
        llama.head[5] = float("nan")
    llama.weights_changed()
    with pytest.raises(FloatingPointError, match=r"on rows \[0\] and replay rows \[1, 0\]|and replay rows \[0, 1\]"):
        config = DPOConfig(replay_weight=0.5, replay_batch_size=2)
        train(llama, rows()[:1], config, replay=REPLAY[:2])
