"""Checks on a GPU: rows as time allows, kept while their programs are the same."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.harness import check
from experiments.harness.check import Check, Flags
from jmem.memory import protocol

ROOT = pathlib.Path(__file__).parents[2]
ROWS = ("one", "two", "three")


@dataclasses.dataclass
class Calls:
    """Calls of a check, one after another, with one report."""

    out: pathlib.Path
    config: dict = dataclasses.field(default_factory=lambda: {"side": 8})

    def __call__(self, **flags) -> tuple[list[str], Check, dict]:
        """The rows that were measured, the call, and the report."""
        measured = []

        def measure(row):
            measured.append(row)
            return {"ms": 1.5}

        given = Flags(out=self.out, **flags)
        called = Check("toy", given, self.config, ROWS)
        called.measure("rows", measure, lambda row, found: f"{row}: {found['ms']}")
        return measured, called, json.loads(self.out.read_text())


@pytest.fixture
def calls(attached, tmp_path):
    return Calls(tmp_path / "runs" / "check.json")


@pytest.fixture
def clock(monkeypatch):
    """A clock of which a row takes five minutes."""
    now = [0.0]

    def look():
        now[0] += 75
        return now[0]

    monkeypatch.setattr(check.time, "monotonic", look)


def test_rows_come_with_their_programs_and_a_whole_report_is_complete(calls, capsys):
    measured, _, report = calls()
    assert tuple(measured) == ROWS
    assert report["status"] == "complete"
    assert report["rows"]["two"] == {"ms": 1.5, "programs": {"two": "hash of two"}}
    assert "two: 1.5" in capsys.readouterr().out


def test_a_call_ends_in_time_and_the_next_goes_on(calls, clock, capsys):
    first, _, report = calls(minutes=6)
    assert 0 < len(first) < 3
    assert report["status"] == "running"
    assert "the same call goes on with them" in capsys.readouterr().out
    further = []
    while report["status"] == "running":
        measured, _, report = calls(minutes=6)
        further += measured
    assert (*first, *further) == ROWS  # none twice
    assert calls(minutes=6)[0] == []  # all are there


def test_without_a_limit_everything_is_measured_anew(calls):
    calls(minutes=60)
    assert tuple(calls()[0]) == ROWS


@pytest.mark.parametrize(
    "what", ["config", "jax", "device", "programs", "torn", "bare"]
)
def test_rows_of_something_else_are_not_kept(calls, attached, monkeypatch, what):
    calls(minutes=60)
    kept = ()
    if what == "config":
        calls.config = {"side": 9}
    elif what == "jax":
        attached["versions"] = {"jax": "0.1"}
    elif what == "device":
        attached["device"] = "NVIDIA H100 80GB HBM3"
    elif what == "programs":
        kept = ("one", "three")
        hashes = {row: {row: f"hash of {row}"} for row in ROWS} | {"two": {"two": "x"}}
        monkeypatch.setattr(protocol, "call", lambda *given, **how: hashes)
    else:
        rows = {"one": {"ms": "fast", "programs": {"one": "hash of one"}}}
        bare = attached | {"config": calls.config, "rows": rows}  # without its digest
        calls.out.write_text("{" if what == "torn" else json.dumps(bare))
    measured, _, report = calls(minutes=60)
    assert sorted(measured) == sorted(set(ROWS) - set(kept))
    assert report["status"] == "complete"


def test_a_row_that_is_none_is_refused_before_the_gpu_is_asked(tmp_path):
    with pytest.raises(
        ValueError, match="--only tow: there is no such row; did you mean 'two'"
    ):
        Check("toy", Flags(only=("tow",), out=tmp_path / "a.json"), {}, ROWS)


def test_programs_are_hashed_for_the_described_gpu():
    config = {"layers": 1, "batch_size": 1, "seq_len": 8, "steps": 1, "threads": 1}
    found = check.hash_programs("step_check", ["lora"], config, "h200")
    again = check.hash_programs("step_check", ["lora"], config, "h200")
    assert found == again
    assert len(found["lora"]["lora"]) == 64


MODULES = ("gpu_check", "step_rate", "step_check", "decode_rate")


def test_no_more_is_needed_than_beside_a_gpu_is_there():
    """All are imported, read and started without what only experiments need."""
    code = (
        "import runpy, sys\n"
        "for name in ('tyro', 'datasets', 'gguf', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        f"for module in {MODULES}:\n"
        "    sys.argv = ['', '--minutes', '10']\n"
        "    try:\n"
        "        name = f'experiments.{module}'\n"
        "        runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, (module, stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for module in MODULES:
        assert f"{module}: no GPU is attached" in done.stdout
