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
See      configs/lisa/, experiments/lisa.py, tests/finetune/test_lisa.py
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Int

from jmem.finetune.accumulate import accumulate, check_parts
from jmem.finetune.adamw import (
    AdamW,
    PackedMoments,
    descend,
    moments_of,
    with_master,
    with_moments,
)
from jmem.finetune.descent import refuse_stats
from jmem.finetune.fused import fused_step
from jmem.finetune.layerwise import slot_gradients
from jmem.finetune.orders import Order, active_in
from jmem.finetune.patterns import join, split
from jmem.finetune.resting import rest, swap, zero_rows
from jmem.finetune.rules import Factored
from jmem.finetune.tables import pieces
from jmem.finetune.walk import Update
from jmem.nn.quantised import refuse_packed
from jmem.nn.stack import depth

Moments = Literal["reset_layers", "reset_all", "persist"]
Place = Literal["device", "host"]
Outside = Literal["device", "host", "factored"]


def _check_draw(layers: int, active_layers: int, weights: tuple[float, ...]) -> None:
    if active_layers > layers:
        raise ValueError(
            f"Lisa: active_layers={active_layers} exceeds the model's {layers} blocks; "
            f"use at most {layers}, which trains every parameter."
        )
    if weights and len(weights) != layers:
        raise ValueError(
            f"Lisa: weights has {len(weights)} entries for {layers} blocks; give one a "
            "block, or none for uniform draws."
        )


def _check_options(
    active_layers: int,
    period: int,
    moments: str,
    weights: tuple[float, ...],
    order: str,
) -> None:
    if active_layers < 0:
        raise ValueError(f"Lisa: active_layers={active_layers} must not be negative.")
    if period < 1:
        raise ValueError(f"Lisa: period={period} must be at least 1 step.")
    if moments not in Moments.__args__:
        raise ValueError(
            f"Lisa: moments={moments!r} must be one of {Moments.__args__}."
        )
    if order not in get_args(Order):
        raise ValueError(f"Lisa: order={order!r} must be one of {get_args(Order)}.")
    if weights and order != "drawn":
        raise ValueError(
            f"Lisa: weights={weights} say how often blocks are drawn, and with order="
            f"{order!r} none is. Leave weights out, or choose order='drawn'."
        )
    if any(not 0 <= w < float("inf") for w in weights):
        raise ValueError(f"Lisa: weights={weights} must be finite and not negative.")
    if weights and sum(w > 0 for w in weights) < active_layers:
        raise ValueError(
            f"Lisa: weights={weights} has fewer than active_layers={active_layers} "
            "positive entries, so that many distinct blocks can't be drawn."
        )


def _outside(params: dict) -> dict:
    return {name: tree for name, tree in params.items() if name != "blocks"}


def _take(stacked: Any, active: Int[Array, " S"]) -> Any:
    """Rows `active` of every leaf: [S, ...]."""
    return jax.tree.map(lambda leaf: leaf[active], stacked)


def _put(stacked: Any, active: Int[Array, " S"], rows: Any) -> Any:
    """`stacked` with rows `active` replaced, in place when it is donated."""

    def put(leaf, value):
        value = value.astype(leaf.dtype)
        return leaf.at[active].set(
            value,
            unique_indices=True,
            indices_are_sorted=True,
            mode="promise_in_bounds",
        )

    return jax.tree.map(put, stacked, rows)


def _init_rows(inner, blocks: Any, rows: int) -> Any:
    """`inner`'s state for `rows` blocks: each has its own moments and step count."""
    like = jax.tree.map(lambda p: jnp.zeros((rows, *p.shape[1:]), p.dtype), blocks)
    return jax.vmap(inner.init)(like)


def _restart(fresh: jax.Array | bool, start: Any, state: Any) -> Any:
    """`start` where the scalar `fresh` holds, else `state`."""
    return jax.tree.map(lambda a, b: jnp.where(fresh, a, b), start, state)


def _update_rows(inner, rows_of_all, fresh, active, grads, optimizer, blocks):
    """`inner` on every active block: (updates [S, ...], optimizer).

    The state of a block lives in row `layer` if there is one for each, else in row
    `slot`, where a draw starts it afresh.
    """
    params = _take(blocks, active)
    if rows_of_all:
        updates, rows = jax.vmap(inner.update)(grads, _take(optimizer, active), params)
        return updates, _put(optimizer, active, rows)
    start = _init_rows(inner, blocks, active.shape[0])
    return jax.vmap(inner.update)(grads, _restart(fresh, start, optimizer), params)


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
    moments: Moments = "reset_layers",
    weights: tuple[float, ...] = (),
    order: Order = "drawn",
    blocks: str = "blocks",
) -> optax.GradientTransformation:
    """LISA around any optax optimizer, for anybody's training loop.

    Parameters are a dict whose entry `blocks` holds every layer's parameters stacked on
    axis 0; all other entries always train. Updates of frozen blocks are exactly zero.
    The optimizer's state covers `active_layers` blocks only; gradients still exist for
    all, as they come from outside (the `Lisa` finetuner avoids that too).

    `inner` sees one block at a time and starts afresh at each draw: put learning-rate
    schedules and global-norm clipping outside, into an `optax.chain`.

    >>> params = {"head": jnp.ones(2), "blocks": {"w": jnp.ones((6, 3))}}
    >>> lisa = transform(optax.scale_by_adam(), active_layers=2, period=10)
    >>> optimizer = optax.chain(lisa, optax.scale_by_learning_rate(1e-3))
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> int((updates["blocks"]["w"] != 0).any(axis=1).sum())
    2
    """
    _check_options(active_layers, period, moments, weights, order)
    persist = moments == "persist"

    def split(tree):
        return {k: v for k, v in tree.items() if k != blocks}, tree[blocks]

    def init(params):
        outside, stacked = split(params)
        layers = depth(stacked)
        _check_draw(layers, active_layers, weights)
        return LisaState(
            step=jnp.int32(0),
            active=jnp.arange(active_layers, dtype=jnp.int32),
            outside=inner.init(outside),
            blocks=_init_rows(inner, stacked, layers if persist else active_layers),
        )

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("lisa.transform: update needs params; pass them as third.")
        outside, stacked = split(params)
        outside_grads, grads = split(updates)
        fresh = state.step % period == 0
        active = active_in(
            state.step // period,
            order,
            jax.random.key(seed),
            depth(stacked),
            active_layers,
            weights,
        )
        held = state.outside
        if moments == "reset_all":
            held = _restart(fresh, inner.init(outside), held)
        moved: Any
        moved, held = inner.update(outside_grads, held, outside)
        rows, optimizer = _update_rows(
            inner, persist, fresh, active, _take(grads, active), state.blocks, stacked
        )
        still = jax.tree.map(jnp.zeros_like, grads)
        updates = moved | {blocks: _put(still, active, rows)}
        return updates, LisaState(state.step + 1, active, held, optimizer)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa:
    """LISA whose gradients, too, exist for the active blocks only."""

    active_layers: int = 2
    """Blocks trained at a time (γ). 0 trains embedding, final norm and head only."""
    period: int = 20
    """Steps between draws (K)."""
    moments: Moments = "reset_layers"
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
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    update: Update = "auto"
    """"fused" moves weights inside the backward pass, a tile at a time, and makes no
    gradient of a whole weight (`jmem.finetune.fused`); it can neither clip by the
    global norm nor accumulate. "separate" makes the gradients first. "auto" fuses
    where neither is asked for."""

    def __post_init__(self):
        check_parts("Lisa", self.accumulate)
        if self.update not in get_args(Update):
            raise ValueError(
                f"Lisa: update={self.update!r} must be one of {get_args(Update)}."
            )
        if self.persist_in not in get_args(Place):
            raise ValueError(
                f"Lisa: persist_in={self.persist_in!r} must be one of "
                f"{get_args(Place)}."
            )
        if self.persist_in == "host" and self.moments != "persist":
            raise ValueError(
                f"Lisa: persist_in='host' is for moments that persist, and moments="
                f"{self.moments!r} forgets them at a draw. Choose moments='persist', "
                "or leave persist_in out."
            )
        if self.persist_in == "host" and not self.active_layers:
            raise ValueError(
                "Lisa: persist_in='host' is for the moments of blocks, and "
                "active_layers=0 trains none. Leave persist_in out."
            )
        if self.outside_moments not in get_args(Outside):
            raise ValueError(
                f"Lisa: outside_moments={self.outside_moments!r} must be one of "
                f"{get_args(Outside)}."
            )
        if self.update == "fused" and self.adamw.max_grad_norm:
            raise ValueError(
                f"Lisa: update='fused' moves weights before all gradients are known, "
                f"so adamw.max_grad_norm={self.adamw.max_grad_norm} cannot be kept. "
                "Set it to 0, or choose update='separate'."
            )
        if self.update == "fused" and self.accumulate > 1:
            raise ValueError(
                f"Lisa: update='fused' moves weights before accumulate="
                f"{self.accumulate} parts are summed. Set it to 1, or choose "
                "update='separate'."
            )
        if self.adamw.weight_rounding == "random" and not self.fuses:
            self.adamw.clip_factor(())  # refuses it
        if self.master and not self.fuses:
            raise ValueError(
                "Lisa: master=True needs a fused step, whose rule moves the copy. Set "
                "adamw.max_grad_norm=0 and accumulate=1, or leave it out."
            )
        if self.outside_moments != "device" and not self.fuses:
            raise ValueError(
                f"Lisa: outside_moments={self.outside_moments!r} needs a fused step, "
                "which walks embedding and head in parts. Set adamw.max_grad_norm=0 "
                "and accumulate=1, or leave it out."
            )
        _check_options(
            *(self.active_layers, self.period, self.moments, self.weights, self.order)
        )

    @property
    def _all_on_device(self) -> bool:
        """Whether moments have a row for each block, not for each active one."""
        return self.moments == "persist" and self.persist_in == "device"

    def _restarts(self, state) -> jax.Array | bool:
        """Whether the active blocks' moments start afresh in this step."""
        return self.moments != "persist" and state["step"] % self.period == 0

    @property
    def fuses(self) -> bool:
        """Whether weights move inside the backward pass."""
        if self.update == "auto":
            return not self.adamw.max_grad_norm and self.accumulate == 1
        return self.update == "fused"

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
        _check_draw(layers, self.active_layers, self.weights)
        trained, _ = split(params, self.train, f"Lisa: train={self.train}")
        self.adamw.factors(trained)  # refuses a pattern that means nothing
        if not jax.tree.leaves(trained["blocks"]):
            raise ValueError(
                f"Lisa: train={self.train} means nothing inside the blocks, so there "
                "is nothing to draw. Use Full(train=...), which holds no more."
            )
        rows = layers if self._all_on_device else self.active_layers
        if self.fuses and (self.master or self.adamw.moment_dtype == "float8"):
            like = jax.tree.map(
                lambda p: jax.ShapeDtypeStruct((rows, *p.shape[1:]), p.dtype),
                trained["blocks"],
            )
            packed = self.adamw.packed_moments(like)
            if self.master:
                packed = jax.tree.map(
                    lambda p, own: (*own, jnp.zeros(p.shape, jnp.float32)), like, packed
                )
            blocks = PackedMoments(jnp.zeros((rows,), jnp.int32), packed)
        else:
            blocks = _init_rows(self.adamw.direction(), trained["blocks"], rows)
        outside = self._init_outside(_outside(trained))
        resting = {}
        if self.persist_in == "host":
            resting = {"resting": rest(blocks, layers)}
        return resting | {
            "params": params,
            "outside": outside,
            "blocks": blocks,
            "key": jax.random.key_data(key),
            "step": jnp.int32(0),
        }

    def _init_outside(self, outside):
        """Moments of what is outside the blocks, in the form and place chosen."""
        if self.outside_moments == "factored":
            moments = jax.tree.map(self._factored.init, outside)
            return PackedMoments(jnp.int32(0), moments)

        def init(outside):
            if self.adamw.moment_dtype == "float8" and self.fuses:
                moments = self.adamw.packed_moments(outside)
                return PackedMoments(jnp.int32(0), moments)
            return self.adamw.direction().init(outside)

        if self.outside_moments == "device":
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

    @property
    def _factored(self) -> Factored:
        return Factored(weight_decay=self.adamw.weight_decay)

    def active(self, state, layers: int) -> Int[Array, " S"]:
        """The blocks the next step trains, ascending: a pure function of the state.

        So nothing about a draw needs saving but the key and the step.
        """
        key = jax.random.wrap_key_data(state["key"])
        number = state["step"] // self.period
        sizes = layers, self.active_layers, self.weights
        return active_in(number, self.order, key, *sizes)

    def step(self, model, state, batch, active: Int[Array, " S"] | None = None):
        """One update from one batch: (state, metrics).

        `active` overrides the draw (distinct indices, ascending, γ of them): for
        replaying a recorded run. Values known to the host are checked.
        """
        params, layers = state["params"], model.config.layers
        if active is None:
            active = self.active(state, layers)
        else:
            _check_active(active, layers, self.active_layers)
        if self.persist_in == "host":
            resting, slots = swap(state["resting"], state["blocks"], active)
            state = state | {"resting": resting, "blocks": slots}

        if self.fuses:
            return self._fused(model, state, batch, active)

        def gradients(part, number, stats):
            del number
            found = slot_gradients(model, params, part, active, train=self.train)
            return found, stats

        found, _ = accumulate(gradients, batch, self.accumulate, {})
        loss, outside_grads, grads = found
        (outside_grads, grads), norm = self.adamw.clip((outside_grads, grads))
        trained, frozen = split(params, self.train, "Lisa: train")
        rate = self.adamw.rate(state["step"])
        rates = self.adamw.leaf_rates(trained, rate, layers)
        inner = self.adamw.direction()
        fresh = self._restarts(state)

        outside, moments = _outside(trained), state["outside"]
        if self.moments == "reset_all":
            moments = _restart(fresh, inner.init(outside), moments)
        updates, moments = inner.update(outside_grads, moments, outside)
        outside = descend(outside, updates, _outside(rates))

        blocks, rows_of_all = trained["blocks"], self._all_on_device
        updates, optimizer = _update_rows(
            inner, rows_of_all, fresh, active, grads, state["blocks"], blocks
        )
        rates = jax.tree.map(lambda r: r[active] if r.ndim else r, rates["blocks"])
        rows = descend(_take(blocks, active), updates, rates)
        trained = outside | {"blocks": _put(blocks, active, rows)}
        state = state | {
            "params": join(trained, frozen),
            "outside": moments,
            "blocks": optimizer,
            "step": state["step"] + 1,
        }
        return state, {"loss": loss, "lr": rate, "grad_norm": norm, "active": active}

    def _fused(self, model, state, batch, active):
        """`step` whose weights move inside the backward pass."""
        params, layers = state["params"], model.config.layers
        trained, _ = split(params, self.train, "Lisa: train")
        rate = self.adamw.rate(state["step"])
        fresh = self._restarts(state)
        count, outside = moments_of(state["outside"])
        if self.moments == "reset_all":
            count = jnp.where(fresh, 0, count)
        counts, blocks = moments_of(state["blocks"])
        slots = jnp.arange(self.active_layers, dtype=jnp.int32)
        if self._all_on_device:
            rows, counts = active, counts.at[active].add(1)
        else:
            rows, counts = slots, jnp.where(fresh, 0, counts) + 1
        nothing = jnp.full((layers,), -1, jnp.int32)
        rule = self.adamw.rule
        moved = fused_step(
            model,
            params,
            batch,
            with_master(rule) if self.master else rule,
            outside_rule=self._factored if self.outside_moments == "factored" else rule,
            row_of=nothing.at[active].set(rows),
            blocks=blocks,
            block_counts=counts,
            outside=outside,
            outside_count=count + 1,
            rates=self.adamw.leaf_rates(trained, rate, layers),
            step=state["step"],
            train=self.train,
        )
        state = state | {
            "params": moved.params,
            "outside": with_moments(
                state["outside"], count + 1, moved.outside, _outside(trained)
            ),
            "blocks": with_moments(
                state["blocks"], counts, moved.blocks, trained["blocks"]
            ),
            "step": state["step"] + 1,
        }
        norm = jnp.sqrt(moved.square)
        metrics = {"loss": moved.loss, "lr": rate, "grad_norm": norm, "active": active}
        return state, metrics

    def merged(self, state):
        """The parameters, trained or not; there are no statistics."""
        return state["params"], {}

    def labels(self, state):
        """The state's parts in the user's words."""
        parts = [name for name in ("outside", "blocks", "resting") if name in state]
        return {"weights": "params", "optimizer": parts}


def _check_active(active, layers: int, active_layers: int) -> None:
    if active.shape != (active_layers,):
        raise ValueError(
            f"Lisa.step: active has shape {active.shape}; "
            f"active_layers={active_layers} needs ({active_layers},)."
        )
    if not isinstance(active, Tracer):
        values = np.asarray(active)
        inside = not values.size or (values[0] >= 0 and values[-1] < layers)
        if not inside or (np.diff(values) <= 0).any():
            raise ValueError(
                f"Lisa.step: active={values.tolist()} must be distinct, ascending "
                f"block indices in [0, {layers})."
            )
