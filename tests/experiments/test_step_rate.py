"""The time of a training step: runs feed each other, numbers are judged and kept."""

import dataclasses
import json

import jax
import pytest
from tiny_decoder import TINY

from experiments import step_rate
from experiments.step_rate import METHODS, Sizes, Step, build, line, repeated, unmet
from jmem.finetune.lisa import Lisa
from jmem.finetune.program import step_program
from jmem.memory import protocol
from jmem.memory.report import MemoryReport
from jmem.models.decoder import Decoder
from jmem.targets import GiB

GOOD = Step(
    method="lisa",
    predicted=(18 * GiB, 19 * GiB),
    planned_bytes=18 * GiB,
    peak_bytes=19 * GiB,
    own=True,
    seconds=(0.10, 0.08, 0.09),
)


def other(**more):
    return dataclasses.replace(GOOD, **more)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_donated_step_of_the_model(method):
    program = build(method, dataclasses.asdict(Sizes()), "h200")
    assert program.donate == (0,)
    assert program.args[1].tokens.shape == (1, 1024)


def test_a_step_goes_on_from_the_one_before(monkeypatch):
    monkeypatch.setattr(step_rate, "WARM_UP", 1)
    program = step_program(Lisa(), Decoder(TINY), batch_size=1, seq_len=8)
    seen = []
    compile_ = type(program).compile

    def recorded(self, *given):
        compiled = compile_(self, *given)

        def call(state, batch):
            seen.append(int(state["step"]))
            return compiled(state, batch)

        return call

    monkeypatch.setattr(type(program), "compile", recorded)
    seconds = repeated(program, 2)
    assert seen == [0, 1, 2]
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([GOOD], []),
        ([GOOD, other(method="lora", seconds=(0.0858,))], []),
        ([GOOD, other(method="lora", seconds=(0.085,))], ["1.06 times lora's"]),
        ([GOOD, other(method="full", seconds=(0.1,))], ["0.90 times full's"]),
        ([other(peak_bytes=20 * GiB)], ["peak +5.3% of the prediction"]),
        ([other(peak_bytes=17 * GiB)], ["peak -5.6% of the prediction"]),
        ([other(own=False)], ["not the run's own"]),
    ],
    ids=["good", "near", "slow", "no gain", "above", "below", "early"],
)
def test_what_is_not_as_expected_is_told(found, says):
    words = unmet({one.method: one for one in found})
    assert len(words) == len(says)
    assert all(part in whole for part, whole in zip(says, words))


def test_a_row_tells_bytes_times_and_tokens():
    row = line(GOOD, Sizes()).split()
    assert row[0] == "lisa"
    assert row[-4:] == ["90.0", "80.0", "100.0", "11,378"]


class Ahead:
    """A prediction."""

    interval = (5, 5)

    def fits(self, reserve):
        return False


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    assert step_rate.main(["--out", str(tmp_path / "steps.json")]) == 0
    assert "Nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_records_are_written_row_by_row(monkeypatch, tmp_path):
    live = {"planned_bytes": 5, "peak_bytes": 5, "earlier_peak_bytes": 1}
    probed = {"device": "NVIDIA H200", "versions": {"jax": jax.__version__}}
    out = tmp_path / "runs" / "steps.json"
    kept = []

    def run(method, *given):
        kept.append(len(json.loads(out.read_text())["steps"]) if out.exists() else 0)
        return {"live": live, "seconds": [1.0, 2.0, 3.0]}

    monkeypatch.setattr(protocol, "probe", lambda: probed)
    monkeypatch.setattr(protocol, "run_stage", lambda *given: "")
    monkeypatch.setattr(MemoryReport, "from_json", lambda text: Ahead())
    monkeypatch.setattr(step_rate, "run", run)
    assert step_rate.main(["--only", "lora", "lisa", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert kept == [0, 1]
    assert list(records["steps"]) == ["lora", "lisa"]
    assert records["steps"]["lisa"]["seconds"] == [1.0, 2.0, 3.0]
    assert records["steps"]["lisa"]["ms"] == 2000
    assert (records["status"], records["device"]) == ("complete", "NVIDIA H200")
    assert records["config"] == step_rate.settings()


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch, capsys, tmp_path):
    def run(method, *given):
        if method == "full":
            raise protocol.StageError("the step of 'full' failed:\nRESOURCE_EXHAUSTED")
        live = {"planned_bytes": 5, "peak_bytes": 5, "earlier_peak_bytes": 1}
        return {"live": live, "seconds": [1.0]}

    probed = {"device": "NVIDIA H200", "versions": {"jax": jax.__version__}}
    monkeypatch.setattr(protocol, "probe", lambda: probed)
    monkeypatch.setattr(protocol, "run_stage", lambda *given: "")
    monkeypatch.setattr(MemoryReport, "from_json", lambda text: Ahead())
    monkeypatch.setattr(step_rate, "run", run)
    out = tmp_path / "steps.json"
    assert step_rate.main(["--only", "full", "lora", "--out", str(out)]) == 1
    records = json.loads(out.read_text())
    assert list(records["steps"]) == ["lora"]
    assert records["status"] == "running"  # and so it is not taken up
    printed = capsys.readouterr().out
    assert "full             does not fit: 0.00 GiB are predicted" in printed
    assert "RESOURCE_EXHAUSTED" in printed
