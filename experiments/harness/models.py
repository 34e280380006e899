"""The model that an experiment's config names, and the machine it is built for."""

import dataclasses

import jax

import jmem.checkpoints
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.nn.stack import Remat
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
