"""What experiments share that train several methods and compare them."""

import dataclasses
import gc
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from experiments.harness.report import Column, gib, loss, rate
from experiments.harness.run import Run
from experiments.harness.settings import Card, Here, Weights, need
from jmem.finetune.start import init_state
from jmem.models.decoder import Decoder
from jmem.nn.stack import Remat
from jmem.train import metrics
from jmem.train.loop import Data, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Here, Card, Weights):
    """Methods that are trained here, and whose step is compiled for `gpu`."""

    steps: int = 16
    """Updates a method."""
    batch_size: int = 1
    """Sequences an update."""
    seq_len: int = 512
    """Tokens a sequence."""
    remat: Remat = "block"
    """What is kept for the backward pass on `gpu`: all, matrix products, or block
    inputs only."""
    run_remat: Remat = "none"
    """As `remat`, in what is trained here."""
    factors: tuple[float, ...] = ()
    """Every method is tried at its own rate times each of these; the best one counts,
    and is run with each of `seeds`."""
    seeds: tuple[int, ...] = (0,)
    """Of the order of the batches, of adapters and of draws."""

    def __post_init__(self):
        need(self, "steps", "batch_size", "seq_len", least=1)
        need(self, "factors", above=0)
        need(self, "seeds", least=0, some=True)

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        return f"{self.batch_size} x {self.seq_len} tokens"


def learn(
    run: Run,
    finetuner: Any,
    model: Decoder,
    pretrained: dict,
    data: Data,
    *,
    folder: pathlib.Path,
    steps: int,
    seed: int,
    mesh: Mesh | None = None,
    **more: Any,
) -> Any:
    """The state after `steps` updates of a copy of the pretrained weights.

    A run that is resumed goes on with what `folder` holds. `more` as
    `jmem.train.loop.train` takes it.
    """
    gc.collect()  # the state of the method before
    return train(
        finetuner,
        model,
        init_state(finetuner, model, pretrained, seed=seed, mesh=mesh),
        data,
        steps=steps,
        folder=folder,
        keep=1,
        resume=run.resume,
        trace_steps=2 if run.trace else 0,
        **more,
    )


def tabulate_losses(
    run: Run,
    rows: Mapping[str, Sequence[metrics.Row]],
    rates: Mapping[str, float],
    *,
    seed: int,
) -> None:
    """A table of the loss before and after, and of what a step took here.

    `rows` are the metrics of every method, by name, with those of before the first
    update; `rates` the learning rates.
    """

    def line(method: str, own: Sequence[metrics.Row]) -> Iterator[Any]:
        held = [row["held_out_loss"] for row in own if "held_out_loss" in row]
        steps = [row for row in own if "loss" in row]
        timed = sorted(row["tokens_per_second"] for row in steps)
        yield from (method, held[0], held[-1], held[0] - held[-1])
        yield from (steps[-1]["loss"], len(steps), timed[len(timed) // 2])
        yield from (rates[method], seed)
        plan = json.loads((run.folder_of(method) / "plan.json").read_text())
        yield plan["bytes"]

    run.table(
        "Held-out loss",
        [
            "method",
            *(Column(n, loss) for n in ("before", "after", "gain", "train loss")),
            "steps",
            Column("tokens", rate),
            "rate",
            "seed",
            Column("memory here", gib),
        ],
        [tuple(line(method, own)) for method, own in rows.items()],
    )
