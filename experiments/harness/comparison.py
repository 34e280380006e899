"""Caches compared on tasks: the loop, which a stopped run goes on with, and its curves.

    trials = [prepare(task, model, methods, shares, batch_size=8) for task in tasks]
    panels = examine(run, model, params, trials, report)

What is compared, and how it is scored, is `jmem.evaluate`'s; here it is told while it
goes on, kept in the run's journal, and reported, also where it was stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.journal import Journal, told
from experiments.harness.plots import Panel
from experiments.harness.run import Run
from jmem.evaluate.compare import Part, compare, join
from jmem.evaluate.contenders import (
    Contender,
    at_equal_bytes,
    name_contender,
    share_of_full,
)
from jmem.evaluate.task import Summary, Task
from jmem.kvcache.budget import Sized
from jmem.models.decoder import Decoder


class Trial[AnyTask: Task](NamedTuple):
    """A task, and who is asked."""

    task: AnyTask
    contenders: Mapping[str, Contender]


class Outcome[AnyTask: Task](NamedTuple):
    """What came of a trial; of one that was stopped, of its first cases."""

    task: AnyTask
    contenders: Mapping[str, Contender]
    places: Sequence[int]
    """Which cases were asked."""
    scores: Mapping[str, np.ndarray]
    """Theirs, by contender."""


def prepare[AnyTask: Task](
    task: AnyTask,
    model: Decoder,
    methods: Mapping[str, Sized],
    shares: Sequence[float] | Mapping[float, int],
    *,
    batch_size: int,
    answer_besides: bool = False,
) -> Trial[AnyTask]:
    """The full cache and each method at each share, as `at_equal_bytes`.

    Raises:
      ValueError: the model has too few positions, or a share is too small.
    """
    limit = model.config.max_positions
    if task.prompt + task.steps > limit:
        raise ValueError(
            f"{task.name} of {task.prompt:,} tokens with {task.steps} to follow exceed "
            f"the {limit:,} positions of the model."
        )
    contenders = at_equal_bytes(
        *(model, methods, shares),
        prompt=task.prompt,
        new_tokens=task.steps,
        batch_size=min(batch_size, len(task)),
        answer_besides=answer_besides,
    )
    return Trial(task, contenders)


def keep(run: Run, parts: Sequence[Part]) -> Iterator[tuple[Part, Mapping[str, Any]]]:
    """Every part's scores, told while it goes on; what the journal has is not asked."""
    journal = Journal(run.folder, resume=True)
    for part in told(
        *(run, parts),
        name=lambda part: part.name.rpartition(" ")[0],
        size=lambda part: part.prompts.tokens.size,
    ):
        yield part, journal(part.name, part.scores)


def examine[AnyTask: Task, Told](
    run: Run,
    model: Decoder,
    params: dict,
    trials: Sequence[Trial[AnyTask]],
    report: Callable[[list[Outcome[AnyTask]]], list[Told]],
    *,
    rows: int | None = None,
) -> list[Told]:
    """What `report` makes of all trials, or where the run is stopped of those so far.

    At most `rows` are read at a time.
    """
    parts, done = [], [([], []) for _ in trials]
    for task, contenders in trials:
        parts += compare(model, params, contenders, task, rows=rows)
    at = {id(trial.task): index for index, trial in enumerate(trials)}
    try:
        for part, scores in keep(run, parts):
            places, found = done[at[id(part.task)]]
            places += part.prompts.places
            found.append(scores)
    finally:
        outcomes = [
            Outcome[AnyTask](trial.task, trial.contenders, places, join(found))
            for trial, (places, found) in zip(trials, done)
            if found
        ]
        panels = report(outcomes) if outcomes else []
    return panels


def summarise(outcomes: Sequence[Outcome], name: str) -> Summary:
    """What a contender is worth on the cases of all outcomes together."""
    scores = join(outcome.scores for outcome in outcomes)
    return outcomes[0].task.summary(scores["full"], scores[name])


def mean_share(outcomes: Sequence[Outcome], name: str) -> float:
    """The bytes of a contender's cache, of the full one's: the mean over outcomes."""
    return float(np.mean([share_of_full(own.contenders, name) for own in outcomes]))


def draw_curves(
    outcomes: Sequence[Outcome],
    methods: Sequence[str],
    shares: Sequence[float],
    *,
    find_share: Callable[[Sequence[Outcome], str], float] = mean_share,
    **words: Any,
) -> list[Panel]:
    """Quality against bytes, a curve a method; nothing where no case counts."""
    curves: dict[str, list] = {method: [] for method in methods}
    for method in methods:
        for share in sorted(shares):
            name = name_contender(method, share)
            value, interval, *_ = summarise(outcomes, name)
            if value is not None:
                ends = interval or (value, value)
                curves[method].append((find_share(outcomes, name), value, *ends))
    reference = summarise(outcomes, "full").value
    if reference is None:
        return []
    return [Panel(curves=curves, reference=reference, **words)]
