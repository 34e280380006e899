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
See      configs/mixlora/, experiments/mixlora.py, tests/finetune/test_mixlora.py
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmem.finetune.accumulate import check_parts
from jmem.finetune.adamw import AdamW
from jmem.finetune.adapters import adapter_step, attach, check_update, fuses, moved
from jmem.finetune.descent import refuse_stats
from jmem.finetune.lora import scale_of
from jmem.finetune.mixture import Router, imbalance
from jmem.finetune.mixture_ops import HIDDEN, MixtureFeed, MixtureLinear, by_mixture
from jmem.finetune.walk import Update
from jmem.models.next_token import head_loss, token_positions
from jmem.nn import quantised
from jmem.nn.maps import (
    MAPS,
    check_maps,
    choose_maps,
    find_dicts,
    find_maps,
    insert,
    number_map,
)
from jmem.nn.ops import Ops
from jmem.nn.stack import depth, run_stack
from jmem.program import by_key
from jmem.program import key as path_of

Balance = Literal["global", "per_layer"]

MLP, ROUTER = "mlp/", "mlp/router"
"""Paths inside a block: of the maps that gain experts, and of what chooses those."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """One model to be trained: sizes, routing and optimizer; defaults are official."""

    rank: int = 16
    """Of every adapter, r."""
    alpha: float = 32.0
    """Products are scaled by alpha / rank ..."""
    rslora: bool = False
    """... or by alpha / sqrt(rank)."""
    experts: int = 8
    """Adapters of an MLP, E. One expert is plain LoRA, and its router does nothing."""
    top_k: int = 2
    """Experts a token uses, where the router is "top_k"."""
    top_p: float = 0.8
    """Probability that a token's experts sum to at least, where it is "top_p"."""
    balance: float = 1e-2
    """Weight of the balance loss, which is top_k when experts are used alike."""
    maps: tuple[str, ...] = MAPS
    """Linear maps that gain adapters, by patterns (`jmem.nn.maps`): "q" means every map
    whose path ends so. Those of "mlp" gain experts. The default: those a block has."""
    adamw: AdamW = AdamW(learning_rate=2e-4, weight_decay=0.01, max_grad_norm=0.0)
    """Also its schedule. Of several mixtures b1, b2, eps and moment_dtype are one."""

    def __post_init__(self):
        for name in ("rank", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Mixture: {name}={getattr(self, name)}; need >= 1.")
        if self.top_k > self.experts:
            raise ValueError(
                f"Mixture: top_k={self.top_k} exceeds experts={self.experts}; a token "
                "uses each expert once at most. Lower top_k, or add experts."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"Mixture: top_p={self.top_p} must be above 0 and at most 1, which "
                "uses every expert."
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"Mixture: alpha={self.alpha} must be positive, finite.")
        if not 0 <= self.balance < math.inf:
            raise ValueError(
                f"Mixture: balance={self.balance} must be finite and not negative."
            )
        check_maps("Mixture", self.maps)
        if set(self.maps) <= set(MAPS) - set(HIDDEN):
            raise ValueError(
                f"Mixture: maps={self.maps} names none of the MLP's maps {HIDDEN}, so "
                "there are no experts. Use Lora for adapters of attention alone."
            )
        if self.adamw.moment_dtype == "float8" or self.adamw.layer_decay != 1:
            raise ValueError(
                f"Mixture: adamw.moment_dtype={self.adamw.moment_dtype!r} and "
                f"layer_decay={self.adamw.layer_decay}: mixtures keep moments in "
                "'float32' or 'bfloat16', and one rate for all layers."
            )

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)


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
        check_parts("MixLora", self.accumulate)
        if not self.mixtures:
            raise ValueError("MixLora: mixtures=() is empty; give at least one.")
        for name, kind in (("router", Router), ("over", Balance)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"MixLora: {name}={getattr(self, name)!r} must be one of "
                    f"{get_args(kind)}."
                )
        for name in ("jitter", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"MixLora: {name}={getattr(self, name)} must be at least 0 and "
                    "below 1."
                )
        first = self.mixtures[0]
        for number, other in enumerate(self.mixtures):
            if other.maps != first.maps:
                raise ValueError(
                    f"MixLora: mixtures[{number}].maps={other.maps} and mixtures[0]."
                    f"maps={first.maps}; mixtures trained together adapt the same maps."
                )
            for name in ("b1", "b2", "eps", "moment_dtype"):
                own, one = (getattr(m.adamw, name) for m in (other, first))
                if own != one:
                    raise ValueError(
                        f"MixLora: mixtures[{number}].adamw.{name}={own!r} and "
                        f"mixtures[0].adamw.{name}={one!r}; mixtures trained together "
                        "share it. Rates, decays, schedules and clipping may differ."
                    )
        check_update("MixLora", self.update, self._max_grad_norm, self.accumulate)

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

    # Sizes ----------------------------------------------------------------------------

    @property
    def _max_grad_norm(self) -> float:
        """The largest of the mixtures'; 0 where none is clipped."""
        return max(m.adamw.max_grad_norm for m in self.mixtures)

    @property
    def rank(self) -> int:
        """Of the stored adapters: the highest."""
        return max(m.rank for m in self.mixtures)

    @property
    def experts(self) -> int:
        """Of the stored adapters: the most."""
        return max(m.experts for m in self.mixtures)

    def _static(self, training: bool) -> dict[str, Any]:
        own = self.mixtures
        return {
            "experts": tuple(m.experts for m in own),
            "router": self.router,
            "top_k": tuple(m.top_k for m in own),
            "top_p": tuple(m.top_p for m in own),
            "jitter": self.jitter if training else 0.0,
        }

    def ops(self, model, *, training: bool = False, real=None) -> Ops:
        """`model.ops` that know the adapters of all mixtures."""
        scales = tuple(m.scale for m in self.mixtures)
        dropout = self.dropout if training else 0.0
        feed = self.feed(scales, **self._static(training), dropout=dropout)
        linear = MixtureLinear(scales, dropout)
        if real is None:
            return model.ops._replace(linear=linear, feed=feed)

        def watched(leaves, x, activate):
            return feed(leaves, x, activate, real)

        return model.ops._replace(linear=linear, feed=watched)

    def fuses(self, model) -> bool:
        """Whether adapters move inside the backward pass."""
        return fuses(model, self.update, self._max_grad_norm, self.accumulate)

    # Adapters -------------------------------------------------------------------------

    def adapters(self, blocks: dict, key: jax.Array) -> dict:
        """Fresh adapters of all mixtures, float32, J before their own axes.

        A is uniform within 1/sqrt(in) and B zero, so the model is its base; routers are
        normal(0, 0.02). What a mixture lacks in rank or experts is zero, and stays so.
        """
        keys = jax.random.split(key, len(self.mixtures))
        made = [self._fresh(m, blocks, k) for m, k in zip(self.mixtures, keys)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *made)

    def _fresh(self, own: Mixture, blocks: dict, key: jax.Array) -> dict:
        """One mixture's adapters, as stored: of the highest rank and most experts."""
        dtype = quantised.unpacked_dtype(blocks)
        maps, found = find_maps(blocks), {}
        for name in choose_maps(own.maps, maps, f"MixLora: maps={own.maps}"):
            layers, inputs, outputs = quantised.described_kernel(
                maps[name], dtype
            ).shape
            stream = jax.random.fold_in(key, number_map(name))
            experts = own.experts if is_mixed(name) else 1
            shape = layers, inputs, experts, own.rank
            bound = inputs**-0.5
            a = jax.random.uniform(stream, shape, jnp.float32, -bound, bound)
            b = jnp.zeros((layers, experts, own.rank, outputs), jnp.float32)
            pair = self._padded({"lora_a": a, "lora_b": b}, is_mixed(name))
            insert(found, name, pair)
        if "mlp" not in found:
            raise ValueError(
                f"MixLora: maps={own.maps} names no map of these blocks' MLPs, "
                f"{tuple(name for name in maps if is_mixed(name))}."
            )
        layers, width, _ = quantised.described_kernel(maps["mlp/up"], dtype).shape
        shape = layers, width, own.experts
        draw = jax.random.normal(jax.random.fold_in(key, len(MAPS)), shape)
        missing = self.experts - own.experts
        kernel = jnp.pad(0.02 * draw, ((0, 0), (0, 0), (0, missing)))
        insert(found, ROUTER, {"kernel": kernel})
        return found

    def _padded(self, pair: dict, mixed: bool) -> dict:
        """A [L, in, e, r] and B [L, e, r, out] with experts and ranks side by side."""
        a, b = pair["lora_a"], pair["lora_b"]
        experts = self.experts if mixed else 1
        more = (0, experts - a.shape[2]), (0, self.rank - a.shape[3])
        a = jnp.pad(a, ((0, 0), (0, 0), *more))
        b = jnp.pad(b, ((0, 0), *more, (0, 0)))
        return {
            "lora_a": a.reshape(*a.shape[:2], -1),
            "lora_b": b.reshape(b.shape[0], -1, b.shape[-1]),
        }

    def _cut(self, leaf, path: str, number: int):
        """Mixture `number`'s own part of a stored leaf: [L, ...], nothing padded."""
        own, leaf = self.mixtures[number], leaf[:, number]
        if path.startswith(ROUTER):
            return leaf[..., : own.experts]
        experts = (self.experts, own.experts) if is_mixed(path) else (1, 1)
        if path.endswith("lora_a"):
            parts = leaf.reshape(*leaf.shape[:2], experts[0], self.rank)
            parts = parts[:, :, : experts[1], : own.rank]
            return parts.reshape(*leaf.shape[:2], -1)
        parts = leaf.reshape(leaf.shape[0], experts[0], self.rank, -1)
        parts = parts[:, : experts[1], : own.rank]
        return parts.reshape(leaf.shape[0], -1, leaf.shape[-1])

    def _stored(self, tree: dict, number: int) -> dict:
        """What `_cut` is the inverse of, for a whole tree: [L, ...] as stored."""
        own, found = self.mixtures[number], {}
        tree = jax.tree.map(jnp.asarray, tree)
        missing = self.experts - own.experts
        kernel = jnp.pad(
            tree["mlp"]["router"]["kernel"], ((0, 0), (0, 0), (0, missing))
        )
        insert(found, ROUTER, {"kernel": kernel})
        for name, leaf in find_adapters(tree).items():
            experts = own.experts if is_mixed(name) else 1
            a, b = leaf["lora_a"], leaf["lora_b"]
            a = a.reshape(*a.shape[:2], experts, own.rank)
            b = b.reshape(b.shape[0], experts, own.rank, b.shape[-1])
            pair = {"lora_a": a, "lora_b": b}
            insert(found, name, self._padded(pair, is_mixed(name)))
        return found

    # State ----------------------------------------------------------------------------

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
            own.adamw.factors(adapters, "blocks/")
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
        alone = MixLora(
            mixtures=(self.mixtures[number],), router=self.router, dropout=0.0
        )
        adapters = self.mixture(state, number)
        adapters = jax.tree.map(lambda a: a[:, None], adapters)
        ops = alone.ops(model)
        model = dataclasses.replace(model, linear=ops.linear, feed=ops.feed)
        blocks = attach(state["params"]["blocks"], adapters)
        return model, state["params"] | {"blocks": blocks}

    def mixture(self, state, number: int) -> dict:
        """Adapters of one mixture, as `jmem.checkpoints.save_mixlora` takes them."""
        self._check_number("mixture", number)
        return jax.tree.map_with_path(
            lambda path, leaf: self._cut(leaf, path_of(path), number),
            state["adapters"],
        )

    def replaced(self, state, number: int, adapters: dict | None, key=None):
        """`state` with mixture `number` begun anew, from `adapters` or fresh by `key`.

        Shapes stay, so the compiled step does too: jobs may come and go. Its moments
        and its count of updates begin at zero, and it is active.

        Raises:
          ValueError: `adapters` are not of this mixture's sizes or of this base, or
            neither they nor a key are given.
        """
        self._check_number("replaced", number)
        blocks = state["params"]["blocks"]
        if adapters is None:
            if key is None:
                raise ValueError(
                    "MixLora.replaced: adapters=None and key=None; give adapters that "
                    "were trained, or a key to draw fresh ones."
                )
            fresh = self._fresh(self.mixtures[number], blocks, key)
        else:
            self._check_fits(adapters, blocks, number)
            fresh = self._stored(adapters, number)

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

    def _check_fits(self, adapters: dict, blocks: dict, number: int) -> None:
        own = self.mixtures[number]
        alone = MixLora(mixtures=(own,))
        wanted = jax.eval_shape(
            lambda key: alone._fresh(own, blocks, key), jax.random.key(0)
        )
        given, needed = (
            {path: leaf.shape for path, leaf in by_key(tree).items()}
            for tree in (adapters, wanted)
        )
        for path in sorted(given.keys() | needed.keys()):
            if given.get(path) != needed.get(path):
                raise ValueError(
                    f"MixLora: adapters hold {path} with shape {given.get(path)}, but "
                    f"rank={own.rank}, experts={own.experts}, maps={own.maps} and this "
                    f"base need {needed.get(path)}. Make the mixture with the "
                    "adapters' own settings, over the base they were trained on."
                )

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
        batch = batch._replace(weights=_shares(batch.weights, count))
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
            "loss": _mean(losses, active),
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
        params, positions = state["params"], token_positions(batch.tokens)
        blocks = attach(params["blocks"], state["adapters"])
        x = model.embed(params, batch.tokens, positions)
        x, _, aux = run_stack(model.block, blocks, x, positions, ops, remat=model.remat)
        return x, aux

    def losses(self, model, state, batch) -> Float[Array, " J"]:
        """Cross-entropy of every mixture on its rows, without dropout or balance."""
        x, _ = self._run(model, state, batch, self.ops(model))
        weights = _shares(batch.weights, len(self.mixtures))
        return self._head(model, state, batch._replace(weights=weights))(x)[1]

    def load(self, model, state, batch) -> Float[Array, "L J E"]:
        """Slots that a token of the batch spends on each expert, layer by layer."""
        ops = self.ops(model, real=_real(batch))
        return self._run(model, state, batch, ops)[1]["load"]

    def loss(self, model, state, batch) -> Float[Array, ""]:
        """Mean of `losses` over the active mixtures."""
        return _mean(self.losses(model, state, batch), state["active"])

    def _head(self, model, state, batch):
        """X -> (sum of the active mixtures' losses, all losses [J]).

        Each loss is the sum over a mixture's tokens, by the batch's weights.
        """
        count = len(self.mixtures)
        params = model.head_params(state["params"])
        given = batch.targets.reshape(count, -1), batch.weights.reshape(count, -1)

        def head(x):
            own = zip(by_mixture(x, count), *given)
            losses = [head_loss(model, model.ops, params, *parts) for parts in own]
            losses = jnp.stack(losses)
            return jnp.sum(jnp.where(state["active"], losses, 0.0)), losses

        return head

    def _balance(self, state):
        """Aux -> (the weighed sum of the active mixtures' balance losses, seen)."""
        weights = jnp.array([m.balance for m in self.mixtures], jnp.float32)
        experts = tuple(m.experts for m in self.mixtures)

        def balance(aux):
            found = imbalance(aux["load"], aux["importance"], experts, self.over)
            weighed = jnp.where(state["active"], weights * found, 0.0)
            return jnp.sum(weighed), (found, jnp.mean(aux["load"], axis=0))

        return balance

    def _blocks(self, state, number=0):
        """The base's blocks, with keys for dropout and jitter where they are drawn."""
        blocks = state["params"]["blocks"]
        if not (self.dropout or self.jitter):
            return blocks
        key = jax.random.wrap_key_data(state["key"])
        key = jax.random.fold_in(jax.random.fold_in(key, state["step"]), number)
        layers = depth(blocks)

        def keys(number):
            stream = jax.random.fold_in(key, number)
            return {"lora_key": jax.random.split(stream, layers)}

        drawn: dict = {}
        insert(drawn, ROUTER, keys(len(MAPS)))
        if self.dropout:
            for name in find_adapters(state["adapters"]):
                if not is_mixed(name):
                    insert(drawn, name, keys(number_map(name)))
        return attach(blocks, drawn)

    def _fused(self, model, state, batch):
        """`step`'s (adapters, moments, squares of norms [J], losses, seen)."""
        ops = self.ops(model, training=True, real=_real(batch))
        params = state["params"] | {"blocks": self._blocks(state)}
        move = self._mover(state, axis=0)
        return adapter_step(
            *(model, params, state["adapters"], state["moments"], batch, ops),
            jnp.zeros((len(self.mixtures),), jnp.float32),
            head=self._head(model, state, batch),
            balance=self._balance(state),
            move=lambda layer, w, moments, grads: (
                *move(layer, w, moments, grads),
                _squares(grads, axis=0),
            ),
        )

    def _separate(self, model, state, batch):
        """As `_fused`, with the gradients of all layers first."""

        def part_loss(adapters, number, part):
            ops = self.ops(model, training=True, real=_real(part))
            own = state["params"] | {"blocks": self._blocks(state, number)}
            own = state | {"params": own, "adapters": adapters}
            x, aux = self._run(model, own, part, ops)
            total, losses = self._head(model, state, part)(x)
            more, (found, load) = self._balance(state)(aux)
            seen = losses, (found / self.accumulate, load / self.accumulate)
            return total + more / self.accumulate, seen

        grads, (losses, seen) = self._summed(
            jax.grad(part_loss, has_aux=True), state["adapters"], batch
        )
        squares = _squares(grads, axis=1)
        most = [own.adamw.max_grad_norm or math.inf for own in self.mixtures]
        norms = jnp.maximum(jnp.sqrt(squares), 1e-12)
        factor = jnp.minimum(1.0, jnp.array(most, jnp.float32) / norms)
        grads = jax.tree.map(lambda g: g * _along(factor, g, axis=1), grads)
        adapters, moments = self._mover(state, axis=1)(
            jnp.int32(0), state["adapters"], state["moments"], grads
        )
        return adapters, moments, squares, losses, seen

    def _summed(self, gradients, adapters, batch):
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

    def _mover(self, state, axis: int):
        """(layer, adapters, moments, gradients) -> (adapters, moments), updated.

        `axis` is where the leaves have J: 0 in one layer's, 1 in those of all. Mixtures
        that are not active stay as they are, bit for bit.
        """
        rule = self.mixtures[0].adamw.rule
        decay = jnp.array([m.adamw.weight_decay for m in self.mixtures], jnp.float32)
        rates = [
            own.adamw.leaf_rates(
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
                *(w, held, dw, _along(rates[path], w, axis)),
                *(_along(state["steps"] + 1, w, axis), salt),
                weight_decay=_along(decay, w, axis),
            )
            on = _along(state["active"], w, axis)
            return jax.tree.map(
                lambda new, old: jnp.where(on, new, old), fresh, (w, held)
            )

        def move(layer, adapters, moments, gradients):
            return moved(adapters, moments, gradients, update, state["step"], layer)

        return move


def is_mixed(path: str) -> bool:
    """Whether the map at this path of a block gains experts, not one adapter."""
    return path.startswith(MLP)


def find_adapters(tree: dict) -> dict[str, dict]:
    """The dicts of A and B, by the name of the map that they adapt."""
    return find_dicts(tree, lambda leaf: "lora_a" in leaf)


def _along(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """`vector` [J] where `like` has J: with axes of one for the others."""
    shape = [1] * like.ndim
    shape[axis] = vector.shape[0]
    return vector.reshape(shape)


def _squares(gradients: Any, axis: int) -> Float[Array, " J"]:
    """Sum of squares of each mixture's gradients, float32."""
    found = [
        jnp.sum(
            jnp.square(g.astype(jnp.float32)),
            axis=tuple(n for n in range(g.ndim) if n != axis),
        )
        for g in jax.tree.leaves(gradients)
    ]
    return sum(found[1:], found[0])


def _mean(losses: Float[Array, " J"], active: Bool[Array, " J"]) -> Float[Array, ""]:
    """Over the active mixtures."""
    own = jnp.where(active, losses, 0.0)
    return jnp.sum(own) / jnp.maximum(jnp.sum(active), 1)


def _shares(weights: Float[Array, "B T"], mixtures: int) -> Float[Array, "B T"]:
    """Each weight's share of its own mixture's, or 1 if they sum to less."""
    own = weights.astype(jnp.float32).reshape(mixtures, -1)
    own = own / jnp.maximum(jnp.sum(own, axis=1, keepdims=True), 1.0)
    return own.reshape(weights.shape)


def _real(batch) -> Bool[Array, "B T"]:
    """Tokens that some target's loss depends on: what follows them is padding."""
    return jnp.cumsum(batch.weights[:, ::-1] > 0, axis=1)[:, ::-1] > 0
