"""What mixtures make of a block: linear maps with adapters, and an MLP of experts.

Both are entries of `jmem.nn.ops.Ops`. The rows of a batch belong to the mixtures in
turn, J alike parts, and each part meets the adapters of its own mixture.

See      jmem/finetune/mixture.py, of which `MixtureFeed` is a caller
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmem.finetune.lora import drop_out
from jmem.finetune.mixture import (
    ABSENT,
    Experts,
    Router,
    choose,
    measure_traffic,
    mixture,
)
from jmem.nn import quantised
from jmem.nn.maps import MAPS

HIDDEN = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class MixtureLinear:
    """A `linear` that adds each mixture's own product to its own rows of x."""

    scales: tuple[float, ...]
    dropout: float = 0.0

    def __call__(self, name: str, leaf: dict, x: jax.Array) -> jax.Array:
        y = quantised.linear(name, leaf, x)
        if "lora_a" not in leaf:
            return y
        a, b, key = (leaf.get(name) for name in ("lora_a", "lora_b", "lora_key"))
        delta = _low_rank(self, split_mixtures(x, len(self.scales)), a, b, key)
        return y + delta.reshape(y.shape)

    def multiply(self, x, a, b, key):
        """Scale * dropped(x) A B of every mixture, in x's dtype."""
        if key is not None:
            x = drop_out(x, self.dropout, key)
        scale = jnp.array(self.scales, x.dtype)[:, None, None]
        code = jnp.einsum("jni,jir->jnr", x, a.astype(x.dtype)) * scale
        return jnp.einsum("jnr,jro->jno", code, b.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(linear: MixtureLinear, x, a, b, key):
    """`linear.product`, whose backward pass drops x out again: x is all it keeps."""
    return linear.multiply(x, a, b, key)


def _low_rank_forward(linear, *given):
    return linear.multiply(*given), given


def _low_rank_backward(linear, given, dy):
    *given, key = given
    _, pull = jax.vjp(lambda *own: linear.multiply(*own, key), *given)
    return *pull(dy), None


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@dataclasses.dataclass(frozen=True)
class MixtureFeed:
    """A `feed` (`jmem.nn.ops`) that routes every token to its experts."""

    scales: tuple[float, ...]
    experts: tuple[int, ...]
    router: Router
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    dropout: float = 0.0
    jitter: float = 0.0

    def __call__(self, leaves: dict, x: jax.Array, activate, real=None):
        """y, and what `measure_traffic` returns for the `real` tokens [B, T]."""
        own = split_mixtures(x, len(self.scales))
        key = leaves["router"].get("lora_key")
        most = max(self.experts)
        logits = self.compute_logits(leaves["router"]["kernel"], own, key)
        chosen, weights, probabilities = choose(
            logits, router=self.router, top_k=self.top_k, top_p=self.top_p
        )
        static = Experts(
            *(most, self.scales, activate, self.router == "top_k", self.dropout)
        )
        base = {name: leaves[name] for name in HIDDEN if name in leaves}
        adapters = {
            name: (leaf["lora_a"], leaf["lora_b"])
            for name, leaf in base.items()
            if "lora_a" in leaf
        }
        base = {
            name: {k: v for k, v in leaf.items() if not k.startswith("lora_")}
            for name, leaf in base.items()
        }
        dropping = key if self.dropout else None
        y = self.run_experts(static, own, chosen, weights, adapters, base, dropping)
        aux = {}
        if real is not None:
            real = real.reshape(own.shape[:2])
            aux = measure_traffic(chosen, weights, probabilities, real)
        return y.reshape(x.shape), aux

    def run_experts(self, *given) -> Float[Array, "J N M"]:
        """`jmem.finetune.mixture.mixture`, which a subclass may compute otherwise."""
        return mixture(*given)

    def compute_logits(self, kernel, x, key) -> Float[Array, "J N E"]:
        """Of the router, float32; experts that a mixture lacks are out of reach."""

        # Made again in the backward pass, as x in float32 would be kept else.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def routed(x, kernel):
            x = x.astype(jnp.float32)
            if key is not None and self.jitter:
                shape, low, high = x.shape, 1 - self.jitter, 1 + self.jitter
                own = jax.random.fold_in(key, len(MAPS))
                x *= jax.random.uniform(own, shape, jnp.float32, low, high)
            return jnp.einsum("jnm,jme->jne", x, kernel)

        found = routed(x, kernel)
        here = np.arange(kernel.shape[-1])[None] < np.array(self.experts)[:, None]
        return jnp.where(here[:, None], found, ABSENT)


def split_mixtures(x: Float[Array, "*B M"], mixtures: int) -> Float[Array, "J N M"]:
    """Rows of a batch, by the mixture they belong to."""
    return x.reshape(mixtures, -1, x.shape[-1])
