"""What LISA refuses, in words: settings that contradict each other, and draws."""

from typing import Any, get_args

import numpy as np
from jax.core import Tracer

from jmem.finetune.accumulate import check_parts
from jmem.finetune.lisa.moments import AtDraw, Outside, Place
from jmem.finetune.orders import Order
from jmem.finetune.walk import Update


def check_draw(layers: int, active_layers: int, weights: tuple[float, ...]) -> None:
    """Of a model with so many blocks."""
    if active_layers > layers:
        raise ValueError(
            f"Lisa: active_layers={active_layers} exceeds the model's {layers} blocks; "
            f"use at most {layers}, which trains every parameter."
        )
    if weights and len(weights) != layers:
        raise ValueError(
            f"Lisa: weights has {len(weights)} entries for {layers} blocks; give one a "
            "block, or none for uniform draws."
        )


def check_options(
    active_layers: int,
    period: int,
    moments: str,
    weights: tuple[float, ...],
    order: str,
) -> None:
    """What the transform has too."""
    if active_layers < 0:
        raise ValueError(f"Lisa: active_layers={active_layers} must not be negative.")
    if period < 1:
        raise ValueError(f"Lisa: period={period} must be at least 1 step.")
    if moments not in get_args(AtDraw):
        raise ValueError(
            f"Lisa: moments={moments!r} must be one of {get_args(AtDraw)}."
        )
    if order not in get_args(Order):
        raise ValueError(f"Lisa: order={order!r} must be one of {get_args(Order)}.")
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


def check_settings(lisa: Any) -> None:
    """All of a `Lisa`."""
    check_parts("Lisa", lisa.accumulate)
    choices = {"update": Update, "persist_in": Place, "outside_moments": Outside}
    for name, kind in choices.items():
        if getattr(lisa, name) not in get_args(kind):
            raise ValueError(
                f"Lisa: {name}={getattr(lisa, name)!r} must be one of {get_args(kind)}."
            )
    _check_resting(lisa)
    _check_fused(lisa)
    check_options(
        *(lisa.active_layers, lisa.period, lisa.moments, lisa.weights, lisa.order)
    )


def _check_resting(lisa: Any) -> None:
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


def _check_fused(lisa: Any) -> None:
    if lisa.update == "fused" and lisa.adamw.max_grad_norm:
        raise ValueError(
            f"Lisa: update='fused' moves weights before all gradients are known, "
            f"so adamw.max_grad_norm={lisa.adamw.max_grad_norm} cannot be kept. "
            "Set it to 0, or choose update='separate'."
        )
    if lisa.update == "fused" and lisa.accumulate > 1:
        raise ValueError(
            f"Lisa: update='fused' moves weights before accumulate="
            f"{lisa.accumulate} parts are summed. Set it to 1, or choose "
            "update='separate'."
        )
    if lisa.fuses:
        return
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
    """Blocks that a caller names, as far as the host knows them."""
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
