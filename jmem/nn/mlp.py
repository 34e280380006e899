"""The gated MLP of Llama-like models (SwiGLU)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jmem.nn.linear import Linear
from jmem.nn.ops import LinearMap


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer, 2020, arXiv:2002.05202."""

    hidden: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, linear: LinearMap) -> jax.Array:
        gate = Linear(self.hidden, dtype=self.dtype, name="gate")(x, linear)
        up = Linear(self.hidden, dtype=self.dtype, name="up")(x, linear)
        down = Linear(x.shape[-1], dtype=self.dtype, name="down")
        return down(jax.nn.silu(gate) * up, linear)
