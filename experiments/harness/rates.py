"""Learning rates of fine-tuners, whatever field holds them.

faster = scale_rate(Lora(), 3.0)
falling = lay_out(Lora(adamw=AdamW(schedule="cosine")), 400)  # zero at update 400
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


def change_rates(own: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with what holds its learning rate, itself or its `adamw`, changed.

    Of a MixLora, those of all its mixtures.
    """
    if mixtures := getattr(own, "mixtures", ()):
        changed = tuple(change_rates(mixture, change) for mixture in mixtures)
        return dataclasses.replace(own, mixtures=changed)
    if hasattr(own, "learning_rate"):
        return change(own)
    return dataclasses.replace(own, adamw=change(own.adamw))


def scale_rate(own: Any, factor: float) -> Any:
    """A dataclass whose learning rate is `factor` times."""

    def scale(rates: Any) -> Any:
        return dataclasses.replace(rates, learning_rate=rates.learning_rate * factor)

    return change_rates(own, scale)


def falls_to_the_end(rates: Any) -> bool:
    """Whether a schedule falls over a number of updates that it does not say."""
    falls = getattr(rates, "schedule", "constant") != "constant"
    return falls and rates.total_steps is None


def lay_out(own: Any, steps: int) -> Any:
    """A dataclass whose schedule, if it says no `total_steps`, falls over `steps`.

    Raises:
      ValueError: it is still rising then.
    """

    def fill(rates: Any) -> Any:
        if not falls_to_the_end(rates):
            return rates
        if steps <= rates.warmup_steps:
            raise ValueError(
                f"steps={steps}: schedule={rates.schedule!r} is to fall until then, "
                f"and rises for warmup_steps={rates.warmup_steps}. Lower warmup_steps, "
                "raise steps, or give total_steps."
            )
        return dataclasses.replace(rates, total_steps=steps)

    return change_rates(own, fill)


def explain_tie(config: Any, names: Iterable[str]) -> str:
    """Why the run of a config cannot go on to more steps, or "".

    It cannot if a schedule of the fine-tuners in the fields `names` ends with it.
    """
    tied = []
    for name in names:
        own = getattr(config, name)
        where = name if hasattr(own, "learning_rate") else f"{name}.adamw"
        if falls_to_the_end(getattr(own, "adamw", own)):
            tied.append(f"--{where.replace('_', '-')}")
    if not tied:
        return ""
    return (
        f"{' and '.join(f'{flag}.schedule' for flag in tied)} falls to zero at --steps,"
        " so more steps have other rates from the first update on. Start a new run, "
        f"with {tied[0]}.total-steps if it is to go on to more later."
    )
