"""Prompts by example: what a request shows, and which instructions a completion holds."""

import pytest

from engine import InputError, Tokenizer
from selfreward.few_shot import PromptTemplate, listed, one_line, shots, showable, stops
from selfreward.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" Name a fruit.\n10. Name a tree.\n", ["Name a fruit.", "Name a tree."]),
        (" Name a fruit.\n\n10) Name a tree.\n\n11 . Name\n  a nut.", ["Name a fruit.", "Name a tree.", "Name a nut."]),
        ("\n9. Name a fruit.\n10. Name a tree.", ["Name a fruit.", "Name a tree."]),  # the number once more
        (" Name a fruit.\n**10.** Name a tree.\nTask 11: Name a nut.", ["Name a fruit.", "Name a tree.", "Name a nut."]),
        (" Name a fruit.\n10.\n Name a tree.", ["Name a fruit.", "Name a tree."]),
        (" Name a fruit.\n10.Name a tree.\n11.5 is a number", ["Name a fruit.", "Name a tree. 11.5 is a number"]),
        (" **Fruit:** Name one.\n**10. Name a tree.**\n11. **Name** a nut", ["Fruit: Name one.", "Name a tree.", "Name a nut"]),
        (' "Name a fruit."\n10. \u201cName a tree.\u201d\n11. "Be" or "not"', ["Name a fruit.", "Name a tree.", '"Be" or "not"']),
        (" Do it:\n- one\n- two\n10. Next one", ["Do it: - one - two", "Next one"]),
        (" Name a fruit.\n\nAn apple is a fruit.\n10. Name a tree.", ["Name a fruit.", "Name a tree."]),  # answers
        (" Name a fruit.\nAnswer: apple\n10. Name a tree.\nResponse: oak", ["Name a fruit.", "Name a tree."]),
        (" Name a fruit.\n**Output:** apple\n\n1. first\n2. second", ["Name a fruit."]),
        (" Name a fruit.\n---\nSure, here it is", ["Name a fruit."]),
        (" Name a fruit.\n* * *\n10. Name a tree.\n=====\n", ["Name a fruit.", "Name a tree."]),
        (" Name a fruit. [/INST] An apple", ["Name a fruit."]),
        (" Name a fruit.</s>", ["Name a fruit."]),
        (" Name a fruit.\nUser: and now?", ["Name a fruit."]),
        (" Add 3.5 and 10. Then 11.", ["Add 3.5 and 10. Then 11."]),  # numbers within a line
        (" Name a fruit.\n12. Name a tree.", ["Name a fruit. 12. Name a tree."]),  # no next number
        (" Explain a.m. and p.m.", ["Explain a.m. and p.m."]),
    ],
)  # fmt: skip
def test_the_instructions_of_a_completion(text, found):
    assert listed(text, 9, cut=False) == [(one, None) for one in found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" Name a fruit.\n10. Name a", [("Name a fruit.", None), ("Name a", "truncated")]),
        (" Name a fruit.\n10.", [("Name a fruit.", None), ("", "truncated")]),
        (" Name a fruit.\n\nApples are a", [("Name a fruit.", None)]),  # the answer was cut, not the instruction
        (" Name a", [("Name a", "truncated")]),
    ],
)
def test_the_last_instruction_of_a_cut_completion_is_dropped(text, found):
    assert listed(text, 9, cut=True) == found


def test_an_instruction_without_what_it_speaks_of_is_dropped():
    text = " Sure! Here are more tasks:\n\n10. Translate this sentence:\n\n'I am'\n\n11. Name a tree."
    assert listed(text, 9, cut=False) == [
        ("Sure! Here are more tasks:", "unfinished"),
        ("Translate this sentence:", "unfinished"),
        ("Name a tree.", None),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Name a fruit.", [("Name a fruit.", None)]),
        ("Sure! Here are more:\n\n1. Name a fruit.\n2. Name a tree.",
         [("Sure! Here are more:", "preamble"), ("Name a fruit.", None), ("Name a tree.", None)]),
        ("", [("", "empty")]),
        ("\n\n", [("", "empty")]),
        ("3. \n4. Name a tree.", [("", "empty"), ("Name a tree.", None)]),
    ],
)  # fmt: skip
def test_a_request_that_ended_without_a_number(text, found):
    assert listed(text, None, cut=False) == found


ROWS = [{"id": f"s{i}", "prompt": f"seed {i}"} for i in range(20)]
NEW = [{"id": f"n{i}", "prompt": f"new {i}"} for i in range(20)]


@pytest.mark.parametrize(("new", "counts"), [(0, (8, 0)), (1, (7, 1)), (2, (6, 2)), (20, (6, 2))])
def test_seeds_take_the_places_of_generated_ones(new, counts):
    shown = shots(3, ROWS, NEW[:new], (6, 2))
    names = [row["id"] for row in shown]
    assert (sum(name[0] == "s" for name in names), sum(name[0] == "n" for name in names)) == counts
    assert len(set(names)) == 8 and shots(3, ROWS, NEW[:new], (6, 2)) == shown


def test_few_seeds_are_all_shown():
    assert sorted(row["id"] for row in shots(0, ROWS[:3], NEW[:1], (6, 2))) == ["n0", "s0", "s1", "s2"]


def test_shots_are_these_in_every_version():
    assert [row["id"] for row in shots(7, ROWS, NEW, (3, 2))] == FROZEN


FROZEN = ["n3", "n6", "s13", "s10", "s1"]


def test_everything_is_shown_about_as_often():
    seen = [row["id"] for seed in range(1000) for row in shots(seed, ROWS[:10], NEW[:5], (3, 1))]
    counts = {name: seen.count(name) for name in set(seen)}
    assert all(abs(counts[f"s{i}"] - 300) < 75 for i in range(10)) and all(
        abs(counts[f"n{i}"] - 200) < 65 for i in range(5)
    )


def test_what_is_shown_has_one_line_and_a_bearable_length():
    rows = [{"id": "a", "prompt": "one\n two"}, {"id": "b", "prompt": "x " * 151}]
    assert showable(rows) == [{"id": "a", "prompt": "one two"}] and one_line(" a\t\n b ") == "a b"


def test_a_request_ends_after_as_many_new_instructions_as_it_showed():
    assert stops(8)[-1] == "\n17."


# ---- templates --------------------------------------------------------------------------------------------------------


def test_the_shipped_templates_number_the_instructions_and_go_on_with_the_next():
    plain, chat = PromptTemplate("plain"), PromptTemplate("chat")
    assert plain.numbered and chat.numbered and plain.hash != chat.hash
    assert plain.text(["do a", "do b"]).endswith(":\n\n1. do a\n2. do b\n3.")
    assert chat.text(["do a", "do b"]).startswith("[INST] ") and chat.text(["do a"]).endswith("\n\n1. do a [/INST] 2.")


def test_ids_are_those_of_one_text_behind_bos(test_data):
    tokenizer = Tokenizer(test_data / "llama2/tokenizer.model")
    ids = PromptTemplate("chat").token_ids(tokenizer, ["Name a fruit."])
    assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == PromptTemplate("chat").text(["Name a fruit."])
    alone = tokenizer.encode("2.")  # what the answer would begin with by itself
    assert ids[-len(alone) :] == alone


def test_jinja_in_an_instruction_is_inert():
    assert "{{ 7 * 7 }} {% x %}" in PromptTemplate("plain").text(["{{ 7 * 7 }} {% x %}"])


@pytest.mark.parametrize("end", ["4.", "4. ", "4)\n\n", "Task 4:"])
def test_a_blank_behind_the_next_number_does_not_hide_it(end, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{{ instructions }} " + end.replace("4", "{{ instructions | length + 1 }}") + "\n"
    )
    assert PromptTemplate(tmp_path / "mine.jinja").numbered


def test_a_template_without_numbers_is_known_as_such(tmp_path):
    file = tmp_path / "bare.jinja"
    file.write_text("{% for i in instructions %}- {{ i }}\n{% endfor %}-\n")
    template = PromptTemplate(file)
    assert not template.numbered and template.text(["a", "b"]) == "- a\n- b\n-"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no variable", r"uses the variables \(none\); expected `instructions` alone"),
        ("{{ instructions }} {{ answer }}", "uses the variables answer, instructions"),
        ("{% for x in instructions %}", "line 1: .*correct the syntax"),
        ("\n{{ instructions[99] }}", "line 2: .*correct the template"),
        ("{{ instructions.__class__.__mro__ }}", "correct the template"),
        ("{{ instructions }}{% include 'x' %}", "correct the template"),
    ],
)
def test_a_bad_template_is_refused_naming_file_and_line(text, message, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"prompts template {file}.*{message}"):
        PromptTemplate(file)


def test_a_missing_template_names_what_is_shipped(tmp_path):
    with pytest.raises(InputError, match="'chatty' is not shipped; use one of chat, plain"):
        PromptTemplate("chatty")
    with pytest.raises(InputError, match=r"gone\.jinja cannot be read"):
        PromptTemplate(tmp_path / "gone.jinja")


def test_the_tiny_worlds_words_spell_the_tests_own_template(tiny_template):
    tokenizer = Tokenizer(Recipe.load("tiny").model)
    assert tokenizer.unk_id not in PromptTemplate(tiny_template).token_ids(tokenizer, ["copy a b c"])


@pytest.fixture
def tiny_template(tmp_path):
    file = tmp_path / "tiny.jinja"
    file.write_text("{% for i in instructions %}[INST] {{ i }} [/INST] {% endfor %}[INST]\n")
    return file
