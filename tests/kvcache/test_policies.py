"""What must hold of every policy, whatever it keeps: one suite, run over the list."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from donation import count_aliased_bytes
from tiny_decoder import TINY, random_params

from jmem.generate.decode import decode_step, extend
from jmem.generate.programs import decode_program, prefill_program
from jmem.generate.reading import pad_right, prefill
from jmem.kernels.windowed_attention import windowed_attention
from jmem.kvcache import cache as cache_module
from jmem.kvcache.cache import Cache, make_empty
from jmem.kvcache.full import Full
from jmem.kvcache.members import POLICIES
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.prefill import read_prompts
from jmem.models.decoder import Decoder
from jmem.models.next_token import token_positions
from jmem.nn.linear import dense
from jmem.nn.ops import Ops
from jmem.nn.stack import run_stack
from jmem.targets import resolve

MODEL = Decoder(dataclasses.replace(TINY, layers=4))
LENGTHS = (50, 37, 3)
NEW = 12
NAMES = tuple(POLICIES)


@functools.cache
def params() -> dict:
    return jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))


@functools.cache
def prompts(width: int = max(LENGTHS)) -> tuple[jax.Array, jax.Array]:
    """Tokens of three rows, padded on the right with what must not matter."""
    random = np.random.default_rng(7)
    tokens = random.integers(0, TINY.vocab_size, (len(LENGTHS), max(LENGTHS)))
    padded = np.full((len(LENGTHS), width), 1, np.int32)
    for row, length in enumerate(LENGTHS):
        padded[row, :length] = tokens[row, :length]
    return jnp.asarray(padded), jnp.asarray(LENGTHS, jnp.int32)


def plan_of(name: str, **more) -> PolicyPlan:
    policy = POLICIES[name]
    if "capacity" in more:
        if not hasattr(policy, "capacity"):
            return plan_of(name)
        policy = dataclasses.replace(policy, capacity=more.pop("capacity"))
    sizes: Any = {"prompt": max(LENGTHS), "new_tokens": NEW, "batch_size": len(LENGTHS)}
    return policy.plan(MODEL, **(sizes | more))


step = jax.jit(decode_step, static_argnames=("model", "plan"), donate_argnames="cache")


@functools.partial(jax.jit, static_argnums=0)
def empty(plans: tuple[PolicyPlan, ...]) -> tuple[Cache, ...]:
    """Caches that hold no token, compiled together."""
    return tuple(make_empty(plan) for plan in plans)


def read(plans: tuple[PolicyPlan, ...], tokens, lengths):
    """Logits and caches after the prompts, as NumPy arrays."""
    found = prefill(MODEL, params(), tokens, lengths, empty(plans), plans=plans)
    logits, caches = jax.device_get(found)
    return logits, dict(zip(NAMES, caches, strict=False))


def answered(plan: PolicyPlan, cache: Cache, lengths, steps: int = NEW) -> np.ndarray:
    """Logits [steps, B, V] after feeding given tokens to a copy of the cache."""
    cache, lengths = jax.device_get((cache, lengths))
    cache = jax.tree.map(jnp.array, cache)
    random, found = np.random.default_rng(9), []
    for number in range(steps):
        tokens = random.integers(0, TINY.vocab_size, len(lengths), np.int32)
        at = lengths + np.int32(number)
        logits, cache = step(MODEL, params(), tokens, at, cache, plan)
        found.append(np.asarray(logits))
    return np.stack(found)


@functools.cache
def narrow() -> tuple[np.ndarray, dict[str, Cache]]:
    """Logits after the prompts, and the caches of all policies: one prefill."""
    return read(tuple(plan_of(name) for name in NAMES), *prompts())


def held(
    plan: PolicyPlan, cache: Cache, layer: int, row: int, head: int
) -> dict[int, list]:
    """Position: key and value, of what one head of a layer holds of a prompt."""
    begin, chosen = sum(plan.sizes[:layer]), sum(plan.selected[:layer])
    count, start = plan.selected[layer], int(cache.start[row])
    unit = head * plan.units // plan.heads
    positions = list(cache.positions[row, unit, chosen : chosen + count])
    slots = [begin + number for number, at in enumerate(positions) if at >= 0]
    positions = [int(at) for at in positions if at >= 0]
    assert positions == sorted(set(positions)), "not ascending, or twice"
    recent = range(start, LENGTHS[row])
    slots += [begin + count + (at - start) % plan.tail for at in recent]
    numbers = np.concatenate(
        [cache.keys[row, head, slots], cache.values[row, head, slots]], axis=-1
    )
    return dict(zip([*positions, *recent], numbers, strict=True))


def assert_same(plan: PolicyPlan, found: Cache, expected: Cache, row: int, atol=1e-5):
    """Both hold the same tokens of a row, with the same keys and values."""
    for layer in range(plan.layers):
        for head in range(plan.heads):
            one = held(plan, found, layer, row, head)
            other = held(plan, expected, layer, row, head)
            assert list(one) == list(other)
            for at in one:
                np.testing.assert_allclose(one[at], other[at], atol=atol)


every_policy = pytest.mark.parametrize("name", NAMES)


@every_policy
def test_a_cache_that_holds_everything_is_the_full_one(name):
    """Bit for bit, unless keys are turned again or other heads are stored.

    That is the longest row, which fills its slots: in the others sums have gaps.
    """
    tokens, lengths = prompts()
    plain = plan_of("full")
    enough = max(LENGTHS) + NEW if "streaming" in name else 10 * max(LENGTHS)
    plan = plan_of(name, capacity=enough)
    assert plan.sizes == plain.sizes
    _, (cache,) = prefill(MODEL, params(), tokens, lengths, empty((plan,)), (plan,))
    found = answered(plan, cache, lengths)
    expected = answered(plain, narrow()[1]["full"], lengths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    if plan.policy.rope == "absolute" and plan.heads == TINY.kv_heads:
        np.testing.assert_array_equal(found[:, 0], expected[:, 0])


@every_policy
def test_what_is_kept_lies_in_the_prompt_and_ends_with_its_end(name):
    plan, cache = plan_of(name), narrow()[1][name]
    for layer in range(plan.layers):
        for row, length in enumerate(LENGTHS):
            for head in range(plan.heads):
                found = list(held(plan, cache, layer, row, head))
                assert len(found) <= plan.sizes[layer]
                last = range(max(length - plan.recent, 0), length)
                assert set(last) <= set(found) <= set(range(length))
                if length == min(LENGTHS):
                    assert found == [0, 1, 2]
                elif name != "full":
                    assert len(found) < length


def test_padding_is_neutral():
    """The same prompts in a wider batch: nothing moves."""
    plans = tuple(plan_of(name) for name in NAMES)
    logits, caches = read(plans, *prompts(max(LENGTHS) + 14))
    np.testing.assert_allclose(logits, narrow()[0], atol=1e-5)
    for name, plan in zip(NAMES, plans, strict=True):
        for row in range(len(LENGTHS)):
            assert_same(plan, caches[name], narrow()[1][name], row)


def test_padding_on_the_left_is_moved_to_the_right():
    tokens, lengths = jax.device_get(prompts())
    width = tokens.shape[1]
    left = np.stack([np.roll(row, width - n) for row, n in zip(tokens, LENGTHS)])
    mask = np.arange(width)[None] >= (width - lengths)[:, None]
    moved, counted = jax.jit(pad_right)(left, mask)
    np.testing.assert_array_equal(moved, tokens)
    np.testing.assert_array_equal(counted, lengths)


def test_rows_are_read_alone():
    plans = tuple(plan_of(name, batch_size=1) for name in NAMES)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        tokens, lengths = (jnp.asarray(x[one]) for x in jax.device_get(prompts()))
        logits, caches = read(plans, tokens, lengths)
        np.testing.assert_allclose(logits[0], narrow()[0][row], atol=1e-5)
        for name, plan in zip(NAMES, plans, strict=True):
            alone = jax.tree.map(lambda leaf: np.stack([leaf[0]] * 3), caches[name])
            assert_same(plan, alone, narrow()[1][name], row)


@every_policy
def test_rows_are_answered_alone(name):
    """Another row's cache is not a number, and nobody notices."""
    plan, cache, lengths = plan_of(name), narrow()[1][name], prompts()[1]
    keys = np.array(cache.keys)
    keys[1] = np.nan
    found = answered(plan, cache._replace(keys=keys), lengths, 3)
    expected = answered(plan, cache, lengths, 3)
    np.testing.assert_array_equal(found[:, ::2], expected[:, ::2])
    assert np.isnan(found[:, 1]).all()


@pytest.mark.parametrize("name", [n for n in NAMES if "kv" in n])
def test_the_order_of_slots_is_of_no_account(name):
    plan, cache, lengths = plan_of(name), narrow()[1][name], prompts()[1]
    random, begin, chosen = np.random.default_rng(3), 0, 0
    order, slots = np.arange(sum(plan.selected)), np.arange(sum(plan.sizes))
    for selected in plan.selected:
        turn = random.permutation(selected)
        order[chosen : chosen + selected] = chosen + turn
        slots[begin : begin + selected] = begin + turn
        begin, chosen = begin + selected + plan.tail, chosen + selected
    shuffled = Cache(
        cache.keys[:, :, slots],
        cache.values[:, :, slots],
        cache.positions[:, :, order],
        cache.start,
    )
    np.testing.assert_allclose(
        answered(plan, shuffled, lengths, 3),
        answered(plan, cache, lengths, 3),
        atol=1e-5,
    )


def test_a_scan_over_layers_is_a_loop_over_layers():
    plans = tuple(plan_of(name) for name in NAMES)
    tokens, lengths = prompts()
    positions = token_positions(tokens)
    ops = Ops(read_prompts(MODEL, plans, lengths), dense)
    layer_step = jax.jit(lambda *given: MODEL.block(*given[:4], ops, given[4])[:2])
    x = jax.jit(MODEL.embed)(params(), tokens)
    carry = tuple(
        (cache, plan.policy.share(plan))
        for cache, plan in zip(empty(plans), plans, strict=True)
    )
    blocks = jax.device_get(params()["blocks"])
    for layer in range(MODEL.config.layers):
        row = jax.tree.map(lambda leaf: leaf[layer], blocks)  # noqa: B023
        x, carry = layer_step(row, x, positions, np.int32(layer), carry)
    found = jax.device_get(carry)
    for name, plan, (cache, _) in zip(NAMES, plans, found, strict=True):
        for row in range(len(LENGTHS)):
            assert_same(plan, cache, narrow()[1][name], row)


def test_the_first_new_token_is_exact():
    """A prompt attends all of itself, whatever is kept of it afterwards."""
    tokens, _ = prompts()

    @jax.jit
    def forward(params):
        x = MODEL.embed(params, tokens)
        positions = token_positions(tokens)
        x, *_ = run_stack(MODEL.block, params["blocks"], x, positions, MODEL.ops)
        return MODEL.head(params, x, MODEL.ops)

    expected = np.asarray(forward(params()))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            narrow()[0][row], expected[row, length - 1], atol=1e-5
        )


@pytest.mark.parametrize("name", ["full", "snapkv", "pyramidkv", "windowkv"])
def test_attention_in_place_is_attention(name, monkeypatch):
    """The kernel's definition stands in for it: which slots it is told to read."""
    tokens, lengths = prompts()
    policy = POLICIES[name]
    monkeypatch.setattr(type(policy), "attention", lambda *_: "mosaic_gpu")
    plan = plan_of(name)
    assert not any(size % 8 for size in plan.sizes)
    plain = dataclasses.replace(plan, attention="xla")
    _, (cache,) = prefill(MODEL, params(), tokens, lengths, empty((plain,)), (plain,))
    definition = functools.partial(_as_xla, windowed_attention)
    monkeypatch.setattr(cache_module, "windowed_attention", definition)
    np.testing.assert_allclose(
        answered(plan, cache, lengths), answered(plain, cache, lengths), atol=1e-4
    )


def _as_xla(op, *arrays, implementation, **settings):
    assert implementation == "mosaic_gpu"
    return op(*arrays, implementation="xla", **settings)


@pytest.mark.parametrize("name", ["full", "streaming_llm", "windowkv"])
def test_a_thousand_tokens_compile_nothing_new(name):
    """And a ring goes on for ever: more tokens than slots."""
    config = dataclasses.replace(MODEL.config, max_positions=2048)
    model, steps = dataclasses.replace(MODEL, config=config), 1000
    plan = POLICIES[name].plan(model, prompt=40, new_tokens=steps)
    tokens, lengths = (x[:1] for x in prompts())
    before = step._cache_size()
    logits, (cache,) = prefill(
        model,
        params(),
        tokens[:, :40],
        jnp.minimum(lengths, 40),
        (make_empty(plan),),
        plans=(plan,),
    )
    for number in range(steps):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        at = jnp.array([40 + number], jnp.int32)
        logits, cache = step(model, params(), token, at, cache, plan)
    assert step._cache_size() == before + 1
    assert np.isfinite(logits).all()
    assert (plan.tail < 20) == (name == "streaming_llm")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("full", marks=pytest.mark.compat),
        "pyramidkv",
        pytest.param("windowkv", marks=pytest.mark.compat),
    ],
)
def test_bytes_are_the_compiler_s_and_the_cache_is_never_copied(name):
    """For an H200: a donated cache is updated in place, layer by layer."""
    config = dataclasses.replace(
        TINY, layers=16, hidden=64, head_dim=64, kv_heads=4, max_positions=4096
    )
    model, policy = Decoder(config, dtype=jnp.bfloat16), POLICIES[name]
    if name != "full":
        policy = dataclasses.replace(policy, capacity=512)
    h200 = resolve("h200")
    sizes: Any = {"prompt": 1024, "new_tokens": 256, "batch_size": 2}
    plain, kernel = (
        policy.plan(model, **sizes),
        policy.plan(model, **sizes, target=h200),
    )
    filled = prefill_program(model, plain).lower(h200)
    assert count_aliased_bytes(filled) == plain.bytes()
    for plan, most in (
        (plain, plain.bytes() / 4),  # a layer's region, to read it
        (kernel, plain.bytes() / 32),  # the splits' results, and no layer's region
    ):
        # Triton's products need no scratch, in which a copy of the cache could hide.
        triton = {"xla_gpu_enable_triton_gemm": True}
        analysis = decode_program(model, plan).compile(h200, triton).memory_analysis()
        assert analysis.alias_size_in_bytes == plan.bytes()
        assert analysis.temp_size_in_bytes < most
    assert kernel.attention == "mosaic_gpu"


def test_decoding_is_prefilling_when_nothing_is_dropped():
    tokens, lengths = prompts()
    plan = plan_of("full")
    answer, _ = extend(
        MODEL,
        params(),
        jnp.asarray(narrow()[0]),
        lengths,
        jax.tree.map(jnp.copy, narrow()[1]["full"]),
        jax.random.key(0),
        plan=plan,
        steps=NEW,
    )
    whole = jnp.concatenate([tokens[:1], answer[:1, : NEW - 1]], axis=1)
    longer = Full().plan(MODEL, prompt=whole.shape[1], new_tokens=1)
    logits, _ = prefill(
        MODEL,
        params(),
        whole,
        jnp.array([whole.shape[1]], jnp.int32),
        (make_empty(longer),),
        plans=(longer,),
    )
    assert int(jnp.argmax(logits[0])) == int(answer[0, -1])


# A policy of one's own that is wrong --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wrong(Policy):
    """Sizes and scores of shapes that are given."""

    sizes: tuple[int, ...] = (8,) * MODEL.config.layers
    axes: str = "rows units tokens"

    @property
    def recent(self) -> int:
        return 4

    def budgets(self, layers: int, prompt: int) -> tuple[int, ...]:
        return self.sizes

    def scores(self, seen, layer):
        rows, tokens, units, _ = seen.keys.shape
        sizes = {"rows": rows, "units": units, "tokens": tokens, "one": 1}
        return jnp.zeros([sizes[axis] for axis in self.axes.split()])


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8, -1)])
def test_budgets_are_a_size_for_each_layer(sizes):
    with pytest.raises(ValueError, match=rf"Wrong: budgets=\({sizes[0]}.* of 4 layers"):
        Wrong(sizes=sizes).plan(MODEL, prompt=50, new_tokens=1)


@pytest.mark.parametrize(
    "axes", ["rows tokens", "rows one tokens", "rows tokens units"]
)
def test_scores_are_of_rows_units_and_tokens(axes):
    plan = Wrong(axes=axes).plan(MODEL, prompt=50, new_tokens=1, batch_size=3)
    with pytest.raises(
        ValueError, match=r"Wrong: scores of shape .* must be \(3, 2, 50"
    ):
        read((plan,), *prompts())
