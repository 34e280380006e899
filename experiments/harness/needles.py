"""Needles that are still answered: the table by cache and length, and maps of cells."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness import plots
from experiments.harness.comparison import Outcome, draw_curves, mean_share
from experiments.harness.report import Column, make_columns, mib, percent, share
from experiments.harness.run import Run
from jmem.evaluate.compare import join
from jmem.evaluate.interval import wilson
from jmem.evaluate.needle import FilteredNeedles, Needles, Retained, count_retained

ENOUGH = 2 / 3
"""Of the cells, what the full cache must answer for the others to be compared."""
KEPT = 0.95
"""Of the needles, what a policy should keep at `PICTURED`; of one that keeps less, the
report names the cells that it lost."""
PICTURED = 0.125
"""The share whose needles are drawn cell by cell, or the nearest one that was run."""


class Cells:
    """Needles of all lengths that were asked, by contender, length and depth."""

    def __init__(self, outcomes: Sequence[Outcome[Needles]]):
        self._cases = [own.task.cases[at] for own in outcomes for at in own.places]
        self.scores = join(own.scores for own in outcomes)
        self.lengths = list(dict.fromkeys(case.length for case in self._cases))
        self.depths = sorted({case.depth for case in self._cases})

    def __len__(self) -> int:
        return len(self._cases)

    def select(self, **fields: Any) -> np.ndarray:
        """Bool [N]: the cells of one length, depth or both."""
        found = [
            all(getattr(case, name) == value for name, value in fields.items())
            for case in self._cases
        ]
        return np.array(found, bool)

    def count_kept(self, name: str, **fields: Any) -> Retained:
        """What a contender still answers of what the full cache answers.

        Of all cells, or of those of one length, depth or both, as `select` takes them.
        """
        mine = self.select(**fields)
        return count_retained(self.scores["full"][mine], self.scores[name][mine])

    def describe_lost(self, name: str) -> str:
        """Where a contender lost needles, in words."""
        whole, where = self.count_kept(name), []
        for length in self.lengths:
            missed = [
                f"{share(depth)} ({own.cells - own.hits})"
                for depth in self.depths
                if (own := self.count_kept(name, length=length, depth=depth)).hits
                < own.cells
            ]
            if missed:
                where.append(f"{length:,} tokens at depth {', '.join(missed)}")
        return (
            f"{name} lost {whole.cells - whole.hits} of {whole.cells}: "
            f"{'; '.join(where)}"
        )


def draw_cells(
    run: Run,
    cells: Cells,
    drawn: Mapping[str, str],
    count: Callable[..., tuple[int, int]],
    title: str,
) -> None:
    """`needles.png`: hits by length and depth, for contenders by the names they get.

    `count(contender, length=, depth=)` are the hits of a cell, and of how many.
    """
    panels = {
        shown: [
            [count(name, length=length, depth=depth) for length in cells.lengths]
            for depth in cells.depths
        ]
        for shown, name in drawn.items()
    }
    run.plot(
        "needles",
        lambda: plots.draw_cells(
            panels,
            rows=[share(depth) for depth in cells.depths],
            columns=[f"{length:,}" for length in cells.lengths],
            row_label="depth of the needle",
            column_label="tokens of the prompt",
            title=title,
        ),
    )


def report_kept(
    run: Run, outcomes: Sequence[Outcome[Needles]], *, note: str
) -> list[plots.Panel]:
    """Needles that are still found, of those that the full cache finds."""
    cells, longest = Cells(outcomes), max(outcomes, key=lambda own: own.task.prompt)
    rows, contenders = [], longest.contenders
    for name, contender in contenders.items():
        own, plan = cells.count_kept(name), contender.plan
        size = plan.bytes() // plan.batch_size, mean_share(outcomes, name)
        kept = own.hits, own.cells, own.share, *(own.interval or (None, None))
        each = (cells.count_kept(name, length=length).share for length in cells.lengths)
        rows.append((name, *size, *kept, *each))
    size = Column(f"at {longest.task.prompt:,}", mib), Column("of full", percent)
    lengths = (f"{length:,}" for length in cells.lengths)
    kept = make_columns(percent, "kept", "from", "to", *lengths)
    run.table("Needles kept", ["cache", *size, "hits", "of", *kept], rows)
    full = cells.count_kept("full")
    words = (
        f"{full.cells} of {len(cells)} cells count: the full cache does not answer the "
        f"other {full.excluded}. from and to: Wilson's interval, 95 %. The last "
        f"columns: kept at each length. {note}"
    )
    if full.cells < ENOUGH * len(cells):
        words += " TOO FEW to compare policies by: give a model that finds its needles."
    run.note(words)
    pictured = min(
        (own.share for own in contenders.values() if own.method != "full"),
        key=lambda budget: abs(budget - PICTURED),
    )
    drawn = {
        own.method: name
        for name, own in contenders.items()
        if own.method == "full" or own.share == pictured
    }
    lost = [
        cells.describe_lost(name)
        for name in drawn.values()
        if (kept := cells.count_kept(name).share) is not None and kept < KEPT
    ]
    if lost:
        run.note("\n".join([f"Below {share(KEPT)}:", *lost]))
    draw_cells(
        *(run, cells, drawn, lambda name, **at: cells.count_kept(name, **at)[:2]),
        title=f"Needles kept in {share(pictured)} of the full cache's bytes",
    )
    return draw_curves(
        outcomes,
        title=f"Needles, {full.cells} prompts, 95 % intervals",
        label="still found",
        percent=True,
    )


def report_answered(
    run: Run,
    outcomes: Sequence[Outcome[FilteredNeedles]],
    *,
    title: str,
    note: str,
) -> list[plots.Panel]:
    """Needles that are answered, of all, and what filters kept.

    Those of the first share are drawn cell by cell, under `title`.
    """
    cells, contenders = Cells(outcomes), outcomes[0].contenders
    rows = []
    for name, contender in contenders.items():
        hits, *kept = cells.scores[name].T
        right, count = int(hits.sum()), len(hits)
        means = [float(part.mean()) if contender.filter else None for part in kept]
        share = right / count
        rows.append((name, right, count, share, *wilson(right, count), *means))
    heads = "share", "low", "high", "needle kept", "last token kept"
    columns = ["contender", "hits", "of", *make_columns(percent, *heads)]
    run.table("Needles answered", columns, rows)
    seeds = len({case.seed for own in outcomes for case in own.task.cases})
    run.note(
        f"{len(cells.lengths)} lengths x {len(cells.depths)} depths x {seeds} seeds; "
        f"low and high bound the share (Wilson, 95 %). {note}"
    )
    shares = [own.share for own in contenders.values()][:2]  # the full cache, the first
    drawn = {name: name for name, own in contenders.items() if own.share in shares}

    def count_hits(name: str, **at: Any) -> tuple[int, int]:
        hits = cells.scores[name][cells.select(**at), 0]
        return int(hits.sum()), len(hits)

    draw_cells(run, cells, drawn, count_hits, title)
    return []
