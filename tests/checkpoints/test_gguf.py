"""GGUF: values and metadata as the package reads them; every broken rule is named."""

import os
import struct

import gguf
import numpy as np
import pytest
from tiny_decoder import TINY

from jmem.checkpoints.files import CheckpointError
from jmem.checkpoints.gguf import read_file

from . import tiny

Kind = gguf.GGMLQuantizationType


def dequantisable():
    """Every type of the package that has a dequantiser."""
    for kind, (_, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        yield kind


def blocks(kind, rows, width, seed=0) -> np.ndarray:
    """Random packed rows whose scales are finite: no float16 exponent is all ones."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    return random.integers(0, 60, (rows, width // values * nbytes)).astype(np.uint8)


class TestValues:
    @pytest.mark.parametrize("kind", list(dequantisable()), ids=lambda kind: kind.name)
    def test_every_type_is_dequantised_as_the_package_does(self, kind, tmp_path):
        packed = blocks(kind, 6, 512)
        infos = [("t", (512, 3, 2), int(kind), 0)]
        pad = b"\0" * (-packed.nbytes % 32)
        (tmp_path / "a.gguf").write_bytes(
            tiny.gguf_bytes((), infos, packed.tobytes() + pad)
        )
        tensor = read_file(tmp_path / "a.gguf").tensors["t"]
        assert tensor.shape == (2, 3, 512)
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(packed, kind).reshape(2, 3, 512)
        np.testing.assert_array_equal(tensor.read(), expected)

    def test_q4_1_by_its_definition(self, tmp_path):
        """w = q * d + m; the low nibbles are the first 16 values of a block of 32."""
        random = np.random.default_rng(0)
        scale, minimum = np.array([[0.25, 0.5], [-1, 2]], np.float16)
        q = random.integers(0, 16, (2, 32), np.uint8)
        data = b"".join(
            scale[i].tobytes()
            + minimum[i].tobytes()
            + (q[i, :16] | q[i, 16:] << 4).tobytes()
            for i in range(2)
        )
        infos = [("t", (64,), int(Kind.Q4_1), 0)]
        path = tmp_path / "a.gguf"
        path.write_bytes(tiny.gguf_bytes((), infos, data + b"\0" * (-len(data) % 32)))
        expected = q * scale.astype("f")[:, None] + minimum.astype("f")[:, None]
        values = read_file(path).tensors["t"].read()
        np.testing.assert_array_equal(values, expected.reshape(64))

    def test_rows_beyond_one_chunk(self, tmp_path):
        value = np.random.default_rng(0).standard_normal((5000, 512), np.float32)
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tensor("t", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tensor = read_file(tmp_path / "a.gguf").tensors["t"]
        np.testing.assert_array_equal(tensor.read(), value)

    def test_a_file_cut_after_the_check_is_an_error_and_no_signal(self, tmp_path):
        data = b"\0" * 8192
        path = tmp_path / "a.gguf"
        path.write_bytes(tiny.gguf_bytes((), [("t", (2048,), 0, 0)], data))
        tensor = read_file(path).tensors["t"]
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match=r"changed after it was checked"):
            tensor.read()


def test_metadata_and_tensors_are_what_the_package_reads(tmp_path):
    config = TINY
    more = {
        "general.name": "tiny – ὀλίγος",
        "an.array": [1, 2, 3],
        "an.array.of.floats": [0.5, -1.5],
        "an.array.of.text": ["a", "", "ü"],
        "a.flag": True,
        "a.negative": -3,
    }
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (tiny.gguf_metadata(config) | more).items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    random = np.random.default_rng(0)
    for i, dtype in enumerate([np.float32, np.float16, np.float32]):
        writer.add_tensor(f"t{i}", random.standard_normal((3 + i, 7)).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found, reader = read_file(path), gguf.GGUFReader(path)
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    expected = {
        key: field.contents() for key, field in reader.fields.items() if key not in own
    }
    assert found.metadata.keys() == expected.keys()
    for key, value in expected.items():
        # Ours gives the decimal that was meant: 1e-05, not 9.999999747378752e-06.
        same = np.float32(value) if isinstance(value, float) else value
        mine = found.metadata[key]
        assert (np.float32(mine) if isinstance(mine, float) else mine) == same
    assert found.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.tensors[tensor.name].read(), values)
    assert len(found.tensors) == len(reader.tensors)


def u32(value):
    return struct.pack("<I", value)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


F32 = 0
ONE = [("t", (8,), F32, 0)]
BROKEN = {
    "empty": (b"", "the magic at byte 0 takes 4 bytes, but only 0 are left"),
    "magic": (b"GGML" + u32(3) + u64(0, 0), "magic b'GGML', version 3; supported is"),
    "version": (tiny.gguf_bytes(version=4), "magic b'GGUF', version 4"),
    "big endian": (tiny.gguf_bytes(version=3 << 24), "version 50331648"),
    "counts cut": (tiny.gguf_bytes()[:12], "a number at byte 8 takes 8 bytes"),
    "field count": (
        tiny.gguf_bytes(counts=(0, 1 << 60)),
        "the metadata counts 1152921504606846976 items of at least 13 bytes",
    ),
    "tensor count": (
        tiny.gguf_bytes(counts=(1 << 60, 0)),
        "the list of tensors counts 1152921504606846976 items of at least 32 bytes",
    ),
    "string length": (
        tiny.gguf_bytes([("k", 8, u64(1 << 63))]),
        "metadata 'k' at byte .* takes 9223372036854775808 bytes",
    ),
    "string not UTF-8": (
        tiny.gguf_bytes([("k", 8, u64(1) + b"\xff")]),
        "metadata 'k' at byte .* is not UTF-8",
    ),
    "value type": (tiny.gguf_bytes([("k", 13, b"")]), "'k' .* has value type 13"),
    "array of arrays": (
        tiny.gguf_bytes([("k", 9, u32(9) + u64(1))]),
        "'k' .* has value type 9; supported are numbers, strings and flat arrays",
    ),
    "array length": (
        tiny.gguf_bytes([("k", 9, u32(4) + u64(1 << 62))]),
        "metadata 'k' at byte .* takes 18446744073709551616 bytes",
    ),
    "array of strings": (
        tiny.gguf_bytes([("k", 9, u32(8) + u64(1 << 62))]),
        "metadata 'k' counts 4611686018427387904 items of at least 8 bytes",
    ),
    "key twice": (
        tiny.gguf_bytes([("k", 4, u32(1)), ("k", 4, u32(2))]),
        "metadata key 'k' appears twice",
    ),
    "tensor twice": (
        tiny.gguf_bytes((), ONE * 2, b"\0" * 32),
        "tensor 't' appears twice",
    ),
    "rank 0": (tiny.gguf_bytes((), [("t", (), F32, 0)]), "'t' has 0 dimensions"),
    "rank 5": (tiny.gguf_bytes((), [("t", (1,) * 5, F32, 0)]), "'t' has 5 dimensions"),
    "size 0": (tiny.gguf_bytes((), [("t", (8, 0), F32, 0)]), "'t' has a size of 0"),
    "unknown type": (
        tiny.gguf_bytes((), [("t", (8,), 77, 0)], b"\0" * 32),
        "'t': type 77 is not one of F32, F16, Q4_0, Q4_1",
    ),
    "type without dequantiser": (
        tiny.gguf_bytes((), [("t", (8,), int(Kind.I32), 0)], b"\0" * 32),
        "'t': type 26 is not one of F32",
    ),
    "part of a block": (
        tiny.gguf_bytes((), [("t", (40,), int(Kind.Q4_0), 0)], b"\0" * 64),
        "'t': rows of 40 values are not whole blocks of 32",
    ),
    "truncated": (
        tiny.gguf_bytes((), ONE, b"\0" * 31),
        "'t': its bytes 0 to 32 lie outside the file's 31 data bytes",
    ),
    "huge": (
        tiny.gguf_bytes((), [("t", (1 << 63, 1 << 63), F32, 0)], b"\0" * 32),
        "'t': its bytes 0 to .* lie outside the file's 32 data bytes",
    ),
    "oversized": (
        tiny.gguf_bytes((), ONE, b"\0" * 33),
        "1 bytes follow the last tensor, 't'",
    ),
    "overlap": (
        tiny.gguf_bytes((), [*ONE, ("u", (8,), F32, 16)], b"\0" * 64),
        "'u' starts at byte 16 of the data and overlaps 't', which ends at 32",
    ),
    "same place": (
        tiny.gguf_bytes((), [*ONE, ("u", (8,), F32, 0)], b"\0" * 64),
        "'u' starts at byte 0 of the data and overlaps 't'",
    ),
    "gap": (
        tiny.gguf_bytes((), [*ONE, ("u", (8,), F32, 64)], b"\0" * 96),
        "'u' starts at byte 64 of the data and does not follow 't'",
    ),
    "unaligned": (
        tiny.gguf_bytes((), [("t", (4,), F32, 0), ("u", (4,), F32, 16)], b"\0" * 64),
        "'u' starts at byte 16 .* the next multiple of 32",
    ),
    "offset of 2^64 - 1": (
        tiny.gguf_bytes((), [("t", (8,), F32, 2**64 - 1)], b"\0" * 32),
        "'t' starts at byte 18446744073709551615",
    ),
    "alignment": (
        tiny.gguf_bytes([("general.alignment", 4, u32(24))], ONE, b"\0" * 32),
        "general.alignment 24 is not a power of two",
    ),
    "alignment a string": (
        tiny.gguf_bytes([("general.alignment", 8, u64(0))], ONE, b"\0" * 32),
        "general.alignment '' is not a power of two",
    ),
    "one of several parts": (
        tiny.gguf_bytes([("split.count", 2, struct.pack("<H", 3))]),
        "is one of 3 parts. Merge them first",
    ),
}


@pytest.mark.parametrize("raw, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)


def test_the_unbroken_file_of_these_cases_is_read(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(
        tiny.gguf_bytes(
            [("general.alignment", 4, u32(64)), ("k", 9, u32(8) + u64(1, 2) + b"hi")],
            [("u", (4,), F32, 64), ("t", (4,), F32, 0)],
            b"\0" * 128,
            alignment=64,
        )
    )
    assert read_file(path).metadata["k"] == ["hi"]
