"""The ways to compute a DPO step that `python -m benchmarks train` times: they compute the same thing."""

import pytest
import torch

from benchmarks import training
from benchmarks.drivers import drive_train
from engine import InputError, Llama, LlamaConfig, ops


@pytest.fixture(scope="module")
def model():
    return Llama(LlamaConfig(32, 2, 4, 2, 8, 48, vocab_size=300, max_seq_len=64)).init_weights(seed=0, std=0.2)


@pytest.mark.parametrize(
    "kind, prompt, answer", [(drive_train.step, 0, 12), (drive_train.step, 6, 6), (drive_train.head, 0, 12)]
)
def test_every_way_has_the_same_loss_and_gradients(model, kind, prompt, answer):
    work = {"pairs": 2, "prompt": prompt, "answer": answer, "seed": 1}
    found = {
        name: [kind(drive_train.WAYS[name](), model, work, 0)]
        for name in ("selfreward", "recompute", "eager", "linear_cross_entropy")
    }
    training.check_agreement(found)
    assert found["selfreward"][0]["norm"] > 0
    for norm in ("norm", "head_norm") if kind is drive_train.head else ("norm",):
        right = found["eager"][0][norm]
        found["eager"][0][norm] *= 1.01
        with pytest.raises(AssertionError, match=f"eager has a {norm} of"):
            training.check_agreement(found)
        found["eager"][0][norm] = right


@pytest.mark.parametrize(("answer", "limit", "groups"), [(12, 22, 2), (12, 44, 1), (6, 12, 2), (6, 1000, 1)])
def test_pairs_come_in_the_trainers_groups(model, monkeypatch, answer, limit, groups):
    """2 pairs: of two trees with 11 edges each, or of one tree with 12."""
    work = {"pairs": 2, "prompt": 12 - answer, "answer": answer, "seed": 1}
    seen, run = [], ops.logprob_losses
    monkeypatch.setattr(ops, "group_rows", lambda head: limit)
    monkeypatch.setattr(ops, "logprob_losses", lambda *given: seen.append(len(given[2])) or run(*given))
    found = {name: [drive_train.step(drive_train.WAYS[name](), model, work, 0)] for name in ("selfreward", "eager")}
    training.check_agreement(found)
    assert seen == [groups]


@pytest.mark.parametrize("limit", [11, 33])
def test_a_pair_that_is_cut_is_an_error(model, monkeypatch, limit):
    monkeypatch.setattr(ops, "group_rows", lambda head: limit)
    with pytest.raises(ValueError, match="expected those of whole pairs"):
        drive_train.step(drive_train.WAYS["selfreward"](), model, {"pairs": 2, "prompt": 0, "answer": 12, "seed": 1}, 0)


def test_flops_are_those_of_products_with_weights(model):
    per_token = 2 * sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    assert training.flops_of("train", model, 0, 256) == 3 * (2048 * per_token + 8 * 255 * 2 * model.head.numel())
    assert training.flops_of("train", model, 128, 128) == 3 * (1536 * per_token + 8 * 128 * 2 * model.head.numel())
    assert training.flops_of("logprob", model, 0, 256) == 8 * 255 * 6 * model.head.numel()


def row(way, seconds, peak, work="all tokens"):
    return {"work": work, "way": way, "all_seconds": seconds, "peak": peak}


def test_bars_are_met_in_time_and_in_memory_or_not():
    rows = [row("selfreward", [1.0, 1.0], 70), row("recompute", [1.3, 1.3], 40), row("eager", [1.0, 1.2], 700)]
    assert [line.split(":")[0] for line in training.verdicts("logprob", rows)] == ["met", "met"]
    rows += [row("liger", [2.0, 2.0], 60), row("linear_cross_entropy", [1.2, 1.2], 80)]
    assert [line.split(":")[0] for line in training.verdicts("logprob", rows)[2:]] == [
        "NOT met",
        "met",
        "met",
        "NOT met",
    ]
    assert "time 0.50 (bar 1.00), memory 1.167 (bar 1.0)" in training.verdicts("logprob", rows)[2]
    rows[0]["peak"] = 71
    assert training.verdicts("logprob", rows)[0].startswith("NOT met: all tokens, selfreward beside eager")


def test_a_whole_step_is_held_against_the_fastest_peer_and_the_smallest():
    half = "prompt half of the tokens"
    for work, seconds, peak, met in (
        ("no shared prompt", 1.0, 50, True),
        ("no shared prompt", 1.01, 50, False),
        ("no shared prompt", 1.0, 51, False),
        (half, 0.83, 50, True),
        (half, 0.84, 50, False),
    ):
        rows = [row("selfreward", [seconds], peak, work), row("recompute", [9.0], 9, work)]
        (line,) = training.verdicts("train", [*rows, row("a", [1.0], 90, work), row("b", [2.0], 50, work)])
        assert line.startswith("met" if met else "NOT met")
    assert training.verdicts("train", rows) == []


def test_a_peer_that_is_missing_is_left_out_by_name_and_an_unknown_one_is_an_error(capsys, monkeypatch):
    monkeypatch.setitem(training.PEERS, "liger", "no_such_package")
    assert list(training.pythons("train", ["eager", "liger"], None)) == ["selfreward", "recompute", "eager"]
    assert "liger left out: no no_such_package here" in capsys.readouterr().out
    with pytest.raises(InputError, match="peer is 'vllm'"):
        training.pythons("train", ["vllm"], None)


def test_memory_that_a_way_keeps_counts_in_every_later_step(model):
    class Keeping(drive_train.Eager):
        kept = None

        def hidden(self, *given):
            self.kept = torch.ones(1 << 24) if self.kept is None else self.kept
            return super().hidden(*given)

    work, cold = {"pairs": 2, "prompt": 0, "answer": 12, "seed": 1}, drive_train.reset_peak()
    way = Keeping()
    for _ in range(2):
        assert drive_train.step(way, model, work, cold)["peak"] > 60e6


def test_memory_that_a_step_takes_is_seen():
    before = drive_train.reset_peak()
    torch.ones(1 << 24)
    assert drive_train.status("VmHWM") - before > 60e6
    assert drive_train.reset_peak() < before + 30e6
