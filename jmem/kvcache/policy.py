"""What every policy shares: how much a layer keeps, of which tokens, and the plan.

A new policy is a frozen dataclass with two functions: `budgets`, how many tokens each
layer selects, and `scores`, how much each token matters. docs/kvcache.md writes one.
"""

import abc
import dataclasses
import logging
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.kernels.windowed_attention import ALIGNMENT, Implementation, choose
from jmem.kvcache.cache import Cache, decode_attend, make_empty, write
from jmem.kvcache.method import CacheMethod, Read
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.seen import Seen, observe
from jmem.kvcache.select import select
from jmem.kvcache.turn import check_turn, turn_attend
from jmem.nn.ops import Attend
from jmem.targets import Target

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(CacheMethod):
    """Which tokens of a prompt a layer keeps; hashable, so it is compiled in."""

    rope: ClassVar[Literal["absolute", "cache"]] = "absolute"
    """Keys are rotated by their true position, or by their place inside the cache."""
    rolls: ClassVar[bool] = False
    """Whether a new token may take the slot of the oldest recent one."""

    @property
    @abc.abstractmethod
    def recent(self) -> int:
        """The prompt's last tokens, which every layer keeps."""

    @abc.abstractmethod
    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        """Tokens besides the recent ones that each layer keeps of a long prompt."""

    def scores(self, seen: Seen, layer: jax.Array) -> Float[Array, "B U T"]:
        """How much each token matters, to all heads (U = 1) or to each stored head.

        Float32; inf is always kept. Scores of tokens that are no candidates are
        ignored.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define scores(seen, layer), or choose."
        )

    def choose(
        self, plan: PolicyPlan, seen: Seen, layer: jax.Array, shared: Any
    ) -> tuple[Int[Array, "B U N"], Any]:
        """Positions that the layer keeps, ascending, -1 behind the last.

        N is the largest layer's budget; the layer's own is `plan.selected[layer]`. A
        row keeps as many for every unit. `shared` comes from the layer before, and goes
        on to the next (`share` starts it).
        """
        scores = self.scores(seen, layer)
        wanted = (seen.keys.shape[0], plan.units, seen.keys.shape[1])
        if scores.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}: scores of shape {scores.shape} must be "
                f"{wanted}: rows, units (heads that choose, or 1), tokens."
            )
        scores = jnp.where(seen.candidates[:, None], scores, -jnp.inf)
        count = jnp.asarray(plan.selected, jnp.int32)[layer]
        return select(scores, count, max(plan.selected)), shared

    def units(self, config) -> int:
        """Selections a layer makes: one for each stored head, or 1 for all."""
        return self.heads(config)

    def heads(self, config) -> int:
        """Heads whose keys and values are stored."""
        return config.kv_heads

    @property
    def sinks(self) -> int:
        """The prompt's first tokens, which are never recent."""
        return 0

    def tail(self, prompt: int, new_tokens: int) -> int:
        """Slots for the latest tokens; with fewer than come, the oldest are dropped."""
        return min(self.recent, prompt) + new_tokens

    def attention(self, target: Target | None, config, dtype) -> Implementation:
        """How a new token attends on `target`; None is the CPU."""
        plain = self.rope == "absolute" and config.sliding_window is None
        return choose(target, dtype, config.head_dim) if plain else "xla"

    def plan(
        self,
        model,
        *,
        prompt: int,
        new_tokens: int,
        batch_size: int = 1,
        target: Target | None = None,
    ) -> PolicyPlan:
        """The sizes of a cache for prompts of up to `prompt` tokens, and as many new.

        A model with `config` and `dtype` (`jmem.models.decoder.Decoder`). Where the
        prompt fits in the budget all of it is kept, as by `Full`. Where `target` has
        the kernel for it, slots come in eights.

        Raises:
          ValueError: a size that is not positive, or that the model cannot be cut to;
            `budgets` gave no number of tokens for a layer.
        """
        for name, value in (("prompt", prompt), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"plan: {name}={value} must be at least 1.")
        if new_tokens < 0:
            raise ValueError(f"plan: new_tokens={new_tokens} must not be negative.")
        config, dtype = model.config, jnp.dtype(model.dtype)
        attention = self.attention(target, config, dtype)
        step = ALIGNMENT if attention == "mosaic_gpu" else 1
        rest = max(prompt - self.recent, min(self.sinks, prompt))
        budgets = self.budgets(config.layers, prompt)
        if len(budgets) != config.layers or min(budgets) < 0:
            raise ValueError(
                f"{type(self).__name__}: budgets={budgets} must be a number of tokens, "
                f"0 or more, for each of {config.layers} layers."
            )
        selected = tuple(min(budget, rest) for budget in budgets)
        if rest and all(size == rest for size in selected):
            logger.info(
                "%s keeps all of %d tokens: as much memory as Full.", self, prompt
            )
        return PolicyPlan(
            policy=self,
            batch_size=batch_size,
            prompt=prompt,
            new_tokens=new_tokens,
            heads=self.heads(config),
            units=self.units(config),
            head_dim=config.head_dim,
            dtype=dtype,
            selected=tuple(-(-size // step) * step for size in selected),
            recent=min(self.recent, prompt),
            sinks=self.sinks,
            tail=-(-self.tail(prompt, new_tokens) // step) * step,
            attention=attention,
        )

    # What the cache is made of: `jmem.kvcache.cache`, `jmem.kvcache.turn` -------------

    def begin(self, plan: PolicyPlan) -> Cache:
        return make_empty(plan)

    def keep(
        self, plan: PolicyPlan, read: Read, cache: Cache, shared: Any
    ) -> tuple[Cache, Any]:
        chosen = None
        if max(plan.selected):
            seen = observe(plan, read)
            chosen, shared = self.choose(plan, seen, read.layer, shared)
        keys = read.unrotated if self.rope == "cache" else read.keys
        given = keys, read.values, chosen, read.lengths, read.layer
        return write(plan, cache, *given), shared

    def decode(
        self,
        plan: PolicyPlan,
        cache: Cache,
        model,
        positions: Int[Array, " B"],
        places: Int[Array, " B"] | None = None,
    ) -> Attend:
        return decode_attend(plan, model.config, cache, positions, places)

    def turn(
        self,
        plan: PolicyPlan,
        cache: Cache,
        before: Int[Array, " B"],
        lengths: Int[Array, " B"],
        model,
    ) -> Attend:
        return turn_attend(plan, cache.start, before, lengths, model)

    def check_turn(
        self,
        plan: PolicyPlan,
        before: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
        new_tokens: int = 0,
    ) -> None:
        check_turn(plan, before, lengths, new_tokens)

    def is_endless(self, model) -> bool:
        """Whether keys are rotated by their place in a ring, which has an end."""
        rotary = model.config.positions == "rotary"
        return rotary and self.rolls and self.rope == "cache"

    def find_broken(self, plan: PolicyPlan, cache: Cache, row: int) -> int | None:
        end = 0
        for layer, size in enumerate(plan.sizes):
            begin, end = end, end + size
            slots = (x[row, :, begin:end] for x in (cache.keys, cache.values))
            if not all(jnp.isfinite(x).all() for x in slots):
                return layer
        return None
