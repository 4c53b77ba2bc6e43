"""The reference's log-probs in a file: of these weights, this template and these pairs, or an error that says what differs."""

import json
import math
from dataclasses import replace

import pytest
import torch

from engine import (
    DPORow,
    InputError,
    Llama,
    LoRA,
    SFTRow,
    cached_reference,
    load_reference,
    reference_gap,
    reference_logprobs,
    rows_from_trl,
    save_reference,
)
from engine.train import reference as reference_module
from tests.engine.test_train import model, pairs, with_reference


@pytest.fixture
def cache(tmp_path):
    """A file of pairs(5) under model()."""
    cached_reference(tmp_path / "reference.jsonl", model(), pairs(), "template")
    return tmp_path / "reference.jsonl"


def test_the_cache_is_computed_once_and_holds_trls_columns(tmp_path, monkeypatch):
    path, expected = tmp_path / "new/reference.jsonl", with_reference(pairs(), reference_logprobs(model(), pairs()))
    assert cached_reference(path, model(), pairs(), "template") == expected
    monkeypatch.setattr(reference_module, "reference_logprobs", None)  # asked once only
    assert cached_reference(path, model(), pairs(), "template") == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["ref_chosen_logps"], line["ref_rejected_logps"]) for line in lines] == [r.reference for r in expected]
    assert set(lines[0]) == {"ref_chosen_logps", "ref_rejected_logps", "model_hash", "template_hash", "data_hash"}
    assert [path.name for path in path.parent.iterdir()] == ["reference.jsonl"]


@pytest.mark.parametrize(
    ("weights", "template", "rows", "said"),
    [
        (2, "template", pairs(), "the model's weights had the hash [0-9a-f]{32}, now [0-9a-f]{32}. Restore"),
        (1, "other", pairs(), "the template had the hash template, now other. Restore"),
        (1, "template", [*pairs()[:3], *pairs()[3:][::-1]], "the tokens of pair 3, 4 are others"),
        (1, "template", [replace(row, chosen=[9]) for row in pairs()], "of pair 0, 1, 2, 3, 4 are others"),
        (1, "template", pairs()[:4], "it has 5 pairs, there are 4"),
        (1, "template", pairs(6), "it has 5 pairs, there are 6"),
        (2, "other", pairs()[:4], "it has 5 pairs, there are 4; the model's weights .*; the template had"),
    ],
)
def test_a_cache_of_something_else_is_an_error_that_says_what_and_stays_as_it_is(weights, template, rows, said, cache):
    before = cache.read_bytes()
    with pytest.raises(InputError, match=f"reference.jsonl holds the reference of something else: .*{said}"):
        cached_reference(cache, model().init_weights(weights, std=0.2), rows, template)
    assert cache.read_bytes() == before


def other_rope():
    llama = model()
    return Llama(replace(llama.config, rope_theta=500.0)), llama


def turned_rows():
    """As a checkpoint is read whose RoPE is laid out the other way: the same rows, elsewhere."""
    llama = model()
    with torch.no_grad():
        qkv = llama.blocks[0].attention.qkv
        qkv.copy_(qkv.flip(0))
    return llama, llama


def turned_columns():
    llama = model()
    with torch.no_grad():
        llama.head.copy_(llama.head.flip(1))
    return llama, llama


@pytest.mark.parametrize("other", [other_rope, turned_rows, turned_columns])
def test_the_same_numbers_in_another_place_or_under_another_config_are_another_model(other, cache):
    changed, weights = other()
    changed.load_state_dict(weights.state_dict())
    with pytest.raises(InputError, match="the model's weights had the hash"):
        cached_reference(cache, changed, pairs(), "template")


def test_a_loras_alpha_is_part_of_the_model(tmp_path):
    def adapted(alpha):
        lora = LoRA(model(), rank=2, alpha=alpha)
        with torch.no_grad():
            for number, parameter in enumerate(lora.parameters()):
                parameter.fill_(0.01 * (number + 1))
        return lora

    cached_reference(tmp_path / "reference.jsonl", adapted(4.0), pairs(), "template")
    with pytest.raises(InputError, match="the model's weights had the hash"):
        cached_reference(tmp_path / "reference.jsonl", adapted(40.0), pairs(), "template")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"ref_chosen_logps": -1.0, "ref_rejec', "line 1: expected ref_chosen_logps and ref_rejected_logps"),
        ("[]", "line 1: expected"),
        (
            '{"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}',
            "does not say what it is of: no model_hash, template",
        ),
        ('{"ref_chosen_logps": NaN, "ref_rejected_logps": -2.0, KEYS}', "row 0: reference is .*expected two finite"),
        (
            '{"ref_chosen_logps": -1, "ref_rejected_logps": -2, "model_hash": [1], "template_hash": {}, "data_hash": []}',
            r"weights had the hash \[1\], now .*; the template had the hash {}, now template; the tokens of pair 0",
        ),
        ("\xff", "cannot be read"),
    ],
)
def test_a_damaged_cache_is_named(content, said, cache):
    keys = json.dumps({name: json.loads(cache.read_text().splitlines()[0])[name] for name in reference_module.KEYS})[
        1:-1
    ]
    cache.write_bytes(content.replace("KEYS", keys).encode("latin-1"))
    with pytest.raises(InputError, match=said):
        load_reference(cache, model(), pairs()[:1], "template")


def test_a_killed_write_leaves_no_file(tmp_path, monkeypatch):
    rows = with_reference(pairs(), [(-9.0, -8.0)] * 5)
    monkeypatch.setattr(reference_module.os, "fsync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_reference(tmp_path / "reference.jsonl", model(), rows)
    assert not (tmp_path / "reference.jsonl").exists()
    monkeypatch.undo()
    save_reference(tmp_path / "reference.jsonl", model(), rows)
    assert load_reference(tmp_path / "reference.jsonl", model(), pairs()) == rows


def test_rows_without_a_reference_cannot_be_saved_and_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="row 0 has no reference log-probs"):
        save_reference(tmp_path / "reference.jsonl", model(), pairs())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_reference(tmp_path / "file/reference.jsonl", model(), with_reference(pairs(), [(-9.0, -8.0)] * 5))


def test_the_gap_of_a_model_to_its_own_reference_is_rounding_and_to_another_is_not():
    rows = with_reference(pairs(8), reference_logprobs(model(), pairs(8)))
    assert reference_gap(model(), rows) <= 1e-4
    assert reference_gap(model().init_weights(3, std=0.2), rows) > 0.1
    rows[5] = replace(rows[5], reference=(rows[5].reference[0] + 0.5, rows[5].reference[1]))
    assert reference_gap(model(), rows) == pytest.approx(0.5, abs=1e-4)
    assert reference_gap(model(), rows, pairs=5) <= 1e-4  # row 5 is not among the first five
    broken = model()
    with torch.no_grad():
        broken.head[3] = math.nan
    assert math.isnan(reference_gap(broken, rows))


def test_a_reference_of_no_rows_is_named(tmp_path):
    for asked in (
        lambda: reference_gap(model(), []),
        lambda: reference_logprobs(model(), []),
        lambda: cached_reference(tmp_path / "reference.jsonl", model(), []),
    ):
        with pytest.raises(InputError, match="there are no rows; give at least one"):
            asked()


# ---- TRL's formats -----------------------------------------------------------------------------------------------------


def test_token_ids_under_trls_names_are_rows():
    preference = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [2], "prompt": "more columns"}
    assert rows_from_trl([preference]) == [DPORow([1, 5], [6, 2], [2])]
    referenced = preference | {"ref_chosen_logps": -3, "ref_rejected_logps": -2.5}
    assert rows_from_trl([referenced]) == [DPORow([1, 5], [6, 2], [2], (-3.0, -2.5))]
    assert rows_from_trl([preference | {"ref_chosen_logps": None, "ref_rejected_logps": None}])[0].reference is None
    masked = {"input_ids": [1, 5, 6, 7, 8], "completion_mask": [0, 0, 1, 0, 1]}
    assert rows_from_trl([masked]) == [SFTRow([1, 5], [6, 7, 8], [True, False, True])]
    assert rows_from_trl([masked | {"completion_mask": [0, 0, 1, 1, 1]}]) == [SFTRow([1, 5], [6, 7, 8])]


@pytest.fixture(scope="module")
def tokenizer():
    from engine import Tokenizer
    from selfreward import tiny

    return Tokenizer(tiny.__path__[0] + "/m0")


def test_text_is_tokenised_with_bos_and_eos_and_messages_get_the_chat_layout(tokenizer):
    prompt, answer = tokenizer.encode("copy a b"), tokenizer.encode(" a b", continuation=True)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    text = {"prompt": "copy a b", "chosen": " a b", "rejected": " a"}
    (row,) = rows_from_trl([text], tokenizer)
    assert row.prompt == [bos, *prompt] and row.chosen == [*answer, eos]
    (row,) = rows_from_trl([{"prompt": "copy a b", "completion": " a b"}], tokenizer)
    assert row == SFTRow([bos, *prompt], [*answer, eos])
    chat = {
        "prompt": [{"role": "user", "content": "copy a b"}],
        "chosen": [{"role": "assistant", "content": "a b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
    }
    (row,) = rows_from_trl([chat], tokenizer)
    assert row.prompt == tokenizer.chat_prompt("copy a b")
    assert row.rejected == [*tokenizer.encode("a"), eos]
    assert [*row.prompt, *row.chosen] == tokenizer.chat([*chat["prompt"], *chat["chosen"]])


IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"text": "a"}], "record 0: its columns are text; expected prompt with chosen and rejected"),
        ([{}], "record 0: it has no columns; expected prompt"),
        ([{"prompt": "a", "completion": "b"}], "record 0: prompt needs the model's Tokenizer"),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, {"input_ids": [1, 2], "completion_mask": [0, 1]}],
         "some records are preferences and some are not"),
        ([{"input_ids": [1, 2], "completion_mask": [0, 0]}], "record 0: completion_mask has no 1 behind the first of the 2"),
        ([{"input_ids": [1, 2, 3], "completion_mask": [0, 1]}], "record 0: completion_mask"),
        ([IDS, IDS | {"prompt_ids": 3}], "record 1: prompt_ids is 3; expected a list of token ids"),
        ([IDS | {"chosen_ids": "copy a"}], "record 0: chosen_ids is 'copy a'; expected a list of token ids"),
        ([IDS | {"rejected_ids": [1, "a"]}], r"record 0: rejected_ids is \[1, 'a'\]; expected a list of token ids"),
        ([{"input_ids": [1, 2], "completion_mask": 1}], "record 0: completion_mask is 1; expected a list of 0 and 1"),
        ([IDS | {"ref_chosen_logps": "x", "ref_rejected_logps": -1.0}], "record 0: ref_chosen_logps is 'x'; expected a number"),
        ([IDS | {"ref_chosen_logps": -1.0, "ref_rejected_logps": [2]}], r"record 0: ref_rejected_logps is \[2\]; expected a"),
        ([IDS, [1, 2]], "record 1 is a list; expected a mapping of columns"),
        (["prompt"], "record 0 is a str; expected a mapping of columns"),
        ([{1: 2}], "record 0: its columns are 1; expected"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_records_of_no_format_are_named(records, said):
    with pytest.raises(InputError, match=said):
        rows_from_trl(records)


def test_messages_of_another_shape_are_named(tokenizer):
    question = [{"role": "user", "content": "copy a"}]
    with pytest.raises(InputError, match=r"record 0: completion is .*; expected one message of the assistant"):
        rows_from_trl([{"prompt": question, "completion": question}], tokenizer)
    with pytest.raises(InputError, match="record 0: prompt is 3; expected text or a list of messages"):
        rows_from_trl([{"prompt": 3, "completion": "a"}], tokenizer)


def asked(content):
    return {"prompt": [{"role": "user", "content": "copy a"}, content], "completion": " a"}


def answered(content):
    return {"prompt": "copy a", "completion": [{"role": "assistant"} | content]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (answered({"content": None}), "completion: the content of message 0 is None; expected text"),
        (answered({}), "completion: message 0 has no content"),
        (answered({"content": 3}), "completion: the content of message 0 is 3; expected text"),
        (
            answered({"content": [{"type": "image"}]}),
            r"completion: the content of message 0 is \[{'type': 'image'}\]; expected text",
        ),
        (
            answered({"content": [{"type": "text", "text": None}]}),
            "completion: the content of message 0 is .* expected text",
        ),
        (answered({"content": []}), r"completion: the content of message 0 is \[\]; expected text"),
        (answered({"content": "a", "role": "user"}), "completion is .*; expected one message of the assistant"),
        (asked({"role": "assistant", "content": None}), "prompt: the content of message 1 is None; expected text"),
        (asked({"content": "a"}), "prompt: message 1 has no role"),
        (asked({"role": 3, "content": "a"}), "prompt: the role of message 1 is 3; expected text"),
        (asked("a"), r"prompt is \[.*; expected text or a list of messages"),
        (asked({"role": "user", "content": "a"}), "message 1 has the role 'user'; expected 'assistant'"),
    ],
)
def test_what_is_no_text_in_a_message_is_named_and_never_made_into_text(record, said, tokenizer):
    with pytest.raises(InputError, match=f"^record 1: {said}"):
        rows_from_trl([{"prompt": "copy a", "completion": " a"}, record], tokenizer)


def test_text_in_parts_is_the_text(tokenizer):
    parts = [{"type": "text", "text": "copy"}, {"type": "text", "text": " a"}]
    whole, in_parts = ({"prompt": [{"role": "user", "content": content}], "completion": [
        {"role": "assistant", "content": content}]} for content in ("copy a", parts))  # fmt: skip
    assert rows_from_trl([in_parts], tokenizer) == rows_from_trl([whole], tokenizer)


def test_a_text_that_the_tokenizer_refuses_is_named(tokenizer):
    with pytest.raises(InputError, match=r"^record 1: .* cannot continue with 'b': begin the segment with a space"):
        rows_from_trl([{"prompt": "copy a", "completion": text} for text in (" a", "b")], tokenizer)
