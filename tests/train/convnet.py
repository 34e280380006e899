"""A small convolutional net with batch normalisation and noise, on drawn shapes.

python tests/train/convnet.py FOLDER [--resume]    train it; for tests that kill

It knows neither tokens nor blocks: parameters and statistics are what flax makes, and a
batch is images. `loop.train`, `Full` and `jmem.measure` take it as it is.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmem.data.batch import split_rows
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.models.contract import Aux
from jmem.train import loop

CLASSES, SIZE = 4, 8
STEPS, EVALUATE_EVERY, CHECKPOINT_EVERY = 60, 20, 10


class Images(NamedTuple):
    """A batch: [B, SIZE, SIZE, 1], and how much each counts."""

    pixels: jax.Array | np.ndarray
    classes: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray

    @property
    def unit(self):
        return "images"

    def count(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.pixels.shape[0]

    def weight(self):
        return jnp.sum(self.weights)

    def split(self, parts):
        return split_rows(self, parts, "images")


class Layers(nn.Module):
    @nn.compact
    def __call__(self, pixels, train):
        x = nn.Conv(8, (3, 3), name="first")(pixels)
        x = nn.BatchNorm(not train, momentum=0.8, name="normal")(x)
        x = nn.Conv(8, (3, 3), strides=2, name="second")(nn.relu(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x).mean(axis=(1, 2)))
        return nn.Dense(CLASSES, name="head")(x)


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """`jmem.models.contract.Model`: parameters, statistics, a pure loss."""

    needs_key = True

    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key):
        return Layers().init(key, jnp.zeros((1, SIZE, SIZE, 1)), False)

    def init(self, key):
        return self._init(key)["params"]

    def stats(self):
        return self._init(jax.random.key(0))["batch_stats"]

    def loss(self, params, stats, batch, key, ops=None):
        del ops
        variables = {"params": params, "batch_stats": stats}
        train, rngs = key is not None, {} if key is None else {"dropout": key}
        logits: Any
        logits, new = Layers().apply(
            variables, batch.pixels, train, rngs=rngs, mutable=["batch_stats"]
        )
        stats = new["batch_stats"] if train else stats
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.classes)
        right = jnp.argmax(logits, axis=-1) == batch.classes
        share = batch.weights / jnp.maximum(jnp.sum(batch.weights), 1.0)
        return jnp.sum(share * losses), Aux(stats, {"accuracy": jnp.sum(share * right)})


@dataclasses.dataclass(frozen=True)
class Bars:
    """Noisy images of horizontal, vertical, both or no stripes, drawn by number."""

    seed: int = 0
    size: int = 16

    @property
    def digest(self):
        return f"bars-{self.seed}-{self.size}"

    def batch(self, step):
        draws = np.random.default_rng([self.seed, step])
        classes = draws.integers(0, CLASSES, self.size)
        pixels = draws.normal(0.3, 0.3, (self.size, SIZE, SIZE, 1))
        pixels[:, ::2] += (classes % 2)[:, None, None, None]
        pixels[:, :, ::2] += (classes // 2)[:, None, None, None]
        weights = draws.integers(1, 3, self.size)
        return Images(
            pixels.astype(np.float32),
            classes.astype(np.int32),
            weights.astype(np.float32),
        )


FULL = Full(adamw=AdamW(learning_rate=1e-2), accumulate=2)


def start(finetuner=FULL):
    """A fresh state."""
    model = ConvNet()
    params = model.init(jax.random.key(1))
    return finetuner.init(model, params, model.stats(), jax.random.key(2))


def long_run(folder, *, resume=False):
    """The run that a test interrupts and repeats."""
    return loop.train(
        *(FULL, ConvNet(), start(), Bars()),
        steps=STEPS,
        folder=folder,
        held_out=[Bars(seed=9).batch(n) for n in range(2)],
        evaluate_every=EVALUATE_EVERY,
        checkpoint_every=CHECKPOINT_EVERY,
        resume=resume,
        progress=False,
    )


if __name__ == "__main__":
    long_run(pathlib.Path(sys.argv[1]), resume="--resume" in sys.argv)
