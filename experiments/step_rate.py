"""Time and memory of a training step on an attached GPU: full, LoRA, LISA, LOMO.

    python -m experiments.step_rate                     six methods at 7B, some minutes
    python -m experiments.step_rate --only lora lisa --trace profile

LLaMA-2-7B in bfloat16 with random weights, 1 sequence of 1,024 tokens, blocks computed
again going backward, float32 moments, nothing clipped: the programs whose memory the
claims of LISA are about. Each runs in a process of its own, so that the allocator's
peak is its own:

    predicted   the interval `jmem.measure` gives without the GPU
    peak        the most JAX's allocator held while the program ran once
    ms          of a step, wall clock, the median of the runs after it

Expect  a step of fused LISA takes at most 1.05 times LoRA's of rank 128, and at most
        0.8 times full fine-tuning's; every peak is within 3 % of its prediction.

Needs a GPU; without one it says so and exits 0. Exit status 1: an expectation is not
met.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from concurrent import futures
from typing import Any

from experiments.harness import check
from jmem.memory import protocol, worker
from jmem.memory.card import NoGPUError, described
from jmem.memory.live import apart
from jmem.memory.report import MemoryReport
from jmem.program import Program
from jmem.targets import GiB, resolve

RUNS = 12
"""Timed steps; the median counts."""
WARM_UP = 3
TOLERANCE = 0.03
"""Of a peak against its prediction."""
EXPECT = {"lora": 1.05, "full": 0.8}
"""How long a step of fused LISA may take, in steps of another method."""
PREDICTING = 4
"""Predictions made beside each other, on the CPU, while the GPU runs."""
METHODS = ("lora", "lisa", "lisa-separate", "lisa-bf16", "lomo", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and its batch."""

    model: str = "llama2-7b"
    batch_size: int = 1
    seq_len: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One method's step on the GPU."""

    method: str
    predicted: tuple[int, ...]
    """Bytes, without and with Triton matmuls, the smaller first."""
    planned_bytes: int
    peak_bytes: int
    own: bool
    """Whether the peak is the run's; if not, it is only known to be below."""
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def off(self) -> float:
        """The peak's distance from the predicted interval, as a share of it."""
        return apart(self.peak_bytes, self.predicted)

    def plain(self) -> dict[str, Any]:
        """For the report: all of it, the median in milliseconds too."""
        return dataclasses.asdict(self) | {"ms": self.median * 1e3}


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(Sizes())


def finetuner(method: str) -> Any:
    """The method as it is timed."""
    from jmem.finetune.adamw import AdamW
    from jmem.finetune.full import Full
    from jmem.finetune.lisa import Lisa
    from jmem.finetune.lomo import Lomo
    from jmem.finetune.lora import Lora

    adamw = AdamW(max_grad_norm=0.0)
    half = dataclasses.replace(adamw, moment_dtype="bfloat16")
    return {
        "lora": Lora(rank=128, adamw=adamw),
        "lisa": Lisa(active_layers=2, adamw=adamw),
        "lisa-separate": Lisa(active_layers=2, adamw=adamw, update="separate"),
        "lisa-bf16": Lisa(active_layers=2, adamw=half),
        "lomo": Lomo(),
        "full": Full(adamw=adamw),
    }[method]


def build(method: str, sizes: dict, gpu: str) -> Program:
    """The step of a method for the GPU called `gpu`."""
    from jmem.finetune.program import step_program
    from jmem.models import zoo
    from jmem.models.decoder import Decoder

    given = Sizes(**sizes)
    model = Decoder.on(
        resolve(gpu), zoo.get(given.model), dtype="bfloat16", remat="block"
    )
    return step_program(
        finetuner(method), model, batch_size=given.batch_size, seq_len=given.seq_len
    )


def repeated(program: Program, runs: int, trace: str = "") -> list[float]:
    """Seconds of each of `runs` steps, one after another on one state.

    `trace` is the folder of a profile of two more.
    """
    import jax

    from jmem.memory.live import made

    compiled = program.compile()
    state, batch = made(program, 0)
    seconds = []
    for _ in range(WARM_UP + runs):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - begin)
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(2):
                state, _ = jax.block_until_ready(compiled(state, batch))
    return seconds[WARM_UP:]


def here(method: str, sizes: dict, gpu: str, trace: str) -> str:
    """One method's run and times in this process, which must have done nothing else."""
    from jmem.memory.live import live

    program = build(method, sizes, gpu)
    report = live(program, key=None, predict=False)
    seconds = repeated(program, RUNS, trace)
    return json.dumps({"live": dataclasses.asdict(report), "seconds": seconds})


def run(method: str, sizes: dict, gpu: str, trace: str) -> dict:
    """What `here` tells, from a process of its own.

    Raises:
      StageError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="jmem-step-") as cache:
        answer = protocol.ask(
            *("experiments.step_rate", "--here"),
            request=[method, sizes, gpu, trace],
            environment=protocol.environment("run", cache),
            what=f"the step of {method!r}",
        )
    return json.loads(answer)


def step(method: str, ran: dict, ahead: MemoryReport) -> Step:
    """A run beside its prediction."""
    live = ran["live"]
    return Step(
        method=method,
        predicted=ahead.interval,
        planned_bytes=live["planned_bytes"],
        peak_bytes=live["peak_bytes"],
        own=live["peak_bytes"] > live["earlier_peak_bytes"],
        seconds=tuple(ran["seconds"]),
    )


def line(found: Step, sizes: Sizes) -> str:
    """A row of the table."""
    low, high = (end / GiB for end in found.predicted)
    tokens = sizes.batch_size * sizes.seq_len / found.median
    return (
        f"{found.method:<15}{f'{low:.2f} - {high:.2f}':>16}"
        f"{found.planned_bytes / GiB:>9.2f}{found.peak_bytes / GiB:>8.2f}"
        f"{found.off:>+7.1%}{found.median * 1e3:>9.1f}"
        f"{min(found.seconds) * 1e3:>8.1f}{max(found.seconds) * 1e3:>8.1f}"
        f"{tokens:>9,.0f}"
    )


def unmet(found: dict[str, Step]) -> list[str]:
    """What is not as expected, in words."""
    words = []
    for one in found.values():
        if not one.own:
            words.append(f"{one.method}: the peak is not the run's own")
        elif abs(one.off) > TOLERANCE:
            words.append(f"{one.method}: peak {one.off:+.1%} of the prediction")
    for other, most in EXPECT.items():
        if "lisa" in found and other in found:
            ratio = found["lisa"].median / found[other].median
            if ratio > most:
                words.append(
                    f"a step of lisa takes {ratio:.2f} times {other}'s, expected at "
                    f"most {most}"
                )
    return words


def _why(prediction: futures.Future[str]) -> str:
    """In short, why there is no row: the card is too small, or something else."""
    if prediction.exception() is None:
        ahead = MemoryReport.from_json(prediction.result())
        if not ahead.fits(0):
            return f"does not fit: {ahead.interval[0] / GiB:.2f} GiB are predicted"
    return "failed, see below"


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 when an expectation is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=pathlib.Path, default="runs/step_rate.json")
    parser.add_argument("--trace", default="", help="folder for a profile of each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    given = parser.parse_args(arguments)
    if given.here:
        print(here(*json.load(sys.stdin)))
        return 0
    try:
        probed = protocol.probe()
    except NoGPUError as error:
        print(f"step_rate: {error}\nNothing was measured.")
        return 0
    known = described(probed["device"])
    if known is None:
        print(f"step_rate: {probed['device']!r} is not described; nothing to predict.")
        return 2
    sizes = Sizes(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Sizes)})
    plain = dataclasses.asdict(sizes)
    print(
        f"{probed['device']}, jax {probed['versions']['jax']}, {sizes.model} in "
        f"bfloat16, {sizes.batch_size} x {sizes.seq_len} tokens; GiB and milliseconds\n"
        f"{'method':<15}{'predicted':>16}{'planned':>9}{'peak':>8}{'off':>7}"
        f"{'ms':>9}{'least':>8}{'most':>8}{'tokens/s':>9}",
        flush=True,
    )
    builder = worker.dotted(build)

    def predict(method: str) -> str:
        request = {"builder": builder, "arguments": [method, plain, known.name]}
        return protocol.run_stage("predict", request, known.name)

    found: dict[str, Step] = {}
    words: list[str] = []
    with futures.ThreadPoolExecutor(PREDICTING) as beside:
        predictions = {method: beside.submit(predict, method) for method in given.only}
        for method in given.only:
            trace = given.trace and str(pathlib.Path(given.trace, method).absolute())
            try:
                ran = run(method, plain, known.name, trace)
                ahead = MemoryReport.from_json(predictions[method].result())
            except protocol.StageError as error:
                words.append(f"{method}: {error}")
                print(f"{method:<15}  {_why(predictions[method])}", flush=True)
                continue
            found[method] = step(method, ran, ahead)
            print(line(found[method], sizes), flush=True)
            complete = len(found) == len(given.only)
            rows = {name: one.plain() for name, one in found.items()}
            check.write(given.out, "step_rate", probed, plain, complete, steps=rows)
    words += unmet(found)
    print(*words, sep="\n")
    return int(bool(words))


if __name__ == "__main__":
    sys.exit(main())
