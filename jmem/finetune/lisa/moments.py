"""What LISA keeps of AdamW's moments: of which blocks, in what form and where."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jmem.finetune.adamw import AdamW, PackedMoments, with_master
from jmem.finetune.lisa.rows import init_rows
from jmem.finetune.resting import rest, swap, zero_rows
from jmem.finetune.rules import Factored
from jmem.finetune.tables import pieces
from jmem.finetune.walk import Rule

AtDraw = Literal["reset_layers", "reset_all", "persist"]
Place = Literal["device", "host"]
Outside = Literal["device", "host", "factored"]


def outside_of(params: dict) -> dict:
    """What is not in the blocks: embedding, final norm, head."""
    return {name: tree for name, tree in params.items() if name != "blocks"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """The moments of one LISA; the words are those of its settings (`Lisa`)."""

    adamw: AdamW
    at_draw: AtDraw
    persist_in: Place
    outside: Outside
    master: bool
    active_layers: int
    fused: bool

    @property
    def rows_of_all(self) -> bool:
        """Whether the device holds a row for each block, not for each active one."""
        return self.at_draw == "persist" and self.persist_in == "device"

    def restart(self, step: jax.Array, period: int) -> jax.Array | bool:
        """Whether the active blocks' moments start afresh in step number `step`."""
        return self.at_draw != "persist" and step % period == 0

    @property
    def rule(self) -> Rule:
        """How a fused step moves the blocks."""
        return with_master(self.adamw.rule) if self.master else self.adamw.rule

    @property
    def outside_rule(self) -> Rule:
        """How a fused step moves what is outside the blocks."""
        return self._factored if self.outside == "factored" else self.adamw.rule

    @property
    def _factored(self) -> Factored:
        return Factored(weight_decay=self.adamw.weight_decay)

    # Before the first step ------------------------------------------------------------

    def init(self, trained: dict, layers: int) -> dict[str, Any]:
        """The parts of the state that hold moments, of `layers` blocks and the rest."""
        blocks = self._init_blocks(trained["blocks"], layers)
        state = {"outside": self._init_outside(outside_of(trained)), "blocks": blocks}
        if self.persist_in == "host":
            state["resting"] = rest(blocks, layers)
        return state

    def _init_blocks(self, blocks: Any, layers: int) -> Any:
        rows = layers if self.rows_of_all else self.active_layers
        if not (self.fused and (self.master or self.adamw.moment_dtype == "float8")):
            return init_rows(self.adamw.direction(), blocks, rows)
        like = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct((rows, *p.shape[1:]), p.dtype), blocks
        )
        packed = self.adamw.packed_moments(like)
        if self.master:
            packed = jax.tree.map(
                lambda p, own: (*own, jnp.zeros(p.shape, jnp.float32)), like, packed
            )
        return PackedMoments(jnp.zeros((rows,), jnp.int32), packed)

    def _init_outside(self, outside: dict) -> Any:
        if self.outside == "factored":
            moments = jax.tree.map(self._factored.init, outside)
            return PackedMoments(jnp.int32(0), moments)

        def init(outside):
            if self.adamw.moment_dtype == "float8" and self.fused:
                moments = self.adamw.packed_moments(outside)
                return PackedMoments(jnp.int32(0), moments)
            return self.adamw.direction().init(outside)

        if self.outside == "device":
            return init(outside)
        found = jax.eval_shape(init, pieces(outside))
        return jax.tree.map(
            lambda leaf: (
                zero_rows(leaf, leaf.shape[0])
                if leaf.ndim == 3
                else jnp.zeros(leaf.shape, leaf.dtype)
            ),
            found,
        )

    # In a step ------------------------------------------------------------------------

    def fetch(self, state: dict[str, Any], active: Int[Array, " S"]) -> dict[str, Any]:
        """`state` whose rows on the device are those of the blocks `active`."""
        if self.persist_in == "device":
            return state
        resting, slots = swap(state["resting"], state["blocks"], active)
        return state | {"resting": resting, "blocks": slots}
