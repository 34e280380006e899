"""Live: what the allocator of an attached GPU really held while a program ran.

    report = jmem.live(train_step, params, opt_state, batch, donate=(0, 1))
    print(report)         # prediction, plan and peak, and what lies between them

The allocator counts the most bytes it ever held and cannot be reset, and autotuning
raises that count. So the number is a program's own only in a process that has held no
more before and finds the program compiled: `jmem.memory.confirm` starts such ones.

Peak and plan differ by terms that are each measured by themselves, from the allocator's
count at four moments and from the sizes of the very arrays:

    start      JAX is up and has run one trivial program
    loaded     the program is compiled, or loaded from JAX's cache
    base       its arguments are made
    end        it has run once, and its results are held

What no term explains is a term too; nothing is fitted.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jmem.lowering import never_cached
from jmem.memory import kinds
from jmem.memory.card import find_described, find_gpu
from jmem.memory.escape import escape_all
from jmem.memory.measure import ATTACHED, as_program, compile_and_dump, measure
from jmem.memory.report import MemoryReport, Saved, format_size
from jmem.program import HOST, Program

ALIGNMENT = 256
"""Bytes that JAX's GPU allocator rounds every request up to a multiple of."""

START = "in use before the program"
"""What JAX itself and other arrays of this process hold before it begins."""
ARGUMENTS = "arguments beyond the plan"
"""What making them left in use, less their planned and rounded bytes."""
ROUNDING = "rounding to 256 bytes"
"""What every argument, new result and the temporary block is rounded up by."""
LOADED = "constants and code beyond the plan"
"""What loading and the first run left in use, less the planned constants."""
UNEXPLAINED = "unexplained"
"""The rest, held only while the program ran."""
TERMS = (START, ARGUMENTS, ROUNDING, LOADED, UNEXPLAINED)
"""The terms that make up peak - plan."""

OTHER_PLAN = "another plan"
"""A term of plan - prediction: the GPU's plan was made twice, with other bytes."""
WARM_UP = 3
"""Runs that `time_runs` does not count."""


@dataclasses.dataclass(frozen=True)
class LiveReport(Saved):
    """One run of a program on a GPU, its plan there, and its prediction without it."""

    schema: ClassVar[int] = 1
    name: str
    device: str
    versions: dict[str, str]
    peak_bytes: int
    """The most bytes in use, up to the end of the run."""
    earlier_peak_bytes: int
    """The most in use before the run; compiling and autotuning count."""
    limit_bytes: int
    planned_bytes: int
    """XLA's `total_allocation_bytes` of the program that ran."""
    terms: dict[str, int]
    """`TERMS`, in bytes; they sum to `peak_bytes` - `planned_bytes`."""
    target: str | None = None
    """The described GPU of the prediction; None where none was made."""
    interval: tuple[int, ...] = ()
    """Predicted bytes without and with Triton matmuls, the smaller first."""
    plan_terms: dict[str, int] = dataclasses.field(default_factory=dict)
    """By kind, what the GPU's plan holds more than the prediction."""
    fragmentation: int = 0
    """Bytes of the plan that are holes: the peak may need less than the plan."""
    seconds: tuple[float, ...] = ()
    """Of further runs, if there were any (`time_runs`)."""

    @property
    def own(self) -> bool:
        """Whether the peak is the run's; if not, it is only known to be below."""
        return self.peak_bytes > self.earlier_peak_bytes

    @property
    def named_bytes(self) -> int:
        """Bytes of peak - prediction whose cause is known and is no wrong buffer.

        That is every term of the run but what is unexplained, and the workspaces and
        the fragmentation that the autotuner's choices brought into the plan.
        """
        run = sum(held for term, held in self.terms.items() if term != UNEXPLAINED)
        libraries = (kinds.WORKSPACE, kinds.FRAGMENTATION)
        return run + sum(self.plan_terms.get(kind, 0) for kind in libraries)

    def compute_error(self, *, named: bool = False) -> float:
        """The peak's distance from the predicted interval, as a share of it.

        0 inside of it. With `named`, `named_bytes` are taken from the peak first.

        Raises:
          ValueError: no prediction was made.
        """
        if not self.interval:
            raise ValueError(f"{self.name}: no prediction was made; see `compared`.")
        peak = self.peak_bytes - (self.named_bytes if named else 0)
        low, high = self.interval
        return peak / min(max(peak, low), high) - 1

    def add_prediction(self, ahead: MemoryReport, plan: MemoryReport) -> "LiveReport":
        """The report with its prediction, and with the plan that the GPU was given.

        Args:
          ahead: measured for the described GPU.
          plan: measured for the attached one.
        """
        more = {
            kind: plan.by_kind.get(kind, 0) - ahead.by_kind.get(kind, 0)
            for kind in kinds.KINDS
        }
        more[OTHER_PLAN] = self.planned_bytes - plan.device_bytes
        return dataclasses.replace(
            self,
            target=ahead.target,
            interval=ahead.interval,
            plan_terms={term: held for term, held in more.items() if held},
            fragmentation=plan.fragmentation,
        )

    def __str__(self):
        self = escape_all(self)
        unit = 2**30 if self.peak_bytes >= 2**30 else 2**20
        word = "GiB" if unit == 2**30 else "MiB"
        rows = []
        if self.interval:
            low, high = (f"{end / unit:,.3f}" for end in self.interval)
            both = low if low == high else f"{low} - {high}"
            rows.append(("ahead of time", both, f"for {self.target}, without a GPU"))
        rows += [
            ("planned", f"{self.planned_bytes / unit:,.3f}", "by XLA for this GPU"),
            ("peak", f"{self.peak_bytes / unit:,.3f}", "of JAX's allocator, one run"),
        ]
        lines = [
            f"{self.name} on {self.device}, jax {self.versions['jax']}",
            "",
            *(f"{name:<16}{size:>24} {word}   {how}" for name, size, how in rows),
        ]
        if not self.own:
            lines.append(
                f"The peak is not the run's own: "
                f"{format_size(self.earlier_peak_bytes)} were in use before it."
            )
        lines += _format_terms("peak - planned", self.terms)
        if self.interval:
            lines += _format_terms("planned - ahead of time", self.plan_terms)
        return "\n".join(lines)


def live(
    what: Program | Callable,
    *args: Any,
    donate: int | Sequence[int] = (),
    static: int | Sequence[int] = (),
    key: int | None = 0,
    predict: bool = True,
    sums: Mapping[str, int] | None = None,
) -> LiveReport:
    """Runs a program once on the attached GPU and reads its allocator.

    Args:
      what: a `Program`, or any function with its arguments, as `jmem.measure` takes it.
      *args: the function's arguments; descriptions will do.
      donate: positions of arguments the function may take over.
      static: positions of hashable arguments that are compiled in.
      key: seed of the program's own `make`. None, or a program without one: zeros of
        the described shapes, which take no more memory to make than they have.
      predict: also measure the program without the GPU, if the GPU is a described one,
        and its plan with it: three more compilations, after the run.
      sums: XLA's plan, as `read_sums` tells it, of a program that JAX's cache holds. By
        default one that came out of that cache, and lost its plan there, is planned
        once more after the run.

    Raises:
      NoGPUError: there is no GPU.
    """
    program = as_program(what, args, donate=donate, static=static)
    device = find_gpu()
    # What JAX takes at the first run of anything is not the program's.
    jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
    gc.collect()
    start = device.memory_stats()
    compiled = program.compile()
    loaded = device.memory_stats()
    arguments = jax.block_until_ready(make_arguments(program, key))
    gc.collect()
    base = device.memory_stats()
    taken = list(_list_buffers(arguments))
    results = jax.block_until_ready(compiled(*arguments))
    end = device.memory_stats()
    moments = [now["bytes_in_use"] for now in (start, loaded, base, end)]
    returned = {place: size for _, place, size in _list_buffers(results)}
    before = {place: size for _, place, size in taken}
    freed = {
        place: size
        for array, place, size in taken
        if array.is_deleted() and place not in returned
    }
    fresh = {place: size for place, size in returned.items() if place not in before}
    sums = sums or read_sums(compiled)
    if not sums["total_allocation_bytes"]:
        with never_cached():
            sums = read_sums(compile_and_dump(program.lower(), {})[1])
    report = LiveReport(
        name=program.name,
        device=device.device_kind,
        versions={"jax": jax.__version__, "jaxlib": jaxlib.version.__version__},
        peak_bytes=end["peak_bytes_in_use"],
        earlier_peak_bytes=base["peak_bytes_in_use"],
        limit_bytes=end["bytes_limit"],
        planned_bytes=sums["total_allocation_bytes"],
        terms=compute_terms(
            sums,
            moments,
            end["peak_bytes_in_use"],
            arguments=list(before.values()),
            results=list(fresh.values()),
            freed=list(freed.values()),
        ),
    )
    known = find_described(device.device_kind) if predict else None
    if known is None:
        return report
    del arguments, results, taken
    plan = measure(program, target=ATTACHED)
    target = known.name if plan.devices == 1 else f"{known.name}x{plan.devices}"
    return report.add_prediction(measure(program, target=target, cache=False), plan)


def time_runs(
    program: Program, runs: int, trace: str | None = None
) -> tuple[float, ...]:
    """Seconds of each of `runs` runs, after `WARM_UP` that are not counted.

    Arguments are real (`Program.make`), and each run goes on from the one before: its
    first result is the next one's first argument, as a training step's state is.
    `trace` is the folder of a profile of two more runs.
    """
    compiled = program.compile()
    state, *rest = make_arguments(program, 0)
    seconds = []
    for _ in range(WARM_UP + runs):
        begin = time.perf_counter()
        state, *_ = jax.block_until_ready(compiled(state, *rest))
        seconds.append(time.perf_counter() - begin)
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(2):
                state, *_ = jax.block_until_ready(compiled(state, *rest))
    return tuple(seconds[WARM_UP:])


def read_sums(planned: Any) -> dict[str, int]:
    """XLA's planned bytes of a compiled program (or its `memory_analysis()`), by name.

    All 0 for a program out of JAX's persistent compilation cache, which keeps no plan.
    """
    if isinstance(planned, jax.stages.Compiled):
        planned = planned.memory_analysis()
    parts = ("argument", "output", "alias", "temp")
    names = ("total_allocation_bytes", *(f"{part}_size_in_bytes" for part in parts))
    return {name: getattr(planned, name) for name in names}


def compute_terms(
    sums: Mapping[str, int],
    moments: list[int],
    peak: int,
    *,
    arguments: list[int],
    results: list[int],
    freed: list[int],
) -> dict[str, int]:
    """`TERMS` of one run, which sum to `peak` less the plan's total.

    Args:
      sums: XLA's plan, as `read_sums` tells it.
      moments: bytes in use at start, loaded, base and end.
      peak: the most bytes in use, up to the end.
      arguments: bytes of every array on the device.
      results: bytes of those that reuse no argument.
      freed: bytes of the donated arguments that no result reuses.
    """
    start, loaded, base, end = moments
    temporary, planned = sums["temp_size_in_bytes"], sums["total_allocation_bytes"]
    constants = planned - (
        sums["argument_size_in_bytes"]
        + sums["output_size_in_bytes"]
        - sums["alias_size_in_bytes"]
        + temporary
    )
    rounding = [_compute_rounding(size) for size in arguments]
    kept = end - base + sum(map(_round_up, freed)) - sum(map(_round_up, results))
    found = {
        START: start,
        ARGUMENTS: base - loaded - sum(rounding) - sums["argument_size_in_bytes"],
        ROUNDING: sum(rounding)
        + sum(map(_compute_rounding, results))
        + _compute_rounding(temporary),
        LOADED: loaded - start + kept - constants,
    }
    rest = peak - planned - sum(found.values())
    return found | {UNEXPLAINED: rest}


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _compute_rounding(size: int) -> int:
    return _round_up(size) - size


def _list_buffers(tree: Any) -> Iterator[tuple[jax.Array, int, int]]:
    """Array, address and bytes of a tree's arrays in the memory of one device."""
    for array in jax.tree.leaves(tree):
        plain = array
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            plain = jax.random.key_data(array)
        if array.sharding.memory_kind != HOST and plain.size:
            shard = plain.addressable_shards[0].data
            yield array, shard.unsafe_buffer_pointer(), shard.on_device_size_in_bytes()


def make_arguments(program: Program, key: int | None) -> list[Any]:
    """Makes the program's arguments, without static ones, where it wants them placed.

    From its own `make`; zeros, one array at a time, where it or `key` is None.
    """
    described, *_ = program.place_arguments(None)
    wanted = [d for n, d in enumerate(described) if n not in program.static]
    if program.make is None or key is None:
        return jax.tree.map(_make_zeros, wanted)
    drawn = jax.jit(program.make)(jax.random.key(key))
    given = [a for n, a in enumerate(drawn) if n not in program.static]
    return jax.tree.map(
        lambda array, like: (
            array if like.sharding is None else jax.device_put(array, like.sharding)
        ),
        given,
        wanted,
    )


def _make_zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(0), math.prod(like.shape))
        return keys.reshape(like.shape)
    if like.sharding is not None and like.sharding.memory_kind == HOST:
        # Made by a program they would be on the device first.
        return jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _format_terms(title: str, terms: dict[str, int]) -> list[str]:
    """A small table of terms, with their sum."""
    total = sum(terms.values())
    rows = [*terms.items(), ("together", total)] if terms else [("nothing", 0)]
    lines = ["", f"{title:<40}{'bytes':>16}", "─" * 56]
    return lines + [f"{term:<40}{held:>+16,}" for term, held in rows]
