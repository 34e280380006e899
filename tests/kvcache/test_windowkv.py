"""WindowKV's budgets, window scores and shared choice; goldens are in test_goldens."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

import dataclasses
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from golden_llama import load
from tiny_decoder import TINY

from jmem.kvcache import windowkv
from jmem.kvcache.policy import Seen
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import TASKS, WindowKV
from jmem.models import zoo
from jmem.models.decoder import Decoder

LLAMA = Decoder(zoo.get("llama3-8b"), dtype=jnp.bfloat16)


def test_budgets_of_the_official_code():
    """Sheet values for 32 layers in groups of 8."""
    policy = WindowKV(capacity=2048)
    assert policy.group_budgets(32) == (2926, 2341, 1756, 1170)
    steep = dataclasses.replace(policy, pyramid="paper")
    assert steep.group_budgets(32) == (3950, 2682, 1414, 146)
    assert WindowKV(pyramid="flat").group_budgets(32) == (1024,) * 4


@pytest.mark.parametrize("capacity, megabytes", [(1024, 140), (2048, 275)])
def test_bytes_of_the_paper_s_setting(capacity, megabytes):
    """Llama-3-8B, 7,950 tokens; the official layout holds four times the bytes."""
    plan = WindowKV(capacity=capacity).plan(LLAMA, prompt=7950, new_tokens=0)
    assert plan.bytes() < megabytes * 1e6
    budgets = plan.policy.group_budgets(32)
    closed = 8 * sum(-(-b // 8) * 8 + 32 for b in budgets) * 4096
    assert plan.bytes() == closed + 4 * sum(plan.selected) + 4


choose = jax.jit(WindowKV.choose, static_argnums=(0, 1))


def seen_of(seed: int, length: int, start: int, width: int, heads=4) -> Seen:
    random = np.random.default_rng(seed)
    queries = random.standard_normal((1, width, heads, 8), np.float32)
    keys = random.standard_normal((1, length, 2, 8), np.float32)
    at = np.arange(start, start + width, dtype=np.int32)[None]
    return Seen(*map(jnp.asarray, (queries, at, keys)), jnp.array([start], jnp.int32))


@pytest.mark.parametrize("best", [1, 3, 0])
def test_window_scores_by_hand(best):
    """The mean over heads of the best tokens' mean, in float64."""
    policy = WindowKV(capacity=20, window=4, observation=5, best=best)
    seen = seen_of(0, 27, 22, 5)
    found = np.asarray(jax.jit(policy.score_windows)(seen))[0]
    keys = np.repeat(np.asarray(seen.keys[0], np.float64), 2, axis=1)
    raw = np.einsum("whd,shd->hws", np.asarray(seen.queries[0]), keys) / np.sqrt(8)
    raw = np.where(np.arange(27) <= np.asarray(seen.at[0])[:, None], raw, -np.inf)
    weights = np.exp(raw) / np.exp(raw).sum(axis=-1, keepdims=True)
    mass = weights.sum(axis=1)[:, :22]
    windows = [mass[:, begin : begin + 4] for begin in range(0, 22, 4)]
    expected = [
        -np.sort(-window, axis=1)[:, : best or 4].mean(axis=1).mean()
        for window in windows
    ]
    np.testing.assert_allclose(found[:6], expected, rtol=1e-5)
    assert (found[6:] == -np.inf).all()


@pytest.mark.parametrize("task", ["localization", "aggregation"])
def test_window_scores_of_the_official_code_order_its_windows(task):
    config, arrays = load(f"windowkv__{task}")
    scores = arrays["window_scores"]
    for group, count in enumerate(arrays["num_selected_windows"]):
        chosen = arrays["selected_windows"][group][:count]
        assert set(np.argsort(-scores[group])[:count]) == set(chosen)
    assert config["strategy"] == {"localization": "max", "aggregation": "average"}[task]


def test_windows_of_one_token_are_snapkv_without_pooling():
    """Shared by all heads, in every layer: invariant 2 of the method's sheet."""
    seen = seen_of(1, 40, 34, 6)
    flat = {"window": 1, "observation": 6, "best": 1, "group": 1, "pyramid": "flat"}
    windowed = WindowKV(capacity=9, **flat)
    snap = SnapKV(capacity=15, window=6, kernel=1, pooling="average", select="shared")
    model = Decoder(TINY)
    picked = []
    for policy in (windowed, snap):
        plan = policy.plan(model, prompt=40, new_tokens=0)
        layer = jnp.int32(2)
        begun = policy.share(plan)
        if policy is windowed:
            layer = jnp.int32(0)
        run = jax.jit(type(policy).choose, static_argnums=(0, 1))
        picked.append(np.asarray(run(policy, plan, seen, layer, begun)[0]))
    np.testing.assert_array_equal(picked[0], picked[1])
    assert (picked[0] >= 0).sum() == 9


def test_followers_keep_what_their_leader_chose():
    model = Decoder(dataclasses.replace(TINY, layers=4))
    policy = WindowKV(capacity=12, window=4, observation=5, group=2, divisor=4)
    plan = policy.plan(model, prompt=40, new_tokens=0)
    first, other = seen_of(2, 40, 35, 5), seen_of(3, 40, 35, 5)
    led, shared = choose(policy, plan, first, np.int32(0), policy.share(plan))
    followed, still = choose(policy, plan, other, np.int32(1), shared)
    np.testing.assert_array_equal(followed, led)
    np.testing.assert_array_equal(still, shared)
    again, _ = choose(policy, plan, other, np.int32(0), shared)
    assert (np.asarray(again) != np.asarray(led)).any()


def test_a_larger_capacity_keeps_more_of_the_same():
    model, kept = Decoder(dataclasses.replace(TINY, layers=4)), []
    for capacity in (8, 12, 16, 200):
        policy = WindowKV(
            capacity=capacity, window=4, observation=5, group=2, divisor=4
        )
        plan = policy.plan(model, prompt=40, new_tokens=0)
        seen = seen_of(4, 40, 35, 5)
        found, _ = choose(policy, plan, seen, np.int32(0), policy.share(plan))
        kept.append({at for at in np.asarray(found)[0, 0].tolist() if at >= 0})
    assert kept[0] < kept[1] < kept[2] < kept[3] == set(range(35))


@pytest.mark.parametrize("length", range(6, 41, 5))
def test_the_number_of_tokens_is_the_official_one(length):
    """Between the budget less a window and the budget plus one, or everything."""
    model = Decoder(dataclasses.replace(TINY, layers=4))
    policy = WindowKV(capacity=12, window=4, observation=5, group=2, divisor=4)
    plan = policy.plan(model, prompt=40, new_tokens=0)
    rest, budget = length - 5, policy.group_budgets(4)[0]
    seen = seen_of(5, 40, rest, 5)
    found, _ = choose(policy, plan, seen, np.int32(0), policy.share(plan))
    windows = -(-rest // 4) - max(-(-(rest - budget) // 4), 0)
    count = int((np.asarray(found) >= 0).sum())
    assert (windows - 1) * 4 < count <= windows * 4
    assert count == rest or budget - 4 < count < budget + 4


class Case(NamedTuple):
    """A setting of the official code, in its letters: p tokens of a window count."""

    layers: int
    n: int
    w: int
    S: int
    g: int
    C: int
    beta: int
    p: int


CASES = {
    "last window shorter than p": Case(4, 64, 8, 5, 2, 24, 5, 4),
    "last window shorter than p, mean of all": Case(4, 64, 8, 5, 2, 24, 5, 8),
    "top budget below a window": Case(6, 70, 8, 6, 2, 9, 14, 4),
    "top budget of nothing": Case(4, 50, 4, 3, 1, 6, 9, 2),
    "lower groups keep all": Case(6, 45, 4, 5, 2, 24, 4, 2),
    "lower groups keep all, last window short": Case(6, 42, 4, 5, 1, 30, 3, 2),
    "a group a layer": Case(5, 83, 8, 16, 1, 20, 5, 4),
    "two groups": Case(6, 77, 8, 8, 3, 24, 5, 8),
    "odd window": Case(4, 59, 7, 4, 2, 20, 5, 3),
    "odd window, odd best": Case(4, 58, 5, 3, 2, 17, 6, 5),
    "windows of one token": Case(4, 40, 1, 6, 2, 9, 5, 1),
    "window longer than what is reviewed": Case(4, 12, 16, 4, 2, 16, 9, 8),
    "budget one short of everything": Case(2, 41, 8, 4, 1, 36, 1, 4),
    "more above than below": Case(8, 66, 4, 6, 4, 16, 3, 2),
    "half the prompt observes": Case(4, 48, 4, 24, 2, 10, 5, 2),
}


def official(case: Case, queries: np.ndarray, keys: np.ndarray) -> list[set[int]]:
    """What each layer keeps besides the observed tokens, by the paper's algorithm.

    In float64, from q [L, n, H, D] and k [L, n, K, D]: nothing of ours is called.
    """
    layers, n, w, S, g, C, beta, p = case
    groups, R = layers // g, n - S
    last = (C * g) // beta
    first = 2 * C - last
    step = (first - last) // (groups - 1)
    budgets = [first - i * step for i in range(groups - 1)] + [last]
    kept, windows = [], None
    for layer in range(layers):
        B = budgets[layer // g]
        if layer % g == 0:
            repeats = queries.shape[2] // keys.shape[2]
            q = queries[layer, R:].astype(np.float64)
            k = np.repeat(keys[layer].astype(np.float64), repeats, axis=1)
            raw = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
            for i in range(S):
                raw[:, i, R + i + 1 :] = -np.inf
            A = np.exp(raw - raw.max(axis=-1, keepdims=True))
            t = (A / A.sum(axis=-1, keepdims=True)).sum(axis=1)[:, :R]
            scores = []
            for begin in range(0, R, w):
                inside = np.sort(t[:, begin : begin + w], axis=-1)[:, ::-1]
                scores.append(inside[:, : min(p, inside.shape[-1])].mean())
            drop = max(math.ceil((R - B) / w), 0)
            order = np.argsort(-np.array(scores), kind="stable")
            windows = order[: len(scores) - drop]
        assert windows is not None
        kept.append({j for i in windows for j in range(i * w, min((i + 1) * w, R))})
    return kept


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_layer_keeps_what_the_official_algorithm_keeps(case):
    config = dataclasses.replace(TINY, layers=case.layers)
    policy = WindowKV(
        capacity=case.C,
        window=case.w,
        observation=case.S,
        best=case.p,
        group=case.g,
        divisor=case.beta,
    )
    plan = policy.plan(Decoder(config), prompt=case.n, new_tokens=2)
    random = np.random.default_rng(len(str(case)) + case.n)
    queries = random.standard_normal((case.layers, case.n, 4, 8), np.float32)
    keys = random.standard_normal((case.layers, case.n, 2, 8), np.float32)
    start = jnp.array([case.n - case.S], jnp.int32)

    @jax.jit
    def choose(queries, keys):
        def layer(shared, xs):
            index, q, k = xs
            at = start[:, None] + jnp.arange(case.S, dtype=jnp.int32)[None]
            seen = Seen(q[None, -case.S :], at, k[None], start)
            chosen, shared = policy.choose(plan, seen, index, shared)
            return shared, chosen[0, 0]

        layers = jnp.arange(case.layers, dtype=jnp.int32)
        return jax.lax.scan(layer, policy.share(plan), (layers, queries, keys))[1]

    chosen = np.asarray(choose(queries, keys))
    for index, expected in enumerate(official(case, queries, keys)):
        slots = chosen[index][: plan.selected[index]]
        assert set(slots[slots >= 0].tolist()) == expected
        assert (chosen[index] >= 0).sum() == len(expected)  # none beyond its slots


def test_settings_for_the_two_tasks():
    one, many = (
        WindowKV.for_task("localization", window=16),
        WindowKV.for_task("aggregation", window=16),
    )
    assert (one.best, one.observation) == (8, 32)
    assert (many.best, many.observation) == (0, 16)
    assert WindowKV.for_task("aggregation", best=2).best == 2
    assert WindowKV.for_task("localization", window=1).best == 1


def test_the_paper_scores_the_tasks_the_other_way_round():
    one, many = (WindowKV.for_task(task, by="paper") for task in TASKS["paper"])
    assert (one.best, one.window) == (0, 8)
    assert (many.best, many.window) == (8, 16)
    assert WindowKV.for_task("aggregation", by="paper", window=4).best == 2


def test_the_first_window_may_be_kept_whatever_it_scores():
    """And only that is forced: the others are the best of the rest."""
    model = Decoder(dataclasses.replace(TINY, layers=4))
    seen = seen_of(9, 40, 35, 5)
    kept = []
    for sinks in (False, True):
        policy = WindowKV(
            capacity=12,
            window=4,
            observation=5,
            group=2,
            divisor=4,
            keep_sinks=sinks,
        )
        plan = policy.plan(model, prompt=40, new_tokens=0)
        found, _ = choose(policy, plan, seen, np.int32(0), policy.share(plan))
        kept.append({at for at in np.asarray(found)[0, 0].tolist() if at >= 0})
    assert not kept[0] & {0, 1, 2, 3}, "the first window is good"
    assert kept[1] > {0, 1, 2, 3}
    assert len(kept[1] - kept[0]) == 4


def test_neighbours_of_the_best_window_are_kept_with_it():
    """The last query attends one token; what it begins goes on in the next window."""
    keys = np.zeros((1, 24, 1, 2), np.float32)
    keys[0, 11, 0] = 9.0
    seen = Seen(
        queries=jnp.ones((1, 1, 1, 2)),
        at=jnp.array([[23]]),
        keys=jnp.asarray(keys),
        start=jnp.array([20]),
    )
    alone = WindowKV(window=4, best=1, observation=4)
    scores, near = (
        np.asarray(jax.jit(policy.score_windows)(seen))[0]
        for policy in (alone, dataclasses.replace(alone, neighbours=1))
    )
    assert int(scores.argmax()) == 2
    np.testing.assert_allclose(near[1:4], scores[2])
    np.testing.assert_allclose(near[0], scores[0])
    assert near[5] == -np.inf  # there is no such window to keep


def test_a_pyramid_on_its_head_runs_as_in_the_paper_s_ablation(caplog):
    """16 layers a group over a divisor of 14; said once, however many plans."""
    windowkv._warn_inverted.cache_clear()
    with caplog.at_level(logging.WARNING):
        for capacity in (512, 1024):
            budgets = WindowKV(capacity=capacity, group=16).group_budgets(32)
            assert budgets == (2 * capacity - capacity * 16 // 14, capacity * 16 // 14)
    assert caplog.text.count("upper layers more tokens than lower") == 1


def test_a_function_may_name_the_task():
    asked = []

    def task(text):
        asked.append(text)
        return "aggregation"

    assert WindowKV.for_task(task, "Summarise this.", group=4).observation == 16
    assert asked == ["Summarise this."]
    assert WindowKV.for_task("localization", best=3).best == 3
    with pytest.raises(ValueError, match="task='qa' is neither 'localization' nor"):
        WindowKV.for_task("qa")
    jaxtyping.config.update("jaxtyping_disable", True)  # or it would refuse first
    try:
        with pytest.raises(ValueError, match="by='me' is not one of official_code, p"):
            WindowKV.for_task("localization", by="me")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_equal_bytes_with_policies_that_count_the_window():
    plain = SnapKV(capacity=512, select="shared").plan(LLAMA, prompt=4096, new_tokens=1)
    policy = WindowKV(capacity=512, count_recent=True, pyramid="flat")
    assert policy.plan(LLAMA, prompt=4096, new_tokens=1).bytes() == plain.bytes()


REFUSED = {
    "no window": ({"window": 0}, "window=0 must be at least 1"),
    "best above window": ({"best": 9}, r"best=9 must lie in \[0, window=8\]"),
    "no room": ({"capacity": 7}, "capacity=7 leaves 7 tokens for windows of window=8"),
    "counted": ({"capacity": 36, "count_recent": True}, "leaves 4 tokens"),
    "pyramid": ({"pyramid": "steep"}, "pyramid='steep' is not one of code, paper"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(given, message):
    policy = WindowKV()
    for name, value in given.items():  # the tests' type check would be first
        object.__setattr__(policy, name, value)
    with pytest.raises(ValueError, match=message):
        policy.__post_init__()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"group": 5}, r"group=5 does not divide .* 32 layers.* 1, 2, 4, 8, 16, 32"),
        ({"group": 16, "divisor": 7}, "top group 2340 tokens, more than twice"),
        ({"group": 32}, "one group makes no pyramid"),
    ],
)
def test_a_plan_refuses_groups(given, message):
    with pytest.raises(ValueError, match=message):
        WindowKV(**given).plan(LLAMA, prompt=4096, new_tokens=1)
