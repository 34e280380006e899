"""Attention sinks: keep the first tokens and the most recent ones, drop the middle.

Paper    Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
         arXiv:2309.17453, section 3.2.
Idea     Softmax parks surplus weight on the first tokens: without them the model
         breaks, without the middle it hardly does. While decoding, each new token takes
         the slot of the oldest recent one, so an answer may go on for ever.
Memory   2 * layers * batch * kv_heads * capacity * head_dim * itemsize bytes, however
         long prompt and answer are.
Differs  The official demo feeds a prompt after evicting for it; here, as everywhere in
         this package, a prompt attends all of itself before it is cut.
See      tests/kvcache/test_snapkv.py, tests/kvcache/test_policies.py
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.kvcache.policy import Policy, Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Sinks and a ring of recent tokens; the official demo has 4 and 2,000."""

    capacity: int = 1024
    """Tokens a layer keeps, the sinks among them."""
    first: int = 4
    """Leading tokens that are never dropped (table 2 of the paper finds 4 enough)."""
    rolls: ClassVar[bool] = True
    positions: Literal["cache", "absolute"] = "cache"
    """By what a key is rotated: its place in the cache (the paper), which never exceeds
    `capacity`, or its true position, as most ports have it."""

    def __post_init__(self):
        if not 0 <= self.first < self.capacity:
            raise ValueError(
                f"StreamingLLM: first={self.first} must not be negative, and below "
                f"capacity={self.capacity}, which recent tokens need too."
            )
        if self.positions not in ("cache", "absolute"):
            raise ValueError(
                f"StreamingLLM: positions={self.positions!r} must be 'cache' or "
                "'absolute'."
            )

    @property
    def rope(self) -> Literal["cache", "absolute"]:  # pyright: ignore
        return self.positions

    @property
    def recent(self) -> int:
        return self.capacity - self.first

    @property
    def sinks(self) -> int:
        return self.first

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        return (self.first,) * layers

    def units(self, config) -> int:
        return 1

    def tail(self, prompt: int, new_tokens: int) -> int:
        return min(self.recent, prompt + new_tokens)

    def scores(self, seen: Seen, layer: jax.Array) -> Float[Array, "B 1 T"]:
        tokens = jnp.arange(seen.keys.shape[1], dtype=jnp.float32)
        return jnp.broadcast_to(-tokens[None, None], (len(seen.start), 1, len(tokens)))
