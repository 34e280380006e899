"""A grid of needles: which cells are still answered once a cache is cut.

A cell is one prompt: a length, a depth and a seed (`jmem.data.needle`). What the full
cache does not answer says nothing of a policy, so such cells are excluded, and counted.

    haystack = Haystack(tokenizer, text)
    tasks = hide_needles(haystack, lengths=(512, 2048), depths=(0.0, 0.5), seeds=(0, 1))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jmem.data.needle import Haystack, NeedleCase, is_hit, make_needle_prompt
from jmem.evaluate.decoding import Context
from jmem.evaluate.interval import wilson
from jmem.evaluate.task import Prompts, Summary, Task

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


def make_grid(
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
) -> list[NeedleCase]:
    """A case for each length, seed and depth, in that order, depth the fastest.

    Raises:
      DataError: what `make_needle_prompt` refuses, before any model runs.
    """
    return [
        make_needle_prompt(haystack, length=length, depth=depth, seed=seed)
        for length in lengths
        for seed in seeds
        for depth in depths
    ]


def count_answer_steps(cases: Sequence[NeedleCase]) -> int:
    """Tokens to decode: the longest answer, and one that shows that it has ended."""
    return max(len(case.answer_tokens) for case in cases) + 1


def find_hits(
    tokenizer: "Tokenizer",
    cases: Sequence[NeedleCase],
    produced: Int[np.ndarray, "B steps"],
) -> Bool[np.ndarray, " B"]:
    """Whether each row of tokens gives its case's answer."""
    texts = [tokenizer.decode(row.tolist()) for row in np.asarray(produced)]
    pairs = zip(cases, texts, strict=True)
    return np.array([is_hit(case.answer, text) for case, text in pairs], bool)


def count_retained(
    full: Bool[np.ndarray, " N"], cut: Bool[np.ndarray, " N"]
) -> Retained:
    """What a cut cache keeps of the full one's hits, cell by cell."""
    cells = int(full.sum())
    return Retained(int((full & cut).sum()), cells, len(full) - cells)


class Needles(Task):
    """Cells of one length; a score is whether the needle is answered.

    A summary is the share kept of what the full cache answers, with Wilson's interval.
    `steps` are those of all lengths together (`count_answer_steps`), if others follow.

    Raises:
      ValueError: what `Task` refuses, or cases of several lengths.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        cases: Sequence[NeedleCase],
        *,
        steps: int | None = None,
    ):
        lengths = sorted({case.length for case in cases})
        if len(lengths) != 1:
            raise ValueError(
                f"Needles: cases have the lengths {lengths}; need those of one, which "
                "caches are planned for."
            )
        super().__init__(
            f"needles {lengths[0]}",
            [case.tokens for case in cases],
            prompt=lengths[0],
            steps=steps or count_answer_steps(cases),
        )
        self.cases, self._tokenizer = cases, tokenizer

    def score(
        self, produced: Int[np.ndarray, "N steps"], places: Sequence[int]
    ) -> Bool[np.ndarray, " N"]:
        return find_hits(
            self._tokenizer, [self.cases[place] for place in places], produced
        )

    def summary(
        self, full: Bool[np.ndarray, " N"], own: Bool[np.ndarray, " N"]
    ) -> Summary:
        kept = count_retained(full, own)
        whole = 1.0 if kept.cells else None
        return Summary(kept.share, kept.interval, whole, kept.cells)


class FilteredNeedles(Needles):
    """Needles, and what a filter keeps of each prompt.

    A score is three numbers: whether the needle is answered, the share of its tokens
    that are kept, and whether the prompt's last token is. The summary is that of the
    answers.
    """

    def produce(
        self, model, params: dict, context: Context, prompts: Prompts
    ) -> Int[np.ndarray, "B N"]:
        """Greedy answers, and behind those of a filter the positions that it kept."""
        answers = super().produce(model, params, context, prompts)
        if context.positions is None:
            return answers
        return np.hstack([answers, context.positions])

    def score(
        self, produced: Int[np.ndarray, "N S"], places: Sequence[int]
    ) -> Float[np.ndarray, "N 3"]:
        hits = super().score(produced[:, : self.steps], places)
        kept = produced[:, self.steps :]
        if not kept.shape[1]:  # nothing was filtered
            return np.stack([hits] * 3, axis=1).astype(float)
        spans = np.array([self.cases[place].span for place in places])
        inside = (kept >= spans[:, :1]) & (kept < spans[:, 1:])
        share = inside.sum(axis=1) / (spans[:, 1] - spans[:, 0])
        last = (kept == self.prompt - 1).any(axis=1)
        return np.stack([hits, share, last], axis=1)

    def summary(
        self, full: Float[np.ndarray, "N 3"], own: Float[np.ndarray, "N 3"]
    ) -> Summary:
        return super().summary(full[:, 0] > 0, own[:, 0] > 0)


def hide_needles[Kind: Needles](
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    kind: type[Kind] = Needles,
) -> list[Kind]:
    """The cases of `make_grid` as tasks, one a length; all decode as many tokens."""
    cases = make_grid(haystack, lengths=lengths, depths=depths, seeds=seeds)
    return [
        kind(
            haystack.tokenizer,
            [case for case in cases if case.length == length],
            steps=count_answer_steps(cases),
        )
        for length in dict.fromkeys(lengths)
    ]
