"""Meta's layout: whatever the number of files, dtype and heads, the model is that of HF's layout; damage is named."""

import json
import random
from dataclasses import replace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from engine.checkpoint import content_hash, load_checkpoint, save_checkpoint
from engine.errors import CheckpointError
from engine.llm import LLM
from engine.ops import rope
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config
from tests.engine.meta_layout import save_meta

W3 = "layers.1.feed_forward.w3.weight"
FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"


def meta_config(**changes):
    """A model whose every size can be split over 8 files."""
    return small_config(n_heads=8, n_kv_heads=8, head_dim=8, vocab_size=112, max_seq_len=4096, **changes)


def both_layouts(directory, config, count=1, dtype=torch.float32, **changes):
    """The same random model as an HF directory and as `count` files of Meta's."""
    model = random_llama(config).to(dtype)
    save_checkpoint(model, directory / "hf")
    save_meta(load_file(directory / "hf" / "model.safetensors"), config, directory / "meta", count, **changes)
    return directory / "hf", directory / "meta"


def assert_equal_directories(hf, meta):
    theirs, ours = load_checkpoint(hf, dtype=None), load_checkpoint(meta, dtype=None)
    assert ours.config == theirs.config
    for (name, expected), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


@pytest.fixture
def two(tmp_path):
    """Two files, to be damaged."""
    return both_layouts(tmp_path, meta_config(), 2)[1]


def edit_params(directory, **changes):
    path = directory / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_file(directory, name, edit):
    tensors = torch.load(directory / name, weights_only=True)
    edit(tensors)
    torch.save(tensors, directory / name)


def rejected(directory, *parts):
    """Loading raises one line that names every one of `parts`, and so does the hash; nothing is written."""
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    for read in (load_checkpoint, content_hash):
        with pytest.raises(CheckpointError) as caught:
            read(directory)
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


# What is loaded


@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_metas_files_hold_the_model_of_hfs(tmp_path, count, kv_heads):
    hf, meta = both_layouts(tmp_path, replace(meta_config(), n_kv_heads=kv_heads), count)
    assert len(list(meta.glob("*.pth"))) == count
    assert_equal_directories(hf, meta)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_whole_key_value_heads_may_be_copied_into_several_files(tmp_path, kv_heads):
    config = replace(meta_config(), n_kv_heads=kv_heads)
    assert_equal_directories(*both_layouts(tmp_path, config, 8, kv_heads=kv_heads))


def test_an_embedding_split_by_rows_is_found(tmp_path):
    assert_equal_directories(*both_layouts(tmp_path, meta_config(), 8, embed_axis=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_of_the_files_is_kept_or_widened(tmp_path, dtype):
    hf, meta = both_layouts(tmp_path, meta_config(), 2, dtype)
    assert_equal_directories(hf, meta)
    assert load_checkpoint(meta).embed.dtype == torch.float32
    assert torch.equal(load_checkpoint(meta).blocks[1].mlp.down, load_checkpoint(hf).blocks[1].mlp.down)


@pytest.mark.parametrize("head_dim", [2, 6, 18])
def test_any_even_head_dim_is_read(tmp_path, head_dim):
    config = small_config(dim=4 * head_dim, head_dim=head_dim, max_seq_len=4096)
    assert_equal_directories(*both_layouts(tmp_path, config))


def test_a_head_dim_that_is_not_dim_over_heads_is_read_where_params_tell_it(tmp_path):
    config = small_config(head_dim=24, max_seq_len=4096)
    assert_equal_directories(*both_layouts(tmp_path, config, head_dim=24))


def test_rope_theta_and_a_stated_vocabulary_are_read(tmp_path):
    assert_equal_directories(
        *both_layouts(tmp_path, meta_config(rope_theta=1e6), 2, vocab_size=112, rope_theta=1000000)
    )


def test_params_without_rope_theta_and_kv_heads_are_llama_2(tmp_path):
    assert_equal_directories(*both_layouts(tmp_path, meta_config(), 2, rope_theta=None, n_kv_heads=None))


def test_rows_of_q_and_k_are_rotated_as_metas_complex_product_does(tmp_path):
    """The layout against its own definition: scores of rotated rows are those of pairs multiplied by exp(i * angle)."""
    config = small_config(n_layers=1, max_seq_len=4096)
    _, meta = both_layouts(tmp_path, config)
    file, model = torch.load(meta / FIRST, weights_only=True), load_checkpoint(meta)
    x = torch.randn(9, config.dim, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(9)[:, None] / 10000.0 ** (torch.arange(0, 16, 2) / 16)  # [9, D/2]

    def by_definition(part):
        pairs = (x @ file[f"layers.0.attention.{part}.weight"].T).view(9, -1, 8, 2)
        return torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle)[:, None]  # [9, heads, D/2]

    q, k, _ = (x @ model.blocks[0].attention.qkv.T).view(9, -1, 16).split((4, 2, 2), dim=1)
    q, k = (rope(part, model.rope_cos[:9], model.rope_sin[:9]) for part in (q, k))
    ours = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, dim=1))
    theirs = torch.einsum(
        "ihd,jhd->hij", by_definition("wq"), by_definition("wk").conj().repeat_interleave(2, dim=1)
    ).real
    assert (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


@pytest.mark.parametrize("tensor", ["norm.weight", "layers.1.attention.wk.weight"])
def test_where_copies_differ_the_first_file_is_taken(tmp_path, tensor):
    """As other readers do; the files were ranks that trained apart, and nobody promises that copies agree to the bit."""
    hf, meta = both_layouts(tmp_path, replace(meta_config(), n_kv_heads=1), 2, kv_heads=1)
    edit_file(meta, SECOND, lambda tensors: tensors[tensor].add_(1.0))
    assert_equal_directories(hf, meta)


def test_tensors_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    """As the released files were."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    hf, meta = both_layouts(tmp_path, meta_config(), 2)
    assert b"cuda:0" in (meta / FIRST).read_bytes()
    assert_equal_directories(hf, meta)


def test_a_loaded_model_is_saved_in_hfs_layout_and_generates(tmp_path):
    hf, meta = both_layouts(tmp_path, meta_config(), 8)
    save_checkpoint(load_checkpoint(meta), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, second = (LLM(path).generate([[1, 5, 9]], params)[0].outputs[0].token_ids for path in (hf, meta))
    assert first == second


def test_hfs_layout_is_taken_where_both_are(tmp_path):
    hf, _ = both_layouts(tmp_path, meta_config())
    (hf / "params.json").write_text("{}")
    load_checkpoint(hf)


# The hash


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_hash_is_that_of_hfs_layout(tmp_path, count):
    hf, meta = both_layouts(tmp_path, meta_config(), count, torch.bfloat16)
    assert content_hash(meta) == content_hash(hf)


def test_the_hash_changes_with_one_value_in_the_last_file(two):
    before = content_hash(two)
    edit_file(two, SECOND, lambda tensors: tensors[W3][3, 5].add_(0.5))
    assert content_hash(two) != before


# Damage


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 0.5, 0.99, -1])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_truncated_file_is_named(two, name, keep):
    content = (two / name).read_bytes()
    (two / name).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    rejected(two, name, "truncated or corrupt")


def test_bytes_lost_in_the_middle_never_give_another_error(two):
    """Either the reader notices, or a value is out of range or merely wrong (no checksum is in the layout)."""
    content = (two / SECOND).read_bytes()
    draw, noticed = random.Random(0), 0
    for _ in range(40):
        at = draw.randrange(len(content))
        (two / SECOND).write_bytes(content[:at] + content[at + draw.choice((1, 64, 4096)) :])
        try:
            load_checkpoint(two)
        except CheckpointError as error:
            assert SECOND in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed >= 30


@pytest.mark.parametrize("lost, named", [("00", "consolidated.00.pth"), ("03", "consolidated.03.pth")])
def test_a_gap_in_the_files_is_named(tmp_path, lost, named):
    _, meta = both_layouts(tmp_path, meta_config(), 8)
    (meta / f"consolidated.{lost}.pth").unlink()
    rejected(meta, f"but no {named}")


@pytest.mark.parametrize("vocab", [-1, 112])
@pytest.mark.parametrize("left", [1, 4, 7])
def test_last_files_that_are_missing_are_suspected(tmp_path, left, vocab):
    _, meta = both_layouts(tmp_path, meta_config(), 8, vocab_size=vocab)
    for number in range(left, 8):
        (meta / f"consolidated.{number:02d}.pth").unlink()
    rejected(meta, "tok_embeddings.weight", "missing")


def test_a_directory_without_files_is_named(two):
    (two / FIRST).unlink()
    (two / SECOND).unlink()
    rejected(two, str(two), "no consolidated.00.pth")


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("tensor", [W3, "norm.weight", "layers.0.attention.wq.weight"])
def test_a_missing_tensor_is_named_with_its_file(two, name, tensor):
    edit_file(two, name, lambda tensors: tensors.pop(tensor))
    rejected(two, name, tensor, "lacks 1 tensor")


@pytest.mark.parametrize("tensor", ["output.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("value", [None, torch.ones(())])
def test_a_missing_vocabulary_is_named(two, tensor, value):
    edit_file(two, FIRST, lambda tensors: tensors.update({tensor: value}) if value is not None else tensors.pop(tensor))
    rejected(two, FIRST, f"no matrix {tensor}")


@pytest.mark.parametrize("tensor", ["layers.2.ffn_norm.weight", "layers.0.attention.wq.bias"])
def test_an_extra_tensor_is_named_with_its_file(two, tensor):
    edit_file(two, SECOND, lambda tensors: tensors.update({tensor: torch.zeros(64)}))
    rejected(two, SECOND, tensor, "no place for")


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_wrong_shape_is_named_with_both_shapes(two, name):
    edit_file(two, name, lambda tensors: tensors.update({W3: tensors[W3].T}))
    rejected(two, name, W3, "[64, 48]", "[48, 64]")


@pytest.mark.parametrize("tensor", ["norm.weight", "layers.1.attention.wk.weight", "layers.0.attention.wo.weight"])
@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(()), torch.zeros(0, 64)], ids=["3", "scalar", "empty"])
def test_files_with_unequal_shapes_are_named(two, tensor, value):
    edit_file(two, SECOND, lambda tensors: tensors.update({tensor: value}))
    rejected(two, SECOND, tensor, str([*value.shape]))


def test_a_file_of_another_model_is_named(two, tmp_path):
    (tmp_path / "other").mkdir()
    _, other = both_layouts(tmp_path / "other", meta_config(n_layers=3), 2)
    (other / SECOND).rename(two / SECOND)
    rejected(two, SECOND, "layers.2.attention.wk.weight", "no place for")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("tensor", [W3, "layers.0.attention.wk.weight", "layers.1.attention_norm.weight"])
def test_a_value_that_is_not_finite_is_named_with_its_file(two, name, tensor, value):
    edit_file(two, name, lambda tensors: tensors[tensor].view(-1)[-3:].fill_(value))
    rejected(two, name, tensor, "NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64], ids=str)
def test_a_dtype_that_is_not_a_weights_is_named(two, dtype):
    edit_file(two, SECOND, lambda tensors: tensors.update({W3: tensors[W3].to(dtype)}))
    rejected(two, SECOND, W3, str(dtype))


@pytest.mark.parametrize(
    "changes, found, expected",
    [
        ({"vocab_size": 32000}, "[112, 32]", "[32000, 32]"),
        ({"multiple_of": 64}, "[48, 64]", "[32, 64]"),
        ({"n_kv_heads": 4}, "[32, 64]", "[16, 64]"),
        ({"n_heads": 16}, "[32, 64]", "[16, 64]"),
        ({"dim": 32}, "[112, 32]", "[112, 16]"),
    ],
)
def test_params_that_do_not_fit_the_tensors_are_named_with_both_shapes(two, changes, found, expected):
    edit_params(two, **changes)
    if "n_heads" in changes:
        edit_params(two, head_dim=4, n_kv_heads=8)
    rejected(two, FIRST, "params.json", f"has shape {found}", f"ask for {expected}")


@pytest.mark.parametrize("n_layers, part", [(3, "lacks 9 tensors"), (1, "has 9 tensors")])
def test_another_number_of_layers_is_named(two, n_layers, part):
    edit_params(two, n_layers=n_layers)
    rejected(two, FIRST, part, "params.json", f"layers.{min(n_layers, 2)}.attention.wk.weight")


def test_sizes_that_cannot_be_split_are_named(two):
    edit_params(two, vocab_size=111, dim=63, head_dim=8)
    rejected(two, "tok_embeddings.weight of shape [111, 63] cannot be split over 2 files")


def test_embedding_and_head_that_disagree_about_the_vocabulary_are_named(two):
    for name in (FIRST, SECOND):
        edit_file(two, name, lambda tensors: tensors.update({"output.weight": torch.zeros(50, 64)}))
    rejected(two, "tok_embeddings.weight has 112 rows", "output.weight 50 in each of 2 files")


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"dim": None}, "has no dim"),
        ({"n_heads": "8"}, "n_heads is '8'"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_kv_heads": 3}, "not a multiple of n_kv_heads (3)"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
        ({"ffn_dim_multiplier": 1e400}, "ffn_dim_multiplier is inf"),
        ({"norm_eps": -1}, "norm_eps is -1"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"use_scaled_rope": True}, "use_scaled_rope is True"),
        ({"moe": {"num_experts": 8}}, "moe is {'num_experts': 8}"),
    ],
)
def test_a_wrong_value_in_params_is_named(two, changes, part):
    edit_params(two, **changes)
    rejected(two, "params.json", part)


@pytest.mark.parametrize("content", [b'{"dim": 64,', b"\xff\xfe", b"[1, 2]", b""])
def test_params_that_are_no_json_object_are_named(two, content):
    (two / "params.json").write_bytes(content)
    rejected(two, "params.json", "JSON")


def test_a_file_in_torchs_old_format_is_told_from_a_corrupt_one(two):
    tensors = torch.load(two / SECOND, weights_only=True)
    torch.save(tensors, two / SECOND, _use_new_zipfile_serialization=False)
    rejected(two, SECOND, "old format", "save it anew")


def test_a_reader_that_gives_many_lines_is_quoted_with_the_first(two, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("failed reading\nframe #0: one\nframe #1: two")

    monkeypatch.setattr(torch, "load", fail)
    rejected(two, FIRST, "truncated or corrupt (failed reading)")


def test_a_corrupt_table_of_tensors_is_named(two):
    content = (two / SECOND).read_bytes()
    at = content.index(b"_rebuild_tensor_v2")
    (two / SECOND).write_bytes(content[:at] + b"x" + content[at + 1 :])
    rejected(two, SECOND, "corrupt")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_code_in_a_file_is_not_run(two, tmp_path, old):
    edit_file(two, FIRST, lambda tensors: None)
    tensors = torch.load(two / FIRST, weights_only=True)
    torch.save({**tensors, "trap": Trap(tmp_path / "sprung")}, two / FIRST, _use_new_zipfile_serialization=not old)
    rejected(two, FIRST, "old format" if old else "could run code")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {"model": {"norm.weight": torch.ones(2)}}, {"a": 1}]
)
def test_a_file_that_holds_no_named_tensors_is_named(two, content):
    torch.save(content, two / SECOND)
    rejected(two, SECOND, "expected Meta's consolidated weights")


def test_a_tokenizer_larger_than_the_model_is_named(two):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 9),
        model_prefix=str(two / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.model has \d+ pieces, the model 112 embeddings"):
        load_checkpoint(two)
