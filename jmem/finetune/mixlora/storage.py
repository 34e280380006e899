"""Adapters of several mixtures as they lie side by side: one tree, J before all else.

What a mixture lacks in rank or experts, beside the one that has most, is zero, and
stays so.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jmem.finetune.mixlora.settings import Mixture
from jmem.nn import quantised
from jmem.nn.maps import (
    MAPS,
    choose_maps,
    find_dicts,
    find_maps,
    insert,
    number_map,
)
from jmem.program import by_key
from jmem.program import key as path_of

MLP, ROUTER = "mlp/", "mlp/router"
"""Paths inside a block: of the maps that gain experts, and of what chooses those."""


def is_mixed(path: str) -> bool:
    """Whether the map at this path of a block gains experts, not one adapter."""
    return path.startswith(MLP)


def find_adapters(tree: dict) -> dict[str, dict]:
    """The dicts of A and B, by the name of the map that they adapt."""
    return find_dicts(tree, lambda leaf: "lora_a" in leaf)


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form that the adapters of some mixtures are stored in."""

    mixtures: tuple[Mixture, ...]

    @property
    def rank(self) -> int:
        """Of the stored adapters: the highest."""
        return max(m.rank for m in self.mixtures)

    @property
    def experts(self) -> int:
        """Of the stored adapters: the most."""
        return max(m.experts for m in self.mixtures)

    def init(self, blocks: dict, key: jax.Array) -> dict:
        """Fresh adapters of all mixtures, float32, J before their own axes.

        A is uniform within 1/sqrt(in) and B zero, so the model is its base; routers are
        normal(0, 0.02).
        """
        keys = jax.random.split(key, len(self.mixtures))
        made = [self.draw(m, blocks, k) for m, k in zip(self.mixtures, keys)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *made)

    def take(self, adapters: dict, number: int) -> dict:
        """Mixture `number`'s own adapters: [L, ...], nothing padded."""
        return jax.tree.map_with_path(
            lambda path, leaf: self.cut(leaf, path_of(path), number), adapters
        )

    def draw(self, own: Mixture, blocks: dict, key: jax.Array) -> dict:
        """Fresh adapters of one mixture, of the highest rank and the most experts."""
        dtype = quantised.unpacked_dtype(blocks)
        maps, found = find_maps(blocks), {}
        for name in choose_maps(own.maps, maps, f"MixLora: maps={own.maps}"):
            layers, inputs, outputs = quantised.described_kernel(
                maps[name], dtype
            ).shape
            stream = jax.random.fold_in(key, number_map(name))
            experts = own.experts if is_mixed(name) else 1
            shape = layers, inputs, experts, own.rank
            bound = inputs**-0.5
            a = jax.random.uniform(stream, shape, jnp.float32, -bound, bound)
            b = jnp.zeros((layers, experts, own.rank, outputs), jnp.float32)
            pair = self._pad({"lora_a": a, "lora_b": b}, is_mixed(name))
            insert(found, name, pair)
        if "mlp" not in found:
            raise ValueError(
                f"MixLora: maps={own.maps} names no map of these blocks' MLPs, "
                f"{tuple(name for name in maps if is_mixed(name))}."
            )
        layers, width, _ = quantised.described_kernel(maps["mlp/up"], dtype).shape
        shape = layers, width, own.experts
        draw = jax.random.normal(jax.random.fold_in(key, len(MAPS)), shape)
        missing = self.experts - own.experts
        kernel = jnp.pad(0.02 * draw, ((0, 0), (0, 0), (0, missing)))
        insert(found, ROUTER, {"kernel": kernel})
        return found

    def _pad(self, pair: dict, mixed: bool) -> dict:
        """A [L, in, e, r] and B [L, e, r, out] with experts and ranks side by side."""
        a, b = pair["lora_a"], pair["lora_b"]
        experts = self.experts if mixed else 1
        more = (0, experts - a.shape[2]), (0, self.rank - a.shape[3])
        a = jnp.pad(a, ((0, 0), (0, 0), *more))
        b = jnp.pad(b, ((0, 0), *more, (0, 0)))
        return {
            "lora_a": a.reshape(*a.shape[:2], -1),
            "lora_b": b.reshape(b.shape[0], -1, b.shape[-1]),
        }

    def cut(self, leaf, path: str, number: int):
        """Mixture `number`'s own part of a stored leaf: [L, ...], nothing padded."""
        own, leaf = self.mixtures[number], leaf[:, number]
        if path.startswith(ROUTER):
            return leaf[..., : own.experts]
        experts = (self.experts, own.experts) if is_mixed(path) else (1, 1)
        if path.endswith("lora_a"):
            parts = leaf.reshape(*leaf.shape[:2], experts[0], self.rank)
            parts = parts[:, :, : experts[1], : own.rank]
            return parts.reshape(*leaf.shape[:2], -1)
        parts = leaf.reshape(leaf.shape[0], experts[0], self.rank, -1)
        parts = parts[:, : experts[1], : own.rank]
        return parts.reshape(leaf.shape[0], -1, leaf.shape[-1])

    def store(self, tree: dict, number: int) -> dict:
        """What `cut` is the inverse of, for a whole tree: [L, ...] as stored."""
        own, found = self.mixtures[number], {}
        tree = jax.tree.map(jnp.asarray, tree)
        missing = self.experts - own.experts
        kernel = jnp.pad(
            tree["mlp"]["router"]["kernel"], ((0, 0), (0, 0), (0, missing))
        )
        insert(found, ROUTER, {"kernel": kernel})
        for name, leaf in find_adapters(tree).items():
            experts = own.experts if is_mixed(name) else 1
            a, b = leaf["lora_a"], leaf["lora_b"]
            a = a.reshape(*a.shape[:2], experts, own.rank)
            b = b.reshape(b.shape[0], experts, own.rank, b.shape[-1])
            pair = {"lora_a": a, "lora_b": b}
            insert(found, name, self._pad(pair, is_mixed(name)))
        return found

    def check(self, adapters: dict, blocks: dict, number: int) -> None:
        """Refuses adapters of other sizes or another base than mixture `number`."""
        own = self.mixtures[number]
        alone = Storage((own,))
        wanted = jax.eval_shape(
            lambda key: alone.draw(own, blocks, key), jax.random.key(0)
        )
        given, needed = (
            {path: leaf.shape for path, leaf in by_key(tree).items()}
            for tree in (adapters, wanted)
        )
        for path in sorted(given.keys() | needed.keys()):
            if given.get(path) != needed.get(path):
                raise ValueError(
                    f"MixLora: adapters hold {path} with shape {given.get(path)}, but "
                    f"rank={own.rank}, experts={own.experts}, maps={own.maps} and this "
                    f"base need {needed.get(path)}. Make the mixture with the "
                    "adapters' own settings, over the base they were trained on."
                )
