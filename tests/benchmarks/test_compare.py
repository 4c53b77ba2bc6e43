"""The comparison with other engines, against a child that only counts: protocol, checks and table, no peer installed."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare as comparison
from benchmarks.__main__ import _measured, table
from benchmarks.compare import check_greedy, children, compare, decode_bytes, spread, take_turn
from benchmarks.limits import Limits
from benchmarks.peers import DRIVERS, OURS, PEERS, Answer, Child, ChildEnded, Peer, interpreter
from benchmarks.workloads import COMPARED
from engine import LLM, InputError
from tests.engine.helpers import random_llama, small_config

MODEL = random_llama(small_config(vocab_size=32000, max_seq_len=1024, dim=32, ffn_dim=64))

FAKE = f"""
import sys, threading, time
sys.path.insert(0, {str(DRIVERS)!r})
from protocol import serve

def load(settings):
    print("noise on standard output")
    if settings["format"] == "broken":
        raise SystemExit("cannot load this")
    if settings["format"] == "restless":
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    def generate(workload):
        time.sleep(0.02)
        new = workload["max_tokens"] - (settings["format"] == "short")
        return [[list(range(new))] * workload["n"] for _ in workload["prompts"]]
    return "1.0", lambda: None, generate

serve(load)
"""


@pytest.fixture
def fake(tmp_path):
    """Starts fake peers of a format; ends them."""
    (tmp_path / "fake.py").write_text(FAKE)
    started = []

    def start(form="float32", name="fake"):
        settings = {"model": "", "threads": 1, "cores": comparison.cores(1)}
        started.append(Child(name, form, [sys.executable, str(tmp_path / "fake.py")], settings, tmp_path))
        return started[-1]

    yield start
    for child in started:
        child.close()


@pytest.fixture
def known(monkeypatch):
    """`fake` in the table of peers."""
    formats = {"float32": "float32", "short": "float32", "restless": "int8"}
    monkeypatch.setitem(PEERS, "fake", Peer(formats, ("install fake",)))


def test_a_child_answers_workloads_whatever_its_library_prints(fake):
    child = fake()
    workload = COMPARED["judging"](0, 0.25)
    answer = child.ask(workload)
    assert child.version == "1.0" and answer.seconds >= 0.02
    assert [[len(tokens) for tokens in candidates] for candidates in answer.tokens] == [[64] * 3] * 2


def test_answers_of_another_length_are_refused(fake):
    with pytest.raises(AssertionError, match="fake short answered single with"):
        fake("short").ask(COMPARED["single"](0, 1.0))


def test_a_child_that_ends_is_told_with_its_last_words(fake):
    with pytest.raises(ChildEnded, match=r"fake broken ended with status 1:(.|\n)*cannot load this"):
        fake("broken")


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc to see what a process used")
def test_a_child_that_does_not_sleep_is_found(fake, monkeypatch):
    idle, restless = fake(), fake("restless")
    slow = COMPARED["single"](0, 1.0)
    ask = idle.ask
    monkeypatch.setattr(idle, "ask", lambda workload: [ask(workload) for _ in range(60)][-1])  # over a second
    with pytest.raises(AssertionError, match=r"fake restless used .* of a core while fake ran"):
        take_turn(idle, [idle, restless], slow)


def test_a_peer_without_its_packages_says_how_to_install_it(tmp_path, monkeypatch):
    for name in ("protocol.py", "drive_fake.py"):
        (tmp_path / name).write_text(
            (DRIVERS / name).read_text() if name == "protocol.py" else "import no_such_package"
        )
    monkeypatch.setitem(PEERS, "fake", Peer({"float32": "float32"}, ("install fake",)))
    monkeypatch.setattr(comparison, "DRIVERS", tmp_path)
    python = tmp_path / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    message = r"lacks a package \(ModuleNotFoundError: No module named 'no_such_package'\): .*pip install fake"
    with pytest.raises(InputError, match=message), comparison.children(MODEL, ["fake"], ["float32"], 1, tmp_path):
        pass


def test_a_missing_peer_says_how_to_install_it(tmp_path):
    with pytest.raises(InputError, match=r"-m venv .*ctranslate2 && .*pip install ctranslate2=="):
        interpreter("ctranslate2", tmp_path)
    with pytest.raises(InputError, match="SELFREWARD_PEERS"):
        interpreter("vllm", None)
    with pytest.raises(InputError, match="expected one of transformers, llamacpp, ctranslate2, vllm"):
        interpreter("word2vec", tmp_path)


@pytest.mark.parametrize(
    "name", [name if name == "sampling" else pytest.param(name, marks=pytest.mark.full) for name in COMPARED]
)
def test_the_engine_runs_as_a_child_beside_a_peer(name, fake, known, monkeypatch):
    monkeypatch.setattr(comparison, "check_greedy", lambda *arguments: None)
    monkeypatch.setattr(Limits, "measure", lambda threads: Limits(100.0, 10.0))
    with children(MODEL, [OURS], ["float32"], 1, None) as ours:
        limits, rows = compare(name, MODEL, [*ours, fake()], 2, 0.25, 1)
    workload = COMPARED[name](0, 0.25)
    counted = workload.new_tokens + (workload.prompt_tokens if name == "prefill" else 0)
    own, peer = rows
    assert len(own["seconds"]) == len(peer["seconds"]) == 2
    for row in rows:
        assert counted / max(row["seconds"]) <= row["tokens_per_second"] <= counted / min(row["seconds"])
    assert own["our_speed"] == 1.0
    assert min(peer["seconds"]) / max(own["seconds"]) <= peer["our_speed"] <= max(peer["seconds"]) / min(own["seconds"])
    result = {"machine": {"cpu": "a", "instructions": "b", "threads": 1}, "limits": limits._asdict(), "rows": rows}
    assert f"| fake 1.0 | float32 | {peer['tokens_per_second']:.0f} |" in table(result) and json.dumps(result)
    assert ("of bandwidth" in table(result)) == (name == "single")


def test_other_greedy_tokens_are_refused_and_near_ties_are_not(fake, known, monkeypatch):
    workload = COMPARED["single"](0, 1.0)
    right = list(LLM(MODEL).generate(workload.prompts, workload.params)[0].outputs[0].token_ids)
    wrong = [*right[:7], (right[7] + 1) % 32000, *right[8:]]
    child = fake()
    check_greedy(MODEL, workload, {child: Answer(1.0, [[right]], 0.0)})
    check_greedy(MODEL, workload, {child: Answer(1.0, [[[*right[:16], *wrong[16:]]]], 0.0)})
    with pytest.raises(AssertionError, match="at position 7 where the model says"):
        check_greedy(MODEL, workload, {child: Answer(1.0, [[wrong]], 0.0)})
    monkeypatch.setitem(comparison.GAP, "float32", 1e3)
    check_greedy(MODEL, workload, {child: Answer(1.0, [[wrong]], 0.0)})


def test_bytes_of_decode_steps_by_hand():
    workload, config = COMPARED["single"](0, 1.0), MODEL.config
    weights = sum(p.numel() for name, p in MODEL.named_parameters() if p.dim() == 2 and name != "embed")
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * sum(range(129, 256))
    assert decode_bytes(MODEL, workload, "selfreward", "float32") == 4 * (127 * weights + cache)
    assert decode_bytes(MODEL, workload, "selfreward", "int8") == 127 * weights + 4 * cache
    assert decode_bytes(MODEL, workload, "vllm", "bfloat16") == 2 * (127 * weights + cache)
    assert decode_bytes(MODEL, workload, "llamacpp", "float32") == 4 * 127 * weights + 2 * cache


def test_quantiles():
    assert spread([3.0]) == (3.0, 3.0) and spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (2.0, 5.0)


def test_a_record_says_what_was_measured_not_where_it_lies():
    assert _measured(["single", "--json", "x", "--peers", "", "--peers-dir=y", "--rounds", "2"]) == [
        *("single", "--peers", "''", "--rounds", "2")
    ]
