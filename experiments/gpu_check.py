"""What only a GPU can show: memory as predicted, kernels as fast, decoding as fast.

    python -m experiments.gpu_check            all five parts, about 25 minutes
    python -m experiments.gpu_check --minutes 10    as much as that, then the rest
    python -m experiments.gpu_check --todo     which records only a GPU can renew
    python -m experiments.gpu_check --parts memory --only decode --out check.json

Needs a GPU; without one it says so and exits 0. Exit status 1: something does not hold.

training  `experiments.step_check`: losses of every method's steps beside the CPU's
kernels   `jmem.kernels.*.bench`: numbers, then share of the bandwidth, or of cuBLAS
rates     `experiments.decode_rate`: tokens a second, cut caches against the full one
steps     `experiments.step_rate`: time of a training step, LISA against LoRA and full
memory    twelve programs: what XLA plans is what the allocator gives

For each of the twelve it prints

    ahead of time   the interval `jmem.measure` predicts without the GPU
    planned         XLA's plan for the attached GPU, autotuned
    peak            the most JAX's allocator held while the program ran once

Holds when every peak lies within 3 % of its prediction: nine programs and more as they
are, the others less the separately measured terms of `jmem.memory.live`; and when the
peak lies between the plan less its fragmentation and the plan plus 1 %. Each number
comes from a process of its own, see `jmem.memory.protocol`; records are written as they
come. On an H200 all twelve were within 2 %, in 140 s with `--lanes 4`.

They are also the programs whose account `tests/memory/test_programs.py` checks to the
byte, without a GPU.
"""

import dataclasses
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

from experiments import decode_rate, step_check, step_rate
from experiments.harness import check, cli, record, tables
from jmem.finetune.samples import SAMPLES, Sizes
from jmem.memory import protocol
from jmem.memory.live import LiveReport
from jmem.program import Program
from jmem.targets import GiB, Target

TOLERANCE = 0.03
"""Of the peak against the prediction."""
PLAN_TOLERANCE = 0.01
"""Of the peak above the plan."""
NEEDED = 0.75
"""Share of the programs that must hold without any further term."""
Part = Literal["training", "kernels", "rates", "steps", "memory"]
SHAPES = {
    "windowed_attention": (
        *("llama3-8b-32k-b1", "llama3-8b-32k-b1-w8", "llama3-8b-32k-b1-w32"),
        *("llama3-8b-8k-b32", "llama3-8b-128k-b6", "llama3-8b-128k-b6-w64"),
        *("qwen2.5-1.5b-32k-b1-w32", "phi3-mini-32k-b1-w64"),
    ),
    "spmm": (
        *("opt-30b-o-n8-s80", "opt-30b-o-n32-s80", "opt-30b-o-n8-s60"),
        *("opt-66b-up-n8-s80", "llama2-7b-up-n1-s50", "opt-30b-up-n16-s80"),
    ),
}
"""Those of the kernel's bench that are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Sizes, check.Flags):
    parts: tuple[Part, ...] = ("training", "kernels", "rates", "steps", "memory")
    """What is checked; the shortest first."""
    out: pathlib.Path = pathlib.Path("runs/gpu_check.json")
    """File of the report of the memory; those of the other parts lie beside it."""
    gpu: str = ""
    """Described GPU to predict memory for; empty: by the attached one's name."""
    lanes: int = 1
    """Programs whose memory is measured beside each other."""
    todo: bool = False
    """Only list what is to be renewed, the oldest first; needs no GPU."""


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(Sizes())


def programs(row: str, target: Target, config: Mapping) -> dict[str, Program]:
    """The program of a case."""
    return {row: SAMPLES[row](Sizes(**config), target)}


# Memory -------------------------------------------------------------------------------


def find_faults(report: LiveReport) -> list[str]:
    """In words, each bound that the program's peak is outside of."""
    plan, peak = report.planned_bytes, report.peak_bytes
    found = []
    if not report.own:
        found.append("peak not the run's own")
    elif not plan - report.fragmentation <= peak <= plan * (1 + PLAN_TOLERANCE):
        found.append(f"peak {peak / plan - 1:+.1%} of the plan")
    if abs(report.compute_error(named=True)) > TOLERANCE:
        found.append(f"peak {report.compute_error(named=True):+.1%} of the prediction")
    return found


def format_table(reports: dict[str, LiveReport]) -> str:
    """A line a program, in GiB; the peak's distance from the prediction in percent."""
    head = f"{'GiB':<12}{'ahead of time':>19}{'planned':>10}{'peak':>10}"
    lines = [f"{head}{'off':>8}{'named':>8}  verdict", "─" * 88]
    for case, report in reports.items():
        low, high = (end / GiB for end in report.interval)
        plan, peak = report.planned_bytes / GiB, report.peak_bytes / GiB
        sizes = f"{f'{low:.3f} - {high:.3f}':>19}{plan:>10.3f}{peak:>10.3f}"
        off = (
            f"{report.compute_error():>+8.1%}{report.compute_error(named=True):>+8.1%}"
        )
        verdict = ", ".join(find_faults(report)) or "holds"
        lines.append(f"{case:<12}{sizes}{off}  {verdict}")
    plain, named = count_within(reports), count_within(reports, named=True)
    words = f"{plain} of {len(reports)} as they are, {named} less the named terms"
    return "\n".join([*lines, "", f"within {TOLERANCE:.0%} of the prediction: {words}"])


def count_within(reports: dict[str, LiveReport], *, named: bool = False) -> int:
    """How many peaks are within the tolerance of their prediction."""
    return sum(abs(r.compute_error(named=named)) <= TOLERANCE for r in reports.values())


def holds(reports: dict[str, LiveReport]) -> bool:
    """Whether no program has a fault, and enough of them needed no further term."""
    enough = count_within(reports) >= NEEDED * len(reports)
    return enough and not any(map(find_faults, reports.values()))


def check_memory(command: Command) -> int:
    """Measures the programs, `lanes` at a time; prints the table, writes the records.

    Programs that run beside each other share the GPU's memory alike. Peaks are those of
    each one's own allocator, so they do not change.
    """
    config = {name: getattr(command, name) for name in settings()}
    measuring = check.Check("gpu_check", command, config, SAMPLES, command.gpu)
    measure = functools.partial(measuring.confirm, share=1 / command.lanes)

    def show(case: str, row: dict[str, Any]) -> str:
        return f"\n{case}: {check.restore(LiveReport, row)}"

    rows = measuring.measure("cases", measure, show, command.lanes)
    reports = {case: check.restore(LiveReport, row) for case, row in rows.items()}
    print(f"\n{format_table(reports)}\n\nrecords: {command.out}")
    return int(bool(measuring.broken) or not holds(reports))


# The other parts ----------------------------------------------------------------------


def time_kernel(kernel: str, out: pathlib.Path, minutes: float | None) -> int:
    """A kernel's bench; not again where its records are there and time is short."""
    if minutes and out.exists():
        print(f"{kernel}: timed, see {out}")
        return 0
    module = f"jmem.kernels.{kernel}.bench"
    shapes = SHAPES[kernel]
    command = [sys.executable, "-m", module, "--only", *shapes, "--out", str(out)]
    status = subprocess.run(command, check=False).returncode
    return status if status in (0, 1) else 2  # killed by a signal it is negative


def run_part(part: Part, command: Command, minutes: float | None) -> int:
    """The exit status of a part, which has `minutes` left."""
    if part == "memory":
        return check_memory(dataclasses.replace(command, minutes=minutes))
    out = command.out.with_name(f"{command.out.stem}-{part}.json")
    if part == "kernels":
        outs = {name: out.with_name(f"{out.stem}-{name}.json") for name in SHAPES}
        return max(time_kernel(name, to, minutes) for name, to in outs.items())
    modules = {"training": step_check, "rates": decode_rate, "steps": step_rate}
    module = modules[part]
    return module.main(module.Command(out=out, minutes=minutes))


# What is to be renewed ----------------------------------------------------------------


def list_todo(everything: tables.Everything) -> list[str]:
    """A line for each row of a check whose records only a GPU renews, oldest first.

    Rows without a record come first, then those of an earlier program.
    """
    found: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for claims, records, claim in tables.list_claims(everything):
        if claim.kind != "live":
            continue
        age = (0, "", "not measured")
        if mine := tables.find_current(claim, records):
            outcome, words = record.compare(claims.slug, claim, mine)
            when = f"of {mine.date}" + (f"; {words}" if words else "")
            age = (1 if outcome == "changed" else 2, mine.date, when)
        found.setdefault((claim.experiment, claim.report[1]), []).append(age)
    oldest = {row: min(ages) for row, ages in found.items()}
    ordered = sorted(oldest, key=lambda row: oldest[row][:2])
    return [
        f"{f'python -m experiments.{name} {flags} {row}':<64}{oldest[name, row][2]}"
        for name, row in ordered
        for flags in ("--parts memory --only" if name == "gpu_check" else "--only",)
    ]


@check.needs_gpu
def main(command: Command) -> int:
    """Check the parts; exit status 1 when a number is off."""
    if command.todo:
        print(*list_todo(tables.load(record.ROOT)), sep="\n")
        return 0
    protocol.probe()  # before any part
    began, status = time.monotonic(), 0
    for part in command.parts:
        left = command.minutes and command.minutes - (time.monotonic() - began) / 60
        if left is not None and left <= 0:
            print(f"{part}: no time left; the same call goes on with it")
            continue
        status = max(status, run_part(part, command, left))
    return status


if __name__ == "__main__":
    cli.script(main, Command)
