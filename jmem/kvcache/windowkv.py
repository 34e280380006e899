"""WindowKV: keep whole windows of the prompt, chosen once for a group of layers.

Paper    Zuo et al., WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for
         Efficient LLM Inference, 2025, arXiv:2503.17922. Official code:
         optim996/WindowKV.
Idea     Windows of consecutive tokens keep phrases whole. The prompt's last tokens
         score each window in the first layer of a group; all heads and all layers of
         the group keep the same ones, the lower groups more than the upper ones.
         A phrase that lies across windows is kept whole by `neighbours`, ours: what
         is asked about scores the window it begins in, and not the next.
Memory   2 * batch * kv_heads * head_dim * itemsize bytes times the sum over layers of
         (the group's budget + observation + new tokens), and 4 a selected token.
Differs  The official code stores each key-value head once for every query head,
         scores a whole batch as one, and keeps its windows in class variables between
         calls. Where a group's budget is below one window its layers keep none here;
         there the followers keep what an earlier group chose.
See      experiments/windowkv.py, tests/kvcache/test_windowkv.py
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy, Seen
from jmem.kvcache.scores import average_windows, column_mass, pool
from jmem.kvcache.select import select
from jmem.kvcache.settings import check_settings

logger = logging.getLogger(__name__)

Tasks = Literal["official_code", "paper"]
"""Who says how each task is scored."""

TASKS: Mapping[Tasks, Mapping[str, Mapping[str, Any]]] = {
    "official_code": {
        "localization": {"best": "half", "observation": 32},
        "aggregation": {"best": 0, "observation": 16},
    },
    "paper": {
        "localization": {"best": 0, "observation": 16},
        "aggregation": {"best": "half", "observation": 32, "window": 16},
    },
}
"""By task, a window's best tokens, the observed ones, and where it differs the window.

Code and paper score the two tasks the other way round, as far as the paper is known
from a summary; `experiments/windowkv.py` compares them. "half" is half a window.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowKV(Policy):
    """`for_task` gives the settings of the two kinds of task."""

    capacity: int = 1024
    """Mean tokens a layer keeps, besides the observed ones unless `count_recent`."""
    window: int = 8
    """Consecutive tokens that are kept or dropped together."""
    observation: int = 32
    """Last tokens of the prompt, which score the windows and stay."""
    best: int = 4
    """A window's score is the mean of its best tokens', this many; 0: of all."""
    group: int = 8
    """Layers that share the first one's choice."""
    divisor: int = 14
    """How far the top group's budget falls below the mean (beta in the code)."""
    pyramid: Literal["code", "paper", "flat"] = "code"
    """The official code multiplies the top budget by `group`; the paper does not."""
    count_recent: bool = False
    """Whether the observed tokens count in `capacity`, as they do for SnapKV."""
    keep_sinks: bool = False
    """Whether the prompt's first window is always kept, whatever it scores."""
    neighbours: int = 0
    """Windows on each side that count as much as the one between them (ours)."""

    def __post_init__(self):
        sizes = ("capacity", "window", "observation", "group", "divisor")
        check_settings(self, positive=sizes, not_negative=["neighbours"])
        if self.mean < self.window:
            raise ValueError(
                f"WindowKV: capacity={self.capacity} leaves {self.mean} tokens for "
                f"windows of window={self.window}, so none fits. Raise capacity."
            )
        if not 0 <= self.best <= self.window:
            raise ValueError(
                f"WindowKV: best={self.best} must lie in [0, window={self.window}]; "
                "0 takes all."
            )

    @classmethod
    def for_task(
        cls,
        task: str | Callable[[str], str],
        text: str = "",
        *,
        by: Tasks = "official_code",
        **settings: Any,
    ) -> "WindowKV":
        """The setting for "localization" or "aggregation", by code or paper (`TASKS`).

        The one is for questions about one place: in the code, a window's best half
        counts. The other is for summaries and counting: all tokens of a window count.

        `task` may be a function that names it from the prompt's `text`, such as
        `jmem.kvcache.task.get_classifier()`. `settings` are fields, and come first.

        Raises:
          ValueError: there is no such task, or `by` is neither code nor paper.
        """
        if by not in TASKS:
            raise ValueError(
                f"WindowKV: by={by!r} is not one of {', '.join(get_args(Tasks))}."
            )
        named = task(text) if callable(task) else task
        if named not in TASKS[by]:
            raise ValueError(
                f"WindowKV: task={named!r} is neither 'localization' nor "
                "'aggregation'; a function must return one of them."
            )
        chosen = dict(TASKS[by][named]) | settings
        if chosen["best"] == "half":
            chosen["best"] = max(chosen.get("window", cls.window) // 2, 1)
        return cls(**chosen)

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
        if bottom < 0:
            raise ValueError(
                f"WindowKV: group={self.group} over divisor={self.divisor} gives the "
                f"top group {top} tokens, more than twice the mean of {self.mean}, so "
                "none are left below. Raise divisor, or choose pyramid='paper'."
            )
        if top > bottom:
            _warn_inverted(self.group, self.divisor)
        step = (bottom - top) // (groups - 1)
        return (*(bottom - index * step for index in range(groups - 1)), top)

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        """Of each layer, in whole windows."""
        slots = [-(-n // self.window) * self.window for n in self.group_budgets(layers)]
        return tuple(slots[layer // self.group] for layer in range(layers))

    def score_windows(self, seen: Seen) -> Float[Array, "B N"]:
        """Mean over heads of each window's best tokens; -inf where there is none."""
        mass = column_mass(seen.queries, seen.at, seen.keys)
        mass = jnp.where(seen.candidates[:, None], mass, -jnp.inf)
        scores = average_windows(mass, self.window, self.best).mean(axis=1)
        if self.neighbours:
            pooled = pool(scores[:, None], 2 * self.neighbours + 1, "max")[:, 0]
            scores = jnp.where(scores > -jnp.inf, pooled, -jnp.inf)
        return scores

    def share(self, plan: PolicyPlan) -> Int[Array, "B 1 N"]:
        windows = -(-max(plan.selected) // self.window)
        return jnp.zeros((plan.batch_size, 1, windows), jnp.int32)

    def choose(
        self,
        plan: PolicyPlan,
        seen: Seen,
        layer: jax.Array,
        shared: Int[Array, "B 1 N"],
    ) -> tuple[Int[Array, "B 1 S"], Int[Array, "B 1 N"]]:
        """The group's windows, from its first layer; `shared` holds their numbers."""
        budget = jnp.asarray(self.group_budgets(plan.layers))[layer // self.group]
        slots = jnp.asarray(plan.selected, jnp.int32)[layer]

        def lead():
            windows = -(-seen.start // self.window)
            dropped = -(-jnp.maximum(seen.start - budget, 0) // self.window)
            # In a later turn there may be more to choose from than the plan's prompt.
            fit = jnp.where(seen.start <= slots, windows, slots // self.window)
            count = jnp.minimum(windows - dropped, fit)
            scores = self.score_windows(seen)[:, None]
            if self.keep_sinks:
                scores = scores.at[:, :, 0].set(jnp.inf)
            return select(scores, count[:, None], shared.shape[-1])

        shared = jax.lax.cond(layer % self.group == 0, lead, lambda: shared)
        within = jnp.arange(self.window, dtype=jnp.int32)[None, None, None]
        tokens = shared[..., None] * self.window + within
        there = (shared[..., None] >= 0) & (tokens < seen.start[:, None, None, None])
        tokens = jnp.where(there, tokens, -1).reshape(*shared.shape[:2], -1)
        return tokens[..., : max(plan.selected)], shared


@functools.cache
def _warn_inverted(group: int, divisor: int) -> None:
    """Once for each: the paper's own ablation runs such settings."""
    logger.warning(
        "WindowKV: group=%d over divisor=%d gives upper layers more tokens than lower "
        "ones. Raise divisor, or choose pyramid='paper' or 'flat'.",
        *(group, divisor),
    )
