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
from jmem.program import by_key
from jmem.targets import resolve

MERGING = {name: member for name, member in FINETUNERS.items() if member.merges}
KEEPING = ("lora-fused", "qlora-double", "lisa-outside-host", "badam", "adalomo")
"""Those that are told to keep zeros here: one for each way that weights move."""
every = pytest.mark.parametrize("name", FINETUNERS)
every_merging = pytest.mark.parametrize("name", MERGING)


@pytest.fixture
def tiny_config(tiny_config):
    """Its maps' rows are whole blocks of NF4."""
    return dataclasses.replace(tiny_config, hidden=64, head_dim=16)


@pytest.fixture(scope="module")
def initial_params():
    """A third of the blocks' maps is pruned."""
    config = dataclasses.replace(TINY, hidden=64, head_dim=16)
    params = jax.jit(Decoder(config).init)(jax.random.key(0))
    return params | {"blocks": prune_blocks(params["blocks"])}


def prune_blocks(blocks):
    random = np.random.default_rng(0)

    def leaf(own):
        return (
            own if own.ndim < 3 else jnp.where(random.random(own.shape) < 0.3, 0, own)
        )

    return jax.tree.map(leaf, blocks)


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
    own = FINETUNERS[name].finetuner
    return dataclasses.replace(own, keep_zeros=True) if name in KEEPING else own


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


class TestZeros:
    """Of the blocks' maps, where a fine-tuner keeps them."""

    @every_merging
    def test_stay_where_they_are_kept_and_nowhere_else(
        self, name, finetuner, start, tiny, random_batch
    ):
        state, step = start()
        before = find_kernels(merge(finetuner)(state)[0])
        for seed in range(3):
            state, _ = step(state, random_batch(tiny, seed))
        after = find_kernels(merge(finetuner)(state)[0])
        moved = {path: leaf != before[path] for path, leaf in after.items()}
        filled = {path: own & (before[path] == 0) for path, own in moved.items()}
        if name != "embedding":
            assert any(map(np.any, moved.values()))
            assert any(map(np.any, filled.values())) is (name not in KEEPING)

    @pytest.mark.parametrize("name", ["lisa-outside-host", "badam", "adalomo"])
    def test_are_not_counted_by_the_norm(
        self, finetuner, start, tiny, random_batch, gradients
    ):
        state, step = start()
        _, metrics = step(state, random_batch(tiny))
        norm = count_norm(gradients, metrics.get("active"), finetuner.train)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)

    @pytest.mark.parametrize("moments", ["device", "host"])
    def test_full_keeps_them_wherever_its_moments_are(
        self, moments, tiny, random_batch, initial_params, gradients
    ):
        adamw = FINETUNERS["full"].adamw
        full = Full(moments=moments, keep_zeros=True, adamw=adamw)
        init, _, step = compiled(full, tiny)
        state, metrics = step(init(initial_params), random_batch(tiny))
        norm = count_norm(gradients, None, ())
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        state, metrics = step(state, random_batch(tiny, 1))
        before, after = map(find_kernels, (initial_params, state["params"]))
        for path, leaf in after.items():
            np.testing.assert_array_equal(leaf == before[path], before[path] == 0)


def find_kernels(params):
    """The blocks' kernels by path, as NumPy arrays."""
    flat = by_key(params["blocks"])
    return {path: np.asarray(a) for path, a in flat.items() if a.ndim == 3}


@pytest.fixture
def gradients(tiny, initial_params, random_batch):
    """Of all parameters, by path, 0 where a map is: the first moments of `Full`."""
    full = FINETUNERS["full"].finetuner
    init, _, step = compiled(full, tiny)
    state, metrics = step(init(initial_params), random_batch(tiny))
    scale = max(float(metrics["grad_norm"]), 1) / (1 - full.adamw.b1)
    found = by_key(state["optimizer"].mu)
    pruned = {f"blocks/{path}": w for path, w in find_kernels(initial_params).items()}
    return {
        path: scale * np.where(pruned[path] == 0, 0, own)
        if path in pruned
        else own * scale
        for path, own in found.items()
    }


def count_norm(gradients, active, train):
    """Of the blocks those that are active, and what else is trained."""

    def rows(path, own):
        return (
            own[np.asarray(active)] if active is not None and "blocks" in path else own
        )

    own = {p: g for p, g in gradients.items() if not train or p.startswith(train)}
    return np.sqrt(sum(np.sum(np.square(rows(path, g))) for path, g in own.items()))


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
