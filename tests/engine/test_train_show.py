"""The debug print of a pack: every token, who sees it, and every edge."""

import json

import pytest

from engine import DPORow, Tokenizer
from engine.train.batches import build_trees, pack_trees, row_keys
from engine.train.show import main, show_pack
from selfreward import tiny


def pack(rows):
    (only,) = pack_trees(build_trees(list(zip(row_keys(rows), rows)), 99)[0], 99)
    return only


def test_a_pair_is_printed_with_its_shared_prompt_its_subtrees_and_its_edges():
    printed = show_pack(pack([DPORow([1, 9], [7, 8], [6])]))
    assert [" ".join(line.split()) for line in printed.splitlines()] == [
        "5 tokens, 3 edges, 2 sequences",
        "row depth id text seen by key edges",
        "0 0 1 0..4 0",
        "1 1 9 1..4 0 7 x 1 -> 0, 6 x 1 -> 1",
        "2 2 7 2..3 1 8 x 1 -> 0",
        "3 3 8 3..3 1",
        "4 2 6 4..4 2",
    ]


def test_the_command_prints_rows_of_a_file_with_their_text(tmp_path, capsys):
    path, directory = tmp_path / "pairs.jsonl", tiny.__path__[0] + "/m0"
    path.write_text(json.dumps({"prompt": "copy a b", "chosen": " a b", "rejected": " a"}) + "\n")
    assert main([directory, str(path)]) == 0
    printed = capsys.readouterr().out
    tokens = [line.split()[2] for line in printed.splitlines()[2:] if line]
    tokenizer = Tokenizer(directory)
    eos, encode = tokenizer.eos_id, tokenizer.encode
    a_b, a = encode(" a b", continuation=True), encode(" a", continuation=True)
    assert list(map(int, tokens)) == [tokenizer.bos_id, *encode("copy a b"), *a_b, eos, *a, eos]
    assert "<bos>" in printed and printed.count("<eos> x 1 ->") == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "line 1 is no JSON object"),
        ("{", "line 1 is no JSON"),
        ("{}", "record 0: it has no columns"),
        ('{"prompt_ids": 3, "chosen_ids": [1], "rejected_ids": [1]}', "record 0: prompt_ids is 3"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(content, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert main([tiny.__path__[0] + "/m0", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert main([tiny.__path__[0] + "/m0", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
