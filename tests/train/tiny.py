"""The smallest thing the loop can train, with every kind of leaf a method may have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmem.data.batch import Batch
from jmem.train import loop

VOCAB, WIDTH = 23, 8
STEPS = 120  # until its rate is zero


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Logits of the next token from the current one."""

    def init(self, key):
        table, head = jax.random.split(key)
        return {
            "embed": 0.3 * jax.random.normal(table, (VOCAB, WIDTH)),
            "head": 0.3 * jax.random.normal(head, (WIDTH, VOCAB)),
        }

    def loss(self, params, batch):
        logits = params["embed"][batch.tokens] @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """AdamW whose step draws noise and an `active` pair, as LISA does."""

    lr: float = 1e-2
    period: int = 7

    def init(self, model, params, stats, key):
        return {
            "step": jnp.int32(0),
            "params": params,
            "stats": stats,
            "optimizer": optax.adamw(self.lr).init(params),
            "key": key,  # typed: saved as its words
            "slots": jnp.zeros(
                (0, WIDTH)
            ),  # nothing: what LISA has with no active layer
            "average": jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
            "rate": jnp.asarray(1.0),  # weakly typed
        }

    def step(self, model, state, batch):
        loss, gradients = jax.value_and_grad(model.loss)(state["params"], batch)
        draw = jax.random.fold_in(state["key"], state["step"] // self.period)
        active = jax.random.bits(draw, (2,)) % 12
        lr = self.lr * (1 - state["step"] / STEPS)
        updates, optimizer = optax.adamw(lr).update(
            gradients, state["optimizer"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        average = jax.tree.map(
            lambda a, p: (0.9 * a + 0.1 * p).astype(a.dtype), state["average"], params
        )
        new = {"params": params, "optimizer": optimizer, "average": average}
        metrics = {
            "active": active.astype(jnp.int32),
            "grad_norm": optax.tree.norm(gradients),
            "loss": loss,
            "lr": lr,
        }
        return {**state, **new, "step": state["step"] + 1}, metrics

    def merged(self, state):
        return state["params"], state["stats"]

    def labels(self, state):
        return {"weights": "params", "optimizer": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Walk:
    """Random walks over the vocabulary: something a bigram model can learn."""

    seed: int = 0
    shape: tuple[int, int] = (4, 16)

    @property
    def digest(self):
        return f"walk-{self.seed}-{self.shape}"

    def batch(self, step):
        draws = np.random.default_rng([self.seed, step])
        length = self.shape[1] + 1
        moves = draws.integers(1, 3, (self.shape[0], length)).cumsum(axis=1)
        walk = (moves % VOCAB).astype(np.int32)
        weights = np.ones(self.shape, np.float32)
        return Batch(walk[:, :-1], walk[:, 1:], weights)


def run(folder, *, finetuner=None, data=None, **settings):
    """Train `Tiny` in `folder`; settings go to `loop.train`."""
    model, finetuner = Bigram(), finetuner or Tiny()
    state = finetuner.init(model, model.init(jax.random.key(1)), {}, jax.random.key(2))
    settings = {"steps": 12, "progress": False} | settings
    return loop.train(
        finetuner,
        model,
        state,
        data or Walk(),
        folder=folder,
        evaluate=lambda state, batch: model.loss(state["params"], batch),
        **settings,
    )
