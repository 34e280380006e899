"""What fills a program's memory: every buffer with its name, its kind and its bytes.

`explain` reads XLA's own plan of the compiled program and checks itself against the
sums XLA reports: a byte that does not add up is an error, not a rounding.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from jmem.memory import hlo, kinds
from jmem.memory.naming import Origins, split_scope
from jmem.memory.timeline import Life, Timeline, count_live_bytes, replay
from jmem.program import Program


class AccountError(RuntimeError):
    """The buffers read do not sum to what XLA reports: two numbers, and what they are.

    Raised by every report rather than printing a wrong one: it is the alarm for a JAX
    whose buffer assignment is written differently.
    """

    def __init__(self, what: str, ours: int, xla: int):
        super().__init__(
            f"{what}: {ours:,} bytes by the buffers read, {xla:,} bytes by XLA "
            f"(off by {ours - xla:+,})."
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One or more like buffers, as a report lists them."""

    bytes: int
    """Bytes of one of these buffers."""
    count: int
    kind: str
    shape: str
    """dtype[dimensions], of one device's part."""
    name: str
    """An argument's label and path, or the user's scope a value was computed in."""
    op: str
    """JAX's primitive; "" for arguments."""
    source: str
    """file:line of the user's program; "" when XLA made the value."""
    phase: str
    """"forward", "backward" or "recomputed"; "" for arguments and unknown."""
    born: int | None
    """The instant at which it is allocated; None: it lives as long as the program."""
    dies: int | None
    cast_from: str = ""
    """The 16-bit dtype that a float32 value was computed in; "" for others."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all buffers of the row."""
        return self.bytes * self.count

    def span(self, instants: int) -> tuple[int, int]:
        """Its first instant, and the first after its last, of a run of `instants`."""
        return self.born or 0, instants if self.dies is None else self.dies


@dataclasses.dataclass(frozen=True)
class Instant:
    """What the program was doing at one instant."""

    number: int
    of: int
    """How many instants the whole program has."""
    phase: str
    scope: str
    op: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What fills a program's memory, as a report tells it."""

    constant_bytes: int
    by_kind: dict[str, int]
    """Device bytes at the peak by kind; they sum to all that the device holds."""
    by_label: dict[str, int]
    """Device bytes of the arguments under each label."""
    host_by_label: dict[str, int]
    rows: tuple[Row, ...]
    """Device buffers alive at the peak, by falling size; like ones share a row."""
    peak_instant: Instant
    timeline: Timeline
    """Live bytes over the run; its greatest and the fragmentation are the device's."""
    collectives: dict[str, dict[str, int]]
    """For each kind of collective, how many there are and the bytes they return."""
    calls: dict[str, int]
    """How many library and kernel calls there are by target: cuBLAS, cuDNN, Triton."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breakdown(Contents):
    """A program's memory, buffer by buffer."""

    lives: tuple[Row, ...]
    """Every device buffer of the whole program, one by one."""
    sorts: int
    """How many sorts XLA compiles itself, without a library."""


def explain(module: hlo.Module, program: Program, analysis: Any) -> Breakdown:
    """The breakdown of a compiled program.

    Args:
      module: the program as XLA dumped it.
      program: what was compiled; its labels name the arguments.
      analysis: JAX's `memory_analysis()` of the same compilation.

    Raises:
      AccountError: the sums of the buffers differ from XLA's.
    """
    device = [a for a in module.allocations if not a.host and not a.thread_local]
    held = sum(a.bytes for a in device)
    # JAX 0.11.2 counts thread-local scratch, a few bytes that no card holds.
    local = sum(a.bytes for a in module.allocations if a.thread_local and not a.host)
    total = analysis.total_allocation_bytes
    if total - held not in (0, local):
        raise AccountError("device memory", held, total)
    constants = sum(a.bytes for a in device if a.constant)
    parts = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + constants
    )
    if parts != held:
        raise AccountError(
            "arguments + outputs - aliased + temporaries + constants", parts, held
        )

    traced = [
        (trace, [a for a in module.allocations if _holds(a, trace)])
        for trace in module.traces
        if trace
    ]
    covered = {id(a) for _, allocations in traced for a in allocations}
    fixed = [a for a in device if id(a) not in covered]
    traces = [
        (trace, replay(trace, module.buffers))
        for trace, allocations in traced
        if not all(a.host for a in allocations)
    ]
    account = _Account(module, program, fixed, traces)
    fragmentation = total - account.timeline.max()
    host = any(a.host for a in module.allocations)
    # XLA's peak leaves out temporaries outside its block, as the table of the results
    # of a fusion that is the whole program (seen in 0.12).
    beside = sum(
        a.bytes for a in fixed if a.parameter is None and not (a.live_out or a.constant)
    )
    more = account.timeline.max() - analysis.peak_memory_in_bytes
    if not host and more not in (0, beside):
        raise AccountError(
            "peak", account.timeline.max(), analysis.peak_memory_in_bytes
        )
    if fragmentation < 0:
        raise AccountError("peak", account.timeline.max(), total)
    return account.build_breakdown(fragmentation, constants)


def _holds(allocation: hlo.Allocation, trace: tuple[hlo.Event, ...]) -> bool:
    # By membership: JAX 0.11.2 writes a wrong allocation index into the trace.
    return any(event.buffer in allocation.buffers for event in trace)


class _Account:
    """Every buffer of one program, with its kind."""

    def __init__(
        self,
        module: hlo.Module,
        program: Program,
        fixed: list[hlo.Allocation],
        traces: list[tuple[tuple[hlo.Event, ...], list[Life]]],
    ):
        self._module = module
        self._origins = Origins(module)
        self._arguments = _list_arguments(module, program)
        by_length = sorted(traces, key=lambda pair: len(pair[0]))
        self._trace, self._lives = by_length.pop() if by_length else ((), [])
        self._backward = self._find_backward()
        self._classify = kinds.Classifier(
            module,
            {number: argument.kind for number, argument in self._arguments.items()},
            self._backward,
        )
        rows = [self._build_fixed_row(allocation) for allocation in fixed]
        for trace, lives in by_length:  # other memory spaces: held at their own worst
            event = _find_worst(len(trace), lives)
            rows += [
                self._build_row(life, event) for life in lives if life.is_alive(event)
            ]
        self._rows = [dataclasses.replace(row, born=None, dies=None) for row in rows]
        # A buffer keeps one kind for life: what it holds when the most is alive.
        worst = _find_worst(len(self._trace), self._lives)
        for life in self._lives:
            event = worst if life.is_alive(worst) else life.dies - 1
            self._rows.append(self._build_row(life, event))
        self.timeline = self._build_timeline()

    def build_breakdown(self, fragmentation: int, constants: int) -> Breakdown:
        """The `Breakdown` that a report is made of."""
        timeline, peak = self.timeline, self.timeline.peak
        by_kind = {kind: live[peak] for kind, live in timeline.by_kind.items()}
        by_kind[kinds.FRAGMENTATION] = fragmentation
        rows = [r for r in self._rows if peak in range(*r.span(len(timeline)))]
        instructions = self._module.instructions.values()
        calls = (i.target for i in instructions if i.opcode == "custom-call")
        return Breakdown(
            timeline=timeline,
            by_kind={kind: held for kind, held in by_kind.items() if held},
            by_label=self._sum_by_label(host=False),
            host_by_label=self._sum_by_label(host=True),
            rows=_merge_rows(rows),
            lives=tuple(self._rows),
            peak_instant=self._describe_instant(peak),
            collectives=_count_collectives(self._module),
            calls=dict(collections.Counter(calls)),
            sorts=sum(i.opcode == "sort" for i in instructions),
            constant_bytes=constants,
        )

    def _sum_by_label(self, host: bool) -> dict[str, int]:
        held = collections.Counter()
        for allocation in self._module.allocations:
            argument = self._arguments.get(allocation.parameter)
            if argument and argument.label and allocation.host == host:
                held[argument.label] += allocation.bytes
        return dict(held)

    def _find_backward(self) -> tuple[int, int] | None:
        """First and last event at which a backward pass computes something."""
        found = []
        for number, event in enumerate(self._trace):
            instruction = self._module.by_name.get(event.instruction)
            if event.kind != hlo.FREE and instruction:
                buffer = self._module.buffers[event.buffer]
                origin = self._origins.find(instruction, buffer.index)
                if kinds.is_backward(origin.op_name) and not origin.fill:
                    found.append(number)
        return (found[0], found[-1]) if found else None

    def _find_holder(self, life: Life, event: int) -> hlo.Buffer:
        """The value in a buffer's bytes at an event: the last one computed there.

        A stack that a loop fills row by row begins with zeros: there, the value that
        the loop will write is returned, since it says more.
        """
        now = [h for h in life.holders if h[1] <= event < h[2]]
        latest = [*sorted(now, key=lambda h: -h[1]), *reversed(life.holders)]
        values = [self._module.buffers[buffer] for buffer, *_ in latest]
        telling = (
            value
            for value in values
            if not self._find_origin(value).fill and self._find_origin(value).op_name
        )
        return next(telling, values[0])

    def _find_origin(self, buffer: hlo.Buffer):
        return self._origins.find(
            self._module.instructions[buffer.instruction], buffer.index
        )

    def _build_row(self, life: Life, event: int) -> Row:
        holder = self._find_holder(life, event)
        instruction = self._module.instructions[holder.instruction]
        origin = self._find_origin(holder)
        kind = self._classify.classify(
            instruction, holder.index, origin, life.born, life.dies
        )
        name, op = split_scope(origin.op_name)
        argument = self._arguments.get(origin.argument)
        if kinds.is_handle(instruction, holder.index):
            name, op = "", instruction.opcode
        elif argument:
            name, op = argument.name, "copy"
        elif origin.stack:
            op += " (stacked)" if origin.stack == "filled" else " (row of a stack)"
        shape = str(instruction.shape.at(holder.index))
        return Row(
            bytes=life.bytes,
            count=1,
            kind=kind,
            shape=shape,
            name=name,
            op=op,
            source=self._format_source(origin.frame),
            phase=_name_phase(kind, origin.op_name),
            born=life.born + 1,
            dies=life.dies + 1,
            cast_from=_find_cast(shape, str(origin.instruction.shape)),
        )

    def _build_fixed_row(self, allocation: hlo.Allocation) -> Row:
        buffers = [self._module.buffers[b] for b in allocation.buffers]
        largest = max(buffers, key=lambda b: (b.bytes, -b.id))
        instruction = self._module.instructions[largest.instruction]
        shape = str(instruction.shape.at(largest.index))
        name, op, source = "", "", ""
        if allocation.parameter is not None:
            argument = self._arguments[allocation.parameter]
            kind, name, shape = argument.kind, argument.name, argument.shape
        else:
            kind = kinds.OUTPUTS if allocation.live_out else kinds.OTHER
            kind = kinds.CONSTANTS if allocation.constant else kind
            origin = self._find_origin(largest)
            name, op = split_scope(origin.op_name)
            source = self._format_source(origin.frame)
        return Row(allocation.bytes, 1, kind, shape, name, op, source, "", None, None)

    def _format_source(self, frame: int) -> str:
        file, line = self._module.frames.get(frame, ("", 0))
        return f"{file}:{line}" if file else ""

    def _build_timeline(self) -> Timeline:
        length = len(self._trace) + 1
        lives = {kind: [] for kind in kinds.KINDS}
        for row in self._rows:
            lives[row.kind].append((*row.span(length), row.bytes))
        by_kind = {
            kind: tuple(live)
            for kind, own in lives.items()
            if any(live := count_live_bytes(own, length))
        }
        first, last = self._backward or (length, length)
        names = ("forward", "backward", "update") if self._backward else ("", "", "")
        phases = tuple(
            names[(instant > first) + (instant > last + 1)] for instant in range(length)
        )
        return Timeline(by_kind or {kinds.OTHER: (0,) * length}, phases)

    def _describe_instant(self, number: int) -> Instant:
        phase = self.timeline.phases[number]
        of = len(self.timeline)
        if number == 0:
            return Instant(0, of, phase, "", "", "")
        event = self._trace[number - 1]
        origin = self._find_origin(self._module.buffers[event.buffer])
        words, op = split_scope(origin.op_name)
        return Instant(number, of, phase, words, op, self._format_source(origin.frame))


@dataclasses.dataclass(frozen=True)
class _Argument:
    label: str | None
    kind: str
    name: str
    shape: str


def _list_arguments(
    module: hlo.Module, program: Program
) -> dict[int | None, _Argument]:
    """The program's flattened arguments by the number of their HLO parameter."""
    entry = [module.instructions[i] for i in module.computations[module.entry]]
    parameters = {i.parameter: i for i in entry if i.opcode == "parameter"}
    leaves = program.list_leaves()
    hoisted = len(parameters) - len(leaves)  # closed-over arrays JAX passes in front
    if hoisted < 0:
        raise AccountError("number of arguments", len(leaves), len(parameters))
    names = program.name_arguments()
    found: dict[int | None, _Argument] = {
        number: _Argument(None, kinds.CONSTANTS, "closed-over array", str(p.shape))
        for number, p in parameters.items()
        if number < hoisted
    }
    told = zip(leaves, program.label_leaves(), kinds.classify_arguments(program))
    for number, ((position, path, _), label, kind) in enumerate(told, hoisted):
        name = f"{names[position]}/{path}" if path else names[position]
        shape = str(parameters[number].shape)
        found[number] = _Argument(label, kind, name, shape)
    return found


def shorten_source(source: str) -> str:
    """The end of a file:line, as a reader knows it: folder/file:line."""
    return "/".join(source.split("/")[-2:])


def _find_cast(shape: str, computed: str) -> str:
    """The 16-bit dtype of a value that is held as float32."""
    before = computed.split("[")[0]
    return before if shape.startswith("f32[") and before in ("bf16", "f16") else ""


def _name_phase(kind: str, op_name: str) -> str:
    if kind == kinds.RECOMPUTATION:
        return "recomputed"
    if kinds.is_backward(op_name):
        return "backward"
    return "forward" if kind == kinds.SAVED else ""


def _find_worst(events: int, lives: list[Life]) -> int:
    """The first event after which the most bytes are alive."""
    spans = ((life.born, life.dies, life.bytes) for life in lives)
    live = count_live_bytes(spans, events + 1)
    return live.index(max(live))


def _merge_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """One row for each group of like rows, with their count; the largest first."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        like = dataclasses.replace(row, born=None, dies=None)
        groups.setdefault(like, []).append(row)
    merged = [dataclasses.replace(g[0], count=len(g)) for g in groups.values()]
    return tuple(sorted(merged, key=lambda row: -row.total_bytes))


def _count_collectives(module: hlo.Module) -> dict[str, dict[str, int]]:
    """Count and returned bytes of collectives by opcode; one in a loop counts once."""
    found: dict[str, dict[str, int]] = {}
    moving = {
        i.id: i.opcode.removesuffix("-start")
        for i in module.instructions.values()
        if kinds.is_collective(i) and not i.opcode.endswith("-done")
    }
    for opcode in moving.values():
        found.setdefault(opcode, {"count": 0, "bytes": 0})["count"] += 1
    for buffer in module.buffers.values():
        if buffer.instruction in moving:
            found[moving[buffer.instruction]]["bytes"] += buffer.bytes
    return found
