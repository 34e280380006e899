"""Sizes from real models, which the tests compile and the bench times.

    SHAPES["llama3-8b-32k-b1"]        a contiguous cache
    SHAPES["llama3-8b-32k-b1-w8"]     the same tokens, in windows of 8 and a short tail

Source: the models' published configurations, by `jmem.models.zoo`'s names.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jmem.kernels.windowed_attention import MAX_GROUPS

TAIL = 128
"""Tokens of the tail beside windows: those decoded since the windows were chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One decoding step of one layer."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    """Tokens a row attends, windows and tail together."""
    window: int = 0
    """0 for a contiguous cache, which is all tail."""

    @property
    def groups(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.kv_heads

    @property
    def windows(self) -> int:
        """Entries of the table."""
        return (self.tokens - TAIL) // self.window if self.window else 0

    @property
    def max_tail(self) -> int:
        """What the table does not hold."""
        return self.tokens - self.windows * self.window

    @property
    def read_bytes(self) -> int:
        """Keys and values, 16 bits each, read once: the roofline."""
        return 4 * self.batch * self.kv_heads * self.tokens * self.head_dim

    def sizes(self) -> dict[str, int]:
        """The static keyword arguments of the call."""
        return {"window": self.window or 8, "max_tail": self.max_tail}

    def arrays(
        self, regions: int = 1, dtype: DTypeLike = jnp.bfloat16
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """q, keys, values; the cache holds `regions` layers, one after the other."""
        shape = (self.batch, self.kv_heads, regions * self.tokens, self.head_dim)
        cache = jax.ShapeDtypeStruct(shape, dtype)
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.head_dim), dtype)
        return q, cache, cache

    def table(self, regions: int = 1, seed: int = 0) -> tuple[Any, Any, Any, Any]:
        """starts, length, tail_start, tail_length of every region: all is valid.

        Each row's windows lie in an order of their own.
        """
        random = np.random.default_rng(seed)
        orders = [random.permutation(self.windows) for _ in range(self.batch)]
        starts = np.stack(orders).astype(np.int32) * np.int32(self.window)
        inside = self.windows * self.window
        at = np.arange(regions, dtype=np.int32) * np.int32(self.tokens)

        def rows(value):
            return np.full((regions, self.batch), value, np.int32)

        tail_start = rows(inside) + at[:, None]
        table = starts + at[:, None, None]
        return table, rows(inside), tail_start, rows(self.max_tail)


MODELS = {
    "llama3-8b": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "qwen2.5-1.5b": {"heads": 12, "kv_heads": 2, "head_dim": 128},
    "phi3-mini": {"heads": 32, "kv_heads": 32, "head_dim": 96},
    "smollm2-135m": {"heads": 9, "kv_heads": 3, "head_dim": 64},
}
POINTS = (
    *(("llama3-8b", 8, 1), ("llama3-8b", 8, 32), ("llama3-8b", 32, 1)),
    *(("llama3-8b", 32, 16), ("llama3-8b", 128, 1), ("llama3-8b", 128, 6)),
    *(("qwen2.5-1.5b", 32, 1), ("phi3-mini", 32, 1), ("smollm2-135m", 8, 16)),
)
"""Model, thousands (1,024) of tokens, batch."""
WINDOWS = (0, 8, 16, 32, 64)

SHAPES = {
    f"{model}-{thousands}k-b{batch}{f'-w{window}' * bool(window)}": Shape(
        batch=batch, tokens=1024 * thousands, window=window, **MODELS[model]
    )
    for model, thousands, batch in POINTS
    for window in WINDOWS
}


def kernel_calls() -> dict[str, tuple[Any, tuple]]:
    """Calls to compile, by kernel name, for `budget.toml`."""
    from jmem.kernels.windowed_attention import mosaic_gpu

    calls = {}

    def add(head_dim: int, window: int, groups: int = 4, lanes: bool = False) -> None:
        heads = {"batch": 1, "heads": 8 * groups, "kv_heads": 8}
        shape = Shape(head_dim=head_dim, tokens=32768, window=window, **heads)
        sizes = {**shape.sizes(), "scale": head_dim**-0.5, "layer": 0, "lanes": lanes}
        table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shape.table()]
        name = mosaic_gpu.kernel_name(head_dim, window, groups, lanes)
        call = functools.partial(mosaic_gpu.attend, **sizes)
        calls[name] = (call, (*shape.arrays(), *table))

    for head_dim in (64, 96, 128):
        for window in WINDOWS[1:]:
            add(head_dim, window)
    add(128, 0)
    add(80, 16)
    add(128, 32, groups=MAX_GROUPS)
    add(128, 32, lanes=True)
    return calls
