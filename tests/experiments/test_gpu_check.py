"""The GPU check: quiet without a GPU, numbers judged, records written.

Its twelve programs are built and measured in tests/memory/test_programs.py; the parts
that are programs of their own have tests of their own.
"""

import dataclasses
import importlib.util
import json
import subprocess
from pathlib import Path

import jax
import pytest

from experiments import decode_rate, gpu_check
from experiments.gpu_check import (
    Command,
    check_memory,
    find_faults,
    format_table,
    holds,
)
from experiments.harness.claim import read
from experiments.harness.record import Record
from jmem.finetune.samples import SAMPLES
from jmem.memory import protocol
from jmem.memory.live import LOADED, TERMS, UNEXPLAINED, LiveReport
from jmem.program import Program

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
    assert len(SAMPLES) == 12


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
    assert find_faults(report) == says


def test_three_of_twelve_may_need_the_named_terms():
    assert holds({str(n): LOADS if n < 3 else GOOD for n in range(12)})
    assert not holds({str(n): LOADS if n < 4 else GOOD for n in range(12)})
    early = changed(earlier_peak_bytes=1002 * MiB)
    assert not holds({str(n): early if n < 1 else GOOD for n in range(12)})


def test_the_table_has_a_line_for_each_program_and_both_counts():
    text = format_table({"forward": GOOD, "full": LOADS})
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["forward", "full"]
    assert "within 3% of the prediction: 1 of 2 as they are, 2 less the named" in text


def confirming(monkeypatch, reports):
    """Each program has the report of its name, or raises it."""

    def confirm(builder, check, case, *given, target, share):
        found = reports[case]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(protocol, "confirm", confirm)


def start(*only, **how) -> int:
    return check_memory(Command(only=only, **how))


def test_without_a_gpu_nothing_is_measured_and_that_is_no_failure(capsys, tmp_path):
    out = tmp_path / "records.json"
    assert gpu_check.main(Command(out=out)) == 0
    assert "gpu_check: no GPU is attached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_records_are_written_and_a_number_that_is_off_fails(
    monkeypatch, attached, capsys, tmp_path
):
    high = changed(peak_bytes=1100 * MiB)
    confirming(monkeypatch, {"forward": GOOD, "decode": high})
    out = tmp_path / "runs" / "records.json"
    assert start("forward", out=out) == 0
    assert start("forward", "decode", out=out) == 1
    records = json.loads(out.read_text())
    assert (records["status"], records["device"]) == ("complete", "NVIDIA H200")
    assert records["cases"]["decode"]["terms"] == high.terms
    assert records["cases"]["decode"]["programs"] == {"decode": "hash of decode"}
    assert records["cases"]["forward"]["off_percent"] == 0
    assert records["config"] == gpu_check.settings()
    assert "peak +9.5% of the plan" in capsys.readouterr().out


def test_an_unknown_card_must_be_named(monkeypatch, attached, tmp_path):
    confirming(monkeypatch, {"forward": GOOD})
    attached["device"] = "Unheard"
    out = tmp_path / "records.json"
    with pytest.raises(ValueError, match=r"'Unheard' is not a described .* by --gpu"):
        start("forward", out=out)
    assert not out.exists()
    assert start("forward", out=out, gpu="h200") == 0


def test_other_parts_are_run_and_the_worst_status_counts(
    monkeypatch, attached, tmp_path
):
    confirming(monkeypatch, {"forward": GOOD})
    benches = []
    seen, statuses = {}, {"step_check": 0, "decode_rate": 3, "step_rate": 1}
    for name, status in statuses.items():

        def main(command, name=name, status=status):
            seen[name] = command
            return status

        monkeypatch.setattr(getattr(gpu_check, name), "main", main)

    def bench(command, check):
        benches.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", bench)
    out = tmp_path / "check.json"
    assert gpu_check.main(Command(only=("forward",), out=out)) == 3
    assert out.exists()
    files = [seen[name].out.name for name in statuses]
    for _, _, module, _, *shapes, _, records in benches:
        assert set(shapes) <= set(importlib.import_module(module).SHAPES)
        files.append(Path(records).name)
    kernels = ("kernels-windowed_attention", "kernels-spmm")
    parts = ("training", "rates", "steps", *kernels)
    assert files == [f"check-{part}.json" for part in parts]
    assert all(seen[name].only == () for name in statuses)


def test_parts_for_which_no_time_is_left_are_told(
    monkeypatch, attached, capsys, tmp_path
):
    clock = iter(range(0, 10_000, 360))  # six minutes at each look
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    given = []
    for name in ("step_check", "decode_rate", "step_rate"):
        monkeypatch.setattr(
            getattr(gpu_check, name), "main", lambda command: given.append(command) or 0
        )
    command = Command(parts=("training", "rates"), out=tmp_path / "a", minutes=10)
    assert gpu_check.main(command) == 0
    assert [one.minutes for one in given] == [4]
    told = "rates: no time left; the same call goes on with it"
    assert told in capsys.readouterr().out


def test_programs_beside_each_other_share_the_gpu_and_a_broken_one_stops_no_other(
    monkeypatch, attached, capsys, tmp_path
):
    shares = []

    def confirm(builder, check, case, *given, target, share):
        shares.append(share)
        if case == "full":
            raise protocol.StageError("stage 'run' of full failed")
        return GOOD

    monkeypatch.setattr(protocol, "confirm", confirm)
    out = tmp_path / "records.json"
    assert start("full", "lora", "lisa", out=out, lanes=2) == 1
    assert shares == [0.5] * 3
    records = json.loads(out.read_text())
    assert set(records["cases"]) == {"lora", "lisa"}
    assert records["status"] == "running"  # and so it is not taken up
    assert "full: stage 'run' of full failed" in capsys.readouterr().out


class TestTodo:
    """What only a GPU renews: not measured, changed, then the oldest."""

    LIVE = """
    [[claim]]
    name = "{name}"
    what = "A number"
    kind = "live"
    source = "prediction"
    experiment = "{experiment}"
    report = ["rows", "{row}", "ms"]
    relations = ["ours > 0"]
    """

    @pytest.fixture
    def everything(self, tmp_path):
        (tmp_path / "configs" / "toy").mkdir(parents=True)
        path = tmp_path / "configs" / "toy" / "claims.toml"
        rows = {
            "new": ("step_rate", "lisa"),
            "old": ("step_rate", "full"),
            "other": ("gpu_check", "lora"),
            "changed": ("decode_rate", "8k-b32"),
            "new too": ("step_rate", "lora"),
        }
        path.write_text(
            "".join(
                self.LIVE.format(name=name, experiment=experiment, row=row)
                for name, (experiment, row) in rows.items()
            )
        )
        dates = {"new": "2026-03-01", "old": "2026-01-01", "other": "2026-02-01"}
        claims = read(path)
        records = {
            name: Record(
                value=1,
                definition=claims.by_name[name].definition,
                programs={"step": "0" * 64} if name == "changed" else None,
                versions={"jax": jax.__version__},
                device="NVIDIA H200",
                commit="",
                date=date,
            )
            for name, date in (dates | {"changed": "2026-04-01"}).items()
        }
        return [(claims, records)]

    def test_rows_are_listed_oldest_first_with_the_command(
        self, monkeypatch, everything
    ):
        x = jax.ShapeDtypeStruct((4,), "f4")
        other = {"step": Program(lambda x: x, (x,))}
        monkeypatch.setattr(decode_rate, "programs", lambda *given: other)
        lines = [line.split("  ") for line in gpu_check.list_todo(everything)]
        assert [(first, last.strip()) for first, *_, last in lines] == [
            ("python -m experiments.step_rate --only lora", "not measured"),
            (
                "python -m experiments.decode_rate --only 8k-b32",
                "of 2026-04-01; its program changed since 2026-04-01",
            ),
            (
                "python -m experiments.step_rate --only full",
                "of 2026-01-01; its program was not noted",
            ),
            (
                "python -m experiments.gpu_check --parts memory --only lora",
                "of 2026-02-01; its program was not noted",
            ),
            (
                "python -m experiments.step_rate --only lisa",
                "of 2026-03-01; its program was not noted",
            ),
        ]

    def test_it_needs_no_gpu(self, capsys):
        assert gpu_check.main(Command(todo=True)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len({line.split("  ")[0] for line in lines}) >= 21
