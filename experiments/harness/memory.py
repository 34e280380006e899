"""What programs take on the described GPU: compiled, recorded, tabulated and drawn.

memory.report(
    run,
    programs(config, run.target),
    title=f"Memory on {run.target.name}",
    columns=["cache", Column("prefill", gib), Column("decode", gib)],
    rows=lambda found: [(name, *peaks(found, name)) for name in caches],
    note="Peaks hold the weights.",
    picture="smollm2-135m, 1 x 2,048 tokens",
)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape

import jmem
from experiments.harness import plots
from experiments.harness.report import (
    Column,
    GiB,
    gib,
    gib_number,
    make_columns,
    seconds,
)
from experiments.harness.run import Run
from jmem.memory.measure import IDLE
from jmem.memory.report import MemoryReport
from jmem.program import Program
from jmem.targets import TARGETS

Reports = Mapping[str, MemoryReport]
"""By program."""

FIT = (
    *("method", *make_columns(gib, "device", "at most")),
    *("fits", Column("compiled in", seconds)),
)
"""Columns of `list_fits`: one program a row."""


def list_fits(found: Reports) -> Iterable[Sequence[Any]]:
    """Peak of each program, upper end of its interval, and whether that fits."""
    for name, own in found.items():
        yield (
            *(name, own.device_bytes, max(own.interval)),
            *(bool(own.fits()), own.compile_seconds),
        )


def measure(run: Run, programs: Mapping[str, Program], *, bounds: bool = True) -> None:
    """Compiles the programs for the run's target, and records them.

    With `bounds` each is compiled twice, for the interval of its size.
    """
    for name, program in programs.items():
        with run.console.status(escape(f"compiling {name}")):
            found = jmem.measure(program, target=run.target, bounds=bounds)
        run.record(found, name)


def report(
    run: Run,
    programs: Mapping[str, Program],
    *,
    title: str,
    columns: Iterable[str | Column] = FIT,
    rows: Callable[[Reports], Iterable[Sequence[Any]]] = list_fits,
    note: str = "",
    picture: str,
    kinds: bool = False,
    bounds: bool = True,
) -> None:
    """Measures the programs; a table, a note and a picture of what they take.

    Args:
      run: where all of it goes.
      programs: what is compiled, by name.
      title: of the table.
      columns: its heads; the first names the row.
      rows: of every report so far, by program, the table's rows.
      note: what a reader must know beside the table.
      picture: the title of `memory.png`, a bar a program.
      kinds: first a table of every program by kind of memory.
      bounds: as `measure`.
    """
    measure(run, programs, bounds=bounds)
    for words in explain(run.memory):
        run.note(words)
    if kinds:
        tabulate_kinds(run)
    run.table(title, columns, rows(run.memory))
    if note:
        run.note(note)
    run.plot("memory", lambda: plots.draw_memory(run.memory, title=picture))


def explain(found: Reports, reserve: int = GiB) -> list[str]:
    """Which programs do not fit their card, and what would; on a mesh, what idles."""
    words = (
        [f"note: {IDLE}"] if any(IDLE in own.flags for own in found.values()) else []
    )
    verdicts = {name: own.fits(reserve) for name, own in found.items()}
    too_large = [name for name, verdict in verdicts.items() if not verdict]
    if too_large:
        fitting = ", ".join(name for name, verdict in verdicts.items() if verdict)
        words.append(
            f"{', '.join(too_large)}: does not fit {verdicts[too_large[0]].target}; "
            + (f"{fitting} would." if fitting else "none of these would.")
        )
        words += [
            f"{name} would fit {name_cards(verdicts[name].needed_bytes, reserve)}."
            for name in too_large
        ]
    return words


def name_cards(needed_bytes: int, reserve: int = GiB) -> str:
    """The three smallest cards that so many bytes fit, in words.

    >>> name_cards(70 * 2**30)
    'h100 (77.1 GiB usable), a100-80 (77.3) or gh200 (92.5)'
    """
    cards = sorted(TARGETS.values(), key=lambda card: card.usable_bytes)
    fitting = [c for c in cards if c.usable_bytes - reserve >= needed_bytes][:3]
    if not fitting:
        return f"no card alone; the largest, {cards[-1].name}, has " + gib(
            cards[-1].usable_bytes
        )
    named = [f"{card.name} ({card.usable_bytes / GiB:.1f})" for card in fitting]
    named[0] = named[0][:-1] + " GiB usable)"
    return " or ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def tabulate_kinds(run: Run) -> None:
    """Every recorded program by kind of memory, in GiB; a column sums to its peak.

    Kinds below half a percent of every program's peak share the row "other".
    """
    reports = list(run.memory.values())
    totals = [own.device_bytes for own in reports]
    kinds = dict.fromkeys(kind for own in reports for kind in own.by_kind)
    rows = {kind: [own.by_kind.get(kind, 0) for own in reports] for kind in kinds}
    rows = {
        kind: row
        for kind, row in rows.items()
        if any(size * 200 > total for size, total in zip(row, totals))
    }
    other = [total - sum(sizes) for total, *sizes in zip(totals, *rows.values())]
    rows |= {"other": other} if any(other) else {}
    lines = [(kind, *row) for kind, row in (rows | {"total": totals}).items()]
    columns = ["kind", *make_columns(gib_number, *run.memory)]
    run.table(f"Memory at the peak on {reports[0].target}, GiB", columns, lines)
