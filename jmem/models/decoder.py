"""One decoder-only transformer: Llama 1/2/3, TinyLlama, Mistral, Qwen2, SmolLM2.

Three pure parts over explicit parameters, `embed`, `block` (stacked) and `head`, with
attention and the linear product as arguments (`jmem.nn.ops`).

    params["embed"]["embedding"]                        [V, M]
    params["blocks"]["attention_norm"]["scale"]         [L, M]
    params["blocks"]["attention"][q, k, v, o]["kernel"] [L, in, out] (+ "bias" [L, out])
    params["blocks"]["mlp_norm"]["scale"]               [L, M]
    params["blocks"]["mlp"][gate, up, down]["kernel"]   [L, in, out]
    params["final_norm"]["scale"]                       [M]
    params["head"]["kernel"]                            [M, V]        (absent when tied)
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jmem.nn.attention import Attention, Implementation, causal, choose
from jmem.nn.linear import dense
from jmem.nn.mlp import GatedMLP
from jmem.nn.norm import RMSNorm, rms_norm
from jmem.nn.ops import Ops
from jmem.nn.rope import Llama3Scaling, Rope
from jmem.nn.stack import Remat, init_stack
from jmem.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The published dimensions of a decoder; `jmem.models.zoo` holds many."""

    vocab_size: int
    layers: int
    hidden: int
    """Width of the residual stream, M."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the gated MLP, F."""
    max_positions: int
    """Longest sequence the model was trained for, in tokens."""
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    rms_eps: float = 1e-5
    tied: bool = False
    """The head is the embedding, transposed."""
    qkv_bias: bool = False
    """Biases on q, k and v (Qwen2)."""

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "layers",
            "hidden",
            "heads",
            "kv_heads",
            "head_dim",
            "intermediate",
            "max_positions",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DecoderConfig: {name}={getattr(self, name)} must be at least 1."
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"DecoderConfig: heads={self.heads} is not a multiple of "
                f"kv_heads={self.kv_heads}; each key-value head serves as many queries."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim={self.head_dim} is odd, and rotary "
                "embedding turns pairs of channels."
            )

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once.

        >>> from jmem.models import zoo
        >>> zoo.get("llama2-7b").parameters
        6738415616
        """
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        tables = self.vocab_size * self.hidden * (1 if self.tied else 2)
        return self.layers * block + tables + self.hidden


class Block(nn.Module):
    """Pre-norm attention and gated MLP, each added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, positions, layer, ops: Ops, carry):
        config = self.config
        rope = Rope(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        attention = Attention(
            config.heads,
            config.kv_heads,
            config.head_dim,
            rope,
            config.qkv_bias,
            self.dtype,
            name="attention",
        )
        normal = RMSNorm(config.rms_eps, self.dtype, name="attention_norm")(x)
        out, carry = attention(normal, positions, layer, ops, carry)
        x = x + out
        normal = RMSNorm(config.rms_eps, self.dtype, name="mlp_norm")(x)
        mlp = GatedMLP(config.intermediate, self.dtype, name="mlp")
        return x + mlp(normal, ops.linear), carry, {}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder's functions; parameters are always an argument.

    Hashable, so it may be closed over or passed as a static argument. `attention` and
    `remat` say how the same function is computed on one target: whoever builds a
    program chooses them (`jmem.nn.attention.choose`).
    """

    config: DecoderConfig
    attention: Implementation = "xla"
    remat: Remat = "block"
    """What the backward pass keeps of a block; see `jmem.nn.stack.rematerialise`."""
    dtype: DTypeLike = jnp.float32
    """Of parameters and activations. Norms, softmax and losses use float32 inside."""

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @classmethod
    def on(
        cls,
        target: Target | None,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        remat: Remat = "block",
    ) -> "Decoder":
        """The decoder with the fastest exact attention of `target` (None: the CPU)."""
        attention = choose(target, dtype, config.head_dim)
        return cls(config, attention=attention, remat=remat, dtype=dtype)

    @functools.cached_property
    def stacked_block(self) -> Block:
        """The flax module of one block, applied to one row of `params["blocks"]`."""
        return Block(self.config, jnp.dtype(self.dtype), parent=None)

    @property
    def ops(self) -> Ops:
        """Plain causal attention and dense products."""
        return Ops(attend=causal(self.attention), linear=dense)

    def init(self, key: jax.Array) -> dict:
        """Random parameters: normal(0, 0.02) tables and maps, norms at one."""
        config = self.config
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.hidden), self.dtype)
        table = (config.vocab_size, config.hidden)
        draw = nn.initializers.normal(0.02)
        params = {
            "embed": {"embedding": draw(embed_key, table, self.dtype)},
            "blocks": init_stack(
                self.stacked_block,
                blocks_key,
                config.layers,
                x,
                jnp.zeros((1, 1), jnp.int32),
                jnp.int32(0),
                Ops(attend=causal("xla"), linear=dense),
                None,
            ),
            "final_norm": {"scale": jnp.ones((config.hidden,), self.dtype)},
        }
        if not config.tied:
            params["head"] = {"kernel": draw(head_key, table[::-1], self.dtype)}
        return params

    def abstract(self) -> dict:
        """Shapes and dtypes of the parameters; a 70B model takes about a second."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def embed(
        self,
        params: dict,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T M"]:
        """Rows of the embedding table; rotary positions enter in attention."""
        del positions
        table = params["embed"]["embedding"]
        # Widened so that the gradient of a token seen n times is a float32 sum.
        return table.astype(jnp.float32)[tokens].astype(self.dtype)

    def block(
        self,
        layer_params: dict,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        layer: jax.Array,
        ops: Ops,
        carry,
    ):
        """One layer: (x, carry, aux), from one row of `params["blocks"]`."""
        return self.stacked_block.apply(
            {"params": layer_params}, x, positions, layer, ops, carry
        )

    def head_params(self, params: dict) -> dict:
        """The part of `params` that `head` reads: a small tree to differentiate."""
        table = "embed" if self.config.tied else "head"
        return {"final_norm": params["final_norm"], table: params[table]}

    def head(
        self, params: dict, x: Float[Array, "*N M"], ops: Ops
    ) -> Float[Array, "*N V"]:
        """Logits in x's dtype: final norm, then head or transposed embedding."""
        x = rms_norm(x, params["final_norm"]["scale"], self.config.rms_eps)
        if self.config.tied:
            leaf = {"kernel": params["embed"]["embedding"].T}
        else:
            leaf = params["head"]
        return ops.linear("head", leaf, x)
