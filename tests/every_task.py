"""The tasks that the shared suite runs: a new one joins by being listed."""

import functools
from typing import NamedTuple

import numpy as np
from byte_tokenizer import byte_tokenizer

from jmem.data.longbench import Example
from jmem.data.needle import Haystack
from jmem.data.recall import Recall
from jmem.evaluate.continuation import Continuations
from jmem.evaluate.longbench import LongBench
from jmem.evaluate.needle import Needles, make_grid
from jmem.evaluate.recall import Questions
from jmem.evaluate.task import Task


class Asked(NamedTuple):
    """A task of five cases, and what a model could produce for them."""

    task: Task
    right: np.ndarray
    """What scores best."""
    wrong: np.ndarray
    best: float
    """The score of what is right."""
    vocab_size: int = 264


TOKENIZER = byte_tokenizer()
RECALL = Recall(text=64, keys=8, values=24)


def _encode(texts: list[str], steps: int) -> np.ndarray:
    rows = [TOKENIZER.encode(text).ids[:steps] for text in texts]
    return np.array([row + [0] * (steps - len(row)) for row in rows], np.int32)


def needles() -> Asked:
    haystack = Haystack(TOKENIZER, "One is here. Two is there, and so on. " * 8)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    cases = make_grid(haystack, lengths=(160,), depths=depths, seeds=(3,))
    task = Needles(TOKENIZER, cases)
    right = _encode([f" {case.answer}." for case in cases], task.steps)
    return Asked(task, right, _encode([" 12."] * 5, task.steps), 1.0)


def continuations() -> Asked:
    texts = np.random.default_rng(0).integers(1, 257, (5, 60)).tolist()
    right, wrong = np.zeros((5, 4)), np.full((5, 4), 1.5)
    return Asked(Continuations(texts, continuation=4), right, wrong, 0.0)


def longbench() -> Asked:
    contexts = [f"The cat {number} sat. " * (number + 2) for number in range(5)]
    examples = [
        Example(
            input="Who sat?",
            context=context,
            answers=("The cat.",),
            length=9,
            dataset="hotpotqa",
            language="en",
            all_classes=(),
            id="0",
            source="x:1",
        )
        for context in contexts
    ]
    task = LongBench(TOKENIZER, examples, limit=100, ends=(0,))
    right = _encode(["The cat."] * 5, task.steps)
    return Asked(task, right, _encode(["A dog."] * 5, task.steps), 1.0)


def questions() -> Asked:
    rows = RECALL.sample(5, seed=1, kinds=("find",))
    task = Questions("find", RECALL, rows)
    right = rows.tokens[:, RECALL.prompt : RECALL.prompt + RECALL.value]
    return Asked(task, right, right * 0, 1.0, RECALL.vocab_size)


TASKS = {
    make.__name__: functools.cache(make)
    for make in (needles, continuations, longbench, questions)
}
