"""Tables of tiles: found by device, then by capability, else the heuristic's."""

import pytest

from jmem.kernels import _tuned
from jmem.kernels.windowed_attention import mosaic_gpu

KEY = mosaic_gpu.key(batch=1, head_dim=128, tokens=32768, windows=1020, window=32)
SIZES = {"batch": 1, "kv_heads": 8, "head_dim": 128, "max_tail": 128}


def entry(device, **tile):
    return {"device": device, "key": KEY, "tile": tile, "ms": 0.5, "jax": "0.12"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.toml"
    monkeypatch.setattr(mosaic_gpu, "TUNED", path)
    return path


def tile(device="NVIDIA H200", window=32):
    windows = 1020 * 32 // window
    sizes = {**SIZES, "windows": windows, "window": window}
    return mosaic_gpu.tile_for(device=device, **sizes)


def test_the_device_s_own_entry_comes_first(table):
    h100 = entry("NVIDIA H100 80GB HBM3", stages=2)
    _tuned.write(table, "x.bench", [h100, entry("NVIDIA H200", stages=3)])
    assert tile().stages == 3
    assert tile("NVIDIA H100 80GB HBM3").stages == 2
    assert tile(window=8) == mosaic_gpu.Tile(splits=33)  # not measured


def test_a_device_as_capable_stands_in(table):
    _tuned.write(table, "x.bench", [entry("NVIDIA H100 80GB HBM3", stages=2, keys=128)])
    assert (tile().stages, tile().keys) == (2, 128)
    assert tile("NVIDIA B200") == mosaic_gpu.Tile(splits=33)


def test_writing_and_reading_agree_and_the_newest_stays(table):
    old, new = entry("NVIDIA H200", stages=2), entry("NVIDIA H200", stages=3)
    _tuned.write(table, "jmem.kernels.x.bench", [old, new])
    assert _tuned.read(table) == [new]
    assert "python -m jmem.kernels.x.bench" in table.read_text()


def test_an_entry_without_its_key_is_refused_by_number(table):
    table.write_text('[[tile]]\ndevice = "NVIDIA H200"\n')
    with pytest.raises(ValueError, match=r"tuned\.toml: tile 0 has no 'key'"):
        tile()


def test_the_table_in_the_repository_can_be_read():
    path = mosaic_gpu.TUNED
    for number, found in enumerate(_tuned.read(path)):
        assert mosaic_gpu.Tile(**found["tile"]), number
        assert {"ms", "jax", "date"} <= set(found)
    assert path.read_text().startswith(
        _tuned.HEADER.format(bench="jmem.kernels.windowed_attention.bench")
    )
