"""Greedy sampling against transformers' generate: 64 prompts, 128 new tokens each."""

import pytest
import torch

from engine.checkpoint import save_checkpoint
from engine.llm import LLM
from engine.sampling import SamplingParams
from tests.engine.helpers import random_llama, small_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed; nothing to compare with")

LENGTHS = (2, 17, 64, 65, 100, 129, 200, 300)  # of prompts; those of one length are a batch, so nothing is padded
EACH = 8
NEW = 128


def assert_near_tie(row, token):
    """The token is the best of its logits, or within 1e-4 rms of it; a NaN fails."""
    gap = (row.max() - row[token]).item()
    assert gap <= 1e-4 * row.square().mean().sqrt().item()


def replies_of(theirs, prompts):
    """Their greedy tokens behind prompts of one length."""
    ids = torch.tensor(prompts)
    reply = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return reply[:, ids.shape[1] :].tolist()


@pytest.fixture(autouse=True)
def one_thread():
    """For models so small two threads mostly wait for each other: 3 s, or 48 s beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.full, id="mha"), pytest.param(2, id="gqa")])
def test_greedy_tokens_of_64_prompts_are_theirs(tmp_path, kv_heads):
    """Equal, or at the first difference the two best logits are a near tie; behind it, by teacher forcing, the best."""
    save_checkpoint(random_llama(small_config(n_kv_heads=kv_heads), seed=kv_heads), tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(kv_heads)
    batches = [torch.randint(3, 111, (EACH, length), generator=generator).tolist() for length in LENGTHS]
    outputs = LLM(tmp_path / "m").generate(
        [prompt for batch in batches for prompt in batch],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
    )
    ours = [output.outputs[0].token_ids for output in outputs]
    assert [len(ids) for ids in ours] == [NEW] * EACH * len(LENGTHS)
    equal = 0
    for number, batch in enumerate(batches):
        mine = ours[number * EACH : (number + 1) * EACH]
        with torch.no_grad():
            full = theirs(torch.tensor([prompt + ids for prompt, ids in zip(batch, mine, strict=True)])).logits
        for ids, reply, logits in zip(mine, replies_of(theirs, batch), full, strict=True):
            rows = logits[-NEW - 1 : -1]
            for row, token in zip(rows, ids, strict=True):
                assert_near_tie(row, token)
            differs = next((at for at in range(NEW) if ids[at] != reply[at]), None)
            if differs is not None:
                assert_near_tie(rows[differs], reply[differs])
            equal += differs is None
    assert equal >= 60  # near ties are rare: what is compared are the tokens
