"""MixLoRA: a frozen dense model becomes a mixture whose experts are LoRA adapters.

Paper    Li et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based
         Mixture of Experts, 2024, arXiv:2404.15159; trained, as there, several over one
         base at once (m-LoRA, arXiv:2312.02515).
Idea     Each MLP gains E low-rank experts and a router that picks some for a token,
         attention gains plain LoRA, and a loss keeps the experts in use. M mixtures,
         each with data, size and rates of its own, share the base's weights and its
         products: their rows do not meet, so each learns what it would alone.
Memory   w*P + (4 + 2*m) * J * P_mixture + L*J*B*T*M*w of block inputs, one block's
         internals (`jmem.finetune.mixture`), and one layer's gradients where the update
         is fused, else those of all.
Differs  The official code runs down once a slot; here it is run once. Its jitter also
         disturbs what the experts read; here only what the router reads. Its dropout
         has a biased gradient. Products are in the activations' dtype; adapters,
         router and moments are float32.
See      settings.py (one mixture), storage.py (their adapters side by side),
         ../mixture.py (the experts); configs/mixlora/, experiments/mixlora.py,
         tests/finetune/test_mixlora.py
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmem.finetune.adamw import AdamW
from jmem.finetune.adapters import adapter_step, attach, fuses, move_leaves
from jmem.finetune.descent import draw_part, refuse_stats
from jmem.finetune.lora import dropout_keys
from jmem.finetune.mixlora.settings import (
    Balance,
    Mixture,
    check_settings,
    max_grad_norm,
)
from jmem.finetune.mixlora.storage import ROUTER, Storage
from jmem.finetune.mixture import Router, compute_imbalance
from jmem.finetune.mixture_ops import MixtureFeed, MixtureLinear, split_mixtures
from jmem.finetune.walk import Update
from jmem.models.next_token import find_positions, head_loss
from jmem.nn.maps import MAPS, insert
from jmem.nn.ops import Ops
from jmem.nn.stack import depth, run_stack
from jmem.program import by_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixLora:
    """One mixture, or several that are trained together over one base.

    A batch holds the rows of each in turn, as many of each (`jmem.data.Joint`).
    """

    mixtures: tuple[Mixture, ...] = (Mixture(),)
    router: Router = "top_k"
    """As published, or by probability mass ("mixlora-dynamic" in the official code)."""
    over: Balance = "global"
    """What is balanced: the mean over layers, as in the official code, or each."""
    jitter: float = 0.0
    """The router's input is multiplied by uniform draws from 1 -+ this, in training."""
    dropout: float = 0.05
    """Share of the input values of every A that are zeroed, in training."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    update: Update = "auto"
    """"fused" moves a layer's adapters inside the backward pass, and makes no other
    gradients (`jmem.finetune.adapters`); it can neither clip by the norm nor
    accumulate, and keeps nothing of a block but its input. "separate" makes all
    gradients first. "auto" fuses where neither is asked for and the model's `remat` is
    "block"."""

    feed: ClassVar[type[MixtureFeed]] = MixtureFeed
    """What computes the experts; a subclass may name another (experiments/mixlora)."""

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any], adamw: AdamW | None = None) -> "MixLora":
        """One mixture with the settings of a folder (`jmem.checkpoints.load_mixlora`).

        Raises:
          ValueError: DoRA, or a setting that is none of a mixture's.
        """
        given = dict(settings)
        if given.pop("dora", False):
            raise ValueError("MixLora.of: dora=True; experts are plain LoRA here.")
        if adamw is not None:
            given["adamw"] = adamw
        names = {field.name for field in dataclasses.fields(Mixture)}
        shared = {n: given.pop(n) for n in given.keys() - names}
        if unknown := shared.keys() - {"router", "jitter", "dropout"}:
            raise ValueError(f"MixLora.of: settings hold unknown {sorted(unknown)}.")
        return cls(mixtures=(Mixture(**given),), **shared)

    @property
    def storage(self) -> Storage:
        """How the adapters of all mixtures lie side by side."""
        return Storage(self.mixtures)

    def adapters(self, blocks: dict, key: jax.Array) -> dict:
        """Fresh adapters of all mixtures, float32, J before their own axes."""
        return self.storage.init(blocks, key)

    def init(self, model, params, stats, key):
        """State that takes over `params` (frozen) and adds adapters of all mixtures.

        Raises:
          ValueError: a mixture adapts no map of these blocks' MLPs; a pattern of
            `adamw.rates` matches no adapter; the model is divided over a mesh, or has
            statistics.
        """
        refuse_stats("MixLora", model, stats)
        if getattr(model, "layout", None) is not None:
            raise ValueError(
                f"MixLora: the model has layout={model.layout}, and mixtures are not "
                "divided over a mesh. Use one device (layout=None), or Lora."
            )
        adapters = self.adapters(params["blocks"], key)
        for own in self.mixtures:
            own.adamw.find_factors(adapters, "blocks/")
        dtype = self.mixtures[0].adamw.moment_dtype
        count = len(self.mixtures)
        return {
            "params": params,
            "adapters": adapters,
            "moments": jax.tree.map(
                lambda a: (jnp.zeros(a.shape, dtype), jnp.zeros(a.shape, dtype)),
                adapters,
            ),
            "steps": jnp.zeros((count,), jnp.int32),
            "active": jnp.ones((count,), bool),
            "key": jax.random.key_data(jax.random.fold_in(key, count)),
            "step": jnp.int32(0),
        }

    # One step -------------------------------------------------------------------------

    def step(self, model, state, batch):
        """One update of every active mixture from its rows of the batch.

        Metrics: `loss`, the mean over active mixtures of cross-entropy alone; by
        mixture `losses`, `balance` (without its weight) and `norms` of the gradients;
        `load` [J, E], the slots a token spends on each expert, mean over layers.

        Raises:
          ValueError: the batch's rows are not as many of each mixture, or cannot be
            divided into `accumulate` parts.
        """
        count, rows = len(self.mixtures), batch.tokens.shape[0]
        if rows % (count * self.accumulate):
            raise ValueError(
                f"MixLora.step: a batch of {rows} rows is not as many rows of each of "
                f"{count} mixtures in accumulate={self.accumulate} parts. Give each "
                "the same number (jmem.data.Joint), a multiple of accumulate."
            )
        batch = batch._replace(weights=_divide_weights(batch.weights, count))
        update = self._fused if self.fuses(model) else self._separate
        adapters, moments, squares, losses, (balance, load) = update(
            model, state, batch
        )
        active, norms = state["active"], jnp.sqrt(squares)
        rates = [
            own.adamw.rate(steps) for own, steps in zip(self.mixtures, state["steps"])
        ]
        state = state | {
            "adapters": adapters,
            "moments": moments,
            "steps": state["steps"] + active,
            "step": state["step"] + 1,
        }
        metrics = {
            "loss": _average(losses, active),
            "lr": jnp.max(jnp.stack(rates)),
            "grad_norm": jnp.max(jnp.where(active, norms, 0.0)),
            "losses": losses,
            "balance": balance,
            "norms": norms,
            "load": load,
        }
        return state, metrics

    def _run(self, model, state, batch, ops: Ops) -> tuple[jax.Array, dict]:
        """The last block's output [J*B, T, M], and what the blocks said, [L, ...]."""
        params, positions = state["params"], find_positions(batch)
        blocks = attach(params["blocks"], state["adapters"])
        x = model.embed(params, batch.tokens, positions)
        x, _, aux = run_stack(model.block, blocks, x, positions, ops, remat=model.remat)
        return x, aux

    def losses(self, model, state, batch) -> Float[Array, " J"]:
        """Cross-entropy of every mixture on its rows, without dropout or balance."""
        x, _ = self._run(model, state, batch, self.ops(model))
        weights = _divide_weights(batch.weights, len(self.mixtures))
        return self._make_head(model, state, batch._replace(weights=weights))(x)[1]

    def load(self, model, state, batch) -> Float[Array, "L J E"]:
        """Slots that a token of the batch spends on each expert, layer by layer."""
        ops = self.ops(model, real=_find_real(batch))
        return self._run(model, state, batch, ops)[1]["load"]

    def loss(self, model, state, batch) -> Float[Array, ""]:
        """Mean of `losses` over the active mixtures."""
        return _average(self.losses(model, state, batch), state["active"])

    def _make_head(self, model, state, batch):
        """A function of the last block's output x: (what is minimised, losses [J]).

        Each loss is the sum over a mixture's tokens, by the batch's weights; the first
        result is the sum over active mixtures.
        """
        count = len(self.mixtures)
        params = model.head_params(state["params"])
        given = batch.targets.reshape(count, -1), batch.weights.reshape(count, -1)

        def head(x):
            own = zip(split_mixtures(x, count), *given)
            losses = [head_loss(model, model.ops, params, *parts) for parts in own]
            losses = jnp.stack(losses)
            return jnp.sum(jnp.where(state["active"], losses, 0.0)), losses

        return head

    def _make_balance(self, state):
        """A function of what the blocks said: (sum, (balance [J], load [J, E])).

        The sum is that of the active mixtures' balance losses, by their weights.
        """
        weights = jnp.array([m.balance for m in self.mixtures], jnp.float32)
        experts = tuple(m.experts for m in self.mixtures)

        def balance(aux):
            found = compute_imbalance(
                aux["load"], aux["importance"], experts, self.over
            )
            weighed = jnp.where(state["active"], weights * found, 0.0)
            return jnp.sum(weighed), (found, jnp.mean(aux["load"], axis=0))

        return balance

    def _draw_keys(self, state, number=0):
        """The base's blocks, with keys for dropout and jitter where they are drawn."""
        blocks = state["params"]["blocks"]
        if not (self.dropout or self.jitter):
            return blocks
        key = draw_part(state, number)
        stream = jax.random.fold_in(key, len(MAPS))
        drawn: dict = {}
        insert(drawn, f"{ROUTER}/lora_key", jax.random.split(stream, depth(blocks)))
        if self.dropout:
            plain = {n: own for n, own in state["adapters"].items() if n != "mlp"}
            drawn |= dropout_keys(plain, key)
        return attach(blocks, drawn)

    def _fused(self, model, state, batch):
        """`step`'s (adapters, moments, squares of norms [J], losses, seen)."""
        ops = self.ops(model, training=True, real=_find_real(batch))
        params = state["params"] | {"blocks": self._draw_keys(state)}
        move = self._make_mover(state, axis=0)
        return adapter_step(
            *(model, params, state["adapters"], state["moments"], batch, ops),
            jnp.zeros((len(self.mixtures),), jnp.float32),
            head=self._make_head(model, state, batch),
            balance=self._make_balance(state),
            move=lambda layer, w, moments, grads: (
                *move(layer, w, moments, grads),
                _sum_squares(grads, axis=0),
            ),
        )

    def _separate(self, model, state, batch):
        """As `_fused`, with the gradients of all layers first."""

        def part_loss(adapters, number, part):
            ops = self.ops(model, training=True, real=_find_real(part))
            own = state["params"] | {"blocks": self._draw_keys(state, number)}
            own = state | {"params": own, "adapters": adapters}
            x, aux = self._run(model, own, part, ops)
            total, losses = self._make_head(model, state, part)(x)
            more, (found, load) = self._make_balance(state)(aux)
            seen = losses, (found / self.accumulate, load / self.accumulate)
            return total + more / self.accumulate, seen

        grads, (losses, seen) = self._sum_parts(
            jax.grad(part_loss, has_aux=True), state["adapters"], batch
        )
        squares = _sum_squares(grads, axis=1)
        most = [own.adamw.max_grad_norm or math.inf for own in self.mixtures]
        norms = jnp.maximum(jnp.sqrt(squares), 1e-12)
        factor = jnp.minimum(1.0, jnp.array(most, jnp.float32) / norms)
        grads = jax.tree.map(lambda g: g * _align(factor, g, axis=1), grads)
        adapters, moments = self._make_mover(state, axis=1)(
            jnp.int32(0), state["adapters"], state["moments"], grads
        )
        return adapters, moments, squares, losses, seen

    def _sum_parts(self, gradients, adapters, batch):
        """`gradients(adapters, number, part)` summed over the parts of a batch."""
        parts = self.accumulate
        if parts == 1:
            return gradients(adapters, 0, batch)
        count = len(self.mixtures)

        def cut(leaf):  # every part has rows of every mixture
            leaf = leaf.reshape(count, parts, -1, leaf.shape[-1])
            return jnp.swapaxes(leaf, 0, 1).reshape(parts, -1, leaf.shape[-1])

        cut = jax.tree.map(cut, batch)
        numbers = jnp.arange(parts, dtype=jnp.int32)
        first = jax.tree.map(lambda leaf: leaf[0], cut)
        like = jax.eval_shape(gradients, adapters, numbers[0], first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradients(adapters, *part)), None

        return jax.lax.scan(add, zeros, (numbers, cut))[0]

    def _make_mover(self, state, axis: int):
        """A function that moves (layer, adapters, moments, gradients) by one update.

        It returns (adapters, moments).
        `axis` is where the leaves have J: 0 in one layer's, 1 in those of all. Mixtures
        that are not active stay as they are, bit for bit.
        """
        rule = self.mixtures[0].adamw.rule
        decay = jnp.array([m.adamw.weight_decay for m in self.mixtures], jnp.float32)
        rates = [
            own.adamw.find_leaf_rates(
                state["adapters"],
                own.adamw.rate(steps),
                depth(state["adapters"]),
                "blocks/",
            )
            for own, steps in zip(self.mixtures, state["steps"])
        ]
        rates = by_key(jax.tree.map(lambda *own: jnp.stack(own), *rates))

        def update(path, w, held, dw, salt):
            fresh = rule(
                *(w, held, dw, _align(rates[path], w, axis)),
                *(_align(state["steps"] + 1, w, axis), salt),
                weight_decay=_align(decay, w, axis),
            )
            on = _align(state["active"], w, axis)
            return jax.tree.map(
                lambda new, old: jnp.where(on, new, old), fresh, (w, held)
            )

        def move(layer, adapters, moments, gradients):
            return move_leaves(
                adapters, moments, gradients, update, state["step"], layer
            )

        return move

    # What a block computes ------------------------------------------------------------

    def ops(self, model, *, training: bool = False, real=None) -> Ops:
        """`model.ops` that know the adapters of all mixtures."""
        own = self.mixtures
        scales = tuple(m.scale for m in own)
        dropout = self.dropout if training else 0.0
        feed = self.feed(
            scales=scales,
            experts=tuple(m.experts for m in own),
            router=self.router,
            top_k=tuple(m.top_k for m in own),
            top_p=tuple(m.top_p for m in own),
            dropout=dropout,
            jitter=self.jitter if training else 0.0,
        )
        linear = MixtureLinear(scales, dropout)
        if real is None:
            return model.ops._replace(linear=linear, feed=feed)

        def watched(leaves, x, activate):
            return feed(leaves, x, activate, real)

        return model.ops._replace(linear=linear, feed=watched)

    def fuses(self, model) -> bool:
        """Whether adapters move inside the backward pass."""
        return fuses(model, self.update, max_grad_norm(self.mixtures), self.accumulate)

    # What is trained, by one and by all -----------------------------------------------

    def labels(self, state):
        """The state's parts in the user's words."""
        del state
        return {"weights": "params", "lora": "adapters", "optimizer": "moments"}

    def merged(self, state):
        """Refused: which expert is used depends on the token.

        Raises:
          ValueError: always; it names `serving`.
        """
        del state
        raise ValueError(
            "MixLora: experts are chosen a token at a time, so they cannot be merged "
            "into the base. Use serving(model, state), whose model computes them."
        )

    def serving(self, model, state, number: int = 0):
        """(model, params) of one mixture, for `generate`, `evaluate` and losses.

        The base's arrays are shared, not copied; the mixture's are cut out.
        """
        self._check_number("serving", number)
        own = self.mixtures[number]
        ops = MixLora(mixtures=(own,), router=self.router, dropout=0.0).ops(model)
        adapters = jax.tree.map(lambda a: a[:, None], self.mixture(state, number))
        blocks = attach(state["params"]["blocks"], adapters)
        model = dataclasses.replace(model, linear=ops.linear, feed=ops.feed)
        return model, state["params"] | {"blocks": blocks}

    def mixture(self, state, number: int) -> dict:
        """Adapters of one mixture, as `jmem.checkpoints.save_mixlora` takes them."""
        self._check_number("mixture", number)
        return self.storage.take(state["adapters"], number)

    # Jobs come and go: shapes never change, so the compiled step does not either.

    def replaced(self, state, number: int, adapters: dict | None, key=None):
        """`state` with mixture `number` begun anew, from `adapters` or fresh by `key`.

        Its moments and its count of updates begin at zero, and it is active.

        Raises:
          ValueError: `adapters` are not of this mixture's sizes or of this base, or
            neither they nor a key are given.
        """
        self._check_number("replaced", number)
        storage, blocks = self.storage, state["params"]["blocks"]
        if adapters is not None:
            storage.check(adapters, blocks, number)
            fresh = storage.store(adapters, number)
        elif key is not None:
            fresh = storage.draw(self.mixtures[number], blocks, key)
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

    def stopped(self, state, number: int):
        """`state` in which mixture `number` is frozen, until it is `replaced`."""
        self._check_number("stopped", number)
        return state | {"active": state["active"].at[number].set(False)}

    def _check_number(self, what: str, number: int) -> None:
        if not 0 <= number < len(self.mixtures):
            raise ValueError(
                f"MixLora.{what}: number={number}, but mixtures are numbered 0 to "
                f"{len(self.mixtures) - 1}."
            )


def _align(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """`vector` [J] where `like` has J: with axes of one for the others."""
    shape = [1] * like.ndim
    shape[axis] = vector.shape[0]
    return vector.reshape(shape)


def _sum_squares(gradients: Any, axis: int) -> Float[Array, " J"]:
    """Sum of squares of each mixture's gradients, float32."""
    found = [
        jnp.sum(
            jnp.square(g.astype(jnp.float32)),
            axis=tuple(n for n in range(g.ndim) if n != axis),
        )
        for g in jax.tree.leaves(gradients)
    ]
    return sum(found[1:], found[0])


def _average(losses: Float[Array, " J"], active: Bool[Array, " J"]) -> Float[Array, ""]:
    """Over the active mixtures."""
    own = jnp.where(active, losses, 0.0)
    return jnp.sum(own) / jnp.maximum(jnp.sum(active), 1)


def _divide_weights(weights: Float[Array, "B T"], mixtures: int) -> Float[Array, "B T"]:
    """Each weight's share of its own mixture's, or 1 if they sum to less."""
    own = weights.astype(jnp.float32).reshape(mixtures, -1)
    own = own / jnp.maximum(jnp.sum(own, axis=1, keepdims=True), 1.0)
    return own.reshape(weights.shape)


def _find_real(batch) -> Bool[Array, "B T"]:
    """Tokens that some target's loss depends on: what follows them is padding.

    In a row of several documents, those of the same one.
    """
    counted = batch.weights > 0
    if batch.segments is None:
        return jnp.cumsum(counted[:, ::-1], axis=1)[:, ::-1] > 0
    places = jnp.arange(counted.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(counted, places, places.size - 1)
    following = jax.lax.cummin(last, axis=1, reverse=True)
    found = jnp.take_along_axis(counted, following, axis=1)
    return found & (
        jnp.take_along_axis(batch.segments, following, axis=1) == batch.segments
    )
