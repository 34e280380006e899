"""The linear maps of the decoder's blocks, as PEFT names the modules that compute them.

A module computes one map, or GPT-2's `c_attn` three: q, k and v side by side. It has
one adapter a layer, or as many as a mixture has experts.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from jmem.checkpoints.names import list_leaves
from jmem.models.config import DecoderConfig

_PREFIX = "base_model.model."
"""PEFT's two wrappers around a model."""


class Stack(NamedTuple):
    """Tensors of one shape that lie one by one in a file and stacked in our tree."""

    leaf: str
    """Name of the leaf in our tree: "lora_a"."""
    shape: tuple[int, ...]
    """Shape of each tensor, as torch stores it."""
    names: tuple[str, ...]
    """Their names, layer by layer, and in a layer expert by expert."""
    because: str
    """The setting that, with the base, demands them, for error messages: "r=4"."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of every block that computes linear maps [in, out]."""

    paths: tuple[str, ...]
    """Its maps in the tree of a block, in the order of its outputs: "attention/q"."""
    shape: tuple[int, ...]
    """[in, out] of each of them."""
    names: tuple[str, ...]
    """Hugging Face's, layer by layer: "model.layers.0.self_attn.q_proj". Where there
    are experts, each has one: all of a layer, then those of the next."""
    transposed: bool
    """Stored [out, in], as a torch Linear is; GPT-2's Conv1D is stored [in, out]."""
    prefix: str = _PREFIX
    """What a file puts before the names."""
    experts: int = 1
    """Adapters a layer, which lie side by side in the tree."""

    @property
    def short_name(self) -> str:
        """The last part of its name: "q_proj"."""
        return self.names[0].rpartition(".")[2]

    def list_stacks(self, rank: int, dora: bool = False) -> Iterator[Stack]:
        """The tensors of A, B and, of DoRA, magnitude, of adapters of this rank."""
        inputs, outputs = self.shape[0], len(self.paths) * self.shape[1]
        for half, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
            names = tuple(_name_tensor(self.prefix + name, half) for name in self.names)
            yield Stack(f"lora_{half}", shape, names, f"r={rank}")
        if dora:
            names = tuple(
                f"{self.prefix}{name}.lora_magnitude_vector" for name in self.names
            )
            yield Stack("magnitude", (outputs,), names, "use_dora")


def find_modules(config: DecoderConfig) -> tuple[Module, ...]:
    """The modules of the decoder's blocks that compute linear maps."""
    suffix = "/kernel"
    found: dict[tuple[str, ...], Module] = {}
    for leaf in list_leaves(config):
        if not leaf.stacked or not leaf.path.endswith(suffix):
            continue
        stored = leaf.list_names("huggingface", config.layers)
        names = tuple(name.removesuffix(".weight") for name in stored)
        path = leaf.path.removeprefix("blocks/").removesuffix(suffix)
        before = found[names].paths if names in found else ()
        paths = (*before, path)
        found[names] = Module(paths, leaf.shape, names, leaf.transposed)
    return tuple(found.values())


def describe_targets(known: Iterable[Module]) -> str:
    """For error messages: what a target may name, with its names in this decoder."""
    names = dict.fromkeys(one.short_name for one in known)
    return "linear maps of this decoder's blocks, such as " + ", ".join(names)


def holds(tensors: Container[str], name: str) -> bool:
    """Whether A or B of the module `name` is among the tensors."""
    return any(_name_tensor(_PREFIX + name, half) in tensors for half in "ab")


def choose_target(one: Module, others: Iterable[Module]) -> str:
    """The shortest name of a module that names none of `others`."""
    taken = set().union(*(list_suffixes(other.names[0]) for other in others))
    return min(list_suffixes(one.names[0]) - taken, key=len)


def list_suffixes(name: str) -> set[str]:
    """The names by which PEFT knows a module: whole, or from any dot on."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _name_tensor(name: str, half: str) -> str:
    return f"{name}.lora_{half.upper()}.weight"
