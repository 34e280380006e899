"""Measuring in a worker process: when this one started JAX too early, or on request.

A backend that came up without JAX_SKIP_CUDA_CONSTRAINTS_CHECK on a machine without a
driver has lost the GPU compiler for good. A fresh process has it: the worker imports
the function by its dotted name and gets the arguments' descriptions as JSON. A compiler
that aborts takes only the worker with it.
"""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jmem.memory.report import MemoryReport
from jmem.program import Label, Program, ProgramError
from jmem.targets import NoCompilerError, Target

TIMEOUT_S = 1800
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
)


class _UnsendableError(TypeError):
    """A value that JSON cannot carry to the worker."""


def measure(
    program: Program,
    card: Target,
    bounds: bool,
    options: Mapping[str, Any] | None,
    cause: NoCompilerError | None = None,
    cache: bool = True,
) -> MemoryReport:
    """The report of `program` on `card`, made in a fresh process.

    `cause` is why it cannot be made in this one; None when that was asked for.

    Raises:
      NoCompilerError: `cause`, when the function has no dotted name, an argument cannot
        be described in JSON, or there is no GPU compiler at all.
      ProgramError: the same without a `cause`, or the worker died; its last lines.
    """
    args, out_shardings, *_ = program.placed(card)
    try:
        request = {
            "fn": dotted(program.fn),
            "args": [
                _encode(value) if n not in program.static else _plain(value)
                for n, value in enumerate(args)
            ],
            "donate": program.donate,
            "static": program.static,
            "out_shardings": _encode(out_shardings),
            "labels": {
                name: (Label.read(given).places, Label.read(given).kind)
                for name, given in program.labels.items()
            },
            "target": dataclasses.asdict(card),
            "bounds": bounds,
            "options": {**program.options, **(options or {})},
            "cache": cache,
            "settings": {name: getattr(jax.config, name) for name in _SETTINGS},
        }
    except _UnsendableError as error:
        if cause is None:
            raise ProgramError(f"{program.name}: isolate=True, but {error}") from error
        raise NoCompilerError(
            f"{cause}\n(A worker process is no way out: {error})", late=True
        ) from cause
    done = subprocess.run(
        [sys.executable, "-m", "jmem.memory.worker"],
        input=json.dumps(request),
        env=environment() | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        if cause is None:
            raise ProgramError(
                f"{program.name}: the worker process {_ended(done.returncode)}; its "
                f"last lines:\n{last}"
            )
        raise NoCompilerError(
            f"{cause}\n(A worker process failed as well: {last})", late=True
        ) from cause
    report = MemoryReport.from_json(done.stdout.splitlines()[-1])
    if cause is None:
        return report
    flag = "measured in a worker process: JAX was started here before jmem."
    return dataclasses.replace(report, flags=(*report.flags, flag))


def main() -> None:
    """Answers one request from stdin with one report on stdout."""
    from jmem.memory import measure as measuring

    request = json.load(sys.stdin)
    for name, value in request["settings"].items():
        jax.config.update(name, value)
    program = Program(
        imported(request["fn"]),
        tuple(_decode(value) for value in request["args"]),
        tuple(request["donate"]),
        tuple(request["static"]),
        _decode(request["out_shardings"]),
        {
            name: Label([tuple(place) for place in places], kind)
            for name, (places, kind) in request["labels"].items()
        },
    )
    report = measuring.measure(
        program,
        target=Target(**request["target"]),
        bounds=request["bounds"],
        options=request["options"],
        cache=request["cache"],
    )
    print(report.to_json())


def environment() -> dict[str, str]:
    """The environment and import path of this process, for one that imports alike."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return os.environ | {"PYTHONPATH": path}


def _ended(status: int) -> str:
    if status >= 0:
        return f"failed with status {status}"
    return f"was ended by {signal.Signals(-status).name}"


# Functions ----------------------------------------------------------------------------


def dotted(thing: Any) -> str:
    """`module:qualified.name` of something that can be imported by it."""
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    found = _found(sys.modules[module], name) if module in sys.modules else None
    # What `jax.jit` adds to a function is in the program by now.
    if found is not None and found in (thing, getattr(thing, "__wrapped__", None)):
        if module == "__main__":  # of `python -m package.module`; a script has no name
            module = getattr(sys.modules[module].__spec__, "name", "")
        if module:
            return f"{module}:{name}"
    raise _UnsendableError(
        f"{name or thing!r} cannot be imported by name; define it in a module, outside "
        "of other functions."
    )


def _found(module: Any, name: str) -> Any:
    return functools.reduce(lambda at, n: getattr(at, n, None), name.split("."), module)


def imported(name: str) -> Any:
    """The object that a name from `dotted` stands for."""
    module, name = name.split(":")
    return _found(importlib.import_module(module), name)


# Arguments ----------------------------------------------------------------------------


def _encode(tree: Any) -> Any:
    """A pytree of descriptions as JSON: standard containers and NamedTuples."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {"dict": [[_plain(k), _encode(v)] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        items = [_encode(item) for item in tree]
        if hasattr(tree, "_fields"):
            return {"named": dotted(type(tree)), "items": items}
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    if isinstance(tree, NamedSharding):
        spec = [list(axis) if isinstance(axis, tuple) else axis for axis in tree.spec]
        return {
            "mesh": list(tree.mesh.shape.items()),
            "spec": spec,
            "memory": tree.memory_kind,
        }
    if isinstance(tree, jax.ShapeDtypeStruct):
        if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            raise _UnsendableError("an argument is a typed random key.")
        return {
            "shape": list(tree.shape),
            "dtype": tree.dtype.name,
            "weak": tree.weak_type,
            "sharding": _encode(tree.sharding),
        }
    raise _UnsendableError(f"an argument holds a {type(tree).__name__}.")


def _plain(value: Any) -> Any:
    """A static value as JSON; only what JSON gives back as it was."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _UnsendableError(f"a static value is a {type(value).__name__}.")


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {k: _decode(v) for k, v in value["dict"]}
    if "named" in value:
        return imported(value["named"])(*map(_decode, value["items"]))
    if "list" in value:
        return [_decode(item) for item in value["list"]]
    if "tuple" in value:
        return tuple(_decode(item) for item in value["tuple"])
    if "mesh" in value:
        axes, sizes = zip(*value["mesh"])
        spec = [
            tuple(axis) if isinstance(axis, list) else axis for axis in value["spec"]
        ]
        mesh = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=value["memory"])
    return jax.ShapeDtypeStruct(
        tuple(value["shape"]),
        jnp.dtype(value["dtype"]),
        weak_type=value["weak"],
        sharding=_decode(value["sharding"]),
    )


if __name__ == "__main__":
    main()
