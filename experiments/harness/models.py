"""The model that an experiment's config names, and the machine it is built for."""

import dataclasses

import jax

import jmem.checkpoints
from jmem.models import zoo
from jmem.models.decoder import DecoderConfig
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
