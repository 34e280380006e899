"""Kinds of weights, pruned or rounded: what a model computes with, and their bytes."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from jmem.data import Batch
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.nn import quantised
from jmem.nn.maps import find_maps, replace_maps
from jmem.sparse import flash_llm
from jmem.sparse.flash_llm import Values


def build_loss(model: Decoder, held_out: Sequence[Batch]) -> Callable[[dict], float]:
    """The mean loss of a model's parameters over the held-out text, nats a token."""
    one = jax.jit(functools.partial(next_token_loss, model))
    weights = [float(batch.weights.sum()) for batch in held_out]

    def evaluate(params: dict) -> float:
        losses = [float(one(params, batch)) for batch in held_out]
        return float(np.average(losses, weights=weights))

    return evaluate


def pack(params: dict, values: Values = "bfloat16") -> tuple[dict, int]:
    """What a model computes with, once it was packed so, and the bytes of its maps."""
    with warnings.catch_warnings():  # their bytes are counted as they are
        warnings.simplefilter("ignore", flash_llm.KeptDense)
        packed = flash_llm.pack(params, values=values)
    dtype = quantised.find_unpacked_dtype(params["blocks"])
    blocks = quantised.unpack(packed["blocks"], dtype)
    return params | {"blocks": blocks}, count_map_bytes(packed)


def round_to(params: dict, kind: str) -> tuple[dict, int]:
    """The same of maps that are rounded to one of GGUF's types, nothing pruned."""
    chosen = gguf.GGMLQuantizationType[kind]
    found = {}
    for name, leaf in find_maps(params["blocks"]).items():
        layers, inputs, _ = leaf["kernel"].shape
        quantised.check_blocks("round_to", name, kind, inputs)
        rows = np.asarray(leaf["kernel"], np.float32).swapaxes(1, 2)
        flags = {kind: jnp.ones((layers,), jnp.bool)}
        rest = {key: part for key, part in leaf.items() if key != "kernel"}
        packed = jnp.asarray(gguf.quantize(np.ascontiguousarray(rows), chosen))
        found[name] = rest | {"packed": packed, "kind": flags}
    packed = params | {"blocks": replace_maps(params["blocks"], found)}
    return packed, count_map_bytes(packed)


def list_kernels(params: Mapping[str, Any]) -> list[jax.Array]:
    """The blocks' kernels [L, in, out], of maps that are not packed."""
    return [leaf["kernel"] for leaf in find_maps(params["blocks"]).values()]


def count_map_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of the blocks' maps, without their biases."""
    return flash_llm.count_bytes(
        [
            {key: part for key, part in leaf.items() if key != "bias"}
            for leaf in find_maps(params["blocks"]).values()
        ]
    )
