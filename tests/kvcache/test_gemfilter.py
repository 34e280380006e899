"""GemFilter: the official arrays, what it may read, and what it refuses."""

import dataclasses
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llama import llama, load
from tiny_decoder import TINY, random_params

import jmem
from jmem.generate.decode import decode_step, generate
from jmem.generate.reading import prefill
from jmem.kvcache.cache import make_empty
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import (
    GemFilter,
    StagedWeights,
    calibrate_filter_layer,
    choose_best,
    explain,
    score_tokens,
    split,
)
from jmem.kvcache.gemfilter import staged as module
from jmem.kvcache.snapkv import SnapKV
from jmem.memory.live import make_arguments
from jmem.models.decoder import Decoder
from jmem.nn.ops import Ops
from jmem.nn.quantised import KINDS, linear, unpack
from jmem.nn.stack import run_stack
from jmem.offload import count_host_bytes, on_device, on_host
from jmem.program import Program

GEM = GemFilter(layer=2, tokens=12)
CONFIG = dataclasses.replace(TINY, max_positions=42)
MODEL = Decoder(CONFIG)
LENGTHS = np.array([33, 7, 40], np.int32)
TOKENS = np.random.default_rng(5).integers(1, CONFIG.vocab_size, (3, 40))
TOKENS = np.where(np.arange(40) < LENGTHS[:, None], TOKENS, 0).astype(np.int32)
PROMPTS = [row[:n].tolist() for row, n in zip(TOKENS, LENGTHS)]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(CONFIG, scale=0.3))


votes = jax.jit(score_tokens, static_argnums=0)
choose = jax.jit(choose_best, static_argnums=0)


def shortened(params, gem=GEM, model=MODEL, rows=slice(None)):
    tokens, lengths = jnp.asarray(TOKENS[rows]), jnp.asarray(LENGTHS[rows])
    return gem.shorten(model, params, tokens, lengths)


# The official code's arrays -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_gqa", "short_prompt"])
def test_the_official_arrays(name):
    config, arrays = load(f"gemfilter__{name}")
    model, params = llama(config, arrays)
    gem = GemFilter(
        layer=config["filter_layer_index0"],
        tokens=config["topk"],
        kernel=config["pool_kernel"],
    )
    prompt = arrays["input_ids"]
    length = jnp.array([prompt.shape[1]], jnp.int32)
    short = gem.shorten(model, params, jnp.asarray(prompt), length)
    scores = np.asarray(short.scores[0])
    np.testing.assert_allclose(scores, arrays["pooled_scores"], atol=1e-3)
    order = np.argsort(-scores, kind="stable")[: config["topk"]]
    np.testing.assert_array_equal(order, arrays["topk_indices"])
    np.testing.assert_array_equal(short.positions[0], arrays["selected_positions"])
    np.testing.assert_array_equal(short.tokens, arrays["selected_ids"])

    kept = short.tokens.shape[1]
    plan = Full().plan(model, prompt=kept, new_tokens=config["decode_steps"])
    logits, (cache,) = prefill(
        model, params, short.tokens, short.lengths, (make_empty(plan),), plans=(plan,)
    )
    held = jax.device_get(cache)
    for layer, begin in enumerate(range(0, sum(plan.sizes), plan.sizes[0])):
        slots = slice(begin, begin + kept)
        for found, key in ((held.keys, "cache_k"), (held.values, "cache_v")):
            expected = arrays[key][layer]
            np.testing.assert_allclose(found[0, :, slots], expected, atol=1e-4)
    found = [np.asarray(logits)[0]]
    step = jax.jit(decode_step, static_argnames=("model", "plan"))
    for number, token in enumerate(arrays["decode_tokens"]):
        at = jnp.array([kept + number], jnp.int32)
        logits, cache = step(model, params, jnp.array([token]), at, cache, plan)
        found.append(np.asarray(logits)[0])
    np.testing.assert_allclose(np.stack(found), arrays["logits"], atol=1e-4)
    if kept == prompt.shape[1]:
        whole = arrays["full_prompt_last_logits"]
        np.testing.assert_allclose(found[0], whole, atol=1e-4)

    answer = [row.argmax() for row in found[:-1]]
    np.testing.assert_array_equal(answer, arrays["decode_tokens"])


# The same in NumPy --------------------------------------------------------------------


def pooled_scores(params, config, prompt, layer, kernel):
    """Of the paper's first pass, in float64: loops over heads, tokens and windows."""
    blocks = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["blocks"])
    x = np.asarray(params["embed"]["embedding"], np.float64)[prompt]
    length, dim = len(prompt), config.head_dim
    inverse = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
    angles = np.outer(np.arange(length), inverse)

    def norm(name, index, x):
        scale = blocks[name]["scale"][index]
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + config.rms_eps) * scale

    def heads(name, index, x, turned=True):
        y = x @ blocks["attention"][name]["kernel"][index]
        y = y.reshape(length, -1, dim)
        if turned:
            first, second = np.split(y, 2, axis=2)
            cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
            y = np.concatenate(
                [first * cos - second * sin, second * cos + first * sin], axis=2
            )
        return y

    def attended(index, x):
        normal = norm("attention_norm", index, x)
        return normal, heads("q", index, normal), heads("k", index, normal)

    for index in range(layer):
        normal, q, k = attended(index, x)
        v = heads("v", index, normal, turned=False)
        out = np.empty_like(q)
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            for token in range(length):
                raw = k[: token + 1, shared] @ q[token, head] / np.sqrt(dim)
                weights = np.exp(raw - raw.max())
                out[token, head] = weights / weights.sum() @ v[: token + 1, shared]
        x = x + out.reshape(length, -1) @ blocks["attention"]["o"]["kernel"][index]
        normal, mlp = norm("mlp_norm", index, x), blocks["mlp"]
        gate, up = (normal @ mlp[name]["kernel"][index] for name in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ mlp["down"]["kernel"][index]
    _, q, k = attended(layer, x)
    summed = np.zeros(length)
    for head in range(config.heads):
        summed += k[:, head * config.kv_heads // config.heads] @ q[-1, head]
    half = kernel // 2
    padded = np.pad(summed, half)
    return np.array([padded[t : t + kernel].sum() / kernel for t in range(length)])


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "length", "tokens", "layer", "kernel"),
    [
        (3, 4, 4, 50, 13, 1, 5),  # every head its own keys
        (4, 8, 2, 61, 20, 2, 3),  # four share them
        (2, 2, 1, 33, 32, 0, 7),  # one token to drop, from the first layer
        (5, 6, 3, 40, 7, 4, 1),  # the last layer, no neighbours
        (2, 4, 1, 19, 24, 1, 5),  # shorter than what is kept
        (3, 4, 2, 6, 4, 2, 7),  # shorter than the kernel
    ],
)
def test_the_algorithm_written_out_in_numpy(
    layers, heads, kv_heads, length, tokens, layer, kernel
):
    config = dataclasses.replace(
        TINY, layers=layers, heads=heads, kv_heads=kv_heads, rope_theta=500.0
    )
    params = random_params(config, scale=0.4, seed=length)
    random = np.random.default_rng(length)
    prompt = random.integers(0, config.vocab_size, length).astype(np.int32)
    gem = GemFilter(layer=layer, tokens=tokens, kernel=kernel)
    given = jnp.asarray(prompt[None]), jnp.array([length])
    short = gem.shorten(Decoder(config), params, *given)
    expected = pooled_scores(params, config, prompt, layer, kernel)
    spread = expected.std()
    np.testing.assert_allclose(short.scores[0], expected, atol=1e-4 * spread)
    order = np.sort(expected)[::-1]
    if tokens < length:  # or float32 could choose otherwise
        assert order[tokens - 1] - order[tokens] > 3e-4 * spread
    kept = np.sort(np.argsort(-expected, kind="stable")[:tokens])
    np.testing.assert_array_equal(short.positions[0], kept)
    np.testing.assert_array_equal(short.tokens[0], prompt[kept])


def test_of_equal_scores_the_earlier_token_is_kept():
    scores = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = choose(GemFilter(tokens=3), scores, jnp.array([6]))
    np.testing.assert_array_equal(kept, [[1, 2, 3]])


# What the pass reads ------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, CONFIG.layers - 1])
def test_early_weights_choose_as_all_weights_do(layer):
    """They are all there is: nothing above the filter layer, nor its v, o and MLP."""
    gem = dataclasses.replace(GEM, layer=layer)
    weights = random_params(CONFIG, scale=0.3)
    early, _ = split(weights, layer)
    depths = {
        "/".join(entry.key for entry in path): len(leaf)
        for path, leaf in jax.tree.leaves_with_path(early["blocks"])
    }
    voting = {"attention_norm/scale", "attention/q/kernel", "attention/k/kernel"}
    assert voting == {name for name, rows in depths.items() if rows == layer + 1}
    assert set(depths.values()) == {layer, layer + 1}
    cut = early["blocks"]["attention"]["q"]["kernel"]
    assert np.shares_memory(cut, weights["blocks"]["attention"]["q"]["kernel"])
    found = shortened(on_device(early), gem)
    expected = shortened(on_device(weights), gem)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_program_does_not_depend_on_the_models_depth():
    deep = Decoder(dataclasses.replace(CONFIG, layers=50))
    programs = [GEM.program(m, prompt=40) for m in (MODEL, deep)]
    texts = {program.lower().as_text() for program in programs}
    assert len(texts) == 1
    early = jax.eval_shape(lambda p: split(p, GEM.layer)[0], deep.abstract())
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), programs[1].args[0])
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), early)
    args = make_arguments(programs[0], None)
    positions, scores = programs[0].compile()(*args)
    assert positions.shape == (1, GEM.tokens)
    assert scores.shape == (1, 40)


VARIANTS = {
    "window": dataclasses.replace(TINY, sliding_window=6),
    "gpt2": dataclasses.replace(
        TINY,
        kv_heads=TINY.heads,
        positions="learned",
        norm="layer",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
    "phi": dataclasses.replace(
        TINY, parallel=True, norm="layer", gated=False, rotary_dim=4, qkv_bias=True
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_scores_are_of_what_the_models_own_layer_attends_by(name):
    config = VARIANTS[name]
    model = Decoder(config, chunk=16)
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.3))
    positions = jnp.asarray(np.tile(np.arange(40, dtype=np.int32), (3, 1)))

    def attend(q, k, v, rope, positions, layer, carry):
        out, _ = MODEL_OPS.attend(q, k, v, rope, positions, layer, None)
        mine = rope(q, positions), rope(k, positions)
        keep = layer == GEM.layer
        return out, jax.tree.map(
            lambda new, old: jnp.where(keep, new, old), mine, carry
        )

    MODEL_OPS = Decoder(config).ops
    ops = Ops(attend, linear)
    block = Decoder(config).block

    @jax.jit
    def run(params):
        counts = config.heads, config.kv_heads
        carry = tuple(jnp.zeros((3, 40, n, config.head_dim)) for n in counts)
        x = model.embed(params, jnp.asarray(TOKENS), positions)
        return run_stack(block, params["blocks"], x, positions, ops, carry)[1]

    q, k = map(np.asarray, run(params))
    k = np.repeat(k, config.heads // config.kv_heads, axis=2)
    found = shortened(params, dataclasses.replace(GEM, kernel=1), model)
    scores = np.asarray(found.scores)
    for row, length in enumerate(LENGTHS):
        expected = np.einsum("hd,thd->t", q[row, length - 1], k[row, :length])
        # Sums of some hundred float32 products.
        np.testing.assert_allclose(scores[row, :length], expected, atol=1e-3)
        assert np.all(scores[row, length:] == -np.inf)


def test_packed_weights_choose_as_their_values_do(params):
    random = np.random.default_rng(0)

    def packed(kernel):
        layers, inputs, outputs = kernel.shape
        blocks = inputs // KINDS["Q8_0"].values
        scale = np.full((layers, outputs, blocks, 1), 0.003, np.float16)
        values = random.integers(-128, 128, (layers, outputs, blocks, 32), np.int8)
        parts = (scale.view(np.uint8), values.view(np.uint8))
        rows = np.concatenate(parts, axis=-1).reshape(layers, outputs, -1)
        flags = {"Q8_0": jnp.ones((layers,), bool)}
        return {"packed": jnp.asarray(rows), "kind": flags}

    attention = params["blocks"]["attention"]
    attention = {name: packed(leaf["kernel"]) for name, leaf in attention.items()}
    compact = params | {"blocks": params["blocks"] | {"attention": attention}}
    wide = jax.jit(unpack, static_argnums=1)(compact, jnp.float32)
    early, _ = split(compact, GEM.layer)
    found, expected = shortened(early), shortened(wide)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.positions, expected.positions)
    staged = StagedWeights(jax.tree.map(np.asarray, compact), GEM)
    with staged.filter_prompts(MODEL, PROMPTS) as (whole, short):
        jax.tree.map(np.testing.assert_array_equal, whole, compact)
        np.testing.assert_array_equal(short.positions, found.positions)


# What it keeps ------------------------------------------------------------------------


def test_rows_get_what_they_get_alone_in_chunks_or_whole(params):
    chunked = dataclasses.replace(MODEL, chunk=16)
    together = shortened(params, model=chunked)
    assert together.positions.shape == (3, GEM.tokens)
    tokens, lengths = jnp.asarray(TOKENS[:2, :33]), jnp.asarray(LENGTHS[:2])
    alone = [
        GEM.shorten(MODEL, params, tokens[row : row + 1], lengths[row : row + 1])
        for row in range(2)
    ]
    positions, counts = jax.device_get((together.positions, together.lengths))
    for row, count in enumerate([12, 7]):
        kept = positions[row]
        assert counts[row] == int(alone[row].lengths[0]) == count
        np.testing.assert_array_equal(kept[None], alone[row].positions)
        assert np.all(np.diff(kept[:count]) > 0)
        assert np.all(kept[count:] == -1)
        expected = [*TOKENS[row, kept[:count]], *[0] * (12 - count)]
        np.testing.assert_array_equal(np.asarray(together.tokens)[row], expected)
    assert together.prompts()[1] == PROMPTS[1]  # shorter than GEM.tokens: whole


def random_votes(width=3, length=30):
    random = np.random.default_rng(1)
    queries = random.standard_normal((2, width, 4, 8), np.float32)
    keys = random.standard_normal((2, length, 2, 8), np.float32)
    lengths = np.array([length, 2], np.int32)  # the second has fewer than voters
    at = lengths[:, None] - width + np.arange(width, dtype=np.int32)
    return tuple(map(jnp.asarray, (queries, at, keys, lengths)))


@pytest.mark.parametrize("score", ["raw", "probability"])
def test_votes_of_several_queries(score):
    gem = GemFilter(tokens=4, kernel=3, queries=3, score=score, edge="renormalize")
    queries, at, keys, lengths = random_votes()
    found = np.asarray(votes(gem, queries, at, keys, lengths))
    for row in range(2):
        length = int(lengths[row])
        k = np.repeat(np.asarray(keys[row, :length], np.float64), 2, axis=1)
        mass, voters = np.zeros(length), np.zeros(length)
        for query, position in zip(np.asarray(queries[row]), np.asarray(at[row])):
            if position < 0:
                continue
            raw = np.einsum("hd,thd->ht", query, k[: position + 1])
            if score == "probability":
                raw = np.exp(raw / np.sqrt(8))
                raw /= raw.sum(axis=1, keepdims=True)
            mass[: position + 1] += raw.sum(axis=0)
            voters[: position + 1] += 1
        mass /= voters if score == "raw" else 1
        mean = [mass[max(t - 1, 0) : t + 2].mean() for t in range(length)]
        np.testing.assert_allclose(found[row, :length], mean, rtol=1e-5, atol=1e-5)
        assert np.all(found[row, length:] == -np.inf)


def test_edges_differ_at_the_edges_only_and_a_kernel_of_one_has_none():
    arrays = random_votes(width=1)

    def scores(**more):
        return np.asarray(votes(GemFilter(**more), *arrays))[0]

    zeros, renormalised = scores(), scores(edge="renormalize")
    inner = slice(2, -2)
    np.testing.assert_allclose(zeros[inner], renormalised[inner], rtol=1e-6)
    ends = np.array([0, 1, -2, -1])
    share = np.array([3, 4, 4, 3]) / 5
    np.testing.assert_allclose(zeros[ends], renormalised[ends] * share, rtol=1e-5)
    alone = scores(kernel=1)
    assert np.array_equal(alone, scores(kernel=1, edge="renormalize"))
    padded = np.pad(alone, 2)
    mean = np.convolve(padded, np.ones(5) / 5, "valid")
    np.testing.assert_allclose(zeros, mean, rtol=1e-5, atol=1e-5)


def test_scaled_queries_choose_the_same_and_more_tokens_choose_a_superset():
    queries, at, keys, lengths = random_votes(width=1)

    def kept(tokens, scale=1.0):
        gem = GemFilter(tokens=tokens)
        scores = votes(gem, queries * scale, at, keys, lengths)
        return [set(row[row >= 0]) for row in np.asarray(choose(gem, scores, lengths))]

    assert kept(9) == kept(9, scale=4.0)
    assert [len(row) for row in kept(9)] == [9, 2]
    for few, many in zip(kept(5), kept(9)):
        assert few <= many


def test_kept_ends_and_whole_windows():
    random = np.random.default_rng(2)
    lengths = np.array([30, 21, 3], np.int32)
    scores = random.standard_normal((3, 30), np.float32) - 100
    scores = np.where(np.arange(30)[None] < lengths[:, None], scores, -np.inf)
    ends = GemFilter(tokens=9, keep_first=2, keep_last=3)
    for row, kept in enumerate(np.asarray(choose(ends, scores, lengths))):
        n = int(lengths[row])
        assert {0, 1, n - 3, n - 2, n - 1} <= set(kept)
        assert (kept >= 0).sum() == min(n, 9)
    windows = GemFilter(tokens=16, window=4, keep_first=1, keep_last=2)
    for row, kept in enumerate(np.asarray(choose(windows, scores, lengths))):
        n = int(lengths[row])
        chosen = {int(p) // 4 for p in kept if p >= 0}
        whole = {p for w in chosen for p in range(4 * w, min(4 * w + 4, n))}
        assert whole == {int(p) for p in kept if p >= 0}
        assert {0, (n - 2) // 4, (n - 1) // 4} <= chosen
        free = [
            w for w in range(-(-n // 4)) if w not in (0, (n - 2) // 4, (n - 1) // 4)
        ]
        means = {w: float(scores[row, 4 * w : 4 * w + 4].mean()) for w in free}
        taken = [w for w in free if w in chosen]
        assert set(taken) == set(sorted(free, key=lambda w: -means[w])[: len(taken)])
        assert len(chosen) == min(4, -(-n // 4))


# A part of the weights at a time ------------------------------------------------------


class Since:
    """Bytes on the device, of arrays made since."""

    def __init__(self):
        self.before = jax.live_arrays()

    def __call__(self) -> int:
        known = set(map(id, self.before))
        arrays = [a for a in jax.live_arrays() if id(a) not in known]
        return sum(a.nbytes for a in arrays) - count_host_bytes(arrays)


def tree_bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("given", "layer"), [("numpy", 0), ("device", 2), ("host", CONFIG.layers - 1)]
)
def test_the_late_weights_are_on_the_host_until_an_answer_needs_them(
    monkeypatch, given, layer
):
    gem = dataclasses.replace(GEM, layer=layer)
    weights = random_params(CONFIG, scale=0.3)
    whole = on_device(weights)
    expected = generate(MODEL, whole, PROMPTS, max_new_tokens=6, shorten=gem)
    placed = {"numpy": lambda x: x, "device": on_device, "host": on_host}[given]
    early_bytes, late_bytes = map(tree_bytes, split(weights, layer))

    held = Since()
    mine = placed(jax.tree.map(np.copy, weights))
    staged = StagedWeights(mine, gem)
    if given != "numpy":
        assert mine["blocks"]["mlp"]["up"]["kernel"].is_deleted()
    assert held() == early_bytes
    assert count_host_bytes(staged.late) == late_bytes == tree_bytes(staged.late)
    seen, moments = [], []
    real, wait = GemFilter.shorten, jax.block_until_ready

    def filtering(self, model, params, *rest):
        gc.collect()
        seen.append((tree_bytes(params), count_host_bytes(params), held()))
        return real(self, model, params, *rest)

    def waiting(leaf):  # for a leaf, beside the one that it replaces
        moments.append(held())
        return wait(leaf)

    monkeypatch.setattr(GemFilter, "shorten", filtering)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    for _ in range(2):  # the second prompt finds what the first one found
        with staged.filter_prompts(MODEL, PROMPTS) as (params, short):
            assert not count_host_bytes(params)
            jax.tree.map(np.testing.assert_array_equal, params, weights)
            prompts = short.prompts()
            found = generate(MODEL, params, prompts, max_new_tokens=6)
        assert found == expected
        del params, short
        assert tree_bytes(staged.early) == early_bytes
    tokens = 3 * 40 * 4 + 3 * 4  # the padded prompts and their lengths
    assert seen == [(early_bytes, 0, early_bytes + tokens)] * 2
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(staged.early["blocks"]))
    short_bytes = 3 * (2 * GEM.tokens + 40 + 1) * 4
    most = tree_bytes(weights) + largest + tokens + short_bytes
    assert early_bytes < max(moments) <= most


def test_weights_given_on_the_device_are_never_there_twice(monkeypatch):
    mine = on_device(random_params(CONFIG, scale=0.3))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(mine["blocks"]))
    held, moments, placing = Since(), [], module.on_host

    def placed(tree):
        moments.append(held())  # beside `mine`, as far as that is left
        moments[-1] -= sum(
            leaf.nbytes for leaf in held.before if leaf.is_deleted() and leaf.size
        )
        return placing(tree)

    monkeypatch.setattr(module, "on_host", placed)
    StagedWeights(mine, GEM)
    assert len(moments) == len(jax.tree.leaves(mine["blocks"])) + 1
    assert max(moments) <= largest


def test_weights_are_parted_again_after_an_error(monkeypatch):
    staged = StagedWeights(random_params(CONFIG, scale=0.3), GEM)
    early = jax.tree.map(np.asarray, staged.early)

    def intact():
        jax.tree.map(np.testing.assert_array_equal, staged.early, early)

    with pytest.raises(ZeroDivisionError), staged.filter_prompts(MODEL, PROMPTS):
        raise ZeroDivisionError
    intact()
    for prompts, message in {
        (): "prompts is empty",
        ((1, 2), ()): r"lengths=\[2, 0\]",
        ((1, CONFIG.vocab_size),): "token 48 at place 1 of row 0 is outside",
        ((3, -1),): "token -1",
    }.items():
        with (
            pytest.raises(ValueError, match=message),
            staged.filter_prompts(MODEL, prompts),
        ):
            pytest.fail("it was let in")
        intact()
    wait, calls = jax.block_until_ready, []

    def failing(leaf):  # as a device that is full does
        calls.append(leaf)
        if len(calls) == 4:
            raise MemoryError
        return wait(leaf)

    monkeypatch.setattr(jax, "block_until_ready", failing)
    with pytest.raises(MemoryError), staged.filter_prompts(MODEL, PROMPTS):
        pytest.fail("there was no room")
    intact()
    monkeypatch.undo()
    with staged.filter_prompts(MODEL, PROMPTS) as (params, short):
        assert len(short.prompts()) == len(params["blocks"]["mlp_norm"]["scale"]) - 2


def test_joining_a_leaf_takes_a_row_besides_and_never_the_whole_model_twice():
    """Compiled for the card: 0.12 GB instead of 2.23 for the largest leaf of an 8B."""
    rows, row = (13, 19), (4096, 14336)
    early, late = (jax.ShapeDtypeStruct((n, *row), jnp.bfloat16) for n in rows)
    program = Program(lambda *parts: module.join_rows(*parts), (early, on_host(late)))
    report = jmem.measure(program, bounds=False)
    row_bytes = 2 * math.prod(row)
    assert report.output_bytes == sum(rows) * row_bytes
    assert report.temp_bytes < 1.01 * row_bytes
    assert report.host_bytes == 19 * row_bytes


# With the rest ------------------------------------------------------------------------


def test_any_policy_reads_the_shortened_prompts(params):
    """Which need room for the answer, where the whole prompts had none."""
    assert max(LENGTHS) + 6 > CONFIG.max_positions
    policy = SnapKV(capacity=8, window=4)
    found = generate(
        MODEL, params, PROMPTS, max_new_tokens=6, shorten=GEM, policy=policy
    )
    by_hand = shortened(params).prompts()
    assert found == generate(MODEL, params, by_hand, max_new_tokens=6, policy=policy)
    with pytest.raises(ValueError, match=r"43 tokens a row exceed .*max_positions=42"):
        generate(MODEL, params, [[1] * 43], max_new_tokens=6, shorten=GEM)
    with pytest.raises(ValueError, match=r"12 prompt tokens \+ max_new_tokens=31"):
        generate(MODEL, params, PROMPTS, max_new_tokens=31, shorten=GEM)


def test_one_pass_calibrates_every_layer(params):
    spans = [(4, 9), (0, 7), (30, 38)]
    recall = calibrate_filter_layer(MODEL, params, GEM, PROMPTS, spans)
    assert recall.shape == (CONFIG.layers,)
    for layer in (0, 4):
        kept = shortened(params, dataclasses.replace(GEM, layer=layer)).positions
        shares = [
            np.isin(np.arange(*span), row).mean() for span, row in zip(spans, kept)
        ]
        np.testing.assert_allclose(recall[layer], np.mean(shares), rtol=1e-6)
    assert len(set(recall.tolist())) > 1


class Words:
    def decode(self, ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return " ".join(f"w{n}" for n in ids)


def test_explains_what_was_kept():
    positions, scores = jnp.array([1, 2, 5, -1]), jnp.arange(8, dtype=jnp.float32)
    assert explain(range(10, 18), positions, scores, Words()).splitlines() == [
        "3 of 8 tokens, in 2 spans",
        "    ... 1 left out",
        "1 to 2  score 1.5  'w11 w12'",
        "    ... 2 left out",
        "5 to 5  score 5  'w15'",
        "    ... 2 left out",
    ]
    whole = explain([1, 2], jnp.array([0, 1]), scores, Words())
    assert whole.splitlines() == [
        "2 of 2 tokens, in 1 spans",
        "0 to 1  score 0.5  'w1 w2'",
    ]


# Refusals -----------------------------------------------------------------------------


SETTINGS = {
    "layer=-1": {"layer": -1},
    "tokens=0": {"tokens": 0},
    "kernel=4": {"kernel": 4},
    "edge='wrap'": {"edge": "wrap"},
    "score='prob'": {"score": "prob"},
    "queries=0": {"queries": 0},
    "window=0": {"window": 0},
    "keep_first=-1": {"keep_first": -1},
    "tokens=10 must be a multiple of window=4": {"tokens": 10, "window": 4},
    "keep_first=5 and keep_last=4": {"tokens": 8, "keep_first": 5, "keep_last": 4},
    "can take 12 tokens": {"tokens": 8, "window": 4, "keep_first": 1, "keep_last": 2},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_refuses_settings(message):
    gem = GemFilter()
    for name, value in SETTINGS[message].items():  # the type check would be first
        object.__setattr__(gem, name, value)
    with pytest.raises(ValueError, match=message):
        gem.__post_init__()


def test_refuses_layers_that_are_not_there(params):
    for gem in (GemFilter(layer=5), GemFilter(layer=13)):
        with pytest.raises(ValueError, match=f"layer={gem.layer} .* 5 layers"):
            shortened(params, gem)
        with pytest.raises(ValueError, match=f"layer={gem.layer} .* 5 layers"):
            gem.program(MODEL, prompt=8)
    with pytest.raises(ValueError, match="layer=5 is not one of the 5"):
        split(params, 5)
    early, _ = split(params, 1)
    with pytest.raises(ValueError, match=r"params hold 1 and 2.*split again"):
        shortened(early)


@pytest.mark.parametrize("lengths", [[0, 7, 40], [33, 7, 41]])
def test_refuses_lengths(params, lengths):
    lengths = jnp.array(lengths, jnp.int32)
    with pytest.raises(ValueError, match=r"lengths=.* must lie in \[1, 40\]"):
        GEM.shorten(MODEL, params, jnp.asarray(TOKENS), lengths)


def test_names_the_layer_whose_scores_are_no_numbers(params):
    params = jax.tree.map(lambda leaf: leaf, params)
    params["embed"]["embedding"] = (
        params["embed"]["embedding"].at[TOKENS[1, 3]].set(jnp.nan)
    )
    with pytest.raises(ValueError, match="scores of layer 2 are not finite, first"):
        shortened(params)


@pytest.mark.parametrize(
    "prompts, spans", [([[1, 2]], []), ([[1, 2]], [(1, 3)]), ([[1, 2]], [(1, 1)])]
)
def test_calibration_refuses_spans(params, prompts, spans):
    with pytest.raises(ValueError, match="span"):
        calibrate_filter_layer(MODEL, params, GEM, prompts, spans)
