"""PEFT folders: what PEFT would compute is what we load, and the way back.

Names, shapes and fields are those of huggingface/peft 0.20: `get_peft_model_state_dict`
drops the adapter's name from "base_model.model.<module>.lora_A.default.weight"
(src/peft/utils/save_and_load.py); lora_A is Linear(in, r), lora_B Linear(r, out), both
stored [out, in], the scale lora_alpha / r or / sqrt(r) (tuners/lora/layer.py); the
fields of adapter_config.json are LoraConfig's (tuners/lora/config.py), sets as lists
and None as null (src/peft/config.py). The folders below are written from that by hand.
"""

import dataclasses
import json
import os
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from mutations import count
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.finetune.lora import Lora, lora_linear
from jmem.models import zoo

from . import tiny
from .test_mutations import damaged

MODULES = {
    "q_proj": ("attention", "q", "self_attn.q_proj", 32, 32),
    "k_proj": ("attention", "k", "self_attn.k_proj", 32, 16),
    "v_proj": ("attention", "v", "self_attn.v_proj", 32, 16),
    "o_proj": ("attention", "o", "self_attn.o_proj", 32, 32),
    "gate_proj": ("mlp", "gate", "mlp.gate_proj", 32, 64),
    "up_proj": ("mlp", "up", "mlp.up_proj", 32, 64),
    "down_proj": ("mlp", "down", "mlp.down_proj", 64, 32),
}
"""Our two names, Hugging Face's within a layer, in and out: TINY's maps."""

CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "somebody/tiny",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.20.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
"""As LoraConfig(r=4, lora_alpha=16, ...).save_pretrained writes it."""


_LAYER_NORM = dataclasses.replace(
    TINY, norm="layer", gated=False, qkv_bias=True, o_bias=True, mlp_bias=True
)
_LEARNED = dataclasses.replace(_LAYER_NORM, positions="learned", kv_heads=4)
FAMILIES = {
    "opt": (
        dataclasses.replace(_LEARNED, activation="relu"),
        "model.decoder.layers",
    ),
    "phi": (
        dataclasses.replace(
            _LAYER_NORM, parallel=True, head_bias=True, activation="gelu_new"
        ),
        "model.layers",
    ),
    "gpt2": (
        dataclasses.replace(_LEARNED, activation="gelu_new"),
        "transformer.h",
    ),
}
"""A decoder of each family that is no Llama, and where its blocks are in torch."""


def peft_tensors(targets, rank=4, dtype=np.float32, layers=5):
    random = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        for target in targets:
            _, _, module, inputs, outputs = MODULES[target]
            name = f"base_model.model.model.layers.{i}.{module}"
            for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                value = random.standard_normal(shape).astype(dtype)
                tensors[f"{name}.lora_{half}.weight"] = value
    return tensors


def folder_of(path, tensors=None, **changes):
    config = CONFIG | changes
    if tensors is None:
        tensors = peft_tensors(config["target_modules"])
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    raw = tiny.safetensors_bytes(tensors)
    (path / "adapter_model.safetensors").write_bytes(raw)
    return path


def expected_tree(tensors, targets):
    """Transposed and stacked, map by map."""
    tree: dict = {}
    for target in targets:
        part, ours, module, _, _ = MODULES[target]
        names = [f"base_model.model.model.layers.{i}.{module}" for i in range(5)]
        tree.setdefault(part, {})[ours] = {
            f"lora_{half.lower()}": np.stack(
                [tensors[f"{name}.lora_{half}.weight"].T for name in names]
            )
            for half in "AB"
        }
    return tree


class TestLoad:
    @pytest.mark.parametrize("targets", [["v_proj", "q_proj"], [*MODULES]], ids=len)
    def test_a_folder_gives_the_tree_and_the_settings(self, tmp_path, targets):
        tensors = peft_tensors(targets)
        folder = folder_of(tmp_path / "a", tensors, target_modules=targets)
        found = checkpoints.load_adapter(folder, TINY)
        chex.assert_trees_all_equal(found.adapters, expected_tree(tensors, targets))
        assert found.base == "somebody/tiny"
        lora = Lora(**found.settings)
        assert (lora.rank, lora.alpha, lora.rslora, lora.dropout) == (
            4,
            16,
            False,
            0.05,
        )
        assert set(lora.maps) == {MODULES[target][1] for target in targets}

    @pytest.mark.parametrize("rslora", [False, True])
    def test_the_product_is_pefts(self, tmp_path, rslora):
        """y = x Wᵀ + lora_B(lora_A(x)) * scaling, as torch stores the three."""
        tensors = peft_tensors(["v_proj", "q_proj"])
        folder = folder_of(tmp_path / "a", tensors, use_rslora=rslora)
        found = checkpoints.load_adapter(folder, TINY)
        weights = random_params(TINY)["blocks"]["attention"]["v"]["kernel"][3].T
        x = np.random.default_rng(1).standard_normal((2, 6, 32)).astype(np.float32)
        name = "base_model.model.model.layers.3.self_attn.v_proj.lora_{}.weight"
        a, b = tensors[name.format("A")], tensors[name.format("B")]
        scaling = 16 / 4**0.5 if rslora else 16 / 4
        expected = x @ weights.T + (x @ a.T) @ b.T * scaling

        leaf = jax.tree.map(lambda x: x[3], found.adapters["attention"]["v"])
        linear = lora_linear(Lora(**found.settings).scale)
        y = linear("v", leaf | {"kernel": jnp.asarray(weights.T)}, jnp.asarray(x))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(
        "targets",
        [
            "all-linear",
            r".*\.(q|v)_proj",
            "(a+)+$",  # run, it would never end
            None,
            [],
            ["self_attn.q_proj", "v_proj", "lm_head_of_another"],
            [f"model.layers.{i}.self_attn.{n}_proj" for i in range(5) for n in "qv"],
        ],
        ids=str,
    )
    def test_every_way_to_name_the_same_maps(self, tmp_path, targets):
        tensors = peft_tensors(["q_proj", "v_proj"])
        folder = folder_of(tmp_path / "a", tensors, target_modules=targets)
        found = checkpoints.load_adapter(folder, TINY)
        assert set(found.settings["maps"]) == {"q", "v"}

    @pytest.mark.parametrize("excluded", [["o_proj"], ["self_attn.o_proj"], ".*o_proj"])
    def test_excluded_modules(self, tmp_path, excluded):
        changes = {
            "target_modules": ["q_proj", "o_proj"],
            "exclude_modules": excluded,
        }
        folder = folder_of(tmp_path / "a", peft_tensors(["q_proj"]), **changes)
        assert checkpoints.load_adapter(folder, TINY).settings["maps"] == ("q",)

    def test_fields_that_an_older_version_does_not_write(self, tmp_path):
        folder = folder_of(tmp_path / "a")
        kept = ("peft_type", "r", "lora_alpha", "target_modules")
        old = {field: CONFIG[field] for field in kept}
        (folder / "adapter_config.json").write_text(json.dumps(old))
        found = checkpoints.load_adapter(folder, TINY)
        assert (found.settings["rslora"], found.settings["dropout"]) == (False, 0.0)
        assert found.base is None

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
    def test_values_keep_their_dtype_and_mixed_ones_widen(self, tmp_path, dtype):
        tensors = peft_tensors(["q_proj", "v_proj"], dtype=dtype)
        found = checkpoints.load_adapter(folder_of(tmp_path / "a", tensors), TINY)
        expected = expected_tree(tensors, ["q_proj", "v_proj"])
        chex.assert_trees_all_equal_shapes_and_dtypes(found.adapters, expected)
        first = next(iter(tensors))
        tensors[first] = tensors[first].astype(np.float32)
        found = checkpoints.load_adapter(folder_of(tmp_path / "a", tensors), TINY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found.adapters)} == {
            "float32"
        }


MAGNITUDE = "base_model.model.model.layers.{}.{}.lora_magnitude_vector"


def dora_tensors(targets, dtype=np.float32):
    """As `peft_tensors`, and the third tensor of `DoraLinearLayer`, [out].

    `get_peft_model_state_dict` cuts ".weight" off its name as well as the adapter's.
    """
    random = np.random.default_rng(1)
    lengths = {
        MAGNITUDE.format(i, MODULES[target][2]): random.random(MODULES[target][4])
        for i in range(5)
        for target in targets
    }
    return peft_tensors(targets, dtype=dtype) | {
        name: (1 + value).astype(np.float32) for name, value in lengths.items()
    }


class TestDora:
    def test_the_product_is_pefts(self, tmp_path):
        """As `DoraLinearLayer.forward` adds it to the base's result, at inference."""
        tensors = dora_tensors(["v_proj", "q_proj"])
        folder = folder_of(tmp_path / "a", tensors, use_dora=True)
        found = checkpoints.load_adapter(folder, TINY)
        lora = Lora(**found.settings)
        assert lora.dora
        weights = random_params(TINY)["blocks"]["attention"]["v"]["kernel"][3].T
        x = np.random.default_rng(1).standard_normal((2, 6, 32)).astype(np.float32)
        name = "base_model.model.model.layers.3.self_attn.v_proj.lora_{}.weight"
        a, b = tensors[name.format("A")], tensors[name.format("B")]
        magnitude = tensors[MAGNITUDE.format(3, "self_attn.v_proj")]
        norm = np.linalg.norm(weights + 4 * b @ a, axis=1)
        ratio = magnitude / norm
        base = x @ weights.T
        expected = base + (ratio - 1) * base + ratio * ((x @ a.T) @ b.T) * 4

        leaf = jax.tree.map(lambda x: x[3], found.adapters["attention"]["v"])
        linear = lora_linear(lora.scale)
        y = linear("v", leaf | {"kernel": jnp.asarray(weights.T)}, jnp.asarray(x))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
    def test_round_trip_keeps_each_dtype(self, tmp_path, dtype):
        tensors = dora_tensors([*MODULES], dtype)
        folder = folder_of(
            tmp_path / "a", tensors, use_dora=True, target_modules=[*MODULES]
        )
        found = checkpoints.load_adapter(folder, TINY)
        leaf = found.adapters["mlp"]["down"]
        assert leaf["lora_a"].dtype == dtype
        assert leaf["magnitude"].dtype == np.float32
        checkpoints.save_adapter(found.adapters, TINY, tmp_path / "b", alpha=16)
        raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert raw["use_dora"] is True
        back = safetensors.numpy.load_file(tmp_path / "b/adapter_model.safetensors")
        chex.assert_trees_all_equal(back, tensors)

    def test_a_map_without_its_magnitude_is_refused(self, tmp_path):
        tensors = dora_tensors(["q_proj", "v_proj"])
        folder = folder_of(tmp_path / "a", tensors, use_dora=True)
        adapters = checkpoints.load_adapter(folder, TINY).adapters
        del adapters["attention"]["v"]["magnitude"]
        with pytest.raises(CheckpointError, match="v/magnitude is missing"):
            checkpoints.save_adapter(adapters, TINY, tmp_path / "b", alpha=16)
        short = tensors | {MAGNITUDE.format(2, "self_attn.v_proj"): np.ones(3, "f")}
        folder = folder_of(tmp_path / "c", short, use_dora=True)
        with pytest.raises(CheckpointError, match=r"shape \(3,\); .* shape \(16,\)"):
            checkpoints.load_adapter(folder, TINY)

    def test_gpt2_s_c_attn_has_the_columns_of_all_three(self, tmp_path):
        config, _ = FAMILIES["gpt2"]
        random = np.random.default_rng(0)

        def pair():
            return {
                "lora_a": random.standard_normal((5, 32, 4)).astype("f"),
                "lora_b": random.standard_normal((5, 4, 32)).astype("f"),
                "magnitude": random.random((5, 32)).astype("f"),
            }

        adapters = {"attention": {name: pair() for name in "qkv"}}
        # Nothing to multiply, but a length that was trained.
        adapters["attention"]["k"]["lora_a"][:] = 0
        adapters["attention"]["k"]["lora_b"][:] = 0
        checkpoints.save_adapter(adapters, config, tmp_path / "a", alpha=8)
        found = safetensors.numpy.load_file(tmp_path / "a/adapter_model.safetensors")
        name = "base_model.model.transformer.h.3.attn.c_attn.lora_magnitude_vector"
        lengths = [adapters["attention"][n]["magnitude"][3] for n in "qkv"]
        np.testing.assert_array_equal(found[name], np.concatenate(lengths))
        back = checkpoints.load_adapter(tmp_path / "a", config)
        chex.assert_trees_all_equal(back.adapters, adapters)
        assert back.settings["dora"]

        del adapters["attention"]["k"]
        message = "attention/k has no adapter, .* c_attn, whose DoRA needs"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save_adapter(adapters, config, tmp_path / "b", alpha=8)


REFUSED = {
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; supported: LORA"),
    "no method": ({"peft_type": None}, "peft_type is missing"),
    "DoRA": ({"use_dora": True}, "lora_magnitude_vector' is missing; use_dora and"),
    "DoRA text": ({"use_dora": "yes"}, "use_dora is 'yes'; supported: true or false"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'; supported: 'none'"),
    "bias of B": ({"lora_bias": True}, "lora_bias is True"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
    "alphas": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is {'q_proj': 8}"),
    "one layer": ({"layers_to_transform": 0}, "layers_to_transform is 0"),
    "some layers": ({"layers_to_transform": [0, 1]}, r"layers_to_transform is \[0"),
    "repeated layers": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "layer_replication is",
    ),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters is"),
    "invocation": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_n"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "a later variant": ({"use_zora": {"x": 1}}, "use_zora is {'x': 1}; .*something el"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha is '16'; supported: a positive"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha is 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is missing"),
    "rank zero": ({"r": 0}, "r is 0; supported: an integer of 1"),
    "rank float": ({"r": 4.0}, "r is 4.0; supported: an integer"),
    "rslora": ({"use_rslora": 1}, "use_rslora is 1; supported: true or false"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1.0; supported: a probability"),
    "base": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    "targets": ({"target_modules": [1]}, r"target_modules is \[1\]; supported: a list"),
    "no map": (
        {"target_modules": ["c_attn"]},
        r"\['c_attn'\]; .*q_proj, k_proj, v_p",
    ),
    "one layer's": (
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        "leaves model.layers.0.self_attn.q_proj without an adapter",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_computes_something_else_is_refused_by_name(tmp_path, changes, message):
    folder = folder_of(tmp_path / "a", peft_tensors(["q_proj", "v_proj"]), **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load_adapter(folder, TINY)
    assert str(error.value).startswith(str(folder))


class TestAnotherBase:
    Q = "base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight"

    @pytest.mark.parametrize("config", ["smollm2-135m", "llama2-7b"])
    def test_another_model_names_tensor_shapes_and_its_own_base(self, tmp_path, config):
        message = (
            r"adapter_model.safetensors: tensor '.*layers.0.self_attn.q_proj.lora_A.we"
            r"ight' has shape \(4, 32\); r=4 and this base need shape \(4, \d+\)\. .*"
            r"another base. It was trained on 'somebody/tiny'\."
        )
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_adapter(folder_of(tmp_path / "a"), zoo.get(config))

    def test_a_missing_tensor(self, tmp_path):
        tensors = peft_tensors(["q_proj", "v_proj"])
        del tensors[self.Q]
        with pytest.raises(CheckpointError, match=f"'{self.Q}' is missing; r=4"):
            checkpoints.load_adapter(folder_of(tmp_path / "a", tensors), TINY)

    def test_a_map_that_is_missing_whole(self, tmp_path):
        folder = folder_of(tmp_path / "a", peft_tensors(["q_proj"]))
        with pytest.raises(CheckpointError, match=r"0.self_attn.v_proj.*is missing"):
            checkpoints.load_adapter(folder, TINY)

    def test_a_pattern_that_left_out_a_layer(self, tmp_path):
        tensors = peft_tensors(["q_proj"], layers=4)
        folder = folder_of(tmp_path / "a", tensors, target_modules=".*q_proj")
        with pytest.raises(CheckpointError, match=r"leaves model.layers.4.self_attn.q"):
            checkpoints.load_adapter(folder, TINY)

    @pytest.mark.parametrize(
        "name",
        [
            "base_model.model.lm_head.lora_A.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.model.embed_tokens.weight",
            "base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
        ],
    )
    def test_an_extra_tensor(self, tmp_path, name):
        tensors = peft_tensors(["q_proj", "v_proj"]) | {name: np.ones((4, 32), "f")}
        folder = folder_of(tmp_path / "a", tensors)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}' has no place"):
            checkpoints.load_adapter(folder, TINY)

    def test_another_rank_and_integers(self, tmp_path):
        folder = folder_of(tmp_path / "a", r=8)
        with pytest.raises(CheckpointError, match=r"\(4, 32\); r=8 and .* \(8, 32\)"):
            checkpoints.load_adapter(folder, TINY)
        tensors = peft_tensors(["q_proj", "v_proj"])
        tensors[self.Q] = tensors[self.Q].astype(np.int8)
        folder = folder_of(tmp_path / "a", tensors)
        with pytest.raises(CheckpointError, match="has dtype int8; adapters are flo"):
            checkpoints.load_adapter(folder, TINY)

    def test_values_that_are_not_finite(self, tmp_path):
        tensors = peft_tensors(["q_proj", "v_proj"])
        tensors[self.Q][0, 1] = np.inf
        message = f"{re.escape(self.Q)}' holds values that are not finite"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_adapter(folder_of(tmp_path / "a", tensors), TINY)


class TestFiles:
    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
            checkpoints.load_adapter(tmp_path / "absent", TINY)
        folder = folder_of(tmp_path / "a")
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
            checkpoints.load_adapter(folder, TINY)
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match=r"adapter_model.bin, a pickle"):
            checkpoints.load_adapter(folder, TINY)

    def test_damaged_folders_give_an_error_or_a_whole_adapter(self, tmp_path):
        folder = folder_of(tmp_path / "a")
        originals = {path.name: path.read_bytes() for path in folder.iterdir()}
        whole = checkpoints.load_adapter(folder, TINY).adapters
        errors = results = 0
        for case in range(count(200)):
            random = np.random.default_rng(case)
            name = sorted(originals)[case % 2]
            (folder / name).write_bytes(damaged(name, originals[name], random))
            try:
                found = checkpoints.load_adapter(folder, TINY)
            except CheckpointError as error:
                errors += str(error).startswith(str(folder))
            else:
                chex.assert_trees_all_equal_shapes(found.adapters, whole)
                Lora(**found.settings)
                results += 1
            (folder / name).write_bytes(originals[name])
        assert errors + results == count(200), "an error that does not name the file"
        assert min(errors, results) > 20


class TestSave:
    @pytest.fixture
    def adapters(self):
        return expected_tree(peft_tensors([*MODULES]), [*MODULES])

    @pytest.mark.parametrize("on_device", [False, True])
    def test_the_files_are_those_of_peft(self, tmp_path, adapters, on_device):
        from safetensors import safe_open

        given = jax.tree.map(jnp.asarray, adapters) if on_device else adapters
        checkpoints.save_adapter(
            given, TINY, tmp_path / "a", alpha=16.0, dropout=0.05, base="somebody/tiny"
        )
        assert sorted(os.listdir(tmp_path / "a")) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        expected = peft_tensors([*MODULES])
        with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(file.get_tensor(name), value)
        raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert set(raw.pop("target_modules")) == set(MODULES)
        assert raw.items() <= CONFIG.items()
        assert {"r", "lora_alpha", "peft_type", "task_type", "use_rslora"} <= set(raw)
        assert type(raw["lora_alpha"]) is int  # as LoraConfig has it

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
    def test_round_trip(self, tmp_path, adapters, dtype):
        adapters = jax.tree.map(lambda x: x.astype(dtype), adapters)
        del adapters["attention"]["k"]
        checkpoints.save_adapter(
            adapters, TINY, tmp_path / "a", alpha=2.5, rslora=True, dropout=0.1
        )
        found = checkpoints.load_adapter(tmp_path / "a", TINY)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.adapters, adapters)
        chex.assert_trees_all_equal(found.adapters, adapters)
        assert found.settings == {
            "rank": 4,
            "alpha": 2.5,
            "rslora": True,
            "dora": False,
            "dropout": 0.1,
            "maps": ("q", "v", "o", "gate", "up", "down"),
        }

    @pytest.mark.parametrize(
        "family, maps",
        {
            "opt": {"attention": {"o": "self_attn.out_proj"}, "mlp": {"up": "fc1"}},
            "phi": {"attention": {"o": "self_attn.dense"}, "mlp": {"down": "mlp.fc2"}},
            "gpt2": {"attention": {"o": "attn.c_proj"}, "mlp": {"up": "mlp.c_fc"}},
        }.items(),
    )
    def test_other_families_have_names_of_their_own(self, tmp_path, family, maps):
        """Modules as transformers' modeling_{opt,phi,gpt2}.py has them.

        GPT-2's two c_proj are told apart, and its maps are Conv1D, which stores
        [in, out] and needs fan_in_fan_out.
        """
        config, stack = FAMILIES[family]
        random = np.random.default_rng(0)
        shapes = {"o": (32, 32), "up": (32, 64), "down": (64, 32)}
        adapters = {
            part: {
                ours: {
                    "lora_a": random.standard_normal((5, shapes[ours][0], 4)),
                    "lora_b": random.standard_normal((5, 4, shapes[ours][1])),
                }
                for ours in names
            }
            for part, names in maps.items()
        }
        adapters = jax.tree.map(lambda x: x.astype(np.float32), adapters)
        checkpoints.save_adapter(adapters, config, tmp_path / "a", alpha=8)
        raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert raw["fan_in_fan_out"] == (family == "gpt2")
        assert ("attn.c_proj" in raw["target_modules"]) == (family == "gpt2")
        assert "c_proj" not in raw["target_modules"]
        found = safetensors.numpy.load_file(tmp_path / "a/adapter_model.safetensors")
        assert len(found) == 2 * 2 * 5
        for part, names in maps.items():
            for ours, module in names.items():
                name = f"base_model.model.{stack}.3.{module}.lora_{{}}.weight"
                leaf = adapters[part][ours]
                np.testing.assert_array_equal(
                    found[name.format("A")], leaf["lora_a"][3].T
                )
                np.testing.assert_array_equal(
                    found[name.format("B")], leaf["lora_b"][3].T
                )
        back = checkpoints.load_adapter(tmp_path / "a", config)
        chex.assert_trees_all_equal(back.adapters, adapters)

    def test_trees_that_are_not_adapters_of_the_configuration(self, tmp_path, adapters):
        def refused(message, tree, alpha=1.0, dropout=0.0):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.save_adapter(
                    tree, TINY, tmp_path / "a", alpha=alpha, dropout=dropout
                )
            assert os.listdir(tmp_path) == []

        refused("'adapters' is no adapter", {})
        params = random_params(TINY)
        refused("'attention/k/kernel' is no adapter", params["blocks"])
        q = adapters["attention"]["q"]
        refused("q/lora_b is missing", {"attention": {"q": {"lora_a": q["lora_a"]}}})
        short = {"attention": {"q": jax.tree.map(lambda x: x[:4], q)}}
        refused(r"q/lora_a has shape \(4, 32, 4\).* need \(5, 32, 4\)", short)
        other = {"attention": {"k": adapters["attention"]["k"], "q": dict(q)}}
        other["attention"]["q"]["lora_a"] = np.ones((5, 32, 3), np.float32)
        refused(r"q/lora_a has shape \(5, 32, 3\).* one rank", other)
        refused("float64", jax.tree.map(lambda x: x.astype(np.float64), adapters))
        for alpha in (0, -1.0, float("nan"), float("inf")):
            refused("save_adapter: lora_alpha is", adapters, alpha=alpha)
        refused("save_adapter: lora_dropout is 1.5", adapters, dropout=1.5)

    def test_nothing_is_overwritten_or_half_written(self, tmp_path, adapters):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").touch()
        with pytest.raises(CheckpointError, match="not an empty folder"):
            checkpoints.save_adapter(adapters, TINY, tmp_path / "a", alpha=1.0)

        gone = jax.tree.map(jnp.asarray, adapters)
        jax.tree.leaves(gone)[-1].delete()
        with pytest.raises(RuntimeError, match="deleted"):
            checkpoints.save_adapter(gone, TINY, tmp_path / "b", alpha=1.0)
        assert os.listdir(tmp_path) == ["a"]
