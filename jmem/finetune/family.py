"""Every fine-tuner by name, in a small setting, and what it can do.

Tests, experiments and checks read this one list: a new method gets the family's tests
and its row in every comparison by being entered here.

>>> FINETUNERS["lora"].adamw.learning_rate
0.003
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture

_ADAMW = AdamW(learning_rate=3e-3)
_UNCLIPPED = dataclasses.replace(_ADAMW, max_grad_norm=0.0)
_LISA = Lisa(active_layers=2, period=2, adamw=_ADAMW)


@dataclasses.dataclass(frozen=True)
class Member:
    """A fine-tuner of the family."""

    finetuner: Any
    """A `jmem.train.finetuner.Finetuner`, of a size for small models."""
    merges: bool = True
    """Whether what it trained is weights of the plain model (`merged`)."""
    statistics: bool = False
    """Whether it goes through the model's own loss and carries its statistics; the
    others walk the blocks of a decoder by hand, and refuse a model that has any."""
    moments: bool = True
    """Whether the optimizer has floating state: moments, momentum, sums of squares."""

    @property
    def adamw(self) -> Any:
        """What says its rates: its `AdamW`; without one, the fine-tuner itself."""
        own = self.finetuner
        if isinstance(own, MixLora):
            return own.mixtures[0].adamw
        return getattr(own, "adamw", own)


def _lora(**settings: Any) -> Member:
    return Member(Lora(**({"rank": 2, "adamw": _ADAMW} | settings)), statistics=True)


def _lisa(**settings: Any) -> Member:
    return Member(dataclasses.replace(_LISA, **settings))


FINETUNERS: Mapping[str, Member] = {
    "full": Member(Full(adamw=_ADAMW), statistics=True),
    "lora": _lora(),
    "lora-fused": _lora(rank=3, alpha=1.0, maps=("v", "up"), adamw=_UNCLIPPED),
    "dora": _lora(dora=True),
    "qlora": _lora(base="nf4"),
    "qlora-double": _lora(base="nf4-double", dora=True),
    "mixlora": Member(
        MixLora(mixtures=(Mixture(rank=4, experts=4, adamw=_UNCLIPPED),), dropout=0.0),
        merges=False,
    ),
    "lisa": _lisa(adamw=_UNCLIPPED),
    "lisa-separate": _lisa(update="separate"),
    "lisa-persist": _lisa(active_layers=1, moments="persist"),
    "lisa-host": _lisa(moments="persist", persist_in="host"),
    "lisa-outside-host": _lisa(outside_moments="host", adamw=_UNCLIPPED),
    "lisa-outside-factored": _lisa(outside_moments="factored", adamw=_UNCLIPPED),
    "badam": _lisa(active_layers=1, train=("blocks",), order="reshuffled"),
    "embedding": _lisa(active_layers=0),
    "lomo": Member(Lomo(variant="lomo", learning_rate=1.0), moments=False),
    "adalomo": Member(Lomo(learning_rate=3e-2)),
}
