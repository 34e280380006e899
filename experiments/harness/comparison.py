"""Caches compared on tasks: the loop over all batches, and curves of what it finds.

    trials = [prepare(task, model, methods, shares, batch_size=8) for task in tasks]
    panels = examine(run, model, params, trials, report)

What is compared, and how it is scored, is `jmem.evaluate`'s. Here progress is printed,
scores are kept in the run's journal, so that a stopped run can be continued, and a
report is made, also of a run that is stopped.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.journal import keep
from experiments.harness.plots import Panel
from experiments.harness.run import Run
from jmem.evaluate.compare import compare, join
from jmem.evaluate.contenders import Contender, at_equal_bytes, find_share_of_full
from jmem.evaluate.task import Summary, Task
from jmem.kvcache.budget import Sized
from jmem.models.decoder import Decoder


class Trial[AnyTask: Task](NamedTuple):
    """A task, and the caches that are compared on it."""

    task: AnyTask
    contenders: Mapping[str, Contender]


class Outcome[AnyTask: Task](NamedTuple):
    """The scores of a trial; of one that was stopped, those of its first cases."""

    task: AnyTask
    contenders: Mapping[str, Contender]
    places: Sequence[int]
    """Which cases were asked, as their numbers in the task."""
    scores: Mapping[str, np.ndarray]
    """Of those cases, in their order, by contender."""


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
    parts, done = [], {id(trial.task): [] for trial in trials}
    for task, contenders in trials:
        parts += compare(model, params, contenders, task, rows=rows)
    try:
        for part, scores in keep(run, parts):
            done[id(part.task)].append((part.prompts.places, scores))
    finally:
        outcomes = []
        for trial in trials:
            if found := done[id(trial.task)]:
                places, scores = zip(*found)
                asked = [*itertools.chain(*places)]
                own = trial.task, trial.contenders, asked, join(scores)
                outcomes.append(Outcome[AnyTask](*own))
        panels = report(outcomes) if outcomes else []
    return panels


def summarise(outcomes: Sequence[Outcome], name: str) -> Summary:
    """The task's summary of a contender, on the cases of all outcomes together."""
    scores = join(outcome.scores for outcome in outcomes)
    return outcomes[0].task.summary(scores["full"], scores[name])


def mean_share(outcomes: Sequence[Outcome], name: str) -> float:
    """The bytes of a contender's cache, of the full one's: the mean over outcomes."""
    return float(
        np.mean([find_share_of_full(own.contenders, name) for own in outcomes])
    )


def draw_curves(outcomes: Sequence[Outcome], **words: Any) -> list[Panel]:
    """Quality against bytes, a curve a method; no panel where no case counts.

    `words` are the panel's title and what else `Panel` says of its axes.
    """
    reference = summarise(outcomes, "full").value
    if reference is None:
        return []
    curves: dict[str, list] = {}
    contenders = outcomes[0].contenders.values()
    for own in sorted(contenders, key=lambda own: own.share):
        value, interval, *_ = summarise(outcomes, own.name)
        if own.method != "full" and value is not None:
            point = mean_share(outcomes, own.name), value, *(interval or (value, value))
            curves.setdefault(own.method, []).append(point)
    return [Panel(curves=curves, reference=reference, **words)]
