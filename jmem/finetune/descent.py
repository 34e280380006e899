"""One update by the gradient of a model's own loss: what `Full` and `Lora` share.

It knows the model by `jmem.models.contract` alone, and the batch too. Statistics go
from part to part of an accumulated batch and stay in the state. A model whose training
needs a key gets one that no other step, part or purpose has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jmem.finetune.accumulate import accumulate
from jmem.models.contract import Batch

_NOISE = 1_000
"""The purpose of the model's own draws; below it are those of adapters, by map."""


def needs_key(model: Any) -> bool:
    """Whether the model's loss is given a key in training."""
    return getattr(model, "needs_key", False)


def draw_part(state: Mapping[str, Any], number: Any) -> jax.Array:
    """The key of part `number` of this step's batch, from `state["key"]`."""
    key = jax.random.wrap_key_data(state["key"])
    return jax.random.fold_in(jax.random.fold_in(key, state["step"]), number)


def loss_step(
    model: Any,
    state: Mapping[str, Any],
    batch: Batch,
    trained: Any,
    assemble: Callable[[Any, Any], Any],
    update: Callable[..., tuple[Any, Any, dict]],
    *,
    parts: int = 1,
    ops: Any = None,
) -> tuple[Any, dict[str, Any], dict[str, jax.Array]]:
    """The tree `trained` after an update, what else of the state is new, and metrics.

    `assemble(trained, number)` makes the model's parameters, for part `number` of the
    batch; the gradient is that of `trained`. `update(loss, gradients, trained,
    optimizer, step)` gives (trained, optimizer, metrics); `step` counts the updates
    done before it, from 0. The state holds "optimizer",
    "stats" and "step", and "key" for a model that needs one.
    """

    def gradients(part, number, stats):
        key = None
        if needs_key(model):
            key = jax.random.fold_in(draw_part(state, number), _NOISE)

        def loss(trained):
            return model.loss(assemble(trained, number), stats, part, key, ops)

        (mean, aux), found = jax.value_and_grad(loss, has_aux=True)(trained)
        return (mean, dict(aux.metrics), found), aux.stats

    found, stats = accumulate(gradients, batch, parts, state["stats"])
    loss, seen, grads = found
    trained, optimizer, metrics = update(
        loss, grads, trained, state["optimizer"], state["step"]
    )
    new = {"optimizer": optimizer, "stats": stats, "step": state["step"] + 1}
    return trained, new, seen | metrics


def refuse_stats(who: str, model: Any, stats: Any) -> None:
    """For a method that walks a decoder's blocks itself, not through `model.loss`.

    Raises:
      ValueError: the model has statistics, or needs a key in training.
    """
    if jax.tree.leaves(stats) or needs_key(model):
        raise ValueError(
            f"{who}: a {type(model).__name__} keeps statistics or draws noise in "
            "training, and this step walks the blocks of a decoder without either. Use "
            "Full, or Lora with update='separate'."
        )
