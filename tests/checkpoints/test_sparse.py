"""Folders of sparse models: whole or refused, and opened like any other."""

import dataclasses
import hashlib
import json
import shutil

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem import disk
from jmem.checkpoints import CheckpointError, safetensors
from jmem.checkpoints.files import LazyTensor
from jmem.finetune import tuned
from jmem.nn import pruned, quantised
from jmem.sparse import flash_llm
from jmem.sparse.magnitude import zero_smallest

from .tiny import tiny_tokenizer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BIASED = dataclasses.replace(TINY, qkv_bias=True, rms_eps=1e-6, hidden=64, head_dim=16)


def make_zeroed(config=BIASED, dtype=BFLOAT16, sparsity=0.8):
    """Kernels with zeros; but for up, which is dense."""
    params = random_params(config, dtype)
    for part in ("attention", "mlp"):
        for name, leaf in params["blocks"][part].items():
            if name != "up":
                rows = [zero_smallest(k.T, sparsity).T for k in leaf["kernel"]]
                leaf["kernel"] = np.stack(rows)
    return params


@pytest.fixture(scope="module")
def packed():
    """All but one map, which stays a kernel."""
    params = make_zeroed()
    with pytest.warns(flash_llm.KeptDense, match="mlp/up"):
        return params, flash_llm.pack(params, formats=("FragBitmap",))


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    jmem.checkpoints.save(packed[1], BIASED, folder, tiny_tokenizer(), eos_ids=(2,))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "sparse")


def change(folder, edit):
    """The manifest, edited and sealed again."""
    path = folder / "sparse.json"
    values = json.loads(path.read_text())
    values.pop(disk.DIGEST)
    edit(values)
    path.write_text(disk.seal(values))


def rewrite(folder, name, edit):
    """An array, edited and with its own digest: as a stranger could make it."""
    path = folder / "sparse.safetensors"
    arrays = {n: np.array(t.read()) for n, t in safetensors.read_file(path).items()}
    edit(arrays[name])
    tensors = [
        LazyTensor(n, value.shape, value.dtype, lambda value=value: value)
        for n, value in arrays.items()
    ]
    safetensors.write(path, tensors)
    digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in arrays[name]]
    change(folder, lambda values: values["digests"].update({name: digests}))


def read(folder, **how):
    return jmem.checkpoints.load(folder).params(**how)


class TestRoundTrip:
    def test_packed_comes_back_as_it_was(self, packed, saved):
        found = read(saved, packed=True)
        chex.assert_trees_all_equal(found, jax.tree.map(np.asarray, packed[1]))
        assert "kernel" in found["blocks"]["mlp"]["up"]

    def test_unpacked_it_is_the_kernels_with_zeros(self, packed, saved):
        checkpoint = jmem.checkpoints.load(saved)
        assert checkpoint.stored_dtype == checkpoint.dtype == BFLOAT16
        assert checkpoint.eos_ids == (2,)
        assert checkpoint.require_tokenizer().get_vocab_size() == TINY.vocab_size
        chex.assert_trees_all_equal(checkpoint.params(), packed[0])
        wide = jmem.checkpoints.load(saved, "float32").params()
        expected = jax.tree.map(lambda x: x.astype(np.float32), packed[0])
        chex.assert_trees_all_equal(wide, expected)

    @pytest.mark.parametrize("kind", ["TiledCSL", "TcaBme", "int8", "int4"])
    def test_every_format_and_integers(self, kind, tmp_path):
        config = dataclasses.replace(TINY, layers=2, tied=True)
        params = make_zeroed(config)
        if kind.startswith("int"):
            given = flash_llm.packer(sparsity=0.9, values=kind)
        else:
            given = flash_llm.packer(sparsity=0.9, formats=(kind,))
        jmem.checkpoints.save(params, config, tmp_path / "plain")
        found = read(tmp_path / "plain", packed=given)
        jmem.checkpoints.save(found, config, tmp_path / "sparse")
        chex.assert_trees_all_equal(read(tmp_path / "sparse", packed=True), found)
        opened = read(tmp_path / "sparse")
        blocks = quantised.unpack(found["blocks"], BFLOAT16)
        chex.assert_trees_all_equal(opened["blocks"], blocks)
        kernel = opened["blocks"]["mlp"]["up"]["kernel"]
        zeros = np.count_nonzero(np.asarray(kernel) == 0, axis=1)
        assert zeros.min() >= int(0.9 * config.hidden)

    def test_an_ordinary_folder_is_written_of_it(self, packed, saved, tmp_path):
        checkpoint = jmem.checkpoints.load(saved)
        where = tmp_path / "plain"
        jmem.checkpoints.save(
            checkpoint.params(), checkpoint.config, where, like=checkpoint
        )
        assert (where / "model.safetensors").exists()
        chex.assert_trees_all_equal(read(where), packed[0])

    def test_other_doors_open_it(self, packed, saved):
        assert jmem.checkpoints.read_config(saved) == BIASED
        assert jmem.checkpoints.load(saved, expect=BIASED).config == BIASED
        other = dataclasses.replace(BIASED, layers=4)
        with pytest.raises(CheckpointError, match="has layers=5, but the expected"):
            jmem.checkpoints.load(saved, expect=other)
        chex.assert_trees_all_equal(tuned.load(saved).params, packed[0])

    def test_in_several_files(self, packed, tmp_path):
        where = tmp_path / "sparse"
        jmem.checkpoints.save(packed[1], BIASED, where, max_shard_bytes=20_000)
        assert len(list(where.glob("sparse-*-of-*.safetensors"))) > 3
        chex.assert_trees_all_equal(
            read(where, packed=True), jax.tree.map(np.asarray, packed[1])
        )

    def test_its_bytes_are_told_before(self, packed, saved):
        told = jmem.checkpoints.save(
            packed[1], BIASED, None, tiny_tokenizer(), eos_ids=(2,)
        )
        held = pruned.count_bytes(packed[1])
        assert held < told < sum(f.stat().st_size for f in saved.iterdir())


class TestDamage:
    def test_a_bit_flip_is_found(self, saved, folder):
        """Wherever it is: in a matrix, a norm, an index, the header or the manifest."""
        path = folder / "sparse.safetensors"
        raw, random = path.read_bytes(), np.random.default_rng(0)
        for number, at in enumerate(random.integers(8, len(raw), 10)):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << random.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="sparse"):
                read(folder, packed=number % 2 == 0)
        path.write_bytes(raw)
        path = folder / "sparse.json"
        raw = path.read_bytes()
        for at in random.integers(0, len(raw), 10):
            damaged = bytearray(raw)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"sparse\.json"):
                read(folder)

    def test_a_flip_names_file_tensor_and_layer(self, folder):
        path = folder / "sparse.safetensors"
        tensor = safetensors.read_file(path)["blocks/mlp/down/sparse/masks"]
        raw = path.read_bytes()
        at = raw.index(np.asarray(tensor.read()[1]).tobytes())
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        message = (
            r"sparse\.safetensors: tensor '.*down/sparse/masks', layer 1: its bytes"
        )
        with pytest.raises(CheckpointError, match=message):
            read(folder, packed=True)

    def test_a_file_that_is_cut_off(self, folder):
        path = folder / "sparse.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(
            CheckpointError, match=r"sparse\.safetensors: tensor .*trunc"
        ):
            jmem.checkpoints.load(folder)

    def test_layers_in_another_order(self, folder):
        path = folder / "sparse.safetensors"
        tensors = safetensors.read_file(path)
        name = "blocks/mlp/down/sparse/values"
        rows = tensors[name].read()
        raw = path.read_bytes()
        path.write_bytes(raw.replace(rows.tobytes(), rows[::-1].tobytes()))
        with pytest.raises(CheckpointError, match=f"tensor '{name}', layer 0"):
            read(folder, packed=True)

    @pytest.mark.parametrize("missing", ["sparse.safetensors", "config.json"])
    def test_a_file_that_is_missing(self, folder, missing):
        (folder / missing).unlink()
        with pytest.raises(CheckpointError, match=r"sparse|config"):
            jmem.checkpoints.load(folder)

    @pytest.mark.parametrize("version", [2, 99, 0, "1", None, True])
    def test_a_version_from_the_future(self, folder, version):
        change(folder, lambda values: values.update(version=version))
        message = r"sparse\.json: version .*this jmem reads 1 to 1.*update jmem"
        with pytest.raises(CheckpointError, match=message):
            jmem.checkpoints.load(folder)

    @pytest.mark.parametrize(
        "name, at, value, message",
        [
            ("starts", (2, 1), 10**8, "layer 2: FragBitmap: at tile .* starts give it"),
            ("starts", (0, 0), -1, "layer 0: FragBitmap: "),
            ("prefixes", (4, 0, 3), 9, "layer 4: FragBitmap: .* prefixes are not"),
            ("masks", (1, 0, 0), 2**32 - 1, "layer 1: FragBitmap: .* prefixes are not"),
        ],
    )
    def test_offsets_that_lead_elsewhere(self, folder, name, at, value, message):
        """Whose digests are right: who wrote the folder is a stranger."""
        rewrite(
            folder,
            f"blocks/mlp/down/sparse/{name}",
            lambda array: array.__setitem__(at, value),
        )
        for how in (True, False):
            with pytest.raises(CheckpointError, match=f"mlp/down/sparse', {message}"):
                read(folder, packed=how)

    @pytest.mark.parametrize(
        "edit, message",
        [
            (
                lambda v: v["maps"]["blocks/mlp/down"].update(format="CSR"),
                "format 'CSR'",
            ),
            (
                lambda v: v["maps"]["blocks/mlp/down"].update(dtype="int8"),
                "dtype 'int8'",
            ),
            (lambda v: v["maps"]["blocks/mlp/down"].pop("sizes"), "needs"),
            (
                lambda v: v["maps"]["blocks/mlp/down"]["sizes"].update(outputs=63),
                r"'blocks/mlp/down' is \[63, 64\], but config.json needs \[64, 64\]",
            ),
            (
                lambda v: v["maps"]["blocks/mlp/down"]["sizes"].update(cap="x"),
                "cap='x'",
            ),
            (lambda v: v["maps"]["blocks/mlp/down"]["sizes"].pop("cap"), "no sizes"),
            (lambda v: v["maps"].pop("blocks/mlp/down"), "down/kernel' is missing"),
            (lambda v: v["maps"].update(x=v["maps"]["blocks/mlp/down"]), "'x' has no"),
            (lambda v: v["digests"].pop("final_norm/scale"), "no digest of it"),
            (lambda v: v["digests"].update(more=[]), "tensor 'more': no file has it"),
            (lambda v: v["digests"].update({"final_norm/scale": []}), "its bytes are"),
            (lambda v: v.pop("digests"), "needs exactly version, maps and digests"),
            (lambda v: v.update(maps=[]), "needs exactly"),
        ],
    )
    def test_a_manifest_that_says_something_else(self, folder, edit, message):
        change(folder, edit)
        with pytest.raises(CheckpointError, match=message):
            read(folder, packed=True)

    def test_the_folder_of_another_model(self, folder):
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(raw | {"num_hidden_layers": 4}))
        with pytest.raises(CheckpointError, match=r"sparse.*4|\(4"):
            jmem.checkpoints.load(folder)


class TestSaving:
    def test_refuses_another_dtype(self, packed, tmp_path):
        with pytest.raises(ValueError, match="dtype=float16, but maps are sparse"):
            jmem.checkpoints.save(
                packed[1], BIASED, tmp_path / "sparse", dtype="float16"
            )

    def test_refuses_the_tree_of_another_model(self, packed, tmp_path):
        where = tmp_path / "sparse"
        wide = dataclasses.replace(BIASED, intermediate=128)
        with pytest.raises(CheckpointError, match=r"gate.*needs \(5, 64, 128\)"):
            jmem.checkpoints.save(packed[1], wide, where)
        more = packed[1] | {"lora": {"a": np.ones(3, np.float32)}}
        with pytest.raises(CheckpointError, match="'lora/a' has no place in config"):
            jmem.checkpoints.save(more, BIASED, where)
        assert not where.exists()
