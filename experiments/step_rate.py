"""Time and memory of a training step on an attached GPU: full, LoRA, LISA, LOMO.

    python -m experiments.step_rate                     six methods at 7B, some minutes
    python -m experiments.step_rate --only lora lisa --trace profile
    python -m experiments.step_rate --minutes 10        as many as that, then the rest

LLaMA-2-7B in bfloat16 with random weights, 1 sequence of 1,024 tokens, blocks computed
again going backward, float32 moments, nothing clipped: the programs whose memory the
claims of LISA are about (`experiments.harness.timed`). Each runs in a process of its
own, so that the allocator's peak is its own:

    predicted   the interval `jmem.measure` gives without the GPU
    peak        the most JAX's allocator held while the program ran once
    ms          of a step, wall clock, the median of the runs after it

Expect  a step of fused LISA takes at most 1.05 times LoRA's of rank 128, and at most
        0.8 times full fine-tuning's; every peak is within 3 % of its prediction.

Needs a GPU; without one it says so and exits 0. Exit status 1: an expectation is not
met.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.harness import check, cli
from experiments.harness.timed import STEPS, StepSizes, build_step
from jmem.memory.live import LiveReport
from jmem.program import Program
from jmem.targets import GiB, Target

RUNS = 12
"""Timed steps; the median counts."""
TOLERANCE = 0.03
"""Of a peak against its prediction."""
EXPECT = {"lora": 1.05, "full": 0.8}
"""How long a step of fused LISA may take, in steps of another method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(StepSizes, check.Flags):
    out: pathlib.Path = pathlib.Path("runs/step_rate.json")
    """File of the report."""
    trace: pathlib.Path | None = None
    """Folder for a profile of each method."""


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(StepSizes())


def programs(row: str, target: Target, config: Mapping) -> dict[str, Program]:
    """The step of a method."""
    return {row: build_step(row, StepSizes(**config), target)}


def format_row(method: str, step: LiveReport, sizes: StepSizes) -> str:
    """A row of the table, in GiB, milliseconds and tokens a second."""
    low, high = (end / GiB for end in step.interval)
    seconds = statistics.median(step.seconds)
    return (
        f"{method:<15}{f'{low:.2f} - {high:.2f}':>16}"
        f"{step.planned_bytes / GiB:>9.2f}{step.peak_bytes / GiB:>8.2f}"
        f"{step.compute_error():>+7.1%}{seconds * 1e3:>9.1f}"
        f"{min(step.seconds) * 1e3:>8.1f}{max(step.seconds) * 1e3:>8.1f}"
        f"{sizes.batch_size * sizes.seq_len / seconds:>9,.0f}"
    )


def find_unmet(found: Mapping[str, LiveReport]) -> list[str]:
    """A sentence for each expectation that is not met."""
    words = []
    for method, step in found.items():
        if not step.own:
            words.append(f"{method}: the peak is not the run's own")
        elif abs(step.compute_error()) > TOLERANCE:
            words.append(
                f"{method}: peak {step.compute_error():+.1%} of the prediction"
            )
    median = {name: statistics.median(step.seconds) for name, step in found.items()}
    for other, most in EXPECT.items():
        if "lisa" in found and other in found:
            ratio = median["lisa"] / median[other]
            if ratio > most:
                words.append(
                    f"a step of lisa takes {ratio:.2f} times {other}'s, expected at "
                    f"most {most}"
                )
    return words


@check.needs_gpu
def main(command: Command) -> int:
    """Measure the methods; exit status 1 when an expectation is not met."""
    sizes = StepSizes(**{name: getattr(command, name) for name in settings()})
    measuring = check.Check("step_rate", command, dataclasses.asdict(sizes), STEPS)
    print(
        f"{sizes.model} in bfloat16, {sizes.batch_size} x {sizes.seq_len} tokens; GiB "
        f"and milliseconds\n{'method':<15}{'predicted':>16}{'planned':>9}{'peak':>8}"
        f"{'off':>7}{'ms':>9}{'least':>8}{'most':>8}{'tokens/s':>9}",
        flush=True,
    )

    def measure(method: str) -> dict[str, Any]:
        trace = command.trace and str((command.trace / method).absolute())
        row = measuring.confirm(method, runs=RUNS, trace=trace)
        return row | {"ms": statistics.median(row["seconds"]) * 1e3}

    def show(method: str, row: dict[str, Any]) -> str:
        return format_row(method, check.restore(LiveReport, row), sizes)

    rows = measuring.measure("steps", measure, show)
    words = find_unmet(
        {name: check.restore(LiveReport, row) for name, row in rows.items()}
    )
    print(*words, sep="\n")
    return int(bool(words or measuring.broken))


if __name__ == "__main__":
    cli.script(main, Command)
