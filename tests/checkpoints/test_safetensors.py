"""Safetensors: the package reads what we write and back; every broken rule is named."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jmem.checkpoints import files
from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.checkpoints.safetensors import (
    DTYPES,
    INDEX,
    read_file,
    read_folder,
    write,
    write_folder,
)


def lazy(name, value):
    return LazyTensor(name, value.shape, value.dtype, lambda: value)


def every_dtype():
    random = np.random.default_rng(0)
    return {
        f"tensor {dtype}": random.integers(0, 2, (3, 5)).astype(dtype)
        for dtype in DTYPES.values()
    } | {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(2, np.float32)}


class TestRoundTrip:
    def test_what_we_write_we_read(self, tmp_path):
        tensors = every_dtype()
        write(tmp_path / "a.safetensors", [lazy(n, v) for n, v in tensors.items()])
        found = read_file(tmp_path / "a.safetensors")
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            read = found[name].read()
            assert (read.shape, read.dtype) == (value.shape, value.dtype)
            assert found[name].shape == value.shape
            assert found[name].dtype == value.dtype
            assert read.tobytes() == value.tobytes()

    def test_the_package_reads_what_we_write(self, tmp_path):
        tensors = every_dtype()
        write(tmp_path / "a.safetensors", [lazy(n, v) for n, v in tensors.items()])
        found = dict(safetensors.deserialize((tmp_path / "a.safetensors").read_bytes()))
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert DTYPES[found[name]["dtype"]] == value.dtype
            assert found[name]["shape"] == list(value.shape)
            assert bytes(found[name]["data"]) == value.tobytes()
        with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}  # transformers insists on it

    def test_we_read_what_the_package_writes(self, tmp_path):
        tensors = {
            name: value
            for name, value in every_dtype().items()
            if value.dtype not in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu)
        }
        path = tmp_path / "a.safetensors"
        safetensors.numpy.save_file(tensors, path, {"any": "metadata"})
        found = read_file(path)
        assert {n: t.read().tobytes() for n, t in found.items()} == {
            n: v.tobytes() for n, v in tensors.items()
        }

    def test_views_are_written_in_their_own_order(self, tmp_path):
        value = np.arange(12, dtype=np.float32).reshape(3, 4).T
        write(tmp_path / "a.safetensors", [lazy("t", value)])
        np.testing.assert_array_equal(
            read_file(tmp_path / "a.safetensors")["t"].read(), value
        )

    def test_nothing_is_read_until_asked_for(self, tmp_path):
        path = tmp_path / "a.safetensors"
        value = np.ones((1 << 20,), np.float32)
        write(path, [lazy("t", value)])
        tensor = read_file(path)["t"]
        with open(path, "r+b") as file:  # an odd value at the end, after the check
            file.seek(-4, os.SEEK_END)
            file.write(struct.pack("<f", 7))
        assert tensor.read()[-1] == 7

    def test_a_file_cut_after_the_check_is_an_error_and_no_signal(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write(path, [lazy("t", np.ones(5000, np.float32))])
        tensor = read_file(path)["t"]
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match=r"changed after it was checked"):
            tensor.read()


def entry(dtype: object = "F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def blob(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
BROKEN = {
    "empty": (b"", "header length 0 does not fit"),
    "seven bytes": (b"\0" * 7, "header length 0 does not fit: the file has 7 bytes"),
    "header beyond the end": (blob({}, length=99), "header length 99 does not fit"),
    "header of 2^63": (blob({}, length=1 << 63), "header length 9223372036854775808"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "header: not valid JSON"),
    "not JSON": (blob(b"{]"), "header: not valid JSON"),
    "deep JSON": (blob(b'{"a":' + b"[" * 100_000), "header: not valid JSON"),
    "a list": (blob([1]), "header: holds a JSON list, not an object"),
    "name twice": (blob(b'{"a": 1, "a": 2}'), "key 'a' appears twice"),
    "metadata": (blob({"__metadata__": {"a": 1}}), "must map strings to strings"),
    "no dtype": (blob({"a": {"shape": [2]}}), "'a': needs exactly dtype, shape and"),
    "extra key": (blob({"a": entry(x=1)}), "'a': needs exactly dtype, shape and"),
    "dtype": (blob({"a": entry("F31")}), "'a': dtype 'F31' is not one of F64, F32"),
    "dtype a list": (blob({"a": entry(["F32"])}), r"dtype \['F32'\] is not one of"),
    "shape negative": (blob({"a": entry(shape=(-2,))}), r"shape \[-2\] is not a list"),
    "shape bool": (blob({"a": entry(shape=(True,))}), r"shape \[True\] is not a list"),
    "shape float": (blob({"a": entry(shape=(2.0,))}), r"shape \[2.0\] is not a list"),
    "shape huge": (blob({"a": entry(shape=(1 << 64,))}), "is not a list of sizes"),
    "rank": (blob({"a": entry(shape=(1,) * 40)}), "is not a list of sizes"),
    "three offsets": (blob({"a": entry(offsets=(0, 8, 8))}), r"is not \[begin, end\]"),
    "extent": (
        blob({"a": entry(shape=(3,))}),
        r"'a': F32 of shape \[3\] takes 12 bytes, but data_offsets \[0, 8\] span 8",
    ),
    "overflowing product": (
        blob({"a": entry(shape=(1 << 62, 1 << 62))}),
        "takes 85070591730234615865843651857942052864 bytes",
    ),
    "reversed": (blob({"a": entry(offsets=(8, 0))}), r"\[8, 0\] lie outside"),
    "truncated": (blob(TWO, b"\0" * 15), r"'b': data_offsets \[8, 16\] lie outside"),
    "oversized": (blob(TWO, b"\0" * 17), "1 bytes follow the last tensor, 'b'"),
    "no tensors": (blob({}), "8 bytes follow the last tensor, 'the header'"),
    "overlap": (
        blob({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        "'b' starts at byte 4 of the data and overlaps 'a', which ends at 8",
    ),
    "same place": (
        blob({"a": entry(), "b": entry()}),
        "'b' starts at byte 0 of the data and overlaps 'a'",
    ),
    "gap": (
        blob({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
        "'b' starts at byte 12 of the data and leaves a gap after 'a'",
    ),
}


@pytest.mark.parametrize("raw, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, raw, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match=r"pipe: not a regular file"):
        read_file(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        read_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"No such file"):
        read_file(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_file(tmp_path / ("x" * 300))


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path):
        self.make(tmp_path, {"a": "one", "b": "two", "c": "one"})
        return tmp_path

    def make(self, folder, placed, index=None):
        for shard in set(placed.values()):
            part = [name for name, where in placed.items() if where == shard]
            values = [np.full((2, 3), ord(name), np.float32) for name in part]
            write(folder / shard, map(lazy, part, values))
        weight_map = placed if index is None else index
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def test_all_tensors_of_all_shards(self, folder):
        values = {name: t.read()[1, 2] for name, t in read_folder(folder).items()}
        assert values == {"a": ord("a"), "b": ord("b"), "c": ord("c")}

    def test_missing_shard(self, folder):
        (folder / "one").unlink()
        with pytest.raises(CheckpointError, match=r"one: shard is missing.*2 tensors"):
            read_folder(folder)

    def test_index_names_a_tensor_that_the_shard_lacks(self, folder):
        self.make(folder, {"a": "one"}, index={"a": "one", "z": "one"})
        with pytest.raises(CheckpointError, match=r"one: lacks tensor 'z'"):
            read_folder(folder)

    def test_shard_holds_a_tensor_placed_elsewhere(self, folder):
        self.make(folder, {"a": "one", "b": "two"}, index={"a": "one", "b": "one"})
        with pytest.raises(CheckpointError, match=r"one: lacks tensor 'b'"):
            read_folder(folder)
        self.make(folder, {"a": "one", "b": "one"}, index={"a": "one", "b": "two"})
        with pytest.raises(CheckpointError, match=r"holds tensor 'b'.*in 'two'"):
            read_folder(folder)

    def test_shard_holds_a_tensor_that_no_index_names(self, folder):
        self.make(folder, {"a": "one", "b": "one"}, index={"a": "one"})
        with pytest.raises(CheckpointError, match=r"holds tensor 'b'.*places in None"):
            read_folder(folder)

    @pytest.mark.parametrize("shard", ["../one", "/etc/passwd", "", ".", 3, "a\0b"])
    def test_shards_lie_in_the_folder(self, folder, shard):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match=r"not the plain name of a file"):
            read_folder(folder)

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}])
    def test_index_without_a_map(self, folder, index):
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"weight_map must map"):
            read_folder(folder)

    def test_pickles_are_not_opened(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match=r"pickles and are never opened"):
            read_folder(tmp_path)


class TestShardedWrite:
    def tensors(self):
        """3, 2, 9, 1 and 4 floats; a shard below holds six."""
        sizes = zip("abcde", (3, 2, 9, 1, 4))
        return {n: np.full(size, ord(n), np.float32) for n, size in sizes}

    def test_files_and_index_are_hugging_faces(self, tmp_path):
        tensors = self.tensors()
        write_folder(tmp_path, [lazy(n, v) for n, v in tensors.items()], 6 * 4)
        one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
        assert sorted(os.listdir(tmp_path)) == [one, two, three, INDEX]
        assert json.loads((tmp_path / INDEX).read_text()) == {
            "metadata": {"total_size": 19 * 4},
            "weight_map": {"a": one, "b": one, "c": two, "d": three, "e": three},
        }
        by_package = {
            name: value
            for shard in (one, two, three)
            for name, value in safetensors.numpy.load_file(tmp_path / shard).items()
        }
        by_us = {name: t.read() for name, t in read_folder(tmp_path).items()}
        for found in (by_package, by_us):
            assert found.keys() == tensors.keys()
            for name, value in tensors.items():
                np.testing.assert_array_equal(found[name], value)

    @pytest.mark.parametrize("limit", [None, 19 * 4])
    def test_what_fits_is_one_file_without_an_index(self, tmp_path, limit):
        write_folder(tmp_path, [lazy(n, v) for n, v in self.tensors().items()], limit)
        assert os.listdir(tmp_path) == ["model.safetensors"]

    def test_a_tensor_above_the_limit_has_a_shard_of_its_own(self, tmp_path):
        write_folder(tmp_path, [lazy(n, v) for n, v in self.tensors().items()], 1)
        index = json.loads((tmp_path / INDEX).read_text())
        assert len(set(index["weight_map"].values())) == 5
        assert len(read_folder(tmp_path)) == 5

    def test_one_tensor_is_held_at_a_time(self, tmp_path):
        refs, most = [], 0

        class Tracked(np.ndarray):
            """An array that can be referred to weakly."""

        def read():
            nonlocal most
            value = np.ones(1024, np.float32).view(Tracked)
            refs.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in refs))
            return value

        dtype = np.dtype(np.float32)
        tensors = [LazyTensor(f"t{i}", (1024,), dtype, read) for i in range(12)]
        write_folder(tmp_path, tensors, 3 * 4096)
        assert len(os.listdir(tmp_path)) == 4 + 1
        assert most <= 2  # the one before goes when its name is bound anew

    def test_a_name_in_two_shards_is_refused_before_writing(self, tmp_path):
        twice = [lazy("t", np.zeros(4, np.float32))] * 2
        with pytest.raises(CheckpointError, match=r"'t' is given twice"):
            write_folder(tmp_path, twice, 16)
        assert os.listdir(tmp_path) == []


class TestAtomicWrite:
    def test_a_failing_tensor_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"before")

        def fail():
            raise KeyboardInterrupt

        tensors = [
            lazy("good", np.zeros(4, np.float32)),
            LazyTensor("bad", (4,), np.dtype(np.float32), fail),
        ]
        with pytest.raises(KeyboardInterrupt):
            write(path, tensors)
        assert path.read_bytes() == b"before"
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_a_disk_that_fills_up_leaves_nothing(self, tmp_path):
        """The system refuses to let a file of this process grow beyond 64 KiB."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(CheckpointError, match=r"a: cannot be written \(File"):
                write(tmp_path / "a", [lazy("t", np.zeros(1 << 20, np.float32))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []

    def test_a_disk_that_is_too_full_is_refused_before_writing(
        self, tmp_path, monkeypatch
    ):
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
        read = pytest.fail  # no tensor may be read
        tensor = LazyTensor("t", (64,), np.dtype(np.float32), read)
        with pytest.raises(CheckpointError, match=r"needs \d+ bytes.*has 100 free"):
            write(tmp_path / "a", [tensor])
        assert os.listdir(tmp_path) == []

    def test_a_folder_that_is_read_only_or_absent(self, tmp_path):
        tensors = [lazy("t", np.zeros(4, np.float32))]
        with pytest.raises(CheckpointError, match=r"cannot be written"):
            write(tmp_path / "absent" / "a", tensors)
        code = (
            "import os, pathlib, tempfile, numpy as np\n"
            "from jmem.checkpoints.files import CheckpointError, LazyTensor\n"
            "from jmem.checkpoints.safetensors import write\n"
            "t = LazyTensor('t', (1,), np.dtype('float32'), lambda: np.ones(1, 'f'))\n"
            "with tempfile.TemporaryDirectory() as folder:\n"
            "    os.chmod(folder, 0o555)\n"
            "    user = os.geteuid()\n"
            "    if user == 0: os.seteuid(65534)\n"  # root may write anywhere
            "    try: write(pathlib.Path(folder, 'a'), [t])\n"
            "    except CheckpointError as error: print(error)\n"
            "    os.seteuid(user)\n"
            "    print(os.listdir(folder))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
        assert "cannot be written (Permission denied)" in done.stdout, done.stderr
        assert done.stdout.endswith("[]\n")

    def test_names_and_dtypes_the_format_lacks(self, tmp_path):
        value = np.zeros(2, np.complex128)
        with pytest.raises(CheckpointError, match=r"'t' of dtype complex128"):
            write(tmp_path / "a", [lazy("t", value)])
        twice = [lazy("t", np.zeros(2, np.float32))] * 2
        with pytest.raises(CheckpointError, match=r"names are unique"):
            write(tmp_path / "a", twice)
        assert os.listdir(tmp_path) == []
