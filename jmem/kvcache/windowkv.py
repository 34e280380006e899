"""WindowKV: keep whole windows of the prompt, chosen once for a group of layers.

Paper    Zuo et al., WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for
         Efficient LLM Inference, 2025, arXiv:2503.17922. Official code:
         optim996/WindowKV.
Idea     Windows of consecutive tokens keep phrases whole. The prompt's last tokens
         score each window in the first layer of a group; all heads and all layers of
         the group keep the same ones, the lower groups more than the upper ones.
Memory   2 * batch * kv_heads * head_dim * itemsize bytes times the sum over layers of
         (the group's budget + observation + new tokens), and 4 a selected token.
Differs  The official code stores each key-value head once for every query head,
         scores a whole batch as one, and keeps its windows in class variables between
         calls.
See      experiments/windowkv.py, tests/kvcache/test_windowkv.py
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.kvcache.plan import Plan
from jmem.kvcache.policy import Policy, Seen
from jmem.kvcache.scores import column_mass
from jmem.kvcache.select import select


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowKV(Policy):
    """`localization()` and `aggregation()` are the official code's two settings."""

    capacity: int = 1024
    """Mean tokens a layer keeps, besides the observed ones unless `count_recent`."""
    window: int = 8
    """Consecutive tokens that are kept or dropped together."""
    observation: int = 32
    """Last tokens of the prompt, which score the windows and stay."""
    best: int | None = 4
    """A window's score is the mean of its best tokens', this many; None: of all."""
    group: int = 8
    """Layers that share the first one's choice."""
    divisor: int = 14
    """How far the top group's budget falls below the mean (beta in the code)."""
    pyramid: Literal["code", "paper", "flat"] = "code"
    """The official code multiplies the top budget by `group`; the paper does not."""
    count_recent: bool = False
    """Whether the observed tokens count in `capacity`, as they do for SnapKV."""

    def __post_init__(self):
        for field in ("capacity", "window", "observation", "group", "divisor"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"WindowKV: {field}={getattr(self, field)} must be at least 1."
                )
        if self.mean < self.window:
            raise ValueError(
                f"WindowKV: capacity={self.capacity} leaves {self.mean} tokens for "
                f"windows of window={self.window}, so none fits. Raise capacity."
            )
        if self.best is not None and not 1 <= self.best <= self.window:
            raise ValueError(
                f"WindowKV: best={self.best} must lie in [1, window={self.window}]; "
                "None takes all."
            )
        if self.pyramid not in ("code", "paper", "flat"):
            raise ValueError(
                f"WindowKV: pyramid={self.pyramid!r} is not one of code, paper, flat."
            )

    @classmethod
    def localization(cls, **settings: Any) -> "WindowKV":
        """For questions about one place: the best half of a window counts."""
        best = max(settings.get("window", cls.window) // 2, 1)
        return cls(**{"best": best, "observation": 32} | settings)

    @classmethod
    def aggregation(cls, **settings: Any) -> "WindowKV":
        """For summaries and counting: all tokens of a window count."""
        return cls(**{"best": None, "observation": 16} | settings)

    @classmethod
    def for_task(
        cls, task: str | Callable[[str], str], text: str = "", **settings: Any
    ) -> "WindowKV":
        """The setting for "localization" or "aggregation".

        `task` may be a function that names it from the prompt's `text`, such as
        `jmem.kvcache.task.classifier()`.
        """
        named = task(text) if callable(task) else task
        makers = {"localization": cls.localization, "aggregation": cls.aggregation}
        if named not in makers:
            raise ValueError(
                f"WindowKV: task={named!r} is neither 'localization' nor "
                "'aggregation'; a function must return one of them."
            )
        return makers[named](**settings)

    @property
    def mean(self) -> int:
        """Mean tokens a layer selects."""
        return self.capacity - (self.observation if self.count_recent else 0)

    @property
    def recent(self) -> int:
        return self.observation

    def units(self, config) -> int:
        return 1

    def group_budgets(self, layers: int) -> tuple[int, ...]:
        """Tokens that each layer of a group selects, of a long prompt."""
        groups, rest = divmod(layers, self.group)
        if rest:
            divisors = [str(n) for n in range(1, layers + 1) if layers % n == 0]
            raise ValueError(
                f"WindowKV: group={self.group} does not divide the model's {layers} "
                f"layers; choose one of {', '.join(divisors)}."
            )
        if self.pyramid == "flat":
            return (self.mean,) * groups
        if groups == 1:
            raise ValueError(
                f"WindowKV: group={self.group} is all the layers, and one group makes "
                "no pyramid. Lower group, or choose pyramid='flat'."
            )
        shared = self.group if self.pyramid == "code" else 1
        top = self.mean * shared // self.divisor
        bottom = 2 * self.mean - top
        if top > bottom:
            raise ValueError(
                f"WindowKV: group={self.group} over divisor={self.divisor} gives the "
                f"top group {top} tokens and the bottom one {bottom}: the pyramid "
                "stands on its head. Raise divisor, or choose pyramid='paper'."
            )
        step = (bottom - top) // (groups - 1)
        return (*(bottom - index * step for index in range(groups - 1)), top)

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        """Of each layer, in whole windows."""
        slots = [-(-n // self.window) * self.window for n in self.group_budgets(layers)]
        return tuple(slots[layer // self.group] for layer in range(layers))

    def window_scores(self, seen: Seen) -> Float[Array, "B N"]:
        """Mean over heads of each window's best tokens; -inf where there is none."""
        mass = column_mass(seen.queries, seen.at, seen.keys)
        mass = jnp.where(seen.candidates[:, None], mass, -jnp.inf)
        batch, heads, length = mass.shape
        short = -length % self.window
        mass = jnp.pad(mass, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf)
        windows = mass.reshape(batch, heads, -1, self.window)
        if self.best is not None and self.best < self.window:
            windows = jax.lax.top_k(windows, self.best)[0]
        there = windows > -jnp.inf
        count = there.sum(axis=-1)
        mean = jnp.where(there, windows, 0.0).sum(axis=-1) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, -jnp.inf).mean(axis=1)

    def begin(self, plan: Plan) -> Int[Array, "B 1 N"]:
        windows = -(-max(plan.selected) // self.window)
        return jnp.zeros((plan.batch_size, 1, windows), jnp.int32)

    def choose(
        self,
        plan: Plan,
        seen: Seen,
        layer: jax.Array,
        shared: Int[Array, "B 1 N"],
    ) -> tuple[Int[Array, "B 1 S"], Int[Array, "B 1 N"]]:
        """The group's windows, from its first layer; `shared` holds their numbers."""
        budget = jnp.asarray(self.group_budgets(plan.layers))[layer // self.group]

        def lead():
            windows = -(-seen.start // self.window)
            dropped = -(-jnp.maximum(seen.start - budget, 0) // self.window)
            scores = self.window_scores(seen)[:, None]
            return select(scores, (windows - dropped)[:, None], shared.shape[-1])

        shared = jax.lax.cond(layer % self.group == 0, lead, lambda: shared)
        within = jnp.arange(self.window, dtype=jnp.int32)[None, None, None]
        tokens = shared[..., None] * self.window + within
        there = (shared[..., None] >= 0) & (tokens < seen.start[:, None, None, None])
        tokens = jnp.where(there, tokens, -1).reshape(*shared.shape[:2], -1)
        return tokens[..., : max(plan.selected)], shared
