"""Training steps on an attached GPU beside the CPU's: do they run, and learn alike?

    python -m experiments.step_check                 every method, a minute or two
    python -m experiments.step_check --only lisa lomo --threads 4

SmolLM2-135M cut to a few blocks, random weights, twelve steps on random tokens that
repeat, so that the loss falls; LISA draws four times. Each method runs in a process of
its own on either device, in float32 with exact products, and must have the CPU's losses
to `TOLERANCE`; and in bfloat16 on the GPU, where the losses need only fall. `--threads`
runs as many copies at once in one process, as a comparison of several rates might.

Needs a GPU; without one it says so and exits 0. Exit status 1: a method failed, or
learnt something else.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from concurrent import futures
from typing import Any, Literal

from experiments.harness import check
from jmem.memory import protocol, worker
from jmem.memory.card import NoGPUError
from jmem.memory.protocol import StageError

TOLERANCE = 1e-3
"""Between a loss on the GPU and the CPU's, as a share of it."""
METHODS = (
    *("full", "lora", "lisa", "lisa-separate", "lisa-host", "badam", "lomo"),
    *("embedding", "mixlora"),
)
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model, its batch, and the run."""

    layers: int = 6
    batch_size: int = 2
    seq_len: int = 128
    steps: int = 12


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(Sizes())


def finetuner(method: str) -> Any:
    """The method, at a rate that learns a repeated batch within the steps."""
    from jmem.finetune.adamw import AdamW
    from jmem.finetune.full import Full
    from jmem.finetune.lisa import Lisa
    from jmem.finetune.lomo import Lomo
    from jmem.finetune.lora import Lora
    from jmem.finetune.mixlora import MixLora, Mixture

    adamw = AdamW(learning_rate=1e-3, max_grad_norm=0.0)
    lisa = Lisa(active_layers=2, period=3, adamw=adamw)
    blocks = dataclasses.replace(lisa, active_layers=1, train=("blocks",))
    made = {
        "full": Full(adamw=adamw),
        "lora": Lora(rank=8, adamw=adamw),
        "lisa": lisa,
        "lisa-separate": dataclasses.replace(lisa, update="separate"),
        "lisa-host": dataclasses.replace(lisa, moments="persist", persist_in="host"),
        "badam": dataclasses.replace(blocks, order="reshuffled"),
        "lomo": Lomo(),
        "embedding": dataclasses.replace(lisa, active_layers=0),
        "mixlora": MixLora(mixtures=(Mixture(rank=4, experts=4, adamw=adamw),)),
    }
    return made[method]


def losses(method: str, sizes: Sizes, dtype: Dtype, threads: int = 1) -> list[float]:
    """Of every step, on this process's default device; of the first of `threads`."""
    import jax

    from experiments.harness import models
    from jmem.finetune.program import step_program
    from jmem.memory.live import made
    from jmem.models import zoo
    from jmem.models.decoder import PRECISIONS, Decoder

    config = dataclasses.replace(zoo.get("smollm2-135m"), layers=sizes.layers)
    model = Decoder.on(models.attached(), config, **PRECISIONS[dtype])

    def one(number: int) -> list[float]:
        program = step_program(
            finetuner(method),
            model,
            batch_size=sizes.batch_size,
            seq_len=sizes.seq_len,
        )
        compiled, found = program.compile(), []
        state, batch = made(program, number)
        for _ in range(sizes.steps):
            state, metrics = compiled(state, batch)
            found.append(metrics["loss"])
        return [float(loss) for loss in jax.device_get(found)]

    with futures.ThreadPoolExecutor(threads) as pool:
        first, *_ = pool.map(one, range(threads))  # all of them, or what one raised
    return first


def run(method: str, sizes: Sizes, dtype: Dtype, threads: int, where: str) -> list:
    """`losses` in a process of its own, on the "gpu" or the "cpu".

    Raises:
      StageError: it failed; the end of what it wrote.
    """
    environment = worker.environment() | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    if where == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu"}
    answer = protocol.ask(
        *("experiments.step_check", "--here"),
        request=[method, dataclasses.asdict(sizes), dtype, threads],
        environment=environment,
        what=f"{method}, {dtype}, on the {where}",
    )
    return json.loads(answer)


def fault(own: list[float], reference: list[float] | None) -> str:
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


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 when a method failed or learnt otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=1, help="copies at once")
    parser.add_argument("--lanes", type=int, default=4, help="processes at once")
    parser.add_argument("--out", type=pathlib.Path, default="runs/step_check.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.here:
        method, sizes, dtype, threads = json.load(sys.stdin)
        print(json.dumps(losses(method, Sizes(**sizes), dtype, threads)))
        return 0
    try:
        probed = protocol.probe()
    except NoGPUError as error:
        print(f"step_check: {error}\nNothing was measured.")
        return 0
    sizes = Sizes()
    print(
        f"{probed['device']}, jax {probed['versions']['jax']}, {sizes.layers} blocks "
        f"of SmolLM2-135M, {sizes.steps} steps, {given.threads} at once",
        flush=True,
    )
    rows: dict[str, dict[str, Any]] = {}
    faults = 0
    started = time.monotonic()
    with (
        futures.ThreadPoolExecutor(given.lanes) as gpu,
        futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as cpu,
    ):
        jobs = {
            method: (
                gpu.submit(run, method, sizes, "float32", given.threads, "gpu"),
                gpu.submit(run, method, sizes, "bfloat16", given.threads, "gpu"),
                cpu.submit(run, method, sizes, "float32", 1, "cpu"),
            )
            for method in given.only
        }
        for method, (exact, half, reference) in jobs.items():
            row = {}
            for dtype, job in (("float32", exact), ("bfloat16", half)):
                try:
                    found = job.result()
                    like = reference.result() if dtype == "float32" else None
                    wrong = fault(found, like)
                except StageError as error:
                    found, wrong = [], str(error)
                faults += bool(wrong)
                row[dtype] = {"losses": found, "fault": wrong}
                ends = f"{found[0]:.4f} to {found[-1]:.4f}" if found else "none"
                verdict = wrong or "holds"
                print(f"{method:<15}{dtype:<10}{ends:<20}{verdict}", flush=True)
            rows[method] = row | {"faults": sum(bool(r["fault"]) for r in row.values())}
    print(f"{time.monotonic() - started:.0f} s, {faults} faults")
    check.write(given.out, "step_check", probed, settings(), True, methods=rows)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
