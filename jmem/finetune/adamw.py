"""AdamW as every method here uses it: one schedule, float32 arithmetic, any storage.

Stock `optax.adamw(mu_dtype=...)` keeps the second moment in the parameters' dtype. Here
both moments are stored in `moment_dtype` and updated in float32, whatever the
parameters are. Its bias correction, 1 - b**t, rounds b to float32 first, and is off by
1.3e-5 of itself at b = 0.999 and the first updates: `correct_bias` is not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax import ScaleByAdamState

from jmem.finetune.checks import check_choice, check_rate
from jmem.finetune.patterns import find_matching
from jmem.finetune.rounding import BLOCK, draw_noise, pack, round_randomly, unpack
from jmem.finetune.zeros import hold_maps
from jmem.program import by_key, format_path

Place = Literal["device", "host"]
"""Where moments live; "host" is pinned memory that the GPU reads and writes."""
Rounding = Literal["nearest", "random"]
Convention = Literal["plain", "transformers"]


def cast(tree: Any, dtype) -> Any:
    """`tree` with its floating leaves in `dtype`; counters and masks stay."""

    def leaf(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if floating else x

    return jax.tree.map(leaf, tree)


def store_in(
    dtype, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`inner` computing in float32 and keeping its floating state in `dtype`."""

    def init(params):
        return cast(inner.init(cast(params, jnp.float32)), dtype)

    def update(updates, state, params=None):
        wide = [cast(tree, jnp.float32) for tree in (updates, state, params)]
        updates, state = inner.update(*wide)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def correct_bias(decay: float, count: ArrayLike) -> jax.Array:
    """1 - decay**count of a moment after `count` updates (from 1), float32.

    Within 4e-7 of the exact value: the logarithm is that of the Python float.
    """
    log = math.log(decay) if decay else -math.inf
    return -jnp.expm1(jnp.asarray(count, jnp.float32) * log)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with its state, whose bias correction is exact."""

    def update(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        first, second = correct_bias(b1, count), correct_bias(b2, count)
        updates = jax.tree.map(
            lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu
        )
        return updates, ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled weight decay Adam (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    Where recipes differ, `convention` says which is followed: a warm-up of n steps
    begins at 1/n of the peak here, at 0 in transformers; here all that is trained is
    decayed, there neither norms nor biases are.
    """

    learning_rate: float = 5e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from its peak to zero over `total_steps`."""
    warmup_steps: int = 0
    """Steps of linear rise to the peak, which update number `warmup_steps` has (from
    1, or from 0 where `convention` is "transformers")."""
    total_steps: int | None = None
    """Updates the schedule is laid out for; needed unless it is constant. None: in an
    experiment, its `--steps`."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Share of a weight, times the rate, that an update takes off it."""
    convention: Convention = "plain"
    """Whose warm-up and weight decay: "plain" moves weights from the first update on
    and decays all that is trained; "transformers" is Hugging Face's Trainer, whose
    first update of a warm-up has rate 0, and which decays neither norms nor biases."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are scaled down to; 0 leaves them alone."""
    moment_dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    """Storage of both moments. bfloat16 halves them, but 1 - b2 = 0.001 is below its
    resolution (2^-8): the second moment then follows slowly or not at all, unless it is
    rounded at random, as a fused step does (`jmem.finetune.lisa`). float8 is a byte a
    value and a scale for 256, and needs a fused step."""
    weight_rounding: Rounding = "nearest"
    """How 16-bit weights are rounded. An update below half of their resolution (2^-9 of
    a weight) is lost to the nearest; at random, with the chances that make the mean
    exact, it counts in the long run. "random" needs a fused step."""
    rates: tuple[tuple[str, float], ...] = ()
    """(pattern, factor) pairs (`jmem.finetune.patterns`): the rate of every parameter
    that a pattern means is `factor` times the schedule's. Of several, the last holds.
    LoRA+ (Hayou et al., 2024, arXiv:2402.12354) is ("*/lora_b", 16.0)."""
    layer_decay: float = 1.0
    """The rate of block l of L is multiplied by layer_decay^(L - 1 - l), that of the
    embedding (also where it is the head) by layer_decay^L."""

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay", "eps"):
            check_rate("AdamW", name, getattr(self, name))
        for name in ("max_grad_norm", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"AdamW: {name}={getattr(self, name)} must not be negative."
                )
        least = np.finfo(np.float32).tiny  # below it eps is zero
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps >= least):
            raise ValueError(
                f"AdamW: b1={self.b1}, b2={self.b2}, eps={self.eps}: the decays must "
                "lie in [0, 1) and eps must be positive."
            )
        total, falls = self.total_steps, self.schedule != "constant"
        if falls and total is not None and total <= self.warmup_steps:
            raise ValueError(
                f"AdamW: schedule={self.schedule!r} needs total_steps above "
                f"warmup_steps={self.warmup_steps}, got total_steps={total}."
            )
        for pattern, factor in self.rates:
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"AdamW: rates={self.rates} gives {pattern!r} the factor {factor}, "
                    "which must be finite and not negative."
                )
            own = self.learning_rate * factor
            check_rate("AdamW", f"learning_rate * {factor} of rates", own)
        check_choice("AdamW", "weight_rounding", self.weight_rounding, Rounding)
        check_choice("AdamW", "convention", self.convention, Convention)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"AdamW: layer_decay={self.layer_decay} must be above 0 and at most 1, "
                "which is no decay."
            )

    def rate(self, step: jax.Array) -> jax.Array:
        """Learning rate of update number `step` (from 0), float32.

        Raises:
          ValueError: the schedule falls, and nobody said over how many updates.
        """
        step = jnp.asarray(step, jnp.float32)
        begun = 0 if self.convention == "transformers" and self.warmup_steps else 1
        warmup = jnp.minimum(1.0, (step + begun) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate * warmup
        if self.total_steps is None:
            raise ValueError(
                f"AdamW: schedule={self.schedule!r} falls to zero at total_steps=None. "
                "Give the updates that it is laid out for: those that are trained."
            )
        span = self.total_steps - self.warmup_steps
        done = jnp.clip((step - self.warmup_steps) / span, 0.0, 1.0)
        left = 1 - done
        if self.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return self.learning_rate * jnp.where(step < self.warmup_steps, warmup, left)

    def find_factors(self, trained: Any, above: str = "") -> dict[str, float]:
        """What `rates` multiplies the rate of each leaf of `trained` by, by path.

        `above` leads the leaves' paths.

        Raises:
          ValueError: a pattern of `rates` means nothing in `trained`.
        """
        factors = {above + path: 1.0 for path in by_key(trained)}
        for pattern, factor in self.rates:
            found = find_matching(pattern, factors, f"AdamW: rates={self.rates}")
            factors |= dict.fromkeys(found, factor)
        return factors

    def find_leaf_rates(
        self, trained: Any, rate: jax.Array, layers: int, above: str = ""
    ) -> Any:
        """`rate` as each leaf of the tree `trained` has it, by `rates` and depth.

        float32 scalars; [layers, 1, ...] for leaves of the stacked blocks where the
        rate decays over them.
        """
        factors = self.find_factors(trained, above)

        def leaf(path, value):
            name = above + format_path(path)
            factor = factors[name]
            if self.layer_decay < 1 and name.startswith("blocks/"):
                later = np.arange(layers - 1, -1, -1)  # blocks behind each one
                decay = np.float32(factor * self.layer_decay**later)
                return rate * decay.reshape((layers,) + (1,) * (value.ndim - 1))
            if name.startswith("embed/"):
                factor *= self.layer_decay**layers
            return rate if factor == 1 else rate * np.float32(factor)

        return jax.tree.map_with_path(leaf, trained)

    def decays(self, path: str) -> bool:
        """Whether the parameter at `path` is decayed: by transformers, no norm or bias.

        >>> AdamW(convention="transformers").decays("blocks/attention_norm/scale")
        False
        """
        is_small = path.endswith(("bias", "scale")) or "norm" in path.lower()
        return self.convention == "plain" or not is_small

    def direction(self, above: str = "") -> optax.GradientTransformation:
        """The update before it is scaled by -rate: no schedule, no clipping.

        Its step count is that of its own moments, so a group of parameters whose
        moments start afresh gets its bias correction afresh. `above` leads the paths
        of its leaves.

        Raises:
          ValueError: moments of 8 bits, which only a fused step keeps.
        """
        if self.moment_dtype == "float8":
            raise ValueError(
                "AdamW: moment_dtype='float8' needs a fused step: Lisa with "
                "adamw.max_grad_norm=0 and accumulate=1. Choose that, or 'bfloat16'."
            )
        adam = scale_by_adam(self.b1, self.b2, self.eps)
        if self.weight_decay:

            def mask(tree):
                return jax.tree.map_with_path(
                    lambda path, _: self.decays(above + format_path(path)), tree
                )

            decayed = optax.add_decayed_weights(
                self.weight_decay, None if self.convention == "plain" else mask
            )
            adam = optax.chain(adam, decayed)
        return store_in(self.moment_dtype, adam)

    def rule(
        self,
        w: jax.Array,
        state: tuple[jax.Array, ...],
        dw: jax.Array,
        rate: jax.Array,
        t: jax.Array,
        salt: jax.Array,
        weight_decay: jax.Array | float | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Update number `t` (from 1) of a part of a weight: (w, its moments).

        `rate`, `t` and `weight_decay` (in place of the field) broadcast against w.

        What `direction` and `descend` do to all of it, in float32. Moments of 16 or 8
        bits are rounded at random (`jmem.finetune.rounding`), by `salt`.
        """
        m, v = self._widen(state)
        m = self.b1 * m + (1 - self.b1) * dw
        v = self.b2 * v + (1 - self.b2) * jnp.square(dw)
        wide = w.astype(jnp.float32)
        first, second = correct_bias(self.b1, t), correct_bias(self.b2, t)
        moved = m / first / (jnp.sqrt(v / second) + self.eps)
        decay = self.weight_decay if weight_decay is None else weight_decay
        wide -= rate * (moved + decay * wide)
        if self.weight_rounding == "random" and w.dtype == jnp.bfloat16:
            own = draw_noise(w.shape, salt ^ jnp.uint32(0x2545F491))
            wide = round_randomly(wide, own, mantissa=7)
        return wide.astype(w.dtype), self._store(m, v, salt)

    def _widen(self, state: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        if self.moment_dtype == "float8":
            m, m_scale, root, root_scale = state
            return unpack(m, m_scale), jnp.square(unpack(root, root_scale))
        m, v = (moment.astype(jnp.float32) for moment in state)
        return m, v

    def _store(
        self, m: jax.Array, v: jax.Array, salt: jax.Array
    ) -> tuple[jax.Array, ...]:
        other = salt ^ jnp.uint32(0x5BD1E995)
        if self.moment_dtype == "float8":
            return *pack(m, salt), *pack(jnp.sqrt(v), other)
        if self.moment_dtype == "bfloat16":
            m, v = (
                round_randomly(x, draw_noise(x.shape, salt), 7)
                for x, salt in ((m, salt), (v, other))
            )
        return m.astype(self.moment_dtype), v.astype(self.moment_dtype)

    def packed_moments(self, trained: Any) -> Any:
        """A tuple of moments, zero, for every leaf: what `rule` keeps."""

        def leaf(path, value):
            shape = list(value.shape)
            if self.moment_dtype != "float8":
                return tuple(jnp.zeros(shape, self.moment_dtype) for _ in range(2))
            if (
                format_path(path) == "head/kernel"
            ):  # cut along its last axis when it moves
                *above, rows, columns = shape
                scale = (*above, -(-rows // min(BLOCK, rows)), columns)
            else:
                scale = (*shape[:-1], -(-shape[-1] // min(BLOCK, shape[-1])))
            kinds = (shape, jnp.float8_e4m3fn), (scale, jnp.float32)
            return tuple(jnp.zeros(*kind) for kind in (*kinds, *kinds))

        return jax.tree.map_with_path(leaf, trained)

    def clip(self, grads: Any) -> tuple[Any, jax.Array]:
        """Gradients scaled to `max_grad_norm`, and their norm before.

        Each gradient keeps its dtype; the norm is a float32 sum over all leaves.
        """
        factor, norm = self.clip_factor(grads)
        return (scale(grads, factor) if self.max_grad_norm else grads), norm

    def clip_factor(self, grads: Any) -> tuple[jax.Array, jax.Array]:
        """What `clip` scales by, 1 if it does not, and the norm; float32 scalars.

        Raises:
          ValueError: weights are to be rounded at random, which only a fused step does,
            and that clips nothing.
        """
        if self.weight_rounding == "random":
            raise ValueError(
                "AdamW: weight_rounding='random' needs a fused step: Lisa with "
                "adamw.max_grad_norm=0 and accumulate=1. Choose that, or 'nearest'."
            )
        squares = [
            jnp.sum(jnp.square(cast(g, jnp.float32))) for g in jax.tree.leaves(grads)
        ]
        norm = jnp.sqrt(sum(squares))
        if not self.max_grad_norm:
            return jnp.float32(1), norm
        return jnp.minimum(1.0, self.max_grad_norm / jnp.maximum(norm, 1e-12)), norm


def add_master(rule: Callable) -> Callable:
    """`rule` moving a float32 copy of the weight, the last array of the state.

    The copy begins as the weight at the first update, and the weight is the copy,
    rounded: what 16 bits would lose of an update adds up.
    """

    def moved(w, state, dw, rate, t, salt, **decay):
        *state, copy = state
        wide = jnp.where(t == 1, w.astype(jnp.float32), copy)
        wide, state = rule(wide, tuple(state), dw, rate, t, salt, **decay)
        return wide.astype(w.dtype), (*state, wide)

    return moved


class PackedMoments(NamedTuple):
    """A step count and moments that are not optax's: of 8 bits, or of other rules."""

    steps: jax.Array
    moments: Any
    """A tuple of arrays for every leaf (`AdamW.packed_moments`)."""


def read_moments(optimizer: Any) -> tuple[Any, Any]:
    """The step count of an optimizer's state, and a tuple of moments for every leaf."""
    if isinstance(optimizer, PackedMoments):
        return optimizer
    adam = optimizer if isinstance(optimizer, ScaleByAdamState) else optimizer[0]
    return adam.count, jax.tree.map(lambda m, v: (m, v), adam.mu, adam.nu)


def replace_moments(optimizer: Any, count: jax.Array, moments: Any, like: Any) -> Any:
    """`optimizer` with a count and moments as `read_moments` returns them.

    `like` is a tree of the structure of its moments.
    """
    if isinstance(optimizer, PackedMoments):
        return PackedMoments(count, moments)
    mu = jax.tree.map(lambda leaf, pair: pair[0], like, moments)
    nu = jax.tree.map(lambda leaf, pair: pair[1], like, moments)
    if isinstance(optimizer, ScaleByAdamState):
        return ScaleByAdamState(count, mu, nu)
    return (ScaleByAdamState(count, mu, nu), *optimizer[1:])


def scale(tree: Any, factor: jax.Array) -> Any:
    """`tree` times a scalar, multiplied in float32, each leaf in its own dtype."""
    return jax.tree.map(
        lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype), tree
    )


def descend(params: Any, updates: Any, rates: Any) -> Any:
    """Params - rates * updates, added in float32 and stored in the parameters' dtype.

    `rates` is a tree of the same leaves (`AdamW.find_leaf_rates`).
    """
    return jax.tree.map(
        lambda p, u, rate: (p.astype(jnp.float32) - rate * u).astype(p.dtype),
        params,
        updates,
        rates,
    )


def gradient_step(
    adamw: AdamW,
    loss: jax.Array,
    grads: Any,
    trained: Any,
    optimizer: Any,
    step: jax.Array,
    layers: int,
    above: str = "",
    keep_zeros: bool = False,
):
    """One AdamW update of the tree `trained` by its gradients.

    Returns (trained, optimizer, metrics). Shared by every method whose gradients exist
    all at once. `layers` is the model's, `above` leads the paths of `trained`.
    `keep_zeros` is of a tree that is a model's (`jmem.finetune.zeros`).
    """
    if keep_zeros:
        grads = hold_maps(grads, trained)
    grads, norm = adamw.clip(grads)
    updates, optimizer = adamw.direction().update(grads, optimizer, trained)
    rate = adamw.rate(step)
    rates = adamw.find_leaf_rates(trained, rate, layers, above)
    metrics = {"loss": loss, "lr": rate, "grad_norm": norm}
    moved = descend(trained, updates, rates)
    return hold_maps(moved, trained) if keep_zeros else moved, optimizer, metrics
