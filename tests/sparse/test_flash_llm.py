"""Packing whole models: the smallest format a map, and what is told without weights."""

import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn import pruned, quantised
from jmem.sparse import flash_llm
from jmem.sparse.flash_llm import FORMATS, FragBitmap, KeptDense, TcaBme, TiledCSL

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tree(density, shape=(2, 256, 192), dtype=BFLOAT16, seed=0):
    random = np.random.default_rng(seed)
    kept = random.random(shape) < density
    kernel = np.where(kept, random.standard_normal(shape), 0).astype(dtype)
    return {"blocks": {"mlp": {"up": {"kernel": kernel, "bias": kernel[:, 0]}}}}


def get(params):
    return params["blocks"]["mlp"]["up"]


class TestPack:
    @pytest.mark.parametrize(
        "density, values, formats, expected",
        [
            (0.4, "stored", flash_llm.DEFAULT, FragBitmap),
            (0.05, "stored", flash_llm.DEFAULT, TiledCSL),
            (0.4, "stored", ("FragBitmap", "TiledCSL", "TcaBme"), TcaBme),
            (0.4, "stored", ("TiledCSL",), TiledCSL),
            (0.05, "int4", flash_llm.DEFAULT, FragBitmap),
        ],
    )
    def test_a_map_takes_the_smallest_format(self, density, values, formats, expected):
        params = tree(density)
        found = get(flash_llm.pack(params, values=values, formats=formats))
        assert found.keys() == {"sparse", "bias"}
        assert type(found["sparse"]) is expected
        if values == "stored":
            sizes = {
                kind: pruned.count_bytes(
                    get(flash_llm.pack(params, formats=(kind,)))["sparse"]
                )
                for kind in formats
            }
            assert pruned.count_bytes(found["sparse"]) == min(sizes.values())
            kernel = [
                FORMATS[expected.__name__]
                .unpack(pruned.take_layer(found["sparse"], i))
                .T
                for i in range(2)
            ]
            np.testing.assert_array_equal(kernel, get(params)["kernel"])

    @pytest.mark.parametrize(
        "density, shape", [(0.95, (2, 256, 192)), (0.9, (1, 8, 8))]
    )
    def test_what_is_no_smaller_stays_a_kernel_and_is_told(self, density, shape):
        params = tree(density, shape)
        with pytest.warns(KeptDense, match=r"map 'mlp/up' keeps its kernel, .* bytes"):
            found = flash_llm.pack(params)
        assert get(found)["kernel"] is get(params)["kernel"]

    def test_layers_of_unlike_density_share_rows_and_cap(self):
        params = tree(0.5)
        get(params)["kernel"][1, 64:] = 0
        found = get(flash_llm.pack(params))["sparse"]
        assert found.starts[0, -1] > found.starts[1, -1]
        assert found.values.shape[1] == found.starts[0, -1] + found.cap
        kernel = quantised.unpack({"up": {"sparse": found}}, BFLOAT16)["up"]["kernel"]
        np.testing.assert_array_equal(kernel, get(params)["kernel"])

    def test_nan_and_infinities_stay(self):
        params = tree(0.3)
        get(params)["kernel"][0, 3, :3] = np.nan, np.inf, -np.inf
        found = get(flash_llm.pack(params))["sparse"]
        back = pruned.frag_bitmap.unpack(pruned.take_layer(found, 0)).T
        kernel = get(params)["kernel"][0]
        np.testing.assert_array_equal(back.view(np.uint16), kernel.view(np.uint16))

    def test_what_is_packed_stays(self):
        once = flash_llm.pack(tree(0.3))
        assert get(flash_llm.pack(once))["sparse"] is get(once)["sparse"]

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"formats": ()}, r"formats=\(\) must name some of FragBitmap, TiledCSL"),
            ({"formats": ("CSR",)}, r"formats=\('CSR',\) must name"),
            ({"values": "int2"}, "values='int2' must be one of"),
            (
                {"formats": ("TcaBme",), "values": "int8"},
                "hold no int8 values; FragBitmap does",
            ),
            (
                {"formats": ("TiledCSL",), "values": "float32"},
                "hold no float32 values; FragBitmap does",
            ),
        ],
    )
    def test_refuses_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            flash_llm.pack(tree(0.3), **settings)

    def test_refuses_values_that_do_not_fit(self):
        params = tree(0.3)
        get(params)["kernel"][0, 0, 0] = 1e6
        with pytest.raises(ValueError, match=r"finite values beyond .*65504"):
            flash_llm.pack(params, values="float16")
        get(params)["kernel"][0, 0, 0] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            flash_llm.pack(params, values="int8")
        with pytest.raises(ValueError, match="kernels are int32"):
            flash_llm.pack(tree(0.3, dtype=np.dtype(np.int32)))


@pytest.mark.parametrize("sparsity", [-0.5, 1.0, np.nan])
def test_a_sparsity_outside_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"packer: sparsity={sparsity}"):
        flash_llm.packer(sparsity=sparsity)
    with pytest.raises(ValueError, match=f"abstract: sparsity={sparsity}"):
        flash_llm.abstract(tree(0.3), sparsity)


class TestAbstract:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
    def test_a_mask_drawn_so_has_the_bytes(self, kind, density):
        """And a cap that is no larger, by two rows at most."""
        params = tree(density, (3, 650, 500), seed=1)
        described = get(flash_llm.abstract(params, 1 - density, format=kind))["sparse"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeptDense)
            made = flash_llm.Packing(formats=(kind,))
            layers = [FORMATS[kind].pack(k.T) for k in get(params)["kernel"]]
        assert made.formats == (kind,)
        real = pruned.stack(layers)
        assert jax.tree.structure(jax.tree.map(lambda x: 0, real)).num_leaves == len(
            jax.tree.leaves(described)
        )
        for own, expected in zip(
            jax.tree.leaves(described), jax.tree.leaves(real), strict=True
        ):
            assert own.dtype == expected.dtype
            assert own.ndim == expected.ndim
        ratio = pruned.count_bytes(described) / pruned.count_bytes(real)
        assert abs(ratio - 1) < 0.01
        if kind == "FragBitmap":
            assert 0 <= described.cap - real.cap <= 2

    def test_bytes_of_a_published_size(self):
        """The sheet's sum for FragBitmap at 80 %, a fourth of a bit aside."""
        model = Decoder(zoo.get("llama2-7b"), dtype="bfloat16")
        params = flash_llm.abstract(model.abstract(), 0.8)
        values = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        found = sum(
            pruned.count_bytes(leaf["sparse"])
            for part in ("attention", "mlp")
            for leaf in params["blocks"][part].values()
        )
        bits = 16 * 0.2 + 1 + 0.25 + 8 * 64 / 4096 + 8 * 4 / 4096
        assert found == pytest.approx(values * bits / 8, rel=0.01)
        assert params["head"] == model.abstract()["head"]
