"""Which attention a target gets, and what packed documents see of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.nn.attention import causal, choose, grouped_attention
from jmem.nn.rope import Llama3Scaling, Rope
from jmem.targets import resolve

CHOICES = [
    (None, "bfloat16", 128, "xla"),  # no GPU
    ("h200", "bfloat16", 128, "cudnn"),
    ("rtx3090", "float16", 64, "cudnn"),
    ("h200", "float32", 128, "xla"),
    ("h200", "bfloat16", 256, "xla"),
    ("h200", "bfloat16", 4, "xla"),
]


@pytest.mark.parametrize("target, dtype, head_dim, expected", CHOICES)
def test_attention_follows_the_target_compiled_for(target, dtype, head_dim, expected):
    card = None if target is None else resolve(target)
    assert choose(card, dtype, head_dim) == expected


def test_documents_of_a_packed_row_do_not_see_each_other():
    rope = Rope(head_dim=4)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 2, 4))
    positions = jnp.arange(7, dtype=jnp.int32)[None]
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]], jnp.int32)

    def attend(attention, part):
        q_, k_, v_ = (x[:, part] for x in (q, k, v))
        return attention(q_, k_, v_, rope, positions[:, part], jnp.int32(0), None)[0]

    packed = attend(causal(segments=segments), slice(None))
    for part in (slice(0, 3), slice(3, 7)):
        alone = attend(causal(), part)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


def test_segments_are_refused_where_they_would_be_materialised():
    with pytest.raises(ValueError, match=r"segments need implementation='xla'"):
        causal("cudnn", segments=jnp.zeros((1, 4), jnp.int32))


def test_rotation_depends_on_distance_only():
    rope = Rope(head_dim=8, scaling=Llama3Scaling())
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [jnp.full((1, 1), p, jnp.int32) for p in (i, j)]
        return jnp.sum(rope(q, at[0]) * rope(k, at[1]))

    np.testing.assert_allclose(score(9, 4), score(1009, 1004), atol=1e-3)
    assert abs(score(9, 4) - score(9, 8)) > 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 0.5},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 0.0},
        {"original_max_positions": 0},
    ],
)
def test_scaling_refuses(fields):
    with pytest.raises(ValueError, match="Llama3Scaling"):
        Llama3Scaling(**fields)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_attention_is_jax_s_own_with_heads_before_slots(kv_heads):
    keys = jax.random.split(jax.random.key(kv_heads), 4)
    q = jax.random.normal(keys[0], (2, 5, 6, 8))
    k, v = (jax.random.normal(key, (2, 7, kv_heads, 8)) for key in keys[1:3])
    seen = jax.random.bernoulli(keys[3], 0.5, (2, 5, 7)).at[..., 0].set(True)
    expected = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    found = grouped_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    np.testing.assert_allclose(found, expected, atol=2e-6)
