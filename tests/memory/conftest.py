"""Programs whose memory is known, measured once for all tests of the folder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmem.memory.measure import measure
from jmem.memory.report import MemoryReport
from jmem.program import Program


@pytest.fixture(autouse=True)
def every_test_measures(monkeypatch, compiled_anew):
    """No report and no program is taken from an earlier run."""
    monkeypatch.setenv("JMEM_CACHE_DIR", "")


f32, bf16 = jnp.float32, jnp.bfloat16


def spec(*shape, dtype: Any = f32, sharding=None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def mlp() -> Program:
    """An Adam step of three layers, batch 8192: 331,405,488 bytes at the peak."""
    sizes = [(512, 2048), (2048, 2048), (2048, 512)]
    params = [{"w": spec(*size), "b": spec(size[1])} for size in sizes]
    adam = optax.adam(1e-3)

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return jnp.mean((x @ params[-1]["w"] + params[-1]["b"][None] - y) ** 2)

    def step(params, opt_state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.eval_shape(adam.init, params)
    batch = spec(8192, 512)
    return Program(
        step,
        (params, opt_state, batch, batch),
        donate=(0, 1),
        labels={
            "weights": (0, ""),
            "adam m": (1, "0/mu"),
            "adam v": (1, "0/nu"),
            "batch": [(2, ""), (3, "")],
        },
    )


LAYERS, TOKENS, WIDTH = 8, 512, 256


def scanned(remat: bool, tokens: int = TOKENS) -> Program:
    """An SGD step of a scanned stack of two-layer blocks, with or without remat."""

    def block(x, layer):
        with jax.named_scope("expand"):
            hidden = jnp.tanh(x @ layer["up"])
        with jax.named_scope("shrink"):
            return x + hidden @ layer["down"], None

    def loss(params, x):
        body = jax.checkpoint(block) if remat else block
        return jnp.mean(jax.lax.scan(body, x, params)[0] ** 2)

    def step(params, x):
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    params = {
        "up": spec(LAYERS, WIDTH, 4 * WIDTH),
        "down": spec(LAYERS, 4 * WIDTH, WIDTH),
    }
    labels = {"weights": (0, ""), "batch": (1, "")}
    return Program(step, (params, spec(tokens, WIDTH)), donate=(0,), labels=labels)


def handwritten() -> Program:
    """Forward and backward scans written by hand over `jax.vjp`: no `jax.grad`."""

    def block(x, w):
        with jax.named_scope("block"):
            return x + jnp.tanh(x @ w) @ w.T

    def step(params, x):
        def forward(x, w):
            return block(x, w), x

        x, saved = jax.lax.scan(forward, x, params)

        def backward(dx, xs):
            x, w = xs
            _, pull = jax.vjp(block, x, w)
            dx, dw = pull(dx)
            return dx, dw

        _, grads = jax.lax.scan(backward, x, (saved, params), reverse=True)
        return params - 0.1 * grads

    params = spec(LAYERS, WIDTH, 4 * WIDTH)
    labels = {"weights": (0, ""), "batch": (1, "")}
    return Program(step, (params, spec(TOKENS, WIDTH)), donate=(0,), labels=labels)


def offloaded() -> Program:
    """Gradients of a scan whose carries go to the host: 75,500,340 bytes + 64 MiB."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["carry"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def body(x, w):
        return jnp.tanh(checkpoint_name(x, "carry") @ w), None

    def loss(x, weights):
        x, _ = jax.lax.scan(jax.checkpoint(body, policy=policy), x, weights)
        return x.astype(f32).sum()

    return Program(
        jax.grad(loss, argnums=1),
        (spec(4096, 1024, dtype=bf16), spec(8, 1024, 1024, dtype=bf16)),
        labels={"weights": (1, "")},
    )


CACHE_BYTES = 2 * LAYERS * 4 * 1024 * 4 * 64 * 2


def decode(carried: bool, layers: int = LAYERS) -> Program:
    """One token against a donated cache, in the scan's carry or as its xs and ys."""
    batch, slots, heads, dim = 4, 1024, 4, 64

    def attend(layer, x, cache, position):
        keys, values = cache
        q, k, v = jnp.split((x @ layer["qkv"]).reshape(batch, 3 * heads, dim), 3, 1)
        at = (0, position, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, k[:, None], at)
        values = jax.lax.dynamic_update_slice(values, v[:, None], at)
        scores = jnp.einsum("bhd,bshd->bhs", q, keys).astype(f32)
        seen = jnp.arange(slots)[None, None] <= position
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(bf16)
        out = jnp.einsum("bhs,bshd->bhd", weights, values)
        return x + out.reshape(batch, -1) @ layer["out"], keys, values

    def carry_step(params, cache, x, position):
        def body(state, xs):
            x, cache = state
            n, layer = xs
            x, *rows = attend(layer, x, [c[n] for c in cache], position)
            cache = tuple(
                jax.lax.dynamic_update_index_in_dim(c, row, n, 0)
                for c, row in zip(cache, rows)
            )
            return (x, cache), None

        xs = (jnp.arange(layers), params)
        (x, cache), _ = jax.lax.scan(body, (x, cache), xs)
        return x, cache

    def xs_step(params, cache, x, position):
        def body(x, xs):
            layer, rows = xs
            x, *rows = attend(layer, x, rows, position)
            return x, tuple(rows)

        return jax.lax.scan(body, x, (params, cache))

    params = {
        "qkv": spec(layers, heads * dim, 3 * heads * dim, dtype=bf16),
        "out": spec(layers, heads * dim, heads * dim, dtype=bf16),
    }
    cache = (spec(layers, batch, slots, heads, dim, dtype=bf16),) * 2
    return Program(
        carry_step if carried else xs_step,
        (params, cache, spec(batch, heads * dim, dtype=bf16), spec(dtype=jnp.int32)),
        donate=(1,),
        labels={"weights": (0, ""), "kv cache": (1, ""), "batch": (2, "")},
    )


def sharded() -> Program:
    """A momentum step with everything divided over eight GPUs (FSDP)."""
    mesh = AbstractMesh((8,), ("data",))
    divided = NamedSharding(mesh, P("data"))

    def step(params, momentum, x):
        def loss(params):
            h = x
            for w in params:
                h = jnp.tanh(h @ w)
            return jnp.mean(h**2)

        grads = jax.grad(loss)(params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda w, m: w - m, params, momentum), momentum

    weights = (spec(512, 512, sharding=divided),) * 3
    return Program(
        step,
        (weights, weights, spec(256, 512, sharding=divided)),
        donate=(0, 1),
        labels={"weights": (0, ""), "momentum": (1, ""), "batch": (2, "")},
    )


PROGRAMS = {
    "mlp": (mlp, "h200"),
    "scanned": (lambda: scanned(remat=False), "h200"),
    "remat": (lambda: scanned(remat=True), "h200"),
    "handwritten": (handwritten, "h200"),
    "offloaded": (offloaded, "h200"),
    "carried": (lambda: decode(carried=True), "h200"),
    "rebuilt": (lambda: decode(carried=False), "h200"),
    "deep carried": (lambda: decode(carried=True, layers=64), "h200"),
    "deep rebuilt": (lambda: decode(carried=False, layers=64), "h200"),
    "long": (lambda: scanned(remat=False, tokens=8 * TOKENS), "h200"),
    "long remat": (lambda: scanned(remat=True, tokens=8 * TOKENS), "h200"),
    "sharded": (sharded, "h200x8"),
}


@functools.cache
def measured(name: str) -> MemoryReport:
    build, target = PROGRAMS[name]
    return measure(build(), target=target, bounds=False)


@pytest.fixture(
    params=("mlp", "scanned", "remat", "handwritten", "offloaded", "sharded")
)
def report(request) -> MemoryReport:
    """Reports of the training steps among the programs, in turn."""
    return measured(request.param)


@pytest.fixture
def report_of():
    """The report of a program by its name."""
    return measured


@pytest.fixture
def program_of():
    """A program by its name."""
    return lambda name: PROGRAMS[name][0]()
