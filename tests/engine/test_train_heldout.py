"""Held-out rows: what is measured, that the best weights are kept, that training stops, and that all of it resumes."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from engine import (
    DPOConfig,
    Heldout,
    InputError,
    LoRA,
    SFTConfig,
    SFTRow,
    TrainingInterrupted,
    reference_logprobs,
    train,
)
from engine.train.batches import row_keys
from engine.train.packs import Batch
from engine.train.state import Progress
from engine.train.timing import forward_flops, peak_flops, peak_memory
from engine.train.trainer import _backward, evaluate
from engine.tree import TokenTree
from tests.engine.test_train import CONFIG, model, pairs, with_reference
from tests.engine.test_train_resume import assert_same, outcome, stop_at

# All answers end alike, which is learned; the rest is noise, which is learned by heart: the held-out loss falls and climbs.
ROWS = [SFTRow(row.prompt, [*row.chosen, 7, 7, 7]) for row in pairs(8)]
HELD = [SFTRow(row.prompt, [*row.rejected[:2], 7, 7]) for row in pairs(12)[8:]]
CONFIG_SFT = SFTConfig(lr=1e-2, min_lr=1e-2, epochs=5, batch_size=3, save_every=4, dropout=0.1)
STEPS = 15


def logged(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def run(out_dir, heldout, config=CONFIG_SFT, rows=ROWS, **options):
    llama = model()
    return outcome(llama, out_dir, train(llama, rows, config, out_dir, heldout=heldout, **options)), llama


def test_the_measure_is_the_loss_without_dropout_every_k_steps_and_at_the_end(tmp_path):
    _, llama = run(tmp_path, Heldout(HELD, every=4))
    rows = logged(tmp_path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12, 15]
    plain = SFTConfig()
    metrics, _ = _backward(llama, Batch.take(HELD, (), plain, 0, range(4)), plain)
    assert rows[-1]["eval_loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert ["eval_seconds" in row for row in timing] == ["eval_loss" in row for row in rows]


def test_measuring_changes_no_bit_of_the_training(tmp_path):
    without, _ = run(tmp_path / "without", None)
    with_it, _ = run(tmp_path / "with", Heldout(HELD, every=2))
    assert all(torch.equal(a, b) for a, b in zip(without[0], with_it[0], strict=True))
    drop = lambda row: {name: value for name, value in row.items() if not name.startswith("eval_")}
    assert [drop(row) for row in logged(tmp_path / "with")] == logged(tmp_path / "without")


def test_dpo_is_measured_by_trls_names():
    llama, rows = model(), pairs(12)
    rows = with_reference(rows, reference_logprobs(llama, rows))
    seen = []
    train(
        llama, rows[:8], DPOConfig(lr=1e-3, batch_size=4, nll_weight=0.1), heldout=Heldout(rows[8:], every=1),
        on_step=lambda *step: seen.append(step[2]),
    )  # fmt: skip
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    assert {f"eval_{name}" for name in (*names, "loss", "nll_loss")} == {
        name for name in seen[0] if name[:5] == "eval_"
    }
    policy, reference = (torch.tensor(values)[:, 0].mean().item() for values in
                         (reference_logprobs(llama, rows[8:]), [row.reference for row in rows[8:]]))  # fmt: skip
    assert seen[-1]["eval_rewards/chosen"] == pytest.approx(0.1 * (policy - reference), abs=1e-5)


def test_the_best_weights_are_the_models_at_the_end(tmp_path):
    found, llama = run(tmp_path / "best", Heldout(HELD, every=1, keep_best=True))
    losses = [row["eval_loss"] for row in logged(tmp_path / "best")]
    best = losses.index(min(losses)) + 1
    assert 1 < best < STEPS - 1  # as it ought to be, or this test shows nothing
    last, _ = run(tmp_path / "last", None)
    assert not torch.equal(found[0][0], last[0][0])
    state = json.loads((tmp_path / "best/state/state.json").read_text())
    assert state["progress"]["best_step"] == best and state["progress"]["best"] == min(losses)
    with pytest.raises(TrainingInterrupted):
        train(until := model(), ROWS, CONFIG_SFT, should_stop=stop_at(best))
    assert all(torch.equal(a, b) for a, b in zip(found[0], until.parameters(), strict=True))
    llama.check_weights()
    files = {path.name for path in (tmp_path / "best/state").iterdir()}
    assert files == {"state.json", f"step-{best}.safetensors", f"step-{STEPS}.safetensors"}
    again, _ = run(tmp_path / "best", Heldout(HELD, every=1, keep_best=True))  # finished: nothing to do, the same end
    assert_same(again, found)
    trained_on = train(llama, ROWS, CONFIG_SFT, tmp_path / "best", heldout=Heldout(HELD, every=1, keep_best=True))
    assert trained_on.steps == STEPS and trained_on.best_step == best


def test_training_ends_after_patience_measurements_that_were_no_better(tmp_path):
    run(tmp_path / "long", Heldout(HELD, every=1))
    losses = [row["eval_loss"] for row in logged(tmp_path / "long")]
    stale, best, expected = 0, float("inf"), STEPS
    for step, loss in enumerate(losses, start=1):
        stale, best = (0, loss) if loss < best else (stale + 1, best)
        if stale == 2:
            expected = step
            break
    assert expected < STEPS
    found, _ = run(tmp_path / "short", Heldout(HELD, every=1, patience=2))
    assert found[2] == expected and len(logged(tmp_path / "short")) == expected
    assert logged(tmp_path / "short") == logged(tmp_path / "long")[:expected]
    again, _ = run(tmp_path / "short", Heldout(HELD, every=1, patience=2))
    assert_same(again, found)


@pytest.mark.parametrize("patience", [None, 3], ids=["to the end", "early end"])
def test_interrupted_anywhere_it_ends_with_the_same_best_weights_and_lines(patience, tmp_path):
    held = Heldout(HELD, every=2, keep_best=True, patience=patience)
    expected, _ = run(tmp_path / "whole", held)
    for seed in range(3):
        chance, out_dir = random.Random(seed), tmp_path / str(seed)
        for _ in range(STEPS):
            try:
                found, _ = run(out_dir, held, should_stop=stop_at(chance.randint(1, 4)))
                break
            except TrainingInterrupted:
                pass
        assert_same(found, expected)


def test_the_measure_can_be_the_accuracy_and_the_first_of_equals_is_the_best():
    held = Heldout(pairs(1), every=1, by="rewards/accuracies")
    progress = Progress()
    for step, value in enumerate((0.5, 0.75, 0.75, 0.7, 0.5), start=1):
        held.note(progress, step, {"loss": -step, "rewards/accuracies": value})
    assert progress == Progress(0, best=0.75, best_step=2, stale=3)
    gives_up = lambda patience: Heldout([], every=1, patience=patience).gives_up(progress)
    assert gives_up(3) and not gives_up(4)


@pytest.mark.parametrize("by", ["loss", "rewards/accuracies"])
def test_a_measure_that_is_not_finite_names_the_step_and_the_rows_and_what_was_saved_stays(by, tmp_path):
    """Token 28 stands in one held-out row only, and its embedding is no number."""
    llama = model()
    with torch.no_grad():
        llama.embed[28] = float("nan")
    llama.weights_changed()
    plain = lambda count: [replace(row, prompt=[3, 4], chosen=[5], rejected=[6, 7]) for row in pairs(count)]
    held = plain(3)
    held[1] = replace(held[1], prompt=[3, 28])
    config = DPOConfig(batch_size=2, lr=1e-3, save_every=1)
    given = with_reference(plain(6), [(-9.0, -8.0)] * 6), config, tmp_path
    said = r"step 2: on held-out rows \[1\] loss is nan; the model holds the weights after that step"
    with pytest.raises(FloatingPointError, match=said):
        train(llama, *given, heldout=Heldout(with_reference(held, [(-9.0, -8.0)] * 3), 2, keep_best=True, by=by))
    assert json.loads((tmp_path / "state/state.json").read_text())["step"] == 1
    assert len(logged(tmp_path)) == 1 and all(parameter.grad is None for parameter in llama.parameters())


def test_other_heldout_rows_or_options_are_refused_by_name(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, Heldout(HELD, every=2), should_stop=stop_at(3))
    with pytest.raises(InputError, match="the heldout rows are others"):
        run(tmp_path, Heldout(HELD[:3], every=2))
    with pytest.raises(InputError, match=r"heldout.every was 2, is 3; heldout.patience was None, is 1"):
        run(tmp_path, Heldout(HELD, every=3, patience=1))
    with pytest.raises(InputError, match=r"heldout was .*, is None"):
        run(tmp_path, None)


def test_mistakes_are_named(tmp_path):
    for bad in (
        {"every": 0},
        {"every": "2"},
        {"every": 1, "patience": 0},
        {"every": 1, "by": "accuracy"},
        {"every": 1, "by": []},
    ):
        name = list(bad)[-1]
        with pytest.raises(InputError, match=f"^{name} is {re.escape(repr(bad[name]))}; expected"):
            Heldout(HELD, **bad)
    with pytest.raises(InputError, match="held-out row 0 is a DPORow; SFTConfig trains on SFTRow"):
        run(tmp_path, Heldout(pairs(), every=1))
    with pytest.raises(InputError, match="there are no held-out rows; give at least one"):
        run(tmp_path, Heldout([], every=1))
    with pytest.raises(InputError, match="held-out row 1: completion has no tokens"):
        run(tmp_path, Heldout([HELD[0], SFTRow([1], [])], every=1))
    with pytest.raises(InputError, match="held-out row 0 has no reference log-probs"):
        train(model(), with_reference(pairs(), [(-9.0, -8.0)] * 5), DPOConfig(), heldout=Heldout(pairs(), every=1))
    with pytest.raises(InputError, match="'rewards/margins', which SFT does not have"):
        run(tmp_path, Heldout(HELD, every=1, by="rewards/margins"))
    with pytest.raises(InputError, match="keep_best needs an out_dir"):
        train(model(), ROWS, CONFIG_SFT, heldout=Heldout(HELD, every=1, keep_best=True))
    with pytest.raises(InputError, match="heldout is a list; expected a Heldout"):
        train(model(), ROWS, CONFIG_SFT, heldout=HELD)


def test_damaged_best_weights_are_named(tmp_path):
    held = Heldout(HELD, every=1, keep_best=True)
    result = train(model(), ROWS, CONFIG_SFT, tmp_path, heldout=held)
    (tmp_path / f"state/step-{result.best_step}.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=rf"step-{result.best_step}.safetensors is damaged"):
        run(tmp_path, held)


# ---- tokens, epochs, timing ----------------------------------------------------------------------------------------------


def test_epochs_and_tokens_are_counted_on_over_an_interruption(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, None, should_stop=stop_at(5))
    run(tmp_path, None)
    rows = logged(tmp_path)
    assert [row["epoch"] for row in rows[2::3]] == [1, 2, 3, 4, 5]
    an_epoch = sum(len(row.prompt) + len(row.completion) for row in ROWS)
    assert rows[-1]["num_tokens"] == 5 * an_epoch
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert sum(row["tokens"] for row in timing) == 5 * an_epoch
    for row in timing:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["mfu"] < 1 and row["peak_memory_bytes"] > 50e6


def test_flops_are_those_that_torch_counts():
    """Of the plain computation: products, and attention over each sequence's lower triangle."""
    from torch.utils.flop_counter import FlopCounterMode

    llama, ids, heads, size = model(), [3, 4, 5, 6, 7, 8], CONFIG.n_heads, CONFIG.head_dim
    (pack,) = TokenTree.pack([TokenTree(ids[:1], children=(TokenTree(ids[1:], 1.0),))], 100)
    with FlopCounterMode(display=False) as block:
        torch.nn.functional.linear(torch.randn(6, CONFIG.dim), llama.blocks[0].attention.qkv.detach())
        torch.nn.functional.linear(
            torch.randn(6, CONFIG.n_heads * CONFIG.head_dim), llama.blocks[0].attention.o.detach()
        )
        torch.nn.functional.linear(torch.randn(6, CONFIG.dim), llama.blocks[0].mlp.gate_up.detach())
        torch.nn.functional.linear(torch.randn(6, CONFIG.ffn_dim), llama.blocks[0].mlp.down.detach())
    with FlopCounterMode(display=False) as head:
        torch.nn.functional.linear(torch.randn(5, CONFIG.dim), llama.head.detach())
    with FlopCounterMode(display=False) as attention:
        for seen in range(1, 7):
            scores = torch.randn(heads, 1, size) @ torch.randn(heads, size, seen)
            scores @ torch.randn(heads, seen, size)
    block, head, attention = (counted.get_total_flops() for counted in (block, head, attention))
    assert forward_flops(pack, CONFIG) == (CONFIG.n_layers * block + head, CONFIG.n_layers * attention)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_counted_by_hand_of_a_lora_too_and_what_is_computed_again_is_not(tmp_path, lora, checkpointing):
    """dim 32, two layers, q 32 rows, k and v 16, MLP 48, 29 logits; 6 tokens of which 5 are predicted."""
    block = 1024 + 512 + 512 + 1024 + 3 * 1536  # q, k, v, o; gate, up, down
    products = 2 * 6 * 2 * block + 2 * 5 * 29 * 32
    attention = 2 * 4 * 4 * 8 * (1 + 2 + 3 + 4 + 5 + 6)  # layers, 2 products of 2 each, heads, head_dim, keys seen
    adapters = 2 * 6 * 2 * 3 * ((32 + 32) + (32 + 16))  # rank 3 beside q and v
    expected = 2 * products + 3 * adapters + 3 * attention if lora else 3 * products + 3 * attention
    assert expected == (427_520 if lora else 596_928)
    llama = LoRA(model(), rank=3, targets=("q_proj", "v_proj")) if lora else model()
    config = SFTConfig(batch_size=1, activation_checkpointing=checkpointing)
    train(llama, [SFTRow([3], [4, 5, 6, 7, 8])], config, tmp_path)
    (row,) = map(json.loads, (tmp_path / "timing.jsonl").read_text().splitlines())
    assert (row["tokens"], row["flops"]) == (6, expected)


def test_the_peak_of_a_cpu_is_measured_and_memory_is_that_of_the_process():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    held = []  # 32 MB at a time, until the process holds more than it ever did
    while peak_memory(cpu) - before <= 32 << 20 and len(held) < 128:
        held.append(torch.ones(8 << 20))
    assert 32 << 20 < peak_memory(cpu) - before < 96 << 20
    x = torch.randn(768, 768)
    import time

    x @ x
    started = time.perf_counter()
    for _ in range(5):
        x @ x
    assert 5 * 2 * 768**3 / (time.perf_counter() - started) < peak_flops(cpu)  # no product is faster


def test_evaluate_takes_any_batch():
    config = SFTConfig(max_pack_tokens=20)
    few, many = (
        evaluate(model(), Batch.take(ROWS, (), c, 0, range(8), (row_keys(ROWS), [])), c) for c in (config, SFTConfig())
    )
    assert few["loss"] == pytest.approx(many["loss"], rel=1e-6)
