"""Self-attention: the leaf with its four maps, and the standard ways to attend.

An `attend` (see `jmem.nn.ops`) is chosen by whoever builds a program, from the GPU the
program is compiled *for*; nothing here looks at the GPU present.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jmem.nn.linear import Linear
from jmem.nn.ops import Attend, Ops
from jmem.nn.rope import Rope
from jmem.targets import Target

Implementation = Literal["cudnn", "xla"]


def grouped_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    seen: Bool[Array, "#B T S"],
) -> Float[Array, "B T H D"]:
    """softmax(q kᵀ / sqrt(D)) v, each key and value head serving H / K query heads.

    Keys and values have heads before slots, as a cache holds them. Scores and softmax
    are float32, B*H*T*S*4 bytes of them. Every query must see at least one slot.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # The queries of one group are rows of one matrix: no head is repeated, and XLA's
    # CPU backend transposes no scores (a training step there takes 8 % less time than
    # with jax.nn.dot_product_attention).
    q = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    rows = q.reshape(batch, kv_heads, -1, dim)
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, k, preferred_element_type=jnp.float32)
    seen = jnp.tile(seen, (1, heads // kv_heads, 1))[:, None]
    scores = jnp.where(seen, scores * dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", weights, v).reshape(q.shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


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


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    implementation: Implementation,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H D"]:
    """Every position attends itself and what came before it, within its segment."""
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    seen = jnp.tril(jnp.ones((1, q.shape[1], k.shape[1]), bool))
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    return grouped_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), seen)


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
        q, k = rope(q, positions), rope(k, positions)
        return causal_attention(q, k, v, implementation, segments), carry

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
