"""`measure` on other libraries' models: training steps as their users write them.

That of flax NNX is among the programs of test_programs.py.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jmem
from jmem.memory import kinds

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


class TestEquinox:
    def test_a_training_step(self):
        optimizer = optax.adam(1e-3)

        def make(key):
            model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, depth=1, key=key)
            return model, optimizer.init(eqx.filter(model, eqx.is_array))

        model, opt_state = eqx.filter_eval_shape(make, jax.random.key(0))
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
