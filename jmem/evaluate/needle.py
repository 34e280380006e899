"""A grid of needles: which cells are still answered once a cache is cut.

A cell is one prompt: a length, a depth and a seed (`jmem.data.needle`). What the full
cache does not answer says nothing of a policy, so such cells are excluded, and counted.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jmem.data.needle import Haystack, NeedleCase, Wording, hit, needle_prompt
from jmem.evaluate.interval import wilson

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Retained(NamedTuple):
    """Cells still answered, of those that the full cache answers."""

    hits: int
    cells: int
    """Answered with the full cache."""
    excluded: int
    """Not answered even with the full cache."""

    @property
    def share(self) -> float | None:
        """Of the cells; None without any."""
        return self.hits / self.cells if self.cells else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's for `share`, at 95 %."""
        return wilson(self.hits, self.cells) if self.cells else None


def grid(
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    wording: Wording | None = None,
) -> list[NeedleCase]:
    """A case for each length, seed and depth, in that order, depth the fastest.

    Raises:
      DataError: what `needle_prompt` refuses, before any model runs.
    """
    return [
        needle_prompt(haystack, length=length, depth=depth, seed=seed, wording=wording)
        for length in lengths
        for seed in seeds
        for depth in depths
    ]


def batches(
    cases: Sequence[NeedleCase], batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " B"], Int[np.ndarray, "B T"]]]:
    """Places of cases, and their prompts, all of one length: `batch_size` at a time.

    The last of a length is filled up with its own first case again, so that every
    batch has one shape; `places` names only the cases that count.
    """
    for length in dict.fromkeys(case.length for case in cases):
        at = np.flatnonzero([case.length == length for case in cases])
        for start in range(0, len(at), batch_size):
            places = at[start : start + batch_size]
            rows = [*places, *[places[0]] * (batch_size - len(places))]
            yield places, np.asarray([cases[row].tokens for row in rows], np.int32)


def answer_steps(cases: Sequence[NeedleCase]) -> int:
    """Tokens to decode: the longest answer, and one that shows that it has ended."""
    return max(len(case.answer_tokens) for case in cases) + 1


def hits(
    tokenizer: "Tokenizer",
    cases: Sequence[NeedleCase],
    produced: Int[np.ndarray, "B steps"],
) -> Bool[np.ndarray, " B"]:
    """Whether each row of tokens gives its case's answer."""
    texts = [tokenizer.decode(row.tolist()) for row in np.asarray(produced)]
    pairs = zip(cases, texts, strict=True)
    return np.array([hit(case.answer, text) for case, text in pairs], bool)


def retained(full: Bool[np.ndarray, " N"], cut: Bool[np.ndarray, " N"]) -> Retained:
    """What a cut cache keeps of the full one's hits, cell by cell."""
    cells = int(full.sum())
    return Retained(int((full & cut).sum()), cells, len(full) - cells)
