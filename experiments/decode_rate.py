"""Tokens a second of decoding from a full cache and from cut ones, on an attached GPU.

    python -m experiments.decode_rate                    three points, some minutes
    python -m experiments.decode_rate --only 8k-b32 --out rates.json

Llama-3-8B in bfloat16 with random weights and a random cache: what a step costs depends
on sizes alone. Tokens are decoded by `jmem.generate.decode.extend`, all in one program,
by the attention that the GPU has. A step reads the weights and every row's cache, so
the roofline of a point is those bytes at the bandwidth of a copy, which is measured in
the same process.

Expect  2.3, 4 and 6 times the full cache's tokens a second with 1,024 tokens a layer
        (at 4.3 TB/s the roofline allows 2.6, 4.9 and 7.4 times).

Needs a GPU; without one it says so and exits 0. A cache that does not fit is a row that
says so. Exit status 1: a ratio below what is expected.

Seen    2.0, 3.4 and 4.6 times on an H200 (JAX 0.11.2). A step of the cut cache at 8K is
        4.4 ms of matrix products at 80 % of the copy bandwidth, 1.7 ms of attention at
        64 %, and 1 ms of 15 small kernels a layer.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

from experiments.harness import check
from jmem.generate.decode import extend
from jmem.kernels import _bench
from jmem.kvcache.cache import Cache
from jmem.kvcache.full import Full
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV
from jmem.memory.card import NoGPUError, described, gpu
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.targets import GiB

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(capacity=1024),
    "windowkv": WindowKV(capacity=1024),
}
STEPS = 64
"""Tokens decoded a row, in one program."""
REPEATS = 5
"""Timed runs of that program; the median counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A prompt's length, rows, and how many times faster the cut caches must be."""

    prompt: int
    batch: int
    expect: float


POINTS = {
    "8k-b32": Point(prompt=8192, batch=32, expect=2.3),
    "32k-b16": Point(prompt=32768, batch=16, expect=4.0),
    "128k-b6": Point(prompt=131072, batch=6, expect=6.0),
}


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


def settings() -> dict[str, Any]:
    """What a run has as its report's config."""
    points = {name: dataclasses.asdict(point) for name, point in POINTS.items()}
    return {"model": "llama3-8b", "steps": STEPS, "points": points}


def by_point(found: list[Rate]) -> dict[str, dict[str, Any]]:
    """Rates for the report, by point and policy."""
    points: dict[str, dict[str, Any]] = {one.point: {} for one in found}
    for one in found:
        points[one.point][one.policy] = dataclasses.asdict(one)
    return points


def build() -> Decoder:
    """Llama-3-8B for the attached GPU; its positions reach as far as the points do."""
    config = dataclasses.replace(zoo.get("llama3-8b"), max_positions=2**18)
    target = described(gpu().device_kind)
    return Decoder.on(target, config, dtype=jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="plan")
def filled(plan: PolicyPlan, key: jax.Array) -> Cache:
    """A cache of random keys and values that holds as much as a whole prompt leaves.

    Which tokens were selected is of no account to the time: here the first ones.
    """
    arrays = plan.arrays()
    chosen = jnp.concatenate([jnp.arange(size) for size in plan.selected])
    rows = [(array.shape, array.dtype) for array in arrays.values()]
    (slots, dtype), _, (units, _), (start, _) = rows
    first, second = jax.random.split(key)
    return Cache(
        jax.random.normal(first, slots, dtype),
        jax.random.normal(second, slots, dtype),
        jnp.broadcast_to(chosen.astype(jnp.int32), units),
        jnp.full(start, plan.prompt - plan.recent, jnp.int32),
    )


def rate(
    model: Decoder, params: dict, plan: PolicyPlan, repeats: int = REPEATS
) -> float:
    """Tokens a second of all rows together, `plan.new_tokens` a run; the median run."""
    key = jax.random.key(1)
    cache = filled(plan, key)
    logits = jnp.zeros((plan.batch_size, model.config.vocab_size), model.dtype)
    lengths = jnp.full((plan.batch_size,), plan.prompt, jnp.int32)
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        tokens, cache = extend(
            *(model, params, logits, lengths, cache, key),
            plan=plan,
            steps=plan.new_tokens,
        )
        tokens.block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return plan.batch_size * plan.new_tokens / statistics.median(seconds[1:])


def weight_bytes(params: Any) -> int:
    """Of the weights that a step reads whole: not a table of which it reads rows."""
    tied = "head" not in params
    leaves = jax.tree.leaves(params if tied else {**params, "embed": {}})
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def rates(
    model: Decoder, params: dict, name: str, point: Point, *, limit: int, steps: int
) -> Iterator[Rate]:
    """Every policy at one point; the full cache first, which the others are set by.

    `limit` are the bytes that the allocator can give.
    """
    weights, full = weight_bytes(params), None
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for policy, kind in POLICIES.items():
        plan = kind.plan(
            model,
            prompt=point.prompt,
            new_tokens=steps,
            batch_size=point.batch,
            target=described(jax.devices()[0].device_kind),
        )
        found = None
        if held + plan.bytes() + GiB <= limit:
            found = rate(model, params, plan)
        full = found if policy == "full" else full
        yield Rate(
            point=name,
            policy=policy,
            cache_bytes=plan.bytes(),
            read_bytes=weights + plan.bytes(),
            tokens_per_second=found,
            ratio=found / full if found and full else None,
        )


def line(found: Rate, point: Point, bandwidth: float) -> str:
    """A row of the table, with the share of the roofline that was reached."""
    sizes = f"{found.point:<10}{found.policy:<11}{found.cache_bytes / GiB:>9.2f}"
    if found.tokens_per_second is None:
        return f"{sizes}  does not fit"
    steps = found.tokens_per_second / point.batch
    share = found.read_bytes * steps / bandwidth
    row = f"{sizes}{found.tokens_per_second:>11,.0f}{1e3 / steps:>9.2f}{share:>9.0%}"
    return row + ("" if found.ratio is None else f"{found.ratio:>7.2f}")


def below(found: list[Rate]) -> list[str]:
    """What is slower than expected, in words."""
    return [
        f"{one.point}: {one.policy} is {one.ratio:.2f} times as fast as the full "
        f"cache, expected {POINTS[one.point].expect}"
        for one in found
        if one.ratio is not None
        and one.policy != "full"
        and one.ratio < POINTS[one.point].expect
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 when a ratio is below what is expected."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--out", type=pathlib.Path, default="runs/decode_rate.json")
    given = parser.parse_args(arguments)
    # Before JAX starts: the largest point takes more than the default fraction.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        device = gpu()
    except NoGPUError as error:
        print(f"decode_rate: {error}\nNothing was measured.")
        return 0
    bandwidth, limit = _bench.copy_bandwidth(), device.memory_stats()["bytes_limit"]
    probed = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__},
    }
    model = build()
    params = jax.jit(model.init)(jax.random.key(0))
    print(
        f"{device.device_kind}, jax {jax.__version__}, copies at "
        f"{bandwidth / 1e9:,.0f} GB/s, llama3-8b in bfloat16, {STEPS} tokens a row\n"
        f"{'point':<10}{'policy':<11}{'GiB':>9}{'tokens/s':>11}{'ms':>9}"
        f"{'roofline':>9}{'ratio':>7}"
    )
    found: list[Rate] = []
    for name in given.only:
        point = POINTS[name]
        for one in rates(model, params, name, point, limit=limit, steps=STEPS):
            found.append(one)
            print(line(one, point, bandwidth), flush=True)
            check.write(
                *(given.out, "decode_rate", probed, settings()),
                len(found) == len(given.only) * len(POLICIES),
                copy_bytes_per_second=bandwidth,
                rates=by_point(found),
            )
    slow = below(found)
    for words in slow:
        print(words)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
