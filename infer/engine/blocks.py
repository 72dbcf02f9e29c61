"""Blocks of the key/value cache: who holds which, and which prefixes they know. No JAX here.

A block stands for `block_size` neighbouring tokens of a row. Rows that begin with the same tokens
hold the same blocks, each counted once for every holder. A block whose content is known by a key
stays when its last holder goes, and is given away only when no other is left, the one longest
unused first.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


class OutOfBlocksError(Exception):
    """Fewer blocks are free than are asked for."""


@dataclass(frozen=True)
class CacheScope:
    """Prefixes are shared only where all of these agree."""

    model_version: str
    adapter: str
    tenant: str


def block_keys(
    scope: CacheScope, tokens: Sequence[int], shapes: Sequence[int], block_size: int
) -> list[bytes]:
    """A key for each whole block of `tokens`: of all tokens up to its end, and of the scope.

    shapes: for each block the padded length of the step that computes it. Sums of other lengths
    may differ in their last bits, so such blocks are not the same.
    """
    names = (scope.model_version, scope.adapter, scope.tenant)
    parent = hashlib.sha256(repr(names).encode()).digest()
    keys = []
    for number in range(len(tokens) // block_size):
        part = tuple(tokens[number * block_size : (number + 1) * block_size])
        content = repr((shapes[number], part)).encode()
        parent = hashlib.sha256(parent + content).digest()
        keys.append(parent)
    return keys


class BlockManager:
    """Hands out blocks 0 to num_blocks - 1. Every method leaves all counts consistent, also when
    it raises."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._unheld: OrderedDict[int, None] = OrderedDict()  # known by a key, oldest first
        self._holders: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether or not their content is still known."""
        return len(self._empty) + len(self._unheld)

    def num_holders(self, block: int) -> int:
        return self._holders[block]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `keys`. Nothing is held by looking."""
        found = []
        for key in keys:
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def hold(self, shared: Sequence[int], num_new: int) -> list[int]:
        """Holds the `shared` blocks and `num_new` others: all of them, in this order.

        Raises OutOfBlocksError, and holds none, when there are not as many.
        """
        reusable = sum(1 for block in shared if block in self._unheld)
        if num_new > self.num_free - reusable:
            raise OutOfBlocksError
        for block in shared:
            self._unheld.pop(block, None)
            self._holders[block] += 1
        return [*shared, *(self._take() for _ in range(num_new))]

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._unheld.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def name(self, block: int, key: bytes) -> bool:
        """Makes the content of a held block known by `key`; False when another block has it."""
        assert self._holders[block] > 0
        if key in self._block_of or block in self._key_of:
            return False
        self._block_of[key], self._key_of[block] = block, key
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Ends one holding of each block. The last block of a prefix is given away first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._unheld[block] = None
            else:
                self._empty.append(block)

    def forget(self) -> None:
        """No prefix is known any more; blocks that are held stay held."""
        self._empty += self._unheld
        self._unheld.clear()
        self._block_of.clear()
        self._key_of.clear()
