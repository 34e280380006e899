"""What LISA keeps of AdamW's moments: of which blocks, in what form and where."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmem.finetune.adamw import PackedMoments, add_master
from jmem.finetune.lisa.rows import init_rows
from jmem.finetune.resting import make_zero_rows, rest, swap
from jmem.finetune.rules import Factored
from jmem.finetune.tables import describe_pieces
from jmem.finetune.walk import Rule

AtDraw = Literal["reset_layers", "reset_all", "persist"]
Outside = Literal["device", "host", "factored"]


def drop_blocks(params: dict) -> dict:
    """What is not in the blocks: embedding, final norm, head."""
    return {name: tree for name, tree in params.items() if name != "blocks"}


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments that a `Lisa` keeps, by its settings."""

    lisa: Any
    """A `jmem.finetune.lisa.Lisa`."""

    @property
    def rows_of_all(self) -> bool:
        """Whether the device holds a row for each block, not for each active one."""
        return self.lisa.moments == "persist" and self.lisa.persist_in == "device"

    def restart(self, step: jax.Array) -> jax.Array | bool:
        """Whether the active blocks' moments start afresh in step number `step`."""
        return self.lisa.moments != "persist" and step % self.lisa.period == 0

    @property
    def rule(self) -> Rule:
        """How a fused step moves the blocks."""
        rule = self.lisa.adamw.rule
        return add_master(rule) if self.lisa.master else rule

    @property
    def outside_rule(self) -> Rule:
        """How a fused step moves what is outside the blocks."""
        is_factored = self.lisa.outside_moments == "factored"
        return self._factored if is_factored else self.lisa.adamw.rule

    @property
    def _factored(self) -> Factored:
        return Factored(weight_decay=self.lisa.adamw.weight_decay)

    # Before the first step ------------------------------------------------------------

    def init(self, trained: dict, layers: int) -> dict[str, Any]:
        """The parts of the state that hold moments, of `layers` blocks and the rest."""
        blocks = self._init_blocks(trained["blocks"], layers)
        state = {"outside": self._init_outside(drop_blocks(trained)), "blocks": blocks}
        if self.lisa.persist_in == "host":
            state["resting"] = rest(blocks, layers)
        return state

    def _init_blocks(self, blocks: Any, layers: int) -> Any:
        adamw, master = self.lisa.adamw, self.lisa.master
        rows = layers if self.rows_of_all else self.lisa.active_layers
        if not (self.lisa.fuses and (master or adamw.moment_dtype == "float8")):
            return init_rows(adamw.direction(), blocks, rows)
        like = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct((rows, *p.shape[1:]), p.dtype), blocks
        )
        packed = adamw.packed_moments(like)
        if master:
            packed = jax.tree.map(
                lambda p, own: (*own, jnp.zeros(p.shape, jnp.float32)), like, packed
            )
        return PackedMoments(jnp.zeros((rows,), jnp.int32), packed)

    def _init_outside(self, outside: dict) -> Any:
        if self.lisa.outside_moments == "factored":
            moments = jax.tree.map(self._factored.init, outside)
            return PackedMoments(jnp.int32(0), moments)

        adamw = self.lisa.adamw

        def init(outside):
            if adamw.moment_dtype == "float8" and self.lisa.fuses:
                return PackedMoments(jnp.int32(0), adamw.packed_moments(outside))
            return adamw.direction().init(outside)

        if self.lisa.outside_moments == "device":
            return init(outside)
        found = jax.eval_shape(init, describe_pieces(outside))

        def zeros(leaf):
            if leaf.ndim == 3:  # the pieces of a table
                return make_zero_rows(leaf, leaf.shape[0])
            return jnp.zeros(leaf.shape, leaf.dtype)

        return jax.tree.map(zeros, found)

    # In a step ------------------------------------------------------------------------

    def fetch(self, state: dict[str, Any], active: Int[Array, " S"]) -> dict[str, Any]:
        """`state` whose rows on the device are those of the blocks `active`."""
        if self.lisa.persist_in == "device":
            return state
        resting, slots = swap(state["resting"], state["blocks"], active)
        return state | {"resting": resting, "blocks": slots}
