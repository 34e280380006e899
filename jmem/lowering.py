"""What surrounds lowering and compiling: devices, meshes, caches, and errors in words.

`jmem.program` compiles with these: what JAX and XLA must be told so that a program is
compiled for GPUs that are not there, and what their errors mean.
"""

import contextlib
import functools
import logging
import math
import operator
import re
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, SupportsIndex

import jax
import jaxlib.version
import numpy as np
from jax.sharding import Mesh

logger = logging.getLogger(__name__)

IN_PLACE: Mapping[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""XLA's compile options with which products read a layer's weights in their stack.

By default XLA 0.12 copies them out for Triton's products, and joins the maps that read
one input: a decoding step then moves its weights three times, and holds one layer's
beside the stack (Llama-3-8B, one token: 436 MB of temporaries, with these 34). A step
of LoRA at 7B copies 27 GB of weights, with these 0.7 GB of activations.
"""
_UNKNOWN: set[str] = set()
"""Those of IN_PLACE that this XLA does not know."""


def run_in_place[T](
    run: Callable[[dict[str, Any]], T], options: Mapping[str, Any] = IN_PLACE
) -> T:
    """`run(options)`, which compiles, less those of IN_PLACE that XLA does not know.

    Each of them is told in a line, once.
    """
    try:
        return run({n: v for n, v in options.items() if n not in _UNKNOWN})
    except Exception as error:
        found = re.search(r"No such compile option: '(\w+)'", str(error))
        if not found or found[1] not in IN_PLACE.keys() - _UNKNOWN:
            raise
        _UNKNOWN.add(found[1])
        logger.warning(
            "XLA %s has no option %s: layers' weights may be copied out of their "
            "stack, and measurements count that.",
            jaxlib.version.__version__,
            found[1],
        )
    return run_in_place(run, options)


class JitInPlace:
    """`jax.jit(function, **settings)`, compiled with IN_PLACE."""

    def __init__(self, function: Callable, **settings: Any):
        functools.update_wrapper(self, function)
        self._function, self._settings = function, settings
        self._made: dict[frozenset[str], Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run_in_place(lambda options: self.jit(options)(*args, **kwargs))

    def jit(self, options: Mapping[str, Any] = IN_PLACE) -> Any:
        """The jitted function with these options, always the same one."""
        key = frozenset(options)
        if key not in self._made:
            given: Any = self._settings | {"compiler_options": dict(options)}
            self._made[key] = jax.jit(self._function, **given)
        return self._made[key]


class ProgramError(RuntimeError):
    """The program cannot be lowered or compiled, for a reason given in words."""


_LOCK = threading.Lock()
_HELD: dict[str, tuple[int, Any]] = {}
"""Settings that are changed now: by how many `with` blocks, and their value before."""


@contextlib.contextmanager
def _configure(**values: Any) -> Iterator[None]:
    """Sets JAX's settings inside a `with` block, and puts them back after the last.

    They are the process's, so blocks of several threads that overlap count as one.
    """
    with _LOCK:
        for name, value in values.items():
            blocks, before = _HELD.get(name, (0, getattr(jax.config, name)))
            _HELD[name] = blocks + 1, before
            jax.config.update(name, value)
    try:
        yield
    finally:
        with _LOCK:
            for name in values:
                blocks, before = _HELD.pop(name)
                if blocks > 1:
                    _HELD[name] = blocks - 1, before
                else:
                    jax.config.update(name, before)


_NEVER_CACHED = {"jax_persistent_cache_min_compile_time_secs": math.inf}


def never_cached() -> contextlib.AbstractContextManager[None]:
    """Keeps what is compiled inside out of JAX's persistent compilation cache."""
    return _configure(**_NEVER_CACHED)


def ahead_of_time() -> contextlib.AbstractContextManager[None]:
    """Keeps what is compiled for a described GPU apart from that cache, both ways.

    An executable that no client can load is an entry that JAX warns of at each read.
    And with the cache on, JAX also gives XLA a folder of autotuning results, found on
    an attached GPU.
    """
    return _configure(**_NEVER_CACHED, jax_persistent_cache_enable_xla_caches="")


def use_device(
    devices: tuple[Any, ...] | None,
) -> contextlib.AbstractContextManager[Any]:
    """Makes the first of `devices` JAX's default inside; None leaves it as it is."""
    return jax.default_device(devices[0]) if devices else contextlib.nullcontext()


def use_mesh(
    mesh: Any, named: bool, devices: tuple[Any, ...] | None
) -> contextlib.AbstractContextManager[Any]:
    """Lets the function's own constraints name axes: `with_sharding_constraint(P)`.

    With compile-only devices the mesh in scope is theirs, also where nobody named one:
    cuDNN's attention is lowered for devices, and the arguments, whose mesh is abstract
    so that they keep their memory, name none.
    """
    if mesh is not None and devices:
        grid = np.reshape(devices, mesh.axis_sizes)
        return jax.set_mesh(Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types))
    if mesh is not None and named:
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return contextlib.nullcontext()


def list_positions(field: str, given: Any) -> tuple[int, ...]:
    """Positions of arguments as a tuple; one may be given by itself.

    Raises:
      TypeError: something that is no position, as a name.
    """
    positions: Any = (given,) if isinstance(given, int | str) else tuple(given)
    for position in positions:
        if not isinstance(position, SupportsIndex):
            raise TypeError(
                f"{field}={given!r}: {position!r} is no position of an argument. Count "
                f"them from 0, as {field}=(0, 1)."
            )
    return tuple(map(operator.index, positions))


@contextlib.contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """Turns the errors JAX and XLA raise for known causes into words."""
    try:
        yield
    except Exception as error:
        for mark, reason in _KNOWN:
            if mark in str(error):
                reason = reason.format(error=str(error).splitlines()[0])
                raise ProgramError(f"{name}: {reason}") from error
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise ProgramError(f"{name}: {_refusal(error)}") from error
        raise


def find_ignored_donation(
    traced: jax.stages.Traced, owners: list[int]
) -> dict[int, str]:
    """Arguments that a jitted function inside would take over, and that function.

    JAX ignores donation inside of a compiled function. `owners` are the positions of
    the arguments that own the flattened ones.
    """
    found: dict[int, str] = {}

    def look(jaxpr: Any, owners: list[int | None]) -> None:
        held = {id(var): owner for var, owner in zip(jaxpr.invars, owners)}
        for eqn in jaxpr.eqns:
            if "donated_invars" not in eqn.params:
                continue
            given = [held.get(id(var)) for var in eqn.invars]
            for owner, donated in zip(given, eqn.params["donated_invars"]):
                if donated and owner is not None:
                    found.setdefault(owner, eqn.params["name"])
            look(eqn.params["jaxpr"].jaxpr, given)

    whole: Any = traced.jaxpr
    look(whole.jaxpr, [*owners])
    return found


def _refusal(error: Exception) -> str:
    """What XLA says first, and the path of a new file with all that it says.

    A message can hold a whole program, of which a terminal keeps the end.
    """
    text = str(error)
    code, _, first = text.partition("\n")[0].partition(": ")
    reason = textwrap.shorten(first or code, 200, placeholder=" ...")
    with tempfile.NamedTemporaryFile(
        "w", prefix="jmem-refused-", suffix=".txt", delete=False
    ) as file:
        file.write(text + "\n")
    return f"XLA cannot compile it: {reason}\nThe whole message is in {file.name}"


DETERMINISTIC = (
    "xla_gpu_deterministic_ops needs a GPU to choose its algorithms on.\n"
    "Remove it to compile ahead of time, or measure with target='attached'."
)
_NO_ALGORITHM = (
    "XLA has no algorithm for one of its operations that needs no GPU to be chosen.\n"
    "If XLA_FLAGS sets xla_gpu_deterministic_ops, remove it to compile ahead of time."
)
_KNOWN = (
    (
        "has no attribute 'local_devices'",
        "it computes with real values while it is traced (under "
        "jax.ensure_compile_time_eval, say), and the GPU compiled for is not there.\n"
        "Compute those values before, with NumPy, and close over the result; or pass "
        "them as arguments.",
    ),
    (
        "Unknown backend: 'gpu' requested",
        "it calls back to the host (jax.debug.print, jax.pure_callback, io_callback), "
        "which cannot be compiled without a GPU.\n"
        "Take the callback out of the measured function; it holds no device memory.",
    ),
    (
        "must match the device_assignment calculated",
        "it names a mesh of this machine's own devices inside, which are not the GPUs "
        "compiled for.\n"
        "Constrain with a PartitionSpec instead of a NamedSharding: the mesh of the "
        "arguments is in scope.",
    ),
    (
        "should match the mesh passed to shard_map",
        "it gives jax.shard_map a mesh that is not that of the GPUs compiled for.\n"
        "Leave mesh= out: the mesh of the arguments is in scope.",
    ),
    (
        "different trace level",
        "it uses a flax NNX module that is not among its arguments: one it closes "
        "over, or that nnx.cached_partial holds.\nGive every module as an argument:\n"
        "    step = nnx.jit(step)                     # def step(model, batch): ...\n"
        "    jmem.measure(step, model, batch)",
    ),
    (
        "can only be passed to top-level",
        "it is under jax.jit with compiler_options, or calls a function that is, and "
        "JAX takes those of the outermost function only.\n"
        "Leave them out there, and give them here: jmem.measure(..., options={{...}})",
    ),
    ("No such compile option", "{error}"),
    ("Failed to get configs", _NO_ALGORITHM),
    ("No supported config found", _NO_ALGORITHM),
)
