"""The official MixLoRA's two schemes in JAX, to be measured beside `mixlora`.

Idea    The official code runs the down projection (or, its first form, all three maps)
        of the base once for each of a token's slots, and leaves the backward pass to
        the framework. These are static JAX forms of that: the same function, with the
        memory that it costs there.
See     jmem/finetune/mixlora/, experiments/mixlora.py
"""

import jax.numpy as jnp

from jmem.finetune import mixture as slots
from jmem.finetune.mixlora import MixLora
from jmem.finetune.mixture_ops import MixtureFeed
from jmem.nn import quantised


class OfficialFeed(MixtureFeed):
    """Gate and up once a token, down once a slot; JAX makes the backward pass."""

    shared: tuple[str, ...] = ("gate", "up")

    def run_experts(self, *given):
        experts, x, chosen, weights, adapters, base, key = given
        del key  # no dropout among the experts

        def product(name, x):
            return quantised.linear(name, base[name], x)

        hidden = [name for name in ("gate", "up") if name in base]
        once = {name: product(name, x) for name in hidden if name in self.shared}
        scale = jnp.array(experts.scales, x.dtype)[:, None, None]

        def low_rank(name, x, mask):
            a, b = (half.astype(x.dtype) for half in adapters[name])
            code = jnp.einsum("jni,jir->jnr", x, a) * scale * mask
            return jnp.einsum("jnr,jro->jno", code, b)

        y = jnp.zeros_like(x)
        for slot in range(chosen.shape[-1]):
            example = adapters["down"][1][:, :, 0][:, None]  # [J, 1, E*r]
            mask = slots.make_mask(experts, chosen[..., slot], example).astype(x.dtype)
            inner = None
            for name in hidden:
                own = once[name] if name in once else product(name, x)
                own += low_rank(name, x, mask)
                inner = experts.activate(own) if inner is None else inner * own
            out = product("down", inner) + low_rank("down", inner, mask)
            y += weights[..., slot, None].astype(x.dtype) * out
        return y


class VanillaFeed(OfficialFeed):
    """All three maps once a slot."""

    shared = ()


class OfficialMixLora(MixLora):
    """As published, with gate and up shared among a token's slots."""

    feed = OfficialFeed


class VanillaMixLora(MixLora):
    """As first published: every slot runs the whole MLP."""

    feed = VanillaFeed
