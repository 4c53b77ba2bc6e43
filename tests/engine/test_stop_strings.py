"""Stop strings over tokens that split words, spaces and characters: the text is that of a decode of everything.

`Request.take` is driven with given ids; what it should do is said here by decoding all tokens after every token.
"""

import random

import pytest
import sentencepiece

from engine.requests import Request, stop_ids
from engine.sampling import SamplingParams
from engine.scheduler import Group, Sequence
from engine.tokenizer import Tokenizer

PROMPT = [1, 5, 9]
WORDS = [
    "stop",
    "stopping",
    "to",
    "top",
    "Score:",
    "Score: 5",
    "the end",
    "a",
    "ab",
    "abab",
    "\n\n",
    "  ",
    "é",
    "日本",
    "😀",
]


@pytest.fixture(scope="module", params=["trained", "llama2"])
def tokenizer(request, tmp_path_factory):
    """A small BPE model with byte fallback, whose normaliser changes nothing, as Llama's; and Llama's."""
    if request.param == "llama2":
        return Tokenizer(request.getfixturevalue("test_data") / "llama2")
    rng, directory = random.Random(0), tmp_path_factory.mktemp("bytes")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(WORDS[:10], k=6)) for _ in range(200)),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(directory / "tokenizer.model")


def drive(ids, params, tokenizer):
    """The answer if these tokens are drawn one after the other."""
    group = Group(0, PROMPT, [len(ids)])
    request = Request(group, params, 0, stop_ids(params, tokenizer))
    sequence = Sequence(group, 0, list(PROMPT))
    group.sequences = [sequence]
    for token in ids:
        sequence.finished = request.take(0, sequence.tokens, len(sequence.tokens), token, -1.0, -1.0, [], tokenizer)
        sequence.tokens.append(token)
        if sequence.finished:
            break
    return request.output(tokenizer, 0).outputs[0]


def common_length(a, b):
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def expected(ids, params, tokenizer):
    """(number of tokens, reason, text). What the first min_tokens tokens wrote is no part of a stop string.

    A character that they left incomplete is not written yet.
    """
    early = tokenizer.decode(ids[: params.min_tokens])
    for count, token in enumerate(ids, start=1):
        if token in stop_ids(params, tokenizer):
            return count, "stop", tokenizer.decode(ids[: count - 1])
        text = tokenizer.decode(ids[:count])
        if count > params.min_tokens:
            places = [text.find(stop, common_length(early, text)) for stop in params.stop]
            if max(places) >= 0:
                return count, "stop", text[: min(place for place in places if place >= 0)]
    return len(ids), "length", text


def random_ids(rng, tokenizer):
    """Words as the tokenizer splits them and letter by letter, runs of bytes (some of them no UTF-8), any pieces."""
    ids = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.choice(["words", "letters", "bytes", "pieces", "control"])
        if kind == "words":
            ids += tokenizer.encode(" ".join(rng.choices(WORDS, k=2)), continuation=rng.random() < 0.5)
        elif kind == "letters":
            for letter in rng.choice(WORDS):
                ids += tokenizer.encode(letter, continuation=True)
        elif kind == "bytes":
            data = rng.choice(WORDS).encode() if rng.random() < 0.7 else rng.randbytes(3)
            ids += [3 + byte for byte in data]
        elif kind == "pieces":
            ids += [rng.randrange(3, tokenizer.vocab_size) for _ in range(3)]
        else:
            ids.append(rng.choice([0, 1, 1, 2]))
    return ids


def random_stops(rng, text):
    """Some that occur in the text, some that do not."""
    stops = []
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text)) if text else 0
        stops.append(text[at : at + rng.randrange(1, 9)] if text and rng.random() < 0.7 else rng.choice(WORDS))
    return tuple(stops)


def splits_a_character(ids, least, tokenizer):
    return not tokenizer.decode(ids).startswith(tokenizer.decode(ids[:least]))


def test_the_text_is_cut_where_a_decode_of_everything_finds_the_first_stop_string(tokenizer):
    rng = random.Random(1)
    ends = {"stop": 0, "length": 0}
    for _ in range(1500):
        ids = random_ids(rng, tokenizer)
        ignore_eos = rng.random() < 0.5
        least = rng.choice([0, 0, rng.randrange(len(ids) + 1)])
        if not ignore_eos:
            ids = [token for place, token in enumerate(ids) if place >= least or token != 2] or [
                5
            ]  # as `query` forbids
            least = min(least, len(ids))
        if splits_a_character(ids, least, tokenizer):
            continue
        stops = random_stops(rng, tokenizer.decode(ids))
        params = SamplingParams(stop=stops, max_tokens=len(ids), min_tokens=least, ignore_eos=ignore_eos)
        answer = drive(ids, params, tokenizer)
        found = len(answer.token_ids), answer.finish_reason, answer.text
        assert found == expected(ids, params, tokenizer), (ids, params)
        assert answer.token_ids == ids[: len(answer.token_ids)]
        ends[answer.finish_reason] += 1
    assert min(ends.values()) > 200


def test_a_long_answer_before_a_stop_string_of_bytes_is_searched_to_its_end(tokenizer):
    """The window that is decoded at every token is shorter than the answer and begins anywhere, also inside a character."""
    rng = random.Random(2)
    for stop in ("日本日本日本", " stop", "😀 Score: 5 😀", "\n\n", "é"):
        for length in range(60, 76):
            filler = [3 + byte for byte in ("日😀" * 20).encode()][:length]
            tail = (
                [3 + byte for byte in stop.encode()]
                if rng.random() < 0.5
                else tokenizer.encode(stop, continuation=True)
            )
            ids = [*filler, *tail, 5]
            params = SamplingParams(stop=stop, max_tokens=len(ids))
            answer = drive(ids, params, tokenizer)
            assert (len(answer.token_ids), answer.finish_reason, answer.text) == expected(ids, params, tokenizer)
            assert answer.finish_reason == "stop" and stop not in answer.text


def test_the_earliest_of_several_stop_strings_that_one_token_completes_wins(tokenizer):
    ids = [3 + byte for byte in b"abcde!"]
    for stops in (("cde", "de", "bcde"), ("bcde", "cde"), ("e", "abcde")):
        answer = drive(ids, SamplingParams(stop=stops, max_tokens=6), tokenizer)
        assert answer.text == "abcde"[: min("abcde".find(stop) for stop in stops)]
        assert (answer.finish_reason, answer.token_ids) == ("stop", ids[:5])


def test_a_stop_string_within_min_tokens_is_text_and_a_later_one_ends(tokenizer):
    ids = [3 + byte for byte in b"xENDyENDz"]
    for least, text in ((0, "x"), (1, "x"), (2, "xENDy"), (5, "xENDy"), (6, "xENDyENDz")):
        answer = drive(ids, SamplingParams(stop="END", max_tokens=9, min_tokens=least), tokenizer)
        assert answer.text == text


def test_eos_ends_an_answer_without_being_text_unless_it_is_ignored(tokenizer):
    ids = [*(3 + byte for byte in b"ab"), 2, *(3 + byte for byte in b"cdEND")]
    ended = drive(ids, SamplingParams(stop="END", max_tokens=8), tokenizer)
    assert (ended.text, ended.finish_reason, ended.token_ids) == ("ab", "stop", ids[:3])
    ignored = drive(ids, SamplingParams(stop="END", max_tokens=8, ignore_eos=True), tokenizer)
    assert (ignored.text, ignored.finish_reason, ignored.token_ids) == ("abcd", "stop", ids)


def test_a_token_that_ends_an_answer_is_no_text_even_if_it_has_some(tokenizer):
    ids = [3 + byte for byte in b"ab!c"]
    answer = drive(ids, SamplingParams(stop="c", stop_token_ids=(ids[2],), max_tokens=4), tokenizer)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("ab", "stop", ids[:3])


@pytest.mark.parametrize("least", [1, 2, 3, 4])
def test_a_stop_string_behind_a_character_that_min_tokens_splits_ends_the_answer(tokenizer, least):
    ids = [3 + byte for byte in "😀END!".encode()]
    answer = drive(ids, SamplingParams(stop="END", max_tokens=len(ids), min_tokens=least), tokenizer)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("😀", "stop", ids[:7])


@pytest.mark.parametrize("count", [5, 30])
def test_tokens_without_text_do_not_hide_a_stop_string(tokenizer, count):
    ids = [3 + ord("E"), *[2] * count, 3 + ord("N"), 3 + ord("D"), 5]
    answer = drive(ids, SamplingParams(stop="END", max_tokens=len(ids), ignore_eos=True), tokenizer)
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("", "stop", count + 3)
