"""A small decoder that learns to recall, and what is left of that in a cut cache.

It learns to find a record by its key and to name the commonest symbol of a text
(`jmem.data.recall`), so that all that a cut cache gets wrong is the cache's fault.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from experiments.harness.comparison import Outcome, draw_curves, mean_share, summarise
from experiments.harness.plots import Panel
from experiments.harness.rates import lay_out
from experiments.harness.report import Column, kib, make_columns, percent
from experiments.harness.run import Run
from jmem.data.recall import CURRICULUM, Kind, Recall, make_lessons
from jmem.evaluate.recall import Questions
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.models.decoder import Decoder, DecoderConfig
from jmem.train.loop import train

TITLES: Mapping[Kind, str] = {
    "find": "Find a record",
    "majority": "Name the majority",
}
LEARNT = 0.98
"""Of each kind, what the full cache must answer for the others to be compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """The decoder that is trained here."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 128
    questions: int = 12
    """On each text of a lesson."""
    adamw: AdamW = AdamW(learning_rate=1e-3, warmup_steps=20, b2=0.95)
    effort: float = 1.0
    """Times the updates of each lesson."""

    def config(self, recall: Recall) -> DecoderConfig:
        """Long enough for the questions of a lesson, and with a tied head: what is
        attended need only be copied.
        """
        return DecoderConfig(
            vocab_size=recall.vocab_size,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            max_positions=recall.text + self.questions * (2 + recall.value),
            tied=True,
        )


def learn(small: Small, recall: Recall, run: Run, model: Decoder, seed: int) -> dict:
    """Parameters with which the model answers both kinds of question.

    It learns to find a record by its key and to name the commonest symbol of a text, so
    that all that a cut cache gets wrong is the cache's fault.
    """
    updates = [max(round(small.effort * step.updates), 1) for step in CURRICULUM]
    learning = lay_out(Full(adamw=small.adamw), sum(updates))

    @jax.jit
    def begin(key):
        return learning.init(model, model.init(key), model.stats(), key)

    state = begin(jax.random.key(seed))
    lessons = make_lessons(recall, questions=small.questions, seed=seed)
    for number, (lesson, steps) in enumerate(zip(lessons, updates), 1):
        state = train(
            *(learning, model, state, lesson),
            steps=steps,
            folder=run.folder_of(f"lesson-{number}"),
            keep=1,
            resume=run.resume,
        )
    return learning.merged(state)[0]


def report_answers(
    run: Run, small: Small, outcomes: Sequence[Outcome[Questions]]
) -> list[Panel]:
    """What is still answered, by policy and bytes."""
    first, kinds, rows = outcomes[0], [own.task.kind for own in outcomes], []
    for name, contender in first.contenders.items():
        plan, values = contender.plan, []
        for own in outcomes:
            value, interval, *_ = summarise([own], name)
            values += [value, *(interval or (None, None))]
        size = plan.bytes() // plan.batch_size, mean_share([first], name)
        rows.append((name, *size, *values))
    heads = [f"{kind}{end}" for kind in kinds for end in ("", " from", " to")]
    shares = make_columns(percent, "of the prompt's", *heads)
    run.table("Answered rightly", ["cache", Column("a row", kib), *shares], rows)
    count = len(first.task)
    words = (
        f"{count} questions of each kind on texts of {first.task.recall.text} "
        "tokens; from, to: Wilson's interval, 95 %. "
        f"{small.layers} layers of {small.hidden}, float32, on "
        f"{jax.devices()[0].device_kind}."
    )
    weak = [own.task.kind for own in outcomes if np.mean(own.scores["full"]) < LEARNT]
    if weak:
        words += (
            f" NOT LEARNT: even the full cache answers less than {100 * LEARNT:g} % of"
            f" {' and '.join(weak)}; raise --small.effort before policies are compared."
        )
    run.note(words)
    panels = []
    for own in outcomes:
        title = f"{TITLES[own.task.kind]}, {count} prompts, 95 % intervals"
        panels += draw_curves(
            [own], title=title, label="answered rightly", percent=True
        )
    return panels
