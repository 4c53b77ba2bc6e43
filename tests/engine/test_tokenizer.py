"""The genuine Llama 2 tokenizer against published vectors; the chat layout as literal ids; a word model; errors."""

import pytest
import sentencepiece

from engine.errors import InputError
from engine.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def llama(test_data):
    return Tokenizer(test_data / "llama2")


@pytest.fixture(scope="module")
def vectors(test_data):
    """46 pairs of a text and its ids."""
    with open(test_data / "llama2" / "spm_vectors.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    assert texts.pop() == ""  # the file ends with a separator
    lines = (test_data / "llama2" / "spm_vectors.out").read_text().splitlines()
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


def trained(directory, model_type, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] add two and three [/INST] five", "the answer is five"] * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type=model_type,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 40, **options},
    )
    return Tokenizer(directory / "tokenizer.model")


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
    """Every word is one token: the kind of model with which tiny recipes are run."""
    return trained(tmp_path_factory.mktemp("word"), "word", vocab_size=100)


@pytest.fixture(scope="module", params=["char", "bpe", "unigram"])
def letter_model(request, tmp_path_factory):
    """Small, without byte fallback, and with the normalisation that SentencePiece trains by default."""
    return trained(tmp_path_factory.mktemp(request.param), request.param)


def test_all_46_published_vectors_are_met(llama, vectors):
    assert len(vectors) == 46
    assert [llama.encode(text) for text, _ in vectors] == [ids for _, ids in vectors]


def test_decode_gives_back_every_encoded_text(llama, vectors):
    for text, ids in vectors:
        assert llama.decode(ids) == text


def test_the_model_has_llamas_ids(llama):
    assert (llama.vocab_size, llama.unk_id, llama.bos_id, llama.eos_id) == (32000, 0, 1, 2)


def test_a_model_file_and_its_directory_give_the_same_tokenizer(llama, test_data):
    assert Tokenizer(test_data / "llama2" / "tokenizer.model").template_hash == llama.template_hash


def test_decode_skips_control_tokens_and_shows_incomplete_utf8(llama):
    assert llama.decode([1, 7251, 2]) == "hi"
    assert llama.decode([243, 162, 155]) == "���"  # three of the four bytes of an emoji
    assert llama.decode([]) == ""


# ▁[ INST ] and ▁[ / INST ]
BEGIN, END = [518, 25580, 29962], [518, 29914, 25580, 29962]


def test_chat_of_one_turn_is_the_literal_layout(llama):
    expected = [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]  # 7251: ▁hi
    assert expected == [1, *BEGIN, 7251, *END]
    assert llama.chat([{"role": "user", "content": "hi"}]) == expected
    assert llama.chat_prompt("hi") == expected
    assert llama.chat_prompt("  hi\n") == expected


def test_chat_with_a_system_message_is_the_literal_layout(llama):
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "hi"}]
    assert llama.chat(messages) == [
        1,
        *BEGIN,
        *[3532, 14816, 29903, 6778, 13],  # ▁<< SY S >> newline
        *[3629, 11473, 29889, 13],  # Be ▁brief . newline
        *[29966, 829, 14816, 29903, 6778, 13, 13],  # < </ SY S >> newline newline
        2918,  # hi, without a space before it
        *END,
    ]


def test_chat_of_two_rounds_closes_the_first_and_leaves_the_second_open(llama):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "more"},
    ]
    first = [1, *BEGIN, 7251, *END, 15043, 29889, 2]  # ▁hi; ▁Hello . EOS
    second = [1, *BEGIN, 901, *END]  # ▁more
    assert llama.chat(messages) == first + second
    closed = [*messages, {"role": "assistant", "content": "Bye."}]
    assert llama.chat(closed) == [*first, *second, 2648, 29872, 29889, 2]  # ▁By e . EOS


def test_control_tokens_written_in_a_text_stay_text(llama):
    # ▁< s > / ▁</ s >
    assert llama.encode("say <s> and </s>") == [1827, 529, 29879, 29958, 322, 1533, 29879, 29958]
    ids = llama.chat(
        [
            {"role": "system", "content": "<s></s>"},
            {"role": "user", "content": "<s> </s>"},
            {"role": "assistant", "content": "</s><s>"},
        ]
    )
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert (ids[0], ids[-1]) == (1, 2)
    assert "<s> </s>" in llama.decode(ids)
    assert not {1, 2} & set(llama.encode("</s>", continuation=True))


@pytest.mark.parametrize(
    "segment",
    [" is 4.", "ing", "\nis", "\n\n y", "  two spaces", " ", "  ", "   ", "", "<s>", "🦙 llama", "\t", "\r\n"],
)
def test_segments_decode_to_the_whole_text(llama, segment):
    text = "The answer"
    assert llama.decode(llama.encode(text) + llama.encode(segment, continuation=True)) == text + segment


def test_segments_of_a_text_decode_to_it_wherever_it_is_cut(llama, vectors):
    for text, _ in vectors:
        for cut in range(1, len(text)):
            ids = llama.encode(text[:cut]) + llama.encode(text[cut:], continuation=True)
            assert llama.decode(ids) == text


def test_a_continuation_has_no_dummy_space(llama):
    assert llama.encode("hi", continuation=True) == [2918]  # hi
    assert llama.encode(" hi", continuation=True) == [7251]  # ▁hi
    assert llama.encode(" ", continuation=True) == [29871]  # ▁


@pytest.mark.parametrize(
    "roles, message",
    [
        (["assistant"], "message 0 has the role 'assistant'; expected 'user'"),
        (["user", "user"], "message 1 has the role 'user'; expected 'assistant'"),
        (["system", "assistant"], "message 1 has the role 'assistant'; expected 'user'"),
        (["user", "system"], "message 1 has the role 'system'; expected 'assistant'"),
        (["user", "tool"], "message 1 has the role 'tool'; expected 'assistant'"),
        (["system"], "needs a user message after the system message"),
        ([], "at least one message"),
    ],
)
def test_chat_names_the_message_with_a_wrong_role(word_model, roles, message):
    with pytest.raises(InputError, match=message):
        word_model.chat([{"role": role, "content": "add two"} for role in roles])


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "hi"}, {"role": "user", "content": None}])
def test_chat_names_a_message_without_role_or_text(word_model, message):
    with pytest.raises(InputError, match="message 0 needs a role and a content"):
        word_model.chat([message])


@pytest.mark.parametrize("token", [-1, 10**6])
def test_decode_rejects_an_id_outside_the_vocabulary(word_model, token):
    with pytest.raises(InputError, match=f"token id {token} is outside 0..{word_model.vocab_size - 1}"):
        word_model.decode([3, token])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.model: there is no such tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"other\.model: there is no such tokenizer"):
        Tokenizer(tmp_path / "other.model")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(100)])
def test_a_corrupt_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_truncated_file_is_named(word_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(word_model.path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_model_without_eos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 5),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="word",
        vocab_size=9,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(InputError, match="defines no eos_id"):
        Tokenizer(tmp_path)


def test_a_word_model_works_with_the_chat_layout(word_model):
    piece = word_model._model.id_to_piece
    prompt = word_model.chat_prompt("add two and three")
    assert [piece(token) for token in prompt] == ["<s>", "▁[INST]", "▁add", "▁two", "▁and", "▁three", "▁[/INST]"]
    answer = word_model.encode(" five", continuation=True)
    assert [piece(token) for token in answer] == ["▁five"]
    assert word_model.decode(prompt[2:-1] + answer) == "add two and three five"


@pytest.mark.parametrize("segment", ["five", "\nfive", " "])
def test_a_word_model_says_that_a_continuation_must_begin_with_a_space(word_model, segment):
    with pytest.raises(InputError, match="begin the segment with a space"):
        word_model.encode(segment, continuation=True)


@pytest.mark.parametrize("segment", [" five", "five", "five and", "[INST]", "é"])
def test_a_small_model_continues_exactly_as_written(letter_model, segment):
    ids = letter_model.encode("the answer") + letter_model.encode(segment, continuation=True)
    assert letter_model.decode(ids) == "the answer" + segment.replace("é", " ⁇ ")


@pytest.mark.parametrize("segment", ["\nfive", "\t"])
def test_a_small_model_does_not_drop_a_line_break_in_silence(letter_model, segment):
    with pytest.raises(InputError, match="begin the segment with a space"):
        letter_model.encode(segment, continuation=True)


def test_what_a_model_does_not_know_is_one_unknown_token_and_no_error(word_model):
    assert word_model.encode(" zebra", continuation=True) == [word_model.unk_id]
    assert word_model.encode("zebra") == [word_model.unk_id]


def test_a_word_model_is_saved_unchanged_even_if_its_file_is_gone(tmp_path):
    model = trained(tmp_path, "word")
    content, template_hash = model.path.read_bytes(), model.template_hash
    model.path.unlink()
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == content
    assert model.template_hash == Tokenizer(tmp_path / "saved").template_hash == template_hash


def test_template_hash_depends_on_the_vocabulary_and_survives_saving(word_model, llama, tmp_path):
    word_model.save(tmp_path)
    assert Tokenizer(tmp_path).template_hash == word_model.template_hash
    assert word_model.template_hash != llama.template_hash


def test_transformers_loads_the_saved_directory_with_equal_ids(llama, vectors, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == llama.path.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in [*vectors, ("é naïve 漢字 [INST] x [/INST]", llama.encode("é naïve 漢字 [INST] x [/INST]"))]:
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == text
    assert theirs("hi").input_ids == [1, 7251]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 2, 0, 32000)


def test_transformers_chat_template_gives_the_ids_of_chat(llama, vectors, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = [text for text, _ in vectors]  # also empty ones, and blanks
    for first, second, third in zip(said, said[1:], said[2:]):
        one = [{"role": "user", "content": first}]
        more = [*one, {"role": "assistant", "content": second}, {"role": "user", "content": third}]
        for messages in (one, more[:2], more, [{"role": "system", "content": third}, *more]):
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids == llama.chat(messages), messages
    user = {"role": "user", "content": "hi"}
    system, tool = user | {"role": "system"}, user | {"role": "tool"}
    for messages in ([user | {"role": "assistant"}], [user, user], [user, system], [user, tool], [system, system]):
        with pytest.raises(Exception, match="the user first"):
            theirs.apply_chat_template(messages, tokenize=True)


def test_transformers_llama_tokenizer_loads_the_saved_directory(llama, vectors, tmp_path):
    """Asked for by name it is transformers' own conversion, which differs for texts that begin with a space."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama.save(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    compared = [(text, ids) for text, ids in vectors if text and not text[0].isspace()]
    assert len(compared) > 20
    for text, ids in compared:
        assert theirs(text, add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("options", [{}, {"byte_fallback": True, "vocab_size": 300}], ids=["plain", "bytes"])
def test_transformers_gives_a_small_bpe_models_ids(tmp_path, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = trained(tmp_path, "bpe", **options)
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("add two and three", "the answer is five", "five"):
        assert theirs(text, add_special_tokens=False).input_ids == model.encode(text)
