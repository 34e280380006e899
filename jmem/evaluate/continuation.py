"""Loss of the text that follows: what a model predicts once its cache was cut.

Every token is predicted from the cut cache and the text before it, whatever the model
would have said itself (`jmem.evaluate.decoding.measure_losses`).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jmem.data.document import Document
from jmem.data.tokens import encode_start
from jmem.evaluate.decoding import Context, follow_text
from jmem.evaluate.task import Prompts, Summary, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def take_passages(
    tokenizer: "Tokenizer",
    documents: Sequence[Document],
    *,
    count: int,
    passage: int,
    continuation: int,
) -> list[list[int]]:
    """The first `count` pieces of documents: `passage` tokens to be read, and then
    `continuation` that follow.

    A piece begins where half of the one before it is read, so that texts overlap and
    continuations do not. What the tokenizer puts before every text (a begin token) is
    before each, and counts as read.

    Raises:
      ValueError: the documents have fewer.
    """
    front = encode_start(tokenizer, "")
    size, rows = passage + continuation - len(front), []
    for document in documents:
        tokens = tokenizer.encode(document["text"], add_special_tokens=False).ids
        starts = range(0, len(tokens) - size + 1, max(size // 2, continuation))
        rows += [[*front, *tokens[start : start + size]] for start in starts]
    if len(rows) < count:
        raise ValueError(
            f"passages={count}, but the text has only {len(rows)} pieces of passage="
            f"{passage} + continuation={continuation} tokens. Lower one of the three."
        )
    return rows[:count]


class Continuations(Task):
    """Texts whose last `continuation` tokens are predicted; a score is their losses.

    A summary is the mean loss above the full cache's, in nats a token, with one
    standard error on each side.

    Raises:
      ValueError: what `Task` refuses; texts of several lengths, or no longer than
        `continuation`.
    """

    def __init__(self, texts: Sequence[Sequence[int]], *, continuation: int):
        sizes = sorted({len(text) for text in texts})
        if len(sizes) > 1 or (sizes and sizes[0] <= continuation):
            raise ValueError(
                f"Continuations: texts of {sizes} tokens must all have one length, "
                f"above continuation={continuation}."
            )
        passage = sizes[0] - continuation if sizes else 0
        super().__init__(
            "passages",
            [text[:passage] for text in texts],
            prompt=passage,
            steps=continuation,
        )
        self.following = np.array([text[passage:] for text in texts], np.int32)

    def produce(
        self, model, params: dict, context: Context, prompts: Prompts
    ) -> Float[np.ndarray, "B steps"]:
        """Losses of what follows, in nats."""
        following = self.following[list(prompts.cases)]
        return follow_text(model, params, context, following)

    def score(
        self, produced: Float[np.ndarray, "N steps"], places: Sequence[int]
    ) -> Float[np.ndarray, "N steps"]:
        del places
        return produced

    def summary(
        self, full: Float[np.ndarray, "N steps"], own: Float[np.ndarray, "N steps"]
    ) -> Summary:
        more = (own - full).mean(axis=1)
        value, error = float(more.mean()), find_error(more)
        interval = None if error is None else (value - error, value + error)
        return Summary(value, interval, 0.0, len(more))


def find_error(values: Float[np.ndarray, " N"]) -> float | None:
    """Standard error of the mean; None of a single value.

    >>> find_error(np.array([1.0, 3.0])), find_error(np.array([1.0]))
    (1.0, None)
    """
    count = len(values)
    return float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
