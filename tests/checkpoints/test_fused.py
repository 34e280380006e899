"""GPT-2's c_attn: one adapter in PEFT, three here, and the same product both ways.

The reference is PEFT's own formula on torch's names and layout, in NumPy: a Conv1D's
y = x W + b gains lora_B(lora_A(x)) * scaling, with in and out those of W [in, out]
(src/peft/tuners/lora/layer.py); a module's r and alpha are those of the first key of
rank_pattern and alpha_pattern that its name ends with, else the config's (tuners/lora/
model.py); GPT-2 splits the 3M outputs into q, k and v, in this order.
"""

import json
import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.typing import DTypeLike
from mutations import count

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.finetune.lora import Lora, lora_linear

from .test_mutations import damaged
from .test_peft import FAMILIES, folder_of

GPT2, _ = FAMILIES["gpt2"]
WIDTH, LAYERS, RANK = GPT2.hidden, GPT2.layers, 4
C_ATTN = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
C_PROJ = "base_model.model.transformer.h.{}.attn.c_proj.lora_{}.weight"
X = np.random.default_rng(9).standard_normal((6, WIDTH)).astype(np.float32)


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return random.standard_normal(shape).astype(np.float32)


def fused_tensors(rank=RANK, dtype: DTypeLike = np.float32):
    shapes = {"A": (rank, WIDTH), "B": (3 * WIDTH, rank)}
    return {
        C_ATTN.format(i, half): normal(*shape, seed=i).astype(dtype)
        for i in range(LAYERS)
        for half, shape in shapes.items()
    }


def fused_folder(path, tensors=None, **changes):
    changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True} | changes
    return folder_of(path, tensors or fused_tensors(), **changes)


def adapters_of(*names, dtype: DTypeLike = np.float32):
    return {
        "attention": {
            name: {
                "lora_a": normal(LAYERS, WIDTH, RANK, seed=ord(name)).astype(dtype),
                "lora_b": normal(LAYERS, RANK, WIDTH, seed=ord(name)).astype(dtype),
            }
            for name in names
        }
    }


def opened(folder):
    """The folder's configuration and tensors, past jmem."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    return raw, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def pefts_product(raw, tensors, name, layer):
    """What PEFT adds to a module's output for X, in float64."""
    module = name.split(".")[-3]
    rank = raw.get("rank_pattern", {}).get(module, raw["r"])
    alpha = raw.get("alpha_pattern", {}).get(module, raw["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if raw["use_rslora"] else rank)
    a, b = (tensors[name.format(layer, half)].astype(np.float64) for half in "AB")
    assert len(a) == rank
    return (X.astype(np.float64) @ a.T) @ b.T * scaling


def our_product(settings, adapters, name, layer):
    """What Lora adds to the output of q, k, v or o for X; zeros without an adapter."""
    if name not in adapters["attention"]:
        return np.zeros((len(X), WIDTH))
    leaf = jax.tree.map(lambda x: jnp.asarray(x[layer]), adapters["attention"][name])
    leaf["kernel"] = jnp.zeros((WIDTH, WIDTH))
    return lora_linear(Lora(**settings).scale)(name, leaf, jnp.asarray(X))


def assert_same_products(raw, tensors, settings, adapters):
    """In every layer; a product of 32 and 12 terms of about 1 is good to 1e-5."""
    for layer in range(LAYERS):
        ours = [our_product(settings, adapters, name, layer) for name in "qkv"]
        theirs = pefts_product(raw, tensors, C_ATTN, layer)
        np.testing.assert_allclose(np.hstack(ours), theirs, rtol=1e-5, atol=2e-4)
        if "o" in adapters["attention"]:
            ours = our_product(settings, adapters, "o", layer)
            theirs = pefts_product(raw, tensors, C_PROJ, layer)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-4)


class TestIn:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_q_k_and_v_share_a_and_have_a_third_of_b_each(self, tmp_path, rslora):
        tensors = fused_tensors()
        folder = fused_folder(tmp_path / "a", tensors, use_rslora=rslora)
        found = checkpoints.load_adapter(folder, GPT2)
        assert found.settings["maps"] == ("q", "k", "v")
        assert (found.settings["rank"], found.settings["alpha"]) == (RANK, 16)
        for third, name in enumerate("qkv"):
            for i in range(LAYERS):
                a, b = (tensors[C_ATTN.format(i, half)] for half in "AB")
                leaf = found.adapters["attention"][name]
                np.testing.assert_array_equal(leaf["lora_a"][i], a.T)
                rows = slice(third * WIDTH, (third + 1) * WIDTH)
                np.testing.assert_array_equal(leaf["lora_b"][i], b[rows].T)
        raw, _ = opened(folder)
        assert_same_products(raw, tensors, found.settings, found.adapters)

    def test_what_is_shared_is_not_one_buffer(self, tmp_path):
        """Training consumes its state: a buffer that is given twice is an error."""
        found = checkpoints.load_adapter(fused_folder(tmp_path / "a"), GPT2)
        expected = jax.tree.map(np.array, found.adapters)
        lowered = jax.jit(lambda tree: tree, donate_argnums=0)(found.adapters)
        chex.assert_trees_all_equal(lowered, expected)

    def test_every_map_at_once(self, tmp_path):
        """c_proj is two maps; the pattern is the file's own content."""
        tensors, inner = fused_tensors(), GPT2.intermediate
        for i in range(LAYERS):
            shapes = {"attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (WIDTH, inner)}
            for module, (inputs, outputs) in (
                shapes | {"mlp.c_proj": (inner, WIDTH)}
            ).items():
                name = f"base_model.model.transformer.h.{i}.{module}.lora_{{}}.weight"
                tensors[name.format("A")] = normal(RANK, inputs)
                tensors[name.format("B")] = normal(outputs, RANK)
        for targets in (["c_attn", "c_proj", "c_fc"], "all-linear"):
            folder = fused_folder(tmp_path / "a", tensors, target_modules=targets)
            found = checkpoints.load_adapter(folder, GPT2)
            assert found.settings["maps"] == ("q", "k", "v", "o", "up", "down")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"rank_pattern": {"c_attn": 8}}, r"rank_pattern is .* {'c_attn': 12}, as"),
            (
                {"rank_pattern": {"c_attn": 12}},
                r"alpha_pattern is {}; .* {'c_attn': 48}, as",
            ),
            ({"alpha_pattern": {"c_attn": 48}}, r"rank_pattern is {}; "),
            (
                {"rank_pattern": {"c_fc": 12}, "alpha_pattern": {"c_fc": 48}},
                r"rank_pattern is {'c_fc': 12}",
            ),
            (
                {"rank_pattern": {"c_attn": 12}, "alpha_pattern": {"c_attn": 47}},
                r"alpha_pattern is {'c_attn': 47}; .* {'c_attn': 48}, as the",
            ),
            (
                {"rank_pattern": {"c_attn": 12}, "alpha_pattern": {"c_attn": 48}},
                r"lora_A.weight' has shape \(4, 32\); r=12 and",
            ),
        ],
    )
    def test_other_patterns_and_ranks_are_refused(self, tmp_path, changes, message):
        folder = fused_folder(tmp_path / "a", **changes)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_adapter(folder, GPT2)


class TestOut:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
    def test_what_came_in_goes_out_the_same(self, tmp_path, dtype):
        tensors = fused_tensors(dtype=dtype)
        found = checkpoints.load_adapter(fused_folder(tmp_path / "a", tensors), GPT2)
        checkpoints.save_adapter(found.adapters, GPT2, tmp_path / "b", alpha=16)
        raw, out = opened(tmp_path / "b")
        assert out.keys() == tensors.keys()
        for name, value in tensors.items():
            assert out[name].dtype == dtype
            assert out[name].tobytes() == value.tobytes(), name
        assert (raw["r"], raw["lora_alpha"]) == (RANK, 16)
        assert (raw["target_modules"], raw["fan_in_fan_out"]) == (["c_attn"], True)
        assert "rank_pattern" not in raw

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("names", ["qkv", "qkvo", "qv", "kvo"])
    def test_adapters_of_their_own_are_stacked_and_come_back(
        self, tmp_path, names, rslora
    ):
        """Their product is PEFT's; the tree and its settings are as they were."""
        adapters = adapters_of(*names)
        checkpoints.save_adapter(
            jax.tree.map(jnp.asarray, adapters),
            GPT2,
            tmp_path / "a",
            alpha=2.5,
            rslora=rslora,
        )
        raw, tensors = opened(tmp_path / "a")
        assert tensors[C_ATTN.format(0, "A")].shape == (3 * RANK, WIDTH)
        assert raw["rank_pattern"] == {"c_attn": 3 * RANK}
        settings = {"rank": RANK, "alpha": 2.5, "rslora": rslora}
        assert_same_products(raw, tensors, settings, adapters)
        found = checkpoints.load_adapter(tmp_path / "a", GPT2)
        chex.assert_trees_all_equal(found.adapters, adapters)
        settings |= {"dora": False, "dropout": 0.0, "maps": tuple(names)}
        assert found.settings == settings

    def test_one_of_the_three_needs_no_more_rank(self, tmp_path):
        adapters = adapters_of("k")
        checkpoints.save_adapter(adapters, GPT2, tmp_path / "a", alpha=8)
        raw, tensors = opened(tmp_path / "a")
        assert tensors[C_ATTN.format(0, "A")].shape == (RANK, WIDTH)
        settings = {"rank": RANK, "alpha": 8.0}
        assert_same_products(raw, tensors, settings, adapters)
        found = checkpoints.load_adapter(tmp_path / "a", GPT2)  # A goes to all three
        assert_same_products(raw, tensors, found.settings, found.adapters)

    @pytest.mark.parametrize("rslora", [False, True])
    def test_what_peft_trained_on_gives_every_map_its_rank(self, tmp_path, rslora):
        """B is full then: q reads k's A. The others gain zeros, and no product."""
        checkpoints.save_adapter(
            adapters_of(*"qkvo"), GPT2, tmp_path / "a", alpha=8, rslora=rslora
        )
        raw, tensors = opened(tmp_path / "a")
        tensors[C_ATTN.format(2, "B")][0, -1] = 0.5
        safetensors.numpy.save_file(
            tensors, tmp_path / "a" / "adapter_model.safetensors"
        )
        found = checkpoints.load_adapter(tmp_path / "a", GPT2)
        assert found.settings["rank"] == 3 * RANK
        assert_same_products(raw, tensors, found.settings, found.adapters)
        again = tmp_path / "b"
        alpha = found.settings["alpha"]
        checkpoints.save_adapter(
            found.adapters, GPT2, again, alpha=alpha, rslora=rslora
        )
        assert_same_products(*opened(again), found.settings, found.adapters)

    def test_untrained_adapters_come_back_too(self, tmp_path):
        """Every B is zero: whose block is whose shows in its place alone."""
        adapters = adapters_of(*"qv")
        for pair in adapters["attention"].values():
            pair["lora_b"] = np.zeros_like(pair["lora_b"])
        checkpoints.save_adapter(adapters, GPT2, tmp_path / "a", alpha=8)
        found = checkpoints.load_adapter(tmp_path / "a", GPT2)
        chex.assert_trees_all_equal(found.adapters, adapters)

    def test_damaged_folders_give_an_error_or_a_whole_adapter(self, tmp_path):
        """A damaged B is full, so the rank may be another, but is that of all maps."""
        folder = tmp_path / "a"
        checkpoints.save_adapter(adapters_of(*"qvo"), GPT2, folder, alpha=8)
        originals = {path.name: path.read_bytes() for path in folder.iterdir()}
        whole, refusals = 0, []
        for case in range(count(100)):
            random = np.random.default_rng([case, 1])
            name = sorted(originals)[case % 2]
            (folder / name).write_bytes(damaged(name, originals[name], random))
            try:
                found = checkpoints.load_adapter(folder, GPT2)
            except CheckpointError as error:
                refusals.append(str(error))
            else:
                rank = Lora(**found.settings).rank
                shapes = (LAYERS, WIDTH, rank), (LAYERS, rank, WIDTH)
                assert found.settings["maps"] == tuple(found.adapters["attention"])
                for pair in found.adapters["attention"].values():
                    assert (pair["lora_a"].shape, pair["lora_b"].shape) == shapes
                whole += 1
            (folder / name).write_bytes(originals[name])
        assert all(text.startswith(str(folder)) for text in refusals), refusals
        assert min(whole, len(refusals)) > 10

    def test_adapters_that_no_tensor_can_hold(self, tmp_path):
        def refused(message, tree):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.save_adapter(tree, GPT2, tmp_path / "a", alpha=8)

        adapters = adapters_of(*"qkv")
        del adapters["attention"]["k"]["lora_a"]
        refused(r"attention/k/lora_a is missing", adapters)
        adapters = adapters_of(*"qk")
        adapters["attention"] |= adapters_of("v", dtype=np.float16)["attention"]
        refused(r"q, attention/k, attention/v have dtypes float16, float32", adapters)
