"""MixLoRA folders: what the official programs write is what we load, and the way back.

Names, shapes and fields are those of TUDB-Labs/MoE-PEFT 40f8cb7:
`get_lora_layer_weight` (moe_peft/model.py) names the tensors, torch Linear weights
[out, in] in float32; `MixLoraConfig.export` (moe_peft/adapters/mixlora/config.py) and
`save_adapter_weight` (moe_peft/trainer.py) write the fields. TUDB-Labs/MixLoRA d59d09b
reads the same. The folders below are written from that by hand.
"""

import dataclasses
import json
import os
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from mutations import count
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.models import zoo

from . import tiny
from .test_mutations import damaged
from .test_peft import FAMILIES, MODULES

LAYERS, EXPERTS, RANK, HIDDEN = 5, 8, 16, 32

CONFIG = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "down_proj", "up_proj"),
    ],
    "routing_strategy": "mixlora",
    "num_experts": 8,
    "act_fn": "silu",
    "top_k": 2,
    "base_model_name_or_path": "somebody/tiny",
    "task_type": "CAUSAL_LM",
}
"""As MoE-PEFT writes it for templates/mixlora.json: `init_adapter` sets act_fn."""

SETTINGS = {
    "rank": 16,
    "alpha": 32.0,
    "rslora": False,
    "dropout": 0.05,
    "maps": ("q", "k", "v", "o", "gate", "up", "down"),
    "experts": 8,
    "router": "top_k",
    "top_k": 2,
    "top_p": 0.8,
    "balance": 0.001,
    "jitter": 0.0,
    "dora": False,
}
"""What that means: fields that are not written have MoE-PEFT's defaults."""

SAVED = ("alpha", "rslora", "dropout", "router", "top_k", "top_p", "balance", "jitter")
"""The settings that are not in the tree."""


def tensors_of(targets, rank=RANK, experts=EXPERTS, dtype=np.float32, layers=LAYERS):
    """The file's tensors, no two values alike."""
    random = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        layer = f"mixlora.layers.{i}"
        gate = random.standard_normal((experts, HIDDEN)).astype(np.float32)
        tensors[f"{layer}.mlp.moe_gate.weight"] = gate
        for target in targets:
            part, _, module, inputs, outputs = MODULES[target]
            names = [f"{layer}.{module}"]
            if part == "mlp":
                names = [f"{layer}.{module}.experts.{e}" for e in range(experts)]
            for name in names:
                for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    value = random.standard_normal(shape).astype(dtype)
                    tensors[f"{name}.lora_{half}.weight"] = value
    return tensors


def folder_of(path, tensors=None, **changes):
    config = CONFIG | changes
    if tensors is None:
        tensors = tensors_of(MODULES)
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=4))
    raw = tiny.safetensors_bytes(tensors)
    (path / "adapter_model.safetensors").write_bytes(raw)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of all seven maps, loaded."""
    folder = folder_of(tmp_path_factory.mktemp("official") / "a")
    return checkpoints.load_mixlora(folder, TINY)


def saved(mixture, folder, config=TINY, **changes):
    settings = {name: mixture.settings[name] for name in SAVED} | changes
    checkpoints.save_mixlora(mixture.adapters, config, folder, **settings)
    return folder


class TestLoad:
    def test_an_official_folder_gives_the_settings(self, mixture):
        assert mixture.settings == SETTINGS
        assert mixture.base == "somebody/tiny"
        assert {"attention": {*"qkvo"}, "mlp": {"router", "gate", "up", "down"}} == {
            part: set(maps) for part, maps in mixture.adapters.items()
        }

    def test_attention_and_router_are_transposed_and_stacked(self, mixture):
        tensors = tensors_of(MODULES)
        router = mixture.adapters["mlp"]["router"]["kernel"]
        chex.assert_shape(router, (LAYERS, HIDDEN, EXPERTS))
        key = mixture.adapters["attention"]["k"]
        chex.assert_shape([key["lora_a"], key["lora_b"]], [(5, 32, 16), (5, 16, 16)])
        for i in range(LAYERS):
            stored = tensors[f"mixlora.layers.{i}.mlp.moe_gate.weight"]
            np.testing.assert_array_equal(router[i], stored.T)
            for half in "AB":
                name = f"mixlora.layers.{i}.self_attn.k_proj.lora_{half}.weight"
                ours = key[f"lora_{half.lower()}"][i]
                np.testing.assert_array_equal(ours, tensors[name].T)

    @pytest.mark.parametrize("ours, inputs", {"gate": 32, "up": 32, "down": 64}.items())
    def test_each_expert_owns_its_columns_of_a_and_rows_of_b(
        self, mixture, ours, inputs
    ):
        """Expert e: columns 16 e to 16 (e + 1) of A, the same rows of B."""
        tensors = tensors_of(MODULES)
        leaf = jax.tree.map(np.asarray, mixture.adapters["mlp"][ours])
        chex.assert_shape(leaf["lora_a"], (LAYERS, inputs, EXPERTS * RANK))
        chex.assert_shape(leaf["lora_b"], (LAYERS, EXPERTS * RANK, 96 - inputs))
        for i in range(LAYERS):
            for e in range(EXPERTS):
                name = (
                    f"mixlora.layers.{i}.mlp.{ours}_proj.experts.{e}.lora_{{}}.weight"
                )
                own = slice(16 * e, 16 * (e + 1))
                np.testing.assert_array_equal(
                    leaf["lora_a"][i, :, own], tensors[name.format("A")].T
                )
                np.testing.assert_array_equal(
                    leaf["lora_b"][i, own], tensors[name.format("B")].T
                )

    def test_the_product_is_the_experts_own(self, mixture):
        """With the codes of one expert alone, A and B give that expert's product."""
        tensors = tensors_of(MODULES)
        x = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
        leaf = jax.tree.map(lambda value: np.asarray(value[3]), mixture.adapters)
        leaf = leaf["mlp"]["up"]
        for e in range(EXPERTS):
            name = f"mixlora.layers.3.mlp.up_proj.experts.{e}.lora_{{}}.weight"
            expected = (x @ tensors[name.format("A")].T) @ tensors[name.format("B")].T
            own = np.repeat(np.arange(EXPERTS) == e, RANK)
            y = (x @ leaf["lora_a"] * own) @ leaf["lora_b"]
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "targets",
        [
            *(["q_proj", "v_proj"], ["down_proj"], ["up_proj", "o_proj", "gate_proj"]),
            {"q_proj": True, "k_proj": False, "up_proj": True, "down_proj": False},
            # Names of other models, which the official table has as well.
            ["q_proj", "up_proj", "dense", "fc1", "qkv_proj"],
        ],
        ids=str,
    )
    def test_a_subset_of_maps(self, tmp_path, targets):
        wanted = {name: True for name in targets} | dict(
            targets if isinstance(targets, dict) else {}
        )
        present = [name for name in MODULES if wanted.get(name)]
        tensors = tensors_of(present)
        folder = folder_of(tmp_path / "a", tensors, target_modules=targets)
        found = checkpoints.load_mixlora(folder, TINY)
        assert found.settings["maps"] == tuple(MODULES[name][1] for name in present)
        leaves = {f"{MODULES[name][0]}/{MODULES[name][1]}" for name in present}
        given = {
            f"{part}/{name}" for part, maps in found.adapters.items() for name in maps
        }
        assert given == leaves | {"mlp/router"}

    def test_top_p_routing(self, tmp_path):
        """As `export` writes templates/mixlora_dynamic.json, with its temperature."""
        changes = {"top_p": 0.7, "temperature": 0.0}
        folder = folder_of(
            tmp_path / "a", routing_strategy="mixlora-dynamic", top_k=None, **changes
        )
        found = checkpoints.load_mixlora(folder, TINY)
        expected = {"router": "top_p", "top_p": 0.7, "top_k": 2}
        assert found.settings == SETTINGS | expected

    def test_fields_that_only_training_configurations_have(self, tmp_path):
        folder = folder_of(
            tmp_path / "a",
            router_aux_loss_coef=0.01,
            router_loss=True,
            router_init_range=0.02,
            jitter_noise=0.125,
            use_rslora=True,
            lora_init="gaussian",
        )
        found = checkpoints.load_mixlora(folder, TINY)
        changed = {"balance": 0.01, "jitter": 0.125, "rslora": True}
        assert found.settings == SETTINGS | changed
        folder = folder_of(tmp_path / "a", router_loss=False)
        assert checkpoints.load_mixlora(folder, TINY).settings["balance"] == 0.0

    @pytest.mark.parametrize(
        "changes",
        [
            {"act_fn": None},
            {"act_fn": "swish"},
            {"temperature": 1.0},
            {"task_type": "QUESTION_ANS"},
            {"expert_lora": None},
            {"expert_lora": {}},
            {"expert_lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}},
            {"expert_lora": {"bias": "none", "use_dora": False}},
            {"use_dora": False, "peft_version": None},
        ],
        ids=str,
    )
    def test_what_changes_nothing(self, tmp_path, mixture, changes):
        found = checkpoints.load_mixlora(folder_of(tmp_path / "a", **changes), TINY)
        assert found.settings == SETTINGS
        chex.assert_trees_all_equal(found.adapters, mixture.adapters)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
    def test_values_keep_their_dtype_and_the_router_is_float32(self, tmp_path, dtype):
        def dtypes(tensors):
            folder = folder_of(
                tmp_path / "a", tensors, target_modules=["q_proj", "up_proj"]
            )
            found = checkpoints.load_mixlora(folder, TINY).adapters
            router = found["mlp"].pop("router")["kernel"]
            assert router.dtype == np.float32
            return {leaf.dtype for leaf in jax.tree.leaves(found)}

        tensors = tensors_of(["q_proj", "up_proj"], dtype=dtype)
        assert dtypes(tensors) == {np.dtype(dtype)}
        router = "mixlora.layers.2.mlp.moe_gate.weight"
        assert dtypes(tensors | {router: tensors[router].astype(dtype)}) == {
            np.dtype(dtype)
        }
        other = "mixlora.layers.2.mlp.up_proj.experts.7.lora_B.weight"
        wide = tensors | {other: tensors[other].astype(np.float32)}
        assert dtypes(wide) == {np.dtype(np.float32)}


REFUSED = {
    "LoRA": ({"peft_type": "LORA"}, "peft_type is 'LORA'; supported: MIXLORA"),
    "no method": ({"peft_type": None}, "peft_type is missing"),
    "switch": (
        {"routing_strategy": "mixlora-switch"},
        "routing_strategy is 'mixlora-switch'; supported: mixlora or mixlora-dynamic",
    ),
    "MoLA": ({"routing_strategy": "mola"}, "routing_strategy is 'mola'"),
    "old": ({"routing_strategy": "mixtral"}, "'mixtral'; .*legacy_weights_convertor"),
    "no router": ({"routing_strategy": None}, "routing_strategy is missing"),
    "DoRA": ({"use_dora": True}, "use_dora is True; supported: False"),
    "bias": ({"bias": "all"}, "bias is 'all'; supported: 'none'"),
    "activation": ({"act_fn": "gelu_new"}, "act_fn is 'gelu_new'; supported: 'silu', "),
    "activation list": ({"act_fn": ["silu"]}, r"act_fn is \['silu'\]"),
    "experts' rank": (
        {"expert_lora": {"r": 8}},
        r"expert_lora is {'r': 8}; .*one rank",
    ),
    "experts' DoRA": ({"expert_lora": {"use_dora": True}}, "expert_lora is {'use_dora"),
    "experts' scale": (
        {"use_rslora": True, "expert_lora": {"use_rslora": False}},
        "expert_lora is {'use_rslora': False}",
    ),
    "experts' list": ({"expert_lora": [1]}, r"expert_lora is \[1\]"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "a later variant": ({"shared_experts": 1}, "shared_experts is 1; .*something else"),
    "temperature": ({"temperature": 0.5}, "temperature is 0.5; supported: 0.0"),
    "no expert": ({"num_experts": 0}, "num_experts is 0; supported: an integer of 1"),
    "experts missing": ({"num_experts": None}, "num_experts is missing"),
    "top_k": ({"top_k": 9}, "top_k is 9; supported: an integer of 1 to num_experts=8"),
    "top_k zero": ({"top_k": 0}, "top_k is 0"),
    "top_p": (
        {"routing_strategy": "mixlora-dynamic", "top_p": 1.5},
        "top_p is 1.5; supported: a number above 0 and up to 1",
    ),
    "top_p zero": (
        {"routing_strategy": "mixlora-dynamic", "top_p": 0},
        "top_p is 0; supported: a positive",
    ),
    "rank": ({"r": 0}, "r is 0; supported: an integer of 1"),
    "alpha": ({"lora_alpha": "32"}, "lora_alpha is '32'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is missing"),
    "rslora": ({"use_rslora": 1}, "use_rslora is 1; supported: true or false"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1.0; supported: a probability"),
    "balance": (
        {"router_aux_loss_coef": -1},
        "router_aux_loss_coef is -1; supported: a finite number from 0",
    ),
    "balance flag": ({"router_loss": 0}, "router_loss is 0; supported: true or false"),
    "jitter": ({"jitter_noise": True}, "jitter_noise is True"),
    "much jitter": ({"jitter_noise": 1.0}, "jitter_noise is 1.0; supported: 0 or more"),
    "base": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    "targets": ({"target_modules": [1]}, r"target_modules is \[1\]; supported: a list"),
    "pattern": ({"target_modules": ".*_proj"}, r"target_modules is '\.\*_proj'"),
    "no targets": ({"target_modules": None}, "target_modules is missing"),
    "dictionary": (
        {"target_modules": {"q_proj": 1}},
        "supported: names to true or fal",
    ),
    "no map": ({"target_modules": ["c_attn"]}, r"\['c_attn'\]; .*q_proj, k_proj, v_p"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_computes_something_else_is_refused_by_name(tmp_path, changes, message):
    folder = folder_of(tmp_path / "a", {}, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load_mixlora(folder, TINY)
    assert str(error.value).startswith(str(folder))


class TestAnotherBase:
    TARGETS = ("q_proj", "up_proj")
    EXPERT = "mixlora.layers.4.mlp.up_proj.experts.7.lora_A.weight"
    ROUTER = "mixlora.layers.4.mlp.moe_gate.weight"

    def refused(self, tmp_path, message, tensors=None, config=TINY, **changes):
        tensors = tensors_of(self.TARGETS) if tensors is None else tensors
        changes = {"target_modules": [*self.TARGETS]} | changes
        folder = folder_of(tmp_path / "a", tensors, **changes)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_mixlora(folder, config)

    def test_another_width_names_tensor_shapes_and_its_own_base(self, tmp_path):
        message = (
            r"model.safetensors: tensor 'mixlora.layers.0.mlp.moe_gate.weight' has "
            r"shape \(8, 32\); num_experts=8 and this base need shape \(8, 4096\)\. .*"
            r"another base. It was trained on 'somebody/tiny'\."
        )
        self.refused(tmp_path, message, config=zoo.get("llama2-7b"))
        wider = dataclasses.replace(TINY, intermediate=96)
        message = r"experts.0.lora_B.weight' has shape \(64, 16\); r=16 .* \(96, 16\)"
        self.refused(tmp_path, message, config=wider)

    def test_more_and_fewer_layers(self, tmp_path):
        def deep(layers):
            return dataclasses.replace(TINY, layers=layers)

        message = r"'mixlora.layers.5.mlp.moe_gate.weight' is missing; .* \(8, 32\)"
        self.refused(tmp_path, message, config=deep(6))
        message = r"layers.4.\S+' has no place .*further layers have none"
        self.refused(tmp_path, message, config=deep(4))

    def test_another_number_of_experts_and_another_rank(self, tmp_path):
        message = r"moe_gate.weight' has shape \(8, 32\); num_experts=4 .* \(4, 32\)"
        self.refused(tmp_path, message, num_experts=4)
        many = r"moe_gate.weight' has shape \(8, 32\); num_experts=2147483647"
        self.refused(tmp_path, many, num_experts=2**31 - 1)  # no names are made
        self.refused(tmp_path, r"\(16, 32\); r=8 and .* \(8, 32\)", r=8)

    def test_missing_tensors(self, tmp_path):
        for name in (self.EXPERT, self.ROUTER):
            tensors = tensors_of(self.TARGETS)
            del tensors[name]
            self.refused(tmp_path, f"'{re.escape(name)}' is missing", tensors)

    @pytest.mark.parametrize(
        "name",
        [
            "classifier",
            "mixlora.layers.0.mlp.up_proj.experts.8.lora_A.weight",
            "mixlora.layers.0.mlp.gate_proj.experts.0.lora_A.weight",
            "mixlora.layers.0.self_attn.q_proj.experts.0.lora_A.weight",
            "mixlora.layers.0.self_attn.q_proj.magnitude",
            "mixlora.layers.0.gate.weight",
            "mixlora.layers.0.mlp.moe_gate.bias",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ],
    )
    def test_an_extra_tensor(self, tmp_path, name):
        tensors = tensors_of(self.TARGETS) | {name: np.ones((16, 32), "f")}
        self.refused(tmp_path, f"{re.escape(name)}' has no place", tensors)

    def test_integers_and_a_router_that_diverged(self, tmp_path):
        tensors = tensors_of(self.TARGETS)
        integers = tensors | {self.EXPERT: tensors[self.EXPERT].astype(np.int8)}
        self.refused(tmp_path, "has dtype int8; adapters are flo", integers)
        broken = tensors[self.ROUTER].copy()
        broken[3, 4] = np.nan
        message = f"{re.escape(self.ROUTER)}' holds values that are not finite"
        self.refused(tmp_path, message, tensors | {self.ROUTER: broken})

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_families_without_official_names(self, tmp_path, mixture, family):
        config, _ = FAMILIES[family]
        self.refused(tmp_path, f"a base like {family}; supported are", config=config)
        with pytest.raises(CheckpointError, match=f"mixlora: .*a base like {family}"):
            saved(mixture, tmp_path / "b", config)


class TestFiles:
    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
            checkpoints.load_mixlora(tmp_path / "absent", TINY)
        folder = folder_of(tmp_path / "a", {})
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
            checkpoints.load_mixlora(folder, TINY)

    def test_the_pickle_that_they_write_is_named_with_the_way_out(self, tmp_path):
        folder = folder_of(tmp_path / "a", {})
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
        message = r"adapter_model.bin, a pickle, .* weights_only=True\) and .*save_file"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_mixlora(folder, TINY)

    def test_damaged_folders_give_an_error_or_a_whole_adapter(self, tmp_path):
        targets = ["q_proj", "up_proj"]
        config = dataclasses.replace(TINY, layers=2)
        tensors = tensors_of(targets, rank=2, experts=3, layers=2)
        changes = {"target_modules": targets, "r": 2, "num_experts": 3}
        folder = folder_of(tmp_path / "a", tensors, **changes)
        originals = {path.name: path.read_bytes() for path in folder.iterdir()}
        whole = checkpoints.load_mixlora(folder, config).adapters
        errors = results = 0
        for case in range(count(100)):
            random = np.random.default_rng(case)
            name = sorted(originals)[case % 2]
            (folder / name).write_bytes(damaged(name, originals[name], random))
            try:
                found = checkpoints.load_mixlora(folder, config)
            except CheckpointError as error:
                errors += str(error).startswith(str(folder))
            else:
                chex.assert_trees_all_equal_shapes(found.adapters, whole)
                results += 1
            (folder / name).write_bytes(originals[name])
        assert errors + results == count(100), "an error that does not name the file"
        assert min(errors, results) > count(100) // 20


class TestSave:
    @pytest.mark.parametrize("on_device", [False, True])
    def test_the_tensors_are_the_official_ones(self, tmp_path, mixture, on_device):
        from safetensors import safe_open

        move = jnp.asarray if on_device else np.asarray
        given = jax.tree.map(move, mixture.adapters)
        folder = tmp_path / "a"
        settings: dict[str, Any] = {name: SETTINGS[name] for name in SAVED}
        checkpoints.save_mixlora(given, TINY, folder, base="somebody/tiny", **settings)
        assert sorted(os.listdir(folder)) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        expected = tensors_of(MODULES)
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(file.get_tensor(name), value)

    def test_names_of_a_small_mixture_one_by_one(self, tmp_path):
        """Two layers, two experts, one map of attention and one of the MLP."""
        config = dataclasses.replace(TINY, layers=2)
        random = np.random.default_rng(0)

        def pair(inputs, rank, outputs):
            shapes = {"lora_a": (2, inputs, rank), "lora_b": (2, rank, outputs)}
            return {
                half: random.standard_normal(shape).astype("f")
                for half, shape in shapes.items()
            }

        adapters = {
            "attention": {"v": pair(32, 3, 16)},
            "mlp": {
                "router": {"kernel": random.standard_normal((2, 32, 2)).astype("f")},
                "down": pair(64, 6, 32),
            },
        }
        folder = tmp_path / "a"
        checkpoints.save_mixlora(adapters, config, folder, alpha=6, balance=0.01)
        raw = (folder / "adapter_model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header.pop("__metadata__")
        assert {name: (v["dtype"], v["shape"]) for name, v in header.items()} == {
            "mixlora.layers.0.mlp.moe_gate.weight": ("F32", [2, 32]),
            "mixlora.layers.0.self_attn.v_proj.lora_A.weight": ("F32", [3, 32]),
            "mixlora.layers.0.self_attn.v_proj.lora_B.weight": ("F32", [16, 3]),
            "mixlora.layers.0.mlp.down_proj.experts.0.lora_A.weight": ("F32", [3, 64]),
            "mixlora.layers.0.mlp.down_proj.experts.0.lora_B.weight": ("F32", [32, 3]),
            "mixlora.layers.0.mlp.down_proj.experts.1.lora_A.weight": ("F32", [3, 64]),
            "mixlora.layers.0.mlp.down_proj.experts.1.lora_B.weight": ("F32", [32, 3]),
            "mixlora.layers.1.mlp.moe_gate.weight": ("F32", [2, 32]),
            "mixlora.layers.1.self_attn.v_proj.lora_A.weight": ("F32", [3, 32]),
            "mixlora.layers.1.self_attn.v_proj.lora_B.weight": ("F32", [16, 3]),
            "mixlora.layers.1.mlp.down_proj.experts.0.lora_A.weight": ("F32", [3, 64]),
            "mixlora.layers.1.mlp.down_proj.experts.0.lora_B.weight": ("F32", [32, 3]),
            "mixlora.layers.1.mlp.down_proj.experts.1.lora_A.weight": ("F32", [3, 64]),
            "mixlora.layers.1.mlp.down_proj.experts.1.lora_B.weight": ("F32", [32, 3]),
        }
        found = checkpoints.load_mixlora(folder, config)
        chex.assert_trees_all_equal(found.adapters, adapters)

    def test_the_fields_are_the_official_ones(self, tmp_path, mixture):
        """Beside what `export` writes: what `from_config` reads and it forgets."""
        folder = saved(mixture, tmp_path / "a", base="somebody/tiny")
        raw = json.loads((folder / "adapter_config.json").read_text())
        assert set(raw.pop("target_modules")) == set(CONFIG["target_modules"])
        expected = CONFIG | {
            "jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
            "use_rslora": False,
        }
        del expected["target_modules"]
        assert raw == expected
        # Their `check` asserts these types.
        assert type(raw["lora_alpha"]) is int
        for field in ("lora_dropout", "jitter_noise", "router_aux_loss_coef"):
            assert type(raw[field]) is float

    def test_the_fields_of_top_p_routing(self, tmp_path, mixture):
        folder = saved(mixture, tmp_path / "a", router="top_p", top_p=1)
        raw = json.loads((folder / "adapter_config.json").read_text())
        assert raw["routing_strategy"] == "mixlora-dynamic"
        assert (raw["top_p"], raw["temperature"]) == (1.0, 0.0)
        assert type(raw["top_p"]) is type(raw["temperature"]) is float
        assert "top_k" not in raw

    @pytest.mark.parametrize(
        "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str
    )
    @pytest.mark.parametrize("router", ["top_k", "top_p"])
    def test_round_trip(self, tmp_path, mixture, dtype, router):
        adapters = jax.tree.map(lambda x: np.asarray(x).astype(dtype), mixture.adapters)
        adapters["mlp"]["router"] = mixture.adapters["mlp"]["router"]
        del adapters["attention"]["k"], adapters["mlp"]["gate"]
        settings: dict[str, Any] = {
            "alpha": 2.5,
            "rslora": True,
            "dropout": 0.0,
            "balance": 0.02,
            "router": router,
            "top_k": 3 if router == "top_k" else 2,
            "top_p": 0.8 if router == "top_k" else 0.6,
            "jitter": 0.25,
        }
        checkpoints.save_mixlora(adapters, TINY, tmp_path / "a", **settings)
        found = checkpoints.load_mixlora(tmp_path / "a", TINY)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.adapters, adapters)
        for ours, given in zip(*map(jax.tree.leaves, (found.adapters, adapters))):
            assert np.asarray(ours).tobytes() == np.asarray(given).tobytes()
        maps = ("q", "v", "o", "up", "down")
        assert found.settings == SETTINGS | settings | {"maps": maps}
        assert found.base is None

    def test_attention_alone_keeps_its_router(self, tmp_path, mixture):
        adapters = {
            "attention": mixture.adapters["attention"],
            "mlp": {"router": mixture.adapters["mlp"]["router"]},
        }
        checkpoints.save_mixlora(adapters, TINY, tmp_path / "a", alpha=1, balance=0)
        found = checkpoints.load_mixlora(tmp_path / "a", TINY)
        chex.assert_trees_all_equal(found.adapters, adapters)

    def test_phi(self, tmp_path):
        """fc1 and fc2 have experts, and attention's output is `dense`."""
        config, _ = FAMILIES["phi"]
        shapes = {
            "attention": {"o": {"lora_a": (5, 32, 2), "lora_b": (5, 2, 32)}},
            "mlp": {
                "router": {"kernel": (5, 32, 3)},
                "up": {"lora_a": (5, 32, 6), "lora_b": (5, 6, 64)},
                "down": {"lora_a": (5, 64, 6), "lora_b": (5, 6, 32)},
            },
        }
        random = np.random.default_rng(0)
        adapters = jax.tree.map(
            lambda shape: random.standard_normal(shape).astype("f"),
            shapes,
            is_leaf=lambda value: isinstance(value, tuple),
        )
        folder = tmp_path / "a"
        checkpoints.save_mixlora(adapters, config, folder, alpha=4, balance=0.01)
        raw = json.loads((folder / "adapter_config.json").read_text())
        assert raw["target_modules"] == ["dense", "fc1", "fc2"]
        assert raw["act_fn"] == "gelu_new"
        data = (folder / "adapter_model.safetensors").read_bytes()
        for name in (
            b'"mixlora.layers.4.self_attn.dense.lora_A.weight"',
            b'"mixlora.layers.4.mlp.fc1.experts.2.lora_B.weight"',
            b'"mixlora.layers.4.mlp.fc2.experts.0.lora_A.weight"',
        ):
            assert name in data
        found = checkpoints.load_mixlora(folder, config)
        chex.assert_trees_all_equal(found.adapters, adapters)

    def test_settings_that_the_programs_do_not_have(self, tmp_path, mixture):
        refused = {
            "router='switch' is not one of top_k, top_p": {"router": "switch"},
            "lora_alpha is 0": {"alpha": 0},
            "lora_dropout is 1.0": {"dropout": 1},
            "top_k is 9; .* num_experts=8": {"top_k": 9},
            "top_p is 1.5": {"router": "top_p", "top_p": 1.5},
            "router_aux_loss_coef is nan": {"balance": float("nan")},
            "jitter_noise is -0.5": {"jitter": -0.5},
        }
        for message, changes in refused.items():
            with pytest.raises(CheckpointError, match=f"save_mixlora: {message}"):
                saved(mixture, tmp_path / "a", **changes)
        assert os.listdir(tmp_path) == []

    def test_trees_that_are_not_mixtures_of_the_configuration(self, tmp_path, mixture):
        def refused(message, tree):
            with pytest.raises(CheckpointError, match=f"save_mixlora: .*{message}"):
                checkpoints.save_mixlora(
                    tree, TINY, tmp_path / "a", alpha=1, balance=0.01
                )
            assert os.listdir(tmp_path) == []

        attention, mlp = mixture.adapters["attention"], mixture.adapters["mlp"]
        router = mlp["router"]["kernel"]
        refused("mlp/router/kernel is missing; config needs", {"attention": attention})
        for wrong in (router[:4], router[:, :16], router[..., :0]):
            refused(
                r"mlp/router/kernel has shape .* \(5, 32, experts\)",
                {"attention": attention, "mlp": {"router": {"kernel": wrong}}},
            )
        integers = {"kernel": router.astype(np.int32)}
        refused("mlp/router/kernel has dtype int32", {"mlp": {"router": integers}})
        refused("'adapters' is no adapter", {"mlp": {"router": {"kernel": router}}})
        params = random_params(TINY)["blocks"]["mlp"]["up"]
        refused("'mlp/up/kernel' is no adapter", {"mlp": mlp | {"up": params}})
        for part, name, width in (("mlp", "up", 64), ("attention", "q", 32)):
            dora = mixture.adapters[part][name] | {"magnitude": np.ones((5, width))}
            tree = mixture.adapters | {part: mixture.adapters[part] | {name: dora}}
            refused(f"'{part}/{name}/magnitude' is no adapter", tree)
        # The width that attention's rank gives, not seven experts of another.
        fewer = jax.tree.map(np.asarray, mlp["up"])
        fewer["lora_a"] = fewer["lora_a"][..., :112]
        refused(
            r"mlp/up/lora_a has shape \(5, 32, 112\).* need \(5, 32, 128\)",
            {"attention": attention, "mlp": mlp | {"up": fewer}},
        )
        short = jax.tree.map(lambda x: x[:4], attention["q"])
        refused(
            r"attention/q/lora_a has shape \(4, 32, 16\)",
            {"attention": attention | {"q": short}, "mlp": mlp},
        )

    def test_nothing_is_overwritten(self, tmp_path, mixture):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").touch()
        with pytest.raises(CheckpointError, match="not an empty folder"):
            saved(mixture, tmp_path / "a")
        assert os.listdir(tmp_path / "a") == ["mine"]
