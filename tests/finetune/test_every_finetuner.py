"""Promises of every finetuner; a new method joins by being listed."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from donation import count_aliased_bytes
from tiny_decoder import TINY

from jmem.finetune.family import FINETUNERS
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.nn import quantised
from jmem.targets import resolve

MERGING = {name: member for name, member in FINETUNERS.items() if member.merges}
every = pytest.mark.parametrize("name", FINETUNERS)
every_merging = pytest.mark.parametrize("name", MERGING)


@pytest.fixture
def tiny_config(tiny_config):
    """Its maps' rows are whole blocks of NF4."""
    return dataclasses.replace(tiny_config, hidden=64, head_dim=16)


@pytest.fixture(scope="module")
def initial_params():
    config = dataclasses.replace(TINY, hidden=64, head_dim=16)
    return jax.jit(Decoder(config).init)(jax.random.key(0))


@functools.cache
def compiled(finetuner, model):
    """Its `init`, its step's program and executable: compiled once for all tests."""

    @jax.jit
    def init(params):
        params = jax.tree.map(jnp.copy, params)
        return finetuner.init(model, params, {}, jax.random.key(1))

    program = step_program(finetuner, model, batch_size=2, seq_len=10)
    with kept.apart():  # a program that comes from there has no plan
        return init, program, program.compile()


@functools.cache
def merge(finetuner):
    return jax.jit(finetuner.merged)


@functools.partial(jax.jit, static_argnums=1)
def round_to_blocks(params, kind):
    """The values that a base of few bits has."""
    return quantised.unpack(quantised.pack(params, kind), jnp.float32)


def count_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def loss(model, params, batch):
    return next_token_loss(model, params, batch)


@pytest.fixture
def finetuner(name):
    return FINETUNERS[name].finetuner


@pytest.fixture
def start(finetuner, tiny, initial_params):
    """A new state from copied parameters, and its step, an executable that takes it."""
    init, _, step = compiled(finetuner, tiny)
    return lambda: (init(initial_params), step)


@every_merging
class TestEveryThatMerges:
    def test_a_new_state_is_the_model_it_came_from(self, finetuner, start, tiny_params):
        """Over a base in four bits, that of its values."""
        state, _ = start()
        kinds = {"nf4": "NF4", "nf4-double": "NF4_DOUBLE"}
        if kind := kinds.get(getattr(finetuner, "base", "")):
            tiny_params = round_to_blocks(tiny_params, kind)
        params, stats = merge(finetuner)(state)
        chex.assert_trees_all_equal(params, tiny_params)
        assert stats == {}
        assert state["step"] == 0

    def test_merged_weights_have_the_loss_of_the_state(
        self, finetuner, start, tiny, random_batch
    ):
        state, step = start()
        for seed in range(3):
            state, _ = step(state, random_batch(tiny, seed))
        batch = random_batch(tiny, 9)
        merged = loss(tiny, merge(finetuner)(state)[0], batch)
        np.testing.assert_allclose(step(state, batch)[1]["loss"], merged, rtol=1e-5)


@every
class TestEveryFinetuner:
    def test_learns_a_batch_by_heart_in_one_program(
        self, finetuner, start, tiny, random_batch
    ):
        """Its state keeps shapes and dtypes: an executable refuses any other."""
        state, step = start()
        batch, losses = random_batch(tiny), []
        for _ in range(20):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 0.01
        assert state["step"] == 20
        program = compiled(finetuner, tiny)[1]
        chex.assert_trees_all_equal_shapes_and_dtypes(state, program.args[0])

    def test_metrics_are_what_the_loop_logs(self, name, start, tiny, random_batch):
        state, step = start()
        _, metrics = step(state, random_batch(tiny))
        assert {"loss", "lr", "grad_norm"} <= metrics.keys()
        np.testing.assert_allclose(metrics["lr"], FINETUNERS[name].adamw.learning_rate)

    def test_labels_cover_the_state_but_counters(self, finetuner, tiny):
        program = step_program(finetuner, tiny, batch_size=2, seq_len=8)
        labels = zip(program.label_leaves(), program.list_leaves(), strict=True)
        unlabelled = {path for label, (_, path, _) in labels if label is None}
        assert unlabelled <= {"step", "key", "steps", "active"}  # counters, switches

    def test_state_is_updated_in_place(self, finetuner, tiny):
        _, program, step = compiled(finetuner, tiny)
        held = count_bytes(program.args[0])
        assert step.memory_analysis().alias_size_in_bytes == held

    def test_state_in_bfloat16_keeps_its_dtypes_and_is_updated_in_place(
        self, finetuner, tiny_config
    ):
        """As float32, compiled above, does what it is told as it is lowered."""
        model = Decoder(tiny_config, dtype=jnp.bfloat16)
        program = step_program(finetuner, model, batch_size=2, seq_len=10)
        lowered = program.lower()
        state, _ = lowered.stage.out_info
        chex.assert_trees_all_equal_shapes_and_dtypes(state, program.args[0])
        assert count_aliased_bytes(lowered) == count_bytes(state)

    def test_moments_are_float32_beside_bfloat16_weights(
        self, name, finetuner, tiny_config
    ):
        model = Decoder(tiny_config, dtype=jnp.bfloat16)
        state = step_program(finetuner, model, batch_size=1, seq_len=4).args[0]
        moments = [
            leaf
            for name in ("optimizer", "outside", "blocks", "moments")
            for leaf in jax.tree.leaves(state.get(name, ()))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        assert bool(moments) is FINETUNERS[name].moments
        assert {str(leaf.dtype) for leaf in moments} <= {"float32"}

    def test_is_deterministic(self, start, tiny, random_batch):
        def final():
            state, step = start()
            for seed in range(4):
                state, _ = step(state, random_batch(tiny, seed))
            return state

        chex.assert_trees_all_equal(final(), final())


@pytest.mark.compat
def test_lisa_needs_less_than_full_and_temporaries_do_not_hold_all_gradients():
    """The claim at a shape where blocks outweigh tables, compiled for an H200."""
    from jmem.models import zoo

    config = dataclasses.replace(zoo.get("tinyllama-1.1b"), vocab_size=2048)
    model = Decoder(config, attention="cudnn", dtype=jnp.bfloat16)

    def plan(finetuner):
        program = step_program(finetuner, model, batch_size=1, seq_len=512)
        return program.compile(resolve("h200")).memory_analysis()

    full, lisa = plan(Full()), plan(Lisa(active_layers=2))
    weights = 2 * config.parameters
    assert full.temp_size_in_bytes > weights  # all gradients
    assert lisa.temp_size_in_bytes < weights / 2
    assert lisa.total_allocation_bytes < full.total_allocation_bytes / 3


def test_what_does_not_merge_says_so(initial_params, tiny):
    for name in FINETUNERS.keys() - MERGING.keys():
        finetuner = FINETUNERS[name].finetuner
        with pytest.raises(ValueError, match="cannot be merged"):
            finetuner.merged(compiled(finetuner, tiny)[0](initial_params))


@every
def test_statistics_are_carried_or_refused(name, tiny, initial_params):
    member, stats = FINETUNERS[name], {"mean": jnp.zeros(3)}

    def init(params):
        return member.finetuner.init(tiny, params, stats, jax.random.key(0))

    if member.statistics:
        assert jax.eval_shape(init, initial_params)["stats"].keys() == {"mean"}
    else:
        with pytest.raises(ValueError, match="keeps statistics or draws noise"):
            jax.eval_shape(init, initial_params)
