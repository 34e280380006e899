"""A program's construction refuses what cannot be compiled, and its compiling works."""

import contextlib
import math
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jmem import lowering
from jmem.lowering import never_cached, run_in_place
from jmem.program import Program, ProgramError
from jmem.targets import resolve

x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
state = {"params": {"blocks": {"w": x, "b": x}, "head": x}, "opt": [x, x], "step": 0}


def apply(state, batch, scale=1.0):
    return jax.tree.map(lambda leaf: leaf * scale, state), batch.sum()


class TestConstruction:
    @pytest.mark.parametrize("field", ["donate", "static"])
    @pytest.mark.parametrize("position", [2, -1])
    def test_a_position_must_exist(self, field, position):
        with pytest.raises(ValueError, match=rf"{field} names argument {position}"):
            Program(apply, (state, x), **{field: (position,)})  # pyright: ignore[reportArgumentType]

    def test_a_donated_argument_is_not_static(self):
        with pytest.raises(ValueError, match=r"argument 2 is in donate=\(2,\)"):
            Program(apply, (state, x, 2.0), donate=(2,), static=(2,))

    def test_a_static_value_is_hashable(self):
        with pytest.raises(TypeError, match=r"static argument 2 \(list\)"):
            Program(apply, (state, x, [2.0]), static=(2,))

    def test_an_argument_needs_a_shape(self):
        with pytest.raises(TypeError, match=r"argument 0, 'a/1' is a str"):
            Program(apply, ({"a": [x, "silu"]}, x))

    def test_arguments_are_a_tuple(self):
        with pytest.raises(TypeError, match="args"):
            Program(apply, [state, x])  # pyright: ignore[reportArgumentType]

    def test_the_function_can_be_called(self):
        with pytest.raises(TypeError, match="fn"):
            Program(3, (x,))  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ({"w": (3, "")}, r"labels\['w'\] names argument 3"),
            ({"w": (0, "parms")}, r"matches no array.*did you mean 'params'"),
            ({"w": (0, "params/block")}, r"did you mean 'params/blocks'"),
            ({"w": (2, "")}, r"argument 2, which is static"),
        ],
    )
    def test_a_label_must_reach_something(self, labels, message):
        with pytest.raises(ValueError, match=message):
            Program(apply, (state, x, 2.0), static=(2,), labels=labels)


class TestLabels:
    def test_the_longest_path_holds_whatever_the_order(self):
        labels = {
            "blocks": (0, "params/blocks"),
            "weights": (0, "params"),
            "moments": [(0, "opt/0"), (0, "opt/1")],
        }
        program = Program(apply, (state, x), labels=labels)
        assert dict(
            zip((path for _, path, _ in program.list_leaves()), program.label_leaves())
        ) == {
            "opt/0": "moments",
            "opt/1": "moments",
            "params/blocks/b": "blocks",
            "params/blocks/w": "blocks",
            "params/head": "weights",
            "step": None,
            "": None,
        }

    def test_a_path_matches_whole_words_only(self):
        tree = {"w": x, "w2": x}
        labels = Program(lambda t: t, (tree,), labels={"w": (0, "w")}).label_leaves()
        assert labels == ["w", None]

    def test_static_arguments_have_no_leaves(self):
        program = Program(apply, (state, x, 2.0), static=(2,))
        assert {position for position, *_ in program.list_leaves()} == {0, 1}


def test_it_compiles_for_the_backend_that_is_attached():
    compiled = Program(lambda x: x + 1, (jnp.ones(4),)).compile()
    np.testing.assert_array_equal(compiled(jnp.ones(4)), np.full(4, 2.0))


def test_nothing_is_put_on_a_device():
    huge = jax.ShapeDtypeStruct((2**40,), jnp.bfloat16)
    program = Program(lambda a: a[::2], (huge,))
    assert program.describe_arguments()[0].shape == (2**40,)


def test_weak_types_are_kept():
    """`bf16 * 2.0` stays bf16 in the described program as it does in the real one."""
    half = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    program = Program(lambda a, s: a * s, (half, 2.0))
    result = jax.eval_shape(program.fn, *program.describe_arguments())
    assert result.dtype == jnp.bfloat16


def test_argument_names_are_the_function_s():
    assert Program(apply, (state, x)).name_arguments() == ["state", "batch"]
    varargs = Program(lambda *leaves: leaves[0], (x, x))
    assert varargs.name_arguments() == ["argument 0", "argument 1"]


# Ahead of time ------------------------------------------------------------------------


def analysis(program, target="h200") -> Any:
    return program.compile(resolve(target)).memory_analysis()


@pytest.mark.compat
def test_unused_arguments_are_held():
    held = analysis(Program(lambda a, unused: a + 1, (x, x)))
    assert held.argument_size_in_bytes == 2 * 256 * 256 * 4


@pytest.mark.compat
def test_donation_reaches_the_compiler():
    sizes = [analysis(Program(lambda a: a + 1, (x,), donate=d)) for d in ((), (0,))]
    assert [s.alias_size_in_bytes for s in sizes] == [0, 256 * 256 * 4]


@pytest.mark.compat
def test_the_lowered_text_does_not_depend_on_the_line():
    def one(a):
        return a * 2

    def two(a):
        return a * 2

    two.__name__ = two.__qualname__ = "one"
    texts = {Program(fn, (x,)).lower(resolve("h200")).as_text() for fn in (one, two)}
    assert len(texts) == 1


class TestPlacement:
    bytes = 1024 * 1024 * 4

    def spec(self, sharding):
        return jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding)

    @pytest.mark.compat
    @pytest.mark.parametrize("placed", ["abstract", "one device"])
    def test_a_host_argument_stays_on_the_host(self, placed):
        """JAX drops memory kinds on compile-only devices; rewriting must save them."""
        if placed == "abstract":
            mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,))
            sharding = NamedSharding(mesh, P(), memory_kind="pinned_host")
        else:
            sharding = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")

        def fn(w, a):
            return a @ jax.device_put(w, jax.memory.Space.Device)

        held = analysis(Program(fn, (self.spec(sharding), self.spec(None))))
        assert held.host_argument_size_in_bytes == self.bytes
        assert held.argument_size_in_bytes == self.bytes

    def test_a_host_result_goes_to_the_host(self):
        mesh = AbstractMesh((1,), ("d",))
        host = NamedSharding(mesh, P(), memory_kind="pinned_host")
        program = Program(lambda a: a + 1, (self.spec(None),), out_shardings=host)
        assert analysis(program).host_output_size_in_bytes == self.bytes

    def test_host_memory_that_gets_lost_is_noticed(self, monkeypatch):
        """JAX drops it without a word where a sharding is of the wrong kind."""
        lost = analysis(Program(lambda w: w + 1, (self.spec(None),)))
        monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda _: lost)
        host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        with pytest.raises(
            ProgramError, match=r"arguments of 4,194,304 bytes .* placed 0 bytes"
        ):
            analysis(Program(lambda w: w + 1, (self.spec(host),)))

    def test_arrays_of_this_machine_are_device_arguments(self):
        held = analysis(Program(lambda a: a + 1, (jnp.ones((1024, 1024)),)))
        assert held.argument_size_in_bytes == self.bytes
        assert held.host_argument_size_in_bytes == 0

    @pytest.mark.compat
    @pytest.mark.parametrize("kind", ["explicit abstract", "concrete"])
    def test_a_mesh_divides_arguments_and_results(self, kind):
        """Explicit axes, JAX's default, refuse most programs: they become Auto."""
        if kind == "concrete":
            mesh = jax.make_mesh((1,), ("x",))
            target = "h200"
        else:
            mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Explicit,))
            target = "h200x8"
        a = self.spec(NamedSharding(mesh, P("x")))

        def fn(a, tokens):  # the gather that Explicit axes refuse
            bounded = jax.lax.with_sharding_constraint(a + 1, P(None, "x"))
            return a[tokens], bounded

        tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
        held = analysis(Program(fn, (a, tokens)), target)
        n = resolve(target).devices
        assert held.argument_size_in_bytes == self.bytes // n + 8 * 4
        assert held.output_size_in_bytes < self.bytes // n + 8 * 1024 * 4 + 1024

    def test_the_mesh_must_have_the_target_s_size(self):
        a = self.spec(NamedSharding(AbstractMesh((8,), ("x",)), P("x")))
        with pytest.raises(ProgramError, match=r"of 8 devices.*like 'h200x8'"):
            analysis(Program(lambda a: a + 1, (a,)), "h200x2")

    def test_two_meshes_are_refused(self):
        specs = tuple(
            self.spec(NamedSharding(AbstractMesh((2,), (name,)), P(name)))
            for name in ("a", "b")
        )
        with pytest.raises(ProgramError, match="different meshes"):
            analysis(Program(lambda a, b: a + b, specs), "h200x2")

    def test_without_placement_every_device_holds_a_copy(self):
        held = analysis(Program(lambda a: a + 1, (self.spec(None),)), "h200x2")
        assert held.argument_size_in_bytes == self.bytes


class TestRefusals:
    """What XLA or JAX would answer with a riddle, answered with a way out."""

    def refused(self, fn, match, args=(x,), **options):
        with pytest.raises(ProgramError, match=match):
            Program(fn, args).compile(resolve("h200"), options)

    @pytest.mark.compat
    def test_an_eager_operation(self):
        def fn(a):
            with jax.ensure_compile_time_eval():
                return a + (jnp.arange(4.0) + 1).sum()

        self.refused(fn, r"computes with real values.*\n.*NumPy")

    @pytest.mark.compat
    def test_a_host_callback(self):
        def fn(a):
            jax.debug.print("{}", a[0, 0])
            return a

        self.refused(fn, r"calls back to the host.*\n.*Take the callback out")

    def test_an_unknown_option(self):
        self.refused(lambda a: a, "No such compile option: 'xla_nope'", xla_nope=1)

    def test_deterministic_ops(self):
        self.refused(
            lambda a: a @ a,
            "xla_gpu_deterministic_ops needs a GPU",
            xla_gpu_deterministic_ops=True,
        )

    @pytest.mark.parametrize("says", ["Failed to get configs", "No supported config"])
    def test_deterministic_ops_in_the_environment(self, monkeypatch, says):
        """XLA reads XLA_FLAGS once, so its answer is played back here."""

        def refuse(*args, **kwargs):
            raise RuntimeError(f"INTERNAL: {says} found for HLO: %gemm")

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
        self.refused(lambda a: a @ a, "XLA_FLAGS sets xla_gpu_deterministic_ops")

    def test_what_xla_refuses_is_a_sentence_and_a_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def fn(a):
            return jax.ffi.ffi_call("not_there", jax.typeof(a))(a)

        self.refused(fn, "XLA cannot compile it: No FFI handler registered for not_th")
        (kept,) = tmp_path.glob("jmem-refused-*.txt")
        assert kept.read_text().startswith("NOT_FOUND: No FFI handler")

    def test_a_long_refusal_is_shortened(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        module = "too much " * 200 + "\nHloModule jit_fn\n" + "  %dot = f32[8]\n" * 500

        def refuse(*args, **kwargs):
            raise jax.errors.JaxRuntimeError(f"INTERNAL: {module}")

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
        with pytest.raises(ProgramError, match=r"too much too \.\.\.\n") as raised:
            Program(lambda a: a, (x,)).compile(resolve("h200"))
        assert len(str(raised.value)) < 400
        (kept,) = tmp_path.glob("jmem-refused-*.txt")
        assert kept.read_text() == f"INTERNAL: {module}\n"

    def test_a_mesh_of_this_machine_inside(self):
        here = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
        inside = NamedSharding(here, P("x"))
        self.refused(
            lambda a: jax.lax.with_sharding_constraint(a, inside),
            r"mesh of this machine.*\n.*PartitionSpec",
        )

    def test_the_function_s_own_errors_pass(self):
        def fn(a):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            Program(fn, (x,)).compile(resolve("h200"))


def test_settings_come_back_whichever_of_two_threads_ends_first():
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    first, second = never_cached(), never_cached()
    with contextlib.ExitStack() as inner:
        with first:
            inner.enter_context(second)
        assert getattr(jax.config, name) == math.inf
    assert getattr(jax.config, name) == before != math.inf


def test_an_option_that_xla_does_not_know_is_left_out_with_a_line(monkeypatch, caplog):
    """Of those jmem prefers. One that a user gives is refused."""
    monkeypatch.setattr(lowering, "IN_PLACE", {"xla_of_later": True})
    seen = []

    def run(options):
        seen.append(options)
        return jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)(1.0)

    given = {"xla_of_later": True, "xla_backend_optimization_level": 1}
    for _ in range(2):
        assert run_in_place(run, given) == jnp.sin(1.0)
    known = {"xla_backend_optimization_level": 1}
    assert seen == [given, known, known]
    assert caplog.text.count("has no option xla_of_later") == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_nobody"):
        run_in_place(run, {"xla_of_nobody": True})
