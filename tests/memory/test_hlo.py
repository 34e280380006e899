"""The reader of XLA's plan: what a program is made of, and broken bytes refused."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jmem.memory import hlo
from jmem.memory.naming import Origins, split_scope
from jmem.program import Program
from jmem.targets import resolve


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """The HloProto of a scanned sum of products, as bytes."""
    folder = tmp_path_factory.mktemp("dump")

    def fn(weights, x):
        def body(x, w):
            with jax.named_scope("layer"):
                return jnp.tanh(x @ w), x.astype(jnp.bfloat16)

        return jax.lax.scan(body, x, weights)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    weights = jax.ShapeDtypeStruct((6, 128, 128), jnp.float32)
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_proto": True}
    Program(fn, (weights, x)).compile(resolve("h200"), options)
    (path,) = pathlib.Path(folder).glob("*gpu_after_optimizations.hlo.pb")
    return path.read_bytes()


@pytest.fixture(scope="module")
def module(dump):
    return hlo.read(dump)


@pytest.mark.compat
class TestReading:
    def test_arguments_are_entry_parameters_in_order(self, module):
        held = {
            a.parameter: a.bytes for a in module.allocations if a.parameter is not None
        }
        assert held == {0: 6 * 128 * 128 * 4, 1: 64 * 128 * 4}

    def test_shapes_read_as_xla_writes_them(self, module):
        shapes = {
            str(i.shape)
            for i in module.instructions.values()
            if i.computation == module.entry and i.opcode == "parameter"
        }
        assert shapes == {"f32[6,128,128]", "f32[64,128]"}

    def test_lines_are_the_user_s(self, module):
        files = {file for file, _ in module.frames.values()}
        assert any(file.endswith("test_hlo.py") for file in files)
        assert not any("site-packages" in file for file in files)

    def test_a_frame_that_is_its_own_caller_stands_for_itself(self, dump):
        """Nobody outside of the package is found, and the search ends."""
        proto: Any = hlo._build_hlo_proto()()
        proto.ParseFromString(dump)
        index = proto.module.frames
        index.files.append("/lib/site-packages/flax/core.py")
        index.locations.add(file=len(index.files), line=7)
        number = len(index.frames) + 1
        index.frames.add(location=len(index.locations), parent=number)
        frames = hlo.read(proto.SerializeToString()).frames
        assert frames[number] == ("/lib/site-packages/flax/core.py", 7)

    def test_every_event_speaks_of_a_known_buffer_and_instruction(self, module):
        for trace in module.traces:
            for event in trace:
                assert event.buffer in module.buffers
                assert event.instruction in module.by_name


class TestBrokenInput:
    @pytest.mark.parametrize("data", [b"", b"not a proto", b"\x0a\xff\xff\xff\xff\x0f"])
    def test_what_is_no_plan_is_refused(self, data):
        with pytest.raises(ValueError, match="HloProto"):
            hlo.read(data)

    def test_a_truncated_plan_is_refused(self, dump):
        with pytest.raises(ValueError, match="HloProto"):
            hlo.read(dump[: len(dump) // 2])


@pytest.mark.compat
class TestNaming:
    def test_a_stack_is_named_by_the_rows_written_to_it(self, module):
        (loop,) = [i for i in module.instructions.values() if i.opcode == "while"]
        stacks = {}
        for n, part in enumerate(loop.shape.parts):
            if part.dims == (6, 64, 128):
                stacks[part.dtype] = Origins(module).find(loop, (n,))
        assert stacks["bf16"].stack == "filled"

    def test_weights_read_in_a_loop_are_the_argument(self, module):
        (loop,) = [i for i in module.instructions.values() if i.opcode == "while"]
        origins = Origins(module)
        read = {
            origins.find(loop, (n,)).argument
            for n, part in enumerate(loop.shape.parts)
            if part.dims == (6, 128, 128)
        }
        assert read == {0}

    def test_the_carry_is_what_the_body_computes(self, module):
        (loop,) = [i for i in module.instructions.values() if i.opcode == "while"]
        (carry,) = [
            n for n, part in enumerate(loop.shape.parts) if part.dims == (64, 128)
        ]
        name, op = split_scope(Origins(module).find(loop, (carry,)).op_name)
        assert name == "layer"
        assert op in {"tanh", "dot_general"}


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/jvp()/dot_general", ("", "dot_general")),
        (
            "jit(step)/transpose(jvp())/while/body/eval_jaxpr/checkpoint/"
            "rematted_computation/Block/attention/vmap(BTNH,BSNH->BNTS)/dot_general",
            ("Block/attention/BTNH,BSNH->BNTS", "dot_general"),
        ),
        (
            "jit(f)/while/body/cond/branch_1_fun/transpose(jvp(Block))/mlp/jit(silu)/mul",
            ("Block/mlp/silu", "mul"),
        ),
        ("state['params']['w']", ("", "state['params']['w']")),
        ("", ("", "")),
    ],
)
def test_scopes_are_the_user_s_own(op_name, expected):
    assert split_scope(op_name) == expected
