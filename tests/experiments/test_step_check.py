"""Training steps beside the CPU's: every method learns, and what differs is told."""

import dataclasses
import json

import pytest
from tiny_decoder import TINY

from experiments import step_check
from experiments.harness.timed import FINETUNERS
from experiments.step_check import RATE, Command, Sizes, compute_losses, find_fault
from jmem.memory.protocol import StageError
from jmem.models import zoo
from jmem.targets import resolve

SMALL = Sizes(layers=2, batch_size=1, seq_len=8, steps=4)


def test_copies_at_once_learn_as_one_alone(monkeypatch):
    """LISA, over a draw: the first one lasts three steps."""
    monkeypatch.setattr(zoo, "get", lambda name: TINY)  # not a vocabulary of 49,152
    alone = compute_losses("lisa", SMALL, "float32")
    copies = dataclasses.replace(SMALL, threads=2)
    assert find_fault(compute_losses("lisa", copies, "float32"), alone) == ""


@pytest.mark.parametrize("method", FINETUNERS)
def test_every_method_is_made(method):
    made = step_check.make_finetuners(RATE, period=3)[method]
    assert type(made).__name__.lower() in ("full", "lora", "lisa", "lomo", "mixlora")


@pytest.mark.parametrize(
    ("own", "reference", "says"),
    [
        ([3.0, 2.0], None, ""),
        ([3.0, 2.0], [3.001, 2.001], ""),
        ([3.0, 2.0], [3.0, 2.01], "step 1: 2.00000, on the CPU 2.01000"),
        ([3.0, float("nan")], None, "are not finite"),
        ([3.0, 3.0], None, "the loss went from 3.0000 to 3.0000"),
    ],
)
def test_what_is_wrong_with_losses_is_told(own, reference, says):
    assert (
        (says in find_fault(own, reference)) if says else not find_fault(own, reference)
    )


def test_options_to_find_a_crash_by_are_xlas_and_reach_the_run(
    monkeypatch, attached, tmp_path
):
    seen = []

    def run(method, sizes, dtype, where):
        seen.append((sizes.precision, sizes.threads, where))
        return [3.0, 2.0 if where == "cpu" else 1.0]

    monkeypatch.setattr(step_check, "run", run)
    flags = Command(
        only=("full",),
        out=tmp_path / "check.json",
        threads=2,
        precision="default",
        no_graphs=True,
        triton=True,
    )
    assert step_check.main(flags) == 0  # by other products: no comparison
    assert set(seen) == {("default", 2, "gpu"), ("default", 2, "cpu")}
    program = step_check.build("full", SMALL, "float32", resolve("h200"))
    sizes = dataclasses.replace(SMALL, no_graphs=True, triton=True)
    assert program.options["xla_gpu_enable_triton_gemm"] is False
    text = program.compile(resolve("h200"), sizes.options).as_text()
    assert text
    assert "command_buffer" not in text


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    assert step_check.main(Command(out=tmp_path / "check.json")) == 0
    assert "step_check: no GPU is attached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_method_that_crashes_is_a_row_and_a_failure(
    monkeypatch, attached, capsys, tmp_path
):
    def run(method, sizes, dtype, where):
        if (method, where) == ("lisa", "gpu"):
            raise StageError("lisa failed:\nCUDA_ERROR_ILLEGAL_INSTRUCTION")
        return [3.0, 2.0]

    monkeypatch.setattr(step_check, "run", run)
    out = tmp_path / "check.json"
    assert step_check.main(Command(only=("lora",), out=out)) == 0
    assert step_check.main(Command(only=("lora", "lisa"), out=out)) == 1
    report = json.loads(out.read_text())
    assert (report["status"], report["config"]) == ("complete", step_check.settings())
    methods = report["methods"]
    assert (methods["lora"]["faults"], methods["lisa"]["faults"]) == (0, 2)
    assert "ILLEGAL_INSTRUCTION" in methods["lisa"]["float32"]["fault"]
    assert "lora           float32   3.0000 to 2.0000    holds" in (
        capsys.readouterr().out
    )
