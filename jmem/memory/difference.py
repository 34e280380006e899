"""What changed between two reports: by kind, and by scope.

    print(jmem.memory.diff(before, after))

The two need not be of one program: a method beside its baseline, a shape beside a
longer one, a card beside another, all read the same.
"""

import dataclasses
from collections.abc import Mapping

from jmem.memory.escape import escape_all
from jmem.memory.report import WIDTH, MemoryReport, format_size


@dataclasses.dataclass(frozen=True)
class Change:
    """One kind or scope in both reports."""

    name: str
    before_bytes: int
    after_bytes: int

    @property
    def bytes(self) -> int:
        """What it grew by; negative where it shrank."""
        return self.after_bytes - self.before_bytes


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two reports side by side; prints as a table."""

    before: str
    after: str
    device: Change
    host: Change
    by_kind: tuple[Change, ...]
    """The change of each kind, largest first; they sum to that of the device bytes."""
    by_scope: tuple[Change, ...]
    """As `by_kind`, of the buffers alive at each peak; fragmentation is in neither."""

    def __str__(self):
        return self.table()

    def table(self, top: int = 12) -> str:
        """Kinds, then the `top` scopes that changed most, as text of 88 columns."""
        self = escape_all(self)
        head = f"{'':<44}{'before':>14}{'after':>14}{'change':>16}"
        lines = [f"{self.before}  →  {self.after}", "", head, "─" * WIDTH]
        on_host = self.host.before_bytes or self.host.after_bytes
        lines += map(_format_change, (self.device, *([self.host] if on_host else [])))
        for title, changes in (("by kind", self.by_kind), ("by scope", self.by_scope)):
            lines += ["", title, "─" * WIDTH, *map(_format_change, changes[:top])]
            if len(changes) > top:
                left = changes[top:]
                lines.append(
                    _format_change(
                        Change(
                            f"{len(left)} smaller changes",
                            sum(change.before_bytes for change in left),
                            sum(change.after_bytes for change in left),
                        )
                    )
                )
            if not changes:
                lines.append("nothing")
        return "\n".join(lines)


def diff(before: MemoryReport, after: MemoryReport) -> Difference:
    """The change from one report to another, per device of their meshes."""
    return Difference(
        before=f"{before.name} on {before.target}",
        after=f"{after.name} on {after.target}",
        device=Change("device", before.device_bytes, after.device_bytes),
        host=Change("host", before.host_bytes, after.host_bytes),
        by_kind=_list_changes(before.by_kind, after.by_kind),
        by_scope=_list_changes(before.by_scope(), after.by_scope()),
    )


def _list_changes(
    before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[Change, ...]:
    names = [*before, *(name for name in after if name not in before)]
    changes = [Change(n, before.get(n, 0), after.get(n, 0)) for n in names]
    changed = (change for change in changes if change.bytes)
    return tuple(sorted(changed, key=lambda change: -abs(change.bytes)))


def _format_change(change: Change) -> str:
    name = change.name if len(change.name) < 44 else f"…{change.name[-42:]}"
    sizes = format_size(change.before_bytes), format_size(change.after_bytes)
    grown = f"{'+' if change.bytes > 0 else '-'}{format_size(abs(change.bytes))}"
    return f"{name:<44}{sizes[0]:>14}{sizes[1]:>14}{grown:>16}"
