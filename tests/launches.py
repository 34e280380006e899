"""What a compiled program launches and what it only copies, read from XLA's text.

    text = program.compile(target).as_text()
    count_copied_bytes(text), [launch.name for launch in list_launches(text)]

A launch copies if it computes nothing: it moves rows, or brings them into another
layout or type. Bytes are those it writes, times the turns of the loops around it, which
XLA notes where it knows them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
WIDTHS |= {"f32": 4, "s64": 8, "u64": 8}
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}
"""Instructions that launch nothing, besides the ends of what was begun before."""
MOVES = {"dynamic-slice", "slice", "copy", "transpose", "reshape", "convert"}
PLACES = {"add", "subtract", "multiply", "compare", "select", "clamp", "minimum"}
PLACES |= {"maximum"}
"""What the place of a row is computed with."""
RENAMES = {"bitcast", "get-tuple-element", "copy-done", "fusion-done", "async-done"}
RENAMES |= {"dynamic-slice-done"}
UNKNOWN = 4
"""Turns of a loop of which XLA knows no number: the tiles of a fused step."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    text: str

    def list_called(self, field: str) -> list[str]:
        """Names of the computations in a field."""
        found = re.search(field + r"=(\{[^}]*\}|\S+)", self.text)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def count_bytes(self) -> int:
        """Of the result; of something begun here, of what it will give."""
        shape = re.sub(r"^\(\(.*?\), ", "", self.shape)
        if self.opcode == "copy-start":  # (result, source, context)
            shape = shape.split("}")[0]
        return sum(
            WIDTHS.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n)
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )

    def find_op_name(self) -> str:
        """What it was in the program."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else self.name

    def count_turns(self) -> int | None:
        """Of a loop; None where XLA does not know."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.text)
        return int(found[1]) if found else None


class Listing:
    """A compiled program's computations, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.named: dict[str, Instruction] = {}
        name = ""
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
                name = found[2]
                self.computations[name] = []
                if found[1]:
                    self.entry = name
            elif found := re.match(
                r" +(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line
            ):
                given = found[1], found[2], found[3], line
                own = self.named[found[1]] = Instruction(*given)
                self.computations[name].append(own)

    def walk(
        self, taken: int | None, name: str = "", turns: int = 1
    ) -> Iterator[tuple[Instruction, int]]:
        """All that runs, and how often; branches `taken` times in all, if that is said.

        Else both branches of a conditional count whenever it is met.
        """
        for own in self.computations[name or self.entry]:
            yield own, turns
            if own.opcode == "while":
                inner = turns * (own.count_turns() or UNKNOWN)
                [body] = own.list_called("body")
                yield from self.walk(taken, body, inner)
            elif own.opcode == "conditional":
                for field in ("branch", "true", "false"):
                    for branch in own.list_called(field + "_computations?"):
                        yield from self.walk(taken, branch, taken or turns)
            elif own.opcode == "call":
                [called] = own.list_called("to_apply")
                yield from self.walk(taken, called, turns)

    def copies(self, own: Instruction) -> bool:
        """Whether an instruction launches what only copies."""
        if own.opcode.removesuffix("-start") in ("copy", "dynamic-slice", "transpose"):
            return True
        if own.opcode not in ("fusion", "fusion-start"):
            return False
        [name] = own.list_called("calls")
        inner = {other.opcode for other in self.computations[name]}
        return bool(inner & MOVES) and inner <= MOVES | PLACES | FREE

    def multiplies(self, own: Instruction) -> bool:
        """Whether an instruction is a matrix product, or holds one."""
        if own.opcode == "custom-call":
            return "matmul" in own.text or "gemm" in own.text
        if own.opcode not in ("fusion", "fusion-start"):
            return own.opcode == "dot"
        [name] = own.list_called("calls")
        return any(map(self.multiplies, self.computations[name]))

    def slices(self, own: Instruction, layers: int) -> bool:
        """Whether a copy is of a row of a stack."""
        inner = [own]
        if own.opcode.startswith("fusion"):
            inner = self.computations[own.list_called("calls")[0]]
        rows = (other for other in inner if other.opcode.startswith("dynamic-slice"))
        return any(
            re.search(rf"\[{layers},", source.shape)
            for row in rows
            for _, source in self.list_operands(row)
        )

    def list_operands(self, own: Instruction) -> list[tuple[Instruction, Instruction]]:
        """What an instruction reads, and what made it, under whatever name it goes."""
        given = own.text.partition(f" {own.opcode}(")[2].partition(")")[0]
        return [
            (self.named[name], self._find_source(self.named[name]))
            for name in re.findall(r"%([\w.\-]+)", given)
        ]

    def _find_source(self, own: Instruction) -> Instruction:
        while own.opcode in RENAMES:
            [name] = re.findall(rf" {own.opcode}\(%([\w.\-]+)", own.text)
            own = self.named[name]
        return own


def list_copies(
    text: str, taken: int | None = None, least: int = 10**6
) -> list[tuple[int, int, Instruction]]:
    """(bytes, turns, launch) of the launches that copy `least` bytes or more a turn.

    `taken` as `Listing.walk`.
    """
    program = Listing(text)
    found = [
        (own.count_bytes(), turns, own)
        for own, turns in program.walk(taken)
        if program.copies(own)
    ]
    return [(size, turns, own) for size, turns, own in found if size >= least]


def count_copied_bytes(text: str, taken: int | None = None) -> int:
    """Bytes that a program's launches only copy, of those that copy 1 MB or more."""
    return sum(size * turns for size, turns, _ in list_copies(text, taken))


def list_sliced_operands(text: str, layers: int, least: int = 10**6) -> list[str]:
    """Products that read a layer's row of a stack of `layers` from a copy of it.

    Each as "the product's name in the program <- the copy's shape".
    """
    listing, found = Listing(text), []
    for own, _ in listing.walk(None):
        for read, source in (
            listing.list_operands(own) if listing.multiplies(own) else ()
        ):
            copied = listing.copies(source) and listing.slices(source, layers)
            if copied and read.count_bytes() >= least:
                found.append(f"{own.find_op_name()} <- {read.shape}")
    return found


def list_launches(text: str, layers: int) -> list[Instruction]:
    """What the body of the loop of `layers` turns launches, its inner loops once."""
    program = Listing(text)
    loops = [
        own
        for own, _ in program.walk(None)
        if own.opcode == "while" and own.count_turns() == layers
    ]
    [name] = loops[-1].list_called("body")
    return [
        own
        for own in program.computations[name]
        if own.opcode not in FREE and not own.opcode.endswith("-done")
    ]
