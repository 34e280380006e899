"""Self-attention: a module of four linear maps, and the standard ways to attend.

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
from jmem.nn.packed import Packed, attend_packed, number_positions
from jmem.nn.rope import Rope
from jmem.targets import Target

Implementation = Literal["cudnn", "xla"]


def grouped_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    seen: Bool[Array, "#B T S"] | Bool[Array, "#B #K T S"],
) -> Float[Array, "B T H D"]:
    """softmax(q kᵀ / sqrt(D)) v, each key and value head serving H / K query heads.

    Keys and values have heads before slots, as a cache holds them. Scores and softmax
    are float32, B*H*T*S*4 bytes of them. Every query must see at least one slot; which
    ones is the same for all heads, or said for each key-value head.
    """
    batch, length, heads, dim = q.shape
    # Groups of queries first: XLA's CPU backend then transposes no scores, and a
    # training step there takes 8 % less than with jax.nn.dot_product_attention.
    q = q.reshape(batch, length, k.shape[1], -1, dim).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    seen = seen[:, None, None] if seen.ndim == 3 else seen[:, :, None]
    scores = jnp.where(seen, scores * dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v)
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
    window: int | None = None,
    block: int | None = None,
) -> Float[Array, "B T H D"]:
    """Every position attends itself and what came before it, within its segment.

    `segments` numbers the documents of packed rows, each of which is a run of one
    number (`jmem.nn.packed`, whatever `implementation` and `block` are).
    `window` limits it to the last `window` positions, itself among them, as Mistral
    does. cuDNN then computes only the blocks of scores near the diagonal; XLA computes
    all T*T and masks. A window of T or more is no window, and the same program.
    With `block` XLA attends that many queries at a time, each block to the keys up to
    its end: half the products, and scores of B*H*block*T*4 bytes instead of B*H*T*T*4.
    """
    if segments is not None:
        return attend_packed(q, k, v, number_positions(segments), window)
    length = q.shape[1]
    window = None if window is None or window >= length else window
    if implementation == "cudnn" and length > 1:  # it has no gradient of one token
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    seen = jnp.tril(jnp.ones((1, length, k.shape[1]), bool))
    if window is not None:
        seen &= jnp.triu(jnp.ones_like(seen), 1 - window)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if block is None or block >= length:
        return grouped_attention(q, k, v, seen)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        own = seen[:, start:end, :end]
        part = grouped_attention(q[:, start:end], k[:, :, :end], v[:, :, :end], own)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def causal(
    implementation: Implementation = "xla",
    segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Attend:
    """Every position attends itself and what came before it; softmax in float32.

    In packed rows, whose positions are `Packed` or whose documents `segments` numbers,
    it is `jmem.nn.packed` instead of `implementation`: no position sees another
    document. `window` limits attention to the last `window` positions.
    """
    if window is not None and window < 1:
        raise ValueError(
            f"causal: window={window} must be at least 1, the position itself; None "
            "attends everything before."
        )

    def attend(q, k, v, rope, positions, layer, carry):
        del layer
        places = positions.positions if isinstance(positions, Packed) else positions
        q, k = rope(q, places), rope(k, places)
        if isinstance(positions, Packed):
            return attend_packed(q, k, v, places, window), carry
        return causal_attention(q, k, v, implementation, segments, window), carry

    return attend


class Attention(nn.Module):
    """The linear maps q, k, v and o; masks and caches belong to `ops.attend`."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    o_bias: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"] | Packed,
        layer: jax.Array,
        ops: Ops,
        carry,
    ):
        def project(name, heads):
            features = heads * self.head_dim
            leaf = Linear(features, self.qkv_bias, dtype=self.dtype, name=name)
            return leaf(x, ops.linear).reshape(*x.shape[:2], heads, self.head_dim)

        if self.has_variable("params", "qkv"):  # see jmem.nn.joined
            ends = self.heads, self.heads + self.kv_heads
            q, k, v = jnp.split(project("qkv", ends[1] + self.kv_heads), ends, axis=2)
        else:
            q = project("q", self.heads)
            k = project("k", self.kv_heads)
            v = project("v", self.kv_heads)
        out, carry = ops.attend(q, k, v, self.rope, positions, layer, carry)
        out = out.reshape(*x.shape[:2], self.heads * self.head_dim)
        o = Linear(x.shape[-1], self.o_bias, dtype=self.dtype, name="o")
        return o(out, ops.linear), carry
