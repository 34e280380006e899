"""One decoder-only transformer: Llama, Mistral, Qwen2, SmolLM2, GPT-2, OPT, Phi-2.

Three pure parts over explicit parameters, `embed`, `block` (stacked) and `head`, with
attention and the linear product as arguments (`jmem.nn.ops`).

    params["embed"]["embedding"]                        [V, M]
    params["embed"]["positions"]                        [P, M]        (learned ones)
    params["blocks"]["attention_norm"]["scale"]         [L, M]
    params["blocks"]["attention"][q, k, v, o]["kernel"] [L, in, out]
    params["blocks"]["mlp_norm"]["scale"]               [L, M]     (absent in parallel)
    params["blocks"]["mlp"][gate, up, down]["kernel"]   [L, in, out]  (gate if gated)
    params["final_norm"]["scale"]                       [M]
    params["head"]["kernel"]                            [M, V]        (absent when tied)

A linear map with a bias and a LayerNorm hold "bias" besides, [L, out] or [out].
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jmem.kernels import spmm
from jmem.models.config import DecoderConfig
from jmem.models.contract import Aux
from jmem.models.next_token import next_token_loss
from jmem.nn import quantised
from jmem.nn.attention import Attention, Implementation, causal, choose
from jmem.nn.chunk import apply_by_chunks
from jmem.nn.linear import dense
from jmem.nn.mlp import MLP
from jmem.nn.norm import Norm, normalise
from jmem.nn.ops import Feed, LinearMap, Ops
from jmem.nn.packed import Packed, take_rows
from jmem.nn.stack import Remat, init_stack
from jmem.sharding import GATHERED, Layout
from jmem.targets import Target

Precision = Literal["float32", "bfloat16", "mixed"]
PRECISIONS: Mapping[Precision, Mapping[str, Any]] = {
    "float32": {"dtype": jnp.float32},
    "bfloat16": {"dtype": jnp.bfloat16},
    "mixed": {"dtype": jnp.bfloat16, "param_dtype": jnp.float32},
}
"""What each policy means to a `Decoder`: everything float32; everything bfloat16; or
bfloat16 activations and products, but float32 parameters and their gradients."""


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    In a parallel block both read the one norm of the same input.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    """Of the parameters it declares."""
    chunk: int | None = None
    """As the decoder's."""

    @nn.compact
    def __call__(self, x, positions, layer, ops: Ops, carry):
        config = self.config
        attention = Attention(
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.rope,
            config.qkv_bias,
            config.o_bias,
            self.dtype,
            name="attention",
        )
        mlp = MLP(
            config.intermediate,
            config.gated,
            config.activation,
            config.mlp_bias,
            self.dtype,
            name="mlp",
        )

        def norm(name, x):
            return Norm(config.norm, config.rms_eps, self.dtype, name=name)(x)

        normal = norm("attention_norm", x)
        out, carry = attention(normal, positions, layer, ops, carry)
        x = x + out
        if self.chunk is not None and x.shape[1] > self.chunk:
            return self._feed_by_chunks(mlp, x, normal, ops), carry, {}
        if not config.parallel:
            normal = norm("mlp_norm", x)
        out, aux = mlp(normal, ops)
        return x + out, carry, aux

    def _feed_by_chunks(self, mlp: MLP, x, normal, ops: Ops):
        """`x` plus the MLP's output, of `chunk` tokens at a time.

        Inside the loop over chunks flax allows no module to be bound, so the MLP is
        applied by itself.
        """
        config, params = self.config, self.variables["params"]
        alone, own = mlp.clone(parent=None), ops.prefix_names("mlp")

        def feed(x, normal):
            return x + alone.apply({"params": params["mlp"]}, normal, own)[0]

        def normalised(x):
            leaf = params["mlp_norm"]
            return feed(x, normalise(config.norm, leaf, x, config.rms_eps))

        if config.parallel:
            return apply_by_chunks(feed, x, normal, size=self.chunk)
        return apply_by_chunks(normalised, x, size=self.chunk)


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
    """Of activations and products. Norms, softmax and losses use float32 inside."""
    param_dtype: DTypeLike | None = None
    """Of parameters, and so of their gradients; None is `dtype`. Another one is cast
    where it is used, a layer at a time (`PRECISIONS`)."""
    chunk: int | None = None
    """Tokens of a row handled at a time where each is handled alone (MLP, rotation);
    None: all. A prompt of 131,072 tokens takes 6.6 GB less with 4,096, on
    Llama-3.1-8B. Not to be trained through."""
    linear: LinearMap = quantised.linear
    """How linear maps are applied (`jmem.nn.ops`); packed weights need no other."""
    feed: Feed | None = None
    """How MLPs are computed, where not as usual (`jmem.nn.ops`)."""
    layout: Layout | None = None
    """How a mesh divides parameters, products and batches; None: one device."""
    sparse: spmm.Implementation | None = None
    """How inference multiplies by sparse maps where they lie (`jmem.kernels.spmm`);
    None expands one map at a time."""

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.layout is not None:
            self.layout.check_heads(self.config.heads, self.config.kv_heads)
            if self.layout.devices == 1:
                object.__setattr__(self, "layout", None)
        if self.param_dtype is not None:
            object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(
                f"Decoder: chunk={self.chunk} must be at least 1 token; None "
                "takes all at once."
            )

    @classmethod
    def on(
        cls,
        target: Target | None,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike | None = None,
        remat: Remat = "block",
        layout: Layout | None = None,
    ) -> "Decoder":
        """The decoder with the fastest exact kernels of `target` (None: the CPU)."""
        kernel = spmm.choose(target, dtype) == "mosaic_gpu" and layout is None
        return cls(
            config,
            attention=choose(target, dtype, config.head_dim),
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            layout=layout,
            sparse="mosaic_gpu" if kernel else None,
        )

    @property
    def stored_dtype(self) -> jnp.dtype:
        """Of the parameters: `param_dtype`, or `dtype` where that is None."""
        return jnp.dtype(self.dtype if self.param_dtype is None else self.param_dtype)

    @functools.cached_property
    def stacked_block(self) -> nn.Module:
        """The flax module of one block, applied to one row of `params["blocks"]`."""
        return Block(self.config, self.stored_dtype, self.chunk, parent=None)

    @property
    def ops(self) -> Ops:
        """Plain causal attention, and the decoder's own products."""
        attend = causal(self.attention, window=self.config.sliding_window)
        if (layout := self.layout) is None:
            return Ops(attend, self.linear, self.feed)

        def divided(q, k, v, *others):
            out, carry = attend(*map(layout.divide_heads, (q, k, v)), *others)
            return layout.divide_heads(out), carry

        return Ops(divided, self.linear, self.feed)

    def init(self, key: jax.Array) -> dict:
        """Random parameters: normal(0, 0.02) tables and maps, norms at one."""
        config = self.config
        dtype = self.stored_dtype
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        width = (config.hidden,)
        x = jnp.zeros((1, 1, config.hidden), self.dtype)
        table = (config.vocab_size, config.hidden)
        draw = nn.initializers.normal(0.02)
        params = {
            "embed": {"embedding": draw(embed_key, table, dtype)},
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
            "final_norm": {"scale": jnp.ones(width, dtype)},
        }
        if config.positions == "learned":
            shape = (config.max_positions, config.hidden)
            drawn = draw(jax.random.fold_in(embed_key, 1), shape, dtype)
            params["embed"]["positions"] = drawn
        if config.norm == "layer":
            params["final_norm"]["bias"] = jnp.zeros(width, dtype)
        if not config.tied:
            params["head"] = {"kernel": draw(head_key, table[::-1], dtype)}
        if config.head_bias:
            params["head"]["bias"] = jnp.zeros((config.vocab_size,), dtype)
        return params

    def abstract(self) -> dict:
        """Shapes and dtypes of the parameters; a 70B model takes about a second."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def embed(
        self,
        params: dict,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | Packed | None = None,
    ) -> Float[Array, "B T M"]:
        """Rows of the embedding table, plus those of learned positions.

        `positions` defaults to 0 ... T-1. Rotary positions enter in attention.

        Raises:
          ValueError: more positions than the learned table has.
        """
        # Widened so that the gradient of a token seen n times is a float32 sum.
        table = params["embed"]["embedding"].astype(jnp.float32)
        if isinstance(positions, Packed) and self.layout is None:
            rows = take_rows(table, tokens)
        else:
            rows = table[tokens]
        if self.config.positions == "learned":
            length, limit = tokens.shape[1], self.config.max_positions
            if length > limit:
                raise ValueError(
                    f"embed: {length} tokens a row exceed max_positions={limit}, the "
                    "rows of the learned table. Cut the sequences."
                )
            if positions is None:
                positions = jnp.arange(length, dtype=jnp.int32)[None]
            elif isinstance(positions, Packed):
                positions = positions.positions
            rows += params["embed"]["positions"].astype(jnp.float32)[positions]
        rows = rows.astype(self.dtype)
        return rows if self.layout is None else self.layout.divide_rows(rows)

    def block(
        self,
        layer_params: dict,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"] | Packed,
        layer: jax.Array,
        ops: Ops,
        carry,
    ):
        """One layer: (x, carry, aux), from one row of `params["blocks"]`."""
        others = positions, layer, ops, carry
        if (layout := self.layout) is None:
            return self.stacked_block.apply({"params": layer_params}, x, *others)

        def run(layer_params, x) -> Any:
            params = layout.gather(layer_params)
            return self.stacked_block.apply({"params": params}, x, *others)

        if self.remat == "none":  # gathered weights are not kept: that is all of them
            keep = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            run = jax.checkpoint(run, policy=keep, prevent_cse=False)
        x, carry, aux = run(layer_params, layout.divide_batch(x))
        return layout.divide_batch(x), carry, aux

    def head_params(self, params: dict) -> dict:
        """The part of `params` that `head` reads: a small tree to differentiate."""
        head = {"final_norm": params["final_norm"]}
        if self.config.tied:
            head |= {"embed": {"embedding": params["embed"]["embedding"]}}
        else:
            head |= {"head": params["head"]}
        return head if self.layout is None else self.layout.divide_by_vocabulary(head)

    def head(
        self, params: dict, x: Float[Array, "*N M"], ops: Ops
    ) -> Float[Array, "*N V"]:
        """Logits in x's dtype: final norm, then head or transposed embedding."""
        config = self.config
        x = normalise(config.norm, params["final_norm"], x, config.rms_eps)
        if config.tied:
            leaf = {"kernel": params["embed"]["embedding"].T}
        else:
            leaf = params["head"]
        return ops.linear("head", leaf, x)

    # To whoever trains it (`jmem.models.contract.Model`) ------------------------------

    @property
    def needs_key(self) -> bool:
        """Training computes what evaluation does; dropout is of adapters (`Lora`)."""
        return False

    def stats(self) -> dict:
        """{}: a decoder keeps no statistics."""
        return {}

    def loss(
        self, params: dict, stats: dict, batch, key=None, ops: Ops | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Masked next-token cross-entropy (`jmem.models.next_token`), nats a token.

        `batch` is a `jmem.data.batch.Batch`; `ops` defaults to the decoder's own.
        """
        del key
        return next_token_loss(self, params, batch, ops), Aux(stats, {})
