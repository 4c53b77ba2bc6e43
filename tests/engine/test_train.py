"""Losses and the training loop: packing changes nothing, the policy equals its reference at first, options have effect."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from engine.config import LlamaConfig
from engine.errors import InputError
from engine.model import Llama, tree_attend
from engine.train.batches import DPORow, SFTRow, batch_order, dpo_tree
from engine.train.config import DPOConfig, SFTConfig, learning_rate
from engine.train.losses import dpo_loss, sequence_logps
from engine.train.packs import Batch, packs
from engine.train.trainer import _backward, pack_logprobs, reference_logprobs, train
from engine.tree import TokenTree

CONFIG = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=29, max_seq_len=64)


def model(dtype=torch.float32):
    return Llama(CONFIG, dtype=dtype).init_weights(seed=1, std=0.2)


def pairs(count=5):
    generator = torch.Generator().manual_seed(3)
    ids = lambda low, high: torch.randint(
        1, 29, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator
    ).tolist()
    return [DPORow(ids(2, 9), ids(1, 8), ids(1, 8)) for _ in range(count)]


def plain_logprob(llama, prompt, answer):
    """One sequence alone, all logits at once."""
    ids = torch.tensor([*prompt, *answer])
    attend = tree_attend(torch.full((len(ids),), len(ids)))
    logits = llama(ids, torch.arange(len(ids)), attend) @ llama.head.T
    logp = torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None]).squeeze(1)
    return logp[len(prompt) - 1 :].sum()


def with_reference(rows, values):
    return [DPORow(row.prompt, row.chosen, row.rejected, value) for row, value in zip(rows, values, strict=True)]


def test_tree_packed_dpo_equals_the_plain_per_sequence_loss_and_gradients_in_float64():
    llama, rows, beta = model(torch.float64), pairs(), 0.3
    reference = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chosen = torch.stack([plain_logprob(llama, row.prompt, row.chosen) for row in rows])
    rejected = torch.stack([plain_logprob(llama, row.prompt, row.rejected) for row in rows])
    margin = beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
    plain = -torch.nn.functional.logsigmoid(margin).mean()
    expected = torch.autograd.grad(plain, list(llama.parameters()))
    total = 0.0
    for pack in TokenTree.pack([dpo_tree(row, i) for i, row in enumerate(rows)], budget=40):
        loss, _ = dpo_loss(pack_logprobs(llama, pack), pack.edges, reference, beta, len(rows))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(plain.item(), rel=1e-12)
    for parameter, grad in zip(llama.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_policy_equal_to_reference_gives_ln_2_and_zero_rewards():
    llama = model()
    rows = with_reference(pairs(), reference_logprobs(llama, pairs()))
    logged = []
    train(
        llama, rows, DPOConfig(batch_size=5, max_steps=1), on_step=lambda step, steps, metrics: logged.append(metrics)
    )
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert logged[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_reference_does_not_depend_on_the_packing():
    llama = model()
    one = torch.tensor(reference_logprobs(llama, pairs(), max_pack_tokens=30))
    many = torch.tensor(reference_logprobs(llama, pairs(), max_pack_tokens=4096))
    assert (one - many).abs().max() <= 1e-4
    for row, (chosen, rejected) in zip(pairs(), many.tolist(), strict=True):
        assert chosen == pytest.approx(plain_logprob(llama, row.prompt, row.chosen).item(), abs=1e-4)
        assert rejected == pytest.approx(plain_logprob(llama, row.prompt, row.rejected).item(), abs=1e-4)


def test_dpo_separates_chosen_from_rejected_and_raises_the_weight_epoch(tmp_path):
    llama = model()
    rows = with_reference(pairs(), reference_logprobs(llama, pairs()))
    before = llama.weight_epoch
    result = train(llama, rows, DPOConfig(lr=3e-3, min_lr=3e-3, epochs=30, batch_size=5), tmp_path)
    logged = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    assert logged[-1]["rewards/margins"] > 0.5 and logged[-1]["rewards/accuracies"] == 1.0
    assert logged[-1]["loss"] < 0.4
    assert result.weight_epoch == before + result.steps == before + 30
    assert not any("second" in name for name in logged[0])  # times live apart
    llama.check_weights()


def test_sft_overfits_a_few_rows_on_their_completions_only():
    llama = model()
    rows = [SFTRow(row.prompt, row.chosen) for row in pairs()]
    logged = []
    train(llama, rows, SFTConfig(lr=1e-2, min_lr=1e-3, epochs=60, batch_size=5), on_step=lambda *a: logged.append(a[2]))
    assert logged[-1]["loss"] < 0.1 * logged[0]["loss"]


def test_packing_does_not_change_a_step():
    small, large = model(), model()
    rows = [SFTRow(row.prompt, row.chosen) for row in pairs(8)]
    train(small, rows, SFTConfig(lr=1e-3, max_steps=1, batch_size=8, max_pack_tokens=20))
    train(large, rows, SFTConfig(lr=1e-3, max_steps=1, batch_size=8, max_pack_tokens=4096))
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-4  # Adam's first step is lr * sign: rounding may flip a zero gradient only


def gradient(rows, numbers, dtype, **options):
    """Metrics and gradient of one batch, and in how many packs it was run."""
    llama = model(dtype)
    config = (DPOConfig if isinstance(rows[0], DPORow) else SFTConfig)(**options)
    batch = Batch.take(rows, (), config, 0, numbers)
    metrics, _ = _backward(llama, batch, config)
    return (
        metrics,
        torch.cat([p.grad.flatten() for p in llama.parameters()]),
        len(list(packs(batch, config, llama.embed.device))),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_pack_many_packs_and_eight_batches_of_one_have_the_same_gradient(kind, dtype, tolerance):
    rows = with_reference(pairs(8), [(-9.0, -8.0)] * 8)
    if kind == "sft":
        rows = [SFTRow(row.prompt, row.chosen) for row in rows]
    whole, expected, count = gradient(rows, range(8), dtype)
    assert count == 1
    assert expected.abs().max() > 0.05  # beside which the tolerances are small
    for budget, at_least in ((40, 2), (22, 4)):
        metrics, found, count = gradient(rows, range(8), dtype, max_pack_tokens=budget)
        assert count >= at_least
        assert (found - expected).abs().max() <= tolerance
        assert metrics == pytest.approx(whole, rel=tolerance, abs=tolerance)
    alone = [gradient(rows, [number], dtype) for number in range(8)]
    shares = [len(row.completion) if kind == "sft" else 1 for row in rows]  # the mean is over tokens, or over pairs
    found = sum(share / sum(shares) * grad for share, (_, grad, _) in zip(shares, alone))
    assert (found - expected).abs().max() <= tolerance
    loss = sum(share / sum(shares) * metrics["loss"] for share, (metrics, _, _) in zip(shares, alone))
    assert loss == pytest.approx(whole["loss"], rel=tolerance)


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs():
    rows = [SFTRow(row.prompt, row.chosen) for row in pairs(8)]
    runs = []
    for seed in (0, 0, 1):
        llama = model()
        train(llama, rows, SFTConfig(lr=1e-3, epochs=2, batch_size=3, seed=seed))
        runs.append(llama.embed.detach().clone())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_two_runs_that_are_large_enough_for_threads_are_identical():
    """A step of 960 tokens at width 128 is shared out: torch's own products and sums begin to at 32,768 elements."""
    config = LlamaConfig(
        dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, vocab_size=512, max_seq_len=256
    )
    draw = torch.Generator().manual_seed(4)
    ids = lambda count: torch.randint(1, 512, (count,), generator=draw).tolist()
    rows = with_reference([DPORow(ids(80), ids(80), ids(80)) for _ in range(8)], [(-500.0, -500.0)] * 8)
    threads, ends = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            llama = Llama(config).init_weights(seed=1)
            train(llama, rows, DPOConfig(lr=1e-3, batch_size=4, epochs=2, dropout=0.1))
            ends.append([parameter.detach() for parameter in llama.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-3}, {"min_lr": 0.0}, {"schedule": "constant"}, {"warmup_steps": 3}, {"epochs": 1}, {"max_steps": 3},
        {"batch_size": 2}, {"weight_decay": 0.5}, {"betas": (0.5, 0.5)}, {"clip": 1e-8}, {"seed": 9}, {"beta": 0.9},
        {"dropout": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_option_changes_the_result(change):
    base = {"lr": 1e-3, "min_lr": 1e-4, "epochs": 2, "batch_size": 3}
    results = []
    for options in (base, base | change):
        llama = model()
        rows = with_reference(pairs(8), reference_logprobs(llama, pairs(8)))
        train(llama, rows, DPOConfig(**options))
        results.append(torch.cat([p.detach().flatten() for p in llama.parameters()]))
    assert not torch.equal(*results)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor], ids=["tuple", "numpy", "torch"])
def test_tokens_may_be_any_sequence_of_ints_with_the_same_bits(kind):
    ends = []
    for made in (list, kind):
        llama = model()
        preferences = [DPORow(made(r.prompt), made(r.chosen), made(r.rejected)) for r in pairs()]
        values = reference_logprobs(llama, preferences)
        train(llama, with_reference(preferences, values), DPOConfig(lr=1e-3, batch_size=2))
        train(llama, [SFTRow(made(r.prompt), made(r.chosen)) for r in pairs()], SFTConfig(lr=1e-3, batch_size=2))
        ends.append((values, torch.cat([p.detach().flatten() for p in llama.parameters()])))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    with pytest.raises(InputError, match="row 0: completion has no tokens"):
        train(model(), [SFTRow(kind([1]), kind(()))], SFTConfig())


def test_learning_rate_warms_up_and_ends_at_min_lr():
    config = SFTConfig(lr=1.0, min_lr=0.1, warmup_steps=2, schedule="cosine")
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_every_row_is_visited_once_an_epoch_in_an_order_of_its_own():
    batches = batch_order(10, 4, 2, seed=1, max_steps=None)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for batch in half for row in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize("config,options", [(SFTConfig, {"lr": 1e-6}), (DPOConfig, {"lr": 5e-8})])
def test_a_rate_that_would_rise_is_refused(config, options):
    with pytest.raises(InputError, match=r"min_lr is [\d.e-]+, above lr \([\d.e-]+\), which falls to it"):
        config(**options)
    assert config(**options, schedule="constant").lr == options["lr"]


def test_a_non_finite_step_is_refused_before_it_touches_the_weights():
    llama = model()
    with torch.no_grad():
        llama.head[5] = float("nan")
    llama.weights_changed()
    before = copy.deepcopy(llama.embed)
    with pytest.raises(FloatingPointError, match=r"step 1: .* on rows \[0\]"):
        train(llama, [SFTRow([1, 2], [3])], SFTConfig())
    assert torch.equal(before, llama.embed)
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_training_where_gradients_are_off_is_training(without):
    inside, outside = model(), model()
    rows = [SFTRow(row.prompt, row.chosen) for row in pairs()]
    with without():
        train(inside, rows, SFTConfig(lr=1e-3, batch_size=2))
    train(outside, rows, SFTConfig(lr=1e-3, batch_size=2))
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), outside.parameters(), strict=True))


def test_weights_written_behind_the_engines_back_are_noticed():
    llama = model()
    llama.check_weights()
    with torch.no_grad():
        llama.norm.weight.mul_(2)
    with pytest.raises(InputError, match="was changed in place"):
        llama.check_weights()
    llama.weights_changed()
    llama.check_weights()


def test_mistakes_are_named():
    llama = model()
    with pytest.raises(InputError, match="no rows"):
        train(llama, [], SFTConfig())
    with pytest.raises(InputError, match="row 1: completion has no tokens"):
        train(llama, [SFTRow([1], [2]), SFTRow([1], [])], SFTConfig())
    with pytest.raises(InputError, match=r"row 0: prompt has a token outside 0\.\.28"):
        train(llama, [SFTRow([29], [2])], SFTConfig())
    with pytest.raises(InputError, match="row 0 has 65 tokens; the model's context is 64"):
        train(llama, [SFTRow([1], [2] * 64)], SFTConfig())
    with pytest.raises(InputError, match="row 0 has 6 tokens in all; max_pack_tokens is 5: raise it"):
        train(llama, with_reference([DPORow([1, 2], [3, 4], [5, 6])], [(-1.0, -1.0)]), DPOConfig(max_pack_tokens=5))
    with pytest.raises(InputError, match="row 0 is a SFTRow; DPOConfig trains on DPORow"):
        train(llama, [SFTRow([1], [2])], DPOConfig())
    with pytest.raises(InputError, match="no reference log-probs"):
        train(llama, pairs(), DPOConfig())
    for bad in (
        {"dropout": 1.0}, {"dropout": -0.1}, {"save_every": 0},
        {"schedule": "step"}, {"lr": math.nan}, {"batch_size": 0}, {"max_steps": 0}, {"clip": 0.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(bad))):
            SFTConfig(**bad)
    with pytest.raises(InputError, match="beta"):
        DPOConfig(beta=0.0)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([SFTRow("copy a", [2])], SFTConfig(), "row 0: prompt is text; give token ids"),
        (
            [SFTRow([1], [2]), SFTRow([1], ["a"])],
            SFTConfig(),
            "row 1: completion is a list; expected a sequence of token",
        ),
        ([SFTRow([1], None)], SFTConfig(), "row 0: completion is None; expected a sequence of token ids"),
        ([SFTRow([1.5], [2])], SFTConfig(), "row 0: prompt is a list; expected a sequence of token ids"),
        ([([1], [2])], SFTConfig(), "row 0 is a tuple; SFTConfig trains on SFTRow"),
        ([DPORow([1], [2], [3])], SFTConfig(), "row 0 is a DPORow; SFTConfig trains on SFTRow"),
        ([DPORow([1], [2], [3], (-1.0,))], DPOConfig(), "row 0: reference is .*; expected two finite numbers"),
        ([DPORow([1], [2], [3], ("a", 0))], DPOConfig(), "row 0: reference is .*; expected two finite numbers"),
        ([DPORow([1], [2], [3], (math.nan, 0.0))], DPOConfig(), "row 0: reference is .*; expected two finite numbers"),
        (SFTRow([1], [2]), SFTConfig(), "rows is a SFTRow; expected a list of SFTRow"),
        ("rows.jsonl", SFTConfig(), "rows is a str; expected a list of SFTRow"),
        ([SFTRow([1], [2])], {"lr": 1e-3}, "config is a dict; expected an SFTConfig or a DPOConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_and_configs_of_another_kind_are_named(rows, config, message):
    with pytest.raises(InputError, match=message):
        train(model(), rows, config)


def test_a_path_is_not_a_model():
    with pytest.raises(InputError, match="model is 'llama'; expected a Llama, as load_checkpoint returns it"):
        train("llama", [SFTRow([1], [2])], SFTConfig())
    with pytest.raises(InputError, match="model is 'llama'; expected a Llama"):
        reference_logprobs("llama", pairs())
    with pytest.raises(InputError, match="row 0 is a SFTRow; expected a DPORow"):
        reference_logprobs(model(), [SFTRow([1], [2])])


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": "1e-3"}, {"min_lr": None}, {"weight_decay": True}, {"warmup_steps": 1.5}, {"epochs": "2"}, {"epochs": 1.0},
        {"batch_size": None}, {"max_steps": "3"}, {"save_every": 2.5}, {"clip": "1"}, {"dropout": "0.1"}, {"seed": -1},
        {"seed": "0"}, {"seed": 2**63}, {"loss": ["ipo"]}, {"loss": {}},
        {"schedule": 3}, {"betas": 0.9}, {"betas": (0.9,)}, {"betas": ("a", "b")}, {"betas": (0.9, 1.0)},
        {"beta": "0.1"}, {"replay_weight": None}, {"replay_batch_size": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_another_type_is_named_with_what_was_expected(bad):
    ((name, value),) = bad.items()
    with pytest.raises(InputError) as caught:
        DPOConfig(**bad)
    assert str(caught.value).startswith(f"{name} is {value!r}; expected ")


def test_the_largest_seed_trains():
    train(model(), [SFTRow([1], [2])], SFTConfig(seed=2**63 - 1, dropout=0.1))


def test_sums_follow_the_sequences_that_are_in_the_pack():
    (pack,) = TokenTree.pack([dpo_tree(DPORow([1], [2, 3], [4]), 7)], 10)
    sums = sequence_logps(torch.tensor([1.0, 2.0, 4.0]), pack.edges, pack.edges.sequence.unique())
    assert sums.tolist() == [3.0, 4.0]
