"""Which attention a target gets, and what packed documents see of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmem
from jmem.nn.attention import causal, causal_attention, choose, grouped_attention
from jmem.nn.norm import layer_norm
from jmem.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from jmem.targets import resolve

CHOICES = [
    (None, "bfloat16", 128, "xla"),  # no GPU
    ("h200", "bfloat16", 128, "cudnn"),
    ("rtx3090", "float16", 64, "cudnn"),
    ("h200", "float32", 128, "xla"),
    ("h200", "bfloat16", 256, "xla"),
    ("h200", "bfloat16", 4, "xla"),
]
attend = jax.jit(
    causal_attention, static_argnames=("implementation", "window", "block")
)
plain_attention = jax.jit(
    jax.nn.dot_product_attention,
    static_argnames=("is_causal", "local_window_size", "implementation"),
)
rotate = jax.jit(Rope.__call__, static_argnums=0)


def normal(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("target, dtype, head_dim, expected", CHOICES)
def test_attention_follows_the_target_compiled_for(target, dtype, head_dim, expected):
    card = None if target is None else resolve(target)
    assert choose(card, dtype, head_dim) == expected


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_documents_of_a_packed_row_do_not_see_each_other(implementation):
    rope = Rope(head_dim=4)
    q, k, v = normal(*[(1, 7, 2, 4)] * 3)
    positions = np.arange(7, dtype=np.int32)[None]
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]], jnp.int32)

    def turn_and_attend(attention, part):
        run = jax.jit(lambda *given: attention(*given[:3], rope, *given[3:])[0])
        q_, k_, v_ = (x[:, part] for x in (q, k, v))
        return np.asarray(run(q_, k_, v_, positions[:, part], np.int32(0), None))

    packed = turn_and_attend(causal(implementation, segments), slice(None))
    for part in (slice(0, 3), slice(3, 7)):
        alone = turn_and_attend(causal(), part)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


def test_rotation_depends_on_distance_only():
    rope = Rope(head_dim=8, scaling=Llama3Scaling())
    q, k = normal(*[(1, 1, 1, 8)] * 2)

    def score(i, j):
        at = [np.full((1, 1), p, np.int32) for p in (i, j)]
        return np.vdot(rotate(rope, q, at[0]), rotate(rope, k, at[1]))

    np.testing.assert_allclose(score(9, 4), score(1009, 1004), atol=1e-3)
    assert abs(score(9, 4) - score(9, 8)) > 1e-2


YARN = {"factor": 2.0, "original_max_positions": 8}
SCALINGS = [
    (Llama3Scaling, {"factor": 0.5}),
    (Llama3Scaling, {"low_freq_factor": 4.0}),
    (Llama3Scaling, {"low_freq_factor": 0.0}),
    (Llama3Scaling, {"original_max_positions": 0}),
    (LinearScaling, {"factor": 0.5}),
    (YarnScaling, {"factor": 0.5, "original_max_positions": 8}),
    (YarnScaling, {"factor": 2.0, "original_max_positions": 0}),
    (YarnScaling, {"factor": 2.0, "original_max_positions": 8, "beta_slow": 32.0}),
    (YarnScaling, {"factor": 2.0, "original_max_positions": 8, "beta_slow": 0.0}),
    (
        YarnScaling,
        {"factor": 2.0, "original_max_positions": 8, "attention_factor": 0.0},
    ),
]


@pytest.mark.parametrize("scaling, fields", SCALINGS)
def test_scaling_refuses(scaling, fields):
    with pytest.raises(ValueError, match=scaling.__name__):
        scaling(**fields)


def test_channels_beyond_the_turning_ones_pass():
    (x,) = normal((1, 5, 2, 12))
    positions = np.arange(5, dtype=np.int32)[None]
    part = np.asarray(rotate(Rope(head_dim=12, rotary_dim=8), x, positions))
    np.testing.assert_array_equal(part[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(
        part[..., :8], rotate(Rope(head_dim=8), x[..., :8], positions)
    )
    np.testing.assert_array_equal(
        rotate(Rope(head_dim=12, rotary_dim=0), x, positions), x
    )


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("window", [1, 4, 8, 9, 100])
def test_a_window_is_jax_s_own_local_window(window, kv_heads):
    kv = (2, 9, kv_heads, 8)
    q, k, v = normal((2, 9, 3, 8), kv, kv, seed=window)
    expected = plain_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="xla"
    )
    found = attend(q, k, v, "xla", window=window)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [1, 4, 9, 100])
def test_blocks_of_queries_are_all_of_them_at_once(block, window):
    q, k, v = normal((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), seed=block)
    expected = attend(q, k, v, "xla", window=window)
    found = attend(q, k, v, "xla", window=window, block=block)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_window_stays_within_its_document():
    q, k, v = normal(*[(1, 7, 2, 4)] * 3)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1]], np.int32)
    packed = np.asarray(attend(q, k, v, "xla", segments, window=2))
    for part in (slice(0, 3), slice(3, 7)):
        q_, k_, v_ = (x[:, part] for x in (q, k, v))
        alone = attend(q_, k_, v_, "xla", window=2)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_a_token_alone_attends_itself(implementation):
    q, k, v = (np.ones((2, 1, heads, 8), np.float32) for heads in (4, 2, 2))
    v[:, :, 1] = 3
    out = attend(q, k, v, implementation)
    np.testing.assert_array_equal(out, np.repeat(v, 2, axis=2))


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_a_window_of_no_position_is_refused(implementation):
    with pytest.raises(ValueError, match=r"window=0 must be at least 1"):
        causal(implementation, window=0)


class TestWindowOnCudnn:
    """cuDNN's own window, compiled for an H200: no scores, no mask."""

    def gradient(self, window):
        def loss(q, k, v):
            out = causal_attention(q, k, v, "cudnn", window=window)
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))

    def arguments(self):
        shapes = ((1, 1024, heads, 128) for heads in (8, 2, 2))
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    @pytest.mark.parametrize("window", [256, None])
    def test_it_compiles_and_writes_no_scores(self, window):
        report = jmem.measure(self.gradient(window), *self.arguments(), target="h200")
        scores_bytes = 8 * 1024 * 1024 * 2  # in 16 bits, of one of the two passes
        assert report.device_bytes < scores_bytes

    def test_the_kernel_is_told_the_window_and_only_one_that_limits(self):
        def text(window):
            lowered = jax.jit(self.gradient(window)).trace(*self.arguments())
            return lowered.lower(lowering_platforms=("cuda",)).as_text()

        assert r"sliding_window_length\22: 256" in text(256)
        assert text(1024) == text(None)


@pytest.mark.parametrize(
    "dtype, offset, error",
    # float32 knows x, and so its distance from the mean, to 1e3 * 2**-24; of bfloat16
    # only the result is rounded, to 8 bits.
    [(jnp.float32, 1e3, 1e-3), (jnp.bfloat16, 0.0, 4 * 2.0**-8)],
)
def test_layer_norm_is_the_formula(dtype, offset, error):
    random = np.random.default_rng(0)
    values = offset + random.standard_normal((3, 5, 64)), *random.normal(size=(2, 64))
    x, scale, bias = (jnp.asarray(value, dtype) for value in values)
    wide, s, b = (np.asarray(a, np.float64) for a in (x, scale, bias))
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * s + b
    found = jax.jit(layer_norm, static_argnums=3)(x, scale, bias, 1e-5)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=error)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_attention_is_jax_s_own_with_heads_before_slots(kv_heads):
    kv = (2, 7, kv_heads, 8)
    q, k, v = normal((2, 5, 6, 8), kv, kv, seed=kv_heads)
    seen = np.random.default_rng(kv_heads).random((2, 5, 7)) < 0.5
    seen[..., 0] = True
    expected = plain_attention(q, k, v, mask=seen[:, None])
    found = jax.jit(grouped_attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    np.testing.assert_allclose(found, expected, atol=2e-6)
