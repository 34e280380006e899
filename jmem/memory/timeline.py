"""Live bytes over the run of one program: XLA's own plan, replayed event by event.

XLA plans all temporaries into one block ahead of time and writes down when each buffer
is born, shared and freed. Replaying that gives the live bytes at every instant, and
which values were alive at the worst one.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from jmem.memory.hlo import ALLOC, FREE, SHARE, Buffer, Event


@dataclasses.dataclass(frozen=True)
class Life:
    """The bytes of one buffer, from birth to death."""

    bytes: int
    born: int
    """Index of the event that brought it to life."""
    dies: int
    holders: tuple[tuple[int, int, int], ...]
    """Values that lay in these bytes: (buffer, first event, last event)."""

    def is_alive(self, event: int) -> bool:
        """Whether the bytes are taken after that event."""
        return self.born <= event < self.dies


class ReplayError(RuntimeError):
    """XLA's account of its buffers does not add up as it is understood here."""


def replay(trace: tuple[Event, ...], buffers: Mapping[int, Buffer]) -> list[Life]:
    """The lives of all buffers of a trace, by order of birth.

    A buffer that shares the bytes of another keeps them alive, or revives them. Loop
    bodies run once: XLA reuses their buffers in every round.

    Raises:
      ReplayError: a buffer is freed twice, or one is still alive at the end.
    """
    canonical: dict[int, int] = {}
    living: dict[int, dict[int, int]] = {}  # canonical -> holder -> first event
    past: dict[int, list[tuple[int, int, int]]] = {}
    born: dict[int, int] = {}
    lives = []
    for number, event in enumerate(trace):
        if event.kind == ALLOC:
            root = canonical[event.buffer] = event.buffer
        elif event.kind == SHARE:
            root = canonical[event.buffer] = canonical[event.canonical]
        else:
            root = canonical[event.buffer]
        holders = living.setdefault(root, {})
        if event.kind != FREE:
            if not holders:
                born[root], past[root] = number, []
            holders[event.buffer] = number
            continue
        if event.buffer not in holders:
            raise ReplayError(f"event {number}: {event.instruction} is freed twice.")
        past[root].append((event.buffer, holders.pop(event.buffer), number))
        if not holders:
            lives.append(
                Life(buffers[root].bytes, born[root], number, tuple(past[root]))
            )
    left = sum(buffers[root].bytes for root, holders in living.items() if holders)
    if left:
        raise ReplayError(f"{left:,} bytes are alive after the last event.")
    return sorted(lives, key=lambda life: life.born)


def count_live_bytes(lives: Iterable[tuple[int, int, int]], instants: int) -> list[int]:
    """Bytes alive at each of `instants` instants.

    A life is (first, end, bytes): it begins at instant `first`, and `end` is the first
    instant at which it is over.
    """
    change = [0] * (instants + 1)
    for first, end, held in lives:
        change[first] += held
        change[end] -= held
    return list(itertools.accumulate(change[:instants]))


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Live device bytes at every instant, by kind.

    Instant 0 is before the first event: arguments, outputs and constants alone, which
    live as long as the program. Instant n is after event n.
    """

    by_kind: dict[str, tuple[int, ...]]
    """Live bytes of a kind at every instant; kinds that never live are left out."""
    phases: tuple[str, ...]
    """What runs at an instant: "forward", "backward", "update"; "" when unknown."""

    @property
    def live(self) -> tuple[int, ...]:
        """Live bytes at every instant."""
        return tuple(map(sum, zip(*self.by_kind.values())))

    def max(self) -> int:
        """The most bytes alive at once."""
        return max(self.live)

    @property
    def peak(self) -> int:
        """The first instant at which the most bytes are alive."""
        return self.live.index(self.max())

    def __len__(self) -> int:
        return len(self.phases)
