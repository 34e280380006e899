"""Settings and the training of one method, for experiments that compare several."""

import dataclasses
import gc
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from jax.sharding import Mesh

from experiments.harness.exports import Dtype, Exports
from experiments.harness.run import Run
from experiments.harness.settings import Card, Here, Weights, need
from jmem.checkpoints import Checkpoint, CheckpointError
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
    export: Literal[Dtype, "none"] = "stored"
    """Dtype in which `tuned/` has the weights of methods that move a model's own, as a
    Hugging Face folder: the checkpoint's on disk, or another. Of the others it has the
    adapters, as they are. "none": the run leaves no `tuned/`."""

    def __post_init__(self):
        need(self, "steps", "batch_size", "seq_len", least=1)
        need(self, "factors", above=0, below=math.inf)
        need(self, "seeds", least=0, some=True)

    @property
    def size(self) -> str:
        """The size of a batch, in words."""
        return f"{self.batch_size} x {self.seq_len} tokens"

    def plan_exports(
        self,
        run: Run,
        model: Decoder,
        checkpoint: Checkpoint,
        finetuners: Mapping[Any, Any],
    ) -> None:
        """What `learn` is to leave in `tuned/`: refused now, if it cannot, or told.

        Raises:
          CheckpointError: a method has no form that other programs open.
          FolderError: the disk has no room for it.
        """
        if self.export == "none":
            return
        given = run.slug, run.place / "tuned", finetuners, model, checkpoint
        exports = Exports(*given, self.export)
        told = exports.plan(
            room=run.place.parent,
            trials=max(len(self.factors), 1),
            way_out="; --export none leaves it out",
        )
        run.console.print(told, highlight=False)
        run.exports = dataclasses.replace(exports, folder=run.folder / "tuned")


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
    evaluate_every: int = 0,
    export: bool = True,
    **more: Any,
) -> Any:
    """The state after `steps` updates of a copy of the pretrained weights.

    A run that is resumed goes on with what `folder` holds. Where it is evaluated in
    between, the best state is kept beside the last one. With `export` what was tuned
    goes into the run's `tuned/`, under the folder's name. `more` as
    `jmem.train.loop.train` takes it.

    Raises:
      CheckpointError: what was tuned cannot be written; its state is kept.
    """
    gc.collect()  # the state of the method before
    state = train(
        finetuner,
        model,
        init_state(finetuner, model, pretrained, seed=seed, mesh=mesh),
        data,
        steps=steps,
        folder=folder,
        keep=1,
        keep_best=evaluate_every > 0,
        evaluate_every=evaluate_every,
        resume=run.resume,
        trace_steps=2 if run.trace else 0,
        **more,
    )
    if export and run.exports is not None:
        try:
            run.exports.write(folder.name, finetuner, state, steps=steps, seed=seed)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\nNothing that was trained is lost: it is in "
                f"{folder / 'checkpoints'}, and --resume {run.folder} goes on from it."
            ) from error
    return state
