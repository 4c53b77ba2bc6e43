"""Which prompts a round takes: new ones, well-formed ones, and no more than asked for; what a model is shown to write them."""

import json

import pytest

from engine import LLM, InputError, Tokenizer
from selfreward import stages
from selfreward.context import GateError, Run, Stopped
from selfreward.few_shot import PromptTemplate
from selfreward.filters import Sieve
from selfreward.prompts import WAVE, Choice, Found, by_reason, found_in, seed_rows, take_prompts, usable_prompts
from selfreward.recipe import Recipe
from selfreward.report import Reporter
from selfreward.sampling import GROUP
from selfreward.state import RunDir

NOTHING = None


def found(*texts, early=None):
    return [Found(f"1-{i}", text, early) for i, text in enumerate(texts)]


def test_every_attempt_is_kept_or_dropped_for_one_reason():
    choice = Choice(Sieve({"old"}, is_valid=lambda text: text != "bad"), 9)
    choice.add(found("a", "old", "a", "", "bad", "b", "c"))
    choice.add([Found("1-7", "d", "truncated")])
    assert choice.kept == [{"id": f"1-{i}", "prompt": text} for i, text in ((0, "a"), (5, "b"), (6, "c"))]
    assert by_reason(choice.dropped) == {"known": 1, "duplicate": 1, "invalid": 2, "truncated": 1}
    assert len(choice) == 8 and choice.lacking == 6


def test_what_comes_after_enough_is_counted_as_such():
    choice = Choice(Sieve(()), 3)
    choice.add([*found(*"pqrst"), Found("1-5", "u", "truncated")])
    assert [row["prompt"] for row in choice.kept] == ["p", "q", "r"] and by_reason(choice.dropped) == {"enough": 3}


def test_prompts_that_come_in_parts_are_chosen_as_if_they_came_at_once():
    texts = [f"name {i % 7} {i % 11} big {i % 3} {i % 5} things" for i in range(40)]
    whole, parts = (Choice(Sieve((), "self_instruct"), 9) for _ in range(2))
    whole.add(found(*texts))
    for i, text in enumerate(texts):
        parts.add([Found(f"1-{i}", text)])
    assert (whole.kept, whole.dropped) == (parts.kept, parts.dropped) and not whole.lacking


def test_a_row_says_how_similar_a_prompt_is_and_a_dropped_one_to_what():
    choice = Choice(Sieve({"name four big trees"}, "similar"))
    choice.add(found("name five big trees", "sing a song"))
    assert choice.dropped == [
        {
            "id": "1-0",
            "prompt": "name five big trees",
            "reason": "similar",
            "rouge": 0.75,
            "like": "name four big trees",
        }
    ]
    assert choice.kept == [{"id": "1-1", "prompt": "sing a song", "rouge": 0.0}]


# ---- from a file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """A recipe whose prompts come from a file."""

    def make(texts, *overrides):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(text) + "\n" for text in texts))
        data = Recipe.load("micro").data
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: package:tiny/m0\ndata: {{ift: {data.ift}}}\neft: {{required: false}}\n"
            "prompts: {mode: file, file: prompts.jsonl}\n"
        )
        return Recipe.load(recipe, overrides)

    return make


def test_every_prompt_of_a_file_is_usable_once_or_dropped_for_a_reason(plain):
    pool = [
        {"id": str(i), "prompt": text}
        for i, text in enumerate(["copy a b c ", "old", "copy a b c", "bad", "copy d e f"])
    ]
    choice = usable_prompts(plain(["x"], "prompts.valid=tiny"), {"old"}, pool)
    assert choice.kept == [{"id": "0", "prompt": "copy a b c"}, {"id": "4", "prompt": "copy d e f"}]
    assert by_reason(choice.dropped) == {"known": 1, "duplicate": 1, "invalid": 1}


@pytest.mark.parametrize(("override", "share"), [("rounds=2", 3), ("prompts.count=2", 2)])
def test_every_round_takes_its_own_share_of_a_file(plain, override, share):
    run = plain([f"p{i}" for i in range(7)], override)
    first, second = (take_prompts(run, k, {"p0"}).kept for k in (1, 2))
    assert [row["prompt"] for row in first + second] == [f"p{i}" for i in range(1, 1 + 2 * share)]
    assert first[0]["id"] == "1-prompts-2" and second[0]["id"].startswith("2-")


def test_a_file_is_filtered_once_for_all_rounds_and_again_where_it_changed(plain, monkeypatch):
    sifted = []
    monkeypatch.setattr(Sieve, "sift", lambda *given, real=Sieve.sift: sifted.append(1) or real(*given))
    texts = [f"once {i}" for i in range(6)]
    recipe = plain(texts, "prompts.filter=similar")
    first, second, again = (take_prompts(recipe, k, {"known"}) for k in (1, 2, 1))
    assert (
        len(sifted) == 1
        and first.kept == again.kept
        and not {r["id"] for r in first.kept} & {r["id"] for r in second.kept}
    )
    take_prompts(recipe, 1, {"once 0"})
    take_prompts(plain([*texts, "one more"], "prompts.filter=similar"), 1, {"known"})
    take_prompts(plain(texts, "prompts.filter=similar", "prompts.rouge=0.6"), 1, {"known"})
    assert len(sifted) == 4


@pytest.mark.parametrize("override", ["rounds=8", "prompts.count=4"])
def test_a_file_with_too_few_prompts_is_refused_before_anything_is_computed(plain, override):
    with pytest.raises(InputError, match=r"prompts\.jsonl has 6 usable prompts \(known 1: in seed or held-out data\)"):
        take_prompts(plain([f"p{i}" for i in range(7)], override), 1, {"p0"})


def test_the_filters_run_on_a_file_where_they_are_asked_for(plain):
    texts = [
        "Name four big trees",
        "name four  big trees",
        "Name four tall big trees",
        "Draw four big trees",
        "Why is it so dark",
    ]
    assert len(take_prompts(plain(texts, "rounds=1"), 1, set()).kept) == 5
    choice = take_prompts(plain(texts, "rounds=1", "prompts.filter=self_instruct"), 1, {"Why it is dark"})
    assert [row["prompt"] for row in choice.kept] == ["Name four big trees", "Why is it so dark"]
    assert choice.kept[1]["rouge"] == 6 / 9
    assert by_reason(choice.dropped) == {"near_duplicate": 1, "similar": 1, "keyword": 1}
    strict = take_prompts(
        plain(texts, "rounds=1", "prompts.filter=self_instruct", "prompts.rouge=0.6"), 1, {"Why it is dark"}
    )
    assert by_reason(strict.dropped) == {"near_duplicate": 1, "similar": 2, "keyword": 1}


# ---- by example ---------------------------------------------------------------------------------------------------------

COUNT, FIRST = 100, 2 * GROUP  # prompts, and the first wave of requests, which has no new prompts to show
FEW_SHOT = [
    "prompts.mode=few_shot",
    f"prompts.count={COUNT}",
    "prompts.valid=null",
    "prompts.filter=none",
    "prompts.max_tokens=8",
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The tiny world has no numbers of lists: instructions between the marks of the chat layout."""
    file = tmp_path_factory.mktemp("template") / "tiny.jinja"
    file.write_text("{% for i in instructions %}[INST] {{ i }} [/INST] {% endfor %}[INST]\n")
    return file


class Begin:
    """Runs whose M1 is the tiny world's M0, with all prompts by example; the same folder again resumes one."""

    def __init__(self, folder, template):
        self.folder, self.template, self.open = folder, template, []

    def __call__(self, *overrides, folder="run"):
        self.close()
        m0 = Recipe.load("micro").model
        words = [*FEW_SHOT, f"prompts.template={self.template}", "model=null", f"m1={m0}", *overrides]
        self.open.append(RunDir(self.folder / folder, {}))
        template = PromptTemplate(self.template)
        return Run(
            Recipe.load("micro", words),
            self.open[-1],
            Tokenizer(m0),
            NOTHING,
            Reporter(quiet=True),
            prompt_template=template,
        )

    def close(self):
        for directory in self.open:
            directory.close()


@pytest.fixture
def begin(tmp_path, template):
    runs = Begin(tmp_path, template)
    yield runs
    runs.close()


def written(run, k):
    names = ("attempts", "prompts", "prompts_dropped")
    return {name: run.dir.file(f"iter_{k}/{name}.jsonl").read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, template):
    """Two rounds that nothing disturbed: the run, and of each round its counts and its files."""
    runs = Begin(tmp_path_factory.mktemp("whole"), template)
    run = runs()
    yield run, [(stages.new_prompts(run, k), written(run, k)) for k in (1, 2)]
    runs.close()


def test_a_model_writes_prompts_by_example_and_every_text_has_a_place(whole):
    run, rounds = whole
    seeds, before = {row["id"] for row in seed_rows(run.recipe)}, []
    for k, (counts, _) in zip((1, 2), rounds):
        names = ("attempts", "prompts", "prompts_dropped")
        attempts, kept, dropped = (run.rows(f"iter_{k}/{name}.jsonl") for name in names)
        texts = [text for row in attempts for text in found_in(row, numbered=False)]
        assert {text.id for text in texts} == {row["id"] for row in kept + dropped}
        assert len(texts) == len(kept) + len(dropped) == counts["kept"] + sum(counts["dropped"].values())
        assert counts["kept"] == COUNT == len({row["prompt"] for row in kept}) and len(attempts) > GROUP
        assert not {row["prompt"] for row in kept} & {row["prompt"] for row in before}
        order = {text.id: at for at, text in enumerate(texts)}
        for number, row in enumerate(attempts):
            new = [name for name in row["shots"] if name not in seeds]
            assert len(set(row["shots"])) == 8 and len(new) == (0 if k == 1 and number < FIRST else 2)
            assert all(name.startswith(f"{k - 1}-") or order[name] < order[f"{k}-{number}-0"] for name in new)
        before += kept


@pytest.mark.parametrize("groups", [1, 3])
def test_a_stage_that_was_killed_writes_the_same_bytes(begin, whole, groups):
    run, (counts, files) = begin(), whole[1][0]
    path = run.dir.file("iter_1/attempts.jsonl")
    path.parent.mkdir(parents=True)
    lines = files["attempts"].splitlines(keepends=True)
    assert len(lines) > groups * GROUP
    path.write_bytes(b"".join(lines[: groups * GROUP + 5])[:-3])  # a kill tore a row of the next group
    assert (stages.new_prompts(run, 1), written(run, 1)) == (counts, files)


def test_a_stop_comes_after_a_whole_group(begin, whole):
    run = begin()
    run.stop.set()
    with pytest.raises(Stopped):
        stages.new_prompts(run, 1)
    assert len(run.rows("iter_1/attempts.jsonl")) == GROUP
    run.stop.clear()
    assert (stages.new_prompts(run, 1), written(run, 1)) == whole[1][0]


def test_shots_depend_on_seed_and_round_and_on_their_numbers(begin):
    texts = {}
    for name, words in {
        "first": [],
        "seed": ["seed=1"],
        "few": ["prompts.shots_seed=2", "prompts.shots_generated=1"],
    }.items():
        run = begin(*words, "prompts.count=16", folder=name)
        stages.new_prompts(run, 1)
        texts[name] = [row["shots"] for row in run.rows("iter_1/attempts.jsonl")]
    assert texts["first"][0] != texts["seed"][0] and {len(one) for one in texts["few"]} == {3}
    assert len(texts["first"]) == GROUP  # no larger than what is lacking needs
    assert Recipe.load("tiny").sampler.max_sequences == WAVE * GROUP


def test_a_fixed_prompt_model_writes_with_its_own_words(begin, tmp_path, monkeypatch):
    m0, used = Recipe.load("micro").model, []
    other = tmp_path / "other"
    other.mkdir()
    for file in m0.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    run = begin(f"prompt_model={other}", "prompts.count=4")
    real = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda self, path, tokenizer, **more: used.append((path, tokenizer.path)) or
                        real(self, path, tokenizer, **more))  # fmt: skip
    stages.new_prompts(run, 1)
    assert used == [(other, other / "tokenizer.model")]


def test_a_request_without_room_is_dropped_with_its_reason(begin):
    run = begin("prompts.shots_seed=23", "prompts.count=1")  # above the context of 128
    with pytest.raises(
        GateError, match=r"no prompts left after the filters \(prompt too long 64\): .* prompts.template"
    ):
        stages.new_prompts(run, 1)
    assert {row["reason"] for row in run.rows("iter_1/prompts_dropped.jsonl")} == {"prompt_too_long"}


def test_fewer_prompts_than_asked_for_are_said(begin, capsys):
    run = begin("prompts.count=16", "prompts.filter=self_instruct", "prompts.rouge=0.2")
    counts = stages.new_prompts(run, 1)
    assert len(run.rows("iter_1/attempts.jsonl")) == 2 * GROUP and 0 < counts["kept"] < 16
    assert f"iter_1/prompts: {counts['kept']} of prompts.count=16 in 128 requests (" in capsys.readouterr().err
    stages.new_prompts(begin("prompts.count=16", folder="enough"), 1)
    assert not capsys.readouterr().err


def test_a_seed_is_shown_once_and_not_at_all_if_it_is_long(tmp_path):
    file = tmp_path / "ift.jsonl"
    prompts = ["Name a tree", "name a  TREE", "x " * 151, "Name\na fruit"]
    file.write_text(
        "".join(json.dumps({"id": str(i), "prompt": p, "response": "a"}) + "\n" for i, p in enumerate(prompts))
    )
    rows = seed_rows(Recipe.load("micro", [f"data.ift={file}"]))
    assert [(row["id"], row["prompt"]) for row in rows] == [("0", "Name a tree"), ("3", "Name a fruit")]
