"""Cached decoding equals recomputing everything, row by row, in two programs."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import random_params

from jmem.generate import decode
from jmem.generate.decode import decode_program, generate, prefill_program
from jmem.kvcache.cache import empty
from jmem.kvcache.full import Full
from jmem.models.decoder import Decoder
from jmem.nn.stack import run_stack
from jmem.train.loss import token_positions

PROMPTS = [[5, 9, 1, 30], [7], [2, 2, 40, 11, 8, 3, 19]]


@pytest.fixture
def model(tiny_config):
    return Decoder(dataclasses.replace(tiny_config, layers=2))


@pytest.fixture
def params(model):
    # Larger weights than at birth, so that the likeliest token is not always the same.
    return jax.tree.map(jnp.asarray, random_params(model.config, scale=0.3))


def recomputed(model, params, prompt, steps):
    """Greedy continuation without a cache: one full forward pass a token."""

    @jax.jit
    def logits(tokens):
        positions = token_positions(tokens)
        x = model.embed(params, tokens)
        x, _, _ = run_stack(model.block, params["blocks"], x, positions, model.ops)
        return model.head(params, x, model.ops)

    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(logits(jnp.asarray(padded))[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_decoding_equals_full_recomputation(model, params):
    found = generate(model, params, PROMPTS, max_new_tokens=12)
    expected = [recomputed(model, params, prompt, 12) for prompt in PROMPTS]
    assert found == expected
    assert len({token for row in found for token in row}) > 5  # not one token repeated


def test_rows_do_not_see_each_other(model, params):
    together = generate(model, params, PROMPTS, max_new_tokens=6)
    alone = [generate(model, params, [p], max_new_tokens=6)[0] for p in PROMPTS]
    assert together == alone


def test_sampling_follows_the_key(model, params):
    draw = dict(max_new_tokens=10, temperature=2.0)
    first = generate(model, params, PROMPTS, key=jax.random.key(1), **draw)
    again = generate(model, params, PROMPTS, key=jax.random.key(1), **draw)
    other = generate(model, params, PROMPTS, key=jax.random.key(2), **draw)
    assert first == again
    assert first != other


def test_a_low_temperature_is_greedy(model, params):
    cold = generate(
        model,
        params,
        PROMPTS,
        max_new_tokens=8,
        temperature=1e-6,
        key=jax.random.key(0),
    )
    assert cold == generate(model, params, PROMPTS, max_new_tokens=8)


def test_a_row_ends_with_its_stop_token(model, params):
    free = generate(model, params, PROMPTS, max_new_tokens=12)
    stop = free[0][4]
    found = generate(model, params, PROMPTS, max_new_tokens=12, stop_token=stop)
    for row, whole in zip(found, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]


def test_more_tokens_compile_nothing_new(model, params):
    generate(model, params, PROMPTS, max_new_tokens=5)
    before = decode.prefill._cache_size(), decode.extend._cache_size()
    other = [[1, 2], [3, 4, 5, 6, 7, 8, 9], [10]]
    generate(model, params, other, max_new_tokens=5)
    assert (decode.prefill._cache_size(), decode.extend._cache_size()) == before


@pytest.mark.parametrize("builder", [decode_program, prefill_program])
def test_the_cache_is_donated_and_has_the_promised_bytes(model, builder):
    plan = Full().plan(model, prompt=16, new_tokens=8, batch_size=3)
    analysis = builder(model, plan).compile().memory_analysis()
    assert plan.bytes() == sum(leaf.nbytes for leaf in empty(plan))
    assert analysis.alias_size_in_bytes == plan.bytes()


REFUSED = {
    "no prompts": ([], {}, "at least one prompt"),
    "empty prompt": ([[1], []], {}, "at least one token|each at least one"),
    "foreign token": ([[48]], {}, r"prompts\[0\].*\[0, 48\)"),
    "too long": ([[1] * 124], {}, "max_positions=128"),
    "no key": ([[1]], {"temperature": 1.0}, "needs key"),
    "negative temperature": ([[1]], {"temperature": -1.0}, "must not be negative"),
    "no tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
}


@pytest.mark.parametrize("prompts, more, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(model, params, prompts, more, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, **({"max_new_tokens": 5} | more))
