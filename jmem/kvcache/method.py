"""What every cache offers: sizes, arrays, how a prompt enters, how a token attends.

    plan = method.plan(model, prompt=8192, new_tokens=256)
    cache = method.begin(plan)

A prompt's attention is exact and computed once, whatever the number of caches that are
to be made of it (`jmem.kvcache.prefill`); each method says what it keeps of a layer.
`jmem.generate` and `jmem.evaluate` ask a method or its plan, and know none by name.

`jmem.kvcache.policy.Policy` is the method that chooses which tokens stay; who wants to
choose differently writes one of those. A method of another kind (low rank, an index on
the host, blocks fetched when they are needed) is a frozen dataclass with the abstract
functions of `CacheMethod`, and a `Plan` of its own.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.kvcache.plan import Plan
from jmem.nn.ops import Attend
from jmem.targets import Target


class Read(NamedTuple):
    """What a layer makes of prompts, for whoever keeps some of it.

    Rows are padded on the right to T tokens; of padding nothing may be kept.
    """

    queries: Float[Array, "B T H D"]
    """Rotated."""
    keys: Float[Array, "B T K D"]
    """Rotated."""
    unrotated: Float[Array, "B T K D"]
    """The keys before rotation."""
    values: Float[Array, "B T K D"]
    lengths: Int[Array, " B"]
    """Tokens of each row, without padding."""
    layer: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMethod(abc.ABC):
    """A kind of cache; hashable, so it is compiled in.

    Its cache is any tree of arrays. It is donated to every program, carried through the
    layers and addressed by the traced `layer`. `shared` is what a layer hands to the
    next one while a prompt or a turn is read, and belongs to no cache.
    """

    @abc.abstractmethod
    def plan(
        self,
        model,
        *,
        prompt: int,
        new_tokens: int,
        batch_size: int = 1,
        target: Target | None = None,
    ) -> Plan:
        """The sizes of a cache for prompts of up to `prompt` tokens, and as many new.

        Of a model with `config` and `dtype` (`jmem.models.decoder.Decoder`), decoding
        on `target` (None: the CPU). Who only hands the sizes on takes them as
        `**sizes: Unpack[jmem.kvcache.plan.Sizes]`.
        """

    @property
    def filter(self) -> None:
        """What shortens a prompt before it is read: nothing does."""
        return None

    def resize(self, capacity: int) -> Any:
        """The same with another `capacity`, its field; see `jmem.kvcache.budget`."""
        return dataclasses.replace(self, **{"capacity": capacity})  # pyright: ignore

    @abc.abstractmethod
    def begin(self, plan: Any) -> Any:
        """The cache that holds no token, every array in its memory (`Plan.zeros`)."""

    def share(self, plan: Any) -> Any:
        """What the first layer gets as `shared`."""
        del plan

    # Reading a prompt -----------------------------------------------------------------

    @abc.abstractmethod
    def keep(self, plan: Any, read: Read, cache: Any, shared: Any) -> tuple[Any, Any]:
        """The cache with what is kept of one layer, and `shared` for the next one."""

    def prefill(self, plan: Any, lengths: Int[Array, " B"], model) -> Attend | None:
        """The method's own attention over a prompt; None: the exact one, and `keep`.

        Its carry is (cache, shared). A prompt that is read so is read for no other
        method at the same time.
        """
        del plan, lengths, model

    # Decoding -------------------------------------------------------------------------

    @abc.abstractmethod
    def decode(
        self,
        plan: Any,
        cache: Any,
        model,
        positions: Int[Array, " B"],
        places: Int[Array, " B"] | None = None,
    ) -> Attend:
        """How one new token a row enters the cache and attends it, in any layer.

        Made once a token: what does not depend on the layer belongs here, such as the
        rotation by its position (`Rope.at`). The carry is the cache. `places` count the
        tokens that the row's cache has seen before; None: as many as the position.
        """

    def turn(
        self,
        plan: Any,
        cache: Any,
        before: Int[Array, " B"],
        lengths: Int[Array, " B"],
        model,
    ) -> Attend:
        """How `lengths` further tokens a row are read, `before` of which were read.

        The carry is (cache, shared). A row with none stays as it is. Rows are padded on
        the right. A method that does not define it (and `check_turn`) refuses turns.
        """
        raise self._refuse_turn()

    # What is refused ------------------------------------------------------------------

    def check_prompt(
        self, where: str, plan: Any, lengths: Int[np.ndarray, " B"]
    ) -> None:
        """Refuses prompts that are longer than the plan's."""
        if lengths.max() > plan.prompt:
            raise ValueError(
                f"{where}: row {lengths.argmax()} has {lengths.max()} tokens, but the "
                f"plan is for prompt={plan.prompt}. Plan for the longest prompt."
            )

    def check_turn(
        self,
        plan: Any,
        before: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
        new_tokens: int = 0,
    ) -> None:
        """Refuses a turn of `lengths` and an answer of `new_tokens` without room."""
        raise self._refuse_turn()

    def _refuse_turn(self) -> ValueError:
        return ValueError(
            f"A turn: {type(self).__name__} reads no further tokens against its cache. "
            "Read the whole text again, or choose another method."
        )

    def is_endless(self, model) -> bool:
        """Whether an answer may go on for ever, beyond the model's positions."""
        del model
        return False

    # The cache as a value -------------------------------------------------------------

    def join(self, caches: list[Any]) -> Any:
        """One cache of the rows of several; axis 0 of every array counts rows."""
        if len(caches) == 1:
            return caches[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)

    def find_broken(self, plan: Any, cache: Any, row: int) -> int | None:
        """The first layer that holds, of a row, what is no finite number; None: none.

        Asked only where something is wrong.
        """
        del plan, cache, row
        return None
