"""The model that an experiment's config names, and the machine it is built for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jmem.checkpoints
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.nn.stack import Remat
from jmem.offload import check_host, described, host_bytes
from jmem.sharding import Layout
from jmem.targets import Target, resolve


def dimensions(model: str) -> DecoderConfig:
    """Of a model of the zoo, or of the checkpoint that `model` is the path of."""
    if "/" in model or model.endswith((".gguf", ".safetensors")):
        return jmem.checkpoints.load(model).config
    return zoo.get(model)


def attached() -> Target | None:
    """The kind of GPU in this machine as far as attention goes; None without one."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    capability = str(device.compute_capability)
    return dataclasses.replace(resolve("h200"), compute_capability=capability)


def build(
    target: Target | None,
    dims: DecoderConfig,
    dtype: Precision,
    *,
    remat: Remat = "none",
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Decoder:
    """The decoder for `target`, or for a CPU (None).

    Raises:
      ValueError: the target has another number of devices than the mesh of `layout`.
    """
    if target and layout and target.devices != layout.devices:
        raise ValueError(
            f"gpu={target.name!r} is {target.devices} devices, and mesh.fsdp="
            f"{layout.fsdp} * mesh.tensor={layout.tensor} is {layout.devices}. Make "
            "them equal; a mesh of GPUs is written like 'h200x8'."
        )
    precision = PRECISIONS[dtype]
    model = Decoder.on(target, dims, **precision, remat=remat, layout=layout)
    return dataclasses.replace(model, chunk=chunk) if chunk else model


def start(
    finetuner: Any,
    model: Decoder,
    pretrained: dict,
    seed: int,
    mesh: Mesh | None = None,
) -> Any:
    """A fine-tuner's state from a copy of the pretrained weights: training consumes it.

    Raises:
      HostMemoryError: the host has no room for what the state keeps there.
    """

    def init(params, key):
        return finetuner.init(model, jax.tree.map(jnp.copy, params), model.stats(), key)

    given = pretrained, jax.random.key(seed)
    state = described(init, *given)
    check_host(host_bytes(state), f"the state of {type(finetuner).__name__}")
    if model.layout is None:
        return jax.jit(init)(*given)
    return jax.jit(init, out_shardings=model.layout.shardings(state, mesh))(*given)
