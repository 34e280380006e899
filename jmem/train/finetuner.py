"""The one interface between a fine-tuning method and whatever trains it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jmem.models.contract import Batch


@runtime_checkable
class Finetuner[Model, Params, Stats, State](Protocol):
    """What a fine-tuning method is, to the training loop and to the experiments.

    A frozen dataclass of the method's settings with four pure functions. `State` is
    a pytree of arrays that holds everything an update reads and writes: weights,
    statistics, moments, random keys, and `state["step"]`, an int32 scalar that counts
    the updates done. Every random draw is a `fold_in` of that count, so that a resumed
    run repeats the uninterrupted one bit for bit.
    """

    def init(self, model: Model, params: Params, stats: Stats, key: jax.Array) -> State:
        """The state before the first update, made from a model's parameters.

        `stats` are the model's statistics (`jmem.models.contract.Model`), {} for most.
        """
        ...

    def step(
        self, model: Model, state: State, batch: Batch
    ) -> tuple[State, Mapping[str, jax.Array]]:
        """One update: the next state and what to log.

        Pure. The caller jits it with `state` donated, so the next state has the
        shapes, dtypes and placement of the one given. Metrics are scalars (`loss`,
        which is required, `lr`, `grad_norm`) or short vectors (`active`); `loss` is
        that of `batch` before the update.
        """
        ...

    def merged(self, state: State) -> tuple[Params, Stats]:
        """Parameters of the plain model, with every adapter folded in, and statistics.

        What its `loss` evaluates.
        """
        ...

    def labels(self, state: State) -> Mapping[str, Any]:
        """The user's words for parts of the state: word -> key-path prefix(es)."""
        ...
