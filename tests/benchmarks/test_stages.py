"""The ideal counted by hand, answers made of replies, and a clock that looks at the engine alone."""

from types import SimpleNamespace

from benchmarks.stages import EngineClock, cut_answer, once_each
from engine import LLM, SamplingParams
from selfreward.judge import JudgeTemplate
from tests.engine.helpers import random_llama, small_config


class Words:
    """A tokenizer of whole words, that of a beginning text with an end of its own as SentencePiece's dummy prefix is."""

    def encode(self, text, *, continuation=False):
        return text.split() if continuation else ["", *text.split()]

    def decode(self, ids):
        return " ".join(ids).strip()


def test_a_segment_counts_once_behind_the_same_beginning_and_again_behind_another():
    template, words = JudgeTemplate("llama2"), Words()
    rubric, prompt, answer, cue = (len(words.encode(s, continuation=True)) for s in template.segments("p", "a b"))
    once = 2 + rubric + prompt + answer + cue
    assert once_each(template, words, [("p", "a b")]) == once_each(template, words, [("p", "a b")] * 2) == once
    assert once_each(template, words, [("p", "a b"), ("p", "c d")]) == once + answer + cue
    assert once_each(template, words, [("p", "a b"), ("q", "a b")]) == once + prompt + answer + cue


def test_an_answer_is_the_replies_on_end_from_one_of_them():
    assert cut_answer(Words(), ["a b", "c", "d"], 1, 6) == "c d a b c"  # its first token is the beginning's
    assert cut_answer(Words(), ["a b", "c", "d"], 4, 3) == "c d"


def test_the_clock_stands_still_while_the_caller_works(monkeypatch):
    times = iter(range(100))
    llm = LLM(random_llama(small_config()), kv_cache_gb=0.01)
    clock = EngineClock(llm)
    monkeypatch.setattr("benchmarks.stages.time", SimpleNamespace(perf_counter=lambda: next(times)))
    for _ in llm.stream([[1, 2], [3, 4], [5]], SamplingParams(max_tokens=2)):
        next(times)
    assert clock.seconds == 4  # three outputs and the end
