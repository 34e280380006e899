"""Host memory: what is placed there stays, costs the device a row, and is hidden."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem import offload
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.program import step_program
from jmem.memory.schedule import Copy
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.program import HOST, Program, ProgramError, check_host_bytes
from jmem.train.checkpoint import Checkpoints, abstract
from jmem.train.step import compile_step

LAYERS = 4


def _stack(layers=LAYERS):
    random = np.random.default_rng(0)
    maps = random.standard_normal((layers, 8, 8)).astype(np.float32)
    return {"map": jnp.asarray(maps), "bias": jnp.asarray(maps[:, 0])}


def _layer(x, row, layer):
    return jnp.tanh(x @ row["map"] + row["bias"][None]) * (1.0 + layer)


class TestPlacing:
    def test_arrays_go_there_and_back_unchanged(self):
        stack = _stack()
        there = offload.on_host(stack)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(there)} == {HOST}
        back = offload.on_device(there)
        assert all(not offload.is_on_host(x) for x in jax.tree.leaves(back))
        jax.tree.map(np.testing.assert_array_equal, stack, back)

    def test_a_description_stays_one(self):
        leaf = offload.on_host(jax.ShapeDtypeStruct((3, 2), jnp.bfloat16))
        assert (leaf.shape, leaf.dtype) == ((3, 2), jnp.bfloat16)
        assert leaf.sharding.memory_kind == HOST

    def test_described_tells_the_host_from_the_device(self):
        there, here = offload.describe_results(
            lambda x: (offload.store(x), x + 1), jax.ShapeDtypeStruct((3,), jnp.float32)
        )
        assert there.sharding.memory_kind == HOST
        assert here.sharding is None

    def test_scalars_stay_on_the_device(self):
        count, row = jax.jit(lambda: offload.store((jnp.int32(3), jnp.ones(2))))()
        assert not offload.is_on_host(count)
        assert offload.is_on_host(row)

    def test_a_host_too_small_is_told_before_anything_moves(self, monkeypatch):
        monkeypatch.setattr(offload, "count_available_host_bytes", lambda: 100)
        with pytest.raises(offload.HostMemoryError, match=r"1,152 bytes .* 100 are"):
            offload.on_host(_stack())

    def test_this_machine_says_what_it_has(self):
        assert 2**20 < offload.count_available_host_bytes() < 2**50


class TestStream:
    @pytest.mark.parametrize("layers", [1, LAYERS])
    @pytest.mark.parametrize("prefetch", [True, False])
    def test_is_the_loop_over_rows(self, prefetch, layers):
        stack, x = _stack(layers), jnp.ones((2, 8))
        run = jax.jit(lambda x, s: offload.stream(_layer, x, s, prefetch=prefetch))
        expected = x
        for n in range(layers):
            row = {"map": stack["map"][n], "bias": stack["bias"][n]}
            expected = jax.jit(_layer)(expected, row, n)
        np.testing.assert_allclose(run(x, offload.on_host(stack)), expected, rtol=1e-6)
        np.testing.assert_array_equal(
            run(x, offload.on_host(stack)), run(x, stack), "host and device differ"
        )

    def test_update_rows_leaves_every_leaf_where_it_is(self):
        stack = _stack()
        held = (stack["bias"], offload.on_host(stack["map"]))

        def fn(held, number):
            bias, kernel = held
            return bias + number, kernel * 2

        update = jax.jit(
            lambda held, n: offload.update_rows(fn, held, n), donate_argnums=0
        )
        bias, kernel = update(held, jnp.arange(LAYERS, dtype=jnp.float32))
        assert [offload.is_on_host(x) for x in (bias, kernel)] == [False, True]
        wanted = np.arange(LAYERS, dtype=np.float32)[:, None] + np.asarray(
            _stack()["bias"]
        )
        np.testing.assert_array_equal(bias, wanted)
        np.testing.assert_array_equal(kernel, 2 * np.asarray(stack["map"]))


class TestModel:
    def test_weights_on_the_host_have_the_same_loss(self, random_batch):
        model = Decoder(TINY)
        params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.1))
        there = params | {"blocks": offload.on_host(params["blocks"])}
        loss = jax.jit(lambda params: next_token_loss(model, params, batch))
        batch = random_batch(model)
        assert loss(there) == loss(params)

    def test_offloaded_inputs_have_the_same_gradients(self, random_batch):
        params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.1))
        batch = random_batch(Decoder(TINY))

        def gradients(remat):
            model = Decoder(TINY, remat=remat)
            return jax.jit(jax.grad(lambda p: next_token_loss(model, p, batch)))(params)

        jax.tree.map(
            np.testing.assert_array_equal, gradients("block"), gradients("offload")
        )


class TestMomentsOnTheHost:
    def test_three_steps_are_those_with_moments_on_the_device(self, random_batch):
        model = Decoder(TINY)
        adamw = AdamW(learning_rate=1e-2, weight_decay=0.1, layer_decay=0.9)
        params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.1))
        found = {}
        for where in ("device", "host"):
            method = Full(adamw=adamw, moments=where)
            state = jax.jit(lambda p, m=method: m.init(model, p, {}, None))(params)
            step: Any = jax.jit(
                lambda s, b, m=method: m.step(model, s, b)[0], donate_argnums=0
            )
            for seed in range(3):
                state = step(state, random_batch(model, seed))
            assert step._cache_size() == 1, "the state came back placed differently"
            found[where] = state
        # A thousandth of one step: sums over a leaf and over its pieces round apart.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
            found["device"]["params"],
            found["host"]["params"],
        )
        moments = jax.tree.leaves(found["host"]["optimizer"])
        assert {offload.is_on_host(x) for x in moments if x.ndim > 1} == {True}

    def test_the_training_loop_s_executable_keeps_them_there(self, random_batch):
        """Lowered for descriptions it would take them to the device, and abort."""
        model, method = Decoder(TINY), Full(moments="host")
        params = jax.tree.map(jnp.asarray, random_params(TINY, scale=0.1))
        state = jax.jit(lambda p: method.init(model, p, {}, None))(params)
        batch = random_batch(model)
        step, _ = compile_step(method, model, state, batch)
        state, _ = step(step(state, batch)[0], batch)
        moments = jax.tree.leaves(state["optimizer"])
        assert {offload.is_on_host(x) for x in moments if x.ndim > 1} == {True}

    def test_a_checkpoint_goes_back_to_where_it_was(self, tmp_path):
        here = jnp.arange(6.0).reshape(2, 3)
        state = {"here": here, "there": offload.on_host(here + 1), "step": jnp.int32(3)}
        kept = Checkpoints(tmp_path)
        kept.save(3, state, data="text")
        _, found = kept.restore(abstract(state), data="text")
        placed = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, found)
        assert placed == {"here": "device", "there": HOST, "step": "device"}
        assert offload.is_on_host(found["there"])  # or a program would abort
        jax.tree.map(np.testing.assert_array_equal, found, state)

    def test_an_unknown_place_is_refused(self):
        with pytest.raises((ValueError, TypeError), match="disk"):
            Full(moments="disk")  # pyright: ignore[reportArgumentType]


WIDE = dataclasses.replace(
    TINY, layers=LAYERS, hidden=512, head_dim=128, intermediate=2048, vocab_size=512
)
"""Wide enough for a layer to be larger than XLA's own scratch."""


@functools.cache
def _streamed() -> Program:
    model = Decoder(WIDE, attention="cudnn", dtype=jnp.bfloat16)
    blocks = offload.on_host(model.abstract()["blocks"])
    positions = jnp.zeros((1, 128), jnp.int32)

    def forward(blocks, x):
        def block(x, row, layer):
            return model.block(row, x, positions, layer, model.ops, None)[0]

        return offload.stream(block, x, blocks)

    return Program(
        forward, (blocks, jax.ShapeDtypeStruct((1, 128, WIDE.hidden), jnp.bfloat16))
    )


def _bytes(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class TestCompiledForAGPU:
    def test_the_next_layer_travels_while_one_computes(self):
        copies = offload.copies(_streamed())
        size = _bytes(_streamed().args[0])
        assert sum(copy.bytes * copy.times for copy in copies) == size
        looped = [copy for copy in copies if copy.times == LAYERS - 1]
        assert len(looped) == len(jax.tree.leaves(_streamed().args[0]))
        assert all(copy.to == "device" for copy in copies)
        assert min(copy.kernels_between for copy in looped) >= 5

    @pytest.mark.parametrize("card", ["rtx4090", "a100-80"])
    def test_older_cards_overlap_when_told_to(self, card):
        copies = offload.copies(_streamed(), card, offload.OVERLAP)
        looped = [copy for copy in copies if copy.times == LAYERS - 1]
        assert min(copy.kernels_between for copy in looped) >= 5

    def test_two_layers_are_on_the_device(self):
        report = jmem.measure(_streamed(), target="h200", bounds=False, cache=False)
        blocks = _bytes(_streamed().args[0])
        assert report.host_bytes == blocks
        row = blocks // LAYERS
        assert 2 * row <= report.temp_bytes < 2 * row + 4 * 2**20
        assert sum(report.by_kind.values()) == report.device_bytes

    def test_moments_cost_the_device_a_piece(self):
        model = Decoder(WIDE, attention="cudnn", dtype=jnp.bfloat16)
        program = step_program(Full(moments="host"), model, batch_size=1, seq_len=128)
        report = jmem.measure(program, target="h200", bounds=False, cache=False)
        assert report.host_by_label["optimizer"] == report.host_bytes
        assert report.host_bytes == 8 * WIDE.parameters
        piece = 4 * WIDE.hidden * WIDE.intermediate
        assert report.by_kind["optimizer"] < 7 * piece


def test_host_memory_lost_is_an_error():
    leaf = offload.on_host(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    program = Program(lambda x: x, (leaf,))
    held = types.SimpleNamespace(
        host_argument_size_in_bytes=0, host_output_size_in_bytes=0
    )
    with pytest.raises(ProgramError, match=r"64 bytes .* placed 0 bytes"):
        check_host_bytes(program, held)


def test_a_copy_that_blocks_hides_behind_nothing():
    def add(there, here):
        return offload.fetch(there) + here

    leaf = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    (copy,) = offload.copies(Program(add, (offload.on_host(leaf), leaf)))
    assert isinstance(copy, Copy)
    assert (copy.to, copy.bytes, copy.times) == ("device", 256 * 256 * 4, 1)
    assert copy.kernels_between == 0
