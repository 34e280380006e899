"""A warpgroup's 128 threads that run PTX without a GPU: the instructions of one kernel.

Straight code only, over registers of 32 bits. What is loaded must have been written.
"""

import functools
import operator
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

_PACKED = {"bf16x2": np.dtype(jnp.bfloat16), "f16x2": np.dtype(np.float16)}
_PARTS = re.compile(r"(?:@(!?)(\w+) )?(\S+) (.*)")


def run(text: str, inputs: list, outputs: int, memory: np.ndarray) -> np.ndarray:
    """The first `outputs` operands of PTX, uint32 [outputs, 128], from the others.

    `memory` is shared memory, uint8.
    """
    registers = {f"${outputs + i}": _word(given) for i, given in enumerate(inputs)}
    for statement in text.strip("{}\n").replace("\n", " ").split(";"):
        statement = statement.strip()
        if statement and not statement.startswith(".reg"):
            _execute(statement, registers, memory)
    return np.stack([registers[f"${i}"] for i in range(outputs)])


def _word(value) -> Any:
    return np.broadcast_to(np.asarray(value).astype(np.int64) % 2**32, (128,)).copy()


def _add(parts) -> Any:
    return functools.reduce(operator.add, parts)


def _execute(statement: str, registers: dict, memory: Any) -> None:
    found = _PARTS.fullmatch(statement)
    assert found, statement
    negated, guard, operation, rest = found.groups()
    to, *operands = (part.strip() for part in rest.split(","))
    active = np.ones(128, bool)
    if guard:
        active = registers[guard] != bool(negated)
    if operation.startswith("ld.shared."):
        result = _load(operation, operands[0], registers, memory, active)
    else:
        values = [
            registers[x] if x in registers else _word(int(x, 0)) for x in operands
        ]
        result = _compute(operation, *values)
    # A register that nothing was written to holds what no result is.
    before = registers.get(to, np.full(128, 0xDEADBEEF, result.dtype))
    registers[to] = np.where(active, result, before)


def _load(operation, operand, registers, memory, active) -> Any:
    base, _, offset = operand.strip("[]").partition("+")
    size = int(operation[-2:].strip("u")) // 8
    at = np.where(active, registers[base] + int(offset or 0), 0)
    assert (at % size == 0).all(), f"{operation} {operand} is not aligned"
    return _add(memory[at + i].astype(np.int64) << 8 * i for i in range(size))


def _compute(operation: str, a: Any, b: Any = 0, c: Any = 0, table: Any = 0) -> Any:
    match operation.split("."):
        case ["mov", _]:
            return a
        case ["add", "u32"]:
            result = a + b
        case ["sub", "u32"]:
            result = a - b
        case ["and", _]:
            result = a & b
        case ["or", _]:
            result = a | b
        case ["xor", _]:
            result = a ^ b
        case ["shl", _]:
            result = a << b
        case ["shr", _]:
            result = a >> b
        case ["mad", "lo", _]:
            result = a * b + c
        case ["lop3", _]:
            assert (table == 0xEA).all(), "only (a & b) | c"
            result = a & b | c
        case ["popc", _]:
            result = np.bitwise_count(a).astype(np.int64)
        case ["setp", "ne", _]:
            return a != b
        case ["dp4a", "u32", "u32"]:
            of = [(a >> 8 * i & 255) * (b >> 8 * i & 255) for i in range(4)]
            result = _add(of) + c
        case ["prmt", _]:
            both, chosen = a | b << 32, [c >> 4 * i & 15 for i in range(4)]
            assert all((one < 8).all() for one in chosen)
            result = _add(
                (both >> 8 * one & 255) << 8 * i for i, one in enumerate(chosen)
            )
        case ["shf", "r", mode, _]:
            by = c % 32 if mode == "wrap" else np.minimum(c, 32)
            low = np.where(by > 0, b << np.where(by > 0, 32 - by, 0), 0)
            result = np.where(by == 32, b, a >> by | low)
        case ["add" | "sub" as which, "rn", kind]:
            left, right = (
                x.astype(np.uint32)[:, None].view(_PACKED[kind]) for x in (a, b)
            )
            of = left + right if which == "add" else left - right
            result = of.view(np.uint32)[:, 0].astype(np.int64)
        case _:
            raise NotImplementedError(operation)
    return result & 0xFFFFFFFF
