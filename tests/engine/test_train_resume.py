"""Resume in mid-training: whatever interrupts it, the weights and metrics.jsonl end as the bits of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import DPOConfig, Heldout, InputError, SFTConfig, SFTRow, TrainingInterrupted, clear_state, ops, train
from engine.train import state as state_module
from tests.engine.test_train import model, pairs, with_reference

STEPS = 9  # 8 rows, batches of 3, three epochs


def sft():
    return [SFTRow(row.prompt, row.chosen) for row in pairs(8)], SFTConfig(
        lr=1e-3, epochs=3, batch_size=3, save_every=2
    )


def dpo():
    rows = with_reference(pairs(8), [(-9.0, -8.0)] * 8)
    return rows, DPOConfig(lr=1e-3, epochs=3, batch_size=3, save_every=2, max_pack_tokens=40)


def dpo_with_dropout_and_replay():
    """Five replay rows, two a step: nine steps cross three permutations."""
    rows, config = dpo()
    return rows, DPOConfig(**{**vars(config), "dropout": 0.2, "replay_weight": 0.5, "replay_batch_size": 2})


def ipo_with_common_prompts_and_heldout_rows():
    """Three pairs of one prompt, which share answers too; the best of the measured weights are the model's at the end."""
    rows, config = dpo()
    rows[2] = replace(rows[2], prompt=rows[0].prompt, chosen=rows[0].chosen)
    rows[5] = replace(rows[5], prompt=rows[0].prompt, chosen=rows[0].rejected)
    options = {"dropout": 0.2, "loss": "ipo", "label_smoothing": 0.1, "nll_weight": 0.2, "max_pack_tokens": 48}
    return rows, DPOConfig(**{**vars(config), **options})


REPLAY = [SFTRow(row.prompt, row.rejected) for row in pairs(5)]
KINDS = {
    "sft": sft,
    "dpo": dpo,
    "dpo+dropout+replay": dpo_with_dropout_and_replay,
    "ipo+common prompts+heldout": ipo_with_common_prompts_and_heldout_rows,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def outcome(llama, out_dir, result):
    """Everything that must not depend on interruptions."""
    weights = [parameter.detach().clone() for parameter in llama.parameters()]
    return weights, (out_dir / "metrics.jsonl").read_bytes(), result.steps, result.weight_epoch


def unbroken(kind, out_dir):
    llama = model()
    return outcome(llama, out_dir, train(llama, **given(kind), out_dir=out_dir))


def given(kind):
    """The arguments of `train` that say what is trained."""
    rows, config = KINDS[kind]()
    given = {"rows": rows, "config": config}
    if getattr(config, "replay_weight", 0):
        given["replay"] = REPLAY
    if "heldout" in kind:
        given["heldout"] = Heldout(with_reference(pairs(11)[8:], [(-9.0, -8.0)] * 3), every=2, keep_best=True)
    return given


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert found[1:] == expected[1:]


def saved_step(out_dir):
    return json.loads((out_dir / "state/state.json").read_text())["step"]


def stop_at(step):
    """A should_stop that is true when asked for the `step`-th time."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) == step


def note(seen):
    """An on_step that writes down which steps were taken."""
    return lambda step, steps, metrics: seen.append(step)


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(found, steps, metrics):
        if found == step:
            raise Crash

    return on_step


@each_kind
def test_stopped_at_random_steps_it_ends_as_the_unbroken_run(kind, tmp_path):
    expected = unbroken(kind, tmp_path / "whole")
    for seed in range(3):
        out_dir, done = tmp_path / str(seed), 0
        chance = random.Random(seed)
        while done < STEPS - 1:
            ask = chance.randint(1, STEPS - 1 - done)
            done += ask
            with pytest.raises(TrainingInterrupted, match=f"step {done} of {STEPS}") as caught:
                train(model(), **given(kind), out_dir=out_dir, should_stop=stop_at(ask))
            assert caught.value.step == done == saved_step(out_dir)
            assert not isinstance(caught.value, InputError)
        llama = model()
        assert_same(outcome(llama, out_dir, train(llama, **given(kind), out_dir=out_dir)), expected)


@each_kind
def test_crashed_at_any_step_it_ends_as_the_unbroken_run(kind, tmp_path):
    expected = unbroken(kind, tmp_path / "whole")
    for step in range(1, STEPS + 1):
        out_dir, llama = tmp_path / str(step), model()
        with pytest.raises(Crash):
            train(model(), **given(kind), out_dir=out_dir, on_step=crash_at(step))
        seen = []
        result = train(llama, **given(kind), out_dir=out_dir, on_step=note(seen))
        assert_same(outcome(llama, out_dir, result), expected)
        assert seen[0] == (step - 1) // 2 * 2 + 1  # from the last save on, not from the start


KILLED = """
import os, signal, sys
from pathlib import Path
from engine import train
from tests.engine.test_train import model
from tests.engine.test_train_resume import given
kill = lambda step, steps, metrics: os.kill(os.getpid(), signal.SIGKILL) if step == 6 else None
train(model(), **given("dpo+dropout+replay"), out_dir=Path(sys.argv[1]), on_step=kill)
"""


def test_a_killed_process_is_continued_by_another(tmp_path):
    torch_threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=root, env={**os.environ, **torch_threads, "PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL and saved_step(tmp_path / "killed") == 4
    llama = model()
    result = train(llama, **given("dpo+dropout+replay"), out_dir=tmp_path / "killed")
    expected = unbroken("dpo+dropout+replay", tmp_path / "whole")
    assert_same(outcome(llama, tmp_path / "killed", result), expected)


KILLED_IN_TURN = """
import os, signal, sys
from pathlib import Path
from engine import train
from tests.engine.test_train import model
from tests.engine.test_train_resume import long
last = int(sys.argv[2])
kill = lambda step, steps, metrics: os.kill(os.getpid(), signal.SIGKILL) if step == last else None
train(model(), **long(), out_dir=Path(sys.argv[1]), on_step=kill)
"""


def long():
    """33 steps, of which every third is saved."""
    given_ = given("ipo+common prompts+heldout")
    config = DPOConfig(**{**vars(given_["config"]), "epochs": 11, "save_every": 3})
    return given_ | {"config": config, "heldout": replace(given_["heldout"], every=7)}


@pytest.mark.full
def test_killed_at_ten_random_steps_the_weights_end_as_the_unbroken_runs(tmp_path):
    expected = model()
    expected = outcome(expected, tmp_path / "whole", train(expected, **long(), out_dir=tmp_path / "whole"))
    root, threads = Path(__file__).parents[2], str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(root)}
    for step in sorted(random.Random(8).sample(range(1, 33), 10)):
        command = [sys.executable, "-c", KILLED_IN_TURN, str(tmp_path / "killed"), str(step)]
        assert subprocess.run(command, cwd=root, env=environment).returncode == -signal.SIGKILL
    llama = model()
    found = outcome(llama, tmp_path / "killed", train(llama, **long(), out_dir=tmp_path / "killed"))
    assert_same(found, expected)


class Killed(BaseException):
    """Like a kill: no handler in the engine catches it."""


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_between_any_two_writes_of_a_save_leaves_the_old_or_the_new_state(moment, tmp_path, monkeypatch):
    expected = unbroken("sft", tmp_path / "whole")
    real_sync, real_replace, calls = state_module._sync, Path.replace, iter(range(1000))

    def die_in_turn(real):
        def call(*arguments):
            if next(calls) == moment:
                raise Killed
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_sync", die_in_turn(real_sync))
        patch.setattr(Path, "replace", die_in_turn(real_replace))
        with pytest.raises(Killed):  # six calls a save: two saves, so with and without an older state
            train(model(), *sft(), tmp_path / "killed")
    (tmp_path / "killed/state/.tmpAbCdEf").write_bytes(b"half")  # what safetensors leaves when it is killed
    llama = model()
    assert_same(outcome(llama, tmp_path / "killed", train(llama, *sft(), tmp_path / "killed")), expected)
    assert {path.name for path in (tmp_path / "killed/state").iterdir()} == {"state.json", f"step-{STEPS}.safetensors"}


def test_a_torn_tail_of_the_metrics_is_cut_and_lost_lines_are_named(tmp_path):
    expected = unbroken("sft", tmp_path / "whole")
    rows, config = sft()
    with pytest.raises(TrainingInterrupted):
        train(model(), rows, config, tmp_path / "torn", should_stop=stop_at(4))
    path = tmp_path / "torn/metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"metrics.jsonl has 3 of the 4 lines"):
        train(model(), rows, config, tmp_path / "torn")
    path.write_bytes(whole + b'{"step": 5, "lo')
    llama = model()
    assert_same(outcome(llama, tmp_path / "torn", train(llama, rows, config, tmp_path / "torn")), expected)


def test_at_the_last_step_a_resume_does_nothing_and_returns_the_same(tmp_path):
    rows, config = sft()
    first, second, seen = model(), model(), []
    expected = outcome(first, tmp_path, train(first, rows, config, tmp_path))
    result = train(second, rows, config, tmp_path, on_step=note(seen))
    assert_same(outcome(second, tmp_path, result), expected)
    assert seen == []


def test_the_model_that_was_interrupted_can_go_on_and_its_cached_keys_count_as_stale(tmp_path):
    expected = unbroken("dpo", tmp_path / "whole")
    rows, config = dpo()
    llama = model()
    with pytest.raises(TrainingInterrupted):
        train(llama, rows, config, tmp_path / "again", should_stop=stop_at(5))
    epoch = llama.weight_epoch
    found = outcome(llama, tmp_path / "again", train(llama, rows, config, tmp_path / "again"))
    assert_same(found[:3], expected[:3])
    assert llama.weight_epoch == epoch + 1 + STEPS - 5
    llama.check_weights()


def test_whoever_went_on_before_the_model_as_first_loaded_can_always_go_on(tmp_path):
    expected = unbroken("sft", tmp_path / "whole")
    rows, config = sft()
    llama, again = model(), model()
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            train(llama, rows, config, tmp_path / "again", should_stop=stop_at(2))
    found = outcome(again, tmp_path / "again", train(again, rows, config, tmp_path / "again"))
    assert_same(found[:3], expected[:3])


def test_without_resume_or_after_clear_state_training_begins_anew(tmp_path):
    rows, config = sft()
    expected = unbroken("sft", tmp_path / "run")
    for drop in (lambda: {"resume": False}, lambda: clear_state(tmp_path / "run") or {}):
        llama, seen = model(), []
        options = drop()
        result = train(llama, rows, config, tmp_path / "run", on_step=note(seen), **options)
        assert_same(outcome(llama, tmp_path / "run", result), expected)
        assert seen == list(range(1, STEPS + 1))


def test_clear_state_removes_what_is_its_own_and_nothing_else(tmp_path):
    clear_state(tmp_path)  # none: no error
    train(model(), *sft(), tmp_path)
    (tmp_path / "state/notes.txt").write_text("mine")
    clear_state(tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]
    (tmp_path / "state/notes.txt").unlink()
    clear_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "timing.jsonl"]


@pytest.mark.parametrize(("save_every", "expected"), [(None, {0}), (1, set(range(STEPS))), (4, {0, 4, 8})])
def test_save_every_says_when_the_state_is_written(save_every, expected, tmp_path):
    rows, config = sft()
    config = SFTConfig(**{**vars(config), "save_every": save_every})
    seen = set()
    look = lambda *_: seen.add(saved_step(tmp_path) if (tmp_path / "state/state.json").exists() else 0)
    train(model(), rows, config, tmp_path, on_step=look)
    assert seen == expected and saved_step(tmp_path) == STEPS


def test_without_an_out_dir_a_stop_says_that_nothing_was_saved():
    with pytest.raises(TrainingInterrupted, match="step 2 of 9; nothing was saved"):
        train(model(), *sft(), should_stop=stop_at(2))


def test_other_replay_rows_are_refused(tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(model(), **given("dpo+dropout+replay"), out_dir=tmp_path, should_stop=stop_at(3))
    with pytest.raises(InputError, match="the replay rows are others"):
        train(model(), **(given("dpo+dropout+replay") | {"replay": REPLAY[:4]}), out_dir=tmp_path)


@pytest.fixture
def stopped(tmp_path):
    """The out_dir of a DPO training that was stopped after step 3."""
    with pytest.raises(TrainingInterrupted):
        train(model(), *dpo(), tmp_path, should_stop=stop_at(3))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2e-3}, "config.lr was 0.001, is 0.002"),
        ({"betas": (0.8, 0.9)}, r"config.betas was \[0.9, 0.95\], is \[0.8, 0.9\]"),
        ({"beta": 0.2, "seed": 1}, "config.beta was 0.1, is 0.2; config.seed was 0, is 1|config.seed.*config.beta"),
    ],
    ids=str,
)
def test_another_config_is_refused_by_name(change, said, stopped):
    rows, config = dpo()
    with pytest.raises(InputError, match=said):
        train(model(), rows, DPOConfig(**{**vars(config), **change}), stopped)
    other_rhythm = DPOConfig(**{**vars(config), "save_every": None})
    assert train(model(), rows, other_rhythm, stopped).steps == STEPS  # changes no number, so it may change


def test_other_rows_model_dtype_torch_threads_or_kernels_are_refused_by_name(stopped, monkeypatch):
    rows, config = dpo()
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="the rows are others"):
        train(model(), rows[::-1], config, stopped)
    with pytest.raises(InputError, match="the rows are others"):
        train(model(), with_reference(pairs(8), [(-9.0, -8.5)] * 8), config, stopped)
    with pytest.raises(InputError, match=r"dtype was 'torch.float32', is 'torch.float64'"):
        train(model(torch.float64), rows, config, stopped)
    with pytest.raises(InputError, match="the model holds other weights than at the start"):
        train(model().init_weights(seed=2), rows, config, stopped)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(InputError, match=r"torch was '[^']+', is '9.9'"):
        train(model(), rows, config, stopped)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(InputError, match=r"threads was \d+, is 7 \(the last bits of torch's sums depend on it"):
        train(model(), rows, config, stopped)
    monkeypatch.undo()
    monkeypatch.setenv("SELFREWARD_BACKEND", "torch")
    ops.choose.cache_clear()
    try:
        said = r"backends.rms_norm was 'native', is 'torch' \(the last bits depend on it: SELFREWARD_BACKEND"
        with pytest.raises(InputError, match=said):
            train(model(), rows, config, stopped)
    finally:
        ops.choose.cache_clear()
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "flipped bit": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "not a file": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_named_and_the_model_is_left_alone(damage, stopped):
    DAMAGE[damage](stopped / "state/step-3.safetensors")
    llama, before = model(), model()
    with pytest.raises(
        InputError, match=r"step-3.safetensors is damaged \(.*\); remove .*state and train from the start"
    ):
        train(llama, *dpo(), stopped)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "truncated", '{"format": 1}', "wrong kind", "not utf-8"])
def test_a_damaged_state_json_is_named(content, stopped):
    path = stopped / "state/state.json"
    whole = path.read_text()
    content = {"truncated": whole[:-40], "wrong kind": whole.replace('"step": 3', '"step": "3"')}.get(content, content)
    path.write_bytes(b"\xff{}" if content == "not utf-8" else content.encode())
    with pytest.raises(InputError, match=r"state.json is damaged \(.*\); remove .*state and train from the start"):
        train(model(), *dpo(), stopped)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("best_checksum"), "best_checksum is missing"),
        (lambda state: state.update(best_checksum=3), "best_checksum is 3"),
        (lambda state: state["weights"].pop("best"), "weights.best is missing"),
        (lambda state: state["weights"].update(start=["x"]), r"weights.start is \['x'\]"),
        (lambda state: state["progress"].pop("stale"), "progress.stale is missing"),
        (lambda state: state["progress"].update(more=1), "progress.more is 1"),
        (lambda state: state["progress"].update(num_tokens="9"), "progress.num_tokens is '9'"),
        (lambda state: state["progress"].update(num_tokens=None), "progress.num_tokens is None"),
        (lambda state: state["progress"].update(best_step=1.5), "progress.best_step is 1.5"),
        (lambda state: state["progress"].update(best="low"), "progress.best is 'low'"),
        (lambda state: state.update(weight_epoch=None), "weight_epoch is None"),
    ],
)
def test_damage_inside_state_json_is_named(damage, said, stopped):
    path = stopped / "state/state.json"
    state = json.loads(path.read_text())
    damage(state)
    path.write_text(json.dumps(state))
    with pytest.raises(
        InputError, match=rf"state.json is damaged \(.*{said}.*\); remove .*state and train from the start"
    ):
        train(model(), *dpo(), stopped)


def test_a_full_disk_is_one_sentence_and_keeps_the_old_state(tmp_path, monkeypatch):
    rows, config = sft()

    def full(*_):
        if saved_step(tmp_path) == 4:
            raise OSError(28, "No space left on device")
        real(*_)

    real = state_module.save_file
    monkeypatch.setattr(
        state_module, "save_file", lambda *a: full(*a) if (tmp_path / "state/state.json").exists() else real(*a)
    )
    with pytest.raises(InputError, match=r"step-6.safetensors cannot be written \(.*No space left"):
        train(model(), rows, config, tmp_path)
    monkeypatch.undo()
    assert saved_step(tmp_path) == 4
    llama = model()
    assert_same(outcome(llama, tmp_path, train(llama, rows, config, tmp_path)), unbroken("sft", tmp_path / "whole"))


def test_an_out_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written \(.*File exists"):
        train(model(), *sft(), tmp_path / "file")
