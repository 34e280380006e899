"""GPU memory of any JAX function: measured, explained, compared, and checked live.

`jmem.measure` and `jmem.live` are the main calls. Here are the smaller ones:

    jmem.memory.assert_fits(step, params, batch, target="rtx4090")     for tests and CI
    print(jmem.memory.diff(before, after))                             of two reports
    print(jmem.memory.confirm(build, target="h200"))                   on a real GPU

and `python -m jmem.memory module:program --gpu rtx4090` asks from a shell.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmem.memory.difference import diff
    from jmem.memory.guard import assert_fits
    from jmem.memory.protocol import confirm
    from jmem.memory.xprof import export_xprof

__all__ = ["assert_fits", "confirm", "diff", "export_xprof"]

_CALLS = {
    "assert_fits": "jmem.memory.guard",
    "confirm": "jmem.memory.protocol",
    "diff": "jmem.memory.difference",
    "export_xprof": "jmem.memory.xprof",
}


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        return getattr(importlib.import_module(_CALLS[name]), name)
    raise AttributeError(f"module 'jmem.memory' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLS})
