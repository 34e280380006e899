"""What only eight devices can show; `test_sharding` runs this file by itself.

Prints one JSON object: what every check found. XLA makes eight devices of one CPU where
XLA_FLAGS says so before JAX starts, which is not set here: pytest imports this file.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import tempfile
import traceback

import jax
import numpy as np
from tiny_decoder import TINY, random_params

from jmem.data.batch import Batch
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder
from jmem.nn import packed
from jmem.program import by_key
from jmem.sharding import Layout
from jmem.train.checkpoint import Checkpoints, abstract
from jmem.train.loop import train
from jmem.train.step import choose_placement, compile_step

STEPS, BATCH, LENGTH = 3, 8, 6
CONFIG = dataclasses.replace(TINY, kv_heads=4, layers=3)
TIED = dataclasses.replace(CONFIG, tied=True, qkv_bias=True)
CLIPPED = AdamW(learning_rate=3e-3)
ADAMW = AdamW(learning_rate=3e-3, max_grad_norm=0)
LISA = Lisa(active_layers=2, period=2, adamw=ADAMW)
CASES = {
    "full": (Full(adamw=CLIPPED), CONFIG, ("4x2",)),
    "lora": (Lora(rank=2, adamw=CLIPPED), CONFIG, ("2x4",)),
    "lisa": (LISA, CONFIG, ("8x1", "2x4")),
    "lisa tied, packed": (LISA, TIED, ("4x2",)),
}


def layout_of(name: str) -> Layout:
    fsdp, tensor = map(int, name.split("x"))
    return Layout(fsdp=fsdp, tensor=tensor)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random batches by number."""

    packed: bool = False
    """With two documents a row, of other lengths in every row."""
    digest = "random"

    def batch(self, step: int) -> Batch:
        random = np.random.default_rng(step)
        tokens = random.integers(0, 48, (BATCH, LENGTH + 1)).astype(np.int32)
        weights = (random.random((BATCH, LENGTH)) < 0.8).astype(np.float32)
        second = np.arange(LENGTH) >= random.integers(1, LENGTH, (BATCH, 1))
        segments = 1 + second.astype(np.int32) if self.packed else None
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments)


@functools.cache
def beginning(finetuner, config):
    """A state on one device."""
    params = random_params(config, scale=0.1)
    model = Decoder(config)

    @jax.jit
    def init(params):
        return finetuner.init(model, params, {}, jax.random.key(1))

    return jax.device_get(init(params))


def start(finetuner, model):
    """The same state on whatever `model` is divided over."""
    state = beginning(finetuner, model.config)
    if model.layout is None:
        return jax.device_put(state, jax.devices()[0])
    return jax.device_put(state, model.layout.shardings(state, model.layout.mesh()))


@functools.cache
def trained(finetuner, model):
    """State and losses after STEPS updates."""
    state, losses = start(finetuner, model), []
    data = Batches(packed=model.config.tied)
    place = choose_placement(model, state)
    # The step that `train` runs: compiled once for both, by JAX's cache.
    step, _ = compile_step(finetuner, model, state, place(data.batch(0)))
    for number in range(STEPS):
        state, metrics = step(state, place(data.batch(number)))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def difference(finetuner, config, layout) -> float:
    """Of states and losses, on a mesh and on one device: the largest."""
    one, one_losses = trained(finetuner, Decoder(config))
    many, many_losses = trained(finetuner, Decoder(config, layout=layout))
    found = [np.max(np.abs(np.subtract(one_losses, many_losses)))]
    for name, leaf in by_key(one).items():
        found.append(np.max(np.abs(leaf.astype(np.float64) - by_key(many)[name])))
    return float(max(found))


def held_bytes() -> list[int]:
    """Bytes of a whole state, and of those that one device of eight holds."""
    leaves = jax.tree.leaves(start(LISA, Decoder(CONFIG, layout=Layout(fsdp=8))))
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return [sum(leaf.nbytes for leaf in leaves), own]


def resumed() -> dict[str, bool]:
    """A run on (8, 1), stopped half way and continued elsewhere."""

    def run(model, folder, steps, **settings):
        return train(
            *(LISA, model, start(LISA, model), Batches()),
            **{"steps": steps, "folder": folder, "progress": False, **settings},
        )

    found = {}
    whole, _ = trained(LISA, Decoder(CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        first = pathlib.Path(folder, "first")
        held_out = [Batches().batch(100)]
        half = run(Decoder(CONFIG, layout=Layout(fsdp=8)), first, 2, held_out=held_out)
        half = jax.device_get(half)
        for name, layout in {"2x4": layout_of("2x4"), "one device": None}.items():
            model, where = Decoder(CONFIG, layout=layout), pathlib.Path(folder, name)
            shutil.copytree(first, where)
            like = abstract(start(LISA, model))
            _, back = Checkpoints(where / "checkpoints").restore(like, data="random")
            done = run(model, where, 3, resume=True)
            promises = {
                "has the bits": (lambda a, b: (a == b).all(), half, back),
                "is placed": (lambda a, b: a.sharding == b.sharding, back, like),
                "goes on": (lambda a, b: np.allclose(a, b, atol=1e-5), whole, done),
            }
            for promise, (holds, *trees) in promises.items():
                kept = jax.tree.leaves(jax.tree.map(holds, *trees))
                found[f"{name} {promise}"] = bool(np.all(kept))
    return found


def refused() -> dict[str, str]:
    """What is answered where the mesh does not fit."""
    model = Decoder(CONFIG, layout=Layout(fsdp=8))

    def too_many():
        Layout(fsdp=4, tensor=4).mesh()

    def unplaced():
        with tempfile.TemporaryDirectory() as folder:
            state = start(LISA, Decoder(CONFIG))
            train(LISA, model, state, Batches(), steps=1, folder=folder)

    def parts():
        trained(Full(adamw=CLIPPED, accumulate=2), model)

    found = {}
    for refusal in (too_many, unplaced, parts):
        try:
            refusal()
        except ValueError as error:
            found[refusal.__name__] = str(error)
    return found


def live() -> list[str]:
    """Placements of arrays that a program makes for itself, and runs on."""
    model = Decoder(CONFIG, layout=Layout(fsdp=4, tensor=2))
    program = step_program(LISA, model, batch_size=BATCH, seq_len=LENGTH)
    assert program.make is not None
    state, batch = program.make(jax.random.key(0))
    state, _ = program.compile()(state, batch)
    kernel = state["params"]["blocks"]["mlp"]["down"]["kernel"]
    return [str(batch.tokens.sharding.spec), str(kernel.sharding.spec)]


def checks():
    yield "held bytes", held_bytes
    yield "refused", refused
    yield "live", live
    for name, (finetuner, config, meshes) in CASES.items():
        for mesh in meshes:
            given = finetuner, config, layout_of(mesh)
            yield f"{name} {mesh}", functools.partial(difference, *given)
    yield "resumed", resumed


def main() -> None:
    packed.BLOCK = 4  # two a row
    found = {}
    for name, check in checks():
        try:
            found[name] = check()
        except Exception:
            found[name] = traceback.format_exc()
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
