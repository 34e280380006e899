"""The sizes of a cache, all static: known, in bytes, before there is one."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jmem.kernels.windowed_attention import Implementation

if TYPE_CHECKING:
    from jmem.kvcache.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One cache for `batch_size` rows, made by `Policy.plan`; hashable.

    A layer has a region of slots: first those for the tokens its policy selects, then
    a tail for the latest ones. The regions of all layers follow each other on one axis,
    so layers of unequal size waste nothing.
    """

    policy: "Policy"
    batch_size: int
    prompt: int
    """Longest prompt, in tokens; a shorter row keeps what fits."""
    new_tokens: int
    """Tokens decoded after it."""
    heads: int
    """Heads stored: the model's key-value heads, each once."""
    units: int
    """Selections a layer makes: 1 that all heads share, or one for every head."""
    head_dim: int
    dtype: jnp.dtype
    selected: tuple[int, ...]
    """Slots of each layer for selected tokens."""
    recent: int
    """The prompt's last tokens, which are kept unselected and do the selecting."""
    sinks: int
    """The prompt's first tokens, which are never recent."""
    tail: int
    """Slots of every layer for the recent tokens and new ones; a ring."""
    attention: Implementation = "xla"
    """How a new token attends; "mosaic_gpu" is the kernel `windowed_attention`."""

    @property
    def layers(self) -> int:
        return len(self.selected)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(selected + self.tail for selected in self.selected)

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the cache's arrays; see `jmem.kvcache.cache.Cache`."""
        slots = (self.batch_size, self.heads, sum(self.sizes), self.head_dim)
        chosen = (self.batch_size, self.units, sum(self.selected))
        return {
            "keys": jax.ShapeDtypeStruct(slots, self.dtype),
            "values": jax.ShapeDtypeStruct(slots, self.dtype),
            "positions": jax.ShapeDtypeStruct(chosen, jnp.int32),
            "start": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32),
        }

    def bytes(self) -> int:
        """Bytes of the cache.

        Source: closed form; equals the compiled program's in tests/kvcache.
        """
        return sum(
            math.prod(array.shape) * array.dtype.itemsize
            for array in self.arrays().values()
        )
