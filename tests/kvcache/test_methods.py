"""What every cache and every way to shorten a prompt promises, ours or anybody's."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.evaluate.decoding import answer_prompts
from jmem.generate.conversation import Conversation
from jmem.generate.decode import generate
from jmem.generate.programs import decode_program, prefill_program
from jmem.generate.reading import prefill, prefill_for_all
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.members import CACHES, SHORTENS
from jmem.kvcache.method import CacheMethod, Read
from jmem.kvcache.plan import Plan
from jmem.kvcache.prefill import read_prompts
from jmem.kvcache.select import select
from jmem.kvcache.shorten import Shorten
from jmem.kvcache.snapkv import SnapKV
from jmem.models.decoder import Decoder
from jmem.nn.attention import grouped_attention
from jmem.nn.stack import run_stack
from jmem.offload import fetch, fetch_row, on_host, store_row

MODEL = Decoder(dataclasses.replace(TINY, layers=4))
LENGTHS = np.array([50, 37, 8], np.int32)
STEPS = 6


@functools.cache
def params() -> dict:
    return jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))


@functools.cache
def prompts() -> np.ndarray:
    """Rows padded on the right with what must not matter."""
    tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (3, 50))
    there = np.arange(50)[None] < LENGTHS[:, None]
    return np.where(there, tokens, 1).astype(np.int32)


def rows() -> list[list[int]]:
    return [prompts()[row, :n].tolist() for row, n in enumerate(LENGTHS)]


# A method of another kind -------------------------------------------------------------


class Parted(NamedTuple):
    """Keys on the device and values on the host, of all layers; not what they are of.

    Whoever has no use for a layout of slots needs none of `jmem.kvcache.cache`.
    """

    keys: jax.Array
    values: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartedPlan(Plan):
    shape: tuple[int, ...]
    """[L, B, K, prompt + new_tokens, D]"""
    dtype: Any

    @property
    def method(self) -> "HostValues":
        return HostValues()

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        batch = (self.shape[0], self.batch_size, *self.shape[2:])
        array = jax.ShapeDtypeStruct(batch, self.dtype)
        return {"keys": array, "values": on_host(array)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostValues(CacheMethod):
    """A full cache whose values lie in host memory, a layer of which is fetched."""

    own_attention: bool = False

    def plan(
        self, model, *, prompt, new_tokens, batch_size=1, target=None
    ) -> PartedPlan:
        config, slots = model.config, prompt + new_tokens
        size = config.layers, batch_size, config.kv_heads, slots, config.head_dim
        return PartedPlan(
            batch_size=batch_size,
            prompt=prompt,
            new_tokens=new_tokens,
            shape=size,
            dtype=jnp.dtype(model.dtype),
        )

    def begin(self, plan) -> Parted:
        return Parted(**plan.zeros())

    def keep(self, plan, read: Read, cache: Parted, shared: Any) -> tuple[Parted, Any]:
        row = fetch_row(cache, read.layer)
        new = Parted(*(jnp.swapaxes(x, 1, 2) for x in (read.keys, read.values)))
        put = jax.tree.map(
            lambda own, x: jax.lax.dynamic_update_slice(own, x, (0, 0, 0, 0)), row, new
        )
        return store_row(cache, read.layer, put), shared

    def decode(self, plan, cache, model, positions, places=None):
        at, last = jnp.arange(plan.batch_size), positions if places is None else places
        turn = model.config.rope.at(positions[:, None])

        def attend(q, k, v, rope, positions, layer, cache):
            row = fetch_row(cache, layer)
            new = Parted(turn(k)[:, 0], v[:, 0])
            row = jax.tree.map(lambda own, x: own.at[at, :, last].set(x), row, new)
            seen = jnp.arange(plan.shape[3])[None, None] <= last[:, None, None]
            out = grouped_attention(turn(q), row.keys, row.values, seen)
            return out, store_row(cache, layer, row)

        return attend

    def join(self, caches: list[Parted]) -> Parted:
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *map(fetch, caches))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnAttention(SnapKV):
    """Attends a prompt in its own way: every token sees itself alone, and then all."""

    def prefill(self, plan, lengths, model):
        plain = read_prompts(model, (), lengths)

        def attend(q, k, v, rope, positions, layer, carry):
            read = Read(rope(q, positions), rope(k, positions), k, v, lengths, layer)
            out, _ = plain(q, k, v, rope, positions, layer, ())
            return 2 * out, self.keep(plan, read, *carry)

        return attend


def test_a_cache_of_another_kind_goes_through_the_same_doors():
    method = HostValues()
    options: dict[str, Any] = {"max_new_tokens": STEPS}
    expected = generate(MODEL, params(), rows(), **options)
    assert generate(MODEL, params(), rows(), policy=method, **options) == expected
    sizes: Any = {"prompt": 50, "new_tokens": STEPS, "batch_size": 3}
    plans = {"full": Full().plan(MODEL, **sizes), "parted": method.plan(MODEL, **sizes)}
    given = MODEL, params(), plans, prompts(), LENGTHS
    for name, found in answer_prompts(*given, steps=STEPS, rows=1).items():
        assert found.tolist() == expected, name


@pytest.mark.parametrize("program", [prefill_program, decode_program])
def test_bytes_in_both_memories_are_the_compiler_s(program):
    config = dataclasses.replace(TINY, head_dim=64)
    model = Decoder(config, dtype=jnp.bfloat16)
    plan = HostValues().plan(model, prompt=64, new_tokens=16, batch_size=2)
    report = jmem.measure(program(model, plan), bounds=False)
    assert plan.places() == {"keys": "device", "values": "host"}
    assert report.host_bytes == plan.host_bytes() == plan.bytes() // 2
    assert report.by_label["kv cache"] == plan.device_bytes()


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("name", list(CACHES))
def test_the_bytes_of_every_cache_are_the_compiler_s(name):
    model = Decoder(dataclasses.replace(TINY, layers=4), dtype=jnp.bfloat16)
    plan = CACHES[name].plan(model, prompt=50, new_tokens=12, batch_size=2)
    analysis = decode_program(model, plan).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == plan.device_bytes()
    assert plan.host_bytes() == analysis.host_alias_size_in_bytes == 0


def test_what_a_method_cannot_do_is_refused():
    method = HostValues()
    plan = method.plan(MODEL, prompt=50, new_tokens=STEPS)
    with pytest.raises(ValueError, match="HostValues reads no further tokens"):
        generate(
            MODEL, params(), rows(), max_new_tokens=2, policy=method, prompt_chunk=4
        )
    talk = Conversation(MODEL, params(), method, prompt=50, max_new_tokens=2)
    with pytest.raises(ValueError, match="HostValues reads no further tokens"):
        talk.say([[1, 2, 3]])
    given = MODEL, params(), jnp.ones((1, 60), jnp.int32), jnp.array([60])
    with pytest.raises(ValueError, match=r"row 0 has 60 tokens, .* prompt=50"):
        prefill(*given, (method.begin(plan),), (plan,))
    given = MODEL, params(), jnp.ones((1, 4), jnp.int32), jnp.array([4])
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), method.begin(plan))
    with pytest.raises(ValueError, match=r"has keys .*bfloat16, .* have float32"):
        prefill(*given, (other,), (plan,))
    with pytest.raises(ValueError, match=r"keys .*no such array, .* plan's have \(4"):
        prefill(*given, ({"k": other.keys},), (plan,))


def test_a_method_that_attends_in_its_own_way_reads_alone():
    given = MODEL, params(), jnp.asarray(prompts()), jnp.asarray(LENGTHS)
    plans = tuple(
        policy.plan(MODEL, prompt=50, new_tokens=0, batch_size=3)
        for policy in (OwnAttention(capacity=20, window=4), Full())
    )
    logits = []
    for plan in plans:
        after, _ = prefill(*given, (plan.method.begin(plan),), (plan,))
        logits.append(np.asarray(after))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    caches = tuple(plan.method.begin(plan) for plan in plans)
    with pytest.raises(ValueError, match="OwnAttention attends a prompt in its own"):
        prefill(*given, caches, plans)
    shorten = GemFilter(layer=1, tokens=9)
    with pytest.raises(ValueError, match="OwnAttention attends a prompt in its own"):
        prefill_for_all(*given, caches[:1], plans[:1], (shorten,))


# Ways to shorten ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongestKeys(Shorten):
    """Keeps the tokens whose keys are longest in one layer."""

    tokens: int = 12
    layer: int = 1

    def choose(self, model, params, tokens, lengths):
        def keep(read, kept):
            mine = read.layer == self.layer
            return jnp.where(mine, self.norms(read), kept[0]), self.follow(
                read, kept[1]
            )

        attend = read_prompts(model, (), lengths, (keep,))
        start = jnp.zeros(tokens.shape, jnp.float32), self.begin(tokens)
        x, positions = model.embed(params, tokens), jnp.arange(tokens.shape[1])
        positions = jnp.broadcast_to(positions.astype(jnp.int32)[None], tokens.shape)
        ops, last = model.ops._replace(attend=attend), self.layer + 1
        given = model.block, params["blocks"], x, positions, ops, (start,)
        (scores, chosen) = run_stack(*given, last=last)[1][0]
        return chosen, scores

    def norms(self, read: Read) -> jax.Array:
        keys = read.unrotated.astype(jnp.float32)
        there = jnp.arange(keys.shape[1])[None] < read.lengths[:, None]
        return jnp.where(there, jnp.linalg.norm(keys, axis=-1).sum(axis=-1), -jnp.inf)

    def follow(self, read, chosen):
        best = select(self.norms(read)[:, None], jnp.int32(self.tokens), self.tokens)
        best = best[:, 0, : chosen.shape[1]]
        return jnp.where(read.layer == self.layer, best, chosen)


MEMBERS: dict[str, Shorten] = {**SHORTENS, "longest keys": LongestKeys()}
every_shorten = pytest.mark.parametrize("name", list(MEMBERS))


@functools.cache
def read_by_all():
    """Full caches of all rows and what every member keeps: one pass."""
    plan = Full().plan(MODEL, prompt=50, new_tokens=STEPS, batch_size=3)
    given = MODEL, params(), jnp.asarray(prompts()), jnp.asarray(LENGTHS)
    caches, members = (plan.method.begin(plan),), tuple(MEMBERS.values())
    return prefill_for_all(*given, caches, (plan,), members)


def test_the_lists_hold_every_member():
    """Of the package's own: a method of one's own joins no list."""

    def kinds(base: type) -> set[type]:
        below = {base} | {kind for sub in base.__subclasses__() for kind in kinds(sub)}
        ours = {kind for kind in below if kind.__module__.startswith("jmem.")}
        return {kind for kind in ours if not inspect.isabstract(kind)}

    for base, members in ((CacheMethod, CACHES), (Shorten, SHORTENS)):
        assert {type(member) for member in members.values()} == kinds(base)
        assert len({*map(repr, members.values())}) == len(members)


@every_shorten
def test_a_pass_of_its_own_and_a_shared_one_keep_the_same(name):
    shorten, row = MEMBERS[name], list(MEMBERS).index(name)
    short = shorten.shorten(
        MODEL, params(), jnp.asarray(prompts()), jnp.asarray(LENGTHS)
    )
    found = np.asarray(read_by_all().chosen[row])
    np.testing.assert_array_equal(found, short.positions)
    assert found.shape == (3, min(shorten.tokens, 50))
    for positions, length in zip(found, LENGTHS, strict=True):
        kept = positions[positions >= 0].tolist()
        assert kept == sorted(set(kept))
        assert set(kept) <= {*range(length)}
        if length <= shorten.tokens:
            assert kept == [*range(length)]
        else:  # of whole windows the prompt's last may hold fewer
            assert shorten.tokens // 2 < len(kept) <= shorten.tokens
    scores = np.asarray(short.scores)
    there = np.arange(50)[None] < LENGTHS[:, None]
    np.testing.assert_array_equal(np.isfinite(scores), there)
    kept = [[int(prompts()[b, p]) for p in found[b] if p >= 0] for b in range(3)]
    assert short.prompts() == kept


@every_shorten
def test_rows_are_shortened_alone_and_padding_is_neutral(name):
    shorten = MEMBERS[name]
    together = shorten.shorten(
        MODEL, params(), jnp.asarray(prompts()), jnp.asarray(LENGTHS)
    )
    for row, length in enumerate(LENGTHS):
        own = jnp.asarray(prompts()[row : row + 1, :length])
        alone = shorten.shorten(MODEL, params(), own, jnp.array([length]))
        assert alone.prompts()[0] == together.prompts()[row]


@every_shorten
def test_what_is_not_its_own_is_refused(name):
    given = MEMBERS[name].shorten, MODEL, params()
    for tokens, lengths, message in (
        (jnp.ones((1, 129), jnp.int32), [129], "129 tokens a row exceed .*=128"),
        (jnp.ones((1, 4), jnp.int32), [5], r"lengths=\[5\] must lie in \[1, 4\]"),
        (jnp.full((1, 4), 48), [4], "token 48 at place 0 of row 0 is outside"),
    ):
        with pytest.raises(ValueError, match=f"shorten: {message}"):
            given[0](*given[1:], tokens, jnp.array(lengths, jnp.int32))
    broken = params() | {
        "embed": {"embedding": params()["embed"]["embedding"] + jnp.nan}
    }
    with pytest.raises(ValueError, match=r"scores of .* are not finite, first"):
        given[0](MODEL, broken, jnp.asarray(prompts()), jnp.asarray(LENGTHS))


# How often a prompt is read -----------------------------------------------------------


class Counting(Decoder):
    """Notes how many tokens a row each of its passes reads."""

    def embed(self, params, tokens, positions=None):
        jax.debug.callback(functools.partial(WIDTHS.append, tokens.shape[1]))
        return super().embed(params, tokens, positions)


WIDTHS: list[int] = []


def test_a_prompt_is_read_once_for_all_budgets_and_filters():
    model = Counting(MODEL.config)
    sizes: Any = {"prompt": 50, "new_tokens": 1, "batch_size": 3}
    caches = ("full", "streaming_llm", "snapkv", "windowkv")  # each is compiled
    plans = {name: CACHES[name].plan(model, **sizes) for name in caches}
    filters = {name: MEMBERS[name] for name in ("gemfilter", "longest keys")}
    WIDTHS.clear()
    answer_prompts(model, params(), plans, prompts(), LENGTHS, steps=1, filters=filters)
    jax.effects_barrier()
    assert sorted(width for width in WIDTHS if width > 1) == [9, 12, 50]
    assert WIDTHS.count(1) == len(plans) + len(filters)
