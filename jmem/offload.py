"""Host memory as the GPU's second, larger memory: pinned, and streamed a row at a time.

    moments = on_host(moments)          # before a program: arrays, or descriptions
    here = fetch(moments)               # inside one: a copy on the device
    moments = store(here)               # and back

The memory a value lives in is part of its JAX type, so everything here asks the value:
leaves that are on the device already pass through. A stack of layers [L, ...] on the
host is read and written one row at a time (`fetch_row`, `store_row`); the row, never
the stack, takes device memory. The CPU backend has the same memories, so that programs
run in tests as they run on a GPU.

Facts of XLA's GPU compiler (0.11.2, 0.12.0.1) that shape this file:
- A copy whose row is the counter of its loop is a plain asynchronous copy: all leaves
  of a row are on their way at once. Any other row, as `layer + 1`, is read by a kernel
  of which two are in flight, and each waits for the one before it.
- The scheduler holds a copy back until something needs its result, unless the loop
  carries it to its next turn. `stream` does; `copies` shows what came of it.
- For cards before Hopper nothing overlaps without `OVERLAP`.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jmem.memory import hlo
from jmem.memory.measure import compile_and_dump
from jmem.memory.schedule import Copy
from jmem.memory.schedule import list_copies as of_module
from jmem.program import HOST, Program
from jmem.targets import Target, resolve

HOST_SPACE, DEVICE_SPACE = jax.memory.Space.Host, jax.memory.Space.Device


class HostMemoryError(RuntimeError):
    """The host has less free memory than a program would pin."""


def count_available_host_bytes() -> int:
    """Host memory a process can still take: what Linux says, within its control group.

    Raises:
      OSError: the system does not tell.
    """
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group limits this process
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def check_host(needed_bytes: int, what: str) -> None:
    """Refuses what the host cannot hold, before anything is pinned.

    Raises:
      HostMemoryError: names the bytes needed and available.
    """
    available = count_available_host_bytes()
    if needed_bytes > available:
        raise HostMemoryError(
            f"{what} needs {needed_bytes:,} bytes of host memory, of which "
            f"{available:,} are available. Free some, offload less, or keep it in 16 "
            "bits."
        )


def count_host_bytes(tree: Any) -> int:
    """Bytes of a tree's leaves that are in host memory, arrays or descriptions."""
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST
    )


# Placing, before a program ------------------------------------------------------------


def on_host(tree: Any) -> Any:
    """`tree` in pinned host memory: arrays are copied, descriptions say so.

    Placements over a mesh stay as they are, in host memory.

    Raises:
      HostMemoryError: the arrays do not fit; nothing has been copied.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    check_host(sum(x.nbytes for x in arrays) - count_host_bytes(arrays), "on_host")
    return jax.tree.map(lambda leaf: _place(leaf, HOST), tree)


def on_device(tree: Any) -> Any:
    """`tree` in device memory: arrays are copied, descriptions say so."""
    return jax.tree.map(lambda leaf: _place(leaf, "device"), tree)


def _place(leaf: Any, kind: str) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding
        if sharding is None:
            mesh = AbstractMesh((1,), ("devices",), axis_types=(AxisType.Auto,))
            sharding = NamedSharding(mesh, PartitionSpec())
        sharding = sharding.with_memory_kind(kind)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, weak_type=leaf.weak_type, sharding=sharding
        )
    leaf = jnp.asarray(leaf)
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))


def describe_results(fn: Callable, *args: Any) -> Any:
    """`jax.eval_shape` whose descriptions say which results are in host memory."""
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    leaves, structure = jax.tree.flatten(shapes)
    results: list[Any] = traced.out_avals
    placed = [
        on_host(leaf) if result.memory_space == HOST_SPACE else leaf
        for leaf, result in zip(leaves, results)
    ]
    return jax.tree.unflatten(structure, placed)


def is_on_host(leaf: Any) -> bool:
    """Whether an array, traced or not, is in host memory."""
    kind: Any = jax.typeof(leaf)
    return kind.memory_space == HOST_SPACE


# Moving, inside a program -------------------------------------------------------------


def fetch(tree: Any) -> Any:
    """`tree` in device memory."""
    return jax.tree.map(
        lambda x: jax.device_put(x, DEVICE_SPACE) if is_on_host(x) else x, tree
    )


def store(tree: Any) -> Any:
    """`tree` in host memory; counters and other scalars stay on the device."""

    def leaf(x):
        return x if x.ndim == 0 or is_on_host(x) else jax.device_put(x, HOST_SPACE)

    return jax.tree.map(leaf, tree)


def fetch_row(stacked: Any, layer: jax.Array) -> Any:
    """Row `layer` of every leaf [L, ...], in device memory; nothing else moves."""

    def row(leaf):
        return jax.lax.dynamic_index_in_dim(
            leaf, layer, keepdims=False, allow_negative_indices=False
        )

    return fetch(jax.tree.map(row, stacked))


def store_row(stacked: Any, layer: jax.Array, row: Any) -> Any:
    """`stacked` with row `layer` replaced where it is, in host or device memory.

    In place if `stacked` is carried by a loop or donated.
    """

    def put(leaf, value):
        value = value.astype(leaf.dtype)[None]
        if is_on_host(leaf):
            value = jax.device_put(value, HOST_SPACE)
        start = (layer, *(0 for _ in leaf.shape[1:]))
        return jax.lax.dynamic_update_slice(
            leaf, value, start, allow_negative_indices=False
        )

    return jax.tree.map(put, stacked, row)


def stream[State](
    step: Callable[[State, Any, jax.Array], State],
    state: State,
    stacked: Any,
    *,
    prefetch: bool = True,
) -> State:
    """`step(state, row, layer)` for every row of `stacked`, in order.

    With `prefetch` the next row is on its way while a step computes, and two rows are
    on the device; without, a row is fetched as its step begins, and its leaves arrive
    while the step already uses the first: one row on the device. Results belong into
    `state`. Not for differentiating: that is `jmem.nn.stack.run_stack`, which fetches
    the rows of a stack on the host as well, and again in the backward pass.
    """
    layers = jax.tree.leaves(stacked)[0].shape[0]
    if not prefetch:
        return jax.lax.fori_loop(
            0, layers, lambda i, s: step(s, fetch_row(stacked, i), i), state
        )

    def turn(layer, carried):
        state, row = carried
        # The copy's row is the loop's own counter, so the step's is one behind it.
        following = fetch_row(stacked, layer)
        return step(state, row, layer - 1), following

    first = fetch_row(stacked, jnp.int32(0))
    state, last = jax.lax.fori_loop(1, layers, turn, (state, first))
    return step(state, last, jnp.int32(layers - 1))


def update_rows(fn: Callable[..., Any], stacked: Any, *inputs: Any) -> Any:
    """`stacked` with every row replaced by `fn(row of stacked, rows of inputs)`.

    One row at a time, each leaf where it is: an optimizer whose moments are on the host
    needs device memory for one layer's.
    """
    layers = jax.tree.leaves(stacked)[0].shape[0]

    def turn(layer, stacked):
        rows = fetch_row((stacked, inputs), layer)
        return store_row(stacked, layer, fn(rows[0], *rows[1]))

    return jax.lax.fori_loop(0, layers, turn, stacked)


# What XLA made of it ------------------------------------------------------------------


OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""XLA's option that lets copies travel while kernels run.

For a GPU before Hopper XLA (0.12.0.1) leaves it off, and waits for each copy where it
starts it. `jax.jit` takes it as `compiler_options`, `jmem.measure` and `copies` as
`options`.
"""


def copies(
    program: Program,
    target: str | Target = "h200",
    options: Mapping[str, Any] | None = None,
) -> tuple[Copy, ...]:
    """Every copy between host and device of a compiled program, in scheduled order.

    Each says how many kernels run between its start and the point that waits for it: 0
    is a copy that nothing hides. `options` are XLA's compile options.
    """
    content, _ = compile_and_dump(program.lower(resolve(target)), dict(options or {}))
    return of_module(hlo.read(content))
