"""The pre-training script: which tokens are learnt, how the rate moves, what it writes."""

import json
from pathlib import Path

import pytest
import torch

from engine import Tokenizer, content_hash, load_checkpoint
from selfreward.tiny import DATA, pretrain
from selfreward.tiny.corpus import SKILLS, WORLD, Document, documents


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DATA / "tokenizer.model")


@pytest.mark.parametrize("stops", [True, False])
def test_every_token_after_bos_is_predicted_and_eos_only_where_the_document_stops(
    tokenizer: Tokenizer, stops: bool
) -> None:
    row = pretrain.document_row(Document("copy", stops, False, "right"), tokenizer)
    assert row.prompt == [tokenizer.bos_id]
    assert row.completion == tokenizer.encode("copy") + [tokenizer.eos_id] * stops


def test_the_phases_share_the_tokens_and_their_rates_meet() -> None:
    first, second = pretrain.PHASES
    assert (first.mix, second.mix) == (SKILLS, WORLD) and first.min_lr == second.lr
    assert (first.steps(12_000_000) + second.steps(12_000_000)) * pretrain.TOKENS_PER_STEP == pytest.approx(
        12e6, rel=1e-3
    )


def test_a_step_of_documents_has_the_stated_number_of_tokens(tokenizer: Tokenizer) -> None:
    steps = [documents(0, step * 440, pretrain.DOCUMENTS_PER_STEP) for step in range(4)]
    rows = [pretrain.document_row(document, tokenizer) for step in steps for document in step]
    size = sum(len(row.prompt) + len(row.completion) for row in rows) / 4
    assert size == pytest.approx(pretrain.TOKENS_PER_STEP, rel=0.02)


def test_the_script_writes_a_checkpoint_and_a_log_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "DOCUMENTS_PER_STEP", 40)
    threads = str(torch.get_num_threads())

    def run(name: str) -> list[str]:
        out, work, log = (tmp_path / name / part for part in ("m0", "work", "log.jsonl"))
        out.parent.mkdir(exist_ok=True)
        options = ["--work", str(work), "--log", str(log), "--tokens", "24600", "--threads", threads]
        pretrain.main(["--out", str(out), *options])
        return log.read_text().splitlines()

    log = run("unbroken")
    assert [json.loads(line).get("phase") for line in log] == ["skills", "world", None]
    assert json.loads(log[-1]) == {"content_hash": content_hash(tmp_path / "unbroken/m0")}
    model = load_checkpoint(tmp_path / "unbroken/m0")
    assert model.config == pretrain.model_config(Tokenizer(tmp_path / "unbroken/m0").vocab_size)
    assert 800_000 < model.config.n_parameters < 1_000_000

    with monkeypatch.context() as patch:  # stopped between the phases
        patch.setattr(pretrain, "PHASES", pretrain.PHASES[:1])
        patch.setattr(pretrain, "clear_state", lambda work: None)
        run("stopped")
    assert run("stopped") == log


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--log", "missing/log.jsonl"]])
def test_a_wrong_option_ends_with_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments: None)
    monkeypatch.setattr(pretrain, "content_hash", lambda path: "0")
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--out", "m0", *wrong])
    assert stop.value.code == 2
    assert wrong[1] in capsys.readouterr().err


def test_the_shipped_m0_is_the_one_whose_training_is_logged() -> None:
    folder = Path(pretrain.__file__).parent
    log = (folder / "m0.log.jsonl").read_text().splitlines()
    assert json.loads(log[-1]) == {"content_hash": content_hash(folder / "m0")}
