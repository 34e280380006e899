"""A linear map that declares its parameters and leaves its product to `ops.linear`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.nn.ops import LinearMap


def expand_to(vector: Float[Array, " N"], like: jax.Array) -> jax.Array:
    """`vector` with leading axes of one, so that it broadcasts against `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def add_bias(leaf: dict[str, Any], y: jax.Array) -> jax.Array:
    """`y` with the leaf's bias, if it has one, in y's dtype."""
    return y + expand_to(leaf["bias"].astype(y.dtype), y) if "bias" in leaf else y


def tie(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`weights`, integers, tied to `x` so that XLA cannot use them before it.

    Left free, XLA expands every packed map of a block at its start (seen in 0.12), and
    it takes an optimization barrier out before it orders anything.
    """
    return weights | _say_no(x).astype(weights.dtype)


def follow(x: jax.Array, before: jax.Array) -> jax.Array:
    """`x`, tied to `before`: sparse maps that read one x are expanded one by one."""
    return jnp.where(_say_no(before), jnp.zeros((), x.dtype), x)


def _say_no(x: jax.Array) -> jax.Array:
    """False, once `x` is computed."""
    first = x.reshape(-1)[0]
    return (first > 1) & (first < -1)  # no pass of XLA knows


def dense(name: str, leaf: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """`x @ kernel (+ bias)` in x's dtype; the matrix unit accumulates in float32.

    A kernel of another dtype is cast where it is used, and cast again in the backward
    pass: a stack that keeps what its blocks compute would keep a copy of all kernels.
    """
    del name

    def product(x, kernel):
        return x @ kernel.astype(x.dtype)

    if leaf["kernel"].dtype != x.dtype:
        product = jax.checkpoint(product, prevent_cse=False)
    return add_bias(leaf, product(x, leaf["kernel"]))


class Linear(nn.Module):
    """A linear map whose product is computed by the function `linear` that it is given.

    At `init` it declares `kernel` [in, features] and perhaps `bias` [features]; at
    `apply` it passes on its path from the module that was applied ("attention/q" in a
    block) and the dict it was given, so a leaf may have gained `lora_a` or lost
    `kernel` for packed values without another module.
    """

    features: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, linear: LinearMap) -> jax.Array:
        if self.is_initializing():
            shape = (x.shape[-1], self.features)
            self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
            if self.use_bias:
                self.param("bias", nn.initializers.zeros, shape[1:], self.dtype)
        return linear(
            "/".join(self.path) or "linear", dict(self.variables["params"]), x
        )
