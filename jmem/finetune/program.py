"""A training step, or its forward half, as a `Program`: what is measured runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jmem.data.batch
from jmem.models.contract import Batch
from jmem.nn.stack import choose_options
from jmem.offload import describe_results
from jmem.program import Label, Program
from jmem.sharding import find_layout


def draw_tokens(
    model: Any, batch_size: int, seq_len: int
) -> Callable[[jax.Array], jmem.data.batch.Batch]:
    """What makes a decoder's batch of random tokens, every one of them a target."""

    def make(key):
        shape = (batch_size, seq_len + 1)
        tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
        weights = jnp.ones((batch_size, seq_len), jnp.float32)
        return jmem.data.batch.Batch(tokens[:, :-1], tokens[:, 1:], weights)

    return make


def _make_batches(
    who: str,
    model: Any,
    batch: Any,
    batch_size: int | None,
    seq_len: int | None,
) -> Callable[[jax.Array], Batch]:
    """What makes the batch that is asked for, in either form."""
    if batch is not None and batch_size is None and seq_len is None:
        make: Any = batch if callable(batch) else lambda key: batch
        return make
    if batch is None and batch_size is not None and seq_len is not None:
        return draw_tokens(model, batch_size, seq_len)
    raise TypeError(
        f"{who}: batch={type(batch).__name__}, batch_size={batch_size}, seq_len="
        f"{seq_len}. Give a batch (arrays, or key -> batch), or, for a decoder's "
        "random tokens, both of the others."
    )


def _make_program(model, fn, make, *, returns_state: bool, **fields) -> Program:
    """A program of (what is divided as the model is ..., batch)."""
    args = describe_results(make, jax.random.key(0))
    if (layout := find_layout(model)) is None:
        return Program(fn, args, make=make, **fields)

    def shardings(mesh=None):
        *state, batch = args
        held = (layout.shardings(own, mesh) for own in state)
        return *held, layout.batch_shardings(batch, mesh)

    def make_placed(key):
        return jax.jit(make, out_shardings=shardings(layout.mesh()))(key)

    def describe(leaf, sharding):
        return leaf.update(sharding=sharding)

    placed = shardings()
    return Program(
        fn,
        jax.tree.map(describe, args, placed),
        out_shardings=(placed[0], None) if returns_state else None,
        make=make_placed,
        **fields,
    )


def loss_program(
    model: Any,
    *,
    batch: Any = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
) -> Program:
    """The loss of a batch, as evaluation computes it, with the statistics a model has.

    As `step_program`, of which it is the forward half.
    """
    batches = _make_batches("loss_program", model, batch, batch_size, seq_len)

    def make(key):
        return model.init(key), model.stats(), batches(key)

    def forward(params, stats, batch):
        return model.loss(params, stats, batch, None)[0]

    labels: dict[str, Any] = {"weights": (0, ""), "batch": (2, "")}
    if jax.tree.leaves(jax.eval_shape(model.stats)):
        labels["statistics"] = Label((1, ""), kind="state")
    return _make_program(model, forward, make, returns_state=False, labels=labels)


def step_program(
    finetuner: Any,
    model: Any,
    *,
    batch: Any = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
) -> Program:
    """One donated training step on a batch; nothing is allocated.

    The batch is one of arrays, or what makes one from a key. For a decoder,
    `batch_size` sequences of `seq_len` random tokens are given by their sizes.
    `make(key)` gives random parameters and the batch for a live run. A model with a
    layout gives a program over its mesh, whose state is divided and updated in place.

    Raises:
      LayoutError: the mesh does not divide the state, or the batch.
      TypeError: neither a batch nor both sizes are given.
    """
    batches = _make_batches("step_program", model, batch, batch_size, seq_len)

    def make(key):
        state = finetuner.init(model, model.init(key), model.stats(), key)
        return state, batches(key)

    def step(state, batch):
        return finetuner.step(model, state, batch)

    program = _make_program(model, step, make, returns_state=True, donate=(0,))
    labels: dict[str, Any] = {
        name: [(0, prefix) for prefix in ([where] if isinstance(where, str) else where)]
        for name, where in finetuner.labels(program.args[0]).items()
    }
    if "statistics" in labels:
        labels["statistics"] = Label(labels["statistics"], kind="state")
    labels |= {"batch": (1, "")}
    options = choose_options(program.args[0])
    return dataclasses.replace(program, labels=labels, options=options)
