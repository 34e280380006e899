"""The settings of one mixture, and what is refused of several that train together."""

import dataclasses
import math
from typing import Any, Literal

from jmem.finetune.adamw import AdamW
from jmem.finetune.checks import check_choice, check_update
from jmem.finetune.lora import find_scale
from jmem.finetune.mixture import Router
from jmem.finetune.mixture_ops import HIDDEN
from jmem.nn.maps import MAPS, check_maps

Balance = Literal["global", "per_layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """One model to be trained: sizes, routing and optimizer; defaults are official."""

    rank: int = 16
    """Of every adapter, r."""
    alpha: float = 32.0
    """Products are scaled by alpha / rank ..."""
    rslora: bool = False
    """... or by alpha / sqrt(rank)."""
    experts: int = 8
    """Adapters of an MLP, E. One expert is plain LoRA, and its router does nothing."""
    top_k: int = 2
    """Experts a token uses, where the router is "top_k"."""
    top_p: float = 0.8
    """Probability that a token's experts sum to at least, where it is "top_p"."""
    balance: float = 1e-2
    """Weight of the balance loss, which is top_k when experts are used alike."""
    maps: tuple[str, ...] = MAPS
    """Linear maps that gain adapters, by patterns (`jmem.nn.maps`): "q" means every map
    whose path ends so. Those of "mlp" gain experts. The default: those a block has."""
    adamw: AdamW = AdamW(learning_rate=2e-4, weight_decay=0.01, max_grad_norm=0.0)
    """Also its schedule. Of several mixtures b1, b2, eps and moment_dtype are one."""

    def __post_init__(self):
        for name in ("rank", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Mixture: {name}={getattr(self, name)}; need >= 1.")
        if self.top_k > self.experts:
            raise ValueError(
                f"Mixture: top_k={self.top_k} exceeds experts={self.experts}; a token "
                "uses each expert once at most. Lower top_k, or add experts."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"Mixture: top_p={self.top_p} must be above 0 and at most 1, which "
                "uses every expert."
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"Mixture: alpha={self.alpha} must be positive, finite.")
        if not 0 <= self.balance < math.inf:
            raise ValueError(
                f"Mixture: balance={self.balance} must be finite and not negative."
            )
        check_maps("Mixture", self.maps)
        if set(self.maps) <= set(MAPS) - set(HIDDEN):
            raise ValueError(
                f"Mixture: maps={self.maps} names none of the MLP's maps {HIDDEN}, so "
                "there are no experts. Use Lora for adapters of attention alone."
            )
        if self.adamw.moment_dtype == "float8" or self.adamw.layer_decay != 1:
            raise ValueError(
                f"Mixture: adamw.moment_dtype={self.adamw.moment_dtype!r} and "
                f"layer_decay={self.adamw.layer_decay}: mixtures keep moments in "
                "'float32' or 'bfloat16', and one rate for all layers."
            )

    @property
    def scale(self) -> float:
        return find_scale(self.alpha, self.rank, self.rslora)


def max_grad_norm(mixtures: tuple[Mixture, ...]) -> float:
    """The largest of the mixtures'; 0 where none is clipped."""
    return max(m.adamw.max_grad_norm for m in mixtures)


def check_settings(mixlora: Any) -> None:
    """All of a `MixLora`."""
    if not mixlora.mixtures:
        raise ValueError("MixLora: mixtures=() is empty; give at least one.")
    check_choice("MixLora", "router", mixlora.router, Router)
    check_choice("MixLora", "over", mixlora.over, Balance)
    for name in ("jitter", "dropout"):
        if not 0 <= getattr(mixlora, name) < 1:
            raise ValueError(
                f"MixLora: {name}={getattr(mixlora, name)} must be at least 0 and "
                "below 1."
            )
    first = mixlora.mixtures[0]
    for number, other in enumerate(mixlora.mixtures):
        if other.maps != first.maps:
            raise ValueError(
                f"MixLora: mixtures[{number}].maps={other.maps} and mixtures[0]."
                f"maps={first.maps}; mixtures trained together adapt the same maps."
            )
        for name in ("b1", "b2", "eps", "moment_dtype"):
            own, one = (getattr(m.adamw, name) for m in (other, first))
            if own != one:
                raise ValueError(
                    f"MixLora: mixtures[{number}].adamw.{name}={own!r} and "
                    f"mixtures[0].adamw.{name}={one!r}; mixtures trained together "
                    "share it. Rates, decays, schedules and clipping may differ."
                )
    check_update(
        "MixLora", mixlora.update, max_grad_norm(mixlora.mixtures), mixlora.accumulate
    )
