"""What a policy chooses by: the queries that vote, and what they vote on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.kvcache.method import Read
from jmem.kvcache.plan import PolicyPlan


class Seen(NamedTuple):
    """What a policy selects by, in one layer. Rows may differ in length.

    Of a prompt; in a later turn of what the layer holds and the new tokens behind it,
    whose positions are then places in that list (`jmem.kvcache.turn`).
    """

    queries: Float[Array, "B W H D"]
    """Of the prompt's last W tokens, rotated."""
    at: Int[Array, "B W"]
    """Their positions; negative where the prompt (or the turn) is shorter than W."""
    keys: Float[Array, "B T K D"]
    """Of all tokens, rotated."""
    start: Int[Array, " B"]
    """The positions before this one are to be chosen from."""
    give_unrotated: Callable[[], Float[Array, "B T K D"]] | None = None
    """Gives `unrotated`."""
    give_values: Callable[[], Float[Array, "B T K D"]] | None = None
    """Gives `values`."""

    @property
    def candidates(self) -> jax.Array:
        """Bool [B, T]: which tokens may be selected."""
        tokens = jnp.arange(self.keys.shape[1], dtype=jnp.int32)
        return tokens[None] < self.start[:, None]

    @property
    def unrotated(self) -> Float[Array, "B T K D"]:
        """The keys before rotation; in a later turn that of held ones is undone."""
        if self.give_unrotated is None:
            raise ValueError(
                "Seen: unrotated is asked for; make it with give_unrotated."
            )
        return self.give_unrotated()

    @property
    def values(self) -> Float[Array, "B T K D"]:
        """Of all tokens."""
        if self.give_values is None:
            raise ValueError("Seen: values is asked for; make it with give_values.")
        return self.give_values()


def find_tail_start(plan: PolicyPlan, lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """The first position of each prompt that is kept unselected, in the tail."""
    return jnp.maximum(lengths - plan.recent, jnp.minimum(plan.sinks, lengths))


def find_last_places(lengths: Int[Array, " B"], width: int) -> Int[Array, "B W"]:
    """Places of each row's last `width` tokens; negative where there are fewer."""
    return lengths[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]


def take_last_queries(
    queries: Float[Array, "B T H D"], lengths: Int[Array, " B"], width: int
) -> tuple[Float[Array, "B W H D"], Int[Array, "B W"]]:
    """The queries of each row's last `width` tokens (at most T), and their places."""
    at = find_last_places(lengths, min(width, queries.shape[1]))
    rows = jnp.maximum(at, 0)[:, :, None, None]
    return jnp.take_along_axis(queries, rows, axis=1), at


def observe(plan: PolicyPlan, read: Read) -> Seen:
    """What a policy selects by: all keys, and the queries of the recent tokens."""
    return Seen(
        *take_last_queries(read.queries, read.lengths, plan.recent),
        read.keys,
        find_tail_start(plan, read.lengths),
        lambda: read.unrotated,
        lambda: read.values,
    )
