"""Every fine-tuner by name, in a small setting, and what it can do.

Tests, experiments and checks read this one list: a new method gets the family's tests
and its row in every comparison by being entered here.

>>> from jmem.finetune.adamw import AdamW
>>> FINETUNERS["lora"].at(AdamW(learning_rate=1e-3)).adamw.learning_rate
0.001
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
    """Whether it keeps AdamW's moments, or those of rows and columns."""

    @property
    def adamw(self) -> Any:
        """What says its rates: its `AdamW`; without one, the fine-tuner itself."""
        own = self.finetuner
        if isinstance(own, MixLora):
            return own.mixtures[0].adamw
        return getattr(own, "adamw", own)

    def at(self, adamw: AdamW) -> Any:
        """The fine-tuner with another optimizer; one that has its own as it is."""
        own = self.finetuner
        if isinstance(own, MixLora):
            mixtures = (dataclasses.replace(m, adamw=adamw) for m in own.mixtures)
            return dataclasses.replace(own, mixtures=tuple(mixtures))
        if isinstance(own, Lomo) or not hasattr(own, "adamw"):
            return own
        return dataclasses.replace(own, adamw=adamw)


FINETUNERS: Mapping[str, Member] = {
    "full": Member(Full(adamw=_ADAMW), statistics=True),
    "lora": Member(Lora(rank=2, adamw=_ADAMW), statistics=True),
    "lora-fused": Member(
        Lora(rank=3, alpha=1.0, maps=("v", "up"), adamw=_UNCLIPPED),
        statistics=True,
    ),
    "dora": Member(Lora(rank=2, dora=True, adamw=_ADAMW), statistics=True),
    "qlora": Member(Lora(rank=2, base="nf4", adamw=_ADAMW), statistics=True),
    "qlora-double": Member(
        Lora(rank=2, base="nf4-double", dora=True, adamw=_ADAMW), statistics=True
    ),
    "mixlora": Member(
        MixLora(mixtures=(Mixture(rank=4, experts=4, adamw=_UNCLIPPED),), dropout=0.0),
        merges=False,
    ),
    "lisa": Member(dataclasses.replace(_LISA, adamw=_UNCLIPPED)),
    "lisa-separate": Member(dataclasses.replace(_LISA, update="separate")),
    "lisa-persist": Member(
        dataclasses.replace(_LISA, active_layers=1, moments="persist")
    ),
    "lisa-host": Member(
        dataclasses.replace(_LISA, moments="persist", persist_in="host")
    ),
    "lisa-outside-host": Member(
        dataclasses.replace(_LISA, outside_moments="host", adamw=_UNCLIPPED)
    ),
    "lisa-outside-factored": Member(
        dataclasses.replace(_LISA, outside_moments="factored", adamw=_UNCLIPPED)
    ),
    "badam": Member(
        dataclasses.replace(
            _LISA, active_layers=1, train=("blocks",), order="reshuffled"
        )
    ),
    "embedding": Member(dataclasses.replace(_LISA, active_layers=0)),
    "lomo": Member(Lomo(variant="lomo", learning_rate=1.0), moments=False),
    "adalomo": Member(Lomo(learning_rate=3e-2)),
}
