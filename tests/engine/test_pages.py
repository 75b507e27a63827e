"""Page accounting: nothing is lost, nothing is handed out twice, the oldest idle block goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pages import BLANK_PAGE, OutOfPages, PagePool, next_key, root_key


def test_takes_all_but_the_blank_page():
    pool = PagePool(5, 4)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert BLANK_PAGE == 0
    with pytest.raises(OutOfPages):
        pool.take(1)


def test_a_failed_take_takes_nothing():
    pool = PagePool(5, 4)
    with pytest.raises(OutOfPages):
        pool.take(5)
    assert pool.available == 4


def test_idle_blocks_stay_findable_until_their_pages_are_needed_oldest_first():
    pool = PagePool(5, 4)
    blocks = [pool.publish(bytes([i]), pool.take(1)) for i in range(4)]
    for block in blocks:
        pool.release(block)
    assert (pool.available, pool.cached) == (4, 4)
    pool.release(pool.hold(blocks[0]))  # used again: now the youngest
    pool.take(2)
    assert [pool.find(bytes([i])) is not None for i in range(4)] == [True, False, False, True]


def test_a_held_block_is_never_evicted():
    pool = PagePool(4, 4)
    block = pool.publish(b"k", pool.take(2))
    with pytest.raises(OutOfPages):
        pool.take(2)
    assert pool.find(b"k") is block


def test_a_forgotten_block_is_not_found_and_its_pages_return():
    pool = PagePool(4, 4)
    block = pool.publish(b"k", pool.take(3), label="x")
    assert pool.labels() == ("x",)
    pool.forget(block)
    assert pool.find(b"k") is None
    pool.release(block)
    assert (pool.available, pool.cached) == (3, 0)


def test_keys_depend_on_every_part():
    assert root_key("a", "bc") != root_key("ab", "c")
    assert next_key(root_key("a"), [1, 2]) != next_key(root_key("a"), [1]) != next_key(root_key("b"), [1])
    assert next_key(next_key(root_key("a"), [1]), [2]) != next_key(root_key("a"), [1, 2])


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "publish", "hold", "release"]), st.integers(0, 9))))
def test_pages_are_conserved(actions):
    pool, private, held = PagePool(12, 4), [], []
    for action, number in actions:
        if action == "take" and number <= pool.available:
            private += pool.take(number)
        elif action == "give" and private:
            pool.give_back([private.pop()])
        elif action == "publish" and private and (block := pool.publish(bytes([number]), [private[-1]])):
            private.pop()
            held.append(block)
        elif action == "hold" and (block := pool.find(bytes([number]))):
            held.append(pool.hold(block))
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        in_use = {*private, *(page for block in held for page in block.pages)}
        assert len(in_use) == len(private) + len({block.key for block in held})
        assert pool.available == pool.capacity - len(in_use)
        assert BLANK_PAGE not in in_use
