"""A small decoder that learns to recall, and what is left of that in a cut cache.

It learns to find a record by its key and to name the commonest symbol of a text
(`jmem.data.recall`), so that all that a cut cache gets wrong is the cache's fault.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.harness.comparison import Outcome, draw_curves, mean_share, summarise
from experiments.harness.plots import Panel
from experiments.harness.report import Column, kib, percent
from experiments.harness.run import Run
from jmem.data.recall import KINDS, Kind, Lesson, Recall, Rows
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


class Step(NamedTuple):
    """Texts of one kind, and for how long the decoder learns from them."""

    changes: Mapping[str, Any]
    """Fields of `Recall` that differ from what is asked in the end."""
    rows: int
    updates: int


STEPS = (
    Step({"text": 64, "value": 3}, 64, 350),
    Step({"text": 128}, 16, 150),
    Step({}, 16, 150),
)
"""From easy to hard: of long texts alone, to find is not learnt in 1,200 updates."""


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

    def lessons(self, recall: Recall, seed: int) -> list[Lesson]:
        """What is learnt from, step by step."""
        return [
            Lesson(
                dataclasses.replace(recall, **step.changes),
                *(step.rows, self.questions, (seed, number)),
            )
            for number, step in enumerate(STEPS)
        ]

    def learn(self, recall: Recall, run: Run, model: Decoder, seed: int) -> dict:
        """Parameters with which the model answers both kinds of question."""
        learning = Full(adamw=self.adamw)

        @jax.jit
        def begin(key):
            return learning.init(model, model.init(key), model.stats(), key)

        state = begin(jax.random.key(seed))
        for number, lesson in enumerate(self.lessons(recall, seed)):
            state = train(
                *(learning, model, state, lesson),
                steps=max(round(self.effort * STEPS[number].updates), 1),
                folder=run.folder_of(f"lesson-{number + 1}"),
                keep=1,
                resume=run.resume,
            )
        return learning.merged(state)[0]


def draw_questions(
    recall: Recall, kind: Kind, *, count: int, batch_size: int, seed: int
) -> Questions:
    """`count` texts with a question of one kind, none of which was learnt from."""
    purpose = 1
    drawn = [
        recall.sample(
            batch_size, seed=(seed, KINDS.index(kind), number, purpose), kinds=(kind,)
        )
        for number in range(count // batch_size)
    ]
    return Questions(kind, recall, Rows(*map(np.concatenate, zip(*drawn))))


def report_answers(
    run: Run,
    outcomes: Sequence[Outcome[Questions]],
    methods: Sequence[str],
    shares: Sequence[float],
    *,
    note: str,
) -> list[Panel]:
    """What is still answered, by method and bytes."""
    first, kinds, rows = outcomes[0], [own.task.name for own in outcomes], []
    for name, contender in first.contenders.items():
        plan, values = contender.plan, []
        for own in outcomes:
            value, interval, *_ = summarise([own], name)
            values += [value, *(interval or (None, None))]
        size = plan.bytes() // plan.batch_size, mean_share([first], name)
        rows.append((name, *size, *values))
    heads = [f"{kind}{end}" for kind in kinds for end in ("", " from", " to")]
    run.table(
        "Answered rightly",
        [
            "cache",
            Column("a row", kib),
            Column("of the prompt's", percent),
            *(Column(head, percent) for head in heads),
        ],
        rows,
    )
    count = len(first.task)
    words = (
        f"{count} questions of each kind on texts of {first.task.recall.text} "
        f"tokens; from, to: Wilson's interval, 95 %. {note}"
    )
    weak = [own.task.name for own in outcomes if np.mean(own.scores["full"]) < LEARNT]
    if weak:
        words += (
            f" NOT LEARNT: even the full cache answers less than {100 * LEARNT:g} % of"
            f" {' and '.join(weak)}; raise --small.effort before policies are compared."
        )
    run.note(words)
    return [
        panel
        for own in outcomes
        for panel in draw_curves(
            *([own], methods, shares),
            title=f"{TITLES[own.task.kind]}, {count} prompts, 95 % intervals",
            label="answered rightly",
            percent=True,
        )
    ]
