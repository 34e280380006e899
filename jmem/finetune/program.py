"""A finetuner's training step as a `Program`: what is measured is what runs."""

import jax
import jax.numpy as jnp

from jmem.data.batch import Batch
from jmem.program import Program


def step_program(finetuner, model, *, batch_size: int, seq_len: int) -> Program:
    """One donated training step on [batch_size, seq_len] tokens; nothing is allocated.

    `make(key)` gives random parameters and tokens for a live run.
    """

    def init(key):
        return finetuner.init(model, model.init(key), key)

    def make(key):
        tokens = jax.random.randint(
            key, (batch_size, seq_len + 1), 0, model.config.vocab_size, jnp.int32
        )
        weights = jnp.ones((batch_size, seq_len), jnp.float32)
        return init(key), Batch(tokens[:, :-1], tokens[:, 1:], weights)

    def step(state, batch):
        return finetuner.step(model, state, batch)

    args = jax.eval_shape(make, jax.random.key(0))
    labels = {
        name: [(0, prefix) for prefix in ([where] if isinstance(where, str) else where)]
        for name, where in finetuner.labels(args[0]).items()
    }
    return Program(
        step, args, donate=(0,), labels=labels | {"batch": (1, "")}, make=make
    )
