"""The GPU check: quiet without a GPU, four programs that build, numbers judged."""

import json

import jax
import pytest

from experiments import gpu_check
from experiments.gpu_check import CASES, NO_GPU, Sizes, build, check, table, verdict

SIZES = Sizes(model="smollm2-135m", batch=1, seq_len=32, decode_batch=2, slots=64)
RECORD = {
    "interval": [1000, 1010],
    "ahead_bytes": 1000,
    "planned_bytes": 1005,
    "fragmentation": 5,
    "own": True,
    "peak_bytes": 1002,
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_described_program(case):
    program = build(case, SIZES, "h200")
    assert "weights" in program.labels
    leaves = [leaf for *_, leaf in program.leaves()]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert "bfloat16" in {str(leaf.dtype) for leaf in leaves}


def test_without_a_gpu_the_probe_says_so(capsys):
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("a GPU is attached")
    assert gpu_check.answer(json.dumps(["probe", "", {}, ""])) == NO_GPU
    assert "no GPU is attached" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured_and_that_is_no_failure(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(gpu_check, "run_stage", lambda *_: {"no_gpu": "no GPU"})
    out = tmp_path / "records.json"
    assert check(SIZES, [], None, out) == 0
    assert "Nothing was measured" in capsys.readouterr().out
    assert not out.exists()


def test_records_are_written_and_a_number_that_is_off_fails(
    monkeypatch, capsys, tmp_path
):
    peaks = {"forward": 1002, "decode": 1100}

    def answered(stage, case, *_):
        if stage == "probe":
            return {"device": "NVIDIA H200", "versions": {"jax": "0.12.0"}}
        return RECORD | {"peak_bytes": peaks[case]}

    monkeypatch.setattr(gpu_check, "run_stage", answered)
    out = tmp_path / "runs" / "records.json"
    assert check(SIZES, ["forward"], None, out) == 0
    assert check(SIZES, ["forward", "decode"], None, out) == 1
    records = json.loads(out.read_text())
    assert records["gpu"] == "h200"
    assert set(records["cases"]) == {"forward", "decode"}
    assert "peak +9.5% of the plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "as planned"),
        ({"peak_bytes": 999}, "peak -0.6% of the plan"),
        ({"peak_bytes": 1015}, "as planned"),
        ({"own": False}, "peak not the run's own"),
        ({"interval": [1030, 1050]}, "plan -2.4% of the interval"),
    ],
)
def test_a_number_is_judged_against_its_bound(change, says):
    assert verdict(RECORD | change) == says


def test_an_unknown_card_must_be_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        gpu_check, "run_stage", lambda *_: {"device": "Unheard", "versions": {}}
    )
    assert check(SIZES, [], None, tmp_path / "records.json") == 2
    assert "name one by --gpu" in capsys.readouterr().out


def test_the_table_has_a_line_for_each_case():
    text = table({"forward": RECORD, "full": RECORD})
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["forward", "full"]


def test_a_stage_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)forward, nonsense: .*KeyError"):
        gpu_check.run_stage("nonsense", "forward", SIZES, "h200", "")


def test_one_memory_fraction_is_given_to_jax(monkeypatch):
    """Two spellings of it are an error in JAX."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    told = gpu_check.environment("ran", "/cache")
    assert told["XLA_CLIENT_MEM_FRACTION"] == "0.95"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in told
    assert gpu_check.environment("predicted", "/cache")["JAX_PLATFORMS"] == "cpu"
