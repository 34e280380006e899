"""Prompts as embeddings, and layers walked in ranges, each with a cache of its own."""

# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.generate.reading import prefill
from jmem.kvcache.full import Full
from jmem.kvcache.plan import Plan
from jmem.kvcache.prefill import read_prompts
from jmem.kvcache.snapkv import SnapKV
from jmem.models.decoder import Decoder
from jmem.nn.attention import causal
from jmem.nn.stack import run_stack
from jmem.program import Program

MODEL = Decoder(dataclasses.replace(TINY, layers=4))
LENGTHS = np.array([50, 37, 8], np.int32)


@functools.cache
def params() -> dict:
    return jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))


@functools.cache
def prompts() -> np.ndarray:
    tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (3, 50))
    return tokens.astype(np.int32)


def test_embeddings_are_read_as_their_tokens_bit_for_bit():
    policy, tokens = SnapKV(capacity=20, window=6), jnp.asarray(prompts())
    plan = policy.plan(MODEL, prompt=50, new_tokens=0, batch_size=3)
    positions = jnp.broadcast_to(jnp.arange(50, dtype=jnp.int32)[None], (3, 50))
    embeddings = MODEL.embed(params(), tokens, positions)

    def read(given, at):
        given = MODEL, params(), given, jnp.asarray(LENGTHS), (policy.begin(plan),)
        return prefill(*given, (plan,), positions=at)

    expected = read(tokens, None)
    for given, at in ((embeddings, None), (embeddings, positions)):
        jax.tree.map(np.testing.assert_array_equal, read(given, at), expected)
    further = read(embeddings, positions + 7)
    # Attention knows distances only.
    np.testing.assert_allclose(further[0], expected[0], atol=1e-4)
    assert np.abs(further[1][0].keys - expected[1][0].keys).max() > 0.1


@pytest.mark.parametrize(
    "given, more, message",
    [
        (jnp.zeros((1, 4, 9)), {}, "embeddings are float32 of 9 channels"),
        (jnp.zeros((1, 4, TINY.hidden), jnp.bfloat16), {}, "embeddings are bfloat16"),
        (
            jnp.ones((1, 4), jnp.int32),
            {"positions": jnp.zeros((1, 3), jnp.int32)},
            r"positions are \(1, 3\), but there are \(1, 4\) tokens",
        ),
    ],
)
def test_refuses_embeddings_and_positions(given, more, message):
    plan = Full().plan(MODEL, prompt=4, new_tokens=0)
    given = MODEL, params(), given, jnp.array([4]), (plan.method.begin(plan),)
    with pytest.raises(ValueError, match=message):
        prefill(*given, (plan,), **more)


# Ranges -------------------------------------------------------------------------------


FIRST, KEPT = 2, (0, 1, 5, 6, 7, 11)
"""Where the second range begins, and the tokens that go on into it."""


@functools.cache
def plain(number: int) -> np.ndarray:
    """Logits of the last token, all layers written out in one piece without a cache.

    Layers below `FIRST` read `number` tokens; those above read `KEPT` of the first 12
    and all further ones.
    """
    positions = np.arange(number, dtype=np.int32)[None]
    ops = MODEL.ops._replace(attend=causal())

    @jax.jit
    def forward(params, tokens):
        x, at = MODEL.embed(params, tokens), positions
        for layer in range(MODEL.config.layers):
            if layer == FIRST:
                kept = np.array([*KEPT, *range(12, number)])
                x, at = x[:, kept], at[:, kept]
            row = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
            given = row, x, jnp.asarray(at), jnp.int32(layer), ops, None
            x, _, _ = MODEL.block(*given)
        return MODEL.head(params, x[:, -1], ops)

    return np.asarray(forward(params(), jnp.asarray(prompts()[:1, :number])))


def count_from(attend, first):
    """`attend` told layers from 0 where a range begins at `first`.

    For a cache that holds the range's layers only.
    """

    def shifted(q, k, v, rope, positions, layer, carry):
        return attend(q, k, v, rope, positions, layer - first, carry)

    return shifted


def test_tokens_are_dropped_between_two_ranges_with_two_caches():
    """Prefill and three further tokens, each range with a cache of its own length."""
    config, blocks = MODEL.config, params()["blocks"]

    def ranged(layers: int, prompt: int) -> Plan:
        shallow = dataclasses.replace(config, layers=layers)
        shallow = dataclasses.replace(MODEL, config=shallow)
        return Full().plan(shallow, prompt=prompt, new_tokens=3)

    plans = ranged(FIRST, 12), ranged(config.layers - FIRST, len(KEPT))
    caches = [plan.method.begin(plan) for plan in plans]
    assert [cache.keys.shape[2] for cache in caches] == [FIRST * 15, 2 * 9]

    def walk(x, positions, attends, carries, kept=None):
        ranges, found = ((0, FIRST), (FIRST, config.layers)), []
        for (first, last), attend, carry in zip(ranges, attends, carries, strict=True):
            if first and kept is not None:
                x, positions = x[:, kept], positions[:, kept]
            ops = MODEL.ops._replace(attend=count_from(attend, first))
            given = MODEL.block, blocks, x, positions, ops, carry
            x, carry, _ = run_stack(*given, first=first, last=last)
            found.append(carry)
        return MODEL.head(params(), x[:, -1], MODEL.ops), found

    tokens = jnp.asarray(prompts()[:1])
    positions = jnp.arange(15, dtype=jnp.int32)[None]
    lengths = [jnp.array([n], jnp.int32) for n in (12, len(KEPT))]
    attends = [read_prompts(MODEL, (p,), n) for p, n in zip(plans, lengths)]
    carries = [((cache, None),) for cache in caches]
    x = MODEL.embed(params(), tokens[:, :12])
    given = x, positions[:, :12], attends, carries, np.array(KEPT)
    logits, carries = jax.jit(lambda: walk(*given))()
    np.testing.assert_allclose(logits, plain(12), atol=1e-5)
    caches = [carry[0][0] for carry in carries]

    @jax.jit
    def step(token, position, places, caches):
        attends = [
            plan.method.decode(plan, cache, MODEL, position[:, 0], place)
            for plan, cache, place in zip(plans, caches, places, strict=True)
        ]
        return walk(MODEL.embed(params(), token), position, attends, caches)

    for number in range(12, 15):
        places = jnp.array([number], jnp.int32), jnp.array([number - 6], jnp.int32)
        here = slice(number, number + 1)
        logits, caches = step(tokens[:, here], positions[:, here], places, caches)
        np.testing.assert_allclose(logits, plain(number + 1), atol=1e-5)


# What a range costs -------------------------------------------------------------------


def test_a_range_of_a_stack_is_read_where_it_lies():
    """Compiled for the card: no program holds a copy of the range's weights."""
    config = dataclasses.replace(TINY, layers=16, hidden=512, intermediate=2048)
    model = Decoder(config, dtype=jnp.bfloat16)
    blocks = model.abstract()["blocks"]
    layer_bytes = sum(x.size * 2 for x in jax.tree.leaves(blocks)) // config.layers

    def walk(blocks, x):
        positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32)[None], (1, 8))
        given = x, positions, model.ops
        x, *_ = run_stack(model.block, blocks, *given, first=3, last=11)
        return x

    x = jax.ShapeDtypeStruct((1, 8, config.hidden), jnp.bfloat16)
    report = jmem.measure(Program(walk, (blocks, x)), bounds=False)
    assert report.temp_bytes < 1.1 * layer_bytes


def test_ranges_are_the_whole_with_gradients():
    tokens = jnp.asarray(prompts())
    positions = jnp.broadcast_to(jnp.arange(50, dtype=jnp.int32)[None], (3, 50))

    def loss(blocks, ranges):
        x = MODEL.embed(params(), tokens)
        for first, last in ranges:
            given = x, positions, MODEL.ops
            limits: dict = {"first": first, "last": last, "remat": "block"}
            x, _, _ = run_stack(MODEL.block, blocks, *given, **limits)
        return jnp.mean(x * x)

    found = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, gradient = found(params()["blocks"], ((0, None),))
    value, parted = found(params()["blocks"], ((0, 1), (1, 1), (1, None)))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
        *(parted, gradient),
    )


@pytest.mark.parametrize("limits", [(-1, 2), (3, 2), (0, 5)])
def test_refuses_ranges_that_are_none(limits):
    first, last = limits
    given = MODEL.block, params()["blocks"], jnp.zeros((1, 1, TINY.hidden))
    with pytest.raises(ValueError, match=f"first={first} and last={last} are no range"):
        run_stack(
            *given, jnp.zeros((1, 1), jnp.int32), MODEL.ops, first=first, last=last
        )
