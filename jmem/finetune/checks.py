"""Checks of fine-tuners' settings: each returns nothing, or raises a ValueError."""

from typing import Any, get_args

import numpy as np

from jmem.finetune.walk import Update


def check_choice(who: str, name: str, value: Any, words: Any) -> None:
    """Refuses a setting that is none of the words of the `Literal` type `words`."""
    if value not in get_args(words):
        raise ValueError(f"{who}: {name}={value!r} must be one of {get_args(words)}.")


def check_rate(who: str, name: str, value: float) -> None:
    """Refuses a rate that is negative, or no number or infinite as a float32."""
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"{who}: {name}={value} must be finite, in float32, and not negative."
        )


def check_parts(name: str, parts: int) -> None:
    """For the `accumulate` field of a finetuner."""
    if parts < 1:
        raise ValueError(f"{name}: accumulate={parts} must be at least 1.")


def check_update(
    who: str, update: str, max_grad_norm: float, parts: int, what: str = "adapters"
) -> None:
    """For the fields `update` and `accumulate` of a finetuner that can fuse."""
    check_parts(who, parts)
    check_choice(who, "update", update, Update)
    if update == "fused" and (max_grad_norm or parts > 1):
        raise ValueError(
            f"{who}: update='fused' moves {what} before all gradients are known, so "
            f"adamw.max_grad_norm={max_grad_norm} and accumulate={parts} cannot be "
            "kept. Set them to 0 and 1, or choose update='separate'."
        )
