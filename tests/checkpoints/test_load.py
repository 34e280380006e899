"""`load` and `save`: every form gives the same parameters; every misfit is named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints import files, layout
from jmem.checkpoints.files import CheckpointError, CheckpointWarning
from jmem.models import zoo
from jmem.models.decoder import Decoder

from . import tiny

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VARIANTS = pytest.mark.parametrize("config", tiny.VARIANTS.values(), ids=tiny.VARIANTS)


def assert_same(found, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def folder_of(path, config=TINY, params=None, **more):
    params = random_params(config) if params is None else params
    tensors = tiny.torch_tensors(params, "huggingface")
    return tiny.write_folder(path, config, tensors, **more)


class TestImport:
    """Against trees and files written by hand in tiny.py, transposes and all."""

    @VARIANTS
    def test_a_folder_gives_the_decoders_tree(self, tmp_path, config):
        params = random_params(config)
        checkpoint = checkpoints.load(folder_of(tmp_path / "m", config, params))
        assert checkpoint.config == config
        assert checkpoint.eos_ids == (2,)
        assert checkpoint.tokenizer is None
        found = checkpoint.params()
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
        assert_same(found, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, Decoder(config).abstract())

    def test_shards_are_the_same_as_one_file(self, tmp_path):
        one = folder_of(tmp_path / "one")
        many = folder_of(tmp_path / "many", shards=3)
        assert not (many / "model.safetensors").exists()
        assert_same(checkpoints.load(many).params(), checkpoints.load(one).params())

    def test_a_single_file_beside_its_configuration(self, tmp_path):
        folder = folder_of(tmp_path / "m", tokenizer=tiny.tiny_tokenizer())
        by_folder = checkpoints.load(str(folder))
        by_file = checkpoints.load(folder / "model.safetensors")
        assert by_file.require_tokenizer().encode("one two").ids == [1, 2]
        assert by_folder.require_tokenizer().encode("one two").ids == [1, 2]
        assert_same(by_file.params(), by_folder.params())

    @VARIANTS
    def test_gguf_gives_the_decoders_tree(self, tmp_path, config):
        params = random_params(config)
        path = tiny.write_gguf(tmp_path / "m.gguf", config, params)
        checkpoint = checkpoints.load(path)
        assert checkpoint.config == config
        assert_same(checkpoint.params(), params)

    @pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
    def test_quantised_gguf_gives_the_dequantised_tree(self, tmp_path, name):
        import gguf

        kind = gguf.GGMLQuantizationType[name]
        params = random_params(TINY)
        path = tiny.write_gguf(
            tmp_path / "m.gguf", TINY, params, quantise=lambda _: kind
        )

        # Rows are quantised on their own, so their order does not matter here.
        def through(matrix):
            return gguf.dequantize(gguf.quantize(matrix.T.copy(), kind), kind).T

        expected = jax.tree.map_with_path(
            lambda path, leaf: (
                np.stack([*map(through, leaf)]) if "kernel" in str(path[-1]) else leaf
            ),
            {"blocks": params["blocks"]},
        )
        checkpoint = checkpoints.load(path)
        assert checkpoint.dtype == np.float32
        assert_same(checkpoint.params()["blocks"], expected["blocks"])

    def test_configuration_and_tokenizer_cost_no_weights(self, tmp_path, monkeypatch):
        folder = folder_of(tmp_path / "m", tokenizer=tiny.tiny_tokenizer(), shards=2)
        gguf = tiny.write_gguf(tmp_path / "m.gguf", TINY, random_params(TINY))

        def refuse(*_):
            raise AssertionError("weights were read")

        monkeypatch.setattr("jmem.checkpoints.safetensors.read_span", refuse)
        monkeypatch.setattr("jmem.checkpoints.gguf.read_span", refuse)
        for path in (folder, gguf):
            checkpoint = checkpoints.load(path, expect=TINY)
            assert checkpoint.config == TINY
            with pytest.raises(AssertionError, match=r"weights were read"):
                checkpoint.params()

    def test_tables_and_copies_that_are_no_parameters_are_left_out(self, tmp_path):
        config = tiny.VARIANTS["tied"]
        params = random_params(config)
        tensors = tiny.torch_tensors(params, "huggingface")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "f")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        folder = tiny.write_folder(tmp_path / "m", config, tensors)
        assert_same(checkpoints.load(folder).params(), params)


class TestHeads:
    """A flag that says tied, over a file that has its own opinion."""

    @pytest.mark.parametrize("shards", [0, 3])
    def test_a_head_of_its_own_is_kept_whatever_the_flag(
        self, tmp_path, shards, monkeypatch
    ):
        params = random_params(TINY)
        head = params["head"]["kernel"]
        head[:] = params["embed"]["embedding"].T
        head[3, -1] += 1  # one number in the last row differs
        folder = folder_of(
            tmp_path / "m", TINY, params, shards=shards, tie_word_embeddings=True
        )
        monkeypatch.setattr(layout, "COMPARED_BYTES", 1000)  # several pieces
        with pytest.warns(CheckpointWarning, match=r"'lm_head.weight' differs from"):
            found = checkpoints.load(folder)
        assert found.config == TINY
        assert_same(found.params(), params)
        checkpoints.save(found.params(), found.config, tmp_path / "out", like=found)
        again = checkpoints.load(tmp_path / "out")  # of one mind now: no warning
        assert again.config == TINY
        assert_same(again.params(), params)

    def test_a_head_alone_is_the_embedding(self, tmp_path):
        config = tiny.VARIANTS["tied"]
        params = random_params(config)
        tensors = tiny.torch_tensors(params, "huggingface")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        found = checkpoints.load(tiny.write_folder(tmp_path / "m", config, tensors))
        assert found.config == config
        assert_same(found.params(), params)

    @pytest.mark.parametrize("alone", [False, True])
    def test_gguf_has_no_flag_and_is_what_it_holds(self, tmp_path, alone):
        config = tiny.VARIANTS["tied" if alone else "untied"]
        params = random_params(config)
        tensors = tiny.torch_tensors(params, "gguf")
        path = tiny.write_gguf(tmp_path / "m.gguf", config, params)
        if alone:
            raw, size = path.read_bytes(), sum(v.nbytes for v in tensors.values())
            given, name = (
                len(name).to_bytes(8, "little") + name
                for name in (b"token_embd.weight", b"output.weight")
            )
            assert raw.count(given) == 1
            header = raw[:-size].replace(given, name)
            path.write_bytes(header + b"\0" * 4 + raw[-size:])
        found = checkpoints.load(path)
        assert found.config == config
        assert_same(found.params(), params)

    def test_a_head_of_another_shape_is_no_copy(self, tmp_path):
        config = tiny.VARIANTS["tied"]
        tensors = tiny.torch_tensors(random_params(config), "huggingface")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:-1]
        folder = tiny.write_folder(tmp_path / "m", config, tensors)
        with (
            pytest.warns(CheckpointWarning, match="differs"),
            pytest.raises(CheckpointError, match=r"lm_head.weight' has shape \(47, 32"),
        ):
            checkpoints.load(folder)


class TestDtype:
    @pytest.mark.parametrize("stored", [np.float32, BFLOAT16, np.float16], ids=str)
    @pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
    def test_as_stored_or_as_asked(self, tmp_path, stored, asked):
        params = random_params(TINY, stored)
        folder = folder_of(tmp_path / "m", params=params)
        checkpoint = checkpoints.load(folder, dtype=asked)
        dtype = jnp.dtype(asked or stored)
        assert checkpoint.dtype == dtype
        expected = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        assert_same(checkpoint.params(), expected)

    def test_several_stored_dtypes_give_float32(self, tmp_path):
        params = random_params(TINY, BFLOAT16)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].astype("f")
        checkpoint = checkpoints.load(folder_of(tmp_path / "m", params=params))
        assert checkpoint.dtype == np.float32
        expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
        assert_same(checkpoint.params(), expected)

    def test_values_beyond_the_asked_dtype_are_an_error(self, tmp_path):
        params = random_params(TINY)
        params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = 1e6
        folder = folder_of(tmp_path / "m", params=params)
        message = r"'model.layers.1.mlp.up_proj.weight' holds values beyond 65504"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder, dtype="float16").params()
        checkpoints.load(folder, dtype="bfloat16").params()

    @pytest.mark.parametrize("dtype", layout.WEIGHT_DTYPES, ids=str)
    def test_values_that_are_not_finite_are_an_error(self, tmp_path, dtype):
        """Also one, the last of several chunks; and the greatest number is no error."""
        config = dataclasses.replace(TINY, vocab_size=2100)  # 32 wide: over 2**16
        params = random_params(config, dtype)
        table = params["embed"]["embedding"]
        message = r"tensor 'model.embed_tokens.weight' holds values that are not finite"
        for number, value in enumerate((np.nan, -np.nan, np.inf, -np.inf)):
            table.flat[-1] = value
            folder = folder_of(tmp_path / f"{number}", config, params=params)
            with pytest.raises(CheckpointError, match=message):
                checkpoints.load(folder).params()
        table.flat[-1] = greatest = ml_dtypes.finfo(dtype).max
        found = checkpoints.load(folder_of(tmp_path / "m", config, params=params))
        assert found.params()["embed"]["embedding"][-1, -1] == greatest

    def test_the_layer_is_named(self, tmp_path):
        params = random_params(TINY)
        params["blocks"]["mlp"]["up"]["kernel"][3, 1, 2] = np.nan
        folder = folder_of(tmp_path / "m", params=params)
        message = r"'model.layers.3.mlp.up_proj.weight' holds values that are not fin"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder).params()

    @pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
    def test_dtypes_that_parameters_cannot_have(self, tmp_path, dtype):
        with pytest.raises(
            ValueError, match=f"dtype={dtype} is not one of float32, bfl"
        ):
            checkpoints.load(tmp_path, dtype=dtype)

    def test_integers_are_no_weights(self, tmp_path):
        tensors = tiny.torch_tensors(random_params(TINY), "huggingface")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
        folder = tiny.write_folder(tmp_path / "m", TINY, tensors)
        with pytest.raises(
            CheckpointError, match=r"lm_head.weight' has dtype int8; wei"
        ):
            checkpoints.load(folder)


class TestAnotherModel:
    def test_shapes_that_do_not_fit_its_own_configuration(self, tmp_path):
        folder = folder_of(tmp_path / "m", intermediate_size=96)
        message = (
            r"model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight' has "
            r"shape \(64, 32\), but its configuration needs \(96, 32\)"
        )
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder)

    def test_layers_that_are_missing_or_too_many(self, tmp_path):
        folder = folder_of(tmp_path / "m", num_hidden_layers=2**31 - 1)
        message = (
            r"'model.layers.5.*' is missing; its configuration needs it with shape"
        )
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder)
        folder = folder_of(tmp_path / "m", num_hidden_layers=2)
        with pytest.raises(CheckpointError, match=r"'model.layers.2.* has no place in"):
            checkpoints.load(folder)

    def test_tensors_that_the_decoder_has_no_place_for(self, tmp_path):
        tensors = tiny.torch_tensors(random_params(TINY), "huggingface")
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        folder = tiny.write_folder(tmp_path / "m", TINY, tensors)
        with pytest.raises(
            CheckpointError, match=r"q_norm.weight' of shape \(8,\) has n"
        ):
            checkpoints.load(folder)

    def test_the_expected_model_is_compared_tensor_by_tensor(self, tmp_path):
        folder = folder_of(tmp_path / "m")
        gguf = tiny.write_gguf(tmp_path / "m.gguf", TINY, random_params(TINY))
        wider = dataclasses.replace(TINY, vocab_size=50)
        for path, name in ((folder, "model.embed_tokens"), (gguf, "token_embd")):
            message = (
                rf"tensor '{name}.weight' has shape \(48, 32\), but the expected model "
                r"needs \(50, 32\)"
            )
            with pytest.raises(CheckpointError, match=message):
                checkpoints.load(path, expect=wider)

    @pytest.mark.parametrize(
        "field, value",
        {"rope_theta": 5e5, "rms_eps": 1e-6, "heads": 8, "tied": True}.items(),
    )
    def test_the_expected_model_is_compared_where_shapes_are_the_same(
        self, tmp_path, field, value
    ):
        changes = {field: value}
        if field == "heads":  # as many channels, cut otherwise
            changes |= {"kv_heads": 4, "head_dim": 4}
        expect = dataclasses.replace(TINY, **changes)
        with pytest.raises(CheckpointError, match=f"has {field}=.*expected model has"):
            checkpoints.load(folder_of(tmp_path / "m"), expect=expect)

    def test_the_expected_model_may_be_used_for_other_lengths(self, tmp_path):
        expect = dataclasses.replace(TINY, max_positions=7)
        checkpoint = checkpoints.load(folder_of(tmp_path / "m"), expect=expect)
        assert checkpoint.config.max_positions == TINY.max_positions

    def test_a_tokenizer_that_is_not_the_models(self, tmp_path):
        folder = folder_of(tmp_path / "m", tokenizer=tiny.tiny_tokenizer(97))
        message = "tokenizer.json: the tokenizer has 97 tokens.*vocabulary is 0 to 47"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder)


class TestSource:
    def test_what_is_no_checkpoint(self, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"'smolm2-135m' is none of: .* Did you"
        ):
            checkpoints.load("smolm2-135m")
        with pytest.raises(CheckpointError, match=r"no package holds its weights"):
            checkpoints.load("llama2-7b")
        with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
            checkpoints.load(tmp_path)
        with pytest.raises(CheckpointError, match=r"absent.gguf: cannot be read"):
            checkpoints.load(tmp_path / "absent.gguf")
        with pytest.raises(CheckpointError, match=r"is none of: a Hugging Face folder"):
            checkpoints.load("x" * 5000)

    def test_configuration_that_is_no_json(self, tmp_path):
        folder = folder_of(tmp_path / "m")
        (folder / "config.json").write_text('{"model_type": "llama",')
        with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
            checkpoints.load(folder)
        with open(folder / "config.json", "wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(CheckpointError, match=r"1073741824 bytes; such a file has"):
            checkpoints.load(folder)


class TestExport:
    @VARIANTS
    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
    def test_round_trip_is_bit_equal(self, tmp_path, config, dtype):
        params = jax.tree.map(jnp.asarray, random_params(config, dtype))
        checkpoints.save(
            params, config, tmp_path / "out", tiny.tiny_tokenizer(), eos_ids=(2, 3)
        )
        found = checkpoints.load(tmp_path / "out", expect=config)
        assert found.config == config
        assert found.eos_ids == (2, 3)
        assert found.tokenizer is not None
        assert found.tokenizer.to_str() == tiny.tiny_tokenizer().to_str()
        assert_same(found.params(), params)

    def test_names_and_layout_are_hugging_faces(self, tmp_path):
        from safetensors.numpy import load_file

        params = random_params(TINY)
        checkpoints.save(params, TINY, tmp_path / "out")
        assert sorted(os.listdir(tmp_path / "out")) == [
            "config.json",
            "model.safetensors",
        ]
        found = load_file(tmp_path / "out" / "model.safetensors")
        expected = tiny.torch_tensors(params, "huggingface")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        raw = json.loads((tmp_path / "out" / "config.json").read_text())
        assert raw["architectures"] == ["LlamaForCausalLM"]
        assert raw["torch_dtype"] == "float32"

    @pytest.mark.parametrize("limit", [1, 20_000, 10**9])
    def test_shards_are_loaded_as_one_model(self, tmp_path, limit):
        from safetensors.numpy import load_file

        params = random_params(TINY)
        checkpoints.save(params, TINY, tmp_path / "out", max_shard_bytes=limit)
        assert_same(checkpoints.load(tmp_path / "out").params(), params)
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        found = [load_file(shard) for shard in shards]
        expected = tiny.torch_tensors(params, "huggingface")
        assert sum(map(len, found)) == len(expected)
        sizes = [sum(value.nbytes for value in shard.values()) for shard in found]
        for held, size in zip(found, sizes):
            assert size <= limit or len(held) == 1
        for name, value in {n: v for held in found for n, v in held.items()}.items():
            np.testing.assert_array_equal(value, expected[name])
        index = tmp_path / "out" / "model.safetensors.index.json"
        assert index.exists() == (len(shards) > 1)
        if len(shards) > 1:
            raw = json.loads(index.read_text())
            assert raw["metadata"]["total_size"] == sum(sizes)
            assert raw["weight_map"] == {
                name: shard.name for shard, held in zip(shards, found) for name in held
            }

    def test_a_shard_that_fails_leaves_no_folder(self, tmp_path):
        """The last array is gone; files of the others were written by then."""
        assert layout.list_leaves(TINY)[-1].path == "head/kernel"
        params = random_params(TINY)
        params["head"]["kernel"] = jnp.asarray(params["head"]["kernel"])
        params["head"]["kernel"].delete()
        with pytest.raises(RuntimeError, match="deleted"):
            checkpoints.save(params, TINY, tmp_path / "out", max_shard_bytes=20_000)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("limit", [0, -5])
    def test_shards_that_hold_nothing(self, tmp_path, limit):
        with pytest.raises(ValueError, match=f"max_shard_bytes={limit} holds nothing"):
            checkpoints.save(
                random_params(TINY), TINY, tmp_path / "out", max_shard_bytes=limit
            )

    def test_trees_that_are_not_the_configurations(self, tmp_path):
        params = random_params(TINY)
        q = params["blocks"]["attention"]["q"]
        q["lora_a"] = np.zeros((5, 32, 4), np.float32)
        with pytest.raises(
            CheckpointError, match=r"attention/q/lora_a' has no place.*Mer"
        ):
            checkpoints.save(params, TINY, tmp_path / "out")
        del q["lora_a"]
        q["kernel"] = q["kernel"][:2]
        message = r"attention/q/kernel' has shape \(2, 32, 32\), .* \(5, 32, 32\)"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(params, TINY, tmp_path / "out")
        del params["blocks"]["attention"]["q"]
        with pytest.raises(CheckpointError, match=r"attention/q/kernel' is missing"):
            checkpoints.save(params, TINY, tmp_path / "out")
        params = random_params(TINY, np.float64)
        with pytest.raises(CheckpointError, match=r"embedding' has dtype float64"):
            checkpoints.save(params, TINY, tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_nothing_is_overwritten(self, tmp_path):
        params = random_params(TINY)
        (tmp_path / "out").mkdir()
        checkpoints.save(params, TINY, tmp_path / "out")  # empty: fine
        before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
        with pytest.raises(CheckpointError, match=r"exists and is not an empty folder"):
            checkpoints.save(params, TINY, tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before

    def test_a_failure_leaves_no_folder(self, tmp_path, monkeypatch):
        params = random_params(TINY)
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "disk_usage", lambda _: usage)
            with pytest.raises(CheckpointError, match=r"needs .* bytes.*1000 free"):
                checkpoints.save(params, TINY, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"cannot be written"):
            checkpoints.save(params, TINY, tmp_path / "no" / "such" / "out")

        params["embed"]["embedding"] = jnp.asarray(params["embed"]["embedding"])
        params["embed"]["embedding"].delete()
        with pytest.raises(RuntimeError, match="deleted"):
            checkpoints.save(params, TINY, tmp_path / "out")
        assert os.listdir(tmp_path) == []


def test_importing_brings_no_file_library():
    code = (
        "import sys, jmem.checkpoints;"
        "print(*{'gguf', 'tokenizers', 'safetensors', 'orbax'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_table_of_leaves_is_the_decoders_for_every_model():
    """Shapes stated in the table are those of `Decoder(config)`, for any config."""
    for config in (*tiny.VARIANTS.values(), *map(zoo.get, ("qwen2-7b", "llama3.2-1b"))):
        table = {
            leaf.path: (config.layers, *leaf.shape) if leaf.stacked else leaf.shape
            for leaf in layout.list_leaves(config)
        }
        tree = jax.tree.leaves_with_path(Decoder(config).abstract())
        assert table == {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in tree
        }
