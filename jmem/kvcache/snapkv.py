"""SnapKV: each head keeps the tokens that the prompt's end attends most.

Paper    Li et al., SnapKV: LLM Knows What You Are Looking For Before Generation, 2024,
         arXiv:2404.14469. Official code: FasterDecoding/SnapKV.
Idea     The last `window` queries vote: a token's score is the attention they pay it,
         pooled with its neighbours' so that phrases stay whole.
Memory   2 * layers * batch * kv_heads * (capacity + new tokens) * head_dim * itemsize
         bytes, and 4 bytes for the position of each selected token.
Differs  The official code repeats keys and values to all query heads before it stores
         them, H / K times the bytes. Here each key-value head selects once for the
         query heads it serves; select="query" does and stores what the code does.
See      tests/kvcache/test_snapkv.py, tests/kvcache/test_goldens.py
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.kvcache.policy import Policy, Seen
from jmem.kvcache.scores import Pooling, Reduce, column_mass, pool, reduce_heads
from jmem.kvcache.settings import check_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """The paper's LongBench setting: window 32, max pooling over 7 tokens."""

    capacity: int = 1024
    """Tokens a layer keeps for each head, the window's among them."""
    window: int = 32
    """Last tokens of the prompt, which vote and stay."""
    kernel: int = 7
    """Neighbouring tokens that are pooled; odd."""
    pooling: Pooling = "max"
    reduce: Reduce = "mean"
    """How the votes of query heads that share a selection become one."""
    select: Literal["kv", "query", "shared"] = "kv"
    """Who selects: each key-value head, each query head (which are then all stored), or
    all heads of a layer together."""

    def __post_init__(self):
        check_settings(self, odd=["kernel"])
        if not 0 < self.window < self.capacity:
            raise ValueError(
                f"{type(self).__name__}: capacity={self.capacity} must exceed "
                f"window={self.window}, which stays whole and leaves no slot for the "
                "rest. Raise capacity."
            )

    @property
    def recent(self) -> int:
        return self.window

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        return (self.capacity - self.window,) * layers

    def heads(self, config) -> int:
        return config.heads if self.select == "query" else config.kv_heads

    def units(self, config) -> int:
        return 1 if self.select == "shared" else self.heads(config)

    def scores(self, seen: Seen, layer: jax.Array) -> Float[Array, "B U T"]:
        mass = column_mass(seen.queries, seen.at, seen.keys)
        heads, groups = mass.shape[1], seen.keys.shape[2]
        units = {"kv": groups, "query": heads, "shared": 1}[self.select]
        mass = reduce_heads(mass, units, self.reduce)
        beyond = 0.0 if self.pooling == "average" else -jnp.inf
        mass = jnp.where(seen.candidates[:, None], mass, beyond)
        return pool(mass, self.kernel, self.pooling)
