"""Whatever a file holds: no traceback, no silent drop, and counts that add up."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine import InputError
from selfreward.alpaca import read_annotations, win_rate
from selfreward.few_shot import PromptTemplate
from selfreward.files import read_rows
from selfreward.filters import LEVELS, Sieve
from selfreward.formats import as_example, as_group, as_prompt, load_ift, load_prompts, load_ranked, read_file
from selfreward.judge import JudgeTemplate
from selfreward.mt_bench import read_questions
from selfreward.pairs import NO_MORE, REASONS, Rules, build_pairs
from selfreward.prompts import Choice, by_reason, found_in
from selfreward.recipe import Recipe, recipe_keys
from selfreward.records import FORMATS, Refused, format_of, read_record
from selfreward.run import main

FEW, MANY = 40, 1500  # cases of each test in `make test` and in `make test-full`

TEXT = st.text(st.sampled_from("ab \n\u2028\u00e9\ud800,\"'"), max_size=6) | st.sampled_from(
    ["", "user", "assistant", "system"]
)
SCALAR = st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([0.5, 1e300]) | TEXT
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT | SCALAR}),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "bot"]), "value": TEXT | SCALAR}),
)
TALK = st.lists(MESSAGE, max_size=4)
REPLY = st.fixed_dictionaries(
    {"text": TEXT, "rank": st.none() | st.integers(0, 2) | SCALAR}, optional={"deleted": st.booleans()}
)
NAMES = st.sampled_from(["text", "role", "content", "replies", "x"])
JSON = st.recursive(
    SCALAR | TALK | st.lists(REPLY, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), TEXT | TALK | JSON),
    **dict.fromkeys(("response", "instruction", "input", "output", "text", "system"), TEXT | SCALAR),
    **dict.fromkeys(("messages", "conversations"), TALK | JSON),
    "answers": st.lists(REPLY, max_size=3) | JSON,
    **dict.fromkeys(("id", "message_tree_id", "history", "label"), JSON),
}
TREE = st.fixed_dictionaries(
    {"prompt": st.fixed_dictionaries({"text": TEXT, "replies": st.lists(REPLY, max_size=3) | JSON})}
)
ROW = st.fixed_dictionaries({}, optional=FIELDS) | TREE | JSON
GOOD: list[Any] = [
    "ab",
    {"prompt": "a", "response": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "a b", "rejected": "a c"},
    {"prompt": {"text": "a", "replies": [{"text": "b", "rank": 0}, {"text": "c", "rank": 1}]}},
    {"prompt": "a", "answers": [{"text": "b", "rank": 0}, {"text": "c", "rank": 1}]},
    {"instruction": "a", "response1": "b", "response2": "c", "annotator1": 1, "annotator2": 0, "annotator3": 1},
    {"input": "a", "output_1": "b", "output_2": "c", "label": 2},
]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A row of a known format with one value replaced, removed or added, at any depth."""
    row = copy.deepcopy(draw(st.sampled_from(GOOD)))
    here = row
    while isinstance(here, (dict, list)) and here:
        key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], (dict, list)) and draw(st.booleans()):
            here = here[key]
            continue
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            here[key] = draw(JSON)
        elif change == "remove":
            del here[key]
        elif isinstance(here, dict):
            here[draw(st.sampled_from(list(FIELDS)))] = draw(JSON)
        else:
            here.append(draw(JSON))
        break
    return row


ANNOTATION = st.fixed_dictionaries(
    {
        **dict.fromkeys(("instruction", "output_1", "output_2"), TEXT),
        **dict.fromkeys(("generator_1", "generator_2"), st.just("g") | SCALAR),
        "preference": st.sampled_from([1, 2, 1.37, 0, None]) | SCALAR,
    },
    optional={"annotator": st.just("a") | SCALAR},
)
QUESTION = st.fixed_dictionaries(
    {"question_id": st.integers(0, 9) | SCALAR, "category": TEXT | SCALAR, "turns": st.lists(TEXT, max_size=3) | JSON}
)


ROWS = st.lists(ROW | damaged() | st.sampled_from(GOOD), max_size=6)
USES: dict[Callable[..., Any], Callable[..., Any]] = {
    as_example: load_ift,
    as_prompt: load_prompts,
    as_group: load_ranked,
}


def cases(count: int) -> Any:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


amount = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.full)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    log = logging.getLogger("selfreward.formats")
    log.disabled = True  # thousands of warnings
    yield tmp_path_factory.mktemp("fuzz")
    log.disabled = False


def packed(rows: list[Any], kind: str) -> bytes:
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        flat = [{k: v for k, v in row.items() if isinstance(v, str)} for row in rows if isinstance(row, dict)]
        header = sorted({key for row in flat for key in row})
        writer.writerow(header)
        writer.writerows([row.get(key, "") for key in header] for row in flat if header)
        return text.getvalue().encode("utf-8", "surrogatepass")
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(content, 1) if kind == "jsonl.gz" else content


def check_file(path: Path, use: Any, forced: str | None) -> None:
    """Reads or says in one sentence why not; the loader gives the same rows or names one of the refusals."""
    try:
        there = sum(1 for _ in read_rows(path))
        read = read_file(path, use, forced)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        with pytest.raises(InputError):
            USES[use](path, format=forced)
        return
    assert read.total == there == len(read.rows) + len(read.refused) == sum(read.matched.values())
    assert len({row["id"] for row in read.rows}) == len(read.rows)
    for row in read.rows:
        assert row["prompt"].strip() and json.dumps(row).isascii() and str(row).encode()
    broken = [refusal for refusal in read.refused if refusal.broken]
    if read.rows and not broken:
        assert USES[use](path, format=forced) == read.rows
        return
    with pytest.raises(InputError) as caught:
        USES[use](path, format=forced)
    assert str(caught.value).startswith(broken[0].where if broken else str(path))


@amount
def test_any_rows_in_any_container(count: int, folder: Path) -> None:
    @cases(count)
    @given(
        rows=ROWS,
        kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "csv"]),
        use=st.sampled_from(list(USES)),
        forced=st.none() | st.sampled_from(list(FORMATS)),
    )
    @example(rows=GOOD, kind="jsonl", use=as_prompt, forced=None)
    def check(rows: list[Any], kind: str, use: Any, forced: str | None) -> None:
        path = folder / f"rows.{kind}"
        path.write_bytes(packed(rows, kind))
        check_file(path, use, forced)

    check()


@amount
def test_damaged_bytes_in_any_container(count: int, folder: Path) -> None:
    @cases(count)
    @given(
        kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "csv", "parquet"]),
        cuts=st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 4)), max_size=3),
        use=st.sampled_from(list(USES)),
    )
    def check(kind: str, cuts: list[tuple[int, bytes, int]], use: Any) -> None:
        content = _parquet() if kind == "parquet" else packed(GOOD, kind)
        for place, new, gone in cuts:
            at = place % (len(content) + 1)
            content = content[:at] + new + content[at + gone :]
        path = folder / f"bytes.{kind}"
        path.write_bytes(content)
        check_file(path, use, None)

    check()


@pytest.mark.parametrize("count", [5, pytest.param(150, marks=pytest.mark.full)])
def test_validate_says_what_a_run_would_say(count: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @cases(count)
    @given(rows=ROWS, key=st.sampled_from(["ift", "eft", "eft_heldout", "heldout"]))
    @example(rows=[{"prompt": "copy a", "response": "b"}], key="ift")
    def check(rows: list[Any], key: str) -> None:
        path = folder / "validated.jsonl"
        path.write_bytes(packed(rows, "jsonl"))
        code = main(["validate", "--json", f"data.{key}={path}"])
        found = json.loads(capsys.readouterr().out)
        (part,) = (part for part in found["parts"] if part["part"] == f"data.{key}")
        if "rows" in part:  # else the file could not be read as a whole
            assert part["rows"] == part["used"] + sum(part["refused"].values()) == sum(1 for _ in read_rows(path))
        assert (code, found["usable"]) == ((2, False) if part["errors"] or found["errors"] else (0, True))

    check()


def _parquet() -> bytes:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(
        arrow.Table.from_pylist([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]), out
    )
    return out.getvalue()


@amount
def test_a_row_is_read_or_refused_in_its_format_and_in_every_other(count: int) -> None:
    @cases(count)
    @given(row=ROW | damaged(), forced=st.sampled_from(list(FORMATS)))
    def check(row: Any, forced: str) -> None:
        for name in {forced, format_of(row)} - {None}:
            try:
                record = read_record(row, str(name))
            except Refused as refused:
                assert refused.reason.isidentifier() and "\n" not in refused.said.replace(repr(row), "")
            else:
                assert record.prompt.strip() and all(isinstance(answer.text, str) for answer in record.answers)

    check()


@amount
def test_a_recipe_is_taken_or_refused_in_one_sentence(count: int) -> None:
    key = st.sampled_from(recipe_keys()) | st.sampled_from(
        ["", "a", "data", "data.ift.x", "dpo.lrr", "pairs", "..", "sft."]
    )
    plain = ["null", "true", "-1", "0", "1", "0.5", "1e-6", "nan", "x", "text"]
    value = st.sampled_from(
        [*plain, "[]", "[0.1, 0.2]", "[a, {b: c}]", "{}", "{a: 1}", "'", "*a", "&a [*a]", "&a {a: *a}", "!!x"]
    )

    @cases(count)
    @example(overrides=["a=&a {a: *a}", "a=&a {a: *a}"])
    @given(overrides=st.lists(st.tuples(key, value | TEXT).map("=".join), max_size=4))
    def check(overrides: list[str]) -> None:
        try:
            recipe = Recipe.load("tiny", overrides)
        except InputError as error:
            assert str(error).strip()
        else:
            assert Recipe.model_validate_json(json.dumps(recipe.model_dump(mode="json")), strict=False) is not None

    check()


PIECES = st.sampled_from(
    ["{% block rubric %}", "{% block prompt %}", "{% block answer %}", "{% block cue %}", "{% endblock %}", "{{ prompt }}",
     "{{ answer }}", "{{ answer | upper }}", "{{ x }}", "{% if prompt %}", "{% endif %}", "{{", "}}", "{% raw %}", "{#", "text",
     "\n", "{{ prompt.__class__ }}", "{% for i in range(99999999) %}", "{% include 'x' %}", "{{ 1 / 0 }}", "\ud7ff"]
)  # fmt: skip
WHOLE = (
    "{% block rubric %}r{% endblock %}{% block prompt %}{{ prompt }}{% endblock %}"
    "{% block answer %}{{ answer }}{% endblock %}{% block cue %}c{% endblock %}"
)


@amount
def test_a_template_is_taken_or_refused_in_one_sentence(count: int, folder: Path) -> None:
    @cases(count)
    @given(pieces=st.lists(PIECES, max_size=12), at=st.integers(0, len(WHOLE)), whole=st.booleans(), text=TEXT)
    def check(pieces: list[str], at: int, whole: bool, text: str) -> None:
        path = folder / "judge.jinja"
        path.write_text(WHOLE[:at] + "".join(pieces) + WHOLE[at:] if whole else "".join(pieces), encoding="utf-8")
        try:
            segments = JudgeTemplate(path).segments(text, text)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert len(segments) == 4 and text in segments[1] and text in segments[2]

    check()


LIST = st.lists(
    st.sampled_from(
        ["\n", "\n\n", " ", "9.", "10.", "11.", "10)", "**10.**", "Task 11:", "1.", "---", "Answer:", "[/INST]", "</s>",
         "User:", "Name a tree", "why", "\u0661.", "\u2028", "\r", "\ud800", "{{ x }}"]
    )
    | TEXT,
    max_size=14,
).map("".join)  # fmt: skip


@amount
def test_every_text_of_a_completion_is_kept_or_dropped_with_a_reason(count: int) -> None:
    @cases(count)
    @given(
        written=st.lists(st.tuples(LIST, st.sampled_from(["stop", "length"])), max_size=4),
        level=st.sampled_from(LEVELS),
        limit=st.sampled_from([0.0, 0.5, 1.0]),
        most=st.integers(1, 4),
        numbered=st.booleans(),
    )
    def check(written: list[tuple[str, str]], level: str, limit: float, most: int, numbered: bool) -> None:
        choice = Choice(Sieve({"why", "Name a tree"}, level, limit), most)
        total = 0
        for number, (text, finish) in enumerate(written):
            row = {"id": f"1-{number}", "text": text, "finish_reason": finish, "shots": ["s"] * 8}
            found = list(found_in(row, numbered))
            assert found and all(one.text == " ".join(one.text.split()) for one in found)
            choice.add(found)
            total += len(found)
        assert len(choice) == total and len(choice.kept) <= most
        assert all(row["prompt"] and "reason" not in row for row in choice.kept)
        assert sum(by_reason(choice.dropped).values()) == len(choice.dropped) and all(
            r["reason"] for r in choice.dropped
        )
        texts = [row["prompt"] for row in choice.kept]
        assert len(set(texts)) == len(texts) and not {"why", "Name a tree"} & set(texts)

    check()


@amount
def test_a_prompts_template_is_taken_or_refused_in_one_sentence(count: int, folder: Path) -> None:
    whole = "{% for i in instructions %}{{ i }}\n{% endfor %}9."

    @cases(count)
    @given(pieces=st.lists(PIECES, max_size=8), at=st.integers(0, len(whole)), text=TEXT)
    def check(pieces: list[str], at: int, text: str) -> None:
        path = folder / "prompts.jinja"
        path.write_text(whole[:at] + "".join(pieces) + whole[at:], encoding="utf-8")
        try:
            shown = PromptTemplate(path).text([text])
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert isinstance(shown, str)

    check()


SCORE = st.none() | st.integers(0, 5).map(float) | st.sampled_from([1 / 3, 4.5])


@amount
def test_pairs_and_what_was_dropped_add_up(count: int) -> None:
    draws = st.lists(SCORE, min_size=3, max_size=3)
    answer = st.tuples(
        draws, st.sampled_from(["", "a", "b", "c", "d"]), st.integers(1, 3), st.sampled_from(["stop", "length"])
    )

    @cases(count)
    @given(
        drawn=st.lists(answer, max_size=7),
        rules=st.builds(
            Rules,
            allow_truncated_chosen=st.booleans(),
            tie_break=st.sampled_from(["index", "variance"]),
            length_control=st.none() | st.sampled_from([0.0, 0.1, 0.4]),
            per_prompt=st.integers(1, 4),
        ),
    )  # fmt: skip
    def check(drawn: list[Any], rules: Rules) -> None:
        candidates = []
        for index, (draws, text, length, finish) in enumerate(drawn):
            read = [score for score in draws if score is not None]
            candidates.append(
                {"id": f"p-{index}", "prompt_id": "p", "prompt": "q", "index": index, "text": text, "draws": draws,
                 "token_ids": [0] * length, "finish_reason": finish, "score": sum(read) / len(read) if read else None}
            )  # fmt: skip
        found = build_pairs({"id": "p", "prompt": "q"}, candidates, rules)
        assert len(found) == rules.per_prompt
        assert all((pair is None) == (reason is not None) for pair, reason in found)
        pairs = [pair for pair, _ in found if pair]
        assert [pair is not None for pair, _ in found] == sorted((pair is not None for pair, _ in found), reverse=True)
        assert all(
            reason in REASONS if n == 0 else reason == NO_MORE for n, (pair, reason) in enumerate(found) if not pair
        )
        used = [candidates[pair[f"{kind}_index"]]["text"] for pair in pairs for kind in ("chosen", "rejected")]
        assert len(used) == len(set(used)) and len({pair["id"] for pair in pairs}) == len(pairs)
        assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)

    check()


@amount
def test_annotations_and_questions_are_read_or_refused_in_a_sentence(count: int, folder: Path) -> None:
    @cases(count)
    @given(annotations=st.lists(ANNOTATION | ROW, max_size=3), questions=st.lists(QUESTION | ROW, max_size=3))
    def check(annotations: list[Any], questions: list[Any]) -> None:
        path = folder / "benchmark.json"
        path.write_text(json.dumps(annotations))
        try:
            found = win_rate(read_annotations(path))
            assert found["n"] + found["n_null"] == len(annotations)
            assert found["n_wins"] + found["n_wins_base"] + found["n_draws"] == found["n"]
            json.dumps(found, ensure_ascii=False).encode()
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        path.write_text(json.dumps(questions))
        try:
            assert all(len(row["turns"]) == 2 for row in read_questions(path))
        except InputError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1

    check()
