"""What caches are compared on: prompts, how answers are scored, what is then kept.

A `Task` is a list of cases of one width, so that one program serves them all. A new one
is a class with two functions: `score`, how good what was produced for some cases is,
and `summary`, what a cut cache's scores say beside the full cache's.
`jmem.evaluate.compare` runs it.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from jmem.evaluate.decoding import Context, continue_text


class Prompts(NamedTuple):
    """Cases that are read together, padded on the right to one width."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    places: tuple[int, ...]
    """Which cases the first rows are. Rows beyond repeat the first of them, so that
    every batch has one shape."""

    @property
    def cases(self) -> tuple[int, ...]:
        """The case of every row, also of those that fill up."""
        return fill(self.places, len(self.tokens))


class Summary(NamedTuple):
    """What one cache is worth on a task, in the task's own measure."""

    value: float | None
    """None where no case counts."""
    interval: tuple[float, float] | None
    """Where `value` may lie; None where nothing is known of that."""
    full: float | None
    """The full cache's own value."""
    cases: int
    """Cases that count."""


class Task(abc.ABC):
    """Cases that a model is asked, each with a prompt of at most `prompt` tokens.

    Raises:
      ValueError: no case, one that is empty or longer than `prompt`, or no steps.
    """

    def __init__(
        self, name: str, rows: Sequence[Sequence[int]], *, prompt: int, steps: int
    ):
        self.name = name
        self.rows = rows
        """Tokens of each case's prompt."""
        self.prompt = prompt
        """Tokens of a prompt that caches are planned for: no case has more."""
        self.steps = steps
        """Tokens that are decoded after it."""
        if not rows:
            raise ValueError(f"{name}: there are no cases; give at least one.")
        lengths = [len(row) for row in rows]
        if min(lengths) < 1 or max(lengths) > prompt:
            raise ValueError(
                f"{name}: prompts of {min(lengths):,} to {max(lengths):,} tokens must "
                f"lie in [1, {prompt:,}], what caches are planned for."
            )
        if steps < 1:
            raise ValueError(f"{name}: {steps} steps; need at least 1.")

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[Prompts]:
        """All cases in order, `size` at a time, every batch of one shape."""
        width = max(map(len, self.rows))
        for start in range(0, len(self.rows), size):
            places = tuple(range(start, min(start + size, len(self.rows))))
            own = [self.rows[place] for place in fill(places, size)]
            tokens = np.zeros((size, width), np.int32)
            for row, ids in enumerate(own):
                tokens[row, : len(ids)] = ids
            yield Prompts(tokens, np.array([len(ids) for ids in own], np.int32), places)

    def produce(
        self, model, params: dict, context: Context, prompts: Prompts
    ) -> Shaped[np.ndarray, "B N"]:
        """What is scored, from what one contender kept: greedy answers, by default.

        `prompts` are those that the contender's `context` comes from, which may be
        consumed. Of a row as many numbers as the task likes.
        """
        del prompts
        return continue_text(model, params, context, self.steps)

    @abc.abstractmethod
    def score(
        self, produced: Shaped[np.ndarray, "N ..."], places: Sequence[int]
    ) -> Shaped[np.ndarray, "N ..."]:
        """How good what was produced is, for each of the cases at these places."""

    @abc.abstractmethod
    def summary(
        self, full: Shaped[np.ndarray, "N ..."], own: Shaped[np.ndarray, "N ..."]
    ) -> Summary:
        """What a cache's scores say, beside the full cache's for the same cases."""


def fill[Value](values: Sequence[Value], size: int) -> tuple[Value, ...]:
    """`size` values: those given, then the first of them again.

    >>> fill((7, 8), 4)
    (7, 8, 7, 7)
    """
    return (*values, *[values[0]] * (size - len(values)))
