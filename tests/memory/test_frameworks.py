"""`measure` on other libraries' models: training steps as their users write them.

A step of flax NNX as pure functions is among the programs of test_programs.py.
"""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jmem
from jmem.lowering import list_positions
from jmem.memory import kinds
from jmem.memory.measure import as_program
from jmem.program import ProgramError

WIDTH, BATCH = 512, 256
x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
PARAMETERS = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH)


def explained(report):
    """Bytes at the peak with a kind, and a name, or the operation and its line."""
    return sum(
        row.total_bytes
        for row in report.rows
        if row.kind != kinds.OTHER and ((row.op and row.source) or row.born is None)
    )


optimizer = optax.adam(1e-3)


def count_bytes(tree):
    kinds = map(jax.typeof, jax.tree.leaves(jax.eval_shape(lambda tree: tree, tree)))
    return sum(kind.size * kind.dtype.itemsize for kind in kinds)


def sizes(program):
    """Bytes of a program's arguments, of those that it donates, and of its results."""
    held = [
        0 if n in program.static else count_bytes(a) for n, a in enumerate(program.args)
    ]
    arrays = [a for n, a in enumerate(program.args) if n not in program.static]
    static = {n: a for n, a in enumerate(program.args) if n in program.static}

    def run(*arrays):
        every = iter(arrays)
        places = range(len(program.args))
        return program.fn(*(static[n] if n in static else next(every) for n in places))

    results = count_bytes(jax.eval_shape(run, *arrays))
    return sum(held), sum(held[n] for n in program.donate), results


class TestEquinox:
    @pytest.fixture
    def state(self):
        def make(key):
            model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, depth=1, key=key)
            return model, optimizer.init(eqx.filter(model, eqx.is_array))

        return eqx.filter_eval_shape(make, jax.random.key(0))

    @staticmethod
    def step(model, opt_state, batch):
        def loss(model):
            return jnp.mean((jax.vmap(model)(batch) - batch) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    def test_a_filtered_step_with_its_donation(self, state):
        step = eqx.filter_jit(self.step, donate="all")
        report = jmem.measure(step, *state, x, bounds=False)
        assert report.by_label["model"] == PARAMETERS
        assert report.alias_bytes == 3 * PARAMETERS + 4  # the step's number
        assert report.name == "step"
        assert explained(report) > 0.98 * report.timeline.max()

    @pytest.mark.parametrize(
        ("donate", "donated"),
        [("none", ()), ("all", (0, 1)), ("all-except-first", (1,)), ("warn", (0, 1))],
    )
    def test_what_a_filtered_step_donates(self, state, donate, donated):
        """The batch is donated too, and no result can reuse it."""
        step = eqx.filter_jit(self.step, donate=donate)
        assert as_program(step, (*state, x)).donate == donated
        bound = functools.partial(step, *state)
        assert as_program(bound, (x,)).donate == donated
        assert as_program(step, (*state, x), donate=(1,)).donate == (1,)

    def test_undecorated_as_filtered(self, state):
        state_bytes = 3 * PARAMETERS + 4
        for what in (self.step, eqx.filter_jit(self.step)):
            assert sizes(as_program(what, (*state, x), donate=(0, 1))) == (
                *(state_bytes + count_bytes(x), state_bytes, state_bytes + 4),
            )

    def test_a_model_is_called_with_its_arrays(self, state):
        one = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
        model = state[0]
        for what in (model, eqx.filter_jit(model), model.__call__):
            program = as_program(what, (one,))
            assert sizes(program) == (PARAMETERS + 4 * WIDTH, 0, 4 * WIDTH)

    def test_what_jax_cannot_compile_names_the_way_out(self, state):
        with pytest.raises(
            ProgramError, match=r"eqx\.filter_jit\(step, donate='all'\)"
        ):
            jmem.measure(jax.jit(self.step), *state, x)
        with pytest.raises(TypeError, match=r"jmem\.measure\(eqx\.filter_jit\(step\)"):
            jmem.Program(self.step, (*state, x))

    def test_jax_compiles_modules_of_arrays_alone(self, state):
        params, static = eqx.partition(state[0], lambda leaf: hasattr(leaf, "shape"))
        step = jax.jit(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
        assert sizes(as_program(step, (params, x))) == (
            *(PARAMETERS + count_bytes(x), 0, count_bytes(x)),
        )

    def test_arrays_may_be_given_by_name(self, state):
        step = eqx.filter_jit(lambda model, *, x: jax.vmap(model)(x), donate="all")
        program = as_program(functools.partial(step, x=x), (state[0],))
        held, batch = PARAMETERS + count_bytes(x), count_bytes(x)
        assert sizes(program) == (held, batch, batch)
        assert program.name_arguments() == ["model", "x"]

    def test_a_partitioned_training_step(self, state):
        model, opt_state = state
        params, static = eqx.partition(
            model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        )

        def step(params, opt_state, batch):
            def loss(params):
                model = eqx.combine(params, static)
                return jnp.mean((jax.vmap(model)(batch) - batch) ** 2)

            value, gradients = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradients, opt_state)
            return eqx.apply_updates(params, updates), opt_state, value

        report = jmem.measure(step, params, opt_state, x, donate=(0, 1), bounds=False)
        assert report.by_label["params"] == PARAMETERS
        assert report.alias_bytes >= 3 * PARAMETERS
        assert report.by_kind[kinds.OPTIMIZER] >= 2 * PARAMETERS
        assert report.device_bytes == sum(report.by_kind.values())
        assert explained(report) > 0.98 * report.timeline.max()


class TestNNX:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    STATE = 3 * PARAMETERS + 4  # Adam's two moments, the step's number
    BATCH_BYTES = 4 * BATCH * WIDTH

    @pytest.fixture
    def state(self):
        def make():
            model = self.Model(nnx.Rngs(0))
            return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

        return nnx.eval_shape(make)

    @staticmethod
    def step(model, optimizer, batch):
        def loss(model):
            return jnp.mean((model(batch) - batch) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    @pytest.mark.compat
    def test_a_step_is_its_pure_functions(self, state):
        """Split and merged by hand, which is what NNX does itself."""
        graph, split = nnx.split(state)

        def pure(split, batch):
            model, own = nnx.merge(graph, split)
            value = self.step(model, own, batch)
            return nnx.state((model, own)), value

        by_hand = jmem.measure(pure, split, x, donate=(0,), bounds=False)
        step = nnx.jit(self.step, donate_argnums=(0, 1))
        report = jmem.measure(step, *state, x, bounds=False)
        assert report.device_bytes == by_hand.device_bytes
        assert report.alias_bytes == by_hand.alias_bytes >= self.STATE
        assert report.by_label["model"] == PARAMETERS
        assert report.by_kind[kinds.OPTIMIZER] >= 2 * PARAMETERS
        assert {"model/up/kernel", "optimizer/opt_state/0/mu/up/kernel"} <= {
            row.name for row in report.rows
        }
        assert explained(report) > 0.98 * report.timeline.max()

    @pytest.mark.parametrize(
        "compile",
        [
            lambda step: step,
            nnx.jit,
            functools.partial(nnx.jit, graph=False),
            functools.partial(nnx.jit, graph_updates=False),
            functools.partial(nnx.jit, donate_argnames=("model", "optimizer")),
        ],
        ids=("undecorated", "jit", "trees", "no updates", "donated"),
    )
    def test_state_comes_out_however_it_is_compiled(self, state, compile):
        step = compile(self.step)
        held = self.STATE + 4 + self.BATCH_BYTES  # and the optimizer's own step
        program = as_program(step, (*state, x))
        donated = self.STATE + 4 if program.donate else 0
        assert sizes(program) == (held, donated, self.STATE + 8)
        donated = as_program(step, (*state, x), donate=(0, 1))
        assert sizes(donated) == (held, self.STATE + 4, self.STATE + 8)
        assert (
            as_program(functools.partial(step, *state), (x,)).donate == program.donate
        )

    def test_the_model_is_left_as_it_was(self, state):
        before = jax.tree.leaves(nnx.state(state))
        as_program(nnx.jit(self.step), (*state, x))
        as_program(self.step, (*state, x))
        assert [*map(id, jax.tree.leaves(nnx.state(state)))] == [*map(id, before)]

    def test_static_arguments(self, state):
        @functools.partial(nnx.jit, static_argnums=(0, 3))
        def scaled(n, model, batch, mode):
            return model(batch) * n if mode == "train" else batch

        program = as_program(scaled, (3, state[0], x, "train"))
        assert program.static == (0, 3)
        assert program.name_arguments() == ["n", "model", "batch", "mode"]

    def test_a_model_is_called_with_its_arrays(self, state):
        """Nothing changes in it, so nothing but the result comes out."""
        for what in (state[0], state[0].__call__, jax.jit(lambda model, x: model(x))):
            args = (state[0], x) if hasattr(what, "trace") else (x,)
            program = as_program(what, args)
            assert sizes(program) == (
                PARAMETERS + self.BATCH_BYTES,
                0,
                self.BATCH_BYTES,
            )

    def test_a_model_on_a_mesh_keeps_its_parts(self, state):
        mesh = AbstractMesh((2,), ("data",))
        parts = NamedSharding(mesh, PartitionSpec("data"))
        graph, split = nnx.split(state)
        split = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=parts if a.shape else None
            ),
            split,
        )
        step = nnx.jit(self.step, donate_argnums=(0, 1))
        for what in (step, self.step):
            args = (*nnx.merge(graph, split), x)
            program = as_program(what, args, donate=(0, 1))
            placed = [leaf.sharding for leaf in jax.tree.leaves(program.args[:2])]
            assert placed.count(parts) == len(placed) - 2  # and two numbers of steps
        report = jmem.measure(step, *args, target="rtx4090x2", bounds=False)
        assert report.by_label["model"] == PARAMETERS // 2

    def test_shared_weights_are_there_once(self, state):
        model = state[0]
        both = nnx.jit(lambda model, layer, x: layer(model(x)))
        program = as_program(both, (model, model.up, x))
        assert sizes(program) == (
            *(PARAMETERS + self.BATCH_BYTES, 0, PARAMETERS + self.BATCH_BYTES),
        )

    def test_split_state_goes_in_as_it_is(self, state):
        graph, split = nnx.split(state)

        def pure(split, batch):
            model, own = nnx.merge(graph, split)
            return self.step(model, own, batch), nnx.state((model, own))

        program = as_program(nnx.jit(pure, donate_argnums=0), (split, x))
        held = self.STATE + 4
        assert sizes(program) == (held + self.BATCH_BYTES, held, held + 4)

    @pytest.mark.parametrize("keys", [("value", "mask"), ("a", "a/b")])
    def test_any_batch_has_names(self, state, keys):
        batch = {"batch": dict.fromkeys(keys, x)}

        def run(model, batch):
            return sum(model(each) for each in batch["batch"].values())

        program = as_program(nnx.jit(run, graph=False), (state[0], batch))
        held = PARAMETERS + 2 * self.BATCH_BYTES
        assert sizes(program) == (held, 0, self.BATCH_BYTES)

    def test_a_variable_may_hold_a_tree(self):
        class Table(nnx.Module):
            def __init__(self):
                self.rows = nnx.Param({"value": jnp.ones(4), "other": jnp.ones(2)})

        program = as_program(nnx.jit(lambda table, x: x, graph=False), (Table(), x))
        assert sizes(program)[0] == 24 + self.BATCH_BYTES

    @pytest.mark.parametrize("compile", [lambda step: step, jax.jit, nnx.jit])
    def test_modules_that_are_returned_are_not_lost(self, state, compile):
        def step(model, optimizer, batch):
            loss = self.step(model, optimizer, batch)
            return model, optimizer, loss

        program = as_program(compile(step), (*state, x), donate=(0, 1))
        held = self.STATE + 4
        assert sizes(program) == (held + self.BATCH_BYTES, held, held + 4)

    def test_values_by_name_beside_a_module(self, state):
        @functools.partial(jax.jit, static_argnames="mode")
        def run(model, x, *, mode, scale):
            return model(x) * scale if mode == "train" else x

        program = as_program(
            functools.partial(run, mode="train", scale=2.0), (*state[:1], x)
        )
        held = PARAMETERS + self.BATCH_BYTES
        assert sizes(program) == (held + 4, 0, self.BATCH_BYTES)
        assert program.name_arguments() == ["model", "x", "scale"]

    def test_transforms_under_jit(self, state):
        gradients = nnx.grad(lambda model, x: model(x).sum())
        program = as_program(jax.jit(gradients), (state[0], x))
        assert sizes(program)[2] == PARAMETERS

    def test_changes_that_would_be_lost_are_refused(self, state):
        words = r"changes the NNX modules of argument 0.*step = nnx\.jit\(step"
        with pytest.raises(ProgramError, match=f"(?s)step: it {words}"):
            jmem.measure(jax.jit(self.step), *state, x)
        with pytest.raises(ProgramError, match=f"(?s)step: it {words}"):
            jmem.measure(jmem.Program(self.step, (*state, x)))

    def test_modules_closed_over_are_refused(self):
        model = self.Model(nnx.Rngs(0))
        own = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        for compile in (nnx.jit, jax.jit, lambda step: step):
            step = compile(lambda batch: self.step(model, own, batch))
            with pytest.raises(ProgramError, match="every module as an argument"):
                jmem.measure(step, x)


def scale(n, params, x, mode="train"):
    return jax.tree.map(lambda w: w * n, params), x.sum()


jitted = jax.jit(scale, static_argnames=("n", "mode"), donate_argnames="params")
params = {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}


class Trainer:
    """A step as a method, in the ways that people compile one."""

    rate = 3

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, params, x):
        return scale(self.rate, params, x)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="params")
    def named(self, params, x):
        return scale(self.rate, params, x)

    @classmethod
    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def shared(cls, params, x):
        return scale(cls.rate, params, x)

    @staticmethod
    @functools.partial(jax.jit, donate_argnums=0)
    def bare(params, x):
        return scale(3, params, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A state whose own method is the step."""

    params: dict

    @functools.partial(jax.jit, donate_argnums=0)
    def step(self, x):
        params, total = scale(3, self.params, x)
        return State(params), total


class TestJit:
    """Functions under `jax.jit`, partials of them, and functions that call them."""

    @pytest.mark.parametrize(
        ("bound", "args"),
        [
            (lambda f: f, (3, params, x, "train")),
            (lambda f: functools.partial(f, 3), (params, x, "train")),
            (lambda f: functools.partial(f, 3, params), (x,)),
            (lambda f: functools.partial(f, 3, mode="eval"), (params, x)),
            (lambda f: functools.partial(f, n=3), ()),
        ],
    )
    def test_donation_outlives_a_partial(self, bound, args):
        what = bound(jitted)
        if not args:
            what = functools.partial(what, params=params, x=x)
        program = as_program(what, args)
        assert program.name == "scale"
        held = count_bytes((params, x))
        donated = count_bytes(params)
        assert sizes(program) == (held, donated, donated + 4)

    @pytest.mark.parametrize("method", ["step", "named", "shared", "bare"])
    def test_methods(self, method):
        donated = count_bytes(params)
        for what, args in (
            (getattr(Trainer(), method), (params, x)),
            (functools.partial(getattr(Trainer(), method), params), (x,)),
        ):
            program = as_program(what, args)
            assert program.name_arguments()[-2:] == ["params", "x"]
            assert sizes(program) == (count_bytes((params, x)), donated, donated + 4)

    def test_a_state_with_a_method(self):
        donated = count_bytes(params)
        program = as_program(State(params).step, (x,))
        assert sizes(program) == (count_bytes((params, x)), donated, donated + 4)

    def test_arrays_by_name_alone(self):
        def run(n, *, params, x, mode):
            return scale(n, params, x, mode)

        what = jax.jit(run, static_argnames=("n", "mode"), donate_argnames="params")
        for compiled in (what, run):
            bound = functools.partial(compiled, 3, mode="eval", x=x, params=params)
            program = as_program(bound, ())
            donated = count_bytes(params) if compiled is what else 0
            held, out = count_bytes((params, x)), count_bytes(params) + 4
            assert sizes(program) == (held, donated, out)
            assert {"x", "params"} <= {*program.name_arguments()}

    def test_what_a_partial_of_a_plain_function_holds_but_arrays_is_compiled_in(self):
        def fill(n, params, x, more=0):
            return jnp.zeros(n + more) + x.sum(), params

        for bound, args in (
            (functools.partial(fill, 7, params, more=1), (x,)),
            (functools.partial(fill, n=7, params=params, x=x, more=1), ()),
        ):
            held = count_bytes((params, x))
            out = count_bytes(params) + 32
            assert sizes(as_program(bound, args)) == (held, 0, out)

    def test_positions_may_be_one_and_are_no_names(self):
        assert as_program(scale, (3, params, x), donate=1).donate == (1,)
        for given in ("params", ("params",)):
            with pytest.raises(TypeError, match=r"^donate=.*'params' is no position"):
                list_positions("donate", given)

    def test_what_was_compiled_before_is_refused(self):
        compiled = jitted.lower(3, params, x).compile()
        with pytest.raises(ProgramError, match="is compiled for other devices already"):
            as_program(compiled, (params, x))

    def test_options_of_another_function_are_refused(self):
        step = jax.jit(scale, compiler_options={"xla_gpu_autotune_level": 0})
        with pytest.raises(
            ProgramError, match=r"(?s)^scale: .* compiler_options.*options="
        ):
            jmem.measure(step, 3.0, params, x)

    @pytest.mark.parametrize(("static", "args"), [(0, (8, 3)), (1, (3, 8))])
    def test_of_two_numbers_the_static_one_is_found(self, static, args):
        def fill(one, other):
            size, value = (one, other) if static == 0 else (other, one)
            return jnp.zeros(size) + value

        program = as_program(jax.jit(fill, static_argnums=static), args)
        assert program.static == (static,)
        assert sizes(program)[2] == 32

    def test_donation_inside_another_function_is_not_lost_in_silence(self):
        def train(params, x):
            return jitted(3, params, x)

        with pytest.raises(
            ProgramError, match=r"measure\(train, \.\.\., donate=\(0,\)\)"
        ):
            jmem.measure(train, params, x)
        report = jmem.measure(jax.jit(train), params, x, bounds=False)
        assert [flag for flag in report.flags if flag.startswith("scale, a jitted fun")]
        report = jmem.measure(train, params, x, donate=(0,), bounds=False)
        assert report.alias_bytes == count_bytes(params)
        assert not report.flags


class TestMesh:
    """Arguments on a mesh, which a function may name without having one."""

    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    parts = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parts)

    def test_the_mesh_of_the_arguments_is_in_scope(self):
        def step(x, y):
            return jax.lax.with_sharding_constraint(x + y, PartitionSpec("data"))

        for what in (
            jax.jit(step, donate_argnums=0),
            functools.partial(jax.jit(step, donate_argnames="x"), y=self.placed),
            eqx.filter_jit(step, donate="all"),
        ):
            args = (self.placed,) * (1 if isinstance(what, functools.partial) else 2)
            assert 0 in as_program(what, args).donate

    def test_a_mesh_of_ones_own_is_refused(self):
        step = jax.shard_map(
            lambda x: 2 * x,
            mesh=self.mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
        )
        with pytest.raises(
            ProgramError, match="Leave mesh= out: the mesh of the argum"
        ):
            jmem.measure(jax.jit(step), self.placed, target="rtx4090x2")


class TestLinen:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(WIDTH)(jax.nn.gelu(nn.Dense(4 * WIDTH)(x)))

    class Net(nn.Module):
        block: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = self.block()(x)
            return x

    def test_bytes_by_numbered_layer(self):
        net = self.Net(self.Block)

        def step(params, batch):
            def loss(params):
                return jnp.mean(jnp.asarray(net.apply(params, batch)) ** 2)

            return jax.tree.map(lambda w, g: w - g, params, jax.grad(loss)(params))

        params = jax.eval_shape(net.init, jax.random.key(0), x)
        report = jmem.measure(step, params, x, donate=(0,), bounds=False)
        layers = report.by_layer()
        assert list(layers) == ["Block_0", "Block_1", "Block_2", ""]
        assert sum(layers.values()) == report.timeline.max()
        weights = 4 * (8 * WIDTH * WIDTH + 5 * WIDTH)
        hidden = 4 * BATCH * 4 * WIDTH
        for name in ("Block_0", "Block_1", "Block_2"):
            assert layers[name] >= weights + hidden


@pytest.mark.parametrize("jit", [False, True])
def test_a_pair_of_init_and_apply_as_in_haiku(jit):
    """Nested dicts by module and name, a pure `apply`: what hk.transform returns."""

    def init(key):
        w = jax.random.normal(key, (WIDTH, WIDTH))
        return {"mlp/~/linear_0": {"w": w, "b": jnp.zeros(WIDTH)}}

    def apply(params, rng, x):
        del rng
        layer = params["mlp/~/linear_0"]
        return jax.nn.relu(x @ layer["w"] + layer["b"][None])

    params = jax.eval_shape(init, jax.random.key(0))
    fn = jax.jit(apply) if jit else apply
    report = jmem.measure(fn, params, jax.random.key(0), x, bounds=False)
    assert report.by_label["params"] == 4 * (WIDTH * WIDTH + WIDTH)
    assert report.output_bytes == 4 * BATCH * WIDTH
