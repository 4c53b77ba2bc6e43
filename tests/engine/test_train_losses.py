"""Every loss, packed as trees, against the plain computation sequence by sequence in float64; and what rows share."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine import DPOConfig, DPORow, InputError, SFTConfig, SFTRow, reference_logprobs, train
from engine.kernels import linear_logprob
from engine.train.batches import build_trees, edge_groups, pack_trees, row_keys
from engine.train.losses import chosen_nll, dpo_loss, ipo_loss
from engine.train.packs import Batch, packs
from engine.train.trainer import _backward
from engine.tree import TokenTree
from tests.engine.test_train import model, pairs, plain_logprob, with_reference

BETA = 0.3
OPTIONS = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "smoothed ipo": {"loss": "ipo", "label_smoothing": 0.1},
    "dpo + nll": {"nll_weight": 0.7},
    "smoothed ipo + nll": {"loss": "ipo", "label_smoothing": 0.3, "nll_weight": 0.2},
}
each_loss = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def preferences(count=7):
    """With references that fp32 holds exactly."""
    values = torch.randn(count, 2, generator=torch.Generator().manual_seed(5)).tolist()
    return with_reference(pairs(count), map(tuple, values))


def with_common_parts():
    """Seven pairs: three of one prompt, of which two have the same chosen answer and one the rejected as its chosen."""
    rows = preferences()
    first, second, third = rows[0], rows[2], rows[5]
    rows[2] = DPORow(first.prompt, first.chosen, second.rejected, second.reference)
    rows[5] = DPORow(first.prompt, first.rejected, third.rejected, third.reference)
    return rows


def plain_loss(llama, rows, loss="sigmoid", label_smoothing=0.0, nll_weight=0.0):
    """The formulas, one sequence after the other, no tree and no pack."""
    total = 0.0
    for row in rows:
        ratios = []
        for answer, reference in zip((row.chosen, row.rejected), row.reference):
            ratio = plain_logprob(llama, row.prompt, answer) - reference
            ratios.append(ratio / len(answer) if loss == "ipo" else ratio)
        h = ratios[0] - ratios[1]
        one, other = (
            ((s * h - 1 / (2 * BETA)) ** 2 if loss == "ipo" else -F.logsigmoid(BETA * s * h)) for s in (1, -1)
        )
        total = total + (1 - label_smoothing) * one + label_smoothing * other
    nll = -sum(plain_logprob(llama, row.prompt, row.chosen) for row in rows) / sum(len(row.chosen) for row in rows)
    return total / len(rows) + nll_weight * nll


def backward(llama, rows, config, replay=()):
    metrics, work = _backward(llama, Batch.take(rows, replay, config, 0, range(len(rows))), config)
    return metrics, [p.grad for p in llama.parameters()], work.tokens


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_loss
@pytest.mark.parametrize("rows", [preferences(), with_common_parts()], ids=["apart", "common prompts"])
@pytest.mark.parametrize("budget", [45, 4096], ids=["many packs", "one pack"])
def test_a_preference_loss_and_its_gradients_are_the_plain_ones(options, rows, budget):
    llama = model(torch.float64)
    plain = plain_loss(llama, rows, **options)
    expected = torch.autograd.grad(plain, list(llama.parameters()))
    metrics, found, _ = backward(llama, rows, DPOConfig(beta=BETA, max_pack_tokens=budget, **options))
    assert metrics["loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert_close(found, expected)
    chosen = torch.stack([plain_logprob(llama, row.prompt, row.chosen) - row.reference[0] for row in rows])
    assert metrics["rewards/chosen"] == pytest.approx(BETA * chosen.mean().item(), rel=1e-9)


@pytest.fixture
def few_logits_at_once(monkeypatch):
    """Twenty rows of logits fit: most trees alone, no pack."""
    monkeypatch.setattr(linear_logprob, "HELD_BYTES", 20 * 29 * 8)
    gradients = linear_logprob.TorchTiles.gradients

    def from_held_logits(*given):
        assert given[7] is not None  # nothing is computed twice
        return gradients(*given)

    monkeypatch.setattr(linear_logprob.TorchTiles, "gradients", from_held_logits)


@each_loss
def test_a_pack_whose_logits_do_not_fit_is_taken_tree_by_tree_in_one_pass(options, few_logits_at_once):
    rows = preferences()
    rows[2] = DPORow(rows[0].prompt, rows[0].chosen, rows[2].rejected, rows[2].reference)
    llama, config = model(torch.float64), DPOConfig(beta=BETA, **options)
    plain = plain_loss(llama, rows, **options)
    expected = torch.autograd.grad(plain, list(llama.parameters()))
    ((pack, *_),) = packs(Batch.take(rows, (), config, 0, range(7)), config, torch.device("cpu"))
    assert len(pack.edges) > 2 * 20 > 20 >= max(len(edges) for edges in edge_groups(pack, 20))
    metrics, found, _ = backward(llama, rows, config)
    assert metrics["loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert_close(found, expected)


def test_groups_of_edges_are_whole_trees_that_fit_or_one_that_does_not():
    rows = [DPORow([1, n], [3] * size, [4] * size) for n, size in enumerate((2, 3, 1, 6, 1, 1))]
    (pack,) = pack_trees(trees(rows)[0], 99)
    groups = edge_groups(pack, 10)
    assert [len(edges) for edges in groups] == [10, 2, 12, 4]
    assert torch.equal(torch.cat([edges.target for edges in groups]), pack.edges.target)
    assert edge_groups(pack, 28) == [pack.edges]
    assert [len(edges) for edges in edge_groups(pack, 1)] == [4, 6, 2, 12, 2, 2]


def test_a_policy_that_is_its_reference_costs_ln_2_exactly_however_its_logits_are_grouped(monkeypatch):
    for fitting in (1000, 20, 1):
        monkeypatch.setattr(linear_logprob, "HELD_BYTES", fitting * 29 * 4)
        rows = with_reference(pairs(7), reference_logprobs(model(), pairs(7)))
        metrics, _, _ = backward(model(), rows, DPOConfig())
        assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("budget", [24, 4096], ids=["many packs", "one pack"])
def test_the_sft_loss_and_its_gradients_are_the_plain_ones_with_masks_and_repeated_rows(budget):
    llama, rows = model(torch.float64), [SFTRow(row.prompt, row.chosen) for row in pairs(6)]
    rows[1] = SFTRow(rows[1].prompt, [3, 4, 5, 6], [False, True, True, False])  # two targets
    rows[2] = SFTRow(rows[2].prompt, rows[2].completion, [False] * len(rows[2].completion))  # none
    rows[3] = SFTRow(rows[1].prompt, rows[1].completion, rows[1].mask)  # the same again
    rows[4] = SFTRow(rows[1].prompt, rows[0].completion)  # the same prompt

    def logps(row):
        ids = [*row.prompt, *row.completion]
        whole = [
            plain_logprob(llama, ids[:place], ids[place : place + 1]) for place in range(len(row.prompt), len(ids))
        ]
        return [logp for logp, on in zip(whole, row.mask or [True] * len(whole)) if on]

    found_logps = [logp for row in rows for logp in logps(row)]
    plain = -sum(found_logps) / len(found_logps)
    expected = torch.autograd.grad(plain, list(llama.parameters()))
    metrics, found, _ = backward(llama, rows, SFTConfig(max_pack_tokens=budget))
    assert metrics["loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert_close(found, expected)


def test_public_losses_take_pairs_in_the_order_of_their_sequences():
    llama, rows = model(torch.float64), preferences(3)
    reference = torch.tensor([row.reference for row in rows])
    from engine.train.batches import dpo_tree
    from engine.train.trainer import pack_logprobs

    (pack,) = TokenTree.pack([dpo_tree(row, place) for place, row in enumerate(rows)], 200)
    logp = pack_logprobs(llama, pack)
    for loss, function in (("sigmoid", dpo_loss), ("ipo", ipo_loss)):
        value, _ = function(logp, pack.edges, reference, BETA, 3, label_smoothing=0.1)
        assert value.item() == pytest.approx(plain_loss(llama, rows, loss, 0.1).item(), rel=1e-12)
    nll = plain_loss(llama, rows, nll_weight=1.0) - plain_loss(llama, rows)
    value, metrics = chosen_nll(logp, pack.edges, sum(len(row.chosen) for row in rows))
    assert value.item() == metrics["nll_loss"] == pytest.approx(nll.item(), rel=1e-9)


# ---- what rows share -------------------------------------------------------------------------------------------------


def trees(rows, budget=4096, keys=None):
    return build_trees(list(zip(keys or row_keys(rows), rows)), budget)


def test_pairs_of_one_prompt_are_one_tree_and_an_answer_of_several_stands_in_it_once():
    rows = with_common_parts()
    built, sequences = trees(rows)
    assert len(built) == 5 and [len(tree.children) for tree in built] == [4, 2, 2, 2, 2]
    assert sequences[0][0] == sequences[2][0] and sequences[0][1] == sequences[5][0]
    assert len({number for pair in sequences for number in pair}) == 12
    whole = sum(len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rows)
    saved = 2 * len(rows[0].prompt) + len(rows[0].chosen) + len(rows[0].rejected)
    assert sum(map(len, built)) == whole - saved


def test_rows_of_one_prompt_that_do_not_fit_together_are_several_trees():
    rows = [DPORow([1, 2, 3], [4 + i, 5], [6, 7 + i]) for i in range(5)]
    built, sequences = trees(rows, budget=12)
    assert [len(tree) for tree in built] == [11, 11, 7]
    for place, pair in enumerate(sequences):
        here = {child.sequence for child in built[place // 2].children}
        assert set(pair) <= here
    whole, parts = (
        backward(model(), with_reference(rows, [(-9.0, -8.0)] * 5), DPOConfig(max_pack_tokens=b)) for b in (99, 12)
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    assert parts[2] == 29 and whole[2] == 3 + 5 * 4


def test_chosen_equal_to_rejected_costs_ln_2_and_moves_nothing():
    row = DPORow([1, 2], [3, 4, 5], [3, 4, 5], (-9.0, -9.0))
    for dropout in (0.0, 0.3):  # one answer, so one mask
        metrics, gradients, tokens = backward(model(), [row], DPOConfig(dropout=dropout))
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7) and metrics["rewards/margins"] == 0
        assert not any(gradient.any() for gradient in gradients) and tokens == 5
    assert any(gradient.any() for gradient in backward(model(), [row], DPOConfig(nll_weight=1.0))[1])


def test_keys_depend_on_the_data_alone_and_are_equal_where_tokens_are():
    rows = with_common_parts()
    keys = row_keys(rows)
    assert keys[1] == (4, 5, 6) and keys[0] == (0, 1, 2)  # named after the row, as long as nothing repeats
    assert keys[2] == (0, 1, 4 * 2 + 2) and keys[5] == (0, 2, 4 * 5 + 2)
    assert row_keys(rows, replay=True)[1] == (-8, -7, -6)
    # An answer is named together with its prompt, and with its mask.
    same = [SFTRow([1], [2]), SFTRow([1, 2], [2]), SFTRow([1], [2], [True]), SFTRow([1], [2])]
    assert row_keys(same) == [(0, 1), (4, 5), (0, 9), (0, 1)]


def test_dropout_of_a_row_does_not_depend_on_what_it_is_packed_with():
    rows = with_common_parts()
    found = []
    for numbers in (range(7), [0], [2], [5]):
        config = DPOConfig(dropout=0.3)
        batch = Batch.take(rows, (), config, 3, numbers, (row_keys(rows), []))
        masks = {}
        for pack, *_ in packs(batch, config, torch.device("cpu")):
            for key, position, token in zip(pack.key.tolist(), pack.position.tolist(), pack.tokens.tolist()):
                assert masks.setdefault((key, position), token) == token
        found.append(masks)
    for alone in found[1:]:
        assert alone.items() <= found[0].items()


def test_packs_are_filled_best_fit_where_the_given_order_needs_more_of_them():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(200, 2001, (400,), generator=generator).tolist()
    rows = [TokenTree([1] * size, sequence=place) for place, size in enumerate(sizes)]
    in_order, packs = TokenTree.pack(rows, 4096), list(pack_trees(rows, 4096))
    fill = lambda found: sum(sizes) / (4096 * len(found))
    assert fill(in_order) < 0.86 and fill(packs) > 0.98
    assert sorted(length for pack in packs for length in pack.chains) == sorted(sizes)
    assert all(len(pack) <= 4096 for pack in packs)
    again = list(pack_trees(rows, 4096))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(packs, again, strict=True))


def test_packs_keep_the_given_order_where_another_would_need_as_many():
    rows = [TokenTree([1] * size) for size in (3, 9, 2, 8, 4, 6)]
    assert [pack.chains for pack in pack_trees(rows, 14)] == [(3, 9, 2), (8, 4), (6,)]
    rows = [TokenTree([1] * size) for size in (7, 6, 5, 6)]
    assert [pack.chains for pack in TokenTree.pack(rows, 12)] == [(7,), (6, 5), (6,)]
    assert [pack.chains for pack in pack_trees(rows, 12)] == [(7, 5), (6, 6)]


# ---- rows at the edges -----------------------------------------------------------------------------------------------


def test_a_batch_without_any_target_costs_nothing_and_moves_nothing():
    rows = [SFTRow([1, 2], [3, 4], [False, False])] * 2
    metrics, gradients, tokens = backward(model(), rows, SFTConfig())
    assert metrics["loss"] == 0 and tokens == 4
    assert not any(gradient.any() for gradient in gradients)
    train(model(), rows, SFTConfig())  # and is no error of a number that is not finite


def test_all_masked_rows_change_no_other_rows_loss():
    rows = [SFTRow(row.prompt, row.chosen) for row in pairs(3)]
    masked = SFTRow([5, 6, 7], [8, 9], [False, False])
    alone, beside = (backward(model(torch.float64), data, SFTConfig()) for data in (rows, [*rows, masked]))
    assert beside[0] == pytest.approx(alone[0], rel=1e-12)
    assert_close(beside[1], alone[1])


def test_answers_of_one_token_and_answers_that_fill_the_context_are_trained_on():
    rows = [DPORow([1, 2], [3], [4]), DPORow([1], [5] * 63, [6])]  # the context is 64; no EOS where it was cut
    llama = model(torch.float64)
    rows = with_reference(rows, [(-3.0, -3.5), (-200.0, -3.0)])
    for options in ({}, {"loss": "ipo"}):
        metrics, gradients, _ = backward(llama, rows, DPOConfig(beta=BETA, **options))
        assert metrics["loss"] == pytest.approx(plain_loss(llama, rows, **options).item(), rel=1e-12)
        assert all(gradient.isfinite().all() for gradient in gradients)
    with pytest.raises(InputError, match="row 1 has 65 tokens; the model's context is 64: cut or drop it"):
        reference_logprobs(llama, [rows[0], DPORow([1], [5] * 64, [6])])


def test_mistakes_in_masks_and_loss_options_are_named():
    with pytest.raises(InputError, match="row 1: mask is 2 entries; expected a truth value for each"):
        train(model(), [SFTRow([1], [2]), SFTRow([1], [2], [True, False])], SFTConfig())
    with pytest.raises(InputError, match="row 0: mask is True; expected"):
        train(model(), [SFTRow([1], [2], True)], SFTConfig())
    for bad in (
        {"loss": "hinge"},
        {"loss": None},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"nll_weight": -1},
    ):
        ((name, value),) = bad.items()
        with pytest.raises(InputError, match=f"^{name} is {value!r}; expected"):
            DPOConfig(**bad)


@pytest.mark.parametrize(
    "change", [{"loss": "ipo"}, {"label_smoothing": 0.1}, {"nll_weight": 0.5}], ids=lambda change: next(iter(change))
)
def test_every_loss_option_changes_the_result(change):
    results = []
    for options in ({}, change):
        llama = model()
        train(llama, preferences(), DPOConfig(lr=1e-3, batch_size=4, **options))
        results.append(torch.cat([p.detach().flatten() for p in llama.parameters()]))
    assert not torch.equal(*results)


@each_loss
def test_thirty_two_pairs_are_separated(options):
    llama, rows = model(), pairs(32)
    rows = with_reference(rows, reference_logprobs(llama, rows))
    logged = []
    config = DPOConfig(lr=3e-3, min_lr=3e-4, epochs=20, batch_size=16, **options)
    train(llama, rows, config, on_step=lambda *step: logged.append(step[2]))
    assert logged[-1]["rewards/accuracies"] == 1.0 and logged[-1]["rewards/margins"] > 0.2
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_thirty_two_examples_are_learned_by_heart():
    llama, rows = model(), [SFTRow(row.prompt, row.chosen) for row in pairs(32)]
    logged = []
    config = SFTConfig(lr=1e-2, min_lr=1e-3, epochs=60, batch_size=16)
    train(llama, rows, config, on_step=lambda *step: logged.append(step[2]))
    assert logged[-1]["loss"] < 0.02 < logged[0]["loss"]
