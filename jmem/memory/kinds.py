"""The kinds a byte of device memory can be, and how a buffer's kind is told.

Arguments have the kind that their label states, or that its words say. A temporary has
a kind by where its value was computed: JAX writes `jvp` into the scope of a
differentiated forward pass, `transpose(jvp)` into that of the backward pass,
`rematted_computation` into what a checkpoint computes again. Hand-written backward
passes over `jax.vjp` carry the same marks, in one loop body.
"""

import re
from collections.abc import Mapping

from jmem.memory.hlo import Instruction, Module
from jmem.memory.naming import Origin
from jmem.program import Program

PARAMETERS = "parameters"
"""Weights, and copies or slices of them."""
OPTIMIZER = "optimizer"
"""Moments and what the update computes."""
GRADIENTS = "gradients"
"""What the backward pass computes, of weights and activations."""
SAVED = "saved activations"
"""Computed forward, kept for the backward pass."""
RECOMPUTATION = "recomputation"
"""Forward values computed a second time."""
KV_CACHE = "kv cache"
"""Keys and values of earlier tokens, and copies of the cache."""
STATE = "state"
"""What else a step keeps: a map, poses, a latent grid, running statistics."""
BATCH = "batch"
"""Inputs."""
OUTPUTS = "outputs"
"""Results that reuse no argument's memory."""
CONSTANTS = "constants"
"""Values compiled in: closed-over arrays, literals."""
WORKSPACE = "workspace"
"""Scratch of library calls and split matmuls."""
COLLECTIVES = "collectives"
"""Results of communication between GPUs."""
OTHER_ARGUMENTS = "other arguments"
"""Arguments without a label, or whose label says no kind."""
OTHER = "other temporaries"
"""Everything else."""
FRAGMENTATION = "fragmentation"
"""Holes and alignment in the temporary block."""

KINDS = (
    *(PARAMETERS, OPTIMIZER, KV_CACHE, STATE, BATCH, OTHER_ARGUMENTS, OUTPUTS),
    *(CONSTANTS, SAVED, RECOMPUTATION, GRADIENTS, COLLECTIVES, WORKSPACE, OTHER),
    FRAGMENTATION,
)
"""Every kind, what outlives the program first."""

_WORDS = {  # the first that has one of the label's words
    OPTIMIZER: "optimizer optimiser opt adam adamw moments momentum mu nu",
    KV_CACHE: "cache caches kvcache",
    PARAMETERS: "weights params parameters lora adapter adapters variables model",
    BATCH: "batch batches tokens inputs targets images x y",
}


def classify_label(label: str | None) -> str:
    """The kind of memory that the words of an argument's label mean.

    >>> list(map(classify_label, ("adam m", "kv cache", "weights", "codes")))
    ['optimizer', 'kv cache', 'parameters', 'other arguments']
    """
    said = set(re.split(r"[\s_./-]+", (label or "").lower()))
    for kind, words in _WORDS.items():
        if said & set(words.split()):
            return kind
    return OTHER_ARGUMENTS


def classify_arguments(program: Program) -> list[str]:
    """The kind of every flattened argument: what its label states, or its words say."""
    labels = zip(program.label_leaves(), program.classify_leaves())
    return [stated or classify_label(label) for label, stated in labels]


_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    r"collective-broadcast|ragged-all-to-all|send|recv)(-start|-done)?$"
)
_TRANSPOSED = re.compile(r"\btranspose\(")
_JVP = re.compile(r"\bjvp\(")
_AGAIN = re.compile(r"\brematted_computation\b")


def is_backward(op_name: str) -> bool:
    """Whether an operation is of a backward pass, values computed again included."""
    return bool(_TRANSPOSED.search(op_name))


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction moves data between GPUs."""
    return bool(_COLLECTIVE.match(instruction.opcode))


def is_handle(instruction: Instruction, index: tuple[int, ...]) -> bool:
    """Whether a part of an asynchronous start is its bookkeeping, a few bytes."""
    return instruction.opcode.endswith("-start") and index[:1] >= (2,)


class Classifier:
    """Tells the kind of a program's temporaries.

    Args:
      module: the compiled program.
      arguments: the kind of every flattened argument.
      backward: the events (first, last) between which a backward pass computes; None
        when the program has none.
    """

    def __init__(
        self,
        module: Module,
        arguments: Mapping[int | None, str],
        backward: tuple[int, int] | None,
    ):
        self._module = module
        self._arguments = arguments
        self._backward = backward
        entry = [module.instructions[i] for i in module.computations[module.entry]]
        self._caches = {
            instruction.shape
            for instruction in entry
            if instruction.opcode == "parameter"
            and arguments.get(instruction.parameter) == KV_CACHE
        }
        self._transposing = {
            instruction.computation
            for instruction in module.instructions.values()
            if is_backward(instruction.op_name)
            and not _AGAIN.search(instruction.op_name)
        }

    def classify(
        self,
        holder: Instruction,
        index: tuple[int, ...],
        origin: Origin,
        born: int,
        dies: int,
    ) -> str:
        """The kind of the value that part `index` of `holder`'s result is."""
        name = origin.op_name
        if is_handle(holder, index):
            return OTHER
        if is_collective(origin.instruction) or is_collective(holder):
            return COLLECTIVES
        if self._is_scratch(holder, index):
            return WORKSPACE
        if holder.shape.at(index) in self._caches:
            return KV_CACHE
        for argument in (origin.updates, origin.argument):
            if argument is not None:
                return self._arguments.get(argument, CONSTANTS)
        if _AGAIN.search(name):
            return RECOMPUTATION
        if is_backward(name):
            return GRADIENTS
        if self._backward is None or origin.fill:
            return OTHER
        first, last = self._backward
        if born < first:
            return SAVED if dies > first else OTHER
        if _JVP.search(name):
            # Forward scopes in a loop body that also transposes: a hand-written
            # backward pass over jax.vjp. Elsewhere, a second forward pass.
            again = origin.computation in self._transposing - {self._module.entry}
            return RECOMPUTATION if again else SAVED
        if born > last:
            return OPTIMIZER
        return SAVED if origin.stack else OTHER  # a row of what a loop had saved

    def _is_scratch(self, holder: Instruction, index: tuple[int, ...]) -> bool:
        """Whether it is a library call's scratch, or parts of a matmul split over k."""
        if holder.opcode == "custom-call":
            last = bool(index) and index[0] == len(holder.shape.parts) - 1
            return last and holder.shape.at(index).dtype in {"u8", "s8"}
        if index and holder.opcode == "fusion" and self._is_call_scratch(holder, index):
            return True
        if not holder.name.startswith("gemm_fusion"):
            return False
        readers = self._module.users.get(holder.id, [])
        readers = [u for r in readers for u in self._skip_bitcasts(r)]
        inside = [i for reader in readers for i in self._module.list_fused(reader)]
        return any(
            instruction.opcode == "reduce"
            and _SPLIT.search(self._module.names.get(instruction.called[0], ""))
            for instruction in [*readers, *inside]
        )

    def _is_call_scratch(self, fusion: Instruction, index: tuple[int, ...]) -> bool:
        """Whether it is scratch of a call that XLA fused with slices around it."""
        shape = fusion.shape.at(index)
        return shape.dtype in {"u8", "s8"} and any(
            call.opcode == "custom-call" and call.shape.parts[-1:] == (shape,)
            for call in self._module.list_fused(fusion)
        )

    def _skip_bitcasts(self, reader: Instruction) -> list[Instruction]:
        if reader.opcode not in {"bitcast", "get-tuple-element"}:
            return [reader]
        return self._module.users.get(reader.id, [])


_SPLIT = re.compile(r"reduce_sub_computation")
