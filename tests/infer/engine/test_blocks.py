"""Blocks: none leaked, none shared by those who must not, none given away while it is held."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from infer.engine.blocks import BlockManager, CacheScope, OutOfBlocksError, block_keys

SCOPE = CacheScope("v1", "", "")
NUM_BLOCKS = 7


class Blocks(RuleBasedStateMachine):
    """Holders come and go; a model of who holds what is kept beside the manager."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, 2)
        self.held: list[tuple[list[int], list[bytes]]] = []
        self.content: dict[int, bytes] = {}  # what was last written to each block

    @rule(tokens=st.lists(st.integers(0, 1), min_size=0, max_size=8), extra=st.integers(0, 2))
    def hold(self, tokens, extra):
        keys = block_keys(SCOPE, tokens, [2] * len(tokens), 2)
        shared = self.manager.find(keys)
        for block, key in zip(shared, keys, strict=False):
            assert self.content[block] == key, "a block no longer holds what it is known for"
        before = self.manager.num_free
        try:
            blocks = self.manager.hold(shared, len(keys) - len(shared) + extra)
        except OutOfBlocksError:
            assert self.manager.num_free == before
            return
        assert blocks[: len(shared)] == shared
        others = {block for held, _ in self.held for block in held}
        assert not others & set(blocks[len(shared) :]), "a new block is somebody's already"
        for number in range(len(shared), len(blocks)):
            self.content[blocks[number]] = b"other"
        for number in range(len(shared), len(keys)):
            if self.manager.name(blocks[number], keys[number]):
                self.content[blocks[number]] = keys[number]
        self.held.append((blocks, keys))

    @rule(which=st.integers(0, 10))
    def release(self, which):
        if self.held:
            blocks, _ = self.held.pop(which % len(self.held))
            self.manager.release(blocks)

    @rule()
    def forget(self):
        self.manager.forget()
        assert self.manager.find(block_keys(SCOPE, [0, 0], [2], 2)) == []

    @invariant()
    def counts_agree(self):
        holders = [block for blocks, _ in self.held for block in blocks]
        for block in range(NUM_BLOCKS):
            assert self.manager.num_holders(block) == holders.count(block)
        assert self.manager.num_free == NUM_BLOCKS - len(set(holders))

    def teardown(self):
        for blocks, _ in self.held:
            self.manager.release(blocks)
        assert self.manager.num_free == NUM_BLOCKS


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlocks = Blocks.TestCase


@pytest.mark.parametrize("field", ["model_version", "adapter", "tenant"])
def test_prefixes_are_known_only_within_version_adapter_and_tenant(field):  # R105
    import dataclasses

    other = dataclasses.replace(SCOPE, **{field: "other"})
    tokens, shapes = list(range(8)), [4, 4]
    keys, others = (block_keys(scope, tokens, shapes, 4) for scope in (SCOPE, other))
    assert not set(keys) & set(others)


def test_names_of_a_scope_do_not_run_together():
    one, other = CacheScope("a", "b", "c"), CacheScope("a', 'b", "", "c")
    assert block_keys(one, [1, 2], [2], 2) != block_keys(other, [1, 2], [2], 2)


def test_a_block_is_known_by_everything_before_it_and_by_how_it_was_computed():
    plain = block_keys(SCOPE, [1, 2, 3, 4], [8, 8], 2)
    assert block_keys(SCOPE, [9, 2, 3, 4], [8, 8], 2)[1] != plain[1]
    assert block_keys(SCOPE, [1, 2, 3, 4], [8, 4], 2)[0] == plain[0]
    assert block_keys(SCOPE, [1, 2, 3, 4], [8, 4], 2)[1] != plain[1]
    assert len(block_keys(SCOPE, [1, 2, 3], [8], 2)) == 1  # only whole blocks


def test_the_block_longest_unused_is_given_away_first():
    manager = BlockManager(2, 1)
    first, second = manager.hold([], 2)
    assert manager.name(first, b"first") and manager.name(second, b"second")
    manager.release([first])
    manager.release([second])
    assert manager.find([b"first"]) == [first]
    manager.hold([], 1)
    assert manager.find([b"first"]) == [] and manager.find([b"second"]) == [second]


def test_two_who_compute_the_same_content_keep_one_name():
    manager = BlockManager(2, 1)
    first, second = manager.hold([], 2)
    assert manager.name(first, b"key")
    assert not manager.name(second, b"key")
    manager.release([first, second])
    assert manager.num_free == 2 and manager.find([b"key"]) == [first]
