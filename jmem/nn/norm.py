"""RMSNorm and LayerNorm."""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.nn.linear import expand_to

NormKind = Literal["rms", "layer"]


def rms_norm(x: jax.Array, scale: Float[Array, " M"], eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * scale`; float32 inside, x's dtype outside.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467; as in Llama, the product with
    `scale` happens after the cast back.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normal * expand_to(scale.astype(x.dtype), x)


def layer_norm(
    x: jax.Array, scale: Float[Array, " M"], bias: Float[Array, " M"], eps: float
) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias; float32 inside, as in torch.

    Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450; the variance is the mean
    squared distance (nothing cancels), and only the result is cast back to x's dtype.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + eps)
    scale, bias = (expand_to(v.astype(jnp.float32), x) for v in (scale, bias))
    return (normal * scale + bias).astype(x.dtype)


def normalise(
    kind: NormKind, leaf: Mapping[str, jax.Array], x: jax.Array, eps: float
) -> jax.Array:
    """`rms_norm` by the leaf's scale, or `layer_norm` by its scale and bias."""
    if kind == "rms":
        return rms_norm(x, leaf["scale"], eps)
    return layer_norm(x, leaf["scale"], leaf["bias"], eps)


class Norm(nn.Module):
    """Declares scale [M], and bias [M] for "layer"; computes `normalise`."""

    kind: NormKind
    eps: float
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        leaf = {"scale": self.param("scale", nn.initializers.ones, shape, self.dtype)}
        if self.kind == "layer":
            zeros = nn.initializers.zeros
            leaf["bias"] = self.param("bias", zeros, shape, self.dtype)
        return normalise(self.kind, leaf, x, self.eps)
