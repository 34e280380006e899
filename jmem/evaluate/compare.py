"""Contenders on the cases of a task: one prefill for all of them, batch by batch.

    found = collect(compare(model, params, contenders, task))
    task.summary(found["full"], found["snapkv 12.5 %"])       # value, interval, cases

A long comparison is done part by part: nothing runs before a part's `scores` is called,
so what is known already can be left out, and what was found kept.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jmem.evaluate.contenders import Contender, split_contenders
from jmem.evaluate.decoding import read_all
from jmem.evaluate.task import Prompts, Task

type Scores = dict[str, Shaped[np.ndarray, "N ..."]]
"""By contender: the scores of some cases, in their order."""


class Part(NamedTuple):
    """One batch of a task."""

    name: str
    """The task's, and the number of the batch."""
    task: Task
    prompts: Prompts
    scores: Callable[[], Scores]
    """Runs it: scores of `prompts.places`."""


def compare(
    model,
    params: dict,
    contenders: Mapping[str, Contender],
    task: Task,
    *,
    rows: int | None = None,
) -> Iterator[Part]:
    """A task's batches, each of as many cases as the contenders' caches have rows.

    At most `rows` prompts are read at a time (None: a batch), which bounds the memory
    of attention; all contenders then answer, each from its own cache.

    Raises:
      ValueError: no contenders, or some for other batches than the others.
    """
    sizes = sorted({c.plan.batch_size for c in contenders.values()})
    if len(sizes) != 1:
        raise ValueError(
            f"compare: contenders are for batches of {sizes}; need one size for all."
        )
    [size] = sizes
    together = range(1, min(rows or size, size) + 1)
    read = max(count for count in together if size % count == 0)
    plans, filters = split_contenders(contenders)

    def scores(prompts: Prompts) -> Scores:
        found, count = {}, len(prompts.places)
        for name, context in read_all(
            *(model, params, plans, prompts.tokens, prompts.lengths),
            steps=task.steps,
            filters=filters,
            rows=read,
            where="compare",
        ):
            made = task.produce(model, params, context, prompts)
            found[name] = task.score(made[:count], prompts.places)
        return {name: found[name] for name in contenders}

    for number, prompts in enumerate(task.batches(size)):
        ask = functools.partial(scores, prompts)
        yield Part(f"{task.name} {number}", task, prompts, ask)


def collect(parts: Iterable[Part]) -> dict[str, np.ndarray]:
    """Runs all parts: each contender's scores of all cases."""
    return join(part.scores() for part in parts)


def join(parts: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Scores of several batches as those of all their cases."""
    by_name: dict[str, list] = {}
    for scores in parts:
        for name, values in scores.items():
            by_name.setdefault(name, []).append(np.asarray(values))
    return {name: np.concatenate(values) for name, values in by_name.items()}
