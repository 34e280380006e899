"""Ours beside torch's, transformers', PEFT's and kvpress' on one GPU, in one run.

    python -m experiments.peers                     fourteen contenders, some minutes
    python -m experiments.peers --only lora-jmem lora-peft
    python -m experiments.peers --model tinyllama-1.1b --decoder smollm2-1.7b --rows 2

Random weights in bfloat16, each contender in a process of its own:

    lora       a step of LoRA, rank 128, LLaMA-2-7B, 1 x 1,024 tokens: jmem's, fused;
               PEFT's, whose adapters are float32, eager and by torch.compile
    full       a step of AdamW on all of it, moments in bfloat16, as torch's are
    decode     a token of 32 rows of Llama-3-8B after 8,192 tokens: from jmem's full
               cache, from transformers' static one, eager and compiled
    snapkv     the same from 1,024 tokens a layer: jmem's SnapKV and kvpress'
    attention  one layer's attention of that token: jmem's kernel; torch's choice; cuDNN

Blocks are computed again going backward, on both sides. `ms` is the median of a step, a
token or a call, `peak` the most that the side's own allocator gave to arrays while it
ran, `card` what the driver counts as used then (JAX takes most of a card at once, so
its own is not told). A row's ratios are jmem's to it: below 1, jmem takes less.

Expect  lora at most 0.8 of PEFT's time and half its peak; of the others no more than
        any peer's time and peak.

Needs a GPU, torch and transformers with PEFT (written against torch 2.15, transformers
5.24, PEFT 0.21, kvpress 0.5.5 with transformers below 5.3); without them it says so and
exits 0. Rows whose package is missing are left out. Exit status 1: an expectation is
not met. Nothing here has run on a card yet.
"""

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.harness import check, cli, timed, torch_peers
from experiments.harness.settings import need
from jmem.finetune.full import Full
from jmem.finetune.program import step_program
from jmem.finetune.samples import build_decoder
from jmem.generate.programs import decode_program
from jmem.generate.rate import time_tokens
from jmem.kernels.windowed_attention import bench
from jmem.kernels.windowed_attention.shapes import Shape
from jmem.memory import protocol
from jmem.memory.card import find_described, find_gpu
from jmem.models import zoo
from jmem.program import Program
from jmem.targets import GiB, Target

RANK = 128
RUNS = 12
"""Timed steps; the median counts."""
STEPS = 64
"""Timed tokens."""
CAPACITY = 1024
"""Tokens a layer that SnapKV keeps."""
NEEDED = ("torch", "transformers", "peft")
ROWS = (
    *("lora-jmem", "lora-peft", "lora-peft-compiled"),
    *("full-jmem", "full-hf", "full-hf-compiled"),
    *("decode-jmem", "decode-hf", "decode-hf-compiled"),
    *("snapkv-jmem", "snapkv-kvpress"),
    *("attention-jmem", "attention-sdpa", "attention-cudnn"),
)
"""What is compared, by whom, and how; each part has one row of jmem's."""
EXPECT: Mapping[str, tuple[float, float]] = {"lora": (0.8, 0.5)}
"""Most of a peer's time and peak that jmem's may take; (1, 1) of other parts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerSizes(timed.StepSizes):
    """Of the training step, and of the token that is decoded."""

    decoder: str = timed.DECODED
    """A name in jmem.models.zoo: the model that decodes."""
    rows: int = 32
    """Sequences that are decoded together."""
    prompt: int = 8192
    """Tokens of each before."""

    def __post_init__(self):
        need(self, "batch_size", "seq_len", "rows", "prompt", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(PeerSizes, check.Flags):
    out: pathlib.Path = pathlib.Path("runs/peers.json")
    """File of the report."""


def settings() -> dict[str, Any]:
    """What a run by the defaults has as its report's config."""
    return dataclasses.asdict(PeerSizes())


# Programs and measuring ---------------------------------------------------------------


def programs(row: str, target: Target | None, config: Mapping) -> dict[str, Program]:
    """The one program of a row of jmem's that XLA compiles as a whole; else none."""
    part, _, by = row.partition("-")
    if by != "jmem" or part == "attention":
        return {}
    if part in ("decode", "snapkv"):
        model, plan = plan_cache(part, target, config)
        params = jax.eval_shape(timed.draw_reader(model), jax.random.key(0))
        return {row: decode_program(model, plan, params=params)}
    sizes = {name: config[name] for name in ("batch_size", "seq_len")}
    assert target is not None
    if part == "lora":
        own = timed.StepSizes(model=config["model"], **sizes)
        return {row: timed.build_step(part, own, target)}
    adamw = dataclasses.replace(timed.UNCLIPPED, moment_dtype="bfloat16")
    model = build_decoder(config["model"], target)
    return {row: step_program(Full(adamw=adamw), model, **sizes)}


def plan_cache(part: str, target: Target | None, config: Mapping) -> tuple[Any, Any]:
    """The model that decodes, and the plan of a part's cache."""
    model = timed.build_reader(target, config["decoder"])
    policy = timed.POLICIES["full" if part == "decode" else part]
    size: Any = {"prompt": config["prompt"], "batch_size": config["rows"]}
    return model, policy.plan(model, **size, new_tokens=STEPS, target=target)


def time_decoding(part: str, config: Mapping) -> dict[str, Any]:
    """Milliseconds of a token of all rows, and the cache's bytes, in this process."""
    model, plan = plan_cache(part, find_described(find_gpu().device_kind), config)
    params = jax.jit(timed.draw_reader(model))(jax.random.key(0))
    tokens = time_tokens(model, params, plan)
    return {"ms": 1e3 * config["rows"] / tokens, "cache_bytes": plan.bytes()}


def make_shape(config: Mapping) -> Shape:
    """One layer's attention of the token that is decoded."""
    own = zoo.get(config["decoder"])
    heads = {name: getattr(own, name) for name in ("heads", "kv_heads", "head_dim")}
    return Shape(batch=config["rows"], tokens=config["prompt"], **heads)


def time_attention(config: Mapping) -> dict[str, Any]:
    """Milliseconds of a call of the kernel, of XLA's and of JAX's cuDNN, here."""
    device, shape = find_gpu().device_kind, make_shape(config)
    found, _ = bench.measure(shape, device, tune=False)
    by_name = {f"{name}_ms": own.ms.median for name, own in found.items()}
    ours = {"ms": by_name.pop("mosaic_gpu_ms"), "cache_bytes": shape.read_bytes}
    return ours | by_name


def call_with_gpu(function: Callable, *arguments: Any) -> dict[str, Any]:
    """A function's result, of a process that takes most of the GPU's memory."""
    with tempfile.TemporaryDirectory(prefix="jmem-peers-") as cache:
        environment = protocol.make_environment("run", cache)
        return protocol.call(function, *arguments, environment=environment)


def measure(measuring: check.Check, row: str) -> dict[str, Any]:
    """A row's numbers, from processes of its own."""
    part, _, by = row.partition("-")
    if by != "jmem":
        regions = bench.regions(make_shape(measuring.config))
        more = {"runs": RUNS, "steps": STEPS, "rank": RANK, "capacity": CAPACITY}
        config = {**measuring.config, **more, "regions": regions}
        without_jax = protocol.make_environment("predict", "")
        return protocol.call(torch_peers.measure, row, config, environment=without_jax)
    if part == "attention":
        return call_with_gpu(time_attention, measuring.config)
    if part in ("decode", "snapkv"):
        found = call_with_gpu(time_decoding, part, measuring.config)
        return found | {"peak_bytes": measuring.confirm(row)["peak_bytes"]}
    found = measuring.confirm(row, runs=RUNS)
    ms = 1e3 * statistics.median(found["seconds"])
    return {"ms": ms, "peak_bytes": found["peak_bytes"]}


# Telling ------------------------------------------------------------------------------


def compute_ratios(rows: Mapping[str, Mapping], row: str) -> dict[str, float]:
    """How many of a row's `ms` and `peak_bytes` jmem's are, where both are there."""
    ours = rows.get(f"{row.partition('-')[0]}-jmem", {})
    names = ("ms", "peak_bytes")
    found = rows[row]
    return {n: ours[n] / found[n] for n in names if n in ours and n in found}


HEAD = (
    f"{'':<20}{'ms':>10}{'peak GiB':>10}{'card GiB':>10}{'cache GiB':>11}"
    f"{'jmem, ms':>10}{'peak':>7}"
)


def format_row(row: str, found: Mapping, ratios: Mapping[str, float]) -> str:
    """A row of the table; what was not measured, or is jmem's own, stays empty."""

    def size(name: str) -> str:
        return f"{found[name] / GiB:.2f}" if name in found else ""

    def ratio(name: str) -> str:
        return f"{ratios[name]:.2f}" if name in ratios and "jmem" not in row else ""

    return (
        f"{row:<20}{found['ms']:>10.3f}{size('peak_bytes'):>10}{size('card_bytes'):>10}"
        f"{size('cache_bytes'):>11}{ratio('ms'):>10}{ratio('peak_bytes'):>7}"
    ).rstrip()


def find_unmet(rows: Mapping[str, Mapping]) -> list[str]:
    """A sentence for each expectation that is not met."""
    words = []
    for row in rows:
        part, _, by = row.partition("-")
        time, peak = EXPECT.get(part, (1.0, 1.0))
        for name, found in compute_ratios(rows, row).items():
            most = time if name == "ms" else peak
            if by != "jmem" and found > most:
                words.append(
                    f"{part}: jmem's {name} is {found:.2f} of {row}'s, expected at "
                    f"most {most}"
                )
    return words


@check.needs_gpu
def main(command: Command) -> int:
    """Measure the contenders; exit status 1 when an expectation is not met."""
    if missing := torch_peers.find_missing(NEEDED):
        print(f"peers: not installed: {', '.join(missing)}.\nNothing was measured.")
        return 0
    sizes = {name: getattr(command, name) for name in settings()}
    without = ("snapkv-kvpress",) if torch_peers.find_missing(["kvpress"]) else ()
    every = [row for row in ROWS if row not in without]
    print(*(f"{row}: left out, kvpress is not installed" for row in without), sep="\n")
    measuring = check.Check("peers", command, sizes, every)
    print(HEAD, flush=True)
    seen: dict[str, Mapping] = {}

    def show(row: str, found: dict[str, Any]) -> str:
        seen[row] = found
        return format_row(row, found, compute_ratios(seen, row))

    rows = measuring.measure("rows", lambda row: measure(measuring, row), show)
    words = find_unmet(rows)
    print(*words, sep="\n")
    return int(bool(words or measuring.broken))


if __name__ == "__main__":
    cli.script(main, Command)
