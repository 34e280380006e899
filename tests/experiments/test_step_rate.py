"""The time of a training step: numbers are judged and kept."""

import dataclasses
import json

import pytest

from experiments import step_rate
from experiments.harness.timed import STEPS, StepSizes
from experiments.step_rate import Command, find_unmet, format_row, programs, settings
from jmem.memory import protocol
from jmem.memory.live import TERMS, LiveReport
from jmem.targets import GiB, resolve

GOOD = LiveReport(
    name="step",
    device="NVIDIA H200",
    versions={"jax": "0.12.0"},
    peak_bytes=19 * GiB,
    earlier_peak_bytes=GiB,
    limit_bytes=100 * GiB,
    planned_bytes=18 * GiB,
    terms=dict.fromkeys(TERMS, 0),
    target="h200",
    interval=(18 * GiB, 19 * GiB),
    seconds=(0.10, 0.08, 0.09),
)


def other(**more):
    return dataclasses.replace(GOOD, **more)


@pytest.mark.parametrize("method", STEPS)
def test_every_method_is_a_donated_step_of_the_model(method):
    (program,) = programs(method, resolve("h200"), settings()).values()
    assert program.donate == (0,)
    assert program.args[1].tokens.shape == (1, 1024)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"lisa": GOOD}, []),
        ({"lisa": GOOD, "lora": other(seconds=(0.0858,))}, []),
        ({"lisa": GOOD, "lora": other(seconds=(0.085,))}, ["1.06 times lora's"]),
        ({"lisa": GOOD, "full": other(seconds=(0.1,))}, ["0.90 times full's"]),
        ({"lisa": other(peak_bytes=20 * GiB)}, ["peak +5.3% of the prediction"]),
        ({"lisa": other(peak_bytes=17 * GiB)}, ["peak -5.6% of the prediction"]),
        ({"lisa": other(earlier_peak_bytes=19 * GiB)}, ["not the run's own"]),
    ],
    ids=["good", "near", "slow", "no gain", "above", "below", "early"],
)
def test_what_is_not_as_expected_is_told(found, says):
    words = find_unmet(found)
    assert len(words) == len(says)
    assert all(part in whole for part, whole in zip(says, words))


def test_a_row_tells_bytes_times_and_tokens():
    row = format_row("lisa", GOOD, StepSizes()).split()
    assert row[0] == "lisa"
    assert row[-4:] == ["90.0", "80.0", "100.0", "11,378"]


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    assert step_rate.main(Command(out=tmp_path / "steps.json")) == 0
    assert "step_rate: no GPU is attached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_records_are_written_row_by_row(monkeypatch, attached, tmp_path):
    out = tmp_path / "runs" / "steps.json"
    kept = []

    def confirm(builder, check, method, *given, runs, trace, target):
        kept.append(len(json.loads(out.read_text())["steps"]) if out.exists() else 0)
        assert (check, runs, target) == ("step_rate", step_rate.RUNS, "h200")
        assert trace == str(tmp_path / "traces" / method)
        return other(seconds=(1.0, 2.0, 3.0))

    monkeypatch.setattr(protocol, "confirm", confirm)
    given = {"out": out, "trace": tmp_path / "traces"}
    assert step_rate.main(Command(only=("lora", "lisa"), **given)) == 0
    report = json.loads(out.read_text())
    assert kept == [0, 1]
    assert list(report["steps"]) == ["lora", "lisa"]
    assert report["steps"]["lisa"]["seconds"] == [1.0, 2.0, 3.0]
    assert report["steps"]["lisa"]["ms"] == 2000
    assert report["steps"]["lisa"]["programs"] == {"lisa": "hash of lisa"}
    assert (report["status"], report["device"]) == ("complete", "NVIDIA H200")
    assert report["config"] == settings()


def test_what_fails_is_told_and_stops_no_other(monkeypatch, attached, capsys, tmp_path):
    def confirm(builder, check, method, *given, **how):
        if method == "full":
            raise protocol.StageError("does not fit: 9.00 GiB are predicted\nOOM")
        return GOOD

    monkeypatch.setattr(protocol, "confirm", confirm)
    out = tmp_path / "steps.json"
    assert step_rate.main(Command(only=("full", "lora"), out=out)) == 1
    report = json.loads(out.read_text())
    assert list(report["steps"]) == ["lora"]
    assert report["status"] == "running"  # and so it is not taken up
    printed = capsys.readouterr().out
    assert "full: does not fit: 9.00 GiB are predicted" in printed
