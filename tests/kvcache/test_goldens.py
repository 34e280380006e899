"""Every policy against arrays that its official code made; tests/golden/README.md."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llama import llama, load

from jmem.generate.decode import decode_step
from jmem.generate.reading import prefill
from jmem.kvcache.cache import make_empty
from jmem.kvcache.full import Full
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV


def policy(name: str, config: dict) -> Policy:
    """With the settings that the file's arrays were made with."""
    if name.startswith("windowkv"):
        return WindowKV(
            capacity=config["max_capacity_prompt"],
            window=config["review_window_size"],
            observation=config["suffix_size"],
            group=config["shared_layers"],
            divisor=config["beta"],
            best=config["win_max_attn_scores"],
        )
    cls = {"SnapKV": SnapKV, "PyramidKV": PyramidKV}[config["method"]]
    more = {"divisor": config["beta"]} if cls is PyramidKV else {}
    return cls(
        capacity=config["capacity"],
        window=config["window"],
        kernel=config["kernel"],
        pooling="average",
        reduce=config["gqa_score_agg"],
        **more,
    )


@functools.cache
def decoded(name: str, select: str = "kv"):
    """Logits after the prompt and after each forced token, the plan, the cache after
    the prompt, and the file."""
    config, arrays = load(name)
    model, params = llama(config, arrays)
    chosen = policy(name, config)
    if select == "query":
        chosen = chosen.__class__(**{**vars(chosen), "select": "query"})
    if select == "full":
        chosen = Full()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    length = tokens.shape[1]
    plan = chosen.plan(model, prompt=length, new_tokens=config["decode_steps"])
    step = jax.jit(
        decode_step, static_argnames=("model", "plan"), donate_argnames="cache"
    )
    lengths = jnp.array([length], jnp.int32)
    logits, (cache,) = prefill(
        model, params, tokens, lengths, (make_empty(plan),), plans=(plan,)
    )
    before = jax.tree.map(np.asarray, cache)
    found = [np.asarray(logits[0])]
    for number, token in enumerate(arrays["decode_tokens"]):
        at = jnp.array([length + number], jnp.int32)
        given = jnp.array([token], jnp.int32)
        logits, cache = step(model, params, given, at, cache, plan)
        found.append(np.asarray(logits[0]))
    return np.stack(found), plan, before, arrays


def held(plan: PolicyPlan, cache, layer: int, head: int) -> dict[int, tuple]:
    """Position: (key, value) of all that one head of a layer holds after the prompt."""
    begin = sum(plan.sizes[:layer])
    chosen = sum(plan.selected[:layer])
    count = plan.selected[layer]
    unit = head * plan.units // plan.heads
    positions = list(cache.positions[0, unit, chosen : chosen + count])
    start = int(cache.start[0])
    positions += range(start, start + plan.recent)
    slots = range(begin, begin + len(positions))
    return {
        int(position): (cache.keys[0, head, slot], cache.values[0, head, slot])
        for position, slot in zip(positions, slots, strict=True)
        if position >= 0
    }


FILES = ("kvcache-baselines__snapkv_llama", "kvcache-baselines__pyramidkv_llama")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("select", ["kv", "query"])
def test_snapkv_and_pyramidkv(name, select):
    found, plan, cache, arrays = decoded(name, select)
    kind = f"{select}head" if select == "kv" else "queryhead"
    np.testing.assert_allclose(found, arrays[f"{kind}_logits"], atol=1e-4)
    for layer in range(plan.layers):
        count = arrays[f"{kind}_kept_len"][layer]
        assert plan.selected[layer] + plan.recent == count
        for head in range(plan.heads):
            kept = held(plan, cache, layer, head)
            expected = arrays[f"{kind}_kept_positions"][layer, head][:count]
            assert sorted(kept) == sorted(expected)
            if select == "kv":
                for slot, position in enumerate(expected):
                    key = arrays["kvhead_cache_k"][layer, head, slot]
                    value = arrays["kvhead_cache_v"][layer, head, slot]
                    np.testing.assert_allclose(kept[position][0], key, atol=1e-4)
                    np.testing.assert_allclose(kept[position][1], value, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_the_full_cache(name):
    found, _, _, arrays = decoded(name, "full")
    np.testing.assert_allclose(found, arrays["full_logits"], atol=1e-4)


@pytest.mark.parametrize("task", ["localization", "aggregation"])
def test_windowkv(task):
    found, plan, cache, arrays = decoded(f"windowkv__{task}")
    np.testing.assert_allclose(found, arrays["logits"], atol=1e-4)
    np.testing.assert_allclose(found[0], arrays["full_logits_prefill"], atol=1e-4)
    group = plan.policy.group
    assert plan.policy.group_budgets(plan.layers) == tuple(arrays["group_budget"])
    for layer in range(plan.layers):
        count = arrays["kept_len"][layer]
        expected = list(arrays["kept_positions"][layer][:count])
        for head in range(plan.heads):
            kept = held(plan, cache, layer, head)
            assert sorted(kept) == sorted(expected)
            for slot, position in enumerate(expected):
                key = arrays["cache_k"][layer, head, slot]
                value = arrays["cache_v"][layer, head, slot]
                np.testing.assert_allclose(kept[position][0], key, atol=1e-4)
                np.testing.assert_allclose(kept[position][1], value, atol=1e-4)
        windows = arrays["selected_windows"][layer // group]
        starts = {int(p) // plan.policy.window for p in expected[: -plan.recent]}
        assert starts == set(windows[windows >= 0])
