"""The plain key-value cache: every token's rotated key and value, in static arrays.

Memory   2 * layers * batch * slots * kv_heads * head_dim * itemsize bytes. Carried
         through the layer scan and addressed by the traced layer, a donated cache is
         updated in place; decoding adds one layer's slice of temporaries.
See      tests/generate/test_decode.py, which asserts both on the compiled program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.nn.attention import Implementation, causal_attention, grouped_attention
from jmem.nn.ops import Attend


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slot = absolute position.

    Heads come before slots: with slots first, XLA's layout assignment transposes the
    whole cache around the layer loop of a grouped-query model (seen in 0.12).
    """

    keys: Float[Array, "L B K S D"]
    values: Float[Array, "L B K S D"]


def init_cache(model, batch_size: int, slots: int) -> Cache:
    """An empty cache for `slots` tokens a row, prompt and answer together."""
    config = model.config
    shape = (config.layers, batch_size, config.kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def cache_bytes(model, batch_size: int, slots: int) -> int:
    """Bytes of `init_cache`, in closed form.

    Source: closed form; checked against the compiled program in tests/generate.

    >>> from jmem.models import zoo
    >>> from jmem.models.decoder import Decoder
    >>> cache_bytes(Decoder(zoo.get("llama2-7b"), dtype=jnp.bfloat16), 1, 4096) / 2**30
    2.0
    """
    config = model.config
    numbers = config.layers * batch_size * slots * config.kv_heads * config.head_dim
    return 2 * numbers * jnp.dtype(model.dtype).itemsize


def prefill_attend(implementation: Implementation, window: int | None) -> Attend:
    """Causal attention among the prompt's own tokens; fills slots 0 ... T-1.

    Prompts are padded on the right: what a padded position writes lies beyond its
    row's length, where decoding overwrites it before it can be seen.
    """

    def attend(q, k, v, rope, positions, layer, cache):
        k = rope(k, positions)
        q = rope(q, positions)
        out = causal_attention(q, k, v, implementation, window=window)
        start = (layer, 0, 0, 0, 0)
        keys, values = (jnp.swapaxes(x, 1, 2)[None] for x in (k, v))
        keys = jax.lax.dynamic_update_slice(cache.keys, keys, start)
        values = jax.lax.dynamic_update_slice(cache.values, values, start)
        return out, Cache(keys, values)

    return attend


def decode_attend(window: int | None) -> Attend:
    """One new token a row attends its row's cache, up to and including itself.

    With a window it sees that many slots, its own among them.
    """

    def attend(q, k, v, rope, positions, layer, cache):
        rows, groups = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[2])[None]
        at = (layer, rows, groups, positions)  # [B, K]: one slot a row and head
        cache = Cache(
            cache.keys.at[at].set(rope(k, positions)[:, 0]),
            cache.values.at[at].set(v[:, 0]),
        )
        keys = jax.lax.dynamic_index_in_dim(cache.keys, layer, keepdims=False)
        values = jax.lax.dynamic_index_in_dim(cache.values, layer, keepdims=False)
        slots, last = jnp.arange(keys.shape[2])[None, None], positions[:, None]
        seen = slots <= last  # [B, 1, S]
        if window is not None:
            seen &= slots > last - window
        return grouped_attention(rope(q, positions), keys, values, seen), cache

    return attend
