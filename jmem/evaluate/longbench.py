"""LongBench's data sets as tasks: answers scored by each one's own metric."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from jmem.data.longbench import Example, encode_prompt
from jmem.evaluate.task import Summary, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class LongBench(Task):
    """Examples of one data set (`jmem.data.longbench`); scores go from 0 to 1.

    Of prompts above `limit` tokens the middle is left out. An answer ends before the
    first of `ends`. `chat` is what the model's chats have before and after a question.
    A summary is the mean score; of the few examples a file has, no interval is told.
    Shares are best taken with `at_equal_bytes(..., answer_besides=True)`, as answers
    may be as long as a budget.

    Raises:
      ValueError: what `Task` refuses, or examples of several data sets.
      DataError: what `encode_prompt` refuses.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        examples: Sequence[Example],
        *,
        limit: int,
        chat: tuple[str, str] = ("", ""),
        ends: Sequence[int] = (),
    ):
        names = sorted({example.dataset for example in examples})
        if len(names) != 1:
            raise ValueError(
                f"LongBench: examples are of {names or 'no data set'}; need those of "
                "one, whose answers have one length."
            )
        super().__init__(
            f"longbench {names[0]}",
            [encode_prompt(e, tokenizer, limit=limit, chat=chat) for e in examples],
            prompt=limit,
            steps=examples[0].task.new_tokens,
        )
        self.dataset, self.examples = names[0], examples
        self._tokenizer, self._ends = tokenizer, ends

    def score(
        self, produced: Int[np.ndarray, "N steps"], places: Sequence[int]
    ) -> Float[np.ndarray, " N"]:
        texts = [
            self._tokenizer.decode(cut_at_end(row.tolist(), self._ends))
            for row in produced
        ]
        pairs = zip(places, texts, strict=True)
        return np.array([self.examples[place].score(text) for place, text in pairs])

    def summary(
        self, full: Float[np.ndarray, " N"], own: Float[np.ndarray, " N"]
    ) -> Summary:
        return Summary(float(own.mean()), None, float(full.mean()), len(own))


def cut_at_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text.

    >>> cut_at_end([5, 6, 2, 7], (2, 0))
    [5, 6]
    """
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:at]
