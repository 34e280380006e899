"""LISA: embedding and head always train, of the blocks a few, drawn anew every K steps.

Paper    Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large
         Language Model Fine-Tuning, NeurIPS 2024, arXiv:2403.17919, algorithm 1.
Idea     LoRA was seen to move the embedding and the head far more than the middle. LISA
         imitates that by sampling: updates are full-rank, but gradients and moments are
         only needed for what is being trained.
Memory   w*P + 2*m * (active * P_block + P_outside) + L*B*T*M*w of block inputs, and a
         tile of a gradient where the update is fused; else g bytes for each of those
         that are trained besides.
Differs  The official code never drops a moment, so its memory grows to that of full
         AdamW; `moments="persist"` is that. The paper's runs restart the whole
         optimizer at each draw: "reset_all". The default, "reset_layers", restarts the
         active blocks only. Which blocks are active is data: no draw recompiles.
         `persist_in="host"` keeps every block's moments at the device memory of the
         default (`jmem.finetune.resting`).
See      moments.py (their forms and places), orders.py (draws), checks.py (refusals);
         configs/lisa/, experiments/lisa.py, tests/finetune/test_lisa.py
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jmem.finetune.accumulate import accumulate
from jmem.finetune.adamw import AdamW, Place, descend, read_moments, replace_moments
from jmem.finetune.descent import refuse_stats
from jmem.finetune.fused import fused_step
from jmem.finetune.layerwise import make_slot_gradients
from jmem.finetune.lisa import checks, rows
from jmem.finetune.lisa.layers import count, cut
from jmem.finetune.lisa.moments import AtDraw, Moments, Outside, drop_blocks
from jmem.finetune.orders import Order, choose_active
from jmem.finetune.patterns import join, split
from jmem.finetune.walk import Update
from jmem.finetune.zeros import hold_maps
from jmem.nn.quantised import refuse_packed

# Around any optimizer -----------------------------------------------------------------


class LisaState(NamedTuple):
    """State of `transform`."""

    step: jax.Array  # int32 []
    active: jax.Array  # int32 [S], ascending: the blocks trained at the last update
    outside: Any  # inner's state for everything outside the blocks
    blocks: Any  # inner's state a block, leaves [S, ...] ([L, ...] if they persist)


def transform(
    inner: optax.GradientTransformation,
    *,
    active_layers: int,
    period: int,
    seed: int = 0,
    moments: AtDraw = "reset_layers",
    weights: tuple[float, ...] = (),
    order: Order = "drawn",
    blocks: str | tuple[str, ...] = "blocks",
    stacked: bool | None = None,
) -> optax.GradientTransformation:
    """LISA around any optax optimizer, for anybody's training loop.

    Parameters are any pytree, and updates come in its structure. Below the path
    `blocks` ("params/layers", or the words of it) are the layers; everything else
    always trains. Numbered entries are a layer each, in the order of their numbers: a
    list, a dict {"0": ..., "10": ...}, modules layers_0, layers_1 ... ("params/layers"
    means those too). Without numbers every leaf holds all layers, stacked on axis 0.
    `stacked` says which it is, where it is not to be told.

    Updates of frozen blocks are exactly zero. The optimizer's state covers
    `active_layers` blocks only; gradients still exist for all, as they come from
    outside (the `Lisa` finetuner avoids that too).

    `inner` sees one block at a time and starts afresh at each draw: put learning-rate
    schedules and global-norm clipping outside, into an `optax.chain`. What is outside
    the blocks it sees with None in their place.

    Raises:
      ValueError: `blocks` is no path of the parameters, or could be read either way;
        stacked leaves disagree about the number of layers, or layers are not alike;
        there are fewer than `active_layers`.

    >>> params = {"head": jnp.ones(2), "blocks": {"w": jnp.ones((6, 3))}}
    >>> lisa = transform(optax.scale_by_adam(), active_layers=2, period=10)
    >>> optimizer = optax.chain(lisa, optax.scale_by_learning_rate(1e-3))
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> int((updates["blocks"]["w"] != 0).any(axis=1).sum())
    2
    """
    drawn: Any = {"period": period, "weights": weights, "order": order}
    lisa = Lisa(active_layers=active_layers, moments=moments, **drawn)
    persist = moments == "persist"

    def init(params):
        layers = cut(params, blocks, stacked)
        checks.check_draw(number := count(layers), active_layers, weights)
        held = number if persist else active_layers
        return LisaState(
            step=jnp.int32(0),
            active=jnp.arange(active_layers, dtype=jnp.int32),
            outside=inner.init(layers.outside),
            blocks=rows.init_rows(inner, layers.described, held),
        )

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("lisa.transform: update needs params; pass them as third.")
        layers = cut(params, blocks, stacked)
        grads = cut(updates, blocks, layers.stacked)
        fresh = state.step % period == 0
        active = lisa.draw(state.step // period, jax.random.key(seed), count(layers))
        outside, held = layers.outside, state.outside
        if moments == "reset_all":
            held = rows.restart(fresh, inner.init(outside), held)
        moved, held = inner.update(grads.outside, held, outside)
        moved_rows, optimizer = rows.update_rows(
            inner,
            persist,
            fresh,
            active,
            grads.take(active),
            state.blocks,
            layers.take(active),
        )
        updates = grads.put(moved, active, moved_rows)
        return updates, LisaState(state.step + 1, active, held, optimizer)

    return optax.GradientTransformation(init, update)


# The step that makes no other gradients -----------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa:
    """LISA whose gradients, too, exist for the active blocks only."""

    active_layers: int = 2
    """Blocks trained at a time (γ). 0 trains embedding, final norm and head only."""
    period: int = 20
    """Steps between draws (K)."""
    moments: AtDraw = "reset_layers"
    """What a draw forgets: the active blocks' moments, all moments, or none."""
    persist_in: Place = "device"
    """Where moments that persist are while their block is frozen. "host" is pinned
    memory, which a draw swaps the active blocks' moments with: the device then holds
    those of `active_layers` blocks, and the result is the same to the bit."""
    outside_moments: Outside = "device"
    """What is kept of the moments of embedding and head, which outweigh the blocks'
    where the vocabulary is large. "host": all, in pinned memory, of which a fused step
    fetches and stores a part of the vocabulary at a time; the same to the bit.
    "factored": no first moment, and of the second one its means over rows and columns
    (`jmem.finetune.rules.Factored`); another rule, for the final norm too, and the
    vocabulary is walked twice more."""
    weights: tuple[float, ...] = ()
    """How often each block is drawn, relative to the others; empty means uniform.

    0 freezes a block for good. To train the last k blocks only, give them a positive
    weight, the others 0, `active_layers=k` and a `period` beyond the run's steps:
    moments (unless they persist) and gradients exist for those k alone."""
    order: Order = "drawn"
    """Blocks are drawn, or come in turn (`jmem.finetune.orders`)."""
    train: tuple[str, ...] = ()
    """Patterns of what is trained (`jmem.finetune.patterns`), within the active blocks
    and outside: ("blocks", "head") leaves the embedding alone. Empty: everything."""
    adamw: AdamW = AdamW(learning_rate=5e-5)
    master: bool = False
    """Move a float32 copy of the active blocks' weights, kept with their moments, and
    store it rounded: 4 bytes for each of their parameters, and updates below what 16
    bits resolve add up. Where a draw forgets the moments, the copy begins anew. Needs a
    fused step."""
    keep_zeros: bool = False
    """As `jmem.finetune.full.Full.keep_zeros`."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    update: Update = "auto"
    """"fused" moves weights inside the backward pass, a tile at a time, and makes no
    gradient of a whole weight (`jmem.finetune.list_fused`); it can neither clip by the
    global norm nor accumulate. "separate" makes the gradients first. "auto" fuses
    where neither is asked for."""

    def __post_init__(self):
        checks.check_settings(self)

    @property
    def fuses(self) -> bool:
        """Whether weights move inside the backward pass."""
        if self.update == "auto":
            return not self.adamw.max_grad_norm and self.accumulate == 1
        return self.update == "fused"

    @property
    def kept(self) -> Moments:
        """What is kept of the moments, as one value."""
        return Moments(self)

    def init(self, model, params, stats, key):
        """State that takes over `params` (donated by the training step).

        Raises:
          ValueError: more blocks are to be active than there are, or can be drawn; a
            pattern of `train`, or of `adamw.rates`, matches nothing; nothing inside
            the blocks is trained; the model has statistics.
        """
        refuse_stats("Lisa", model, stats)
        refuse_packed("Lisa", params)
        layers = model.config.layers
        checks.check_draw(layers, self.active_layers, self.weights)
        trained, _ = split(params, self.train, f"Lisa: train={self.train}")
        self.adamw.find_factors(trained)  # refuses a pattern that means nothing
        if not jax.tree.leaves(trained["blocks"]):
            raise ValueError(
                f"Lisa: train={self.train} means nothing inside the blocks, so there "
                "is nothing to draw. Use Full(train=...), which holds no more."
            )
        return self.kept.init(trained, layers) | {
            "params": params,
            "key": jax.random.key_data(key),
            "step": jnp.int32(0),
        }

    def active(self, state, layers: int) -> Int[Array, " S"]:
        """The blocks the next step trains, ascending: a pure function of the state.

        So nothing about a draw needs saving but the key and the step.
        """
        key = jax.random.wrap_key_data(state["key"])
        return self.draw(state["step"] // self.period, key, layers)

    def draw(self, number: jax.Array, key: jax.Array, layers: int) -> Int[Array, " S"]:
        """The blocks of `layers` that period `number` trains, ascending."""
        sizes = layers, self.active_layers, self.weights
        return choose_active(number, self.order, key, *sizes)

    def step(self, model, state, batch, active: Int[Array, " S"] | None = None):
        """One update from one batch: (state, metrics).

        `active` overrides the draw (distinct indices, ascending, γ of them): for
        replaying a recorded run. Values known to the host are checked.
        """
        layers = model.config.layers
        if active is None:
            active = self.active(state, layers)
        else:
            checks.check_active(active, layers, self.active_layers)
        state = self.kept.fetch(state, active)
        update = self._fused if self.fuses else self._separate
        new, metrics = update(model, state, batch, active)
        return state | new, metrics | {"active": active}

    def _separate(self, model, state, batch, active):
        """Gradients of what is trained, then the update: (what is new, metrics)."""
        params, kept = state["params"], self.kept

        def gradients(part, number, stats):
            del number
            found = make_slot_gradients(model, params, part, active, train=self.train)
            return found, stats

        found, _ = accumulate(gradients, batch, self.accumulate, {})
        loss, outside_grads, grads = found
        if self.keep_zeros:
            grads = self._hold(grads, state, active)
        (outside_grads, grads), norm = self.adamw.clip((outside_grads, grads))
        trained, frozen = split(params, self.train, "Lisa: train")
        rate = self.adamw.rate(state["step"])
        rates = self.adamw.find_leaf_rates(trained, rate, model.config.layers)
        inner = self.adamw.direction()
        fresh = kept.restart(state["step"])

        outside, moments = drop_blocks(trained), state["outside"]
        if self.moments == "reset_all":
            moments = rows.restart(fresh, inner.init(outside), moments)
        updates, moments = inner.update(outside_grads, moments, outside)
        outside = descend(outside, updates, drop_blocks(rates))

        blocks = trained["blocks"]
        own = rows.take_rows(blocks, active)
        updates, optimizer = rows.update_rows(
            inner, kept.rows_of_all, fresh, active, grads, state["blocks"], own
        )
        rates = jax.tree.map(lambda r: r[active] if r.ndim else r, rates["blocks"])
        moved = descend(own, updates, rates)
        if self.keep_zeros:
            moved = self._hold(moved, state, active)
        trained = outside | {"blocks": rows.put_rows(blocks, active, moved)}
        new = {
            "params": join(trained, frozen),
            "outside": moments,
            "blocks": optimizer,
            "step": state["step"] + 1,
        }
        return new, {"loss": loss, "lr": rate, "grad_norm": norm}

    def _hold(self, values, state, active):
        """Rows of the active blocks, 0 where the weights of their maps are."""
        chosen, _ = split(state["params"], self.train, "Lisa: train")
        own = rows.take_rows(chosen["blocks"], active)
        return hold_maps({"blocks": values}, {"blocks": own})["blocks"]

    def _fused(self, model, state, batch, active):
        """As `_separate`, but weights move inside the backward pass."""
        params, layers, kept = state["params"], model.config.layers, self.kept
        trained, _ = split(params, self.train, "Lisa: train")
        rate = self.adamw.rate(state["step"])
        fresh = kept.restart(state["step"])
        count, outside = read_moments(state["outside"])
        if self.moments == "reset_all":
            count = jnp.where(fresh, 0, count)
        counts, blocks = read_moments(state["blocks"])
        slots = jnp.arange(self.active_layers, dtype=jnp.int32)
        if kept.rows_of_all:
            held_in, counts = active, counts.at[active].add(1)
        else:
            held_in, counts = slots, jnp.where(fresh, 0, counts) + 1
        nothing = jnp.full((layers,), -1, jnp.int32)
        moved = fused_step(
            model,
            params,
            batch,
            kept.rule,
            outside_rule=kept.outside_rule,
            row_of=nothing.at[active].set(held_in),
            blocks=blocks,
            block_counts=counts,
            outside=outside,
            outside_count=count + 1,
            rates=self.adamw.find_leaf_rates(trained, rate, layers),
            step=state["step"],
            decays=self.adamw.decays,
            train=self.train,
            keep_zeros=self.keep_zeros,
        )
        new = {
            "params": moved.params,
            "outside": replace_moments(
                state["outside"], count + 1, moved.outside, drop_blocks(trained)
            ),
            "blocks": replace_moments(
                state["blocks"], counts, moved.blocks, trained["blocks"]
            ),
            "step": state["step"] + 1,
        }
        norm = jnp.sqrt(moved.square)
        return new, {"loss": moved.loss, "lr": rate, "grad_norm": norm}

    def merged(self, state):
        """The parameters, trained or not; there are no statistics."""
        return state["params"], {}

    def labels(self, state):
        """The state's parts in the user's words."""
        parts = [name for name in ("outside", "blocks", "resting") if name in state]
        return {"weights": "params", "optimizer": parts}
