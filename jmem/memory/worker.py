"""Functions called in processes of their own; among them, measuring.

A process that starts anew has what this one may have lost. A JAX backend that came up
without JAX_SKIP_CUDA_CONSTRAINTS_CHECK on a machine without a driver has lost the GPU
compiler for good; a fresh process has it. A compiler that aborts takes only that
process with it. Functions are imported there by their dotted names, and what they are
given and return travels as JSON.
"""

import dataclasses
import functools
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jmem.memory.card import NoGPUError
from jmem.memory.report import MemoryReport
from jmem.program import Label, Program, ProgramError
from jmem.targets import NoCompilerError, Target

TIMEOUT_S = 1800
_NO_GPU = 3
"""Exit status of a process whose function found no GPU."""
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
)


class _UnsendableError(TypeError):
    """A value that JSON cannot carry to the worker."""


class StageError(RuntimeError):
    """A process failed: what it was to do, and the end of what it wrote."""


def measure(
    program: Program,
    card: Target,
    how: dict[str, Any],
    cause: NoCompilerError | None = None,
) -> MemoryReport:
    """The report of `program` on `card`, made in a fresh process.

    `how` is the rest of `jmem.measure`'s arguments, as JSON can hold them. `cause` is
    why it cannot be made in this process; None when that was asked for.

    Raises:
      NoCompilerError: `cause`, when the function has no dotted name, an argument cannot
        be described in JSON, or there is no GPU compiler at all.
      ProgramError: the same without a `cause`, or the worker died; its last lines.
    """
    try:
        text = ask(
            measure_request,
            [_describe(program, card), dataclasses.asdict(card), how],
            make_environment() | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
            "the worker process",
        )
    except (_UnsendableError, StageError) as error:
        if cause is not None:
            why = f"{cause}\n(A worker process is no way out: {error})"
            raise NoCompilerError(why, late=True) from cause
        way = "isolate=True, but " if isinstance(error, _UnsendableError) else ""
        raise ProgramError(f"{program.name}: {way}{error}") from error
    report = MemoryReport.from_json(text)
    if cause is None:
        return report
    flag = "measured in a worker process: JAX was started here before jmem."
    return dataclasses.replace(report, flags=(*report.flags, flag))


def _describe(program: Program, card: Target) -> dict[str, Any]:
    """What `measure_request` builds the program from, as JSON can hold it."""
    args, out_shardings, *_ = program.place_arguments(card)
    labels = {name: Label.read(given) for name, given in program.labels.items()}
    return {
        "fn": write_name(program.fn),
        "args": [
            _encode(value) if n not in program.static else _check_plain(value)
            for n, value in enumerate(args)
        ],
        "donate": program.donate,
        "static": program.static,
        "out_shardings": _encode(out_shardings),
        "labels": {name: (label.places, label.kind) for name, label in labels.items()},
        "settings": {name: getattr(jax.config, name) for name in _SETTINGS},
    }


def measure_request(
    request: dict[str, Any], card: dict[str, Any], how: dict[str, Any]
) -> str:
    """Measures the program of `_describe` on a card; returns the report as JSON."""
    from jmem.memory import measure as measuring

    for name, value in request["settings"].items():
        jax.config.update(name, value)
    program = Program(
        import_name(request["fn"]),
        tuple(_decode(value) for value in request["args"]),
        tuple(request["donate"]),
        tuple(request["static"]),
        _decode(request["out_shardings"]),
        {
            name: Label([tuple(place) for place in places], kind)
            for name, (places, kind) in request["labels"].items()
        },
    )
    return measuring.measure(program, target=Target(**card), **how).to_json()


# Processes ----------------------------------------------------------------------------


def call(function: Callable, *arguments: Any, environment: dict[str, str]) -> Any:
    """What a function returns in a process of its own; all of it as JSON can hold it.

    Raises:
      NoGPUError: it raised that.
      StageError: the process failed; the end of what it wrote.
    """
    what = f"{write_name(function)} of {' '.join(map(str, arguments))}"
    return ask(function, arguments, environment, what)


def ask(
    function: Callable, arguments: Sequence, environment: dict[str, str], what: str
) -> Any:
    """As `call`; `what` begins the message of an error."""
    done = subprocess.run(
        [sys.executable, "-m", "jmem.memory.worker"],
        input=json.dumps([write_name(function), arguments]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode == _NO_GPU:
        raise NoGPUError(done.stdout.strip())
    if done.returncode:
        killed = done.returncode < 0
        end = f"was ended by {signal.Signals(-done.returncode).name}" if killed else ""
        tail = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise StageError(f"{what} {end or 'failed'}:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Answers `ask`; exit status `_NO_GPU` where the function finds none."""
    name, arguments = json.load(sys.stdin)
    try:
        print(json.dumps(import_name(name)(*arguments)))
    except NoGPUError as error:
        print(error)
        return _NO_GPU
    return 0


def make_environment() -> dict[str, str]:
    """The environment and import path of this process, for one that imports alike."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return os.environ | {"PYTHONPATH": path}


# Functions ----------------------------------------------------------------------------


def write_name(thing: Any) -> str:
    """`module:qualified.name` of something that can be imported by it."""
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    found = _look_up(sys.modules[module], name) if module in sys.modules else None
    # What `jax.jit` adds to a function is in the program by now; what another wrapper
    # adds is not.
    inner = getattr(thing, "__wrapped__", None) if hasattr(thing, "trace") else None
    if found is not None and found in (thing, inner):
        if module == "__main__":  # of `python -m package.module`; a script has no name
            module = getattr(sys.modules[module].__spec__, "name", "")
        if module:
            return f"{module}:{name}"
    raise _UnsendableError(
        f"{name or thing!r} cannot be imported by name; define it in a module, outside "
        "of other functions."
    )


def _look_up(module: Any, name: str) -> Any:
    return functools.reduce(lambda at, n: getattr(at, n, None), name.split("."), module)


def import_name(name: str) -> Any:
    """The object that a name from `write_name` stands for."""
    return pkgutil.resolve_name(name)


# Arguments ----------------------------------------------------------------------------


def _encode(tree: Any) -> Any:
    """A pytree of descriptions as JSON: standard containers and NamedTuples.

    A list stands for what is not plain: its kind, and what `_decode` makes it of.
    """
    if tree is None:
        return None
    if isinstance(tree, dict):
        return ["dict", *([_check_plain(k), _encode(v)] for k, v in tree.items())]
    if isinstance(tree, tuple | list):
        named = hasattr(tree, "_fields")
        kind = write_name(type(tree)) if named else type(tree).__name__
        return [kind, *map(_encode, tree)]
    if isinstance(tree, NamedSharding):
        axes = list(tree.mesh.shape.items())
        return ["sharding", axes, list(tree.spec), tree.memory_kind]
    if isinstance(tree, jax.ShapeDtypeStruct):
        if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            raise _UnsendableError("an argument is a typed random key.")
        plain = tree.shape, tree.dtype.name, tree.weak_type
        return ["array", *plain, _encode(tree.sharding)]
    raise _UnsendableError(f"an argument holds a {type(tree).__name__}.")


def _check_plain(value: Any) -> Any:
    """A static value as JSON; only what JSON gives back as it was."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _UnsendableError(f"a static value is a {type(value).__name__}.")


def _decode(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *held = value
    if kind == "dict":
        return {k: _decode(v) for k, v in held}
    if kind == "sharding":
        axes, spec, memory = held
        names, sizes = zip(*axes)
        spec = (tuple(axis) if isinstance(axis, list) else axis for axis in spec)
        mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory)
    if kind == "array":
        shape, dtype, weak, sharding = held
        return jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), weak_type=weak, sharding=_decode(sharding)
        )
    items = map(_decode, held)
    if ":" in kind:
        return import_name(kind)(*items)
    return list(items) if kind == "list" else tuple(items)


if __name__ == "__main__":
    sys.exit(main())
