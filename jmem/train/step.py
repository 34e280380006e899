"""The step that a run repeats: where its batch goes, its one compilation, its plan."""

from collections.abc import Callable
from typing import Any

import jax

from jmem.lowering import run_in_place
from jmem.memory.measure import hash_stablehlo
from jmem.models.contract import Batch
from jmem.nn.stack import choose_options
from jmem.program import by_key
from jmem.sharding import find_layout
from jmem.train.checkpoint import find_difference
from jmem.train.errors import TrainingError


def choose_placement(model, state) -> Callable[[Batch], Batch]:
    """What puts a batch where `state` is: onto its mesh, if the model has a layout."""
    if (layout := find_layout(model)) is None:
        return lambda batch: batch
    wanted = dict(layout.described.shape)
    meshes = {
        name: getattr(leaf.sharding, "mesh", None)
        for name, leaf in by_key(state).items()
    }
    for name, mesh in meshes.items():
        if mesh is None or dict(mesh.shape) != wanted:
            raise TrainingError(
                f"train: the model has {layout}, and leaf {name!r} of the state is on "
                f"{'no mesh' if mesh is None else dict(mesh.shape)}.\n"
                "Place it: jax.device_put(state, layout.shardings(state, "
                "layout.mesh()))."
            )
    mesh = meshes["step"]
    return lambda batch: jax.device_put(batch, layout.batch_shardings(batch, mesh))


def compile_step(finetuner, model, state, batch) -> tuple[jax.stages.Compiled, str]:
    """`finetuner.step` for this model, state donated: an executable, not a jit.

    Also the hash of what it was compiled from (`jmem.memory.measure.hash_stablehlo`).
    Lowered for the arrays themselves: of a description JAX (0.12) forgets host memory.
    """

    def train_step(state, batch):
        return finetuner.step(model, state, batch)

    placed: dict[str, Any] = {}
    if find_layout(model) is not None:  # else XLA chooses, perhaps another placement
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        placed = {"out_shardings": (shardings, None)}
    jitted = jax.jit(train_step, donate_argnums=0, keep_unused=True, **placed)
    lowered = jitted.lower(state, batch)
    following, metrics = lowered.out_info
    if changed := find_difference(state, following):
        name, before, after = changed
        raise TrainingError(
            f"{type(finetuner).__name__}.step: leaf {name!r} of the state is {before} "
            f"and comes back {after}.\n"
            "A step returns the state's own shapes and dtypes, so that it can be "
            "donated."
        )
    if "loss" not in metrics:
        raise TrainingError(
            f"{type(finetuner).__name__}.step: metrics={sorted(metrics)} lack 'loss'."
        )

    def compile_with(options):
        return lowered.compile(compiler_options=options)

    step = run_in_place(compile_with, choose_options(state))
    return step, hash_stablehlo(lowered.as_text())


def describe_plan(step: jax.stages.Compiled, program: str) -> dict[str, Any]:
    """Bytes of XLA's buffer assignment for the step that runs, and its hash."""
    analysis: Any = step.memory_analysis()
    return {
        "bytes": analysis.total_allocation_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "host_bytes": analysis.host_argument_size_in_bytes
        + analysis.host_temp_size_in_bytes,
        "device": jax.devices()[0].device_kind,
        "program": program,
    }


def check_batch(batch: Batch, first: Batch, number: int, what: str = "data") -> None:
    """Refuses a batch of other shapes or dtypes than the first; `number` is its own.

    Raises:
      TrainingError: names the array that differs, and `what` the batches are.
    """
    if changed := find_difference(first, batch):
        name, before, after = changed
        raise TrainingError(
            f"{what}: {name} of batch {number} is {after}, and the first one's is "
            f"{before}.\nA step is compiled for one shape: pad or pack every batch to "
            "it."
        )
