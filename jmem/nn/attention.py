"""Self-attention: the leaf with its four maps, and the standard ways to attend.

An `attend` (see `jmem.nn.ops`) is chosen by whoever builds a program, from the GPU the
program is compiled *for*; nothing here looks at the GPU present.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jmem.nn.linear import Linear
from jmem.nn.ops import Attend, Ops
from jmem.nn.rope import Rope
from jmem.targets import Target

Implementation = Literal["cudnn", "xla"]


def choose(target: Target | None, dtype: DTypeLike, head_dim: int) -> Implementation:
    """The fastest exact attention that `target` can run.

    cuDNN's flash kernel wants a GPU of compute capability 8.0 or newer, 16-bit
    inputs and a head dim that is a multiple of 8, at most 128. Everything else, and
    `target=None` (the CPU), gets XLA's attention, whose scores take B*H*T*T*4 bytes.
    """
    if target is None or target.capability < (8, 0):
        return "xla"
    wide = jnp.dtype(dtype) not in (jnp.dtype("bfloat16"), jnp.dtype("float16"))
    return "xla" if wide or head_dim > 128 or head_dim % 8 else "cudnn"


def causal(
    implementation: Implementation = "xla",
    segments: Int[Array, "B T"] | None = None,
) -> Attend:
    """Every position attends itself and what came before it; softmax in float32.

    `segments` numbers the documents of a packed row: positions of different numbers
    don't see each other. It needs the XLA implementation, which can mask.
    """
    if segments is not None and implementation != "xla":
        raise ValueError(
            f"causal: segments need implementation='xla', not {implementation!r}, as "
            "cuDNN would materialise the mask. Pad instead of packing, or use 'xla'."
        )

    def attend(q, k, v, rope, positions, layer, carry):
        del layer
        same = None
        if segments is not None:
            same = (segments[:, None, :, None] == segments[:, None, None, :]).astype(
                bool
            )
        out = jax.nn.dot_product_attention(
            rope(q, positions),
            rope(k, positions),
            v,
            mask=same,
            is_causal=True,
            implementation=implementation,
        )
        return out, carry

    return attend


class Attention(nn.Module):
    """q, k, v, o and nothing else: masks and caches belong to `ops.attend`."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        layer: jax.Array,
        ops: Ops,
        carry,
    ):
        def project(name, heads):
            features = heads * self.head_dim
            leaf = Linear(features, self.qkv_bias, dtype=self.dtype, name=name)
            return leaf(x, ops.linear).reshape(*x.shape[:2], heads, self.head_dim)

        q = project("q", self.heads)
        k = project("k", self.kv_heads)
        v = project("v", self.kv_heads)
        out, carry = ops.attend(q, k, v, self.rope, positions, layer, carry)
        out = out.reshape(*x.shape[:2], self.heads * self.head_dim)
        o = Linear(x.shape[-1], dtype=self.dtype, name="o")
        return o(out, ops.linear), carry
