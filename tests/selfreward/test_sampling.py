"""Groups of rows: in the order of the requests, whole groups on the disk, and the same rows after any interruption."""

import json

import pytest

from engine import LLM, InputError, SamplingParams, Tokenizer
from selfreward import context
from selfreward.context import Run, Stopped
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.sampling import GROUP, Request, in_groups, sample_groups, sample_waves
from selfreward.state import RunDir

NOTHING = None
RECIPE = Recipe.load("micro")
TOKENIZER = Tokenizer(RECIPE.model)
MODEL = LLM(str(RECIPE.model), tokenizer=TOKENIZER)
LOADED = (RECIPE.model, MODEL)


def request(number, n=2):
    def rows(output):
        if output is None:
            return [{"id": f"{number}-{i}", "text": None} for i in range(n)]
        return [{"id": f"{number}-{one.index}", "text": one.text} for one in output.outputs]

    ids = TOKENIZER.chat_prompt(" ".join(["copy", *"abcdefg"[: 3 + number % 5]]))
    return Request(ids, SamplingParams(n=n, max_tokens=12, seed=number), rows)


REQUESTS = [request(number, n=1 + number % 3) for number in range(2 * GROUP + 9)]


@pytest.fixture
def run(tmp_path):
    with RunDir(tmp_path / "run", {}) as directory:
        yield Run(RECIPE, directory, TOKENIZER, NOTHING, Reporter(quiet=True), _loaded=LOADED)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with RunDir(tmp_path_factory.mktemp("unbroken") / "run", {}) as directory:
        run = Run(RECIPE, directory, TOKENIZER, NOTHING, Reporter(quiet=True), _loaded=LOADED)
        rows = sample_groups(run, "rows.jsonl", RECIPE.model, in_groups(REQUESTS))
        return rows, directory.file("rows.jsonl").read_bytes()


def test_rows_come_in_the_order_of_the_requests_and_of_their_candidates(unbroken):
    rows, content = unbroken
    assert [row["id"] for row in rows] == [f"{i}-{c}" for i, r in enumerate(REQUESTS) for c in range(r.params.n)]
    assert [json.loads(line) for line in content.splitlines()] == rows


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_stage_goes_on_behind_its_last_whole_group_and_writes_the_same_bytes(run, unbroken, groups, torn):
    rows, content = unbroken
    lines = content.splitlines(keepends=True)
    whole = sum(request.params.n for request in REQUESTS[: groups * GROUP])
    path = run.dir.file("rows.jsonl")
    path.write_bytes(b"".join(lines[: whole + 3]) + lines[whole + 3][:torn])  # a kill tore the next group
    asked = []
    requests = [
        Request(r.ids, r.params, lambda output, r=r, i=i: asked.append(i) or r.rows(output))
        for i, r in enumerate(REQUESTS)
    ]
    assert sample_groups(run, "rows.jsonl", RECIPE.model, in_groups(requests)) == rows
    assert path.read_bytes() == content
    assert asked == list(range(groups * GROUP, len(REQUESTS)))  # nothing finished is sampled again


def test_a_stop_ends_the_stage_after_a_whole_group(run, unbroken):
    rows, content = unbroken
    run.stop.set()
    with pytest.raises(Stopped):
        sample_groups(run, "rows.jsonl", RECIPE.model, in_groups(REQUESTS))
    kept = run.dir.file("rows.jsonl").read_bytes()
    assert content.startswith(kept) and kept.count(b"\n") == sum(r.params.n for r in REQUESTS[:GROUP])
    run.stop.clear()
    assert sample_groups(run, "rows.jsonl", RECIPE.model, in_groups(REQUESTS)) == rows  # the sampler is usable again


def test_what_is_finished_needs_no_model(run, unbroken, monkeypatch):
    rows, content = unbroken
    run.dir.file("rows.jsonl").write_bytes(content)
    run._loaded = None
    monkeypatch.setattr(context, "LLM", None)
    assert sample_groups(run, "rows.jsonl", RECIPE.model, in_groups(REQUESTS)) == rows
    one = [Request(r.ids, SamplingParams(), lambda output: [{"id": "one"}]) for r in REQUESTS[:GROUP]]
    run.dir.write_jsonl("waves.jsonl", [{"id": "one"}] * GROUP)
    assert len(sample_waves(run, "waves.jsonl", RECIPE.model, 1, lambda rows: one)) == GROUP
    with pytest.raises(TypeError):  # a group more
        sample_waves(run, "waves.jsonl", RECIPE.model, 2, lambda rows: one)


def test_enough_is_asked_after_every_group(run):
    sizes = []
    rows = sample_groups(
        run,
        "rows.jsonl",
        RECIPE.model,
        in_groups(REQUESTS),
        enough=lambda rows: sizes.append(len(rows)) or len(sizes) == 2,
    )
    assert len(rows) == sum(r.params.n for r in REQUESTS[: 2 * GROUP]) == sizes[-1] and len(sizes) == 2


def test_a_prompt_that_fills_the_context_gets_its_rows_without_being_asked(run):
    long = request(1)
    long = Request([TOKENIZER.bos_id] * MODEL.max_model_len, long.params, long.rows)
    rows = sample_groups(run, "rows.jsonl", RECIPE.model, [[request(0), long, request(2)]])
    assert [row["text"] is None for row in rows] == [False, False, True, True, False, False]


def test_no_requests_leave_an_empty_file(run):
    assert sample_groups(run, "rows.jsonl", RECIPE.model, []) == []
    assert run.dir.file("rows.jsonl").read_bytes() == b""


def test_a_damaged_row_of_an_interrupted_stage_is_named(run):
    run.dir.file("rows.jsonl").write_bytes(b"{}\nnot json\n")
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read .* remove it"):
        sample_groups(run, "rows.jsonl", RECIPE.model, [[request(0)]])
