"""A training step, or its forward half, as a `Program`: what is measured runs."""

import jax
import jax.numpy as jnp

from jmem.data.batch import Batch
from jmem.offload import described
from jmem.program import Program
from jmem.train.loss import next_token_loss


def _batch(model, key: jax.Array, batch_size: int, seq_len: int) -> Batch:
    """Random tokens, every one of them a target."""
    shape = (batch_size, seq_len + 1)
    tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
    weights = jnp.ones((batch_size, seq_len), jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def loss_program(model, *, batch_size: int, seq_len: int) -> Program:
    """The loss of [batch_size, seq_len] tokens, as evaluation computes it.

    `make(key)` gives random parameters and tokens for a live run.
    """

    def make(key):
        return model.init(key), _batch(model, key, batch_size, seq_len)

    def forward(params, batch):
        return next_token_loss(model, params, batch)

    args = jax.eval_shape(make, jax.random.key(0))
    labels = {"weights": (0, ""), "batch": (1, "")}
    return Program(forward, args, labels=labels, make=make)


def step_program(finetuner, model, *, batch_size: int, seq_len: int) -> Program:
    """One donated training step on [batch_size, seq_len] tokens; nothing is allocated.

    `make(key)` gives random parameters and tokens for a live run.
    """

    def init(key):
        return finetuner.init(model, model.init(key), key)

    def make(key):
        return init(key), _batch(model, key, batch_size, seq_len)

    def step(state, batch):
        return finetuner.step(model, state, batch)

    args = described(make, jax.random.key(0))
    labels = {
        name: [(0, prefix) for prefix in ([where] if isinstance(where, str) else where)]
        for name, where in finetuner.labels(args[0]).items()
    }
    return Program(
        step, args, donate=(0,), labels=labels | {"batch": (1, "")}, make=make
    )
