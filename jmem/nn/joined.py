"""Linear maps that read one input, side by side in one kernel, for inference.

Idea     q, k and v read the same x, and so do gate and up: side by side they are one
         product instead of three, and one instead of two. A layer that decodes launches
         15 kernels instead of 18.
Memory   The same bytes. `join_maps` of arrays holds both forms of a map for a moment;
         `jmem.checkpoints`' `params(joined=True)` never does.
Exact    A column of a product is what it was, but for the order of its sum, which a
         library may choose by the size of the whole.
Differs  Packed, divided and adapted maps stay as they are. Fine-tuners name maps as
         they are apart; weights are exported apart.
See      jmem/nn/attention.py, jmem/nn/mlp.py, tests/nn/test_joined.py
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jmem.nn.maps import JOINED, find_maps


def join_maps(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Stacked blocks with the plain maps of `JOINED` side by side, [L, in, out].

    Plain is a kernel, with or without a bias, whole on one device.
    """
    maps = find_maps(blocks)
    plain = {name: leaf for name, leaf in maps.items() if _is_plain(leaf)}
    joined, gone = {}, set()
    for name, parts in find_joined(plain).items():
        leaves = [plain[part] for part in parts]
        joined[name] = jax.tree.map(lambda *own: jnp.concatenate(own, -1), *leaves)
        gone |= set(parts)
    return _replace(blocks, gone, joined)


def split_maps(blocks: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The reverse of `join_maps`, for blocks of a decoder's `config`."""
    widths = {
        "attention/qkv": (config.heads, config.kv_heads, config.kv_heads),
        "mlp/gate_up": (1, 1),
    }
    apart, gone = {}, set()
    for name, leaf in find_maps(blocks).items():
        if name in JOINED:
            ends = np.cumsum(widths[name])
            for key, value in leaf.items():
                at = (ends[:-1] * value.shape[-1] // ends[-1]).tolist()
                for part, own in zip(JOINED[name], jnp.split(value, at, axis=-1)):
                    apart.setdefault(part, {})[key] = own
            gone.add(name)
    return _replace(blocks, gone, apart)


def find_joined(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Those of `JOINED` whose parts are all among `names`."""
    return {n: parts for n, parts in JOINED.items() if set(parts) <= set(names)}


def _is_plain(leaf: Mapping[str, Any]) -> bool:
    placed = [getattr(value, "sharding", None) for value in leaf.values()]
    alone = all(one is None or len(one.device_set) == 1 for one in placed)
    return leaf.keys() <= {"kernel", "bias"} and alone


def _replace(
    blocks: Mapping[str, Any], gone: set[str], added: Mapping[str, dict]
) -> dict[str, Any]:
    """`blocks` without the maps that are gone, and with those that are added."""
    flat = {
        path: leaf
        for path, leaf in flatten_dict(blocks, sep="/").items()
        if path.rpartition("/")[0] not in gone
    }
    for name, leaf in added.items():
        flat |= {f"{name}/{key}": value for key, value in leaf.items()}
    return unflatten_dict(flat, sep="/")
