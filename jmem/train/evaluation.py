"""The held-out loss of a run, and the least of it."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jmem.train.checkpoint import Checkpoints
from jmem.train.metrics import NAME, read
from jmem.train.step import check_batch


def compile_evaluation(finetuner, model, state, held_out, evaluate, place) -> Callable:
    """State -> mean loss over `held_out`, each batch counted by its weights."""
    if not held_out:
        return lambda state: math.nan

    def held_out_loss(state, batch):
        return model.loss(*finetuner.merged(state), batch, None)[0]

    for number, batch in enumerate(held_out):
        check_batch(batch, held_out[0], number, "held_out")
    jitted = jax.jit(evaluate or held_out_loss)
    compiled = jitted.lower(state, place(held_out[0])).compile()
    weights = np.array([batch.weight() for batch in held_out], np.float64)

    def mean(state) -> float:
        losses = jax.device_get([compiled(state, place(batch)) for batch in held_out])
        return float(np.dot(weights, np.array(losses, np.float64)) / weights.sum())

    return mean


class Best:
    """The least held-out loss so far, and how long ago it was."""

    def __init__(self, folder: pathlib.Path, start: int):
        self.step, self._loss, self._since = 0, math.inf, 0
        for row in read(folder) if (folder / NAME).exists() else []:
            loss = row.get("held_out_loss")
            if loss is not None and row["step"] <= start:
                self.record(row["step"], loss)
        self._folder = folder / "best"
        if self._folder.exists():  # a better one of updates that are done again
            with Checkpoints(self._folder) as kept:
                kept.remove_unfinished()
                for step in kept.list_steps():
                    if step != self.step:
                        kept.remove(step)

    def save(self, state: Any, **more: Any) -> None:
        """Keeps the state of the best step, and no other; `more` as a checkpoint's."""
        with Checkpoints(self._folder, keep=1) as kept:
            kept.save(self.step, state, **more)

    def record(self, step: int, loss: float) -> bool:
        """Takes the loss after `step` updates; returns whether it is the best."""
        self._since += 1
        if loss < self._loss:
            self.step, self._loss, self._since = step, loss, 0
        return self._since == 0

    def is_exhausted(self, patience: int) -> bool:
        """Whether the last `patience` evaluations were no better; 0: never."""
        return 0 < patience <= self._since
