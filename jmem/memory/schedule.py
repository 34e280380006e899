"""Copies between host and device in a compiled program, and what hides each of them.

XLA writes down the order in which a GPU is given its work. A copy that starts, is
followed by kernels, and is waited for after them, travels while they compute.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Literal

from jmem.memory.hlo import Instruction, Module, Shape

_NO_KERNEL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "optimization-barrier"),
}
"""Instructions that give the GPU nothing to do."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy between host and device memory."""

    name: str
    """Name of the instruction that starts the copy."""
    op_name: str
    """JAX's scopes and primitive of that instruction."""
    to: Literal["device", "host"]
    bytes: int
    """Bytes that are moved each time."""
    times: int
    """How often a run of the program does it: the trips of the loops it is in."""
    kernels_between: int
    """Kernels that run between its start and what waits for it; 0 if it blocks."""


def list_copies(module: Module) -> tuple[Copy, ...]:
    """Every copy between host and device, in the order in which they are started."""
    times = dict(_count_runs(module, module.entry, 1))
    found = []
    for computation, order in module.schedule.items():
        instructions = [module.instructions[id] for id in order]
        kernels = [0]
        for instruction in instructions:
            kernels.append(kernels[-1] + _is_kernel(instruction))
        place = {instruction.id: n for n, instruction in enumerate(instructions)}
        for n, instruction in enumerate(instructions):
            copied = _find_copy(module, instruction)
            if copied is None or computation not in times:
                continue
            to, size = copied
            done = _find_done(module, instruction)
            between = kernels[place[done.id]] - kernels[n + 1] if done else 0
            found.append(
                Copy(
                    name=instruction.name,
                    op_name=instruction.op_name
                    or _find_inner_name(module, instruction),
                    to=to,
                    bytes=size,
                    times=times[computation],
                    kernels_between=between,
                )
            )
    return tuple(found)


def _is_kernel(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return not (opcode in _NO_KERNEL or opcode.endswith(("-start", "-done", "-update")))


def _find_copy(module: Module, instruction: Instruction):
    """(where to, bytes) of an instruction that moves data between host and device."""
    opcode = instruction.opcode
    moves_nothing = _NO_KERNEL | {"while", "conditional", "call", "custom-call"}
    if opcode in moves_nothing or opcode.endswith(("-done", "-update")):
        return None
    given = [module.instructions[id].shape for id in instruction.operands]
    result = instruction.shape
    if opcode.endswith("-start"):  # (operands, result, context), or (result, operand)
        result = result.parts[0 if opcode == "copy-start" else 1]
    read, made = _list_leaves(given), _list_leaves([result])
    if any(leaf.host for leaf in made):
        moved = [leaf for leaf in read if not leaf.host and leaf.dims]
        if not moved:
            return None
        return "host", max(leaf.bytes for leaf in moved)
    if any(leaf.host for leaf in read):
        return "device", sum(leaf.bytes for leaf in made)
    return None


def _list_leaves(shapes: list[Shape]) -> list[Shape]:
    return [
        leaf
        for shape in shapes
        for leaf in (_list_leaves(list(shape.parts)) if shape.parts else [shape])
    ]


def _find_done(module: Module, start: Instruction) -> Instruction | None:
    """The instruction that waits for a copy's start; None where the copy blocks."""
    if not start.opcode.endswith("-start"):
        return None
    for user in module.users.get(start.id, []):
        if user.opcode.endswith("-update"):
            return _find_done(module, user)
        if user.opcode.endswith("-done"):
            return user
    return None


def _find_inner_name(module: Module, instruction: Instruction) -> str:
    names = [inner.op_name for inner in module.list_fused(instruction) if inner.op_name]
    return names[-1] if names else ""


def _count_runs(
    module: Module, computation: int, times: int
) -> Iterator[tuple[int, int]]:
    """(id, times run) of a computation that runs `times` times, and of all it calls.

    Those that are part of a kernel are left out.
    """
    yield computation, times
    for id in module.computations[computation]:
        instruction = module.instructions[id]
        if instruction.opcode in {"while", "conditional", "call"}:
            trips = 1
            if instruction.opcode == "while" and instruction.config:
                known = json.loads(instruction.config).get("known_trip_count", {})
                trips = int(known.get("n", 1))
            for called in instruction.called:
                yield from _count_runs(module, called, times * trips)
