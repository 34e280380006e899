"""A training step, or its forward half, as a `Program`: what is measured runs."""

import dataclasses

import jax
import jax.numpy as jnp

from jmem.data.batch import Batch
from jmem.offload import described
from jmem.program import Program
from jmem.sharding import layout_of
from jmem.train.loss import next_token_loss


def _batch(model, key: jax.Array, batch_size: int, seq_len: int) -> Batch:
    """Random tokens, every one of them a target."""
    shape = (batch_size, seq_len + 1)
    tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
    weights = jnp.ones((batch_size, seq_len), jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def _program(model, fn, make, *, returns_state: bool, **fields) -> Program:
    """A program of (state, batch), divided as the model is."""
    args = described(make, jax.random.key(0))
    if (layout := layout_of(model)) is None:
        return Program(fn, args, make=make, **fields)

    def shardings(mesh=None):
        state, batch = args
        return layout.shardings(state, mesh), layout.batch_shardings(batch, mesh)

    def make_placed(key):
        return jax.jit(make, out_shardings=shardings(layout.mesh()))(key)

    def describe(leaf, sharding):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, weak_type=leaf.weak_type, sharding=sharding
        )

    placed = shardings()
    return Program(
        fn,
        jax.tree.map(describe, args, placed),
        out_shardings=(placed[0], None) if returns_state else None,
        make=make_placed,
        **fields,
    )


def loss_program(model, *, batch_size: int, seq_len: int) -> Program:
    """The loss of [batch_size, seq_len] tokens, as evaluation computes it.

    `make(key)` gives random parameters and tokens for a live run.
    """

    def make(key):
        return model.init(key), _batch(model, key, batch_size, seq_len)

    def forward(params, batch):
        return next_token_loss(model, params, batch)

    labels = {"weights": (0, ""), "batch": (1, "")}
    return _program(model, forward, make, returns_state=False, labels=labels)


def step_program(finetuner, model, *, batch_size: int, seq_len: int) -> Program:
    """One donated training step on [batch_size, seq_len] tokens; nothing is allocated.

    `make(key)` gives random parameters and tokens for a live run. A model with a layout
    gives a program over its mesh, whose state is divided and updated in place.

    Raises:
      LayoutError: the mesh does not divide the state, or the batch.
    """

    def init(key):
        return finetuner.init(model, model.init(key), key)

    def make(key):
        return init(key), _batch(model, key, batch_size, seq_len)

    def step(state, batch):
        return finetuner.step(model, state, batch)

    program = _program(model, step, make, returns_state=True, donate=(0,))
    labels = {
        name: [(0, prefix) for prefix in ([where] if isinstance(where, str) else where)]
        for name, where in finetuner.labels(program.args[0]).items()
    }
    return dataclasses.replace(program, labels=labels | {"batch": (1, "")})
