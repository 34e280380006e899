"""LISA in anybody's loop: whatever tree the parameters are, and wherever its layers."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false
# optax types every tree as a union of all that a tree can be.

import dataclasses
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmem.finetune.lisa import transform

LAYERS, WIDTH = 11, 8  # layer "10" sorts before "2", and a matrix has other rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tower:
    """A user's own tree."""

    layers: Any
    head: jax.Array


def layer(number: int) -> dict:
    return {"w": jnp.full((WIDTH, WIDTH), number + 1.0), "b": jnp.full(3, number + 1.0)}


def each(name=str):
    return {name(n): layer(n) for n in range(LAYERS)}


HEAD = {"head": jnp.full(3, 0.5)}
LIST = [layer(n) for n in range(LAYERS)]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *LIST)
TREES: dict[str, tuple[Any, dict]] = {
    "stacked": (HEAD | {"blocks": STACKED}, {}),
    "list": (HEAD | {"blocks": LIST}, {}),
    "tuple": (HEAD | {"blocks": tuple(LIST)}, {}),
    "numbers as strings": (HEAD | {"blocks": each()}, {}),
    "numbers": (HEAD | {"blocks": each(int)}, {}),
    "named": (HEAD | {"blocks": each(lambda n: f"layers_{n}")}, {}),
    "named otherwise": (HEAD | {"blocks": each(lambda n: f"h.{n}")}, {}),
    "beside others": (HEAD | each(lambda n: f"Block_{n}"), {"blocks": "Block"}),
    "path": ({"params": {"layers": LIST} | HEAD}, {"blocks": "params/layers"}),
    "words": ({"params": {"layers": STACKED} | HEAD}, {"blocks": ("params", "layers")}),
    "nothing else": (LIST, {"blocks": ""}),
    "bare arrays": (HEAD | {"blocks": [own["w"] for own in LIST]}, {}),
    "frozen": (freeze(HEAD | {"blocks": each()}), {}),
    "frozen, stacked": (freeze(HEAD | {"blocks": STACKED}), {}),
    "dataclass": (Tower(LIST, HEAD["head"]), {"blocks": "layers"}),
    "state": (nnx.State(HEAD | {"blocks": dict(enumerate(LIST))}), {}),
}


@pytest.mark.parametrize(("tree", "options"), TREES.values(), ids=TREES)
def test_moves_whole_layers_and_keeps_the_tree(tree, options):
    """Updates say by their values which layers they belong to."""
    lisa = transform(optax.identity(), active_layers=2, period=1, **options)
    state, seen = lisa.init(tree), set()
    step = jax.jit(lisa.update)
    for _ in range(4):
        updates, state = step(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        active = {n + 1.0 for n in state.active.tolist()}
        for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(tree)):
            moves = np.isin(value, [*active, 0.5])  # of the active layers, or the head
            np.testing.assert_array_equal(update, np.where(moves, value, 0))
        seen |= active
    assert len(seen) > 2
    assert step._cache_size() == 1


@pytest.mark.parametrize("moments", ["reset_layers", "reset_all", "persist"])
def test_layers_apart_train_as_stacked_ones(moments):
    """To the bit, state and all: only where the layers lie differs."""
    inner = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    options: Any = {"active_layers": 3, "period": 2, "moments": moments, "seed": 3}
    lisa = transform(inner, **options)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = lisa.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    ends = {}
    for name in ("stacked", "list"):
        params, _ = TREES[name]
        state = lisa.init(params)
        for _ in range(5):
            params, state = step(params, state)
        ends[name] = params, state
    (params, state), (apart, other) = ends["stacked"], ends["list"]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *apart["blocks"])
    chex.assert_trees_all_equal(apart | {"blocks": together}, params)
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(other))


def test_the_state_is_that_of_the_active_layers_and_updated_in_place():
    params, _ = TREES["list"]
    lisa = transform(optax.scale_by_adam(), active_layers=2, period=3)
    state = lisa.init(params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.blocks)} == {2}
    step = jax.jit(lisa.update, donate_argnums=1)
    plan = step.lower(params, state, params).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.outside, state.blocks)))
    assert plan.alias_size_in_bytes >= held


def test_no_active_layer_of_a_list():
    params, _ = TREES["list"]
    lisa = transform(optax.identity(), active_layers=0, period=2)
    updates, _ = jax.jit(lisa.update)(params, lisa.init(params), params)
    updates = jax.device_get(updates)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["blocks"]))
    assert updates["head"].all()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1])(nn.LayerNorm()(x))


class Linen(nn.Module):
    """layers_0 ... layers_10 beside embed and head, as Linen names a list."""

    def setup(self):
        self.embed = nn.Dense(WIDTH)
        self.layers = [Block() for _ in range(LAYERS)]
        self.head = nn.Dense(1)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.layers:
            x = block(x)
        return self.head(x)


class Nnx(nnx.Module):
    """The same of NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.layers = nnx.List(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)
        )
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for one in self.layers:
            x = x + nnx.tanh(one(x))
        return self.head(x)


class Eqx(eqx.Module):
    """The same of Equinox."""

    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, LAYERS)
        self.layers = [eqx.nn.Linear(4, 4, key=key) for key in keys]
        self.head = eqx.nn.Linear(4, 1, key=key)

    def __call__(self, x):
        for one in self.layers:
            x = x + jnp.tanh(one(x))
        return self.head(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4), np.float32))
Y = jnp.asarray(np.sin(np.asarray(X).sum(axis=1, keepdims=True)))


def adam_by_lisa(blocks: str) -> optax.GradientTransformation:
    lisa = transform(optax.scale_by_adam(), active_layers=2, period=100, blocks=blocks)
    return optax.chain(lisa, optax.scale_by_learning_rate(1e-2))


def moved_layers(layers: list, before: list) -> list[int]:
    """Which layers are not as they were; each is so whole or not at all."""
    found = []
    layers, before = jax.device_get((layers, before))
    for number, pair in enumerate(zip(layers, before, strict=True)):
        same = jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), *pair))
        assert all(same) or not any(same)
        found += [] if all(same) else [number]
    return found


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_a_plain_linen_loop(kind):
    model = Linen()
    variables = kind(jax.jit(model.init)(jax.random.key(1), X))
    optimizer = adam_by_lisa("params/layers")

    @jax.jit
    def step(variables, state):
        def loss(variables):
            return jnp.mean((model.apply(variables, X) - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, value

    before, state, losses = variables, optimizer.init(variables), []
    for _ in range(10):
        variables, state, loss = step(variables, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert type(variables) is kind
    assert step._cache_size() == 1
    own, first = (
        [tree["params"][f"layers_{n}"] for n in range(LAYERS)]
        for tree in (variables, before)
    )
    assert moved_layers(own, first) == state[0].active.tolist()


def test_a_plain_nnx_loop():
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam_by_lisa("layers"), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - Y) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    own, first = (
        [tree["layers"][n] for n in range(LAYERS)] for tree in (after, before)
    )
    active = nnx.as_pure(nnx.state(optimizer))["opt_state"][0].active
    assert moved_layers(own, first) == active.tolist()


def test_a_plain_equinox_loop():
    model = Eqx(jax.random.key(2))
    optimizer = adam_by_lisa("layers")
    before, state = model, optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        arrays = eqx.filter(model, eqx.is_array)
        updates, state = optimizer.update(grads, state, arrays)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(10):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    own, first = (eqx.filter(tree.layers, eqx.is_array) for tree in (model, before))
    assert moved_layers(own, first) == state[0].active.tolist()


def test_stacked_parts_with_numbers_in_their_names():
    """As Linen names them in a scanned block: other shapes, so no layers."""
    blocks = {"Dense_0": jnp.ones((3, 4, 8)), "Dense_1": jnp.ones((3, 8, 4))}
    lisa = transform(optax.identity(), active_layers=1, period=1)
    params = HEAD | {"blocks": blocks}
    updates, state = jax.jit(lisa.update)(params, lisa.init(params), params)
    for leaf in jax.device_get(updates)["blocks"].values():
        assert np.flatnonzero(leaf.any(axis=(1, 2))).tolist() == state.active.tolist()


ALIKE = {"Dense_0": jnp.ones((8, 8)), "Dense_1": jnp.ones((8, 8))}


@pytest.mark.parametrize(("stacked", "rows"), [(True, 8), (False, 2)])
def test_what_could_be_either_is_what_it_is_said_to_be(stacked, rows):
    lisa = transform(optax.sgd(1.0), active_layers=rows, period=1, stacked=stacked)
    params = HEAD | {"blocks": ALIKE}
    assert lisa.init(params).active.tolist() == list(range(rows))
    updates, _ = jax.jit(lisa.update)(params, lisa.init(params), params)
    assert all(leaf.all() for leaf in jax.device_get(jax.tree.leaves(updates)))


REFUSED = {
    "leaves of other depths": (
        {"blocks": {"w": jnp.ones((6, 8)), "z": jnp.ones((4, 8))}},
        r"disagree about the number of layers.*'w': \(6, 8\), 'z': \(4, 8\)",
    ),
    "a scalar among stacked leaves": (
        {"blocks": {"w": jnp.ones((6, 8)), "z": jnp.float32(1)}},
        r"disagree about the number of layers",
    ),
    "layers of other shapes": (
        {"blocks": [layer(0), layer(1), layer(2) | {"w": jnp.ones((8, 4))}]},
        r"layer 2 is not like layer 0: 'w' is float32\[8,4\], and float32\[8,8\]",
    ),
    "layers of other leaves": (
        {"blocks": {"0": layer(0), "1": layer(1) | {"scale": jnp.ones(3)}}},
        r"layer 1 is not like layer 0: 'scale' is float32\[3\], and absent there",
    ),
    "layers of other dtypes": (
        {"blocks": [{"w": jnp.ones(3)}, {"w": jnp.ones(3, jnp.bfloat16)}]},
        r"'w' is bfloat16\[3\], and float32\[3\] there",
    ),
    "no such path": ({"params": {"block": LIST}}, r"'blocks' names no entry.*'params/"),
    "numbers and others": (
        {"blocks": each() | {"norm": jnp.ones(8)}},
        r"some are numbered.*stacked=False",
    ),
    "either": ({"blocks": ALIKE}, r"'Dense_0', 'Dense_1'.*stacked=False, or True"),
    "too few": ({"blocks": LIST[:1]}, "active_layers=2 exceeds the model's 1 blocks"),
}


@pytest.mark.parametrize(("params", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_before_anything_moves(params, message):
    with pytest.raises(ValueError, match=message):
        transform(optax.sgd(1.0), active_layers=2, period=3).init(params)


def test_explicit_axes_of_a_mesh_are_refused_for_stacked_layers_alone():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))

    def put(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    lisa = transform(optax.sgd(1.0), active_layers=2, period=3)
    with pytest.raises(ValueError, match=r"'b' is .*explicit.*AxisType\.Auto"):
        lisa.init({"blocks": put(STACKED, None, "data")})
    params = {"blocks": put(LIST, "data")}
    updates, _ = jax.jit(lisa.update)(params, lisa.init(params), params)
    moved = [float(jnp.abs(one["w"]).max()) > 0 for one in updates["blocks"]]
    assert sum(moved) == 2
