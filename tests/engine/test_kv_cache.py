"""The block pool: references, content lookup, eviction order, and a check that notices every kind of damage."""

import pytest

from engine.kv_cache import BlockPool

TOKENS = list(range(100, 112))


def filled(pool, tokens, epoch=0):
    """Blocks that hold `tokens`, computed and held once."""
    chain = pool.hash_chain(tokens, epoch)
    blocks = pool.allocate(len(chain))
    for number, (block, key) in enumerate(zip(blocks, chain, strict=True)):
        pool.mark_computed(block, key, tokens[number * pool.block_size : (number + 1) * pool.block_size])
    return blocks


def test_computed_blocks_are_found_by_their_whole_prefix():
    pool = BlockPool(10, 4)
    blocks = filled(pool, TOKENS)
    assert pool.find(pool.hash_chain(TOKENS, 0), TOKENS) == blocks
    other = [0, *TOKENS[1:]]
    assert pool.find(pool.hash_chain(other, 0), other) == []
    branched = [*TOKENS[:8], 1, 2, 3, 4]
    assert pool.find(pool.hash_chain(branched, 0), branched) == blocks[:2]


def test_blocks_of_other_weights_are_never_found():
    pool = BlockPool(10, 4)
    filled(pool, TOKENS, epoch=1)
    assert pool.find(pool.hash_chain(TOKENS, 2), TOKENS) == []


def test_tokens_are_compared_even_when_hashes_agree():
    pool = BlockPool(10, 4)
    filled(pool, TOKENS)
    assert pool.find(pool.hash_chain(TOKENS, 0), [0] * 12) == []


def test_released_blocks_stay_findable_until_they_are_needed_the_deepest_first():
    pool = BlockPool(5, 4)  # four usable
    blocks = filled(pool, TOKENS)
    pool.release(blocks)
    pool.check([])
    assert pool.allocate(2) is not None  # the one that never held anything, then the deepest
    assert pool.find(pool.hash_chain(TOKENS, 0), TOKENS) == blocks[:2]
    assert pool.allocate(3) is None
    assert pool.allocate(2) is not None
    assert pool.find(pool.hash_chain(TOKENS, 0), TOKENS) == []


def test_held_blocks_are_not_handed_out():
    pool = BlockPool(4, 4)
    blocks = filled(pool, TOKENS)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.available() == 0 and pool.allocate(1) is None
    pool.check([blocks])
    pool.release(blocks)
    assert pool.available() == 3 and pool.available(shared=blocks) == 0


def test_releasing_twice_is_an_error():
    pool = BlockPool(4, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released with 0 references"):
        pool.release(blocks)


def damage_references(pool, blocks):
    pool.blocks[blocks[0]].references += 1


def damage_free_list(pool, blocks):
    pool.free[blocks[0]] = None


def damage_index(pool, blocks):
    pool.by_hash[b"x"] = blocks[0]


def damage_hash(pool, blocks):
    pool.blocks[blocks[0]].hash = b"x"


def damage_tokens(pool, blocks):
    pool.blocks[blocks[0]].tokens = (1,)


def damage_scratch(pool, blocks):
    pool.free[0] = None


@pytest.mark.parametrize(
    "damage",
    [damage_references, damage_free_list, damage_index, damage_hash, damage_tokens, damage_scratch],
    ids=lambda damage: damage.__name__,
)
def test_check_notices(damage):
    pool = BlockPool(6, 4)
    blocks = filled(pool, TOKENS)
    pool.check([blocks])
    damage(pool, blocks)
    with pytest.raises(AssertionError):
        pool.check([blocks])
