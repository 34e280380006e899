"""Products with a sparse matrix: the format, the definition, the kernel interpreted."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import emulate_ptx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jmem.kernels import _mgpu
from jmem.kernels.spmm import (
    FragBitmap,
    check,
    choose,
    decode,
    fragments,
    mosaic_gpu,
    spmm,
)
from jmem.targets import resolve


def pack(dense, dtype="bfloat16", scales=None, spare=0):
    """FragBitmap of [*L, out, in] as its sheet says it, one number after the other."""
    dense = np.asarray(dense, np.float32)
    layers = dense.shape[:-2]
    made = [pack_one(one) for one in dense.reshape(-1, *dense.shape[-2:])]
    cap = max(1, *(max(np.diff(starts)) for *_, starts in made)) + spare
    rows = max(starts[-1] for *_, starts in made) + cap
    values = np.zeros((len(made), rows * 64), np.float32)
    for row, (numbers, *_) in zip(values, made, strict=True):
        row[: len(numbers)] = numbers
    arrays = [values.reshape(-1, rows, 64), *map(np.stack, list(zip(*made))[1:])]
    values, *arrays = [x.reshape(*layers, *x.shape[1:]) for x in arrays]
    if dtype == "int4":
        low, high = (values[..., i::2].astype(np.int8) & 15 for i in (0, 1))
        values = (low | high << 4).astype(np.uint8)
    values = jnp.asarray(values).astype("uint8" if dtype == "int4" else dtype)
    if dtype in ("int4", "int8"):
        scales = np.ones(dense.shape[:-1], "f") if scales is None else scales
    sizes = {"outputs": dense.shape[-2], "inputs": dense.shape[-1], "cap": int(cap)}
    return FragBitmap(
        values, *map(jnp.asarray, arrays), scales=_or_none(scales), **sizes
    )


def _or_none(scales):
    return None if scales is None else jnp.asarray(scales, jnp.float32)


def pack_one(dense):
    """Its numbers, tile after tile in whole rows of 64; masks, prefixes and starts."""
    down, across = (-(-size // 64) for size in dense.shape)
    whole = np.zeros((down * 64, across * 64), np.float32)
    whole[: dense.shape[0], : dense.shape[1]] = dense
    numbers, masks, prefixes, starts = [], [], [], [0]
    for m, k in np.ndindex(down, across):
        words, before, count = np.zeros(128, np.uint32), np.zeros(64, np.uint16), 0
        for r, row in enumerate(whole[m * 64 :][:64, k * 64 :][:, :64]):
            before[r] = count
            columns = np.flatnonzero(row)
            placed = {c % 8 // 2 * 16 + c // 8 * 2 + c % 2: row[c] for c in columns}
            for bit in sorted(placed):
                words[r + 64 * (bit // 32)] |= np.uint32(1 << bit % 32)
                numbers.append(placed[bit])
            count += len(placed)
        numbers += [0] * (-count % 64)
        masks.append(words)
        prefixes.append(before)
        starts.append(len(numbers) // 64)
    starts = np.asarray(starts, np.int32)
    return np.asarray(numbers), np.stack(masks), np.stack(prefixes), starts


def draw(*shape, share=0.3, dtype="bfloat16", seed=0):
    """Numbers that `dtype` holds exactly, of which a share is not zero."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal(shape)
    if dtype in ("int8", "int4"):
        most = 127 if dtype == "int8" else 7
        dense = random.integers(-most - 1, most + 1, shape)
    dense = np.where(random.random(shape) < share, dense, 0)
    if dtype not in ("int8", "int4"):
        dense = jnp.asarray(dense).astype(dtype)
    return np.asarray(dense, np.float32)


def draw_x(*shape, dtype="bfloat16", seed=1):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32).astype(dtype)


UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}


def compare(y, x, dense, scales=None):
    """Within the rounding of the result and of sums in float32."""
    scales = np.ones(dense.shape[0]) if scales is None else scales
    x64, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    expected = x64 @ dense.T * scales
    most = np.abs(x64) @ np.abs(dense).T * scales
    assert y.dtype == x.dtype
    apart = np.abs(np.asarray(y, np.float64) - expected)
    assert (apart <= UNIT[str(x.dtype)] * (most + 1e-6)).all()


# The format ---------------------------------------------------------------------------

DTYPES = ("bfloat16", "float16", "float32", "int8", "int4")


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_the_inverse_of_packing(dtype):
    dense = draw(70, 130, dtype=dtype)
    np.testing.assert_array_equal(decode(pack(dense, dtype)).astype("f"), dense)


@pytest.mark.parametrize(
    "case",
    {
        "nothing": np.zeros((64, 64)),
        "one": np.eye(1, 64 * 64, 64 * 5 + 7).reshape(64, 64),
        "row": np.outer(np.arange(64) == 9, np.ones(64)),
        "column": np.outer(np.ones(64), np.arange(64) == 9),
        "dense": np.ones((64, 128)) + np.arange(128),
        "beside nothing": np.hstack([np.zeros((64, 64)), np.ones((64, 64))]),
    }.items(),
    ids=lambda case: case[0],
)
def test_tiles_of_every_filling(case):
    dense = np.asarray(case[1], np.float32)
    matrix = pack(dense)
    check(matrix)
    np.testing.assert_array_equal(decode(matrix).astype("f"), dense)
    x = draw_x(3, dense.shape[1])
    compare(spmm(x, matrix), x, dense)


def test_what_is_not_a_number_is_kept():
    dense = draw(64, 64)
    dense[3, 5], dense[4, 5] = np.nan, -np.inf
    np.testing.assert_array_equal(decode(pack(dense)).astype("f"), dense)


def test_stacked_layers_decode_alike():
    dense = draw(2, 3, 40, 70)
    matrix = pack(dense)
    assert matrix.layers == (2, 3)
    np.testing.assert_array_equal(decode(matrix).astype("f"), dense)


def test_integers_are_scaled_a_row():
    dense, scales = draw(70, 64, dtype="int4"), np.linspace(0.5, 2, 70)
    matrix = pack(dense, "int4", scales)
    assert matrix.bits == 4
    expected = dense * scales.astype("f")[:, None]
    np.testing.assert_array_equal(decode(matrix), expected)


MATRIX = pack(draw(70, 130))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"cap": 0}, ValueError, "cap=0"),
        ({"inputs": 0}, ValueError, "inputs=0"),
        ({"cap": 1}, ValueError, r"at tile \[0\], starts give it \d+ rows .*cap=1"),
        ({"values": MATRIX.values[:-1]}, ValueError, "starts end at row"),
        ({"values": MATRIX.values[:, :32]}, ValueError, r"values have shape \(.*32\)"),
        ({"values": MATRIX.values.astype("int32")}, TypeError, "values are int32"),
        ({"values": MATRIX.values.astype("int8")}, ValueError, "scales are missing"),
        ({"scales": jnp.ones(70)}, ValueError, "scales are given"),
        ({"masks": MATRIX.masks.astype("int32")}, TypeError, "masks are int32"),
        ({"masks": MATRIX.masks[:5]}, ValueError, "masks have shape .5, 128."),
        ({"prefixes": MATRIX.prefixes[None]}, ValueError, "prefixes have shape .1, 6"),
        ({"starts": MATRIX.starts[1:]}, ValueError, "starts have shape"),
        ({"starts": MATRIX.starts[::-1]}, ValueError, "at tile .0., starts"),
        ({"outputs": 200}, ValueError, "masks have shape .6, 128.; need .12, 128."),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(change, error, words):
    with pytest.raises(error, match=f"FragBitmap: .*{words}"):
        dataclasses.replace(MATRIX, **change)


def test_contents_that_no_packer_makes_are_refused():
    check(MATRIX)
    bit = MATRIX.masks.at[2, 5].set(MATRIX.masks[2, 5] ^ 1)
    with pytest.raises(ValueError, match=r"at tile \[2\], prefixes"):
        check(dataclasses.replace(MATRIX, masks=bit))
    moved = MATRIX.starts.at[1:].add(-1)
    with pytest.raises(ValueError, match=r"at tile \[0\], starts leave it fewer"):
        check(dataclasses.replace(MATRIX, starts=moved))


def test_a_tree_s_leaves_may_be_anything():
    assert jax.tree.map(lambda leaf: leaf.nbytes, MATRIX).values == MATRIX.values.nbytes
    described = jax.eval_shape(lambda: MATRIX)
    assert described.values.shape == MATRIX.values.shape
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(MATRIX)
    ]
    assert paths == [".values", ".masks", ".prefixes", ".starts"]


# The product, by XLA ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
def test_every_dtype_multiplies(dtype, values):
    dense, x = draw(70, 130, dtype=values), draw_x(2, 3, 130, dtype=dtype)
    scales = np.linspace(0.5, 2, 70) if values != "bfloat16" else None
    held = np.asarray(jnp.asarray(dense).astype(dtype), np.float64)
    y = spmm(x, pack(dense, values, scales))
    assert y.shape == (2, 3, 70)
    compare(y.reshape(6, 70), x.reshape(6, 130), held, scales)


def test_a_loop_over_layers_reads_each_one():
    dense, x = draw(3, 64, 64), draw_x(2, 64)
    matrix = pack(dense)

    @jax.jit
    def run(x, matrix):
        def step(x, layer):
            return spmm(x, matrix, layer=layer), None

        return lax.scan(step, x, jnp.arange(3))[0]

    expected = x
    for layer in range(3):
        expected = spmm(expected, pack(dense[layer]))
    np.testing.assert_array_equal(run(x, matrix), expected)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_the_gradient_is_the_dense_product_s(values, layer):
    dense, x = draw(2, 70, 130, dtype=values), draw_x(3, 130, dtype="float32")
    scales = np.linspace(0.005, 0.02, 140).reshape(2, 70).astype("f")
    matrix = pack(dense, values, scales if values == "int8" else None)
    if layer is None:
        matrix, dense, scales = jax.tree.map(lambda a: a[1], (matrix, dense, scales))
    weight = draw_x(3, 70, dtype="float32", seed=2)

    def loss(x, matrix):
        return jnp.sum(jnp.sin(spmm(x, matrix, layer=layer)) * weight)

    def loss_dense(x, dense, scales):
        one = dense * scales[..., None]
        one = one if layer is None else one[layer]
        return jnp.sum(jnp.sin(x @ one.T) * weight)

    dx, d = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, matrix)
    if values == "float32":
        scales = np.ones_like(scales)
    want = jax.grad(loss_dense, (0, 1, 2))(x, jnp.asarray(dense), jnp.asarray(scales))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
    close(dx, want[0])
    assert d.masks.dtype == jax.dtypes.float0
    if values == "int8":
        close(d.scales, want[2])
    else:
        mine = decode(dataclasses.replace(matrix, values=d.values))
        close(mine, np.where(dense, want[1], 0))
        assert (d.values[..., -matrix.cap :, :] == 0).all()  # beyond the last tile


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"x": jnp.ones((2, 131), "bfloat16")}, ValueError, "inputs=130"),
        ({"x": jnp.ones((), "bfloat16")}, ValueError, "inputs=130"),
        ({"x": jnp.ones((2, 130), "int32")}, TypeError, "x is int32"),
        ({"matrix": jnp.ones((70, 130))}, TypeError, "need a FragBitmap"),
        ({"layer": 0}, ValueError, "layer=0 with a matrix of leading axes"),
        ({"implementation": "triton"}, ValueError, "implementation='triton'"),
        ({"interpret": True}, ValueError, "interpret=True"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(how, error, words):
    given = {"x": draw_x(2, 130), "matrix": MATRIX, **how}
    with pytest.raises(error, match=f"spmm: .*{words}"):
        spmm(given.pop("x"), given.pop("matrix"), **given)


def test_a_layer_beyond_the_stack_is_refused():
    matrix = pack(draw(2, 64, 64))
    with pytest.raises(ValueError, match=r"layer=2; need 0 to 1"):
        spmm(draw_x(1, 64), matrix, layer=2)
    with pytest.raises(ValueError, match="layer=None with a matrix of leading axes"):
        spmm(draw_x(1, 64), matrix)


def test_the_cpu_runs_xla():
    assert choose(None, "bfloat16") == choose(resolve("rtx4090"), "bfloat16") == "xla"


# The kernel ---------------------------------------------------------------------------


def thread_numbers():
    """What `fragments.lane_constants` gives, as its words have it."""
    thread = np.arange(128)
    row, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
    high = quad // 2
    own = 4 * (row + 64 * high)
    half = np.where(quad % 2, 0xFFFF, 0)
    taken = np.where(quad % 2, 0x7632, 0x5410)
    return own, own + np.where(high, -256, 256), 2 * row, half, -high, taken


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    "values, dtype",
    [
        (values or dtype, dtype)
        for values in (None, "int8", "int4")
        for dtype in ("bfloat16", "float16")
    ],
)
def test_the_ptx_decodes_what_the_format_says(values, dtype, share):
    """The instructions that the GPU runs, on 128 emulated threads."""
    dense = draw(64, 128, share=share, dtype=values)
    matrix = pack(dense, values)
    slot = mosaic_gpu.slot_rows(matrix.cap, matrix.bits) * 8 * matrix.bits
    memory = np.zeros((3, 2**15), np.uint8)  # values, masks, prefixes
    random = np.random.default_rng(3)
    memory[0] = random.integers(0, 256, memory.shape[1])  # of other tiles
    packed = np.asarray(matrix.values).view(np.uint8)
    for tile, start in enumerate(np.asarray(matrix.starts[:2])):
        copied = packed[start : start + matrix.cap].reshape(-1)
        memory[0, tile * slot :][: copied.size] = copied
    for at, array in ((1, matrix.masks), (2, matrix.prefixes)):
        flat = np.asarray(array).view(np.uint8).reshape(-1)
        memory[at, : flat.size] = flat
    text = fragments.write_ptx(values, dtype, 2, slot)
    addresses = np.arange(3) * memory.shape[1]
    inputs = [*addresses, *thread_numbers()]
    found = emulate_ptx.run(text, inputs, 32, memory.reshape(-1))
    # Register 2 j + h of thread t: columns 8 j + 2 (t mod 4) and the next, of a row.
    pairs = found.T.astype(np.uint32)[..., None].view(jnp.dtype(dtype))
    pairs = pairs.reshape(4, 8, 4, 16, 2, 2)  # warp, row, quad, j, h, column
    tile = pairs.transpose(0, 4, 1, 3, 2, 5).reshape(64, 128)
    np.testing.assert_array_equal(tile.astype(np.float32), dense)


def test_threads_know_their_places():
    def body(y_ref, shared):
        for i, numbers in enumerate(fragments.lane_constants()):
            shared[i] = numbers
        _mgpu.commit_smem()
        _mgpu.copy_smem_to_gmem(shared, y_ref)
        _mgpu.wait_smem_to_gmem(0)

    found = _mgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((6, 128), jnp.int32),
        scratch_types=(_mgpu.SMEM((6, 128), jnp.int32),),
        interpret=True,
    )()
    np.testing.assert_array_equal(found, np.stack(thread_numbers()))


SHARED = "rows share x"
KERNEL = {
    # tokens, outputs, inputs, numbers, x, tile: more steps than stages
    "one token, edges": (1, 70, 250, "bfloat16", "bfloat16", {"tiles": 1}),
    "integers": (3, 64, 512, "int8", "bfloat16", {"tiles": 2}),
    "4 bits": (8, 64, 640, "int4", "float16", {"tiles": 2}),
    SHARED: (24, 140, 384, "float16", "float16", {"rows": 2, "tiles": 2}),
    "split": (64, 64, 640, "bfloat16", "bfloat16", {"tiles": 2, "splits": 2}),
    "column blocks": (100, 64, 192, "bfloat16", "bfloat16", {"tiles": 1}),
}


def interpret(case):
    """The kernel's numbers on one of `KERNEL`, of the second layer of two."""
    tokens, outputs, inputs, values, dtype, how = KERNEL[case]
    dense = draw(2, outputs, inputs, dtype=values)
    x = draw_x(tokens, inputs, dtype=dtype)
    dense[1, :, 64:128] = 0  # empty tiles
    dense[1, :64, :64] = 1  # and a full one
    scales = np.linspace(0.5, 2, 2 * outputs).reshape(2, outputs)
    scales = scales if values in ("int8", "int4") else None
    matrix = pack(dense, values, scales)
    tile = mosaic_gpu.Tile(**{"stages": 2, **how})
    run = functools.partial(spmm, layer=jnp.int32(1), implementation="mosaic_gpu")
    y = jax.jit(functools.partial(run, tile=tile, interpret=True))(x, matrix)
    compare(y, x, dense[1], None if scales is None else scales[1])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", [case for case in KERNEL if case != SHARED])
def test_the_kernel_interpreted(case):
    interpret(case)


def test_three_warpgroups_interpreted():
    """In a process whose XLA has a thread for each that waits; by cores it has two."""
    here = pathlib.Path(__file__)
    run = f"""
import sys
sys.path[:0] = {[str(here.parents[1]), str(here.parent)]}
import test_spmm
test_spmm.interpret({SHARED!r})
assert not test_spmm._mgpu.races_found()
"""
    environment = {**os.environ, "NPROC": "8"}
    subprocess.run(
        [sys.executable, "-c", run], env=environment, check=True, timeout=120
    )


@pytest.mark.usefixtures("interpreter")
def test_splits_agree_in_float32():
    """Of the sums; what they are rounded to is a unit apart at most."""
    matrix, x = pack(draw(64, 256)), draw_x(8, 256)
    run = functools.partial(mosaic_gpu.sum_splits, interpret=True)
    tiles = [mosaic_gpu.Tile(tiles=2, splits=n) for n in (1, 2)]
    parts = [jax.jit(functools.partial(run, tile=one))(x, matrix) for one in tiles]
    largest = np.abs(parts[0]).max()
    np.testing.assert_allclose(parts[1], parts[0], rtol=0, atol=1e-5 * largest)


def test_many_tokens_are_multiplied_dense():
    """Decoded once: no kernel is made, so none has to be interpreted."""
    dense, x = draw(64, 128), draw_x(257, 128)
    y = spmm(x, pack(dense), implementation="mosaic_gpu")
    compare(y, x, dense)


@pytest.mark.parametrize(
    "x, values, words",
    [
        ("float32", "bfloat16", "x of float32 is not bfloat16 or float16"),
        ("bfloat16", "float16", "values of float16 are neither integers nor"),
    ],
)
def test_the_kernel_refuses_by_name(x, values, words):
    matrix = pack(draw(64, 64, dtype=values), values)
    with pytest.raises(ValueError, match=f"cannot serve: {words}"):
        spmm(draw_x(2, 64, dtype=x), matrix, implementation="mosaic_gpu")
    assert choose(resolve("h200"), x, values) == "xla"


def test_hopper_runs_the_kernel():
    assert choose(resolve("h200"), "bfloat16") == "mosaic_gpu"
    assert choose(resolve("h200"), "float16", "int8") == "mosaic_gpu"
    assert choose(resolve("b200"), "bfloat16") == "xla"


@pytest.mark.parametrize(
    "how, words",
    [({"rows": 3}, "rows=3"), ({"stages": 1}, "stages=1"), ({"splits": 0}, "splits=0")],
)
def test_a_tile_that_is_none_is_refused(how, words):
    with pytest.raises(ValueError, match=f"Tile: .*{words}"):
        mosaic_gpu.Tile(**how)


def test_a_tile_beyond_shared_memory_is_refused():
    with pytest.raises(ValueError, match=r"need \d+,.* bytes of shared memory"):
        mosaic_gpu.Tile(rows=4, stages=9).check(columns=64, cap=64)
