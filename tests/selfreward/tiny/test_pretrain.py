"""The pre-training script: which tokens are learnt, how the rate moves, what it writes."""

import json
from pathlib import Path

import pytest
import torch

from engine import Tokenizer, TokenTree, load_checkpoint
from selfreward.tiny import DATA, pretrain
from selfreward.tiny.corpus import Document, documents


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DATA / "tokenizer.model")


@pytest.mark.parametrize(("stops", "targets"), [(True, ["▁copy", "</s>"]), (False, ["▁copy"])])
def test_every_token_after_bos_is_predicted_and_eos_only_where_the_document_stops(
    tokenizer: Tokenizer, stops: bool, targets: list[str]
) -> None:
    tree = pretrain.document_tree(Document("copy", stops, False, "right"), tokenizer)
    (pack,) = TokenTree.pack([tree], 64)
    assert pack.tokens[0] == tokenizer.bos_id
    expected = tokenizer.encode("copy") + [tokenizer.eos_id] * stops
    assert pack.edges.target.tolist() == expected and len(expected) == len(targets)


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [pretrain.learning_rate(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == pretrain.PEAK_LR and rates[-1] == pytest.approx(pretrain.PEAK_LR / 10)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 0.05 * pretrain.PEAK_LR


def test_a_step_of_documents_has_the_stated_number_of_tokens(tokenizer: Tokenizer) -> None:
    sizes = [
        sum(len(pretrain.document_tree(d, tokenizer)) for d in documents(0, step * 440, pretrain.DOCUMENTS_PER_STEP))
        for step in range(4)
    ]
    assert sum(sizes) / 4 == pytest.approx(pretrain.TOKENS_PER_STEP, rel=0.02)


def test_training_on_a_batch_lowers_its_loss(tokenizer: Tokenizer) -> None:
    model = pretrain.Llama(pretrain.model_config(tokenizer.vocab_size)).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trees = [pretrain.document_tree(document, tokenizer) for document in documents(0, 0, 40)]
    losses = [pretrain.train_step(model, optimizer, trees) for _ in range(6)]
    assert losses[0] == pytest.approx(torch.tensor(float(tokenizer.vocab_size)).log().item(), abs=0.1)
    assert losses[-1] < losses[0] - 0.3


def test_the_script_writes_a_checkpoint_and_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    threads = str(torch.get_num_threads())
    pretrain.main(["--out", str(tmp_path / "m0"), "--log", str(log), "--tokens", "8200", "--threads", threads])
    model = load_checkpoint(tmp_path / "m0")
    assert model.config == pretrain.model_config(Tokenizer(tmp_path / "m0").vocab_size)
    assert 800_000 < model.config.n_parameters < 1_000_000
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1]


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--log", "missing/log.jsonl"]])
def test_a_wrong_option_ends_with_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments: None)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--out", "m0", *wrong])
    assert stop.value.code == 2
    assert wrong[1] in capsys.readouterr().err
