"""The compiled program as XLA writes it down: instructions, buffers, their lifetimes.

XLA dumps one `HloProto` a module. Its messages are described here at run time with the
field numbers of the public hlo.proto and xla_data.proto (openxla/xla), only as far as
they are needed; unknown fields are skipped by protobuf itself.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

# message -> field -> (number, type); [type] is repeated, a capital starts a message
_MESSAGES = {
    "HloProto": {"module": (1, "Module"), "assignment": (3, "BufferAssignment")},
    "Module": {
        "computations": (3, ["Computation"]),
        "entry_id": (6, "int64"),
        "schedule": (7, "Schedule"),
        "frames": (17, "StackFrameIndex"),
    },
    "Computation": {
        "name": (1, "string"),
        "instructions": (2, ["Instruction"]),
        "id": (5, "int64"),
        "root_id": (6, "int64"),
    },
    "Schedule": {"sequences": (1, ["Sequence"])},
    "Sequence": {"computation": (1, "int64"), "order": (2, "Order")},
    "Order": {"ids": (1, ["int64"])},
    "Instruction": {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "shape": (3, "Shape"),
        "metadata": (7, "Metadata"),
        "parameter_number": (9, "int64"),
        "tuple_index": (13, "int64"),
        "custom_call_target": (28, "string"),
        "id": (35, "int64"),
        "operand_ids": (36, ["int64"]),
        "called_ids": (38, ["int64"]),
        "config": (43, "bytes"),
    },
    "Metadata": {"op_name": (2, "string"), "frame": (15, "int64")},
    "Shape": {
        "element_type": (2, "int64"),
        "dimensions": (3, ["int64"]),
        "tuple_shapes": (4, ["Shape"]),
        "layout": (5, "Layout"),
    },
    "Layout": {"memory_space": (8, "int64")},
    "StackFrameIndex": {
        "files": (1, ["string"]),
        "locations": (3, ["Location"]),
        "frames": (4, ["Frame"]),
    },
    "Location": {"file": (1, "int64"), "line": (3, "int64")},
    "Frame": {"location": (1, "int64"), "parent": (2, "int64")},
    "BufferAssignment": {
        "buffers": (1, ["Buffer"]),
        "allocations": (3, ["Allocation"]),
        "traces": (4, ["Trace"]),
    },
    "Buffer": {"id": (1, "int64"), "size": (2, "int64"), "defined_at": (3, "Place")},
    "Place": {"instruction_id": (4, "int64"), "shape_index": (3, ["int64"])},
    "Allocation": {
        "size": (2, "int64"),
        "thread_local": (3, "bool"),
        "entry_parameter": (5, "bool"),
        "parameter_number": (6, "int64"),
        "maybe_live_out": (7, "bool"),
        "color": (8, "int64"),
        "assigned": (9, ["Assigned"]),
        "constant": (12, "bool"),
    },
    "Assigned": {"buffer_id": (1, "int64")},
    "Trace": {"events": (1, ["Event"])},
    "Event": {
        "kind": (1, "int64"),
        "buffer_id": (2, "int64"),
        "instruction": (4, "string"),
        "canonical_id": (5, "int64"),
    },
}

HOST_COLOR = 5
"""The number ("color") of host memory in XLA's plan; all others are the device's."""
ALLOC, FREE, SHARE = 0, 1, 2
"""Kinds of an event: a buffer is born, dies, or takes over the bytes of another."""

# xla_data.proto's PrimitiveType: number -> name, bits
_TYPES = {
    **{1: ("bool", 8), 2: ("s8", 8), 3: ("s16", 16), 4: ("s32", 32), 5: ("s64", 64)},
    **{6: ("u8", 8), 7: ("u16", 16), 8: ("u32", 32), 9: ("u64", 64)},
    **{10: ("f16", 16), 11: ("f32", 32), 12: ("f64", 64), 16: ("bf16", 16)},
    **{15: ("c64", 64), 18: ("c128", 128), 21: ("s4", 4), 22: ("u4", 4)},
    **{19: ("f8e5m2", 8), 20: ("f8e4m3fn", 8), 23: ("f8e4m3b11fnuz", 8)},
    **{24: ("f8e5m2fnuz", 8), 25: ("f8e4m3fnuz", 8), 28: ("f8e4m3", 8)},
    **{29: ("f8e3m4", 8), 32: ("f4e2m1fn", 4), 33: ("f8e8m0fnu", 8)},
    **{26: ("s2", 2), 27: ("u2", 2), 30: ("s1", 1), 31: ("u1", 1)},
    **{13: ("tuple", 0), 14: ("opaque", 0), 17: ("token", 0)},
}
_BITS = dict(_TYPES.values())


@functools.cache
def _build_hlo_proto():
    """The message class of `HloProto`, from the table above."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="jmem/hlo.proto", package="jmem", syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            repeated = isinstance(kind, list)
            kind = kind[0] if repeated else kind
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".jmem.{kind}"
            else:
                scalar = f"TYPE_{kind.upper()}"
                field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(scalar)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jmem.HloProto"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and dimensions; a tuple's parts."""

    dtype: str
    dims: tuple[int, ...] = ()
    parts: tuple["Shape", ...] = ()
    host: bool = dataclasses.field(default=False, compare=False)
    """Whether an array of it is in host memory."""

    @property
    def bytes(self) -> int:
        """Bytes of an array of this shape; values of less than a byte are packed."""
        return (math.prod(self.dims) * _BITS.get(self.dtype, 0) + 7) // 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    def at(self, index: tuple[int, ...]) -> "Shape":
        """The part of a tuple shape that a buffer's index names."""
        for position in index:
            if position >= len(self.parts):
                return self
            self = self.parts[position]
        return self


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction."""

    id: int
    name: str
    opcode: str
    shape: Shape
    op_name: str
    """JAX's scopes and primitive: `jit(step)/transpose(jvp())/dot_general`."""
    frame: int
    operands: tuple[int, ...]
    called: tuple[int, ...]
    parameter: int
    tuple_index: int
    target: str
    """The library function or kernel that a custom call names."""
    computation: int
    config: str
    """XLA's own notes as JSON, as a loop's known number of trips; may be empty."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value XLA keeps somewhere: the instruction that defines it, and its bytes."""

    id: int
    bytes: int
    instruction: int
    index: tuple[int, ...]
    """Which part of a tuple-shaped result."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One block of memory, and the buffers that lie in it."""

    bytes: int
    parameter: int | None
    """Number of the argument it holds, if it holds one."""
    constant: bool
    live_out: bool
    host: bool
    thread_local: bool
    """Scratch of fused scalar code; no card holds it."""
    buffers: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Event:
    """A step of XLA's heap trace: a buffer is born, dies, or shares another's bytes."""

    kind: int
    buffer: int
    canonical: int
    """The buffer whose bytes a sharer takes over."""
    instruction: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module with its buffer assignment."""

    instructions: dict[int, Instruction]
    computations: dict[int, tuple[int, ...]]
    """Instructions of each computation, in order."""
    names: dict[int, str]
    """Name of each computation."""
    roots: dict[int, int]
    """Root instruction of each computation."""
    entry: int
    schedule: dict[int, tuple[int, ...]]
    """Instructions of a computation in the order the GPU is given them."""
    frames: dict[int, tuple[str, int]]
    """File and line of a stack frame: the innermost that is no installed package's."""
    buffers: dict[int, Buffer]
    allocations: tuple[Allocation, ...]
    traces: tuple[tuple[Event, ...], ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name; names are unique in a module."""
        return {i.name: i for i in self.instructions.values()}

    @functools.cached_property
    def users(self) -> dict[int, list[Instruction]]:
        """Instructions that read an instruction's result."""
        found: dict[int, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    def list_fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """Instructions inside a fusion (or any called computation), in order."""
        for called in instruction.called:
            for id in self.computations.get(called, ()):
                yield self.instructions[id]


def read(data: bytes) -> Module:
    """A module from the bytes of an `HloProto`.

    Raises:
      ValueError: the bytes are no HloProto with a buffer assignment.
    """
    from google.protobuf.message import DecodeError

    try:
        proto: Any = _build_hlo_proto().FromString(data)
    except DecodeError as error:
        raise ValueError(f"not an HloProto ({len(data):,} bytes): {error}") from error
    if not proto.assignment.allocations:
        raise ValueError("the HloProto holds no buffer assignment.")
    instructions = {
        i.id: _read_instruction(i, computation.id)
        for computation in proto.module.computations
        for i in computation.instructions
    }
    return Module(
        instructions=instructions,
        computations={
            c.id: tuple(i.id for i in c.instructions) for c in proto.module.computations
        },
        names={c.id: c.name for c in proto.module.computations},
        roots={c.id: c.root_id for c in proto.module.computations},
        entry=proto.module.entry_id,
        schedule={
            s.computation: tuple(s.order.ids) for s in proto.module.schedule.sequences
        },
        frames=_read_frames(proto.module.frames),
        buffers={
            b.id: Buffer(
                b.id,
                b.size,
                b.defined_at.instruction_id,
                tuple(b.defined_at.shape_index),
            )
            for b in proto.assignment.buffers
        },
        allocations=tuple(
            Allocation(
                bytes=a.size,
                parameter=a.parameter_number if a.entry_parameter else None,
                constant=a.constant,
                live_out=a.maybe_live_out,
                host=a.color == HOST_COLOR,
                thread_local=a.thread_local,
                buffers=frozenset(x.buffer_id for x in a.assigned),
            )
            for a in proto.assignment.allocations
        ),
        traces=tuple(
            tuple(
                Event(e.kind, e.buffer_id, e.canonical_id, e.instruction)
                for e in trace.events
            )
            for trace in proto.assignment.traces
        ),
    )


def _read_instruction(proto, computation: int) -> Instruction:
    return Instruction(
        id=proto.id,
        name=proto.name,
        opcode=proto.opcode,
        shape=_read_shape(proto.shape),
        op_name=proto.metadata.op_name,
        frame=proto.metadata.frame,
        operands=tuple(proto.operand_ids),
        called=tuple(proto.called_ids),
        parameter=proto.parameter_number,
        tuple_index=proto.tuple_index,
        target=proto.custom_call_target,
        computation=computation,
        config=proto.config.decode("utf-8", "replace"),
    )


def _read_shape(proto) -> Shape:
    dtype, _ = _TYPES.get(proto.element_type, (f"type{proto.element_type}", 0))
    parts = tuple(_read_shape(part) for part in proto.tuple_shapes)
    host = proto.layout.memory_space == HOST_COLOR
    return Shape(dtype, tuple(proto.dimensions), parts, host)


def _read_frames(proto) -> dict[int, tuple[str, int]]:
    """File and line of each stack frame; ids count from 1 and 0 means none.

    A frame inside an installed package stands for its nearest caller outside, so that
    a user reads a line of their own program and not one of flax or optax.
    """
    place, parent = {}, {}
    for number, frame in enumerate(proto.frames, start=1):
        parent[number] = frame.parent
        if 0 < frame.location <= len(proto.locations):
            location = proto.locations[frame.location - 1]
            if 0 < location.file <= len(proto.files):
                place[number] = (proto.files[location.file - 1], location.line)

    def outside(number: int) -> tuple[str, int]:
        at = number
        for _ in place:  # not for ever, should a frame be its own caller
            if at not in place:
                break
            if not _INSTALLED.search(place[at][0]):
                return place[at]
            at = parent[at]
        return place[number]

    return {number: outside(number) for number in place}


_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
