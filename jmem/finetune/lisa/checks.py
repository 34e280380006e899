"""What LISA refuses: settings that contradict each other, and impossible draws.

Every function here returns nothing, or raises a ValueError that says what to change.
"""

from typing import Any

import numpy as np
from jax.core import Tracer

from jmem.finetune.adamw import Place
from jmem.finetune.checks import check_choice, check_update
from jmem.finetune.lisa.moments import AtDraw, Outside
from jmem.finetune.orders import Order


def check_draw(layers: int, active_layers: int, weights: tuple[float, ...]) -> None:
    """Refuses a draw of `active_layers` blocks out of a model's `layers`."""
    if active_layers > layers:
        raise ValueError(
            f"Lisa: active_layers={active_layers} exceeds the model's {layers} blocks; "
            f"use at most {layers}, which trains every parameter."
        )
    if weights and len(weights) != layers:
        raise ValueError(
            f"Lisa: weights={weights} has {len(weights)} entries for {layers} blocks; "
            "give one a block, or none for uniform draws."
        )


def check_settings(lisa: Any) -> None:
    """All settings of a `Lisa`."""
    check_update(
        *("Lisa", lisa.update, lisa.adamw.max_grad_norm, lisa.accumulate, "weights")
    )
    check_choice("Lisa", "moments", lisa.moments, AtDraw)
    check_choice("Lisa", "order", lisa.order, Order)
    check_choice("Lisa", "persist_in", lisa.persist_in, Place)
    check_choice("Lisa", "outside_moments", lisa.outside_moments, Outside)
    if lisa.period < 1:
        raise ValueError(f"Lisa: period={lisa.period} must be at least 1 step.")
    _check_weights(lisa.weights, lisa.active_layers, lisa.order)
    _check_resting(lisa)
    if not lisa.fuses:
        _check_separate(lisa)


def _check_weights(weights: tuple[float, ...], active_layers: int, order: str) -> None:
    """Refuses weights by which so many blocks cannot be drawn."""
    if active_layers < 0:
        raise ValueError(f"Lisa: active_layers={active_layers} must not be negative.")
    if weights and order != "drawn":
        raise ValueError(
            f"Lisa: weights={weights} say how often blocks are drawn, and with order="
            f"{order!r} none is. Leave weights out, or choose order='drawn'."
        )
    if any(not 0 <= w < float("inf") for w in weights):
        raise ValueError(f"Lisa: weights={weights} must be finite and not negative.")
    if weights and sum(w > 0 for w in weights) < active_layers:
        raise ValueError(
            f"Lisa: weights={weights} has fewer than active_layers={active_layers} "
            "positive entries, so that many distinct blocks can't be drawn."
        )


def _check_resting(lisa: Any) -> None:
    """Refuses moments in host memory where none would persist there."""
    if lisa.persist_in == "host" and lisa.moments != "persist":
        raise ValueError(
            f"Lisa: persist_in='host' is for moments that persist, and moments="
            f"{lisa.moments!r} forgets them at a draw. Choose moments='persist', "
            "or leave persist_in out."
        )
    if lisa.persist_in == "host" and not lisa.active_layers:
        raise ValueError(
            "Lisa: persist_in='host' is for the moments of blocks, and "
            "active_layers=0 trains none. Leave persist_in out."
        )


def _check_separate(lisa: Any) -> None:
    """Refuses, of a step that is not fused, what only a fused one can do."""
    if lisa.adamw.weight_rounding == "random":
        lisa.adamw.clip_factor(())  # refuses it
    if lisa.master:
        raise ValueError(
            "Lisa: master=True needs a fused step, whose rule moves the copy. Set "
            "adamw.max_grad_norm=0 and accumulate=1, or leave it out."
        )
    if lisa.outside_moments != "device":
        raise ValueError(
            f"Lisa: outside_moments={lisa.outside_moments!r} needs a fused step, "
            "which walks embedding and head in parts. Set adamw.max_grad_norm=0 "
            "and accumulate=1, or leave it out."
        )


def check_active(active, layers: int, active_layers: int) -> None:
    """Refuses blocks to train that are not as many distinct, ascending ones.

    Their values are checked where they are known, and not traced.
    """
    if active.shape != (active_layers,):
        raise ValueError(
            f"Lisa.step: active has shape {active.shape}; "
            f"active_layers={active_layers} needs ({active_layers},)."
        )
    if not isinstance(active, Tracer):
        values = np.asarray(active)
        inside = not values.size or (values[0] >= 0 and values[-1] < layers)
        if not inside or (np.diff(values) <= 0).any():
            raise ValueError(
                f"Lisa.step: active={values.tolist()} must be distinct, ascending "
                f"block indices in [0, {layers})."
            )
