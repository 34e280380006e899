"""jmem: see, predict and cut the GPU memory of JAX programs.

    import jmem

    report = jmem.measure(train_step, params, opt_state, batch, target="h200")
    print(report)

`measure` compiles for a described GPU with XLA's own compiler, with no GPU needed;
`live` runs on an attached one. Everything else is a submodule, loaded when first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmem.memory.live import live
    from jmem.memory.measure import measure
    from jmem.program import Label, Program

__version__ = "0.1.0"
__all__ = ["Label", "Program", "__version__", "live", "measure"]

_CALLS = {
    "Label": "jmem.program",
    "Program": "jmem.program",
    "live": "jmem.memory.live",
    "measure": "jmem.memory.measure",
}
_MODULES = {
    *("cards", "checkpoints", "confined", "data", "disk", "evaluate", "finetune"),
    *("generate", "kernels", "kvcache", "lowering", "memory", "methods", "models"),
    *("nn", "offload", "program", "sharding", "sparse", "targets", "terminal", "train"),
}


def _let_the_compiler_load() -> None:
    """Lets JAX's CUDA plugin load on a machine without a driver, silently.

    Once a backend is up the variable comes too late for this process; `measure` then
    says so, or goes on in a worker process.
    """
    from jax._src import xla_bridge  # JAX has no public way to ask

    if not xla_bridge.backends_are_initialized():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


_let_the_compiler_load()


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        return getattr(importlib.import_module(_CALLS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"jmem.{name}")
    raise AttributeError(f"module 'jmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLS, *_MODULES})
