"""Predicted memory against a real GPU's: what XLA plans is what the allocator gives.

    python -m experiments.gpu_check                       four programs, some minutes
    python -m experiments.gpu_check --only decode --out check.json

Needs a GPU; without one it says so and exits 0. For each program it prints

    ahead of time   the interval `jmem.measure` predicts without the GPU
    planned         XLA's plan for the attached GPU, autotuned
    peak            the most JAX's allocator held while the program ran once

Holds when the peak lies between the plan less its fragmentation and the plan plus 1 %,
and the plan within 1 % of the interval. The allocator's peak cannot be reset and
autotuning raises it, so every number comes from a process of its own, and the one that
runs finds its program compiled in a cache.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from jmem.program import Program

GiB = 2**30
TOLERANCE = 0.01
STAGE_TIMEOUT_S = 1200
NO_GPU = 3
"""Exit status of a stage that found no GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the four programs are made of."""

    model: str = "tinyllama-1.1b"
    batch: int = 4
    seq_len: int = 1024
    decode_batch: int = 32
    slots: int = 2048


def forward(model, sizes: Sizes) -> Program:
    """The loss of a batch, and nothing kept of it."""
    from jmem.finetune.program import loss_program

    return loss_program(model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def full(model, sizes: Sizes) -> Program:
    """A step of AdamW on all parameters."""
    from jmem.finetune.full import Full
    from jmem.finetune.program import step_program

    return step_program(Full(), model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def lisa(model, sizes: Sizes) -> Program:
    """A step of LISA with two active layers."""
    from jmem.finetune.lisa import Lisa
    from jmem.finetune.program import step_program

    method = Lisa(active_layers=2)
    return step_program(method, model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def decode(model, sizes: Sizes) -> Program:
    """One token for every row of a donated cache."""
    from jmem.generate.decode import decode_program

    return decode_program(model, batch_size=sizes.decode_batch, slots=sizes.slots)


CASES: dict[str, Callable[..., Program]] = {
    case.__name__: case for case in (forward, full, lisa, decode)
}


def build(case: str, sizes: Sizes, gpu: str) -> Program:
    """The program of a case for `gpu`, in bf16, not yet on any device."""
    from jmem.models import zoo
    from jmem.models.decoder import Decoder
    from jmem.targets import resolve

    model = Decoder.on(resolve(gpu), zoo.get(sizes.model), dtype="bfloat16")
    return CASES[case](model, sizes)


# Stages: each runs in a process of its own and answers with one line of JSON ----------


def predicted(program: Program, gpu: str) -> dict:
    """What is known without a GPU."""
    from jmem.memory.measure import measure

    report = measure(program, target=gpu, cache=False)
    return {"interval": report.interval, "ahead_bytes": report.device_bytes}


def planned(program: Program, gpu: str) -> dict:
    """XLA's plan for the attached GPU; leaves the program in JAX's cache."""
    from jmem.memory.measure import measure

    del gpu
    program.compile()
    report = measure(program, target="attached")
    return {
        "planned_bytes": report.device_bytes,
        "fragmentation": report.fragmentation,
        "by_kind": report.by_kind,
        "calls": report.calls,
    }


def ran(program: Program, gpu: str) -> dict:
    """The allocator around one run, on zeros: making them takes nothing more."""
    from jmem.memory.live import live

    del gpu
    report = live(program, key=None)
    return dataclasses.asdict(report) | {"own": report.own}


def probe(program: Program | None, gpu: str) -> dict:
    """The attached GPU, and the versions that drive it."""
    import jax
    import jaxlib.version

    from jmem.memory.live import attached

    del program, gpu
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    return {"device": attached().name, "versions": versions}


STAGES: dict[str, Callable[..., dict]] = {
    stage.__name__: stage for stage in (probe, planned, ran, predicted)
}


def environment(stage: str, cache: str) -> dict[str, str]:
    """What a stage's process is started with."""
    kept = {
        k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_MEM_FRACTION"
    }
    if stage == "predicted":
        return kept | {"JAX_PLATFORMS": "cpu"}
    return kept | {
        "XLA_CLIENT_MEM_FRACTION": "0.95",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if stage == "probe" else "true",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_stage(stage: str, case: str, sizes: Sizes, gpu: str, cache: str) -> dict:
    """A stage's answer from a fresh process; `{"no_gpu": why}` when it found none.

    Raises:
      RuntimeError: the process failed; the end of what it wrote is the message.
    """
    request = json.dumps([stage, case, dataclasses.asdict(sizes), gpu])
    done = subprocess.run(
        [sys.executable, "-m", "experiments.gpu_check", "--stage", request],
        env=environment(stage, cache),
        capture_output=True,
        text=True,
        timeout=STAGE_TIMEOUT_S,
    )
    if done.returncode == NO_GPU:
        return {"no_gpu": done.stdout.strip()}
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise RuntimeError(f"{case or 'the GPU'}, {stage}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(request: str) -> int:
    """Runs one stage in this process and prints its answer."""
    from jmem.memory.live import NoGPUError

    stage, case, sizes, gpu = json.loads(request)
    ask = STAGES[stage]
    program = build(case, Sizes(**sizes), gpu) if case else None
    try:
        print(json.dumps(ask(program, gpu)))
    except NoGPUError as error:
        print(error)
        return NO_GPU
    return 0


# The table ----------------------------------------------------------------------------


def verdict(record: dict) -> str:
    """What of a case holds: "as planned", or which number is off by how much."""
    plan, peak = record["planned_bytes"], record["peak_bytes"]
    low, high = record["interval"]
    faults = []
    if not record["own"]:
        faults.append("peak not the run's own")
    elif not plan - record["fragmentation"] <= peak <= plan * (1 + TOLERANCE):
        faults.append(f"peak {peak / plan - 1:+.1%} of the plan")
    nearest = min(max(plan, low), high)
    if abs(plan - nearest) > TOLERANCE * plan:
        faults.append(f"plan {plan / nearest - 1:+.1%} of the interval")
    return ", ".join(faults) or "as planned"


def table(records: dict[str, dict]) -> str:
    """The cases side by side, in GiB."""
    lines = [f"{'GiB':<10}{'ahead of time':>18}{'planned':>10}{'peak':>10}  verdict"]
    lines.append("-" * 72)
    for case, record in records.items():
        low, high = (end / GiB for end in record["interval"])
        ahead = f"{low:.3f} - {high:.3f}"
        plan, peak = record["planned_bytes"] / GiB, record["peak_bytes"] / GiB
        lines.append(
            f"{case:<10}{ahead:>18}{plan:>10.3f}{peak:>10.3f}  {verdict(record)}"
        )
    return "\n".join(lines)


def card_of(device: str) -> str | None:
    """The name of the described GPU that the driver calls `device`."""
    from jmem.targets import TARGETS

    return next((t.name for t in TARGETS.values() if t.description == device), None)


def check(sizes: Sizes, only: list[str], gpu: str | None, out: pathlib.Path) -> int:
    """Measures the cases one by one, prints the table, writes the records."""
    with tempfile.TemporaryDirectory(prefix="jmem-gpu-check-") as cache:
        found = run_stage("probe", "", sizes, "", cache)
        if "no_gpu" in found:
            print(f"gpu_check: {found['no_gpu']}\nNothing was measured.")
            return 0
        gpu = gpu or card_of(found["device"])
        if gpu is None:
            print(
                f"gpu_check: {found['device']!r} is not described; name one by --gpu."
            )
            return 2
        print(f"{found['device']} as {gpu}, jax {found['versions']['jax']}", flush=True)
        records = {}
        for case in only or CASES:
            start = time.monotonic()
            records[case] = {}
            for stage in ("planned", "ran", "predicted"):
                records[case] |= run_stage(stage, case, sizes, gpu, cache)
            print(f"{case}: {time.monotonic() - start:.0f} s", flush=True)
    print("", table(records), sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    found |= {"gpu": gpu, "sizes": dataclasses.asdict(sizes), "cases": records}
    found["date"] = time.strftime("%Y-%m-%d")
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nrecords: {out}")
    return int(any(verdict(record) != "as planned" for record in records.values()))


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 when a number is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=[])
    parser.add_argument("--gpu", help="described GPU to predict for; default: by name")
    parser.add_argument("--out", type=pathlib.Path, default="runs/gpu_check.json")
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stage:
        return answer(given.stage)
    names = [field.name for field in dataclasses.fields(Sizes)]
    sizes = Sizes(**{name: getattr(given, name) for name in names})
    return check(sizes, given.only, given.gpu, pathlib.Path(given.out))


if __name__ == "__main__":
    sys.exit(main())
