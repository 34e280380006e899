"""The adapters of several mixtures in one tree, whose leaves have J before other axes.

In a stacked leaf that is [L, J, ...]. Where a mixture has a lower rank or fewer experts
than the one that has most, its part is filled with zeros, which stay zeros.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jmem.finetune.adapters import check_fit
from jmem.finetune.mixlora.settings import Mixture
from jmem.nn import quantised
from jmem.nn.maps import MAPS, choose_maps, find_maps, insert, number_map
from jmem.program import format_path as path_of

MLP, ROUTER = "mlp/", "mlp/router"
"""Paths inside a block: of the maps that gain experts, and of what chooses those."""


def is_mixed(path: str) -> bool:
    """Whether the map at this path of a block gains experts, not one adapter."""
    return path.startswith(MLP)


def resize(adapters: dict, old: "Mixture | Storage", new: "Mixture | Storage") -> dict:
    """Adapters [L, ...] of the experts and rank of `old` with those of `new`.

    What is beyond them is cut off, what is lacking is zeros.
    """

    def leaf(path, value):
        name = path_of(path)
        sizes = [(old.experts, new.experts), (old.rank, new.rank)]
        if name.startswith(ROUTER):
            del sizes[1]
        elif not is_mixed(name):
            sizes[0] = 1, 1
        axis = value.ndim - (2 if name.endswith("lora_b") else 1)
        above, below = value.shape[:axis], value.shape[axis + 1 :]
        value = jnp.reshape(value, (*above, *(before for before, _ in sizes), *below))
        for at, (before, after) in enumerate(sizes, axis):
            if after < before:
                value = jax.lax.slice_in_dim(value, 0, after, axis=at)
            else:
                more = [(0, 0)] * value.ndim
                more[at] = 0, after - before
                value = jnp.pad(value, more)
        return value.reshape(*above, -1, *below)

    return jax.tree.map_with_path(leaf, adapters)


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
        own = self.mixtures[number]
        return resize(jax.tree.map(lambda a: a[:, number], adapters), self, own)

    def store(self, adapters: dict, number: int) -> dict:
        """What `take` is the inverse of: one mixture's adapters as they are stored."""
        return resize(adapters, self.mixtures[number], self)

    def draw(self, own: Mixture, blocks: dict, key: jax.Array) -> dict:
        """Fresh adapters of one mixture, of the highest rank and the most experts."""
        dtype = quantised.find_unpacked_dtype(blocks)
        maps, found = find_maps(blocks), {}
        for name in choose_maps(own.maps, maps, f"MixLora: maps={own.maps}"):
            kernel = quantised.describe_kernel(maps[name], dtype)
            layers, inputs, outputs = kernel.shape
            stream = jax.random.fold_in(key, number_map(name))
            width = own.rank * (own.experts if is_mixed(name) else 1)
            bound, shape = inputs**-0.5, (layers, inputs, width)
            a = jax.random.uniform(stream, shape, jnp.float32, -bound, bound)
            b = jnp.zeros((layers, width, outputs), jnp.float32)
            insert(found, name, {"lora_a": a, "lora_b": b})
        if "mlp" not in found:
            raise ValueError(
                f"MixLora: maps={own.maps} names no map of these blocks' MLPs, "
                f"{tuple(name for name in maps if is_mixed(name))}."
            )
        layers, width, _ = quantised.describe_kernel(maps["mlp/up"], dtype).shape
        shape = layers, width, own.experts
        draw = jax.random.normal(jax.random.fold_in(key, len(MAPS)), shape)
        insert(found, ROUTER, {"kernel": 0.02 * draw})
        return resize(found, own, self)

    def check(self, adapters: dict, blocks: dict, number: int) -> None:
        """Refuses adapters of other sizes or another base than mixture `number`."""
        own = self.mixtures[number]
        alone = Storage((own,))
        wanted = jax.eval_shape(
            lambda key: alone.draw(own, blocks, key), jax.random.key(0)
        )
        sizes = f"rank={own.rank}, experts={own.experts}, maps={own.maps}"
        check_fit("MixLora", adapters, wanted, sizes)
