"""Peers on one card: what is compared, what is missing, and the table's ratios.

What torch takes only a GPU can tell; here nothing of it is imported.
"""

import jax
import pytest

from experiments import peers
from experiments.harness import torch_peers
from experiments.peers import (
    ROWS,
    Command,
    compute_ratios,
    find_unmet,
    format_row,
    make_shape,
    programs,
    settings,
)
from jmem.targets import GiB, resolve

OURS = {"ms": 80.0, "peak_bytes": 16 * GiB}
PEER = {"ms": 100.0, "peak_bytes": 40 * GiB, "card_bytes": 42 * GiB}


def test_every_part_has_one_row_of_jmems_and_a_peer_that_is_measured():
    parts = {row.partition("-")[0] for row in ROWS}
    assert parts == torch_peers.MEASURES.keys()
    for part in parts:
        by = [row.split("-", 1)[1] for row in ROWS if row.startswith(f"{part}-")]
        assert by.count("jmem") == 1
        assert len(by) > 1


@pytest.mark.parametrize("row", ROWS)
def test_only_jmems_rows_have_programs_and_their_sizes_are_the_flags(row):
    small = {"model": "smollm2-135m", "seq_len": 64, "decoder": "smollm2-135m"}
    config = settings() | small | {"rows": 2, "prompt": 128}
    found = programs(row, resolve("h200"), config)
    compiled = row.endswith("-jmem") and not row.startswith("attention")
    assert list(found) == [row] * compiled
    if row in ("lora-jmem", "full-jmem"):
        assert found[row].donate == (0,)
        assert found[row].args[1].tokens.shape == (1, 64)
    elif compiled:
        assert found[row].args[1].shape == (2,)


def test_moments_of_full_fine_tuning_are_16_bits_as_torch_has_them():
    config = settings() | {"model": "smollm2-135m", "seq_len": 64}
    state, _ = programs("full-jmem", resolve("h200"), config)["full-jmem"].args
    moments = {x.dtype for x in jax.tree.leaves(state["optimizer"]) if x.ndim}
    assert moments == {jax.numpy.dtype("bfloat16")}


def test_the_attention_is_one_layers_of_the_token_that_is_decoded():
    shape = make_shape(settings())
    assert (shape.batch, shape.tokens, shape.groups) == (32, 8192, 4)
    assert shape.read_bytes == 32 * 8192 * 8 * 128 * 2 * 2


def test_ratios_are_jmems_to_the_row_where_both_were_measured():
    rows = {"lora-jmem": OURS, "lora-peft": PEER, "full-hf": PEER}
    assert compute_ratios(rows, "lora-peft") == {"ms": 0.8, "peak_bytes": 0.4}
    assert compute_ratios(rows, "full-hf") == {}  # jmem's own is not there
    line = format_row("lora-peft", PEER, compute_ratios(rows, "lora-peft"))
    assert line.split() == ["lora-peft", "100.000", "40.00", "42.00", "0.80", "0.40"]
    own = format_row("lora-jmem", OURS, compute_ratios(rows, "lora-jmem"))
    assert own.split() == ["lora-jmem", "80.000", "16.00"]


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ({"ms": 80.0, "peak_bytes": 20 * GiB}, []),
        ({"ms": 81.0, "peak_bytes": 20 * GiB}, ["ms is 0.81 of lora-peft's"]),
        ({"ms": 80.0, "peak_bytes": 21 * GiB}, ["peak_bytes is 0.53 of lora-peft's"]),
    ],
)
def test_what_is_not_as_expected_is_told(ours, says):
    words = find_unmet({"lora-jmem": ours, "lora-peft": PEER})
    assert len(words) == len(says)
    assert all(part in whole for part, whole in zip(says, words))


def test_what_is_missing_is_told_in_a_line_and_is_no_failure(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(peers, "NEEDED", ("json", "a_package_of_nobody"))
    assert peers.main(Command(out=tmp_path / "peers.json")) == 0
    assert "not installed: a_package_of_nobody" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers, "NEEDED", ())
    assert peers.main(Command(out=tmp_path / "peers.json")) == 0
    assert "peers: no GPU is attached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rows=0"):
        Command(rows=0)
