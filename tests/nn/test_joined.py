"""Maps side by side compute what they compute apart, and only plain ones are joined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY

from jmem.finetune.lora import Lora
from jmem.generate.decode import generate
from jmem.kvcache.gemfilter import GemFilter
from jmem.models.decoder import Decoder
from jmem.nn import quantised
from jmem.nn.joined import join_maps, split_maps
from jmem.nn.stack import run_stack

GPT2 = {"norm": "layer", "positions": "learned", "gated": False, "tied": True}
GPT2 |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


def make(**fields):
    model = Decoder(dataclasses.replace(TINY, **fields))
    params = model.init(jax.random.key(0))
    bias = params["blocks"]["attention"]["q"].get("bias")
    if bias is not None:
        params["blocks"]["attention"]["q"]["bias"] = bias + 0.5
    return model, params, params | {"blocks": join_maps(params["blocks"])}


@pytest.mark.parametrize("fields", [{}, GPT2], ids=["gated", "biases"])
def test_logits_are_the_same_and_the_maps_come_back(fields):
    model, params, joined = make(**fields)
    names = joined["blocks"]["attention"].keys()
    assert names == {"qkv", "o"}
    assert ("gate_up" in joined["blocks"]["mlp"]) is model.config.gated
    apart = split_maps(joined["blocks"], model.config)
    jax.tree.map(np.testing.assert_array_equal, apart, params["blocks"])
    tokens = jnp.array([PROMPTS[0]])

    @jax.jit
    def logits(params):
        x = model.embed(params, tokens)
        positions = jnp.arange(5)[None]
        x = run_stack(model.block, params["blocks"], x, positions, model.ops)[0]
        return model.head(params, x, model.ops)

    np.testing.assert_allclose(logits(joined), logits(params), atol=1e-5)


def test_columns_of_any_number_of_heads_come_back():
    """As a share of all columns, 21 heads of 23 ended a column too early."""
    config = dataclasses.replace(TINY, heads=21, kv_heads=1, head_dim=96)
    shapes = {"q": (1, 1, 21 * 96), "k": (1, 1, 96), "v": (1, 1, 96)}
    maps = {n: {"kernel": np.ones(shape)} for n, shape in shapes.items()}
    apart = split_maps(join_maps({"attention": maps}), config)["attention"]
    assert {n: leaf["kernel"].shape for n, leaf in apart.items()} == shapes


def test_answers_and_a_filters_choice_are_the_same():
    model, params, joined = make()
    gem = GemFilter(layer=1, tokens=4, queries=2)
    for shorten in (None, gem):
        found = [
            generate(model, p, PROMPTS, max_new_tokens=6, shorten=shorten)
            for p in (params, joined)
        ]
        assert found[0] == found[1]


def test_packed_and_adapted_maps_stay_apart():
    _, params, _ = make(hidden=64, head_dim=16, intermediate=64)
    packed = quantised.pack(params, "NF4")["blocks"]
    assert jax.tree.structure(join_maps(packed)) == jax.tree.structure(packed)
    blocks = params["blocks"]
    blocks["mlp"]["up"]["lora_a"] = jnp.zeros((TINY.layers, 64, 2))
    assert join_maps(blocks)["mlp"].keys() == {"gate", "up", "down"}


def test_fine_tuning_says_which_maps_there_are():
    model, _, joined = make()
    with pytest.raises(ValueError, match="side by side"):
        Lora(rank=2).init(model, joined, {}, jax.random.key(0))
