"""Settings and the training of one method, for experiments that compare several."""

import dataclasses
import gc
import math
import pathlib
from typing import Any

from jax.sharding import Mesh

from experiments.harness.run import Run
from experiments.harness.settings import Card, Here, Weights, need
from jmem.finetune.start import init_state
from jmem.models.decoder import Decoder
from jmem.nn.stack import Remat
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
        need(self, "factors", above=0, below=math.inf)
        need(self, "seeds", least=0, some=True)

    @property
    def size(self) -> str:
        """The size of a batch, in words."""
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
