"""What one change to a program would save, in bytes: computed, not guessed.

Each rule knows one kind of waste, finds its buffers, and says what would be left of
them. The saving is the difference of two peaks: XLA's plan as it is, and the same plan
replayed with those buffers shrunk. So a saving stops where another instant becomes the
worst, and two pieces of advice need not add up.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

from jmem.memory import kinds
from jmem.memory.breakdown import Breakdown, Row, shorten_source
from jmem.memory.hlo import Instruction, Module, Shape
from jmem.memory.timeline import count_live_bytes
from jmem.program import Program

WORTH = 0.01
"""Share of the peak below which a saving is not mentioned."""
LEAST = 2**20
"""Bytes below which a saving is not mentioned."""
CHUNK = 256
"""Tokens whose logits a chunked loss holds at a time (`jmem.models.next_token`)."""
STATE = {kinds.PARAMETERS, kinds.OPTIMIZER, kinds.KV_CACHE, kinds.STATE}


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change, and the device bytes it would take off the peak."""

    rule: str
    """What is wasteful, in two or three words."""
    saves_bytes: int
    text: str
    """What was found, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the rules look at: a compiled program, its buffers, the card's memory."""

    program: Program
    parts: Breakdown
    module: Module
    """The program as XLA compiled it."""
    compiler_bytes: int
    """Bytes of device memory that XLA was told the card has."""

    @property
    def device_bytes(self) -> int:
        """Bytes that the card must hold: the sum over all kinds."""
        return sum(self.parts.by_kind.values())

    def compute_saving(self, remaining: Callable[[Row], int]) -> int:
        """How far the peak falls if a buffer had `remaining(row)` bytes."""
        return self._compute_peak(lambda row: row.bytes) - self._compute_peak(remaining)

    def _compute_peak(self, held: Callable[[Row], int]) -> int:
        instants = len(self.parts.timeline)
        lives = ((*row.span(instants), held(row)) for row in self.parts.lives)
        return max(count_live_bytes(lives, instants))

    @property
    def temporaries(self) -> Iterator[Row]:
        """Every buffer that lives for a part of the program only."""
        return (row for row in self.parts.lives if row.born is not None)

    def compute_share(self, kind: str) -> float:
        """The share of the device bytes at the peak that a kind takes, from 0 to 1."""
        return self.parts.by_kind.get(kind, 0) / max(self.device_bytes, 1)

    def list_leaves(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Kind, path and dimensions of every array argument."""
        own = kinds.classify_arguments(self.program)
        for kind, (_, path, leaf) in zip(own, self.program.list_leaves()):
            yield kind, path, tuple(getattr(leaf, "shape", ()))


def advise(evidence: Evidence) -> tuple[Advice, ...]:
    """Every piece of advice that would save 1 % of the peak, the largest first."""
    floor = max(LEAST, WORTH * evidence.device_bytes)
    found = (
        Advice(name, saved, text)
        for name, rule in _RULES.items()
        for saved, text in [rule(evidence)]
        if saved >= floor
    )
    return tuple(sorted(found, key=lambda advice: -advice.saves_bytes))


def read_dimensions(shape: str) -> tuple[int, ...]:
    """The dimensions in the text of a row's shape.

    >>> read_dimensions("bf16[4,1024]"), read_dimensions("f32[]")
    ((4, 1024), ())
    """
    inside = shape[shape.index("[") + 1 : shape.index("]")] if "[" in shape else ""
    return tuple(int(n) for n in re.findall(r"\d+", inside))


def _find_not_donated(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for results that could take over an argument's memory.

    Found by shape, dtype and part of a mesh, of whatever kind the argument is. A
    product of an argument cannot be written over it, so that is not promised.
    """
    program, module = evidence.program, evidence.module
    names, leaves = program.name_arguments(), program.list_leaves()
    own = kinds.classify_arguments(program)
    arguments = _list_parameters(module)[-len(leaves) :] if leaves else []
    results = _list_results(module)
    saved: Counter[int] = Counter()
    # State first: whoever donates a batch cannot use it a second time.
    for n in sorted(range(len(leaves)), key=lambda n: own[n] not in STATE):
        position, argument = leaves[n][0], arguments[n]
        if position in program.donate or argument.shape.host:
            continue
        for result in results:
            shape, writers = result
            if shape == argument.shape and all(
                can_overwrite(module, writer, argument) for writer in writers
            ):
                results.remove(result)
                saved[position] += argument.shape.bytes
                break
    if not saved:
        return 0, ""
    positions = tuple(sorted(saved))
    which = " and ".join(repr(names[n]) for n in positions)
    donate = tuple(sorted({*program.donate, *positions}))
    return saved.total(), (
        f"results have the shapes of {which}, not donated; "
        f"donate={donate} lets them take over that memory."
    )


def _list_parameters(module: Module) -> list[Instruction]:
    entry = (module.instructions[id] for id in module.computations[module.entry])
    found = [i for i in entry if i.opcode == "parameter"]
    return sorted(found, key=lambda parameter: parameter.parameter)


def _list_results(module: Module) -> list[tuple[Shape, list[Instruction]]]:
    """Each result that reuses no argument: its shape, and all that writes its memory.

    Values that come before the result and are no more needed may lie there too.
    """
    root = module.instructions[module.roots[module.entry]]
    shapes = root.shape.parts or (root.shape,)
    found = []
    for block in module.allocations:
        if block.live_out and block.parameter is None and not block.host:
            buffers = [module.buffers[id] for id in block.buffers]
            writers = [module.instructions[buffer.instruction] for buffer in buffers]
            held = {w.shape.at(b.index) for w, b in zip(writers, buffers)}
            found += [(shape, writers) for shape in shapes if shape in held][:1]
    return found


def can_overwrite(module: Module, writer: Instruction, argument: Instruction) -> bool:
    """Whether a result can be written over an argument that it is computed from.

    It cannot where one element of the result reads others of the argument: a matrix
    product, a transposition, a sum.
    """
    readers = _follow(module, argument)
    if writer.id not in {reader.id for reader in readers}:
        return True
    if writer.opcode != "fusion":
        return writer.opcode not in _MOVING
    held = {argument.id} | {i.id for i in readers if i.opcode in _VIEWS}
    inside = list(module.list_fused(writer))
    spread = {
        i.id
        for i in inside
        if i.opcode == "parameter" and writer.operands[i.parameter] in held
    }
    for instruction in inside:  # operands come before what reads them
        if spread & set(instruction.operands):
            if instruction.opcode in _MOVING:
                return False
            spread.add(instruction.id)
    return True


def _follow(module: Module, value: Instruction) -> list[Instruction]:
    """What reads a value, also through what only looks at it otherwise."""
    found = []
    for reader in module.users.get(value.id, ()):
        found.append(reader)
        if reader.opcode in _VIEWS:
            found += _follow(module, reader)
    return found


_VIEWS = {"bitcast", "get-tuple-element", "tuple", "optimization-barrier"}
_MOVING = {
    *("dot", "convolution", "custom-call", "transpose", "reduce", "reverse", "sort"),
    *("gather", "scatter", "slice", "dynamic-slice", "pad", "concatenate"),
    *("reduce-window", "select-and-scatter", "fft", "cholesky", "triangular-solve"),
}
"""Operations whose result has elements elsewhere than their operand."""


def _find_rebuilt_cache(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for a donated cache that a loop builds a second time."""
    program = evidence.program
    names = {program.name_arguments()[n] for n in program.donate}
    cache = [row for row in evidence.parts.lives if row.kind == kinds.KV_CACHE]
    held = [r for r in cache if r.born is None and r.name.split("/")[0] in names]
    shapes = {row.shape for row in held}
    copies = [row for row in cache if row.born is not None and row.shape in shapes]
    if not copies:
        return 0, ""
    name = held[0].name.split("/")[0]
    return evidence.compute_saving(_drop(copies)), (
        f"{name!r} is donated, but built anew{_format_place(copies)}; carry it "
        "through the scan and update it in place, instead of scanning over it."
    )


def _find_widened(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for 16-bit values held as float32.

    Sums of gradients are left out, since they need it.
    """
    wide = [
        row
        for row in evidence.temporaries
        if row.cast_from and row.kind not in (kinds.GRADIENTS, kinds.OPTIMIZER)
    ]
    if not wide:
        return 0, ""
    halves = {row: row.bytes // 2 for row in wide}
    return evidence.compute_saving(lambda row: halves.get(row, row.bytes)), (
        f"values computed in {max(wide, key=_get_size).cast_from} are held as float32"
        f"{_format_place(wide)}; keep them narrow, and widen inside the operation "
        "that needs it."
    )


def _find_scores(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for attention scores [.., T, S] that exist in memory."""
    sizes = find_attention(evidence.module)
    scores = [
        row
        for row in evidence.temporaries
        if math.prod(read_dimensions(row.shape)) in sizes
        and _find_length(read_dimensions(row.shape))
        and not _is_parameter(evidence, row)
    ]
    if not scores:
        return 0, ""
    return evidence.compute_saving(_drop(scores)), (
        f"attention scores {max(scores, key=_get_size).shape} are "
        f"materialised{_format_place(scores)}; use flash attention (cuDNN for 16-bit "
        "inputs), or attend in chunks."
    )


def find_attention(module: Module) -> set[int]:
    """Elements of each array of attention weights that a program computes.

    Attention is a softmax over a square, and a product with what comes out: so there
    are an exponential, a reduction of one of its dimensions, and a product, all outside
    of the backward pass. Other large squares are not attention.
    """
    forward = [
        i for i in module.instructions.values() if not kinds.is_backward(i.op_name)
    ]
    read = {
        i.id: [math.prod(module.instructions[id].shape.dims) for id in i.operands]
        for i in forward
    }
    products = {
        size
        for i in forward
        if i.opcode in ("dot", "custom-call")
        for size in read[i.id]
    }
    reduced = {
        (size, math.prod(part.dims))
        for i in forward
        if i.opcode == "reduce"
        for part in i.shape.parts or (i.shape,)
        for size in read[i.id]
    }
    found = set()
    for instruction in forward:
        dims = instruction.shape.dims
        size, length = math.prod(dims), _find_length(dims)
        if instruction.opcode == "exponential" and length and size in products:
            found |= {size} if (size, size // length) in reduced else set()
    return found


def _find_length(dims: tuple[int, ...]) -> int:
    """The largest size of 128 or more that two dimensions have; 0 without one."""
    return max((n for n in dims if n >= 128 and dims.count(n) > 1), default=0)


def _find_logits(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for logits of more tokens than a chunk has."""
    vocabularies = {
        max(shape)
        for kind, path, shape in evidence.list_leaves()
        if kind == kinds.PARAMETERS and shape and _TABLE.search(path)
    }
    tokens: dict[Row, int] = {}
    for row in evidence.temporaries:
        shape = read_dimensions(row.shape)
        for size in vocabularies & set(shape):
            others = list(shape)
            others.remove(size)
            count = math.prod(others)
            if count > CHUNK and not _is_parameter(evidence, row):
                tokens[row] = count
    if not tokens:
        return 0, ""

    def remaining(row: Row) -> int:
        return row.bytes * CHUNK // tokens[row] if row in tokens else row.bytes

    return evidence.compute_saving(remaining), (
        f"logits of {max(tokens.values()):,} tokens exist at once"
        f"{_format_place(list(tokens))}; a loss over chunks of {CHUNK} tokens "
        "(jmem.models.next_token.head_loss) never makes them all."
    )


_TABLE = re.compile(r"embed|wte|lm_head|head|vocab", re.IGNORECASE)


def _find_saved(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for saved activations that are most of the peak."""
    if evidence.compute_share(kinds.SAVED) <= 0.5:
        return 0, ""
    saved = [row for row in evidence.parts.lives if row.kind == kinds.SAVED]
    return evidence.compute_saving(_drop(saved)), (
        f"activations saved for the backward pass are "
        f"{evidence.compute_share(kinds.SAVED):.0%} of the peak{_format_place(saved)}; "
        "jax.checkpoint around a block keeps its input only. At most this much is "
        "saved: measure it with remat 'dots' and 'block'."
    )


def _find_fragmentation(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for holes in the block of temporaries."""
    if evidence.compute_share(kinds.FRAGMENTATION) <= 0.05:
        return 0, ""
    return evidence.parts.by_kind[kinds.FRAGMENTATION], (
        "holes and alignment in XLA's block of temporaries; buffers of like size and "
        "life (equal chunks, a scan instead of a loop in Python) pack better."
    )


def _find_constants(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for arrays that are compiled into the program."""
    return evidence.parts.constant_bytes, (
        "constants are compiled in; pass large arrays as arguments instead of closing "
        "over them, and programs share them."
    )


def _find_optimizer(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for moments of more than twice the weights' bytes."""
    held = evidence.parts.by_kind
    if held.get(kinds.OPTIMIZER, 0) <= 2 * held.get(kinds.PARAMETERS, 0):
        return 0, ""
    moments = {
        row: row.bytes // 4 + row.bytes // 256
        for row in evidence.parts.lives
        if row.kind == kinds.OPTIMIZER and row.born is None and "f32" in row.shape
    }
    return evidence.compute_saving(lambda row: moments.get(row, row.bytes)), (
        "optimizer state is more than twice the weights; 8-bit moments with a scale "
        "for 64 values save this much, moments in host memory more."
    )


def _find_arguments(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for arguments that leave no memory to compute in."""
    fixed = sum(row.bytes for row in evidence.parts.lives if row.born is None)
    beyond = fixed - round(0.8 * evidence.compiler_bytes)
    return max(beyond, 0), (
        "arguments and results alone exceed what XLA plans with, 0.8 of the card; "
        "rematerialisation cannot help, they must shrink, move to the host or be "
        "divided over more GPUs."
    )


def _find_workspace(evidence: Evidence) -> tuple[int, str]:
    """(bytes saved, advice) for scratch of matmuls that are split over k."""
    if evidence.compute_share(kinds.WORKSPACE) <= 0.03:
        return 0, ""
    scratch = [row for row in evidence.temporaries if row.kind == kinds.WORKSPACE]
    return evidence.compute_saving(_drop(scratch)), (
        "scratch of library calls and of matmuls split over their contraction; the "
        "card's autotuner may choose others, so confirm on the device."
    )


_RULES: dict[str, Callable[[Evidence], tuple[int, str]]] = {
    "not donated": _find_not_donated,
    "rebuilt cache": _find_rebuilt_cache,
    "widened values": _find_widened,
    "attention scores": _find_scores,
    "logits": _find_logits,
    "saved activations": _find_saved,
    "fragmentation": _find_fragmentation,
    "constants": _find_constants,
    "optimizer state": _find_optimizer,
    "arguments": _find_arguments,
    "split scratch": _find_workspace,
}


def _drop(gone: list[Row]) -> Callable[[Row], int]:
    rows = set(gone)
    return lambda row: 0 if row in rows else row.bytes


def _is_parameter(evidence: Evidence, row: Row) -> bool:
    """Whether a value has a parameter's dimensions: its gradient, copy or update."""
    shape = sorted(read_dimensions(row.shape))
    state = (s for kind, _, s in evidence.list_leaves() if kind in STATE)
    return any(sorted(dims) == shape for dims in state)


def _get_size(row: Row) -> int:
    return row.bytes


def _format_place(rows: list[Row]) -> str:
    """The line that made the largest, as " at folder/file:line"."""
    largest = max((row for row in rows if row.source), key=_get_size, default=None)
    return f" at {shorten_source(largest.source)}" if largest else ""
