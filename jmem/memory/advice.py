"""Waste that a report can name: memory a small change to the program would free."""

from collections import Counter
from collections.abc import Sequence

from jmem.memory import kinds
from jmem.memory.breakdown import Row
from jmem.program import Program

WORTH = 0.01
"""Share of the peak below which a saving is not mentioned."""
LEAST = 2**20
"""Bytes below which it is not."""
STATE = {kinds.PARAMETERS, kinds.OPTIMIZER, kinds.KV_CACHE}


def advise(program: Program, rows: Sequence[Row]) -> tuple[str, ...]:
    """What would free memory, and how many bytes of it; nothing below 1 % of all."""
    floor = max(LEAST, WORTH * sum(row.total_bytes for row in rows))
    found = (_not_donated(program, rows), _rebuilt(program, rows))
    return tuple(text for saved, text in found if saved >= floor)


def _not_donated(program: Program, rows: Sequence[Row]) -> tuple[int, str]:
    """Results that could take over the memory of state of their shape."""
    names = program.argument_names()
    kept = {names[n]: n for n in range(len(program.args)) if n not in program.donate}
    results = Counter()
    for row in rows:
        if row.kind == kinds.OUTPUTS:
            results[row.shape] += row.count
    saved: Counter[str] = Counter()
    for row in rows:
        owner = row.name.split("/")[0]
        fixed = row.born is None and row.kind in STATE and owner in kept
        if fixed and results[row.shape]:
            matched = min(row.count, results[row.shape])
            results[row.shape] -= matched
            saved[owner] += matched * row.bytes
    if not saved:
        return 0, ""
    positions = tuple(sorted(kept[name] for name in saved))
    which = " and ".join(repr(names[n]) for n in positions)
    return saved.total(), (
        f"{saved.total():,} bytes of results have the shapes of {which}, not donated. "
        f"With donate={positions} they would take over that memory."
    )


def _rebuilt(program: Program, rows: Sequence[Row]) -> tuple[int, str]:
    """A donated cache that a loop builds anew beside the old one."""
    names = {program.argument_names()[n] for n in program.donate}
    cache = [row for row in rows if row.kind == kinds.KV_CACHE]
    held = [r for r in cache if r.born is None and r.name.split("/")[0] in names]
    shapes = {row.shape for row in held}
    copies = [row for row in cache if row.born and row.shape in shapes]
    if not copies:
        return 0, ""
    saved = sum(row.total_bytes for row in copies)
    name = held[0].name.split("/")[0]
    source = next((row.source for row in copies if row.source), "")
    where = f" at {'/'.join(source.split('/')[-2:])}" if source else ""
    return saved, (
        f"{name!r} is donated, but {saved:,} bytes of it are built anew{where}. "
        "Carry it through the scan and update it in place, instead of scanning over it."
    )
