"""Recall of made-up texts as a task: each question is answered rightly or not.

The first token after a prompt is always that of full attention, and would hide what a
cut cache has lost from an answer of one token. So a prompt's last token is read a
second time, from the cut cache, and all that is scored follows from that.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jmem.data.recall import KINDS, Kind, Recall, Rows
from jmem.evaluate.decoding import Context, continue_text
from jmem.evaluate.interval import wilson
from jmem.evaluate.task import Prompts, Summary, Task


class Questions(Task):
    """The first question of each of some texts, all of one kind.

    A summary is the share that is answered rightly, with Wilson's interval, at 95 %.
    """

    def __init__(self, kind: Kind, recall: Recall, rows: Rows):
        prompts = rows.tokens[:, : recall.prompt].tolist()
        super().__init__(kind, prompts, prompt=recall.prompt, steps=recall.value)
        self.kind: Kind = kind
        self.recall, self.asked = recall, rows

    def produce(
        self, model, params: dict, context: Context, prompts: Prompts
    ) -> Int[np.ndarray, "B steps"]:
        """Greedy answers, the first token too from what is kept."""
        return continue_text(model, params, context, self.steps, reread_last=True)

    def score(
        self, produced: Int[np.ndarray, "N steps"], places: Sequence[int]
    ) -> Bool[np.ndarray, " N"]:
        rows = Rows(*(array[list(places)] for array in self.asked))
        return self.recall.correct(rows, produced)

    def summary(
        self, full: Bool[np.ndarray, " N"], own: Bool[np.ndarray, " N"]
    ) -> Summary:
        right, count = int(own.sum()), len(own)
        return Summary(
            right / count, wilson(right, count), int(full.sum()) / count, count
        )


def draw_questions(
    recall: Recall, kind: Kind, *, count: int, batch_size: int, seed: int
) -> Questions:
    """`count` texts with a question of one kind, drawn `batch_size` at a time.

    None of them is in a lesson of `jmem.data.recall.make_lessons`, whatever its seed.
    `count` must be a multiple of `batch_size`.
    """
    purpose = 1
    drawn = [
        recall.sample(
            batch_size, seed=(seed, KINDS.index(kind), number, purpose), kinds=(kind,)
        )
        for number in range(count // batch_size)
    ]
    return Questions(kind, recall, Rows(*map(np.concatenate, zip(*drawn))))
