"""Further turns against a cache: what is seen, what is kept, and for how many bytes."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.generate import reading
from jmem.generate.decode import extend
from jmem.generate.programs import read_on_program
from jmem.generate.reading import prefill, read, read_on
from jmem.kernels.windowed_attention import windowed_attention
from jmem.kvcache import cache as cache_module
from jmem.kvcache.cache import Cache, make_empty
from jmem.kvcache.full import Full
from jmem.kvcache.members import POLICIES
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.shorten import pad_rows
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.turn import check_turn, unrotate
from jmem.kvcache.windowkv import WindowKV
from jmem.models.decoder import Decoder
from jmem.models.next_token import token_positions
from jmem.nn.linear import dense
from jmem.nn.ops import Ops
from jmem.nn.rope import Rope, YarnScaling
from jmem.targets import resolve

MODEL = Decoder(dataclasses.replace(TINY, layers=4, max_positions=512))
NAMES = tuple(POLICIES)
ROWS = 3
TURNS = ((40, 23, 3), (9, 1, 12), (2, 12, 7), (12, 5, 1), (6, 8, 11))
"""Tokens of each row, turn by turn."""
ANSWER = 5
WIDTH = 12
"""As many are read at a time: the first turn in four chunks, a later one at once."""

every_policy = pytest.mark.parametrize("name", NAMES)


@functools.cache
def params(silent: bool = False) -> dict:
    """Random weights; `silent` blocks add nothing, so that keys know no context."""
    tree = random_params(MODEL.config, scale=0.3)
    if silent:
        tree["blocks"]["attention"]["o"]["kernel"] *= 0
        tree["blocks"]["mlp"]["down"]["kernel"] *= 0
    return jax.tree.map(jnp.asarray, tree)


def said(turn: int) -> list[list[int]]:
    """What each row says in a turn."""
    random = np.random.default_rng(turn)
    return [random.integers(0, TINY.vocab_size, n).tolist() for n in TURNS[turn]]


def plan_of(name: str, prompt: int = 60, rows: int = ROWS, **more: Any) -> PolicyPlan:
    policy = dataclasses.replace(POLICIES[name], **more)
    return policy.plan(MODEL, prompt=prompt, new_tokens=ANSWER, batch_size=rows)


def roomy(name: str) -> PolicyPlan:
    """A plan in which two turns fit whole."""
    if name == "full":
        return plan_of(name)
    return plan_of(name, capacity=100 if "streaming" in name else 1000)


@dataclasses.dataclass
class Talk:
    """Rows that have said something, and what came of it."""

    plan: PolicyPlan
    model: Decoder = MODEL
    weights: dict = dataclasses.field(default_factory=params)
    texts: list[list[int]] = dataclasses.field(init=False)
    cache: Cache = dataclasses.field(init=False)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.texts = [[] for _ in range(self.plan.batch_size)]
        self.cache = make_empty(self.plan)

    @property
    def lengths(self) -> list[int]:
        return [*map(len, self.texts)]

    def hear(self, rows, chunk: int | None = WIDTH):
        """Reads them, by one program in chunks: a compilation is what a test takes."""
        parts = self.model, self.weights, rows, self.lengths, self.cache, self.plan
        logits, self.cache = read(*parts, chunk=chunk)
        self.logits.append(np.asarray(logits))
        self.texts = [text + row for text, row in zip(self.texts, rows)]
        return self

    def answer(self, steps: int = ANSWER):
        lengths = jnp.asarray(self.lengths, jnp.int32)
        tokens, self.cache = extend(
            *(self.model, self.weights, jnp.asarray(self.logits[-1]), lengths),
            *(self.cache, jax.random.key(0)),
            plan=self.plan,
            steps=steps,
        )
        rows = np.asarray(tokens).tolist()
        self.texts = [text + row for text, row in zip(self.texts, rows)]
        return self

    def held(self, layer: int, row: int, head: int = 0) -> dict[int, np.ndarray]:
        """Position: key and value, of what one head of a layer holds."""
        plan, end = self.plan, self.lengths[row]
        cache = Cache(*map(np.asarray, self.cache))
        begin, chosen = sum(plan.sizes[:layer]), sum(plan.selected[:layer])
        count, start = plan.selected[layer], int(cache.start[row])
        unit = head * plan.units // plan.heads
        positions = cache.positions[row, unit, chosen : chosen + count]
        there = positions >= 0
        assert not there[there.sum() :].any(), "-1 is not behind the last"
        slots = [*(begin + np.flatnonzero(there))]
        tail = range(max(start, end - plan.tail), end)
        slots += [begin + count + (at - start) % plan.tail for at in tail]
        found = [*positions[there].tolist(), *tail]
        assert found == sorted(set(found)), "not ascending, or twice"
        both = [x[row, head, slots] for x in (cache.keys, cache.values)]
        numbers = np.concatenate(both, axis=-1)
        return dict(zip(found, numbers, strict=True))


def talked(plan: PolicyPlan, turns: int = len(TURNS), **more: Any) -> Talk:
    talk = Talk(plan, **more)
    for turn in range(turns):
        talk.hear(said(turn))
        if turn < turns - 1:
            talk.answer()
    return talk


def whole(talk: Talk) -> Talk:
    """All that was said in one prefill by a policy that keeps everything."""
    sizes = {"prompt": max(talk.lengths), "new_tokens": ANSWER, "batch_size": ROWS}
    plan = Full().plan(talk.model, **sizes)
    return Talk(plan, talk.model, talk.weights).hear(talk.texts, chunk=None)


# What a turn sees ---------------------------------------------------------------------


VARIANTS = {
    "sliding window": dataclasses.replace(MODEL.config, sliding_window=20),
    "learned positions": dataclasses.replace(
        MODEL.config,
        kv_heads=TINY.heads,
        positions="learned",
        norm="layer",
        gated=False,
        qkv_bias=True,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_turn_of_full_is_a_prefill_of_everything_in_any_model(name):
    model = Decoder(VARIANTS[name], chunk=8)
    weights = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.3))
    plan = Full().plan(model, prompt=90, new_tokens=ANSWER, batch_size=ROWS)
    talk = Talk(plan, model, weights)
    for turn in range(3):
        talk.hear(said(turn))
    np.testing.assert_allclose(talk.logits[-1], whole(talk).logits[-1], atol=1e-5)


@functools.cache
def full_talk() -> Talk:
    return talked(roomy("full"), 2)


@pytest.mark.compat
def test_a_turn_of_full_is_a_prefill_of_everything():
    talk, once = full_talk(), whole(full_talk())
    np.testing.assert_allclose(talk.logits[-1], once.logits[-1], atol=1e-5)
    for layer in range(MODEL.config.layers):
        for row in range(ROWS):
            one, other = talk.held(layer, row), once.held(layer, row)
            assert [*one] == [*other] == [*range(talk.lengths[row])]
            np.testing.assert_allclose([*one.values()], [*other.values()], atol=1e-5)


ROOMY = ("streaming_llm", "snapkv query", "pyramidkv", "windowkv")


@pytest.mark.parametrize("name", ROOMY)
def test_a_policy_that_can_hold_everything_is_full(name):
    talk = talked(roomy(name), 2)
    assert talk.texts == full_talk().texts
    np.testing.assert_allclose(talk.logits, full_talk().logits, atol=1e-5)
    for row, length in enumerate(talk.lengths):
        assert [*talk.held(0, row)] == [*range(length)]


def test_one_layer_sees_what_it_holds_and_the_new_tokens():
    """In a cache by whose places keys turn; so it may as well be given those alone."""
    model = Decoder(dataclasses.replace(MODEL.config, layers=1))
    weights = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.3))
    policy = StreamingLLM(capacity=12)
    plan = policy.plan(model, prompt=60, new_tokens=ANSWER, batch_size=ROWS)
    talk = Talk(plan, model, weights).hear(said(0))
    kept = [[*talk.held(0, row)] for row in range(ROWS)]
    assert [len(row) for row in kept] == [12, 12, 3]
    alone = [[text[at] for at in row] for text, row in zip(talk.texts, kept)]
    alone = [row + more for row, more in zip(alone, said(1))]
    sizes: Any = {"prompt": 40, "new_tokens": 0, "batch_size": ROWS}
    once = Talk(Full().plan(model, **sizes), model, weights).hear(alone)
    np.testing.assert_allclose(
        talk.hear(said(1)).logits[-1], once.logits[-1], atol=1e-5
    )


@every_policy
def test_rows_are_read_alone(name):
    """Others say something else, and more or less of it."""
    talk, other = talked(plan_of(name), 2), Talk(plan_of(name))
    for turn, rows in enumerate(([40, 2, 31], [9, 11, 1])):
        words = [[7] * n for n in rows]
        other.hear([said(turn)[0], *words[1:]])
        if not turn:
            other.answer()
    assert other.texts[0] == talk.texts[0]
    np.testing.assert_array_equal(other.logits[-1][0], talk.logits[-1][0])
    for layer in range(talk.plan.layers):
        one, another = talk.held(layer, 0), other.held(layer, 0)
        assert [*one] == [*another]
        np.testing.assert_array_equal([*one.values()], [*another.values()])


def test_padding_is_neutral():
    narrow, wide = talked(plan_of("windowkv"), 2), talked(plan_of("windowkv"), 1)
    wide.answer().hear(said(1), chunk=WIDTH + 5)
    np.testing.assert_allclose(wide.logits[-1], narrow.logits[-1], atol=1e-5)
    for layer in range(4):
        for row in range(ROWS):
            assert [*wide.held(layer, row)] == [*narrow.held(layer, row)]


def test_what_lies_in_the_padding_is_never_looked_at():
    plan, talk = plan_of("snapkv"), talked(plan_of("snapkv"), 1).answer()
    (tokens, lengths), random = pad_rows(said(1)), np.random.default_rng(3)
    junk = random.integers(0, TINY.vocab_size, tokens.shape)
    there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    before = jnp.asarray(talk.lengths, jnp.int32)
    found = []
    for given in (tokens, jnp.where(there, tokens, jnp.asarray(junk, jnp.int32))):
        cache = jax.tree.map(jnp.copy, talk.cache)
        found.append(read_on(MODEL, params(), given, before, lengths, cache, plan))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1].positions, found[1][1].positions)


def test_cudnn_is_given_the_same_to_see(monkeypatch):
    """Its layout and its mask, by the definition that stands in for it on the CPU."""
    plain, asked = jax.nn.dot_product_attention, []

    def stand_in(*arrays, implementation, **settings):
        asked.append(implementation)
        settings.pop("is_causal", None)
        return plain(*arrays, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    plan, talk = plan_of("snapkv"), talked(plan_of("snapkv"), 1)
    model = dataclasses.replace(MODEL, attention="cudnn")
    other = Talk(plan, model)
    other.texts, other.cache = talk.texts, jax.tree.map(jnp.copy, talk.cache)
    talk.hear(said(1))
    other.hear(said(1))
    assert asked == ["cudnn"]
    np.testing.assert_allclose(other.logits[-1], talk.logits[-1], atol=1e-5)


# What is kept -------------------------------------------------------------------------


@every_policy
def test_five_turns_keep_their_bytes_and_the_end_and_compile_once(name):
    plan = plan_of(name, prompt=150 if name == "full" else 60)
    talk = talked(plan, 1, weights=params(silent=True))
    nbytes = sum(leaf.nbytes for leaf in talk.cache)
    assert nbytes == plan.bytes()
    compiled = 0
    for turn in range(1, len(TURNS)):
        talk.answer().hear(said(turn))
        compiled = compiled or reading._read_on.jit()._cache_size()
        assert sum(leaf.nbytes for leaf in talk.cache) == nbytes
        for layer in range(plan.layers):
            for row, length in enumerate(talk.lengths):
                found = [*talk.held(layer, row)]
                recent = min(plan.policy.recent, length)
                last = range(length - min(recent, plan.tail), length)
                assert set(last) <= set(found) <= set(range(length))
                assert len(found) <= plan.sizes[layer]
                assert set(range(min(plan.sinks, length))) <= set(found)
    assert reading._read_on.jit()._cache_size() == compiled
    assert (name == "full") == ([*talk.held(0, 0)] == [*range(talk.lengths[0])])
    # Blocks that add nothing make each key of its token and position alone.
    once = whole(talk)
    inside = plan.policy.rope == "cache"
    for layer in range(plan.layers):
        for row in range(ROWS):
            for head in range(plan.heads):
                expected = once.held(layer, row, head * TINY.kv_heads // plan.heads)
                for at, numbers in talk.held(layer, row, head).items():
                    same = slice(TINY.head_dim if inside else 0, None)  # unturned keys
                    np.testing.assert_allclose(
                        numbers[same], expected[at][same], atol=1e-5
                    )


def test_a_turn_selects_by_its_own_queries():
    """Of the list of held and new tokens, in float64."""
    policy = SnapKV(capacity=14, window=6, kernel=3)
    model = Decoder(dataclasses.replace(MODEL.config, layers=1))
    weights = jax.tree.map(jnp.asarray, random_params(model.config, scale=0.3))
    plan = policy.plan(model, prompt=60, new_tokens=ANSWER, batch_size=ROWS)
    talk = Talk(plan, model, weights).hear(said(0)).answer()
    before = [
        {head: [*talk.held(0, row, head)] for head in (0, 1)} for row in range(ROWS)
    ]
    talk.hear(said(1))

    def attend(q, k, v, rope, positions, layer, carry):
        return jnp.zeros_like(q), (rope(q, positions), rope(k, positions))

    @jax.jit
    def turned(tokens):
        positions = token_positions(tokens)
        x = model.embed(weights, tokens, positions)
        block = jax.tree.map(lambda leaf: leaf[0], weights["blocks"])
        ops = Ops(attend, dense)
        return model.block(block, x, positions, jnp.int32(0), ops, None)[1]

    turned_rows = turned(pad_rows(talk.texts)[0])
    for row, text in enumerate(talk.texts):
        q, k = (np.asarray(x[row], np.float64) for x in turned_rows)
        new = len(said(1)[row])
        for head in (0, 1):
            places = before[row][head] + [*range(len(text) - new, len(text))]
            total, start = len(places), len(places) - 6
            mass = np.zeros((2, start))
            for step in range(max(total - 6, total - new), total):
                for group in (0, 1):
                    keys = k[places[: step + 1], head]
                    raw = keys @ q[places[step], 2 * head + group] / np.sqrt(8)
                    mass[group] += (np.exp(raw) / np.exp(raw).sum())[:start]
            mean = np.pad(mass.mean(axis=0), 1, constant_values=-np.inf)
            pooled = np.max([mean[:-2], mean[1:-1], mean[2:]], axis=0)
            best = np.sort(np.argsort(-pooled, kind="stable")[:8])
            expected = [places[at] for at in best] + places[start:]
            kept = [*talk.held(0, row, head)]
            # A plateau of the maximum may be cut at either end, in other arithmetic.
            lost = [places.index(at) for at in set(expected) - set(kept)]
            gained = [places.index(at) for at in set(kept) - set(expected)]
            assert len(lost) == len(gained) <= 1
            np.testing.assert_allclose(pooled[lost], pooled[gained], rtol=1e-5)


@pytest.mark.parametrize(
    "name, more",
    [
        ("windowkv", {}),
        ("windowkv", {"prompt": 17, "capacity": 100}),  # slots for no whole windows
        ("windowkv aggregation", {}),
    ],
)
def test_a_group_of_layers_keeps_the_same_windows(name, more):
    plan = plan_of(name, **more)
    group, differ = plan.policy.group, 0
    talk = Talk(plan)
    for turn in range(3):
        before = talk.lengths
        lists = [[*talk.held(0, row)] for row in range(ROWS)]
        talk.hear(said(turn))
        for row in range(ROWS):
            layers = [[*talk.held(layer, row)] for layer in range(plan.layers)]
            for layer in range(plan.layers):
                assert layers[layer] == layers[layer // group * group]
            differ += layers[0] != layers[-1]
            if not turn:  # in chunks, each with a list of its own
                continue
            # Whole windows of the list, but for its end.
            places = lists[row] + [*range(before[row], talk.lengths[row])]
            start = len(places) - min(plan.recent, len(places))
            chosen = [places.index(at) for at in layers[0] if at in places[:start]]
            size = plan.policy.window
            for place in chosen:
                window = range(place // size * size, place // size * size + size)
                assert {at for at in window if at < start} <= set(chosen)
        talk.answer()
    assert differ


@pytest.mark.parametrize("name", ["snapkv", "windowkv"])
def test_more_than_the_plan_s_prompt_to_choose_from(name):
    """A plan that cut the policy to a short prompt fills its slots, no more."""
    plan = plan_of(name, prompt=17, capacity=100)
    talk = Talk(plan).hear([row[:17] for row in said(0)], chunk=17)
    for row, length in enumerate((17, 17, 3)):
        assert len(talk.held(0, row)) == length
    talk.hear([said(3)[0]] * ROWS, chunk=17)
    window = plan.policy.window if "windowkv" in name else 1
    for layer in range(plan.layers):
        for row in range(ROWS):
            found = len(talk.held(layer, row))
            whole = min(17, talk.lengths[row])
            # The last window of the list may be short, and what is left over too.
            assert whole - 2 * (window - 1) <= found <= whole


@every_policy
def test_a_row_that_says_nothing_stays_as_it_is(name):
    talk = talked(plan_of(name), 1).answer()
    before = {layer: talk.held(layer, 1) for layer in range(4)}
    tokens, _ = pad_rows(said(1))
    lengths = jnp.asarray([9, 0, 12], jnp.int32)
    at = jnp.asarray(talk.lengths, jnp.int32)
    _, talk.cache = read_on(MODEL, params(), tokens, at, lengths, talk.cache, talk.plan)
    for layer, held in before.items():
        after = talk.held(layer, 1)
        assert [*after] == [*held]
        for place, numbers in held.items():
            np.testing.assert_array_equal(after[place], numbers)


def test_a_row_that_has_stopped_leaves_its_cache_alone():
    """Else a ring would lose its oldest tokens to repeated stop tokens."""
    plan, lengths = plan_of("streaming_llm"), jnp.asarray(TURNS[0], jnp.int32)
    free = talked(plan, 1).answer()
    stop = free.texts[0][TURNS[0][0] + 1]
    first = talked(plan, 1)
    _, first.cache = extend(
        *(MODEL, params(), jnp.asarray(first.logits[-1]), lengths, first.cache),
        jax.random.key(0),
        plan=plan,
        steps=ANSWER,
        stop_tokens=(stop,),
    )
    made = free.texts[0][TURNS[0][0] :]
    first.texts[0] += made[: made.index(stop) + 1]
    short = talked(plan, 1).answer(len(first.texts[0]) - TURNS[0][0])
    for layer in range(plan.layers):
        one, other = first.held(layer, 0), short.held(layer, 0)
        assert [*one] == [*other]
        np.testing.assert_allclose([*one.values()], [*other.values()], atol=1e-5)


def test_the_kernel_reads_what_a_turn_has_left(monkeypatch):
    """By its definition; its slots come in eights."""
    monkeypatch.setattr(WindowKV, "attention", lambda *_: "mosaic_gpu")
    plan = plan_of("windowkv")
    assert not any(size % 8 for size in plan.sizes)
    plain = dataclasses.replace(plan, attention="xla")
    talk = talked(plain, 2)
    before, logits = jax.tree.map(jnp.copy, talk.cache), talk.logits[-1]
    expected = talk.answer().texts

    def definition(*arrays, implementation, **settings):
        assert implementation == "mosaic_gpu"
        return windowed_attention(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(cache_module, "windowed_attention", definition)
    kernel = Talk(plan)
    kernel.texts = [text[:-ANSWER] for text in expected]
    kernel.cache, kernel.logits = before, [logits]
    assert kernel.answer().texts == expected


# Long prompts in pieces ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming_llm", "windowkv"])
def test_a_single_chunk_is_a_prefill(name):
    """Several are none but where all is kept, as in the tests above."""
    found = Talk(plan_of(name)).hear(said(0), chunk=45)
    once = Talk(plan_of(name)).hear(said(0), chunk=None)
    np.testing.assert_allclose(found.logits, once.logits, atol=1e-5)
    for layer in range(4):
        for row in range(ROWS):
            one, other = found.held(layer, row), once.held(layer, row)
            assert [*one] == [*other]
            np.testing.assert_allclose([*one.values()], [*other.values()], atol=1e-5)


def test_chunks_of_any_prompt_are_one_program():
    plan, compiled = plan_of("snapkv"), set()
    for lengths in ((40, 23, 3), (8, 60, 59), (1, 1, 300)):
        talk = Talk(plan).hear([[5] * length for length in lengths])
        compiled.add(reading._read_on.jit()._cache_size())
        for row, length in enumerate(lengths):
            found = [*talk.held(3, row)]
            assert len(found) == min(length, 20)
            assert found[-min(length, 6) :] == [*range(length - min(length, 6), length)]
    assert len(compiled) == 1


# Bytes and refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, attention",
    [pytest.param("full", "cudnn", marks=pytest.mark.compat), ("windowkv", "xla")],
)
def test_a_turn_never_copies_the_cache(name, attention):
    """For an H200: a donated cache, and the lists of one layer's keys and values.

    Of so many rows that the 32 MiB which cuBLAS gets do not count.
    """
    config = dataclasses.replace(
        TINY, layers=16, hidden=64, head_dim=64, kv_heads=4, max_positions=4096
    )
    model = Decoder(config, dtype=jnp.bfloat16, attention=attention)
    policy = POLICIES[name]
    if name != "full":
        policy = dataclasses.replace(policy, capacity=512)
    plan = policy.plan(model, prompt=1024, new_tokens=256, batch_size=16)
    analysis = (
        read_on_program(model, plan, tokens=64)
        .compile(resolve("h200"))
        .memory_analysis()
    )
    assert analysis.alias_size_in_bytes == plan.bytes()
    assert analysis.temp_size_in_bytes < plan.bytes() / 3  # of 16 layers


def test_refuses_what_finds_no_slots():
    ints = functools.partial(np.asarray, dtype=np.int32)
    full, snap = plan_of("full"), plan_of("snapkv")
    check_turn(full, ints([50, 3, 1]), ints([10, 1, 1]), 5)
    with pytest.raises(ValueError, match=r"row 0 comes to 61 tokens and 5 .* 65 slots"):
        check_turn(full, ints([50, 3, 1]), ints([11, 1, 1]), 5)
    check_turn(snap, ints([500] * 3), ints([70] * 3), 5)
    with pytest.raises(ValueError, match=r"6 new tokens and 6 recent ones need 12"):
        check_turn(snap, ints([500] * 3), ints([70] * 3), 6)
    short = plan_of("snapkv", prompt=4)
    with pytest.raises(ValueError, match=r"row 1 comes to 6 tokens .* SnapKV keeps"):
        check_turn(short, ints([1, 3, 1]), ints([1, 3, 1]), 4)
    rolls = plan_of("streaming_llm")
    check_turn(rolls, ints([500] * 3), ints([70] * 3), 10**6)


def refused(message: str, **changes):
    plan = changes.pop("plan", plan_of("full"))
    tokens, lengths = pad_rows(said(1))
    given: dict = {
        "tokens": tokens,
        "before": jnp.full((len(lengths),), 10, jnp.int32),
        "lengths": lengths,
        "cache": make_empty(plan),
    }
    with pytest.raises(ValueError, match=message):
        read_on(MODEL, params(), **(given | changes), plan=plan)


def test_refuses_what_is_not_the_plan_s():
    refused("tokens have 3 rows .* batch_size=2", plan=plan_of("full", rows=2))
    refused(r"keys \(3, 2, 20, 8\), but the plan's", cache=make_empty(roomy_keys()))
    refused(
        r"lengths=\[9, 1, 13\] must lie in \[0, 12\]", lengths=jnp.array([9, 1, 13])
    )
    refused("row 2 comes to 72 tokens", before=jnp.array([10, 10, 60]))


def roomy_keys() -> PolicyPlan:
    model = Decoder(dataclasses.replace(MODEL.config, layers=1))
    return Full().plan(model, prompt=15, new_tokens=5, batch_size=ROWS)


def test_prefill_refuses_what_is_not_the_plan_s():
    plan = plan_of("full")
    tokens, lengths = pad_rows(said(0))

    def given(lengths, plan, tokens=tokens):
        prefill(MODEL, params(), tokens, lengths, (make_empty(plan),), (plan,))

    with pytest.raises(ValueError, match=r"row 0 has 40 tokens, .* prompt=39"):
        given(lengths, plan_of("full", prompt=39))
    with pytest.raises(ValueError, match=r"3 rows .* batch_size=2"):
        given(lengths, plan_of("full", rows=2))
    for wrong in ([40, 23, 0], [41, 23, 3]):
        with pytest.raises(ValueError, match=r"must lie in \[1, 40\]"):
            given(jnp.asarray(wrong), plan)


# What a policy may read besides -------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        Rope(head_dim=8),
        Rope(head_dim=8, rotary_dim=4),
        Rope(head_dim=8, scaling=YarnScaling(factor=4.0, original_max_positions=16)),
        Rope(head_dim=8, rotary_dim=0),
    ],
    ids=["all", "part", "yarn", "none"],
)
@pytest.mark.parametrize("units", [1, 2])
def test_keys_are_turned_back_to_what_they_were(rope, units):
    random = np.random.default_rng(units)
    keys = random.standard_normal((3, 9, 2, 8), np.float32)
    positions = random.integers(0, 300, (3, units, 9), np.int32)

    @jax.jit
    def turn_and_back(keys, positions):
        at = jnp.broadcast_to(positions, (3, 2, 9))
        turned = [rope(keys[:, :, h : h + 1], at[:, h]) for h in range(2)]
        return unrotate(rope, jnp.concatenate(turned, axis=2), positions)

    found = turn_and_back(keys, positions)
    # An angle of 300 in float32 is off by some 2e-5.
    np.testing.assert_allclose(found, keys, atol=2e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByNorms(SnapKV):
    """Scores by the norms of values and of keys before rotation."""

    def scores(self, seen, layer):
        norms = [jnp.abs(x).sum(axis=-1) for x in (seen.values, seen.unrotated)]
        first = seen.unrotated[:, :, :, 0]
        return jnp.swapaxes(norms[0] - norms[1] + 3 * first, 1, 2)


@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_a_turn_offers_the_same_keys_and_values_as_a_prompt(positions):
    """Blocks that add nothing have the same ones however the text is read."""
    kind = type("Kind", (ByNorms,), {"rope": positions})
    plan = kind(capacity=20, window=6).plan(MODEL, prompt=32, new_tokens=6)
    random = np.random.default_rng(4)
    tokens = jnp.asarray(random.integers(0, TINY.vocab_size, (1, 32)), jnp.int32)
    twelve, rest = jnp.array([12]), jnp.array([20])
    model, weights = MODEL, params(silent=True)
    given = model, weights, tokens, jnp.array([32]), (make_empty(plan),), (plan,)
    _, (expected,) = prefill(*given)
    given = model, weights, tokens[:, :12], twelve, (make_empty(plan),), (plan,)
    _, (cache,) = prefill(*given)
    _, cache = read_on(model, weights, tokens[:, 12:], twelve, rest, cache, plan)
    np.testing.assert_array_equal(cache.positions, expected.positions)
    assert len(np.unique(expected.positions)) > plan.selected[0]
