"""A limit that a test can hold a program to, in anybody's CI, with no GPU there.

def test_training_step_fits_a_4090():
jmem.memory.assert_fits(step, params, batch, target="rtx4090", donate=(0,))
"""

from collections.abc import Callable
from typing import Any

from jmem.memory.measure import measure
from jmem.memory.report import GiB, MemoryReport
from jmem.program import Program
from jmem.targets import Target


class MemoryExceededError(AssertionError):
    """The program needs more than it may; `report` says what fills the peak."""

    def __init__(self, why: str, report: MemoryReport):
        super().__init__(f"{why}\n\n{report}")
        self.report = report


def assert_fits(
    what: Program | Callable,
    *args: Any,
    target: str | Target = "h200",
    budget_bytes: int | None = None,
    reserve: int = GiB,
    **options: Any,
) -> MemoryReport:
    """The report of a program that fits; else an AssertionError with the whole of it.

    Args:
      what: a `Program`, or a function with its arguments, as `jmem.measure` takes it.
      *args: the function's arguments, arrays or descriptions of arrays.
      target: the card.
      budget_bytes: the most device bytes, a device of a mesh, that the upper end of the
        interval may reach; by default the card's usable memory less `reserve`.
      reserve: bytes that must stay free on the card.
      **options: further arguments of `jmem.measure` (donate, static, labels, ...).

    Raises:
      MemoryExceededError: it needs more.
      ValueError: `budget_bytes` or `reserve` is negative.
    """
    if budget_bytes is not None and budget_bytes < 0:
        raise ValueError(
            f"assert_fits: budget_bytes={budget_bytes} must not be negative."
        )
    report = measure(what, *args, target=target, **options)
    verdict = report.fits(reserve)
    if budget_bytes is None and not verdict:
        raise MemoryExceededError(str(verdict), report)
    if budget_bytes is not None and report.interval[1] > budget_bytes:
        over = report.interval[1] - budget_bytes
        raise MemoryExceededError(
            f"{report.name} needs {report.interval[1]:,} bytes on {report.target}, "
            f"{over:,} more than budget_bytes={budget_bytes:,}.",
            report,
        )
    return report
