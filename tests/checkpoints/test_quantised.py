"""GGUF files whose linear maps stay as stored: the same values, the same text."""

import dataclasses

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints import layout
from jmem.checkpoints.files import CheckpointError
from jmem.generate.decode import decode_step
from jmem.generate.reading import prefill
from jmem.kvcache.cache import make_empty
from jmem.kvcache.full import Full
from jmem.models.decoder import Decoder
from jmem.nn.quantised import pack, unpack

from . import tiny

Kind = gguf.GGMLQuantizationType


def mix(name: str) -> Kind | None:
    """Types as files mix them; ffn_up's layers have one that cannot stay packed."""
    if ".ffn_down." in name:
        return Kind.Q8_0 if name.startswith(("blk.0.", "blk.3.")) else Kind.Q4_1
    if ".ffn_up." in name:
        return Kind.Q5_0 if name.startswith("blk.0.") else Kind.F16
    return {".attn_q.": Kind.Q5_1, ".attn_k.": Kind.Q4_0}.get(name[5:13], Kind.Q8_0)


def open_mix(folder, variant: str) -> checkpoints.Checkpoint:
    config = tiny.VARIANTS[variant]
    params = random_params(config, scale=0.3)
    tiny.write_gguf(folder / "a.gguf", config, params, quantise=mix)
    return checkpoints.load(folder / "a.gguf", expect=config)


@pytest.mark.parametrize("variant", ["untied", "biased"])
def test_values_are_those_of_the_dequantised_parameters(tmp_path, variant):
    """In every type and layer, q and k (whose rows llama.cpp permutes) included."""
    checkpoint = open_mix(tmp_path, variant)
    packed, params = checkpoint.params(packed=True), checkpoint.params()
    attention, mlp = (packed["blocks"][part] for part in ("attention", "mlp"))
    assert {name: [*attention[name]["kind"]] for name in "qkvo"} == {
        "q": ["Q5_1"],
        "k": ["Q4_0"],
        "v": ["Q8_0"],
        "o": ["Q8_0"],
    }
    assert "kernel" not in attention["q"]
    # Stored [out, in], rows of 64 values as wide as Q8_0's: 64 / 32 * 34 bytes.
    assert mlp["down"]["packed"].shape == (5, 32, 68)
    assert mlp["down"]["packed"].dtype == np.uint8
    np.testing.assert_array_equal(mlp["down"]["kind"]["Q8_0"], [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(mlp["down"]["kind"]["Q4_1"], [0, 1, 1, 0, 1])
    assert mlp["up"].keys() == {"kernel"}  # a layer of F16: dequantised
    assert "kernel" in packed["head"]
    opened = packed | {"blocks": unpack(packed["blocks"], jnp.float32)}
    assert jax.tree.structure(opened) == jax.tree.structure(params)
    for found, expected in zip(*map(jax.tree.leaves, (opened, params)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_prompts_and_new_tokens_have_the_dequantised_model_s_logits(tmp_path):
    checkpoint = open_mix(tmp_path, "untied")
    packed, params = checkpoint.params(packed=True), checkpoint.params()
    model = Decoder(TINY)
    tokens = jnp.array([[5, 9, 1, 30, 7, 11]], jnp.int32)
    plan = Full().plan(model, prompt=6, new_tokens=2)

    def read(params, count):
        lengths = jnp.full((1,), count, jnp.int32)
        return prefill(
            model, params, tokens, lengths, (make_empty(plan),), plans=(plan,)
        )

    expected, _ = read(params, 6)
    found, _ = read(packed, 6)
    assert jnp.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # The last token again, alone: its products are those of a single row.
    _, (cache,) = read(packed, 5)
    step = jax.jit(decode_step, static_argnames=("model", "plan"))
    last = jnp.array([5], jnp.int32)
    found, _ = step(model, packed, tokens[:, 5], last, cache, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_with_nothing_to_keep_packed_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    tiny.write_gguf(path, TINY, random_params(TINY), quantise=lambda _: Kind.F16)
    message = r"a.gguf: no linear map can stay packed, .* types F16, F32\. .*Q4_K, Q5_K"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path).params(packed=True)


def test_packed_parameters_are_not_exported(tmp_path):
    checkpoint = open_mix(tmp_path, "untied")
    message = r"attention/k/packed' holds quantised bytes, .*packed=False"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(checkpoint.params(packed=True), TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestOnTheWayIn:
    """Any checkpoint's maps, quantised as they are read."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        config = dataclasses.replace(TINY, hidden=64, head_dim=16)
        params = random_params(config, scale=0.1)
        checkpoints.save(params, config, tmp_path / "model")
        return checkpoints.load(tmp_path / "model"), params

    @pytest.mark.parametrize("kind", ["NF4", "NF4_DOUBLE"])
    def test_it_is_what_pack_makes_of_the_parameters(self, checkpoint, kind):
        found, params = checkpoint
        params = jax.tree.map(jnp.asarray, params)
        chex.assert_trees_all_equal(found.params(packed=kind), pack(params, kind))

    def test_refuses(self, checkpoint, tmp_path):
        found, _ = checkpoint
        with pytest.raises(ValueError, match="params: packed='nf4' is no type that"):
            # Below `params`, whose annotation the tests check first.
            layout.assemble(found.config, found.tensors, found.dtype, "nf4")
        checkpoints.save(random_params(TINY), TINY, tmp_path / "narrow")
        message = "params: map 'attention/q' has rows of 32 values"
        with pytest.raises(ValueError, match=message):
            checkpoints.load(tmp_path / "narrow").params(packed="NF4")
