"""Where training starts: pretrained weights, and a method's state from a copy of them.

    model = Decoder.on(None, checkpoint.config, dtype="float32", layout=Layout(fsdp=2))
    mesh = model.layout.mesh()
    params = load_params(model, checkpoint, mesh)
    state = init_state(Lora(), model, params, seed=0, mesh=mesh)
    jmem.train.loop.train(Lora(), model, state, ...)

Without a layout there is no mesh, and everything is on the default device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jmem.checkpoints import Checkpoint
from jmem.offload import check_host, count_host_bytes, describe_results
from jmem.sharding import find_layout


def load_params(model: Any, checkpoint: Checkpoint, mesh: Mesh | None = None) -> dict:
    """The pretrained weights, divided as `model` is over `mesh`.

    Those of a mesh are read into host memory first, as no device need hold them all.
    """
    if (layout := find_layout(model)) is None or mesh is None:
        return checkpoint.params()
    with jax.default_device(jax.devices("cpu")[0]):
        params = checkpoint.params()
    return jax.device_put(params, layout.shardings(params, mesh))


def init_state(
    finetuner: Any,
    model: Any,
    pretrained: dict,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> Any:
    """A method's state from a copy of the pretrained weights: training consumes it.

    Raises:
      HostMemoryError: the host has no room for what the state keeps there.
    """

    def init(params, key):
        return finetuner.init(model, jax.tree.map(jnp.copy, params), model.stats(), key)

    given = pretrained, jax.random.key(seed)
    state = describe_results(init, *given)
    check_host(count_host_bytes(state), f"the state of {type(finetuner).__name__}")
    if (layout := find_layout(model)) is None:
        return jax.jit(init)(*given)
    return jax.jit(init, out_shardings=layout.shardings(state, mesh))(*given)
