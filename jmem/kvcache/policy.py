"""What every policy shares: how much a layer keeps, of which tokens, and the plan.

A new policy is a frozen dataclass with two functions: `budgets`, how many tokens each
layer selects, and `scores`, how much each token matters. docs/kvcache.md writes one.
"""

import abc
import dataclasses
import logging
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.kernels.windowed_attention import ALIGNMENT, Implementation, choose
from jmem.kvcache.plan import Plan
from jmem.kvcache.select import select
from jmem.targets import Target

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What a policy selects by, in one layer. Rows may differ in length.

    Of a prompt; in a later turn of what the layer holds and the new tokens behind it,
    whose positions are then places in that list (`jmem.kvcache.turn`).
    """

    queries: Float[Array, "B W H D"]
    """Of the prompt's last W tokens, rotated."""
    at: Int[Array, "B W"]
    """Their positions; negative where the prompt (or the turn) is shorter than W."""
    keys: Float[Array, "B T K D"]
    """Of all tokens, rotated."""
    start: Int[Array, " B"]
    """The positions before this one are to be chosen from."""

    @property
    def candidates(self) -> jax.Array:
        """Bool [B, T]: which tokens may be selected."""
        tokens = jnp.arange(self.keys.shape[1], dtype=jnp.int32)
        return tokens[None] < self.start[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """Which tokens of a prompt a layer keeps; hashable, so it is compiled in."""

    rope: ClassVar[Literal["absolute", "cache"]] = "absolute"
    """Keys turn by their true position, or by their place inside the cache."""
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
        self, plan: Plan, seen: Seen, layer: jax.Array, shared: Any
    ) -> tuple[Int[Array, "B U N"], Any]:
        """Positions that the layer keeps, ascending, -1 behind the last.

        N is the largest layer's budget; the layer's own is `plan.selected[layer]`. A
        row keeps as many for every unit. `shared` comes from the layer before, and goes
        on to the next (`begin` starts it).
        """
        scores = self.scores(seen, layer)
        scores = jnp.where(seen.candidates[:, None], scores, -jnp.inf)
        count = jnp.asarray(plan.selected, jnp.int32)[layer]
        return select(scores, count, max(plan.selected)), shared

    def begin(self, plan: Plan) -> Any:
        """What the first layer gets as `shared`."""
        del plan

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
    ) -> Plan:
        """The sizes of a cache for prompts of up to `prompt` tokens, and as many new.

        A model with `config` and `dtype` (`jmem.models.decoder.Decoder`). Where the
        prompt fits in the budget all of it is kept, as by `Full`. Where `target` has
        the kernel for it, slots come in eights.

        Raises:
          ValueError: a size that is not positive, or that the model cannot be cut to.
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
        selected = tuple(min(budget, rest) for budget in budgets)
        if rest and all(size == rest for size in selected):
            logger.info(
                "%s keeps all of %d tokens: as much memory as Full.", self, prompt
            )
        return Plan(
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
