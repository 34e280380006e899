"""A toy experiment's settings and what it measured, for tests of the harness."""

import dataclasses
import json
import pathlib
from typing import Literal

type Schedule = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa:
    active_layers: int = 2
    """Blocks trained at a time."""
    weights: tuple[float, ...] = ()
    adam: Adam = Adam()

    def __post_init__(self):
        if self.active_layers < 0:
            raise ValueError(
                f"Lisa: active_layers={self.active_layers} must not be negative."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    lisa: Lisa = Lisa(active_layers=3)
    only: tuple[str, ...] = ()
    shape: tuple[int, int] = (1, 2)
    shuffle: bool = True
    data: pathlib.Path = pathlib.Path("data")
    note: str = ""
    chunk: int | None = 64
    schedule: Schedule | None = None
    gpu: str = "h200"


@dataclasses.dataclass
class Memory:
    """What a run and the pictures ask of a `jmem.MemoryReport`."""

    by_kind: dict
    usable_bytes: int = 20 * 2**30
    target: str = "toy"
    devices: int = 1
    host_bytes: int = 0
    compile_seconds: float = 1.5
    stablehlo_hash: str = "0123"

    @property
    def device_bytes(self):
        return sum(self.by_kind.values())

    def fits(self, reserve=2**30):
        return self.device_bytes <= self.usable_bytes - reserve

    def to_json(self):
        fields = ("interval", "argument_bytes", "by_label")
        more = {"device_bytes": self.device_bytes} | dict.fromkeys(fields)
        return json.dumps(dataclasses.asdict(self) | more)


def memories():
    gib = 2**30
    small = {"parameters": 4 * gib, "optimizer": 8 * gib, "batch": 1000}
    return {"lora": Memory(small), "full": Memory(small | {"gradients": 12 * gib})}
