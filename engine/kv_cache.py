"""The block pool: which KV blocks exist, who holds them, and which of them can be found again by content.

Pure Python over integers. A block holds `block_size` tokens. A *full* block whose keys and values are computed carries a
hash chained over (parent, its tokens, weight epoch), so that a later request with the same beginning finds it. Blocks
that nobody holds stay findable until they are needed: the least recently released goes first.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Block:
    references: int = 0
    hash: bytes | None = None  # set while the block is computed, full and findable
    tokens: tuple[int, ...] = ()


@dataclass
class BlockPool:
    """`num_blocks` blocks; block 0 is scratch (padding rows write there) and is never handed out."""

    num_blocks: int
    block_size: int
    blocks: list[Block] = field(init=False)
    by_hash: dict[bytes, int] = field(init=False, default_factory=dict)
    free: OrderedDict[int, None] = field(init=False)  # unreferenced blocks, the next to be reused first

    def __post_init__(self) -> None:
        self.blocks = [Block() for _ in range(self.num_blocks)]
        self.free = OrderedDict.fromkeys(range(1, self.num_blocks))

    def block_hash(self, parent: bytes, tokens: Sequence[int], epoch: int) -> bytes:
        """128-bit hash of a full block: the whole prefix through its parent, the weights through their epoch."""
        text = b"%d:" % epoch + parent + b",".join(b"%d" % token for token in tokens)
        return hashlib.blake2b(text, digest_size=16).digest()

    def hash_chain(self, tokens: Sequence[int], epoch: int) -> list[bytes]:
        """Hashes of all full blocks of a token list."""
        chain: list[bytes] = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            parent = chain[-1] if chain else b""
            chain.append(self.block_hash(parent, tokens[start : start + self.block_size], epoch))
        return chain

    def find(self, chain: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Computed blocks that hold the beginning of `tokens`, longest run first to last; takes no reference."""
        found = []
        for number, key in enumerate(chain):
            block = self.by_hash.get(key)
            start = number * self.block_size
            if block is None or self.blocks[block].tokens != tuple(tokens[start : start + self.block_size]):
                break
            found.append(block)
        return found

    def available(self, shared: Iterable[int] = ()) -> int:
        """Blocks that `allocate` could hand out after the blocks in `shared` have been held."""
        return len(self.free) - sum(1 for block in set(shared) if block in self.free)

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks."""
        for block in blocks:
            self.blocks[block].references += 1
            self.free.pop(block, None)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and no content, or None if there are not so many."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self.blocks[block].references = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each; the deepest blocks become reusable first, so that beginnings live longest."""
        for block in reversed(blocks):
            entry = self.blocks[block]
            if entry.references < 1:
                raise AssertionError(f"block {block} is released with {entry.references} references")
            entry.references -= 1
            if entry.references == 0:
                self.free[block] = None
                if entry.hash is None:  # nobody can find it: reuse it before anything findable
                    self.free.move_to_end(block, last=False)

    def mark_computed(self, block: int, key: bytes, tokens: Sequence[int]) -> None:
        """The block is full and computed: from now on it can be found (unless another block already holds the same)."""
        if key not in self.by_hash:
            self.by_hash[key] = block
            self.blocks[block].hash, self.blocks[block].tokens = key, tuple(tokens)

    def reset(self) -> None:
        """Forget all content (blocks that are held stay held)."""
        for block in list(self.by_hash.values()):
            self._forget(block)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recompute references, free list and index from who holds what; raise AssertionError at the first difference."""
        counts = Counter(block for blocks in holders for block in blocks)
        for number, block in enumerate(self.blocks):
            if block.references != counts[number]:
                raise AssertionError(
                    f"block {number} has {block.references} references, is held {counts[number]} times"
                )
            if number and (number in self.free) != (block.references == 0):
                raise AssertionError(
                    f"block {number} with {block.references} references: free is {number in self.free}"
                )
            if block.hash is not None and self.by_hash.get(block.hash) != number:
                raise AssertionError(f"block {number} is not found under its own hash")
            if block.hash is not None and len(block.tokens) != self.block_size:
                raise AssertionError(f"block {number} is findable with {len(block.tokens)} tokens")
        if 0 in self.free or counts[0]:
            raise AssertionError("the scratch block 0 was handed out")
        stale = [block for key, block in self.by_hash.items() if self.blocks[block].hash != key]
        if stale:
            raise AssertionError(f"the index points to block {stale[0]}, which has another hash")

    def _forget(self, block: int) -> None:
        entry = self.blocks[block]
        if entry.hash is not None:
            del self.by_hash[entry.hash]
        entry.hash, entry.tokens = None, ()
