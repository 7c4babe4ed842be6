"""The block manager's accounts, whatever is done to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler_svc.blocks import BlockManager


def test_worthless_blocks_go_before_cached_ones_and_those_in_order_of_last_use() -> None:
    blocks = BlockManager(4)
    a, b, c = blocks.take(3)
    blocks.publish([a, b], [b"a", b"b"])
    blocks.release([a])
    blocks.release([b])
    blocks.release([c])
    assert (blocks.free, blocks.cached, blocks.used) == (2, 2, 0)
    assert set(blocks.take(2)) == {c, 3}
    assert blocks.take(1) == [a]
    assert b"a" not in blocks.by_hash
    assert blocks.match([b"b"], 1) == [b]


def test_the_end_of_a_released_prefix_goes_before_its_beginning() -> None:
    blocks = BlockManager(3)
    table = blocks.take(3)
    blocks.publish(table, [b"1", b"2", b"3"])
    blocks.release(table)
    assert blocks.take(1) == [table[2]]
    assert blocks.match([b"1", b"2", b"3"], 3) == table[:2]


def test_a_hit_takes_a_cached_block_out_of_the_free_list() -> None:
    blocks = BlockManager(2)
    (a,) = blocks.take(1)
    blocks.publish([a], [b"a"])
    blocks.release([a])
    blocks.share(blocks.match([b"a"], 1))
    assert blocks.available == 1
    assert blocks.take(1) != [a]


def test_only_the_first_of_two_blocks_with_one_content_is_found() -> None:
    blocks = BlockManager(2)
    a, b = blocks.take(2)
    assert blocks.publish([a, b], [b"x", b"x"]) == [(a, b"x")]
    blocks.release([a, b])
    assert (blocks.cached, blocks.free) == (1, 1)


def test_a_match_ends_at_the_first_miss_and_at_its_limit() -> None:
    blocks = BlockManager(3)
    table = blocks.take(3)
    blocks.publish(table, [b"1", b"2", b"3"])
    assert blocks.match([b"1", b"?", b"3"], 3) == table[:1]
    assert blocks.match([b"1", b"2", b"3"], 2) == table[:2]


def test_adopted_blocks_are_cached_and_never_twice() -> None:
    blocks = BlockManager(2)
    assert blocks.adopt(1, b"x")
    assert not blocks.adopt(1, b"y")
    assert not blocks.adopt(0, b"x")
    assert (blocks.cached, blocks.free) == (1, 1)
    assert blocks.take(2) == [0, 1]


class Manager(RuleBasedStateMachine):
    """A model beside it: tables as lists, hashes as a set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12)
        self.tables: list[list[int]] = []
        self.names = 0

    @rule(n=st.integers(0, 6))
    def take(self, n: int) -> None:
        if n <= self.blocks.available:
            taken = self.blocks.take(n)
            held = {block for table in self.tables for block in table}
            assert not held & set(taken), "a block has two writers"
            assert all(self.blocks.hash_of[block] is None for block in taken)
            self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.release(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.blocks.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), fresh=st.booleans())
    def publish(self, data: st.DataObject, fresh: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.names += fresh
        self.blocks.publish(table, [b"%d-%d" % (self.names, i) for i in range(len(table))])

    @precondition(lambda self: self.blocks.by_hash)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.blocks.by_hash)))
        found = self.blocks.match([name], 1)
        self.blocks.share(found)
        self.tables.append(found)

    @rule(block=st.integers(0, 11))
    def forget(self, block: int) -> None:
        had = self.blocks.hash_of[block] is not None
        assert self.blocks.forget(block) == had

    @invariant()
    def accounts_agree(self) -> None:
        self.blocks.check([block for table in self.tables for block in table])
        assert self.blocks.free + self.blocks.cached + self.blocks.used == 12


TestManager = Manager.TestCase
TestManager.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
