"""Weights of GemFilter's two passes: what is above the filter layer waits on the host.

weights = StagedWeights(params, gem)                       # takes params over
with weights.filter_prompts(model, prompts) as (params, short):
    generate(model, params, short.prompts(), max_new_tokens=64)
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jmem.kvcache.shorten import Shortened, pad_rows
from jmem.nn.stack import depth
from jmem.offload import (
    check_host,
    fetch_row,
    is_on_host,
    on_device,
    on_host,
    store_row,
)

if TYPE_CHECKING:
    from jmem.kvcache.gemfilter import GemFilter


def split(params: dict, layer: int) -> tuple[dict, dict]:
    """`params` as what the filter pass of `layer` reads, and all the rest.

    Both are trees like `params`, with fewer rows in a stack: early holds the embedding,
    `layer` whole blocks, and row `layer` of attention norm, q and k. NumPy arrays are
    cut without a copy; arrays on a device are copied once.

    Raises:
      ValueError: there is no such layer.
    """
    rows = _count_early_rows(params, layer)
    early = jax.tree.map(lambda leaf, n: leaf[:n], params["blocks"], rows)
    late = jax.tree.map(lambda leaf, n: leaf[n:], params["blocks"], rows)
    return {"embed": params["embed"], "blocks": early}, {"blocks": late} | _take_rest(
        params
    )


def _count_early_rows(params: dict, layer: int) -> dict:
    """Of each stack, how many rows the filter pass reads."""
    layers = depth(params["blocks"])
    if not 0 <= layer < layers:
        raise ValueError(f"split: layer={layer} is not one of the {layers} in params.")

    def rows(path, _) -> int:
        part, name = path[0].key, path[1].key
        voting = part == "attention_norm" or (part == "attention" and name in "qk")
        return layer + voting

    return jax.tree.map_with_path(rows, params["blocks"])


def _take_rest(params: dict) -> dict:
    """What is in no stack, but the embedding."""
    return {name: params[name] for name in params.keys() - {"embed", "blocks"}}


class StagedWeights:
    """Weights of which only the early part is on the device while a prompt is filtered.

    The late part lies in pinned host memory, always; for an answer it is copied to the
    device, and dropped there afterwards. The copy begins when the filter pass is done:
    during it both would be on the device, which is what this is to avoid.

    Memory: the filter pass beside the early part, or what answers beside all weights,
    whichever is more. On the way from one to the other a leaf is copied at a time, the
    largest first, and what is in no stack comes last, so that the device holds at most
    the whole weights and one leaf's early rows. For Llama-3.1-8B at layer 13 that is
    never more than the whole weights. The host holds the late part.
    """

    def __init__(self, params: dict, gem: "GemFilter"):
        """Takes `params` over, a leaf at a time: JAX arrays that are cut are deleted.

        They may be on the device or the host, or NumPy arrays, which stay as they are.

        Raises:
          ValueError: `params` have no layer `gem.layer`.
          HostMemoryError: the late part does not fit the host; nothing has been moved.
        """
        self.gem = gem
        self._rows = jax.tree.leaves(_count_early_rows(params, gem.layer))
        blocks, self._structure = jax.tree.flatten(params["blocks"])
        late_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(_take_rest(params)))
        for leaf, rows in zip(blocks, self._rows, strict=True):
            late_bytes += leaf.nbytes // len(leaf) * (len(leaf) - rows)
        check_host(late_bytes, "StagedWeights")
        self._embed = on_device(params["embed"])
        rest = on_host(_take_rest(params))
        jax.block_until_ready(rest)
        for leaf in jax.tree.leaves(_take_rest(params)):
            if isinstance(leaf, jax.Array) and not is_on_host(leaf):
                leaf.delete()
        late = []
        self._blocks: list[jax.Array] = []
        for leaf, rows in zip(blocks, self._rows, strict=True):
            self._blocks.append(on_device(_to_sliceable(leaf)[:rows]))
            late.append(on_host(_to_sliceable(leaf)[rows:]))
            jax.block_until_ready((self._blocks[-1], late[-1]))
            if isinstance(leaf, jax.Array) and len(late[-1]):
                leaf.delete()
        self.late = {"blocks": jax.tree.unflatten(self._structure, late)} | rest
        """All but the early part, in pinned host memory."""

    @property
    def early(self) -> dict:
        """What the filter pass reads, on the device; also the weights, while whole."""
        blocks = jax.tree.unflatten(self._structure, self._blocks)
        return {"embed": self._embed, "blocks": blocks}

    @contextlib.contextmanager
    def filter_prompts(
        self, model, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[dict, Shortened]]:
        """All weights, on the device, and the prompts that they are to answer.

        Behind the `with` the stacks and the head of those weights are deleted, and the
        early part is what it was, also if an error was raised.

        Raises:
          ValueError: no prompts, or what `shorten` refuses; nothing has been copied.
        """
        if not prompts:
            raise ValueError(
                "StagedWeights: prompts is empty; give at least one list of token ids."
            )
        short = self.gem.shorten(model, self.early, *pad_rows(prompts))
        rest = {}
        try:
            late = jax.tree.leaves(self.late["blocks"])
            for at in self._order_by_size()[::-1]:
                if len(late[at]):
                    self._replace(at, join_rows(self._blocks[at], late[at]))
            rest = on_device(_take_rest(self.late))
            yield self.early | rest, short
        finally:
            for leaf in jax.tree.leaves(rest):
                leaf.delete()
            for at in self._order_by_size():
                if len(self._blocks[at]) > self._rows[at]:
                    self._replace(at, self._blocks[at][: self._rows[at]])

    def _order_by_size(self) -> list[int]:
        """Places of the leaves, that of the smallest row first."""

        def row_bytes(at: int) -> int:
            leaf = self._blocks[at]
            return math.prod(leaf.shape[1:]) * leaf.dtype.itemsize

        return sorted(range(len(self._blocks)), key=row_bytes)

    def _replace(self, at: int, leaf: jax.Array) -> None:
        """Deletes the leaf at a place once the one that follows it is there."""
        jax.block_until_ready(leaf)
        self._blocks[at].delete()
        self._blocks[at] = leaf


def _to_sliceable(leaf: Any) -> Any:
    """A leaf that can be cut: what is on the host is cut there, by NumPy."""
    return np.asarray(leaf) if is_on_host(leaf) else leaf


@jax.jit
def join_rows(early: Shaped[Array, "R ..."], late: Shaped[Array, "S ..."]) -> jax.Array:
    """Rows on the device and rows on the host as one stack on the device.

    A row at a time into the result: joined at once, XLA would hold `late` as well.
    """
    shape = (len(early) + len(late), *early.shape[1:])
    start = (0,) * early.ndim
    whole = jnp.zeros(shape, early.dtype)
    whole = jax.lax.dynamic_update_slice(whole, early, start)

    def add(row, whole):
        return store_row(whole, len(early) + row, fetch_row(late, row))

    return jax.lax.fori_loop(0, len(late), add, whole)
