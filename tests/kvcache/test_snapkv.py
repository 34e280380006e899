"""SnapKV, PyramidKV and StreamingLLM on one layer, against what their code selects."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llama import load

from jmem.kvcache import cache as caches
from jmem.kvcache.cache import write
from jmem.kvcache.full import Full
from jmem.kvcache.method import Read
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.seen import Seen, observe
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.models.decoder import Decoder, DecoderConfig

CONFIG, GOLDEN = load("kvcache-baselines__select_units")
N, WINDOW, C = CONFIG["prompt_len"], CONFIG["window"], CONFIG["capacity"]
MODEL = Decoder(
    DecoderConfig(
        vocab_size=8,
        layers=CONFIG["num_layers"],
        hidden=8,
        heads=CONFIG["num_heads"],
        kv_heads=CONFIG["num_kv_heads"],
        head_dim=CONFIG["head_dim"],
        intermediate=8,
        max_positions=512,
    )
)
Q, K, V = (jnp.swapaxes(jnp.asarray(GOLDEN[name])[None], 1, 2) for name in "qkv")
LENGTHS = jnp.array([N], jnp.int32)


def seen_by(plan: PolicyPlan, queries: jax.Array) -> Seen:
    return observe(plan, Read(queries, K, K, K, LENGTHS, jnp.int32(0)))


def chosen(policy: Policy, layer: int = 0) -> tuple[PolicyPlan, np.ndarray]:
    """Positions that a layer selects, [U, N]; -1 behind the last."""
    plan = policy.plan(MODEL, prompt=N, new_tokens=1)
    seen = seen_by(plan, Q)
    found, _ = policy.choose(plan, seen, jnp.int32(layer), None)
    return plan, np.asarray(found[0])


def snapkv(**settings) -> SnapKV:
    return SnapKV(capacity=C, window=WINDOW, kernel=CONFIG["kernel"], **settings)


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_average_pooling_selects_the_official_tokens(reduce):
    policy = snapkv(pooling="average", reduce=reduce)
    plan, found = chosen(policy)
    expected = GOLDEN[f"snapkv_kvhead_{reduce}_avgpool_pos"][:, : C - WINDOW]
    np.testing.assert_array_equal(found, np.sort(expected, axis=1))
    scores = policy.scores(seen_by(plan, Q), jnp.int32(0))
    official = GOLDEN[f"snapkv_kvhead_{reduce}_avgpool_score"]
    np.testing.assert_allclose(scores[0, :, : N - WINDOW], official, atol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_max_pooling_selects_official_scores(reduce):
    """Plateaus are ties: the scores are compared, not the tokens."""
    policy = snapkv(pooling="max", reduce=reduce)
    _, found = chosen(policy)
    official = GOLDEN[f"snapkv_kvhead_{reduce}_maxpool_score"]
    expected = GOLDEN[f"snapkv_kvhead_{reduce}_maxpool_pos"][:, : C - WINDOW]
    for head in range(len(official)):
        mine, theirs = official[head][found[head]], official[head][expected[head]]
        np.testing.assert_allclose(np.sort(mine), np.sort(theirs), atol=1e-5)
        dropped = np.delete(official[head], found[head])
        assert mine.min() >= dropped.max() - 1e-5


def test_query_heads_select_as_the_official_code():
    _, found = chosen(snapkv(pooling="average", select="query"))
    expected = GOLDEN["snapkv_queryhead_avgpool_pos"][:, : C - WINDOW]
    np.testing.assert_array_equal(found, np.sort(expected, axis=1))


def test_a_pyramid_selects_the_official_tokens_of_every_layer():
    policy = PyramidKV(
        capacity=C,
        window=WINDOW,
        kernel=CONFIG["kernel"],
        pooling="average",
        divisor=CONFIG["pyramid_beta"],
    )
    for layer, kept in enumerate(GOLDEN["pyramid_kept_len"]):
        plan, found = chosen(policy, layer)
        count = kept - WINDOW
        assert plan.selected[layer] == count
        expected = np.sort(GOLDEN["pyramid_pos"][layer][:, :count], axis=1)
        np.testing.assert_array_equal(found[:, :count], expected)
        assert (found[:, count:] == -1).all()


def test_a_pyramid_of_divisor_one_is_flat():
    plan = PyramidKV(capacity=40, window=8, divisor=1).plan(
        MODEL, prompt=200, new_tokens=0
    )
    assert plan.selected == (32,) * 4


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (39, (31, 31, 31, 31)),  # all of it
        (63, (32, 32, 32, 32)),  # below twice the mean: SnapKV
        (66, (58, 41, 24, 7)),  # bottom - 3 * step, from the rest of the prompt
        (200, (61, 42, 23, 4)),
    ],
)
def test_a_pyramid_follows_the_prompt(prompt, expected):
    plan = PyramidKV(capacity=40, window=8, divisor=10).plan(
        MODEL, prompt=prompt, new_tokens=0
    )
    assert plan.selected == expected


@pytest.mark.parametrize("capacity, window", [(12, 10), (9, 8), (40, 8), (64, 63)])
def test_a_pyramid_keeps_all_of_a_prompt_within_its_capacity(capacity, window):
    """Its window may be longer than the prompt, and twice the rest of it shorter."""
    policy = PyramidKV(capacity=capacity, window=window)
    for prompt in range(1, 3 * capacity):
        plan = policy.plan(MODEL, prompt=prompt, new_tokens=1)
        kept = [size + plan.recent for size in plan.selected]
        assert kept[-1] >= min(prompt, window)
        assert kept == sorted(kept, reverse=True)
        if prompt <= capacity:
            assert kept == [prompt] * 4


def test_sinks_and_recent_tokens():
    plan, found = chosen(StreamingLLM(capacity=C, first=C - WINDOW))
    kept = np.sort(GOLDEN["streaming_pos"], axis=1)
    assert plan.recent == WINDOW
    np.testing.assert_array_equal(found, kept[:1, : C - WINDOW])


@pytest.mark.parametrize("name", ["full", "snapkv_kvhead_mean_avgpool"])
def test_a_query_over_what_is_kept(name):
    """Attention of one query that is not itself in the cache, as in the file."""
    policy = Full() if name == "full" else snapkv(pooling="average")
    plan = policy.plan(MODEL, prompt=N, new_tokens=0)
    layer = jnp.int32(1)
    picked = None
    if max(plan.selected):
        seen = seen_by(plan, Q)
        picked, _ = policy.choose(plan, seen, layer, None)
    cache = write(plan, caches.make_empty(plan), K, V, picked, LENGTHS, layer)
    last = LENGTHS - 1
    _, there = caches.find_held(plan, cache, last, layer)
    begin, slots = caches.find_region(plan.sizes, layer)
    keys, values = (x[0, :, begin : begin + len(slots)] for x in cache[:2])
    query = GOLDEN["decode_q"].reshape(plan.heads, -1, plan.head_dim)
    raw = np.einsum("kgd,ksd->kgs", query, keys) / np.sqrt(plan.head_dim)
    raw = np.where(
        np.broadcast_to(there[0], (plan.heads, len(slots)))[:, None], raw, -np.inf
    )
    weights = np.exp(raw - raw.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = np.einsum("kgs,ksd->kgd", weights, values).reshape(-1, plan.head_dim)
    np.testing.assert_allclose(found, GOLDEN[f"decode_out_{name}"], atol=1e-5)
    assert int(there[0, 0].sum()) == (N if name == "full" else C)


def test_each_kv_head_selects_as_its_query_heads_when_they_agree():
    """Equal query heads: one selection for the group is each one's own."""
    same = jnp.repeat(Q[:, :, ::4], 4, axis=2)
    found = {}
    for select in ("kv", "query"):
        policy = snapkv(pooling="average", select=select)
        plan = policy.plan(MODEL, prompt=N, new_tokens=0)
        seen = seen_by(plan, same)
        found[select] = policy.choose(plan, seen, jnp.int32(0), None)[0][0]
    np.testing.assert_array_equal(found["query"], np.repeat(found["kv"], 4, axis=0))


REFUSED = {
    "below the window": (SnapKV, {"capacity": 32}, "capacity=32 must exceed window=32"),
    "even kernel": (SnapKV, {"kernel": 4}, "kernel=4 must be odd"),
    "pooling": (SnapKV, {"pooling": "mean"}, "pooling='mean' is not one of average"),
    "divisor": (PyramidKV, {"divisor": 0}, "divisor=0 must be at least 1"),
    "its own name": (PyramidKV, {"capacity": 3}, "PyramidKV: capacity=3"),
    "sinks": (StreamingLLM, {"capacity": 4}, "first=4 must not be negative, and below"),
    "positions": (StreamingLLM, {"positions": "true"}, "'cache' or 'absolute'"),
}


@pytest.mark.parametrize("cls, given, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(cls, given, message):
    policy = cls()
    for name, value in given.items():  # the tests' type check would be first
        object.__setattr__(policy, name, value)
    with pytest.raises(ValueError, match=message):
        policy.__post_init__()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": 0}, "prompt=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"new_tokens": -1}, "new_tokens=-1 must not be negative"),
    ],
)
def test_a_plan_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        SnapKV().plan(MODEL, **({"prompt": 9, "new_tokens": 1} | given))
