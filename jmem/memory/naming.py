"""What a buffer holds: the value a user would recognise, and where it was written.

XLA names a buffer by the instruction that first touches it. That is often a zero fill
shared by many (the stacks that `scan` saves), a loop's state or a layout copy, none of
which a user knows. `Origins.find` walks from there to the instruction that computed the
value: through tuples, loops, branches and fusions, from an update of a stack to the
value it writes, and from a sum over a loop's rounds to what is added.
"""

import dataclasses
import re
from typing import Literal

from jmem.memory.hlo import Instruction, Module

# A value passes through these unchanged, but for its layout, its dtype or its extent.
_PASSING = {
    *("bitcast", "bitcast-convert", "convert", "copy", "copy-done", "copy-start"),
    *("reshape", "transpose", "slice", "dynamic-slice", "reverse", "reduce-precision"),
    *("optimization-barrier", "domain", "async-update", "async-done"),
}
_FILLS = {"constant", "iota", "broadcast"}
_CALLS = {"call", "async-start", "fusion"}

Value = tuple[Instruction, tuple[int, ...]]
"""An instruction's result, or the part of its tuple result that an index names."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from."""

    instruction: Instruction
    """The instruction that computed the value."""
    op_name: str
    """JAX's scopes and primitive of the nearest instruction that has any."""
    frame: int
    argument: int | None
    """Number of the program's argument that the value is a copy, cast or slice of."""
    fill: bool
    """Whether the value is one constant, broadcast to an array."""
    stack: Literal["", "filled", "read"]
    """The buffer is a stack a loop fills row by row; or a row read back from one."""
    updates: int | None
    """Number of the argument whose rows, in place or in a copy, the value replaces."""
    computation: int
    """Id of the loop body, branch or program that computes the value, not a fusion."""


class Origins:
    """Origins of the values of one module."""

    def __init__(self, module: Module):
        self._module = module
        self._callers = {
            called: instruction
            for instruction in module.instructions.values()
            for called in instruction.called
        }
        self._found: dict[tuple[int, tuple[int, ...]], Origin] = {}

    def find(self, instruction: Instruction, index: tuple[int, ...] = ()) -> Origin:
        """The origin of an instruction's result, or of one part of a tuple result."""
        place = instruction.id, index
        if place not in self._found:
            self._found[place] = self._build_origin(
                self._trace_back(instruction, index)
            )
        return self._found[place]

    def _build_origin(self, trail: list[Instruction]) -> Origin:
        end = trail[-1]
        opcodes = [i.opcode for i in trail]
        updates = "dynamic-update-slice" in opcodes
        place = opcodes.index("dynamic-update-slice") if updates else 0
        read = "dynamic-slice" in opcodes[:place]
        named = next((i for i in reversed(trail) if i.op_name), None)
        named = named or self._find_named_input(end)
        return Origin(
            instruction=end,
            op_name=named.op_name.split(";")[0],
            frame=next((i.frame for i in reversed(trail) if i.frame), named.frame),
            argument=self._find_argument(end),
            fill=end.opcode in _FILLS,
            stack="" if not updates else "read" if read else "filled",
            updates=self._find_argument(self._find_start(trail[place]))
            if updates
            else None,
            computation=self._find_home(end),
        )

    def _find_argument(self, at: Instruction) -> int | None:
        """Number of the program's argument that an instruction is; None for others."""
        entry = at.computation == self._module.entry
        return at.parameter if entry and at.opcode == "parameter" else None

    def _find_start(self, update: Instruction) -> Instruction:
        """What was in a buffer before the first of its rows was replaced."""
        at, index = self._get_operand(update, 0)
        for _ in range(100):
            caller = self._callers.get(at.computation)
            if at.opcode == "dynamic-update-slice":
                before = self._get_operand(at, 0)
            elif at.opcode == "while":
                before = self._get_operand(at, 0, index)
            elif at.opcode == "parameter" and caller and caller.opcode == "while":
                before = self._get_operand(caller, 0, index)
            elif at.opcode in {"conditional", "add"}:
                break
            else:
                before = self._step_back(at, index)
            if before is None:
                break
            at, index = before
        return at

    def _find_home(self, at: Instruction) -> int:
        """Id of the loop body, branch or program around an instruction, no fusion's."""
        while (caller := self._callers.get(at.computation)) and caller.opcode in _CALLS:
            at = caller
        return at.computation

    def _trace_back(
        self, instruction: Instruction, index: tuple, seen: frozenset = frozenset()
    ) -> list[Instruction]:
        """From a value to the instruction that computed it, step by step."""
        value: Value | None = (instruction, index)
        trail: list[Instruction] = []
        while value and (place := (value[0].id, value[1])) not in seen:
            seen |= {place}
            trail.append(value[0])
            if value[0].opcode == "conditional":
                branches = [
                    self._trace_back(*self._get_root(called, value[1]), seen)
                    for called in value[0].called
                ]
                # A branch that hands the value on says nothing about it.
                return trail + max(branches, key=_computes)
            value = self._step_back(*value)
        return trail

    def _step_back(self, at: Instruction, index: tuple) -> Value | None:
        """The value that this one merely passes on; None where it is computed."""
        if at.opcode == "get-tuple-element":
            return self._get_operand(at, 0, (at.tuple_index, *index))
        if at.opcode == "tuple" and index:
            return self._get_operand(at, index[0], index[1:])
        if at.opcode in _PASSING:
            return self._get_operand(at, 0, index)
        if (
            at.opcode == "broadcast"
            and self._get_operand(at, 0)[0].opcode != "constant"
        ):
            return self._get_operand(at, 0)
        if at.opcode == "dynamic-update-slice":
            return self._get_operand(at, 1)
        if at.opcode == "while":
            return self._find_in_loop(at, index)
        if at.opcode in _CALLS and at.called:
            return self._get_root(at.called[0], index)
        if at.opcode == "parameter":
            return self._find_passed(at, index)
        if at.opcode == "add":
            summands = [self._get_operand(at, n) for n in (0, 1)]
            fresh = [value for value in summands if not self._is_state(*value)]
            return fresh[0] if len(fresh) == 1 else None
        return None

    def _get_operand(self, at: Instruction, number: int, index: tuple = ()) -> Value:
        return self._module.instructions[at.operands[number]], index

    def _get_root(self, computation: int, index: tuple) -> Value:
        return self._module.instructions[self._module.roots[computation]], index

    def _find_in_loop(self, loop: Instruction, index: tuple) -> Value:
        """What a loop's result holds: what its body writes, or what was put in."""
        written = self._get_root(loop.called[0], index)
        passed = self._look_through(*written)
        kept = passed[0].opcode == "parameter" and passed[1] == index
        return self._get_operand(loop, 0, index) if kept else written

    def _find_passed(self, parameter: Instruction, index: tuple) -> Value | None:
        """The value passed for a computation's parameter, or held as loop state."""
        caller = self._callers.get(parameter.computation)
        if caller is None or parameter.computation == self._module.entry:
            return None
        if caller.opcode == "while":
            return self._find_in_loop(caller, index)
        if caller.opcode == "conditional":
            return self._get_operand(
                caller, 1 + caller.called.index(parameter.computation), index
            )
        if caller.opcode in _CALLS:
            return self._get_operand(caller, parameter.parameter, index)
        return None

    def _look_through(self, at: Instruction, index: tuple) -> Value:
        """The value behind tuples, copies and fusions of `at`, within the same loop."""
        for _ in range(100):
            loops = at.opcode in {"while", "conditional", "add", "dynamic-update-slice"}
            caller = self._callers.get(at.computation)
            outermost = caller is None or caller.opcode not in _CALLS
            if loops or (at.opcode == "parameter" and outermost):
                break
            before = self._step_back(at, index)
            if before is None:
                break
            at, index = before
        return at, index

    def _is_state(self, at: Instruction, index: tuple) -> bool:
        """Whether a value is the state of the loop it is in."""
        at, _ = self._look_through(at, index)
        caller = self._callers.get(at.computation)
        return at.opcode == "parameter" and getattr(caller, "opcode", "") == "while"

    def _find_named_input(self, at: Instruction) -> Instruction:
        """The nearest instruction with a name among those a value is computed from."""
        for _ in range(16):
            inside = [i for i in self._module.list_fused(at) if i.op_name]
            if at.op_name:
                break
            if inside:
                at = inside[-1]
            elif at.operands:
                at, _ = self._get_operand(at, 0)
            elif at.opcode == "parameter" and (given := self._find_passed(at, ())):
                at, _ = given
            else:
                break
        return at


def _computes(trail: list[Instruction]) -> bool:
    handed_on = {"parameter", "get-tuple-element", "tuple", "conditional", "while"}
    return bool(trail) and trail[-1].opcode not in _FILLS | handed_on


def split_scope(op_name: str) -> tuple[str, str]:
    """The user's own scopes and the primitive of an op name, JAX's wrapping removed.

    >>> split_scope("jit(step)/transpose(jvp(Block))/while/body/attention/dot_general")
    ('Block/attention', 'dot_general')
    >>> split_scope("jit(f)/while/body/vmap(bij,bjk->bik)/dot_general")
    ('bij,bjk->bik', 'dot_general')
    """
    *scopes, primitive = _split(op_name)
    words = []
    for place, part in enumerate(scopes):
        if place == 0 and part.startswith("jit("):
            continue  # the program's own name
        while wrapped := re.fullmatch(r"(?:jit|jvp|vmap|transpose|pjit)\((.*)\)", part):
            part = wrapped[1]
        if part and part not in _WRAPPING and not re.match(r"branch_\d+_fun", part):
            words.append(part)
    return "/".join(words), primitive


_WRAPPING = {
    *("while", "body", "cond", "checkpoint", "rematted_computation", "eval_jaxpr"),
    *("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "shard_map"),
    *("dynamic_update_index_in_dim", "dynamic_index_in_dim", "pjit", "remat"),
}


def _split(op_name: str) -> list[str]:
    """An op name's parts, split at the slashes outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(op_name):
        depth += (letter in "([") - (letter in ")]")
        if letter == "/" and depth == 0:
            parts.append(op_name[start:place])
            start = place + 1
    return [*parts, op_name[start:]]
