"""Measure: the memory of any jitted function, from XLA's plan of the compiled program.

    report = jmem.measure(train_step, params, opt_state, batch, target="h200",
                          donate=(0, 1))
    print(report)                       # what fills the peak, buffer by buffer
    report.fits()                       # the verdict for that card

Nothing runs and nothing is allocated: arguments may be `jax.ShapeDtypeStruct`s, and for
a described GPU no GPU is needed. What XLA cannot plan is not in the numbers: the CUDA
context and library handles (0.3 to 1 GB), workspaces of convolutions, the allocator's
own fragmentation.
"""

import dataclasses
import hashlib
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jaxlib.version

from jmem import targets
from jmem.lowering import ahead_of_time, list_positions, never_cached
from jmem.memory import breakdown, frameworks, hlo, kinds, worker
from jmem.memory import cache as cached
from jmem.memory.advice import Evidence, advise
from jmem.memory.breakdown import Contents
from jmem.memory.card import describe_attached, find_gpu
from jmem.memory.noise import hide_noise
from jmem.memory.report import MemoryReport
from jmem.program import Labels, Lowered, Place, Program, ProgramError
from jmem.targets import NoCompilerError, Target

ATTACHED = "attached"
"""The target that stands for the GPU in this machine."""
NO_TRITON = {"xla_gpu_enable_triton_gemm": False}


def measure(
    what: Program | Callable,
    *args: Any,
    target: str | Target = "h200",
    donate: int | Sequence[int] = (),
    static: int | Sequence[int] = (),
    labels: Labels | None = None,
    bounds: bool = True,
    options: Mapping[str, Any] | None = None,
    cache: bool = True,
    isolate: bool = False,
) -> MemoryReport:
    """The memory of a program on a target, explained buffer by buffer.

    Args:
      what: a `Program` (then nothing but the target is given), or any function that
        `jax.jit` takes. Of a function already under `jax.jit`, `nnx.jit` or
        `eqx.filter_jit` the donated and static arguments are found out, unless they are
        given here. One that is given NNX modules is measured under `nnx.jit`, one that
        is given Equinox modules under `eqx.filter_jit`; of a partial of such a
        function, what it binds are arguments.
      *args: the function's arguments, arrays or descriptions of arrays.
      target: a name ("h200", "h200x8"), a TOML file, a `Target`; or "attached", the
        GPU in this machine.
      donate: positions of arguments whose memory the function may take over.
      static: positions of hashable arguments that are compiled in.
      labels: the user's words for parts of the arguments, see `Program`. By default
        the arguments' own names; `params`, `opt_state`, `cache`, `batch` and the like
        are understood, also one level inside an argument such as `state`.
      bounds: compile a second time without Triton matmuls, for the interval.
      options: XLA compile options, before the program's own; none is the best
        prediction.
      cache: take the report of the same program, versions, target and options from
        `jmem.memory.cache`, and keep a new one there. Not for an attached GPU.
      isolate: compile in a worker process, which a compiler that aborts takes with it
        instead of this one. The function must be importable by name.

    Raises:
      NoCompilerError: XLA's GPU compiler cannot be reached from here, and the function
        cannot be measured in a worker process either, which must import it by name.
      ProgramError: the program cannot be compiled ahead of time, with the reason; or it
        changes a module in a way that what compiles it loses.
      AccountError: the buffers do not sum to what XLA reports.
    """
    donate = list_positions("donate", donate)
    program = as_program(what, args, donate=donate, static=static, labels=labels)
    bare = not (isinstance(what, Program) or hasattr(what, "trace") or donate)
    options = {**program.options, **(options or {})}
    if target == ATTACHED:
        how = {"bounds": False, "options": options, "cache": False}
        return _measure(program, None, bare=bare, **how)
    card = targets.resolve(target)
    how = {"bounds": bounds, "options": options, "cache": cache}
    if isolate:
        return worker.measure(program, card, how)
    try:
        card.compile_only_devices()
    except NoCompilerError as error:
        if not error.late:
            raise
        return worker.measure(program, card, how, error)
    return _measure(program, card, bare=bare, **how)


def _measure(
    program: Program,
    card: Target | None,
    *,
    bounds: bool,
    options: dict[str, Any],
    cache: bool,
    bare: bool,
) -> MemoryReport:
    started = time.monotonic()
    if card is None:
        find_gpu()
    lowered = program.lower(card)
    if bare and lowered.ignored_donation:
        [(position, name), *_] = lowered.ignored_donation.items()
        raise ProgramError(
            f"{program.name}: it calls {name}, a jitted function that donates its "
            f"argument {position}, which JAX ignores inside of another.\nMeasure that "
            "function itself, or say that it is donated here too:\n"
            f"    jmem.measure({program.name}, ..., donate=({position},))"
        )
    text = lowered.as_text()
    if card and "python_gpu_callback" in text:
        raise ProgramError(
            "the program calls back to the host, which cannot be measured ahead of "
            "time.\nTake the callback out; it holds no device memory."
        )
    bounds = bounds and options != options | NO_TRITON  # else both ends are the same
    key = (
        cached.make_key(program, text, card, options, bounds) if card and cache else ""
    )
    if key and (kept := cached.load(key)):
        return kept
    # XLA compiles on little more than one core: the second runs beside the first.
    apart = never_cached() if card is None else ahead_of_time()
    with apart, hide_noise(), futures.ThreadPoolExecutor(1) as beside:
        plain = beside.submit(lowered.compile, options | NO_TRITON) if bounds else None
        content, analysis = compile_and_dump(lowered, options)
        module = hlo.read(content)
        ends = [analysis.total_allocation_bytes]
        if plain:
            other: Any = plain.result().memory_analysis()
            ends.append(other.total_allocation_bytes)
    parts = breakdown.explain(module, program, analysis)
    idle = [IDLE] if lowered.device_count > 1 and not _is_divided(program, text) else []
    held = card or describe_attached(lowered.device_count)
    host = (
        analysis.host_argument_size_in_bytes
        + analysis.host_output_size_in_bytes
        - analysis.host_alias_size_in_bytes
        + analysis.host_temp_size_in_bytes
    )
    report = MemoryReport(
        name=program.name,
        target=held.name,
        attached=card is None,
        devices=held.devices,
        compiler_bytes=held.compiler_bytes,
        usable_bytes=held.usable_bytes,
        device_bytes=analysis.total_allocation_bytes,
        interval=(min(ends), max(ends)),
        host_bytes=host,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        flags=(*_list_flags(parts, card), *_list_lost(lowered), *idle),
        advice=advise(Evidence(program, parts, module, held.compiler_bytes)),
        versions={"jax": jax.__version__, "jaxlib": jaxlib.version.__version__},
        stablehlo_hash=hash_stablehlo(text),
        options=options,
        compile_seconds=round(time.monotonic() - started, 3),
        cached=False,
        **{own.name: getattr(parts, own.name) for own in dataclasses.fields(Contents)},
    )
    if key:
        cached.store(key, report)
    return report


def compile_and_dump(lowered: Lowered, options: dict[str, Any]) -> tuple[bytes, Any]:
    """Compiles: the HloProto with XLA's buffer plan, and XLA's own sums of it."""
    with tempfile.TemporaryDirectory(prefix="jmem-") as folder:
        dump = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_proto": True,
            # Part of the key of JAX's cache, from which a program has no plan.
            "xla_dump_large_constants": True,
        }
        analysis = lowered.compile(options | dump).memory_analysis()
        dumped = pathlib.Path(folder).glob("*gpu_after_optimizations.hlo.pb")
        largest = max(dumped, key=lambda path: path.stat().st_size, default=None)
        if largest is None:
            raise ProgramError(
                "XLA wrote no plan of the compiled program: it was not compiled for a "
                "GPU, or XLA's dump options are overridden in XLA_FLAGS."
            )
        return largest.read_bytes(), analysis


def hash_stablehlo(text: str) -> str:
    """sha256 of a lowered program, the same in every process.

    A Mosaic kernel's payload and its own hash are left out: they hold lines and paths.
    So are the addresses by which JAX knows a custom partitioning in one process.
    """

    def stable(line: str) -> str:
        if "mosaic" in line:
            return _PAYLOAD.sub('""', _KERNEL_HASH.sub("", line))
        return _ADDRESS.sub("", line) if "@CustomSPMDPartitioning" in line else line

    lines = "\n".join(map(stable, text.splitlines()))
    return hashlib.sha256(lines.encode()).hexdigest()


_ADDRESS = re.compile(r'backend_config = "\d+"')
_KERNEL_HASH = re.compile(r'kernel_hash = "(?:[^"\\]|\\.)*", ')
_PAYLOAD = re.compile(r'"(?:[^"\\]|\\.){200,}"')


def _list_flags(parts: breakdown.Breakdown, card: Target | None) -> tuple[str, ...]:
    """Sentences on what a reader should know of the numbers (`MemoryReport.flags`)."""
    flags = []
    if card and any(call.startswith("__cudnn$conv") for call in parts.calls):
        flags.append(
            "workspaces of cuDNN convolutions are not included: their algorithms are "
            "chosen on the GPU."
        )
    if card and parts.sorts:
        flags.append(
            "XLA's own sort stands in for CUB's, whose scratch is known on a GPU only."
        )
    return tuple(flags)


IDLE = "nothing is divided over the cards: the second idles, or repeats the first."
"""A flag of a program on a mesh."""


def _is_divided(program: Program, text: str) -> bool:
    """Whether an argument, a result or a value inside lies on a mesh in parts."""
    return program.names_parts() or any(
        mark in text for mark in ("sharding_constraint", "manual_computation")
    )


def _list_lost(lowered: Lowered) -> list[str]:
    """A sentence on the donation that a program loses of a function inside it."""
    return [
        f"{name}, a jitted function inside, donates argument {position} of this "
        "program, which JAX ignores there; measure that function itself, or give "
        f"donate=({position},)."
        for position, name in lowered.ignored_donation.items()
    ]


def as_program(
    what: Program | Callable,
    args: tuple,
    *,
    donate: int | Sequence[int] = (),
    static: int | Sequence[int] = (),
    labels: Labels | None = None,
) -> Program:
    """`what` as a labelled program; a function's labels are its arguments' names."""
    if isinstance(what, Program):
        if args or donate or static or labels:
            raise TypeError(
                "measure: a Program brings its arguments, donation, statics and labels "
                "with it; give nothing but the target."
            )
        frameworks.refuse_lost_changes(what.fn, what.args, what.static)
        return _add_labels(what, what.labels or None)
    if not callable(what):
        raise TypeError(
            f"measure: what={what!r} is a {type(what).__name__}; need a function, or a "
            "jmem.Program."
        )
    given = (list_positions("donate", donate), list_positions("static", static))
    call = frameworks.read(what, args, *given)
    program = Program(call.fn, call.args, call.donate, call.static)
    return _add_labels(program, labels)


def _add_labels(program: Program, labels: Labels | None) -> Program:
    """The program with these labels; with its arguments' own names for None."""
    if labels is None:
        labels = {}
        for position, name in enumerate(program.name_arguments()):
            if position not in program.static:
                labels |= _name_labels(position, name, program.args[position])
    return dataclasses.replace(program, labels=labels)


def _name_labels(position: int, name: str, value: Any) -> dict[str, Place]:
    """An argument's name as its label, or the names inside it when they say more."""
    inside = {
        jax.tree_util.keystr(path[:1], simple=True)
        for path, _ in jax.tree.leaves_with_path(value)
        if path
    }
    telling = sorted(
        word for word in inside if kinds.classify_label(word) != kinds.OTHER_ARGUMENTS
    )
    if kinds.classify_label(name) != kinds.OTHER_ARGUMENTS or not telling:
        return {name: (position, "")}
    return {name: (position, "")} | {
        f"{name}.{word}": (position, word) for word in telling
    }
