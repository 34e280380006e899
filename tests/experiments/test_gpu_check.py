"""The GPU check: quiet without a GPU, numbers judged, records written.

Its twelve programs are built and measured in tests/memory/test_programs.py; the parts
that are programs of their own have tests of their own.
"""

import dataclasses
import importlib.util
import json
import subprocess

import pytest

from experiments import gpu_check
from experiments.gpu_check import CASES, Sizes, check, faults, holds, table
from jmem.kernels.windowed_attention.shapes import SHAPES
from jmem.memory import protocol
from jmem.memory.card import NoGPUError
from jmem.memory.live import LOADED, TERMS, UNEXPLAINED, LiveReport

MiB = 2**20
GOOD = LiveReport(
    name="step",
    device="NVIDIA H200",
    versions={"jax": "0.12.0", "jaxlib": "0.12.0"},
    peak_bytes=1002 * MiB,
    earlier_peak_bytes=500 * MiB,
    limit_bytes=2000 * MiB,
    planned_bytes=1005 * MiB,
    terms=dict.fromkeys(TERMS, 0) | {UNEXPLAINED: -3 * MiB},
    target="h200",
    interval=(1000 * MiB, 1010 * MiB),
    fragmentation=5 * MiB,
)


def changed(**more):
    return dataclasses.replace(GOOD, **more)


LOADS = changed(
    peak_bytes=1055 * MiB,
    planned_bytes=1050 * MiB,
    terms=dict.fromkeys(TERMS, 0) | {LOADED: 5 * MiB},
    plan_terms={"workspace": 40 * MiB},
)
"""4.5 % above the prediction, of which workspaces and constants are all."""


def test_twelve_programs():
    assert len(CASES) == 12


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (GOOD, []),
        (changed(peak_bytes=999 * MiB), ["peak -0.6% of the plan"]),
        (changed(peak_bytes=1015 * MiB), []),
        (changed(earlier_peak_bytes=1002 * MiB), ["peak not the run's own"]),
        (
            changed(peak_bytes=1100 * MiB, planned_bytes=1100 * MiB),
            ["peak +8.9% of the prediction"],
        ),
        (LOADS, []),
    ],
    ids=["good", "below", "slightly above", "autotuned", "unforeseen", "named"],
)
def test_a_peak_is_judged_against_its_bounds(report, says):
    assert faults(report) == says


def test_three_of_twelve_may_need_the_named_terms():
    assert holds({str(n): LOADS if n < 3 else GOOD for n in range(12)})
    assert not holds({str(n): LOADS if n < 4 else GOOD for n in range(12)})
    early = changed(earlier_peak_bytes=1002 * MiB)
    assert not holds({str(n): early if n < 1 else GOOD for n in range(12)})


def test_the_table_has_a_line_for_each_program_and_both_counts():
    text = table({"forward": GOOD, "full": LOADS})
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["forward", "full"]
    assert "within 3% of the prediction: 1 of 2 as they are, 2 less the named" in text


def attach(monkeypatch, device, reports):
    versions = {"jax": "0.12.0"}
    probed = {"device": device, "versions": versions}
    monkeypatch.setattr(protocol, "probe", lambda: probed)
    monkeypatch.setattr(
        protocol, "confirm", lambda builder, case, *given, **how: reports[case]
    )


def test_without_a_gpu_nothing_is_measured_and_that_is_no_failure(
    monkeypatch, capsys, tmp_path
):
    def probe():
        raise NoGPUError("no GPU is attached")

    monkeypatch.setattr(protocol, "probe", probe)
    out = tmp_path / "records.json"
    assert check(Sizes(), [], None, out) == 0
    assert "Nothing was measured" in capsys.readouterr().out
    assert not out.exists()


def test_records_are_written_and_a_number_that_is_off_fails(
    monkeypatch, capsys, tmp_path
):
    high = changed(peak_bytes=1100 * MiB)
    attach(monkeypatch, "NVIDIA H200", {"forward": GOOD, "decode": high})
    out = tmp_path / "runs" / "records.json"
    assert check(Sizes(), ["forward"], None, out) == 0
    assert check(Sizes(), ["forward", "decode"], None, out) == 1
    records = json.loads(out.read_text())
    assert (records["status"], records["device"]) == ("complete", "NVIDIA H200")
    assert records["cases"]["decode"]["terms"] == high.terms
    assert records["cases"]["forward"]["off_percent"] == 0
    assert records["config"] == gpu_check.settings()
    assert "peak +9.5% of the plan" in capsys.readouterr().out


def test_an_unknown_card_must_be_named(monkeypatch, capsys, tmp_path):
    attach(monkeypatch, "Unheard", {"forward": GOOD})
    assert check(Sizes(), ["forward"], None, tmp_path / "records.json") == 2
    assert "name one by --gpu" in capsys.readouterr().out
    named = ["--gpu", "h200", "--only", "forward", "--out", str(tmp_path / "named")]
    assert gpu_check.main(["--parts", "memory", *named]) == 0


def test_other_parts_are_run_and_the_worst_status_counts(monkeypatch, tmp_path):
    attach(monkeypatch, "NVIDIA H200", {"forward": GOOD})
    commands = []

    def run(command, check):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, len(commands) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "check.json"
    assert gpu_check.main(["--only", "forward", "--out", str(out)]) == 3
    assert out.exists()
    _, bench, *_ = commands
    parts = ("training", "kernels", "rates", "steps")
    for (module, *options), part in zip(commands, parts, strict=True):
        assert importlib.util.find_spec(module)
        assert options[-2:] == ["--out", str(tmp_path / f"check-{part}.json")]
    assert set(bench[2:-2]) <= set(SHAPES)


def test_programs_beside_each_other_share_the_gpu_and_a_broken_one_stops_no_other(
    monkeypatch, capsys, tmp_path
):
    shares = []

    def confirm(builder, case, *given, target, share):
        shares.append(share)
        if case == "full":
            raise protocol.StageError("stage 'run' of full failed")
        return GOOD

    attach(monkeypatch, "NVIDIA H200", {})
    monkeypatch.setattr(protocol, "confirm", confirm)
    out = tmp_path / "records.json"
    assert check(Sizes(), ["full", "lora", "lisa"], None, out, lanes=2) == 1
    assert shares == [0.5] * 3
    records = json.loads(out.read_text())
    assert set(records["cases"]) == {"lora", "lisa"}
    assert records["status"] == "running"  # and so it is not taken up
    assert "full: stage 'run' of full failed" in capsys.readouterr().out
