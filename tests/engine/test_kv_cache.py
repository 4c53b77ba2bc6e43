"""The block pool: references, content lookup, eviction order, and a check that notices every kind of damage."""

import pytest

from engine.kv_cache import BlockPool

TOKENS = list(range(100, 112))


def chain_of(pool, tokens, epoch=0):
    chain = []
    pool.extend_chain(chain, tokens, epoch)
    return chain


def filled(pool, tokens, epoch=0):
    """Blocks that hold `tokens`, computed, listed and held once; the last may be partial."""
    size, chain = pool.block_size, chain_of(pool, tokens, epoch)
    blocks = pool.allocate(-(-len(tokens) // size))
    for number, block in enumerate(blocks):
        part = tokens[number * size : (number + 1) * size]
        parent = chain[number - 1] if number else pool.root(epoch)
        pool.list_block(block, parent, part, chain[number] if len(part) == size else None)
        pool.fill(block, len(part))
    return blocks


def test_listed_blocks_are_found_by_their_whole_prefix():
    pool = BlockPool(10, 4)
    blocks = filled(pool, TOKENS)
    assert pool.find(chain_of(pool, TOKENS), TOKENS) == blocks
    other = [0, *TOKENS[1:]]
    assert pool.find(chain_of(pool, other), other) == []
    branched = [*TOKENS[:8], 1, 2, 3, 4]
    assert pool.find(chain_of(pool, branched), branched) == blocks[:2]


def test_blocks_of_other_weights_are_never_found():
    pool = BlockPool(10, 4)
    filled(pool, TOKENS, epoch=1)
    assert pool.find(chain_of(pool, TOKENS, 2), TOKENS) == []
    assert pool.find_head(pool.root(2), TOKENS) == (0, 0)
    assert pool.find_head(pool.root(1), TOKENS)[1] == 4


def test_tokens_are_compared_even_when_hashes_agree():
    pool = BlockPool(10, 4)
    filled(pool, TOKENS)
    assert pool.find(chain_of(pool, TOKENS), [0] * 12) == []


def test_a_head_is_found_at_multiples_of_eight_and_at_its_whole_length_then_extended_token_by_token():
    pool = BlockPool(10, 32)
    (block,) = filled(pool, list(range(100, 121)))
    root = pool.root(0)
    for same, found in ((21, 21), (20, 20), (17, 17), (16, 16), (8, 8), (7, 0)):
        wanted = [*range(100, 100 + same), 1, 2, 3]
        assert pool.find_head(root, wanted) == ((block, found) if found else (0, 0))
    pool.blocks[block].filled = 10  # no more than what is computed
    assert pool.find_head(root, list(range(100, 121))) == (block, 10)
    assert pool.find_head(b"other", list(range(100, 121))) == (0, 0)


def test_a_block_that_is_listed_again_is_found_by_its_new_tokens_and_leaves_nothing_behind():
    pool = BlockPool(10, 4)
    (block,) = filled(pool, TOKENS[:3])
    (key,) = chain_of(pool, TOKENS[:4])
    pool.list_block(block, pool.root(0), TOKENS[:4], key)
    pool.blocks[block].filled = 4
    pool.check([[block]])
    assert pool.find([key], TOKENS[:4]) == [block]
    pool.release([block])
    assert pool.allocate(9) is not None
    assert not pool.by_hash and not pool.by_head


def test_released_blocks_stay_listed_until_they_are_needed_the_deepest_first():
    pool = BlockPool(5, 4)  # four usable
    blocks = filled(pool, TOKENS)
    pool.release(blocks)
    pool.check([])
    assert pool.allocate(2) is not None  # the one that never held anything, then the deepest
    assert pool.find(chain_of(pool, TOKENS), TOKENS) == blocks[:2]
    assert pool.allocate(3) is None
    assert pool.allocate(2) is not None
    assert pool.find(chain_of(pool, TOKENS), TOKENS) == []


def test_held_blocks_are_not_handed_out():
    pool = BlockPool(4, 4)
    blocks = filled(pool, TOKENS)
    pool.hold(blocks)
    pool.release(blocks)
    assert not pool.free and pool.allocate(1) is None
    pool.check([blocks])
    pool.release(blocks)
    assert len(pool.free) == 3


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


def damage_filled(pool, blocks):
    pool.blocks[blocks[0]].filled = 5


def damage_head(pool, blocks):
    pool.by_head[pool.root(0), (1,)] = blocks[0]


@pytest.mark.parametrize(
    "damage",
    [
        damage_references,
        damage_free_list,
        damage_index,
        damage_hash,
        damage_tokens,
        damage_scratch,
        damage_filled,
        damage_head,
    ],
    ids=lambda damage: damage.__name__,
)
def test_check_notices(damage):
    pool = BlockPool(6, 4)
    blocks = filled(pool, TOKENS)
    pool.check([blocks])
    damage(pool, blocks)
    with pytest.raises(AssertionError):
        pool.check([blocks])
