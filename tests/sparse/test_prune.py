"""Pruning: exact numbers of zeros, the papers' choices, one program for all layers."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.data.batch import Batch
from jmem.models.decoder import Decoder
from jmem.models.next_token import find_positions
from jmem.nn.linear import dense
from jmem.nn.maps import find_maps, replace_maps
from jmem.nn.quantised import pack
from jmem.offload import is_on_host, on_host
from jmem.program import by_key
from jmem.sparse.criteria import find_lowest
from jmem.sparse.prune import CRITERIA, Magnitude, SparseGPT, Wanda, prune

CONFIG = dataclasses.replace(TINY, layers=3, intermediate=32)
"""Two shapes of maps: [32, 16] for k and v, else [32, 32]."""
PARAMS = random_params(CONFIG, scale=0.2)
TRACED = collections.Counter()
every = pytest.mark.parametrize("name", CRITERIA)


def count_traces(name, leaf, x):
    """A `linear` that says how often a map was traced."""
    TRACED[name] += 1
    return dense(name, leaf, x)


MODEL = Decoder(CONFIG, linear=count_traces)


def make_batches(count=2, rows=2, length=24, padding=5):
    """Random tokens; the last ones of every row carry no weight."""
    random = np.random.default_rng(0)
    shape = (count, rows, length + 1)
    tokens = random.integers(0, CONFIG.vocab_size, shape).astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[:, length - padding :] = 0
    return [Batch(own[:, :-1], own[:, 1:], weights) for own in tokens]


BATCHES = make_batches()


@functools.cache
def pruned(name, sparsity=0.5):
    return prune(MODEL, PARAMS, CRITERIA[name], sparsity, BATCHES)


def find_weights(params):
    """Every map's W [L, out, in]."""
    maps = find_maps(params["blocks"])
    return {n: np.swapaxes(leaf["kernel"], 1, 2) for n, leaf in maps.items()}


def with_kernel(name, kernel):
    """`PARAMS` with other weights for a map."""
    maps = find_maps(PARAMS["blocks"])
    blocks = replace_maps(PARAMS["blocks"], {name: maps[name] | {"kernel": kernel}})
    return PARAMS | {"blocks": blocks}


class TestFindLowest:
    def test_is_a_stable_sort_s_beginning(self):
        random = np.random.default_rng(0)
        found = jax.jit(find_lowest)
        scores = random.integers(0, 4, (50, 12)).astype(np.float32)
        scores[3], scores[4, :6] = np.inf, 1e-38
        order = np.argsort(scores, axis=-1, kind="stable")
        for count in (0, 1, 5, 12):
            expected = np.zeros(scores.shape, bool)
            np.put_along_axis(expected, order[:, :count], True, axis=-1)
            np.testing.assert_array_equal(found(scores, np.int32(count)), expected)


@every
class TestEveryCriterion:
    def test_removes_exactly_as_many_weights(self, name):
        criterion = CRITERIA[name]
        if criterion.pattern is not None:
            kept, of = criterion.pattern
            for w in find_weights(pruned(name)).values():
                groups = (w != 0).reshape(*w.shape[:2], -1, of).sum(-1)
                assert (groups == kept).all()
            return
        scope = getattr(criterion, "scope", "row")
        for sparsity in (0.5, 0.01, 0.29, 0.99):
            found = find_weights(pruned(name, sparsity)).values()
            if scope == "global":
                zeros = sum((w == 0).sum() for w in found)
                assert zeros == int(sparsity * sum(w.size for w in found))
                continue
            for w in found:
                _, outputs, inputs = w.shape
                if scope == "layer" or isinstance(criterion, SparseGPT):
                    zeros, size = (w == 0).sum((1, 2)), outputs * inputs
                else:
                    zeros, size = (w == 0).sum(2), inputs
                assert (zeros == int(sparsity * size)).all()

    def test_touches_nothing_else(self, name):
        """But SparseGPT moves the weights that it keeps."""
        before, after = by_key(PARAMS), by_key(pruned(name))
        assert list(before) == list(after)
        for path, leaf in before.items():
            if not (path.startswith("blocks/") and path.endswith("/kernel")):
                assert after[path] is leaf
                continue
            assert isinstance(after[path], np.ndarray)
            assert after[path].dtype == leaf.dtype
            if not isinstance(CRITERIA[name], SparseGPT):
                kept = after[path] != 0
                np.testing.assert_array_equal(after[path][kept], leaf[kept])

    def test_at_sparsity_0_changes_nothing(self, name):
        criterion = dataclasses.replace(CRITERIA[name], pattern=None)
        assert prune(MODEL, PARAMS, criterion, 0, BATCHES) is PARAMS

    def test_compiles_once_for_all_layers_and_batches(self, name):
        pruned(name)
        before = TRACED.copy()
        again = prune(MODEL, PARAMS, CRITERIA[name], 0.5, iter(BATCHES))
        new = set((TRACED - before).values())
        # Once to learn which maps read the same; programs are traced no more.
        assert new == ({1} if CRITERIA[name].is_calibrated else set())
        for path, leaf in by_key(again).items():
            np.testing.assert_array_equal(leaf, by_key(pruned(name))[path])


class TestMagnitude:
    def test_global_removes_the_smallest_of_all_maps_and_layers(self):
        found = find_weights(pruned("magnitude-global", 0.29))
        sizes = np.concatenate([w.ravel() for w in map(np.abs, found.values())])
        before = find_weights(PARAMS)
        every = np.sort(np.concatenate([np.abs(w).ravel() for w in before.values()]))
        assert sizes[sizes > 0].min() == every[int(0.29 * len(every))]

    def test_of_equal_weights_the_first_go(self):
        kernel = np.ones((3, 32, 32), np.float32)
        kernel[0, 4:] = 2
        params = with_kernel("mlp/up", kernel)
        w = find_weights(prune(MODEL, params, Magnitude(), 0.25))["mlp/up"]
        np.testing.assert_array_equal(w[:, :, :8] == 0, np.ones((3, 32, 8), bool))
        params["blocks"] = {"mlp": {"up": {"kernel": kernel}}}
        whole = prune(MODEL, params, Magnitude(scope="global"), 0.06)
        w = find_weights(whole)["mlp/up"]
        zeros = int(0.06 * w.size)  # 128 in the first layer, then whole rows
        assert (w[0] == 0).sum() == 128
        assert (w[1].ravel()[: zeros - 128] == 0).all()
        assert (w == 0).sum() == zeros

    def test_reads_and_gives_back_weights_where_they_are(self, tmp_path):
        """Memory-mapped, on the device, in host memory: the same zeros."""
        kept = by_key(pruned("magnitude"))

        def store(leaf):
            path = tmp_path / str(len([*tmp_path.iterdir()]))
            np.save(path, leaf)
            return np.load(f"{path}.npy", mmap_mode="r")

        for place in (
            functools.partial(jax.tree.map, store),
            functools.partial(jax.tree.map, jnp.asarray),
            on_host,
        ):
            params = place(PARAMS)
            after = prune(MODEL, params, Magnitude(), 0.5)
            for path, leaf in by_key(after).items():
                np.testing.assert_array_equal(leaf, kept[path])
                like = by_key(params)[path]
                assert isinstance(leaf, jax.Array) is isinstance(like, jax.Array)
                if isinstance(leaf, jax.Array):
                    assert is_on_host(leaf) is is_on_host(like)


@jax.jit
def run_layer(p, x, batch):
    """What every map of a block reads, and what the block gives."""
    read = {}

    def linear(name, leaf, h):
        read[name] = h
        return dense(name, leaf, h)

    ops = MODEL.ops._replace(linear=linear)
    layer = jnp.int32(0)
    x, *_ = MODEL.block(p, x, find_positions(batch), layer, ops, None)
    return read, x


def take_layer(params, layer):
    return jax.tree.map(lambda leaf: leaf[layer], params["blocks"])


class TestWanda:
    def test_is_ten_lines_of_numpy_over_what_the_model_reads(self):
        found = find_weights(pruned("wanda"))
        xs = [PARAMS["embed"]["embedding"][batch.tokens] for batch in BATCHES]
        for layer in range(CONFIG.layers):
            p = take_layer(PARAMS, layer)
            runs = [run_layer(p, x, batch)[0] for x, batch in zip(xs, BATCHES)]
            for name, own in found.items():
                rows = np.concatenate(
                    [run[name][:, :-5].reshape(-1, 32) for run in runs]
                )
                score = np.abs(find_weights(PARAMS)[name][layer])
                score = score * np.linalg.norm(rows, axis=0)
                order = np.argsort(score, axis=1)
                zeros = np.argsort(order, axis=1) < 16
                np.testing.assert_array_equal(own[layer] == 0, zeros)
            p = take_layer(pruned("wanda"), layer)
            xs = [run_layer(p, x, batch)[1] for x, batch in zip(xs, BATCHES)]

    def test_documents_of_a_packed_row_do_not_see_each_other(self):
        """Two in a row are two rows, the shorter one padded."""
        (batch,) = make_batches(count=1, rows=1, length=24, padding=0)
        tokens, *_ = batch
        numbers = np.array([[1] * 14 + [2] * 10], np.int32)
        apart = np.zeros((2, 24), np.int32)
        apart[0, :14], apart[1, :10] = tokens[0, :14], tokens[0, 14:]
        counted = np.zeros((2, 24), np.float32)
        counted[0, :14], counted[1, :10] = 1, 1
        ways = batch._replace(segments=numbers), Batch(apart, apart, counted)
        packed, padded = (prune(MODEL, PARAMS, Wanda(), 0.5, [way]) for way in ways)
        for path, leaf in by_key(packed).items():
            np.testing.assert_array_equal(leaf, by_key(padded)[path])

    def test_weights_keep_their_dtypes_and_are_judged_in_float32(self):
        kernel = PARAMS["blocks"]["attention"]["q"]["kernel"].astype(jnp.bfloat16)
        params = with_kernel("attention/q", kernel)
        after = prune(MODEL, params, SparseGPT(), 0.5, BATCHES)
        q = after["blocks"]["attention"]["q"]["kernel"]
        assert q.dtype == jnp.bfloat16
        assert ((q == 0).sum((1, 2)) == 512).all()
        assert after["blocks"]["attention"]["k"]["kernel"].dtype == np.float32


# SparseGPT, a map at a time -----------------------------------------------------------


def make_inputs(tokens, width, seed=0):
    """Correlated, as activations are."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((tokens, width)) @ random.standard_normal(
        (width, width)
    )
    return (mixed * np.geomspace(0.1, 3, width)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def cut(criterion, w, x, count):
    seen = criterion.look(criterion.begin(x.shape[1]), x)
    return criterion.cut(w, seen, count)


def remove(criterion, sparsity, w, x):
    """`w` [out, in] pruned for inputs `x`, as `prune` does it."""
    shapes = {"map": (1, *w.shape)}
    count = criterion.count(sparsity, shapes, lambda name, layer: w)["map"][0]
    return np.asarray(cut(criterion, w, x, count), np.float64)


def remove_one_by_one(w, x, choose, group, damping=0.01):
    """Optimal brain surgery, a column at a time, in float64: for each weight that goes
    the exact inverse of the Hessian of those that are still free to move.

    `choose(scores)` picks among a group of columns [out, group], before they move.
    """
    w, x = w.astype(np.float64), x.astype(np.float64)
    products = x.T @ x
    diagonal = np.diag(products)
    products += np.diag(np.full(len(products), damping * diagonal.mean()))
    inverses = [np.linalg.inv(products[j:, j:]) for j in range(w.shape[1])]
    price = np.array([inverse[0, 0] for inverse in inverses])
    for start in range(0, w.shape[1], group):
        own = slice(start, start + group)
        gone = choose(np.square(w[:, own]) / price[own])
        for j, lost in enumerate(gone.T, start):
            removed = np.where(lost, w[:, j], 0)
            w[:, j:] -= removed[:, None] * inverses[j][0] / inverses[j][0, 0]
            w[lost, j] = 0
    return w


def lowest(scores, count):
    flat = np.zeros(scores.size, bool)
    flat[np.argsort(scores.ravel(), kind="stable")[:count]] = True
    return flat.reshape(scores.shape)


class TestSparseGPT:
    @pytest.mark.parametrize(("rows", "block"), [(1, 128), (6, 8)])
    def test_is_brain_surgery_in_the_same_order(self, rows, block):
        """One row in one block; several, in blocks that the row does not end with."""
        w = np.random.default_rng(1).standard_normal((rows, 20)).astype(np.float32)
        x = make_inputs(60, 20)
        found = remove(SparseGPT(block=block), 0.5, w, x)
        expected = remove_one_by_one(
            w, x, lambda scores: lowest(scores, scores.size // 2), block
        )
        np.testing.assert_array_equal(found == 0, expected == 0)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

    def test_with_a_pattern_blocks_change_nothing_but_when_columns_move(self):
        w = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
        x = make_inputs(60, 24)
        expected = remove_one_by_one(
            w, x, lambda scores: np.stack([lowest(row, 2) for row in scores]), 4
        )
        for block in (4, 128):
            found = remove(SparseGPT(pattern=(2, 4), block=block), 0.5, w, x)
            np.testing.assert_array_equal(found == 0, expected == 0)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

    def test_errs_less_than_wanda_and_wanda_less_than_magnitude(self):
        w = np.random.default_rng(1).standard_normal((24, 32)).astype(np.float32)
        x = make_inputs(200, 32)
        errors = [
            np.linalg.norm(x @ (w - remove(criterion, 0.5, w, x)).T)
            for criterion in (SparseGPT(), Wanda(), Magnitude())
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.8 * errors[1]

    def test_what_two_inputs_share_moves_to_the_later_one(self):
        x = make_inputs(60, 8)
        x[:, 5] = x[:, 2]
        w = np.zeros((3, 8), np.float32)
        w[:, 2], w[:, 5], w[:, 7] = 1, 2, 50
        found = remove(SparseGPT(damping=1e-6, block=8), 0.75, w, x)
        np.testing.assert_allclose(found[:, 5], 3, rtol=1e-2)

    def test_inputs_that_were_always_0_go_first_and_the_rest_is_sound(self):
        x = make_inputs(60, 12)
        x[:, [1, 6]] = 0
        w = np.random.default_rng(1).standard_normal((4, 12)).astype(np.float32)
        found = remove(SparseGPT(), 2 / 12, 100 * w, x)
        expected = 100 * w
        expected[:, [1, 6]] = 0
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        nothing = remove(SparseGPT(), 0.5, w, np.zeros_like(x))
        assert (nothing == 0).sum() == 24
        assert np.isin(nothing, [0, *w.ravel()]).all()


# Refusals -----------------------------------------------------------------------------


def broken(path, value):
    """`PARAMS` with one value of a leaf, in the last layer, replaced."""
    flat = by_key(PARAMS)
    leaf = flat[path].copy()
    leaf[-1, ..., 3] = value
    return jax.tree.map(lambda own: leaf if own is flat[path] else own, PARAMS)


def with_adapter():
    maps = find_maps(PARAMS["blocks"])
    leaf = maps["mlp/up"] | {"lora_a": np.ones((3, 32, 2), np.float32)}
    return PARAMS | {"blocks": replace_maps(PARAMS["blocks"], {"mlp/up": leaf})}


@pytest.mark.parametrize(
    ("criterion", "sparsity", "batches", "params", "message"),
    [
        (Wanda(), 1.0, BATCHES, PARAMS, r"sparsity=1.0 must lie in \[0, 1\)"),
        (Wanda(), -0.1, BATCHES, PARAMS, r"sparsity=-0.1 must lie in"),
        (Wanda(), float("nan"), BATCHES, PARAMS, r"sparsity=nan must lie in"),
        (Wanda(), 0.5, None, PARAMS, r"Wanda goes by what the maps read"),
        (SparseGPT(), 0.5, [], PARAMS, r"SparseGPT goes by what the maps read"),
        (
            *(Wanda(), 0.5, make_batches(1, 1, padding=5), PARAMS),
            r"hold 19 tokens that count .* fewer than one row of 24",
        ),
        (
            *(Wanda(), 0.5, [b._replace(tokens=b.tokens + 9) for b in BATCHES]),
            *(PARAMS, r"the model's vocabulary is of 48"),
        ),
        (
            *(Magnitude(pattern=(2, 4)), 0.6, None, PARAMS),
            r"sparsity=0.6 is not that of pattern=\(2, 4\).* Give 0.5",
        ),
        (
            *(Magnitude(pattern=(3, 6)), 0.5, None, PARAMS),
            r"'attention/k' has rows of 32 weights, which pattern=\(3, 6\)",
        ),
        (
            *(Magnitude(), 0.5, None, broken("blocks/mlp/up/kernel", np.nan)),
            r"layer 2 has weights that are not finite in map 'mlp/up'",
        ),
        (
            *(Wanda(), 0, BATCHES, broken("blocks/mlp/down/kernel", -np.inf)),
            r"layer 2 has weights that are not finite in map 'mlp/down'",
        ),
        (
            *(Wanda(), 0.5, BATCHES, broken("blocks/mlp_norm/scale", np.inf)),
            r"layer 2 gives inputs .* not finite to map 'mlp/gate'",
        ),
        (Wanda(), 0.5, BATCHES, with_adapter(), r"'mlp/up' holds \['lora_a'\].* Merge"),
        (
            *(SparseGPT(damping=0.0), 0.5, BATCHES[:1]),
            *(with_kernel("mlp/up", np.ones((3, 32, 32), np.float32)), "Raise damping"),
        ),
    ],
)
def test_what_cannot_be_pruned_is_said(criterion, sparsity, batches, params, message):
    with pytest.raises(ValueError, match=message):
        prune(MODEL, params, criterion, sparsity, batches)


def test_packed_maps_are_refused():
    params = {"blocks": {"up": {"kernel": np.ones((1, 64, 2), np.float32)}}}
    with pytest.raises(ValueError, match="'up' holds packed rows"):
        prune(MODEL, pack(params), Magnitude(), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wanda(pattern=(5, 4)), r"pattern=\(5, 4\) keeps 5 of every 4"),
        (lambda: Wanda(pattern=(0, 4)), r"pattern=\(0, 4\)"),
        (lambda: Magnitude(scope="layer", pattern=(2, 4)), "Leave one of the two out"),
        (lambda: SparseGPT(damping=-1.0), "damping=-1.0 must be finite"),
        (lambda: SparseGPT(block=0), "block=0 must be at least 1"),
        (lambda: SparseGPT(block=6, pattern=(2, 4)), "block=6 is no multiple of the 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
