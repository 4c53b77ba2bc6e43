"""Keyed dropout in training: a token's mask depends on what it is, not on where it is packed."""

import pytest
import torch

from engine import SFTConfig, SFTRow, TokenTree, reference_logprobs, train
from engine.model import keep, tree_attend
from engine.train import trainer
from engine.train.batches import batch_order, dpo_tree, row_key
from engine.train.dropout import pack_dropout, step_key
from engine.train.trainer import pack_logprobs
from tests.engine.test_train import CONFIG, model, pairs

RATE = 0.3
SITES = 2 * CONFIG.n_layers + 1


def masks(pack, rate=RATE, seed=0, step=5):
    """The factor on every unit [SITES, N, dim] in one forward pass."""
    drop = pack_dropout(pack, rate, seed, step)
    return torch.stack([drop(site, torch.ones(len(pack), CONFIG.dim)) for site in range(SITES)])


def row_masks(packs):
    """Key of a row's prompt -> the row's factors, put together from its tokens wherever they are."""
    found = {}
    for pack in packs:
        factors = masks(pack)
        for key in pack.key.unique().tolist():
            found[key] = factors[:, pack.key == key]
    return found


def trees(order):
    rows = pairs(8)
    return [dpo_tree(rows[number], place, row_key(number)) for place, number in enumerate(order)]


def test_a_rows_mask_is_the_same_in_any_order_company_and_pack_size():
    expected = row_masks(TokenTree.pack(trees(range(8)), 4096))
    assert len(expected) == 24
    for order, budget in ((range(8), 30), ([5, 2, 7, 0, 1, 6, 3, 4], 4096), ([6], 60)):
        for key, mask in row_masks(TokenTree.pack(trees(order), budget)).items():
            assert torch.equal(mask, expected[key])


def test_rows_branches_positions_sites_steps_and_seeds_have_masks_of_their_own():
    (pack,) = TokenTree.pack([TokenTree([1, 2, 3], key=key) for key in range(4)], 99)
    base = masks(pack)
    tokens = base.transpose(0, 1).reshape(12, -1)  # [N, SITES * dim]
    assert len(tokens.unique(dim=0)) == 12
    assert len(base.flatten(1).unique(dim=0)) == SITES
    assert not torch.equal(base, masks(pack, seed=1)) and not torch.equal(base, masks(pack, step=6))
    assert len({step_key(seed, step) for seed in range(30) for step in range(30)}) == 900


def test_a_shared_prompt_has_one_mask_as_in_two_sequences_with_the_same_keys():
    llama, (row, *_) = model(torch.float64), pairs()
    key = row_key(3)
    tree = dpo_tree(row, 0, key)
    alone = [TokenTree(row.prompt, children=(answer,), key=key) for answer in tree.children]
    shared, *apart = [TokenTree.pack([one], 99)[0] for one in (tree, *alone)]
    found, *expected = [pack_logprobs(llama, pack, pack_dropout(pack, RATE, 0, 5)) for pack in (shared, *apart)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-10)
    assert (found - pack_logprobs(llama, shared)).abs().max() > 1e-2  # and dropout does something


def masked_forward(llama, pack, factors):
    """The model with `factors` [SITES, N, dim] multiplied in by hand."""
    return llama(pack.tokens, pack.position, tree_attend(pack.end), dropout=lambda site, x: x * factors[site])


def test_dropout_multiplies_by_the_mask_and_scales_in_forward_and_backward():
    llama = model(torch.float64)
    (pack,) = TokenTree.pack(trees(range(3)), 99)
    factors = masks(pack)
    assert factors.unique().tolist() == [0.0, pytest.approx(1 / (1 - RATE))]
    drop = pack_dropout(pack, RATE, 0, 5)
    upstream = torch.randn(len(pack), CONFIG.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    hidden = llama(pack.tokens, pack.position, tree_attend(pack.end), dropout=drop)
    found = torch.autograd.grad((hidden * upstream).sum(), list(llama.parameters()), allow_unused=True)
    by_hand = masked_forward(llama, pack, factors.double())
    expected = torch.autograd.grad((by_hand * upstream).sum(), list(llama.parameters()), allow_unused=True)
    torch.testing.assert_close(hidden, by_hand, rtol=1e-6, atol=1e-6)  # the factors came through fp32
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_through_dropout_passes_gradcheck():
    (pack,) = TokenTree.pack([TokenTree([1, 2, 3], key=9)], 9)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack_dropout(pack, RATE, 0, 5)(2, x), (x,))


def test_the_model_asks_for_dropout_at_every_site_once():
    llama, sites = model(), []
    (pack,) = TokenTree.pack([TokenTree([1, 2, 3])], 9)
    llama(pack.tokens, pack.position, tree_attend(pack.end), dropout=lambda site, x: (sites.append(site), x)[1])
    assert sites == list(range(SITES))


def test_nothing_but_what_attention_and_mlp_add_falls_out_of_the_residual_stream():
    llama = model()
    (pack,) = TokenTree.pack([TokenTree([1, 2, 3])], 9)
    hidden = llama(pack.tokens, pack.position, tree_attend(pack.end), dropout=lambda site, x: x * (site == 0))
    assert torch.equal(hidden, llama.norm(llama.embed[pack.tokens])[1])


def test_a_step_asks_for_the_masks_of_its_number_and_of_its_rows_numbers_in_the_data(monkeypatch):
    asked, config = [], SFTConfig(batch_size=3, epochs=2, dropout=RATE, seed=7)
    monkeypatch.setattr(
        trainer, "pack_dropout", lambda pack, *key: (asked.append((*key, sorted(pack.key.unique().tolist()))), keep)[1]
    )
    train(model(), [SFTRow(row.prompt, row.chosen) for row in pairs(8)], config)
    batches = batch_order(8, 3, 2, 7, None)
    keys = lambda batch: sorted(row_key(number) + branch for number in batch for branch in (0, 1))
    assert asked == [(RATE, 7, step, keys(batch)) for step, batch in enumerate(batches)]


def test_rate_zero_is_no_dropout_at_all():
    (pack,) = TokenTree.pack([TokenTree([1, 2, 3])], 9)
    assert pack_dropout(pack, 0.0, 0, 5) is keep
    x = torch.randn(3, 8)
    assert keep(0, x) is x


def test_dropout_is_for_training_steps_only():
    llama = model()
    before = reference_logprobs(llama, pairs())
    train(llama, [SFTRow([1, 2], [3, 4])], SFTConfig(lr=0.0, min_lr=0.0, dropout=0.5))
    assert reference_logprobs(llama, pairs()) == before


def test_packing_does_not_change_a_step_with_dropout():
    rows, logged = [SFTRow(row.prompt, row.chosen) for row in pairs(8)], []
    for budget in (20, 4096):
        config = SFTConfig(max_steps=1, batch_size=8, dropout=RATE, max_pack_tokens=budget)
        train(model(torch.float64), rows, config, on_step=lambda *step: logged.append(step[2]))
    assert logged[0] == pytest.approx(logged[1], rel=1e-10)
