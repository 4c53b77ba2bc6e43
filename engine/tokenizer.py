"""SentencePiece, and the Llama 2 chat layout built at token-id level.

Prompts and answers are tokenised apart and joined as ids; an answer that was sampled is never turned into text and
tokenised again. BOS and EOS come from the layout alone: "<s>" in a user's text is ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from engine.errors import InputError
from engine.tokenizer_json import SPACE, tokenizer_json

# A later normalizer_spec (field 3) of a ModelProto is merged into the earlier one: add_dummy_prefix (field 3) = false.
NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])

CHAT_LAYOUT = "{bos}[INST] {user} [/INST]{answer}{eos}; system: <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}"

# The same for transformers' apply_chat_template, whose tokenizer sets a dummy space behind every special token.
CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else none -%}
{%- for message in (messages if system is none else messages[1:]) -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' -}}
{%- if loop.first and system is not none -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{{- message['content'] | trim + ' [/INST]' -}}
{%- else -%}
{%- set answer = message['content'] | trim -%}
{{- (' ' + answer if answer else '') + eos_token -}}
{%- endif -%}
{%- endfor -%}"""


class Tokenizer:
    """A SentencePiece model with Llama's conventions: a dummy space before the text, no BOS or EOS unless asked for."""

    def __init__(self, path: str | Path) -> None:
        """`path`: a `tokenizer.model`, or a directory that holds one."""
        self.path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such tokenizer; expected a SentencePiece tokenizer.model")
        try:
            self._proto = self.path.read_bytes()  # kept: what encodes is what is hashed and saved
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=self._proto + NO_DUMMY_PREFIX)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.path} is not a SentencePiece model ({error}); copy it again") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) < 0:
                raise InputError(f"{self.path} defines no {name}; Llama's layout needs both BOS and EOS")

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        """Token ids without BOS and EOS.

        `continuation=False` puts Llama's dummy space before the text. `continuation=True` encodes exactly what is
        written, as the continuation of tokens that stand before it, so that segments can be tokenised apart.
        """
        if not continuation:
            return list(self._model.encode(text))
        if not text:
            return []
        if text == " " and self._model.piece_to_id(SPACE) != self.unk_id:
            return [self._model.piece_to_id(SPACE)]  # SentencePiece puts no dummy space before an empty text
        if text[0] == " " and text != " ":  # the dummy space *is* the written one
            return list(self._model.encode(text[1:]))
        ids = list(self._bare.encode(text))
        if self._lost_its_start(text, ids):
            raise InputError(f"{self.path} cannot continue with {text[:20]!r}: begin the segment with a space")
        return ids

    def _lost_its_start(self, text: str, ids: list[int]) -> bool:
        """A word model knows words only with the space before them, and many models normalise a line break away."""
        if text[0].isspace() and ids == self._bare.encode(text.lstrip()):
            return True
        return ids.count(self.unk_id) > self._model.encode(text).count(self.unk_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids: control tokens skipped, the dummy space removed, incomplete UTF-8 as U+FFFD."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token id {token} is outside 0..{self.vocab_size - 1}; it is from another vocabulary")
        return str(self._model.decode(list(ids)))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Llama 2's chat layout: BOS [INST] user [/INST], then answer EOS for every finished round.

        messages: {"role": "system" | "user" | "assistant", "content": str}; at most one system message, first; then user
        and assistant in turn. Ends ready for the next answer if the last message is the user's.
        """
        system, rounds = _split_system(messages)
        ids: list[int] = []
        for number, message in enumerate(rounds):
            expected = ("user", "assistant")[number % 2]
            if message["role"] != expected:
                place = number + len(messages) - len(rounds)
                raise InputError(f"message {place} has the role {message['role']!r}; expected {expected!r}")
            content = message["content"].strip()
            if expected == "user":
                if number == 0 and system is not None:
                    content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
                ids += [self.bos_id, *self.encode(f"[INST] {content} [/INST]")]
            else:
                ids += [*self.encode(content), self.eos_id]
        return ids

    def chat_prompt(self, text: str) -> list[int]:
        """The ids after which the answer to a single instruction begins."""
        return self.chat([{"role": "user", "content": text}])

    @property
    def template_hash(self) -> str:
        """Identifies vocabulary and chat layout: what was tokenised under another hash must not be mixed in."""
        digest = hashlib.blake2b(CHAT_LAYOUT.encode(), digest_size=16)
        digest.update(self._proto)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.model, unchanged, and the files with which transformers loads it.

        A BPE model (Llama's) gets a tokenizer.json; for other kinds transformers has to convert tokenizer.model itself.
        """
        (Path(directory) / "tokenizer.model").write_bytes(self._proto)
        converted = tokenizer_json(self._model)
        if converted:
            (Path(directory) / "tokenizer.json").write_text(json.dumps(converted, ensure_ascii=False), encoding="utf-8")
        piece = self._model.id_to_piece
        config = {
            # transformers 5 rebuilds a LlamaTokenizer and loses the dummy space before a text that begins with one;
            # the generic class takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast" if converted else "LlamaTokenizer",
            "bos_token": piece(self.bos_id),
            "eos_token": piece(self.eos_id),
            "unk_token": piece(self.unk_id),
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _split_system(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, Sequence[Mapping[str, str]]]:
    for number, message in enumerate(messages):
        if not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} needs a role and a content, both text; found {dict(message)!r}")
    if not messages:
        raise InputError("a chat needs at least one message")
    if messages[0]["role"] == "system":
        if len(messages) == 1:
            raise InputError("a chat needs a user message after the system message")
        return messages[0]["content"].strip(), messages[1:]
    return None, messages
