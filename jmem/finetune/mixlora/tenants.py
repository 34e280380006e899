"""The mixtures of a running state: served, taken out, begun anew, stopped.

Shapes never change, so the compiled step does not either: jobs come and go.
"""

import dataclasses
from typing import Any

import jax

from jmem.finetune.adapters import attach
from jmem.nn.ops import Ops


def serve(model: Any, ops: Ops, params: dict, adapters: dict) -> tuple[Any, dict]:
    """(model, params) of one mixture: `ops` compute it, and `adapters` are its own.

    The base's arrays are shared, not copied.
    """
    adapters = jax.tree.map(lambda a: a[:, None], adapters)
    model = dataclasses.replace(model, linear=ops.linear, feed=ops.feed)
    return model, params | {"blocks": attach(params["blocks"], adapters)}


def take(mixlora: Any, state: dict, number: int) -> dict:
    """Adapters of one mixture, as `jmem.checkpoints.save_mixlora` takes them."""
    check_number(mixlora, "mixture", number)
    return mixlora.storage.take(state["adapters"], number)


def replace(
    mixlora: Any, state: dict, number: int, adapters: dict | None, key: Any = None
) -> dict:
    """`state` with mixture `number` begun anew, from `adapters` or fresh by `key`.

    Its moments and its count of updates begin at zero, and it is active.

    Raises:
      ValueError: `adapters` are not of this mixture's sizes or of this base, or
        neither they nor a key are given.
    """
    check_number(mixlora, "replaced", number)
    storage, blocks = mixlora.storage, state["params"]["blocks"]
    if adapters is not None:
        storage.check(adapters, blocks, number)
        fresh = storage.store(adapters, number)
    elif key is not None:
        fresh = storage.draw(mixlora.mixtures[number], blocks, key)
    else:
        raise ValueError(
            "MixLora.replaced: adapters=None and key=None; give adapters that "
            "were trained, or a key to draw fresh ones."
        )

    def put(leaf, own):
        return leaf.at[:, number].set(own.astype(leaf.dtype))

    return state | {
        "adapters": jax.tree.map(put, state["adapters"], fresh),
        "moments": jax.tree.map(
            lambda leaf: leaf.at[:, number].set(0), state["moments"]
        ),
        "steps": state["steps"].at[number].set(0),
        "active": state["active"].at[number].set(True),
    }


def stop(mixlora: Any, state: dict, number: int) -> dict:
    """`state` in which mixture `number` is frozen, until it is replaced."""
    check_number(mixlora, "stopped", number)
    return state | {"active": state["active"].at[number].set(False)}


def check_number(mixlora: Any, what: str, number: int) -> None:
    """Refuses a mixture that is not there."""
    if not 0 <= number < len(mixlora.mixtures):
        raise ValueError(
            f"MixLora.{what}: number={number}, but mixtures are numbered 0 to "
            f"{len(mixlora.mixtures) - 1}."
        )
