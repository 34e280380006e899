"""Training steps on an attached GPU beside the CPU's: do they run, and learn alike?

    python -m experiments.step_check                 every method, a minute or two
    python -m experiments.step_check --only lisa lomo --threads 4
    python -m experiments.step_check --only lisa --precision default --triton
    python -m experiments.step_check --only lisa --no-graphs

SmolLM2-135M cut to a few blocks, random weights, twelve steps on random tokens that
repeat, so that the loss falls; LISA draws four times. Each method runs in a process of
its own on either device, in float32 with exact products, and must have the CPU's losses
to `TOLERANCE`; and in bfloat16 on the GPU, where the losses need only fall.

What a crash depends on is found by its flags: `--threads` runs as many copies at once
in one process, as a comparison of several rates might; `--precision default` lets
products be TF32, where the losses need only fall; `--triton` lets XLA choose Triton's
products, which training steps do without (`jmem.lowering.IN_PLACE`); `--no-graphs` has
no CUDA graphs. A core dump names the kernel (cuda-gdb):
CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1 CUDA_ENABLE_LIGHTWEIGHT_COREDUMP=1.

Needs a GPU; without one it says so and exits 0. Exit status 1: a method failed, or
learnt something else.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any, Literal

import jax

from experiments.harness import check, cli
from experiments.harness.settings import attached
from experiments.harness.timed import FINETUNERS, make_finetuners
from jmem.finetune.adamw import AdamW
from jmem.finetune.program import step_program
from jmem.memory import protocol, worker
from jmem.memory.live import make_arguments
from jmem.memory.protocol import StageError
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder, Precision
from jmem.program import Program
from jmem.targets import Target

TOLERANCE = 1e-3
"""Between a loss on the GPU and the CPU's, as a share of it."""
Products = Literal["highest", "default"]
RATE = AdamW(learning_rate=1e-3, max_grad_norm=0.0)
"""One that learns a repeated batch within the steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How steps are run on the GPU: what a crash may depend on."""

    threads: int = 1
    """Copies at once in one process."""
    precision: Products = "highest"
    """Of float32 products: exact ones, or as XLA does by default (TF32)."""
    no_graphs: bool = False
    """Launch every kernel by itself, none in a CUDA graph."""
    triton: bool = False
    """Let products be Triton's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Running, check.Flags):
    out: pathlib.Path = pathlib.Path("runs/step_check.json")
    """File of the report."""
    lanes: int = 4
    """Methods at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Running):
    """Of the model, its batch, and the run."""

    layers: int = 6
    batch_size: int = 2
    seq_len: int = 128
    steps: int = 12

    @property
    def options(self) -> dict[str, Any]:
        """XLA's compile options, beside a training step's own."""
        triton = {"xla_gpu_enable_triton_gemm": True} if self.triton else {}
        graphs = {"xla_gpu_enable_command_buffer": ""} if self.no_graphs else {}
        return triton | graphs


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(Sizes())


def build(
    method: str, sizes: Sizes, dtype: Precision, target: Target | None
) -> Program:
    """A method's step, at a rate that learns a repeated batch within the steps."""
    config = dataclasses.replace(zoo.get("smollm2-135m"), layers=sizes.layers)
    model = Decoder.on(target, config, **PRECISIONS[dtype])
    finetuner = make_finetuners(RATE, period=3)[method]
    size = {"batch_size": sizes.batch_size, "seq_len": sizes.seq_len}
    return step_program(finetuner, model, **size)


def programs(row: str, target: Target, config: Mapping) -> dict[str, Program]:
    """A method's step in float32."""
    return {row: build(row, Sizes(**config), "float32", target)}


def compute_losses(method: str, sizes: Sizes, dtype: Precision) -> list[float]:
    """The loss of every step, in nats a token, on this process's default device.

    Of several copies at once, those of the first.
    """

    def one(number: int) -> list[float]:
        program = build(method, sizes, dtype, attached())
        compiled, found = program.compile(options=sizes.options), []
        state, batch = make_arguments(program, number)
        for _ in range(sizes.steps):
            state, metrics = compiled(state, batch)
            found.append(metrics["loss"])
        return [float(loss) for loss in jax.device_get(found)]

    with futures.ThreadPoolExecutor(sizes.threads) as pool:
        first, *_ = pool.map(one, range(sizes.threads))  # or what one of them raised
    return first


def run_here(method: str, config: dict, dtype: Precision) -> list[float]:
    """`compute_losses` of a config as JSON holds it, for another process to call."""
    return compute_losses(method, Sizes(**config), dtype)


def run(method: str, sizes: Sizes, dtype: Precision, where: str) -> list[float]:
    """`compute_losses` in a process of its own, on the "gpu" or, of one copy, on the
    "cpu".

    Raises:
      StageError: it failed; the end of what it wrote.
    """
    environment = worker.make_environment() | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": sizes.precision,
    }
    if where == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu"}
        sizes = dataclasses.replace(sizes, threads=1, no_graphs=False, triton=False)
    config = dataclasses.asdict(sizes)
    return protocol.call(run_here, method, config, dtype, environment=environment)


def find_fault(own: list[float], reference: list[float] | None) -> str:
    """What is wrong with the losses of a method, in words; "" if nothing is."""
    if not all(abs(loss) < float("inf") for loss in own):
        return f"losses {own} are not finite"
    if own[-1] >= own[0]:
        return f"the loss went from {own[0]:.4f} to {own[-1]:.4f}"
    apart = [abs(a / b - 1) for a, b in zip(own, reference or own, strict=True)]
    if max(apart) > TOLERANCE:
        step = apart.index(max(apart))
        return (
            f"step {step}: {own[step]:.5f}, on the CPU {(reference or own)[step]:.5f}"
        )
    return ""


def measure(method: str, sizes: Sizes) -> dict[str, Any]:
    """A method's losses and faults by dtype, on the GPU beside the CPU's."""
    row: dict[str, Any] = {}
    with futures.ThreadPoolExecutor(1) as beside:
        reference = beside.submit(run, method, sizes, "float32", "cpu")
        for dtype in ("float32", "bfloat16"):
            found: list[float] = []
            try:
                found = run(method, sizes, dtype, "gpu")
                exact = (dtype, sizes.precision) == ("float32", "highest")
                wrong = find_fault(found, reference.result() if exact else None)
            except StageError as error:
                wrong = str(error)
            row[dtype] = {"losses": found, "fault": wrong}
    return row | {"faults": sum(bool(one["fault"]) for one in row.values())}


def show(method: str, row: dict[str, Any]) -> str:
    """Two lines of the table."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        found, wrong = row[dtype]["losses"], row[dtype]["fault"]
        ends = f"{found[0]:.4f} to {found[-1]:.4f}" if found else "none"
        lines.append(f"{method:<15}{dtype:<10}{ends:<20}{wrong or 'holds'}")
    return "\n".join(lines)


@check.needs_gpu
def main(command: Command) -> int:
    """Run the methods; exit status 1 when one failed or learnt otherwise."""
    names = [field.name for field in dataclasses.fields(Running)]
    sizes = Sizes(**{name: getattr(command, name) for name in names})
    config = dataclasses.asdict(sizes)
    measuring = check.Check("step_check", command, config, FINETUNERS)
    print(
        f"{sizes.layers} blocks of SmolLM2-135M, {sizes.steps} steps, "
        f"{sizes.threads} at once",
        flush=True,
    )
    one = functools.partial(measure, sizes=sizes)
    rows = measuring.measure("methods", one, show, command.lanes)
    faults = sum(row["faults"] for row in rows.values())
    print(f"{faults} faults")
    return int(bool(faults or measuring.broken))


if __name__ == "__main__":
    cli.script(main, Command)
