"""Time to the first token, and tokens a second of decoding from a full cache and from
cut ones, on an attached GPU.

    python -m experiments.decode_rate                    three points, some minutes
    python -m experiments.decode_rate --only 8k-b32 --out rates.json

Llama-3-8B in bfloat16 with random weights, q, k, v and gate, up side by side, and a
random cache: what a step costs depends on sizes alone (`jmem.generate.rate`). Tokens
are decoded all in one program, by the attention that the GPU has. A step reads the
weights and every row's cache, so the roofline of a point is those bytes at the
bandwidth of a copy, which is measured in the same process: each point has one of its
own. The time to the first token is that of reading one prompt into the cache; a policy
pays there for what it chooses.

Expect  2.3, 4 and 6 times the full cache's tokens a second with 1,024 tokens a layer
        (at 4.3 TB/s the roofline allows 2.6, 4.9 and 7.4 times).

Needs a GPU; without one it says so and exits 0. A cache that does not fit is a row that
says so. Exit status 1: a ratio below what is expected.

Seen    2.0, 3.4 and 4.6 times on an H200 (JAX 0.11.2). A step of the cut cache at 8K is
        4.4 ms of matrix products at 80 % of the copy bandwidth, 1.7 ms of attention at
        64 %, and 1 ms of 15 small kernels a layer. That was with the attention kernel's
        earlier form; today's has not been timed.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.harness import check, cli, timed
from experiments.harness.timed import POINTS, Point
from jmem.generate.rate import count_weight_bytes, time_prompt, time_tokens
from jmem.kernels._bench import copy_bandwidth
from jmem.memory import protocol
from jmem.memory.card import find_described, find_gpu
from jmem.models.decoder import Decoder
from jmem.program import Program
from jmem.targets import GiB, Target

STEPS = 64
"""Tokens decoded a row, in one program."""
PROMPTS = 2
"""Timed prompts, after one that is not; the median counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(check.Flags):
    out: pathlib.Path = pathlib.Path("runs/decode_rate.json")
    """File of the report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """One policy at one point."""

    point: str
    policy: str
    cache_bytes: int
    read_bytes: int
    """Weights and cache, as one step reads them."""
    tokens_per_second: float | None
    """None: it does not fit."""
    ratio: float | None = None
    """To the full cache's tokens a second."""
    first_token_seconds: float | None = None
    """Of one prompt."""


def settings() -> dict[str, Any]:
    """What a run has as its report's config."""
    points = {name: dataclasses.asdict(point) for name, point in POINTS.items()}
    return {"model": timed.DECODED, "steps": STEPS, "points": points}


def programs(row: str, target: Target, config: Mapping) -> dict[str, Program]:
    """Of every policy at a point, one step of the tokens that are timed."""
    return timed.build_decoding(POINTS[row], config["steps"], target)


def time_rates(
    model: Decoder, params: dict, name: str, point: Point, *, limit: int, steps: int
) -> Iterator[Rate]:
    """Every policy at one point; the full cache first, which the others are set by.

    `limit` are the bytes that the allocator can give.
    """
    weights, full = count_weight_bytes(params), None
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    target = find_described(jax.devices()[0].device_kind)
    for policy, plan in timed.plan_caches(model, point, steps, target).items():
        found, first = None, None
        if held + plan.bytes() + GiB <= limit:
            found = time_tokens(model, params, plan)
            first = time_prompt(model, params, plan, repeats=PROMPTS)
        full = found if policy == "full" else full
        yield Rate(
            point=name,
            policy=policy,
            cache_bytes=plan.bytes(),
            read_bytes=weights + plan.bytes(),
            tokens_per_second=found,
            ratio=found / full if found and full else None,
            first_token_seconds=first,
        )


def measure_here(name: str) -> dict[str, Any]:
    """A point's rates by policy, and the bandwidth of a copy, in this process."""
    device = find_gpu()
    bandwidth, limit = copy_bandwidth(), device.memory_stats()["bytes_limit"]
    model = timed.build_reader(find_described(device.device_kind))
    params = jax.jit(timed.draw_reader(model))(jax.random.key(0))
    found = time_rates(model, params, name, POINTS[name], limit=limit, steps=STEPS)
    by_policy = {one.policy: dataclasses.asdict(one) for one in found}
    return by_policy | {"copy_bytes_per_second": bandwidth}


def measure(name: str) -> dict[str, Any]:
    """`measure_here`, in a process of its own that takes most of the GPU's memory."""
    with tempfile.TemporaryDirectory(prefix="jmem-decode-") as cache:
        environment = protocol.make_environment("run", cache)
        return protocol.call(measure_here, name, environment=environment)


# Telling ------------------------------------------------------------------------------


def read(row: Mapping[str, Any]) -> list[Rate]:
    """The rates of a point, as the report keeps them."""
    return [check.restore(Rate, row[name]) for name in timed.POLICIES if name in row]


def format_row(found: Rate, point: Point, bandwidth: float) -> str:
    """A row of the table: GiB, seconds to the first token, tokens a second,
    milliseconds a step, and the share of the roofline that was reached.
    """
    sizes = f"{found.point:<10}{found.policy:<11}{found.cache_bytes / GiB:>9.2f}"
    if found.tokens_per_second is None:
        return f"{sizes}  does not fit"
    if found.first_token_seconds is None:  # a report of before
        sizes += f"{'':>9}"
    else:
        sizes += f"{found.first_token_seconds:>9.2f}"
    steps = found.tokens_per_second / point.batch
    share = found.read_bytes * steps / bandwidth
    row = f"{sizes}{found.tokens_per_second:>11,.0f}{1e3 / steps:>9.2f}{share:>9.0%}"
    return row + ("" if found.ratio is None else f"{found.ratio:>7.2f}")


def find_slow(found: list[Rate]) -> list[str]:
    """A sentence for each cut cache that is slower than expected."""
    return [
        f"{one.point}: {one.policy} is {one.ratio:.2f} times as fast as the full "
        f"cache, expected {POINTS[one.point].expect}"
        for one in found
        if one.ratio is not None
        and one.policy != "full"
        and one.ratio < POINTS[one.point].expect
    ]


@check.needs_gpu
def main(command: Command) -> int:
    """Measure the points; exit status 1 when a ratio is below what is expected."""
    measuring = check.Check("decode_rate", command, settings(), POINTS)
    print(
        f"{timed.DECODED} in bfloat16, {STEPS} tokens a row\n"
        f"{'point':<10}{'policy':<11}{'GiB':>9}{'first s':>9}{'tokens/s':>11}{'ms':>9}"
        f"{'roofline':>9}{'ratio':>7}",
        flush=True,
    )

    def show(name: str, row: dict[str, Any]) -> str:
        bandwidth = row["copy_bytes_per_second"]
        lines = (format_row(one, POINTS[name], bandwidth) for one in read(row))
        return "\n".join([*lines, f"copies at {bandwidth / 1e9:,.0f} GB/s"])

    rows = measuring.measure("rates", measure, show)
    slow = find_slow([one for row in rows.values() for one in read(row)])
    print(*slow, sep="\n")
    return int(bool(slow or measuring.broken))


if __name__ == "__main__":
    cli.script(main, Command)
