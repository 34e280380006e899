"""RMSNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.nn.linear import along_last


def rms_norm(x: jax.Array, scale: Float[Array, " M"], eps: float) -> jax.Array:
    """X / sqrt(mean(x²) + eps) * scale; float32 inside, x's dtype outside.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467; as in Llama, the product with
    `scale` happens after the cast back.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normal * along_last(scale, x)


class RMSNorm(nn.Module):
    eps: float
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.dtype)
        return rms_norm(x, scale, self.eps)
