"""The replay of XLA's buffer events, against a slow and obvious account."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmem.memory.hlo import ALLOC, FREE, SHARE, Buffer, Event
from jmem.memory.timeline import ReplayError, Timeline, replay


def event(kind, buffer, canonical=0):
    return Event(kind, buffer, canonical, f"op.{buffer}")


def sized(*sizes):
    return {n: Buffer(n, size, n, ()) for n, size in enumerate(sizes)}


def live(trace, lives):
    return [
        sum(life.bytes for life in lives if life.is_alive(n)) for n in range(len(trace))
    ]


def test_a_buffer_lives_from_allocation_to_freeing():
    trace = (*(event(ALLOC, 0), event(ALLOC, 1), event(FREE, 0), event(FREE, 1)),)
    assert live(trace, replay(trace, sized(100, 10))) == [100, 110, 10, 0]


def test_sharing_keeps_the_bytes_until_the_last_holder():
    trace = (*(event(ALLOC, 0), event(SHARE, 1, 0), event(FREE, 0), event(FREE, 1)),)
    (life,) = replay(trace, sized(100, 100))
    assert live(trace, [life]) == [100, 100, 100, 0]
    assert [holder for holder, *_ in life.holders] == [0, 1]


def test_sharing_revives_freed_bytes_as_another_life():
    """An in-place operation frees its operand before it takes the place."""
    trace = (*(event(ALLOC, 0), event(FREE, 0), event(SHARE, 1, 0), event(FREE, 1)),)
    lives = replay(trace, sized(100, 100))
    assert live(trace, lives) == [100, 0, 100, 0]
    assert len(lives) == 2


def test_sharing_with_a_sharer_shares_with_the_first():
    trace = (
        *(event(ALLOC, 0), event(SHARE, 1, 0), event(SHARE, 2, 1)),
        *(event(FREE, 0), event(FREE, 1), event(FREE, 2)),
    )
    (life,) = replay(trace, sized(7, 7, 7))
    assert (life.born, life.dies) == (0, 5)


def test_freeing_twice_is_an_error():
    trace = (event(ALLOC, 0), event(FREE, 0), event(FREE, 0))
    with pytest.raises(ReplayError, match=r"event 2: op\.0 is freed twice"):
        replay(trace, sized(8))


def test_what_is_never_freed_is_an_error():
    trace = (event(ALLOC, 0), event(ALLOC, 1), event(FREE, 1))
    with pytest.raises(ReplayError, match="8 bytes are alive after the last event"):
        replay(trace, sized(8, 16))


@st.composite
def traces(draw):
    """Buffers born and shared in any order, freed in any order, all in the end."""
    trace, held, sizes, roots = [], [], [], []
    for buffer in range(draw(st.integers(1, 12))):
        for _ in range(draw(st.integers(0, len(held)))):
            trace.append(event(FREE, held.pop(draw(st.integers(0, len(held) - 1)))))
        shared = draw(st.none() | st.integers(0, buffer - 1)) if buffer else None
        if shared is None:
            trace.append(event(ALLOC, buffer))
            roots.append(buffer)
            sizes.append(draw(st.integers(0, 1000)))
        else:
            trace.append(event(SHARE, buffer, shared))
            roots.append(roots[shared])
            sizes.append(sizes[shared])
        held.append(buffer)
    trace += [event(FREE, buffer) for buffer in draw(st.permutations(held))]
    return tuple(trace), sizes, roots


@given(traces())
def test_live_bytes_are_those_of_roots_with_a_holder(drawn):
    trace, sizes, roots = drawn
    holders, expected = set(), []
    for step in trace:
        (holders.discard if step.kind == FREE else holders.add)(step.buffer)
        expected.append(sum(sizes[root] for root in {roots[b] for b in holders}))
    assert live(trace, replay(trace, sized(*sizes))) == expected


def test_the_peak_is_the_first_of_equals():
    timeline = Timeline({"a": (1, 5, 2, 5), "b": (1, 0, 3, 0)}, ("",) * 4)
    assert timeline.live == (2, 5, 5, 5)
    assert (timeline.max(), timeline.peak, len(timeline)) == (5, 1, 4)
