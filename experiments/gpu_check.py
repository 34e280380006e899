"""What only a GPU can show: memory as predicted, kernels as fast, decoding as fast.

    python -m experiments.gpu_check            all five parts, about 25 minutes
    python -m experiments.gpu_check --parts memory --only decode --out check.json

Needs a GPU; without one it says so and exits 0. Exit status 1: something does not hold.

training  `experiments.step_check`: losses of every method's steps beside the CPU's
kernels   `jmem.kernels.windowed_attention.bench`: numbers, then share of the bandwidth
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

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Literal

from experiments.harness.check import write
from jmem.memory import protocol
from jmem.memory.card import NoGPUError, described
from jmem.memory.live import LiveReport
from jmem.program import Program
from jmem.targets import Target

GiB = 2**30
TOLERANCE = 0.03
"""Of the peak against the prediction."""
PLAN_TOLERANCE = 0.01
"""Of the peak above the plan."""
NEEDED = 0.75
"""Share of the programs that must hold without any further term."""
PARTS = ("training", "kernels", "rates", "steps", "memory")
"""In this order: the shortest first."""
SHAPES = (
    *("llama3-8b-32k-b1", "llama3-8b-32k-b1-w8", "llama3-8b-32k-b1-w32"),
    *("llama3-8b-8k-b32", "llama3-8b-128k-b6", "llama3-8b-128k-b6-w64"),
    *("qwen2.5-1.5b-32k-b1-w32", "phi3-mini-32k-b1-w64"),
)
"""Those of the kernel's bench that are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the programs are made of: 1 to 24 GiB each, so that 1 % means something."""

    model: str = "tinyllama-1.1b"
    gpt2: str = "gpt2-large"
    batch: int = 4
    seq_len: int = 1024
    accumulate: int = 4
    decode_batch: int = 32
    slots: int = 2048
    width: int = 8192
    """Of the two programs that are no transformers."""


# The programs, each built for a target; nothing is on any device ----------------------


def decoder(name: str, target: Target, remat: Literal["none", "block"] = "block"):
    """A model of the zoo as `target` runs it best."""
    from jmem.models import zoo
    from jmem.models.decoder import Decoder

    return Decoder.on(target, zoo.get(name), dtype="bfloat16", remat=remat)


def step(finetuner, model, sizes: Sizes) -> Program:
    """A donated training step."""
    from jmem.finetune.program import step_program

    return step_program(finetuner, model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def forward(sizes: Sizes, target: Target) -> Program:
    """The loss of a batch, and nothing kept of it."""
    from jmem.finetune.program import loss_program

    model = decoder(sizes.model, target)
    return loss_program(model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def full(sizes: Sizes, target: Target) -> Program:
    """A step of AdamW on all parameters; blocks are computed again going backward."""
    from jmem.finetune.full import Full

    return step(Full(), decoder(sizes.model, target), sizes)


def unremat(sizes: Sizes, target: Target) -> Program:
    """The same step, with all activations kept."""
    from jmem.finetune.full import Full

    return step(Full(), decoder(sizes.model, target, remat="none"), sizes)


def accumulated(sizes: Sizes, target: Target) -> Program:
    """The same step, its batch in parts one after another."""
    from jmem.finetune.full import Full

    finetuner = Full(accumulate=sizes.accumulate)
    return step(finetuner, decoder(sizes.model, target), sizes)


def lora(sizes: Sizes, target: Target) -> Program:
    """A step on low-rank adapters."""
    from jmem.finetune.lora import Lora

    return step(Lora(), decoder(sizes.model, target), sizes)


def lisa(sizes: Sizes, target: Target) -> Program:
    """A step of LISA with two active layers."""
    from jmem.finetune.lisa import Lisa

    return step(Lisa(active_layers=2), decoder(sizes.model, target), sizes)


def gpt2(sizes: Sizes, target: Target) -> Program:
    """A step of AdamW on GPT-2: LayerNorm, learned positions, a tied head."""
    from jmem.finetune.full import Full

    return step(Full(), decoder(sizes.gpt2, target), sizes)


def decode(sizes: Sizes, target: Target) -> Program:
    """One token for every row of a donated cache, which the layer scan carries."""
    from jmem.generate.programs import decode_program

    model = decoder(sizes.model, target)
    return decode_program(model, cache_plan(model, sizes))


def cache_plan(model, sizes: Sizes):
    """Of a plain cache."""
    from jmem.kvcache.full import Full

    return Full().plan(
        model, prompt=sizes.slots, new_tokens=0, batch_size=sizes.decode_batch
    )


def rebuilt(sizes: Sizes, target: Target) -> Program:
    """The same, but the cache is scanned over and stacked anew: the classic fault."""
    import jax
    import jax.numpy as jnp

    from jmem.kvcache.cache import decode_attend, empty
    from jmem.nn.linear import dense
    from jmem.nn.ops import Ops

    model = decoder(sizes.model, target)
    layers = model.config.layers
    single = dataclasses.replace(model.config, layers=1)
    plan = cache_plan(dataclasses.replace(model, config=single), sizes)
    ops = Ops(attend=decode_attend(plan, model.config.sliding_window), linear=dense)
    carried = decode(sizes, target)

    def make(key):
        assert carried.make is not None
        rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), empty(plan))
        return *carried.make(key)[:3], rows

    def step(params, tokens, positions, cache):
        positions = positions[:, None]

        def body(x, xs):
            layer_params, row = xs
            first = jnp.int32(0)
            done: Any = model.block(layer_params, x, positions, first, ops, row)
            x, row, _ = done
            return x, row

        x = model.embed(params, tokens[:, None], positions)
        x, cache = jax.lax.scan(body, x, (params["blocks"], cache))
        return model.head(params, x[:, 0], ops), cache

    args = jax.eval_shape(make, jax.random.key(0))
    return dataclasses.replace(carried, fn=step, args=args, make=make)


def offloaded(sizes: Sizes, target: Target) -> Program:
    """The step of AdamW, its moments in pinned host memory, updated layer by layer."""
    from jmem.finetune.full import Full

    return step(Full(moments="host"), decoder(sizes.model, target), sizes)


def nnx(sizes: Sizes, target: Target) -> Program:
    """A step of Adam on a flax NNX module and optimizer, float32."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    del target

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(sizes.width, 4 * sizes.width, rngs=rngs)
            self.down = nnx.Linear(4 * sizes.width, sizes.width, rngs=rngs)

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(x)))

    def make():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    graph, state = nnx.split(nnx.eval_shape(make))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss(model):
            return jnp.mean((model(batch) - batch) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    rows = sizes.batch * sizes.seq_len
    batch = jax.ShapeDtypeStruct((rows, sizes.width), jnp.float32)
    labels = {"weights": (0, "0"), "optimizer": (0, "1/opt_state"), "batch": (1, "")}
    return Program(step, (state, batch), donate=(0,), labels=labels)


def mosaic(sizes: Sizes, target: Target) -> Program:
    """A step of SGD whose products are JAX's own Mosaic GPU kernel for Hopper."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as hopper

    del target
    tiles = hopper.TuningConfig(
        tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=3
    )

    @jax.custom_vjp
    def product(a, b):
        return hopper.matmul(a, b, None, tiles)

    def product_forward(a, b):
        return product(a, b), (a, b)

    def product_backward(residuals, dy):
        a, b = residuals
        return product(dy, b.T), product(a.T, dy)

    product.defvjp(product_forward, product_backward)

    def step(params, x):
        def loss(params):
            y = product(jax.nn.relu(product(x, params["up"])), params["down"])
            return jnp.mean((y - x).astype(jnp.float32) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(
            lambda w, g: w - w.dtype.type(0.1) * g, params, gradients
        ), value

    def described(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {
        "up": described(sizes.width, 2 * sizes.width),
        "down": described(2 * sizes.width, sizes.width),
    }
    x = described(sizes.batch * sizes.seq_len, sizes.width)
    labels = {"weights": (0, ""), "batch": (1, "")}
    return Program(step, (params, x), donate=(0,), labels=labels)


CASES: dict[str, Callable[[Sizes, Target], Program]] = {
    case.__name__: case
    for case in (
        *(forward, unremat, full, accumulated, lora, lisa, gpt2),
        *(decode, rebuilt, offloaded, nnx, mosaic),
    )
}


def build(case: str, sizes: dict, gpu: str) -> Program:
    """The program of a case for the GPU called `gpu`."""
    from jmem.targets import resolve

    return CASES[case](Sizes(**sizes), resolve(gpu))


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(Sizes())


def plain(report: LiveReport) -> dict[str, Any]:
    """For the report: all of it, and how far the peak is off, in percent."""
    return dataclasses.asdict(report) | {"off_percent": 100 * abs(report.off())}


# The table ----------------------------------------------------------------------------


def faults(report: LiveReport) -> list[str]:
    """What of a program does not hold, in words; nothing when all does."""
    plan, peak = report.planned_bytes, report.peak_bytes
    found = []
    if not report.own:
        found.append("peak not the run's own")
    elif not plan - report.fragmentation <= peak <= plan * (1 + PLAN_TOLERANCE):
        found.append(f"peak {peak / plan - 1:+.1%} of the plan")
    if abs(report.off(named=True)) > TOLERANCE:
        found.append(f"peak {report.off(named=True):+.1%} of the prediction")
    return found


def table(reports: dict[str, LiveReport]) -> str:
    """The programs side by side, in GiB; the peak against the prediction in percent."""
    head = f"{'GiB':<12}{'ahead of time':>19}{'planned':>10}{'peak':>10}"
    lines = [f"{head}{'off':>8}{'named':>8}  verdict", "─" * 88]
    for case, report in reports.items():
        low, high = (end / GiB for end in report.interval)
        plan, peak = report.planned_bytes / GiB, report.peak_bytes / GiB
        sizes = f"{f'{low:.3f} - {high:.3f}':>19}{plan:>10.3f}{peak:>10.3f}"
        off = f"{report.off():>+8.1%}{report.off(named=True):>+8.1%}"
        verdict = ", ".join(faults(report)) or "holds"
        lines.append(f"{case:<12}{sizes}{off}  {verdict}")
    plain, named = within(reports), within(reports, named=True)
    words = f"{plain} of {len(reports)} as they are, {named} less the named terms"
    return "\n".join([*lines, "", f"within {TOLERANCE:.0%} of the prediction: {words}"])


def within(reports: dict[str, LiveReport], *, named: bool = False) -> int:
    """How many peaks are within the tolerance of their prediction."""
    return sum(abs(r.off(named=named)) <= TOLERANCE for r in reports.values())


def holds(reports: dict[str, LiveReport]) -> bool:
    """Whether no program has a fault, and enough of them needed no further term."""
    enough = within(reports) >= NEEDED * len(reports)
    return enough and not any(map(faults, reports.values()))


def check(
    sizes: Sizes,
    only: list[str],
    gpu: str | None,
    out: pathlib.Path,
    lanes: int = 1,
) -> int:
    """Measures the programs, `lanes` at a time; prints the table, writes the records.

    Programs that run beside each other share the GPU's memory alike. Peaks are those of
    each one's own allocator, so they do not change.
    """
    try:
        found = protocol.probe()
    except NoGPUError as error:
        print(f"gpu_check: {error}\nNothing was measured.")
        return 0
    known = described(found["device"])
    gpu = gpu or (known.name if known else None)
    if gpu is None:
        print(f"gpu_check: {found['device']!r} is not described; name one by --gpu.")
        return 2
    print(f"{found['device']} as {gpu}, jax {found['versions']['jax']}", flush=True)
    reports: dict[str, LiveReport] = {}
    given = dataclasses.asdict(sizes)
    broken: list[str] = []

    def confirm(case: str) -> tuple[LiveReport, float]:
        start, share = time.monotonic(), 1 / lanes
        report = protocol.confirm(build, case, given, gpu, target=gpu, share=share)
        return report, time.monotonic() - start

    with futures.ThreadPoolExecutor(lanes) as beside:
        running = {beside.submit(confirm, case): case for case in only or CASES}
        for done in futures.as_completed(running):
            case = running[done]
            try:
                reports[case], seconds = done.result()
            except protocol.StageError as error:
                broken.append(case)
                print(f"{case}: {error}", flush=True)
                continue
            print(f"{case}: {seconds:.0f} s", flush=True)
            rows = {name: plain(report) for name, report in reports.items()}
            complete = len(rows) == len(running)
            write(out, "gpu_check", found, given, complete, cases=rows)
    print("", *(f"{report}\n" for report in reports.values()), sep="\n")
    print(table(reports))
    print(f"\nrecords: {out}")
    return int(bool(broken) or not holds(reports))


def other(part: str, out: pathlib.Path) -> int:
    """The exit status of a part that is a program of its own, beside `out`."""
    try:
        protocol.probe()
    except NoGPUError as error:
        print(f"gpu_check: {error}\nNothing was measured.")
        return 0
    module, more = {
        "kernels": ("jmem.kernels.windowed_attention.bench", ["--only", *SHAPES]),
        "rates": ("experiments.decode_rate", []),
        "steps": ("experiments.step_rate", []),
        "training": ("experiments.step_check", []),
    }[part]
    records = out.with_name(f"{out.stem}-{part}.json")
    command = [sys.executable, "-m", module, *more, "--out", str(records)]
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 when a number is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=[])
    parser.add_argument("--gpu", help="described GPU to predict for; default: by name")
    parser.add_argument("--out", type=pathlib.Path, default="runs/gpu_check.json")
    parser.add_argument(
        "--lanes", type=int, default=1, help="programs measured beside each other"
    )
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    given = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(Sizes)]
    sizes = Sizes(**{name: getattr(given, name) for name in names})
    out = pathlib.Path(given.out)
    status = 0
    for part in given.parts:
        if part == "memory":
            status = max(status, check(sizes, given.only, given.gpu, out, given.lanes))
        else:
            status = max(status, other(part, out))
    return status


if __name__ == "__main__":
    sys.exit(main())
