"""`tokenizer.json` for a SentencePiece BPE model, so that transformers loads a checkpoint without reading protobufs."""

from __future__ import annotations

from typing import Any

import sentencepiece

BPE = 2  # TrainerSpec.ModelType
SPACE = "▁"  # how SentencePiece writes a space


def tokenizer_json(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any] | None:
    """The contents of tokenizer.json; None if the model is not BPE (unigram, word and char models have no merges)."""
    if _model_type(model.serialized_model_proto()) != BPE:
        return None
    size = model.vocab_size()
    vocab = {model.id_to_piece(token): token for token in range(size)}
    special = [token for token in range(size) if model.is_control(token) or model.is_unknown(token)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, model.id_to_piece(token)) for token in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begin_with(model.id_to_piece(model.bos_id()), model.bos_id()),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(model.is_byte(token) for token in range(size)),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model, vocab),
        },
    }


def _merges(model: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[list[str]]:
    """All pairs of pieces that join to a piece, in the order in which SentencePiece prefers the result."""
    pairs: list[tuple[float, int, int, int, list[str]]] = []
    for piece, token in vocab.items():
        if model.is_control(token) or model.is_unknown(token) or model.is_byte(token):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                pairs.append((-model.get_score(token), token, vocab[left], vocab[right], [left, right]))
    return [pair for *_, pair in sorted(pairs)]


def _added(token: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": content, **flags}


def _begin_with(piece: str, token: int) -> dict[str, Any]:
    """A post-processor that puts BOS before every sequence where the caller wants special tokens."""
    begin = {"SpecialToken": {"id": piece, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {piece: {"id": piece, "ids": [token], "tokens": [piece]}},
    }


def _model_type(proto: bytes) -> int:
    """ModelProto.trainer_spec.model_type (fields 2 and 3); unigram, the default of the format, where it is not written."""
    trainer_spec = _field(proto, 2)
    found = _field(trainer_spec, 3) if isinstance(trainer_spec, bytes) else None
    return found if isinstance(found, int) else 1


def _field(message: bytes, wanted: int) -> int | bytes | None:
    """The first value of one field of a protobuf message: an int (varint) or bytes (everything else)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value: int | bytes
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        if tag >> 3 == wanted:
            return value
    return None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
