"""The sizes of a cache, all static: known, in bytes, before there is one."""

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jmem import offload
from jmem.kernels.windowed_attention import Implementation
from jmem.program import by_key
from jmem.targets import Target

if TYPE_CHECKING:
    from jmem.kvcache.method import CacheMethod
    from jmem.kvcache.policy import Policy


class Sizes(TypedDict):
    """What a cache is planned for: the arguments of `CacheMethod.plan`, by name."""

    prompt: int
    """Tokens of the longest prompt."""
    new_tokens: int
    """Tokens decoded after it."""
    batch_size: NotRequired[int]
    """Rows; 1 if it is left out."""
    target: NotRequired[Target | None]
    """The GPU that decodes; None, or left out, is the CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(abc.ABC):
    """One cache for `batch_size` rows, made by `CacheMethod.plan`; hashable.

    A plan knows its arrays, each in device memory or in the host's, and so its bytes.
    `dataclasses.replace(plan, batch_size=...)` is the same cache for other rows.
    """

    batch_size: int
    prompt: int
    """Longest prompt, in tokens; a shorter row keeps what fits."""
    new_tokens: int
    """Tokens decoded after it."""
    attention: Implementation = "xla"
    """How a new token attends; "mosaic_gpu" is the kernel `windowed_attention`."""

    @property
    @abc.abstractmethod
    def method(self) -> "CacheMethod":
        """The method that made the plan."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the cache's arrays, by their paths in the cache.

        One that is to lie in host memory says so: `jmem.offload.on_host(description)`.
        """

    @property
    def most_tokens(self) -> int:
        """Most tokens of a row that a layer holds."""
        return self.prompt + self.new_tokens

    def places(self) -> dict[str, Literal["device", "host"]]:
        """The memory in which each array lies."""
        arrays = self.arrays().items()
        return {
            n: "host" if offload.count_host_bytes(a) else "device" for n, a in arrays
        }

    def host_bytes(self) -> int:
        """Bytes of the cache in host memory."""
        return offload.count_host_bytes(self.arrays())

    def device_bytes(self) -> int:
        """Bytes of the cache in device memory.

        Source: closed form, as `host_bytes`; tests/kvcache hold both to the compiled
        program's.
        """
        return self.bytes() - self.host_bytes()

    def bytes(self) -> int:
        """Bytes of the cache, wherever they lie."""
        return sum(
            math.prod(array.shape) * array.dtype.itemsize
            for array in self.arrays().values()
        )

    def zeros(self) -> dict[str, jax.Array]:
        """The arrays, each in its memory, filled with zeros."""
        places = self.places()
        return {
            name: _make_zeros(array.shape, array.dtype, places[name])
            for name, array in self.arrays().items()
        }

    def check_cache(self, where: str, cache: Any) -> None:
        """Refuses a cache of other arrays than the plan's.

        Raises:
          ValueError: names the first array of another shape or dtype.
        """
        found = {name: (x.shape, x.dtype) for name, x in by_key(cache).items()}
        for name, array in self.arrays().items():
            if found.get(name) != (array.shape, array.dtype):
                shape, dtype = found.get(name, ("no such array", None))
                has = shape if dtype in (None, array.dtype) else f"{shape} of {dtype}"
                wants = array.shape if shape != array.shape else f"{array.dtype}"
                raise ValueError(
                    f"{where}: the cache has {name} {has}, but the plan's have {wants}."
                    " Make it by plan.method.begin(plan)."
                )


def _make_zeros(shape: tuple[int, ...], dtype: Any, place: str) -> jax.Array:
    if place == "device":
        return jnp.zeros(shape, dtype)
    # NumPy's: the device may have no room for them.
    return jax.device_put(np.zeros(shape, dtype), offload.HOST_SPACE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyPlan(Plan):
    """The plan of a policy's cache: each layer has a region of slots.

    First come those for the tokens that the policy selects, then a tail for the latest
    ones. The regions of all layers follow each other on one axis, so layers of unequal
    size waste nothing.
    """

    policy: "Policy"
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

    @property
    def method(self) -> "Policy":
        return self.policy

    @property
    def layers(self) -> int:
        return len(self.selected)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(selected + self.tail for selected in self.selected)

    @property
    def most_tokens(self) -> int:
        return max(self.sizes)

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `jmem.kvcache.cache.Cache`."""
        slots = (self.batch_size, self.heads, sum(self.sizes), self.head_dim)
        chosen = (self.batch_size, self.units, sum(self.selected))
        return {
            "keys": jax.ShapeDtypeStruct(slots, self.dtype),
            "values": jax.ShapeDtypeStruct(slots, self.dtype),
            "positions": jax.ShapeDtypeStruct(chosen, jnp.int32),
            "start": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32),
        }
