"""The block pool: which KV blocks exist, who holds them, and which of them can be found by what they hold.

Pure Python over integers. A block holds the keys and values of `block_size` tokens. It is listed when it is handed out
for tokens that are known, before they are computed, so that whoever needs the same tokens shares it at once:
    by its hash    chained over (parent, its tokens), from the weight epoch on: the whole block is shared
    by its head    (parent's hash, its first k tokens): the common beginning is copied
`filled` marks how much of it is computed. Nobody owns a listed block: whoever holds it and comes first in a step computes
what is missing, so nothing is lost when the one that asked for it is aborted or preempted.
Blocks that nobody holds stay listed until they are needed: the least recently released goes first.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

HEAD = 8  # heads are listed at multiples of this many tokens, and at the block's known length


@dataclass
class Block:
    references: int = 0
    filled: int = 0  # leading slots that are computed, or will be when the planned step has run
    tokens: tuple[int, ...] = ()  # what the leading slots hold once they are filled; empty: the block is not listed
    parent: bytes = b""  # hash of the block before it
    hash: bytes | None = None  # of a block whose tokens are all known


@dataclass
class BlockPool:
    """`num_blocks` blocks; block 0 means none and is never handed out."""

    num_blocks: int
    block_size: int
    blocks: list[Block] = field(init=False)
    by_hash: dict[bytes, int] = field(init=False, default_factory=dict)
    by_head: dict[tuple[bytes, tuple[int, ...]], int] = field(init=False, default_factory=dict)
    free: OrderedDict[int, None] = field(init=False)  # unreferenced blocks, the next to be reused first

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As new: nobody holds anything, nothing is listed."""
        self.blocks = [Block() for _ in range(self.num_blocks)]
        self.free = OrderedDict.fromkeys(range(1, self.num_blocks))
        self.by_hash.clear()
        self.by_head.clear()

    # ---- names of contents ------------------------------------------------------------------------------------------

    def root(self, epoch: int) -> bytes:
        """The parent of a first block: what was computed from other weights is found under another one."""
        return b"weights %d:" % epoch

    def extend_chain(self, chain: list[bytes], tokens: Sequence[int], epoch: int) -> None:
        """Append the 128-bit hashes of the full blocks of `tokens` that the chain does not have yet.

        A hash stands for the whole beginning, through its parent's.
        """
        size = self.block_size
        for start in range(len(chain) * size, len(tokens) - size + 1, size):
            parent = chain[-1] if chain else self.root(epoch)
            text = parent + b",".join([b"%d" % token for token in tokens[start : start + size]])
            chain.append(hashlib.blake2b(text, digest_size=16).digest())

    def list_block(self, block: int, parent: bytes, tokens: Sequence[int], key: bytes | None) -> None:
        """From now on the block is found as the one that holds, or will hold, these tokens (key: its hash if full).

        A hash that another block has already keeps that block. Heads are listed when the tokens are filled in; one that
        many blocks have names the last of them.
        """
        entry = self.blocks[block]
        self._unlist_heads(block)
        entry.parent, entry.tokens = parent, tuple(tokens)
        if key is not None and key not in self.by_hash:
            self.by_hash[key] = block
            entry.hash = key
        if entry.filled >= len(entry.tokens):
            self._list_heads(block)

    def fill(self, block: int, slots: int) -> None:
        """The first `slots` slots are computed, or will be when the planned step has run."""
        entry = self.blocks[block]
        before, entry.filled = entry.filled, max(entry.filled, slots)
        if before < len(entry.tokens) <= entry.filled:
            self._list_heads(block)

    # ---- finding ----------------------------------------------------------------------------------------------------

    def find(self, chain: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Listed blocks that hold the beginning of `tokens`, first to last; takes no reference."""
        found = []
        for number, key in enumerate(chain):
            block = self.by_hash.get(key)
            start = number * self.block_size
            if block is None or self.blocks[block].tokens != tuple(tokens[start : start + self.block_size]):
                break
            found.append(block)
        return found

    def find_head(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """(block, count): the filled block behind `parent` with the longest common beginning; (0, 0) if there is none."""
        best = (0, 0)
        known = tuple(tokens[: self.block_size])
        lengths = {len(known), len(known) - 1, *range(HEAD, len(known), HEAD)}
        for length in sorted(lengths, reverse=True):
            if length <= best[1]:
                break
            block = self.by_head.get((parent, known[:length]))
            if block is None:
                continue
            entry = self.blocks[block]
            common = length
            while common < min(len(known), len(entry.tokens)) and entry.tokens[common] == known[common]:
                common += 1
            best = max(best, (block, min(common, entry.filled)), key=lambda found: found[1])
        return best

    # ---- holding ----------------------------------------------------------------------------------------------------

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
                if (
                    not entry.filled or not entry.tokens
                ):  # nobody can use it: reuse it before anything that can be found
                    self.free.move_to_end(block, last=False)

    def reset(self) -> None:
        """Forget all content (blocks that are held stay held). Those that were written come first again: their memory is
        taken already, where a fresh page costs more than the attention over it."""
        for block in range(1, self.num_blocks):
            if self.blocks[block].filled and block in self.free:
                self.free.move_to_end(block, last=False)
            self._forget(block)

    # ---- checking ---------------------------------------------------------------------------------------------------

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
                raise AssertionError(f"block {number} is listed by its hash with {len(block.tokens)} tokens")
            if not 0 <= block.filled <= self.block_size:
                raise AssertionError(f"block {number} is filled up to slot {block.filled} of {self.block_size}")
        if 0 in self.free or counts[0] or self.blocks[0].tokens:
            raise AssertionError("block 0, which means none, was handed out")
        stale = [block for key, block in self.by_hash.items() if self.blocks[block].hash != key]
        if stale:
            raise AssertionError(f"the index points to block {stale[0]}, which has another hash")
        for (parent, tokens), number in self.by_head.items():
            block = self.blocks[number]
            if (parent, tokens) != (block.parent, block.tokens[: len(tokens)]):
                raise AssertionError(f"the index points to block {number}, which begins with other tokens")

    def _forget(self, block: int) -> None:
        entry = self.blocks[block]
        if entry.hash is not None:
            del self.by_hash[entry.hash]
        self._unlist_heads(block)
        entry.hash, entry.tokens, entry.parent, entry.filled = None, (), b"", 0

    def _list_heads(self, block: int) -> None:
        for head in _heads(self.blocks[block]):
            self.by_head[head] = block

    def _unlist_heads(self, block: int) -> None:
        for head in _heads(self.blocks[block]):
            if self.by_head.get(head) == block:
                del self.by_head[head]


def _heads(block: Block) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """The keys under which a listed block's head is found."""
    known = len(block.tokens)
    for length in {known, *range(HEAD, known, HEAD)} - {0}:
        yield block.parent, block.tokens[:length]
