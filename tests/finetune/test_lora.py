"""LoRA: the low-rank product's own gradients, the adapters, refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmem.finetune.lora import MAPS, Lora, attach, low_rank


def test_low_rank_has_the_gradients_of_its_formula():
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(k, (2, 7, n)) for k, n in zip(keys, (6, 5)))
    a = jax.random.normal(keys[2], (6, 3))
    b = jax.random.normal(keys[3], (3, 5))
    expected, transpose = jax.vjp(lambda x, a, b: x @ a @ b, x, a, b)
    found, ours = jax.vjp(low_rank, x, a, b)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(ours(dy), transpose(dy), rtol=1e-5, atol=1e-6)


def test_adapters_start_as_the_paper_says(tiny_params):
    lora = Lora(rank=4, alpha=8.0)
    adapters = lora.adapters(tiny_params["blocks"], jax.random.key(0))
    assert {*adapters["attention"], *adapters["mlp"]} == set(MAPS)
    down = adapters["mlp"]["down"]
    assert down["lora_a"].shape == (5, 64, 4)
    assert down["lora_b"].shape == (5, 4, 32)
    assert 0.9 * 64**-0.5 < np.abs(down["lora_a"]).max() <= 64**-0.5
    assert not down["lora_b"].any()
    assert lora.scale == 2.0


def test_other_maps_leave_a_map_s_adapter_as_it_was(tiny_params):
    blocks, key = tiny_params["blocks"], jax.random.key(3)
    alone = Lora(maps=("v",)).adapters(blocks, key)
    chex.assert_trees_all_equal(
        alone["attention"]["v"], Lora().adapters(blocks, key)["attention"]["v"]
    )


def test_attach_adds_leaves_and_copies_none(tiny_params):
    blocks = tiny_params["blocks"]
    leaf = {"lora_a": jnp.ones(1), "lora_b": jnp.ones(1)}
    both = attach(blocks, {"mlp": {"up": leaf}})
    assert both["mlp"]["up"]["kernel"] is blocks["mlp"]["up"]["kernel"]
    assert both["mlp"]["up"].keys() == {"kernel", "lora_a", "lora_b"}
    assert "lora_a" not in blocks["mlp"]["up"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"maps": ("q", "gates")}, "names 'gates'.*Did you mean 'gate'"),
        ({"maps": ()}, r"maps=\(\) must name at least one"),
        ({"maps": ("q", "q")}, "each once"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)
