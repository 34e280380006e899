"""Cached decoding equals recomputing everything, row by row, in two programs."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# optax and chex type every tree as a union of all that a tree can be.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import random_params

from jmem.generate import decode, reading
from jmem.generate.checks import check_method
from jmem.generate.decode import extend, generate, join_pieces, stream
from jmem.generate.programs import decode_program, prefill_program
from jmem.generate.reading import prefill
from jmem.kvcache.cache import make_empty
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.models.decoder import Decoder
from jmem.models.next_token import token_positions
from jmem.nn.stack import run_stack

PROMPTS = [[5, 9, 1, 30], [7], [2, 2, 40, 11, 8, 3, 19]]


@pytest.fixture
def model(tiny_config):
    return Decoder(dataclasses.replace(tiny_config, layers=2))


@pytest.fixture
def params(model):
    # Larger weights than at birth, so that the likeliest token is not always the same.
    return jax.tree.map(jnp.asarray, random_params(model.config, scale=0.3))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    positions = token_positions(tokens)
    x = model.embed(params, tokens)
    x, _, _ = run_stack(model.block, params["blocks"], x, positions, model.ops)
    return model.head(params, x, model.ops)


def recomputed(model, params, prompt, steps):
    """Greedy continuation without a cache: one full forward pass a token."""
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(model, params, padded)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
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


def test_a_row_ends_with_the_first_of_its_stop_tokens(model, params):
    free = generate(model, params, PROMPTS, max_new_tokens=12)
    stops = [free[0][4], free[2][7]]
    found = generate(model, params, PROMPTS, max_new_tokens=12, stop_tokens=stops)
    for row, whole in zip(found, free, strict=True):
        ends = [whole.index(stop) + 1 for stop in stops if stop in whole]
        assert row == whole[: min(ends, default=len(whole))]
    assert len(found[0]) < 12


def test_decoding_ends_when_all_rows_have(model, params):
    """The rest of the answer repeats the last token, and takes no steps."""
    plan = Full().plan(model, prompt=8, new_tokens=20, batch_size=1)
    given = jnp.asarray([PROMPTS[0]], jnp.int32), jnp.asarray([4], jnp.int32)
    steps, found = [], []
    for stops in ((), None):
        logits, (cache,) = prefill(model, params, *given, (make_empty(plan),), (plan,))
        stops = (int(found[0][2]),) if stops is None else stops
        tokens, cache = extend(
            *(model, params, logits, given[1], cache, jax.random.key(0)),
            plan=plan,
            steps=20,
            stop_tokens=stops,
        )
        found.append(np.asarray(tokens[0]))
        steps.append(int((np.abs(cache.keys[0, 0, :28]).sum(axis=-1) > 0).sum()) - 4)
    end = list(found[0]).index(found[0][2]) + 1
    np.testing.assert_array_equal(found[1][:end], found[0][:end])
    assert set(found[1][end:]) == {found[0][2]}
    assert steps == [20, end]


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_stream_gives_what_generate_does(model, params, every):
    draw: dict = {"temperature": 1.5, "top_k": 20, "key": jax.random.key(3)}
    free = generate(model, params, PROMPTS, max_new_tokens=12, **draw)
    options = draw | {"max_new_tokens": 12, "stop_tokens": [free[0][5], free[1][1]]}
    pieces = [*stream(model, params, PROMPTS, every=every, **options)]
    assert join_pieces(iter(pieces)) == generate(model, params, PROMPTS, **options)
    assert all(len(row) <= every for piece in pieces for row in piece)
    assert any(pieces[-1])
    for row in zip(*pieces):  # a row that has ended stays quiet
        lengths = [len(part) for part in row]
        assert lengths == sorted(lengths, reverse=True) or every == 1


def test_a_stream_is_one_program_and_waits_to_be_asked(model, params):
    before = decode._further.jit()._cache_size()
    pieces = stream(model, params, PROMPTS, max_new_tokens=21, every=4)
    assert decode._further.jit()._cache_size() == before
    assert [len(piece[0]) for piece in pieces] == [4, 4, 4, 4, 4, 1]
    assert decode._further.jit()._cache_size() == before + 1


def test_more_tokens_compile_nothing_new(model, params):
    generate(model, params, PROMPTS, max_new_tokens=5)
    compiled = reading._prefill, decode._further.jit()
    before = [one._cache_size() for one in compiled]
    other = [[1, 2], [3, 4, 5, 6, 7, 8, 9], [10]]
    generate(model, params, other, max_new_tokens=5)
    assert [one._cache_size() for one in compiled] == before


def test_a_cache_of_so_many_bytes(model, params, monkeypatch):
    """The policy is cut to the largest that fits, and then as if it had been given."""
    long = [[*range(1, 40)], [*range(3, 33)]]
    plans = []
    plain = SnapKV.begin
    monkeypatch.setattr(
        SnapKV, "begin", lambda self, plan: plain(self, plans.append(plan) or plan)
    )
    whole = Full().plan(model, prompt=39, new_tokens=6, batch_size=2).bytes()
    options: dict = {"max_new_tokens": 6, "policy": SnapKV(window=4, kernel=3)}
    found = generate(model, params, long, cache_bytes=whole // 2, **options)
    assert 0.9 * whole < 2 * plans[0].bytes() <= whole
    assert found == generate(
        model, params, long, **options | {"policy": plans[0].method}
    )
    short = generate(model, params, PROMPTS, cache_bytes=whole, max_new_tokens=6)
    assert short == generate(model, params, PROMPTS, max_new_tokens=6)


def test_a_prompt_in_chunks_is_answered_the_same(model, params):
    options: dict = {"max_new_tokens": 9}
    whole = generate(model, params, PROMPTS, **options)
    assert whole == generate(model, params, PROMPTS, prompt_chunk=2, **options)


def test_an_answer_by_places_in_the_cache_may_go_beyond_the_positions(model, params):
    policy = StreamingLLM(capacity=10)
    (row,) = generate(model, params, PROMPTS[:1], max_new_tokens=200, policy=policy)
    assert len(row) == 200
    with pytest.raises(ValueError, match="max_positions=128"):
        fixed = StreamingLLM(capacity=10, positions="absolute")
        generate(model, params, PROMPTS[:1], max_new_tokens=200, policy=fixed)


BROKEN = {
    "embedding": (("embed", "embedding"), "layer 0"),
    "second block's keys": (("blocks", "attention", "k", "kernel", 1), "layer 1"),
    "first block's MLP": (("blocks", "mlp", "down", "kernel", 0), "layer 1"),
    "last block's MLP": (("blocks", "mlp", "down", "kernel", 1), "last block behind"),
    "head": (("head", "kernel"), "of the head"),
}


@pytest.mark.parametrize("path, message", BROKEN.values(), ids=list(BROKEN))
def test_says_where_a_number_is_none(model, params, path, message):
    broken = jax.tree.map(np.array, params)
    leaf = functools.reduce(lambda tree, name: tree[name], path, broken)
    leaf[7] = np.nan  # a row of the table: only the second prompt holds token 7
    if path[0] != "embed":
        leaf[...] = np.inf
    row = 1 if path[0] == "embed" else 0
    with pytest.raises(ValueError, match=f"logits of row {row} are .*{message}"):
        generate(model, broken, PROMPTS, max_new_tokens=3)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("builder", [decode_program, prefill_program])
def test_the_cache_is_donated_and_has_the_promised_bytes(model, builder):
    plan = Full().plan(model, prompt=16, new_tokens=8, batch_size=3)
    analysis = builder(model, plan).compile().memory_analysis()
    assert plan.bytes() == sum(leaf.nbytes for leaf in make_empty(plan))
    assert analysis.alias_size_in_bytes == plan.bytes()


REFUSED = {
    "no prompts": ([], {}, "at least one prompt"),
    "empty prompt": ([[1], []], {}, "at least one token|each at least one"),
    "foreign token": ([[48]], {}, r"prompts\[0\].*\[0, 48\)"),
    "too long": ([[1] * 124], {}, "max_positions=128"),
    "no key": ([[1]], {"temperature": 1.0}, "needs key"),
    "negative temperature": ([[1]], {"temperature": -1.0}, "must not be negative"),
    "no tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    "foreign stop": ([[1]], {"stop_tokens": [3, 48]}, r"stop_tokens=\[3, 48\] must"),
    "no chunk": ([[1]], {"prompt_chunk": 0}, "prompt_chunk=0 must be positive"),
    "few bytes": ([[1]], {"cache_bytes": 10}, "nbytes=10, but Full takes"),
    "shortened": (
        [[1] * 127],
        {"shorten": GemFilter(layer=1, tokens=126)},
        "126 prompt tokens .* max_positions=128",
    ),
}


@pytest.mark.parametrize("prompts, more, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(model, params, prompts, more, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, **({"max_new_tokens": 5} | more))
    with pytest.raises(ValueError, match=message):  # before it is asked for tokens
        stream(model, params, prompts, **({"max_new_tokens": 5} | more))


def test_refuses_a_class_for_a_cache():
    with pytest.raises(
        TypeError, match=r"generate: policy=Full is a class; pass Full\("
    ):
        check_method("generate", Full)


def test_refuses_a_stream_of_no_tokens(model, params):
    with pytest.raises(ValueError, match="every=0 must be positive"):
        stream(model, params, PROMPTS, max_new_tokens=5, every=0)


def test_extend_refuses_what_is_not_the_plan_s(model, params):
    plan = Full().plan(model, prompt=8, new_tokens=4, batch_size=2)
    logits, lengths = jnp.zeros((3, 48)), jnp.ones((3,), jnp.int32)
    with pytest.raises(ValueError, match=r"3 rows, .* batch_size=2"):
        extend(
            *(model, params, logits, lengths, make_empty(plan), jax.random.key(0)),
            plan=plan,
            steps=4,
        )
