"""One training state over many GPUs: which axis of which array a mesh divides.

    model = Decoder.on(target, zoo.get("llama2-70b"), dtype="bfloat16",
                       layout=Layout(fsdp=8))

Idea     The batch is divided over `fsdp` devices, and each product of a block over
         `tensor` ones (Megatron: q, k, v, gate and up by columns, o and down by rows).
         At rest, every matrix, its gradient and its moments are divided over all
         devices (ZeRO-3, FSDP). Inside the loop over layers the one in use is gathered
         over `fsdp`, and its gradient is summed into the part that each device holds.
Memory   State: its bytes / devices, but for norms, biases and counters, which every
         device holds. Activations: those of batch / fsdp sequences. And one layer's
         matrices / tensor, gathered.
Source   Rajbhandari et al., ZeRO, 2020, arXiv:1910.02054; Shoeybi et al., Megatron-LM,
         2019, arXiv:1909.08053.
See      docs/mesh.md, tests/test_sharding.py
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jmem.program import HOST, format_path

FSDP, TENSOR = "fsdp", "tensor"
"""Names of the mesh's axes."""
ALL = (TENSOR, FSDP)
"""Both axes: gathering over the last leaves contiguous parts along the first."""

GATHERED = "gathered"
"""The name of gathered parameters in `jax.checkpoint` policies."""

_COLUMNS, _ROWS = "(q|k|v|gate|up)", "(o|down)"


class Rule(NamedTuple):
    """Where a mesh's axes lie on an array, counted from its last axis."""

    path: str
    """What a key path must hold: whole words, a regular expression."""
    fsdp: int
    tensor: int
    kept: bool = True
    """Whether tensor's part is all that a product reads; False: it reads the whole."""


RULES = (
    Rule("embed/(embedding|positions)", -1, -1, kept=False),
    Rule("head/kernel", -2, -2, kept=False),
    Rule(f"{_COLUMNS}/kernel", -2, -1),
    Rule(f"{_ROWS}/kernel", -2, -2),
    Rule(f"{_COLUMNS}/lora_a", -2, -2, kept=False),
    Rule(f"{_ROWS}/lora_a", -2, -2),
    Rule(f"{_COLUMNS}/lora_b", -1, -1),
    Rule(f"{_ROWS}/lora_b", -1, -1, kept=False),
    Rule(f"{_COLUMNS}/packed", -2, -2),
    Rule(f"{_ROWS}/packed", -2, -2, kept=False),
)
"""The first rule that an array's path meets counts; without one it is copied to all.

Moments follow their weights, as their paths hold the weights' own, and so do LISA's
slots [S, ...]. Kernels [in, out] are divided along `in` wherever tensor parallelism
allows it: of parts along `out`, XLA 0.12 lays out the whole stack anew before the loop,
so that what it gathers is contiguous (11 GiB of temporaries, LLaMA-2-70B on 8 GPUs).
"""


class LayoutError(ValueError):
    """A mesh whose sizes do not divide an array, a batch or the heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a mesh's two axes, and what they mean for every array of a state."""

    fsdp: int = 1
    """Parts of the batch. Weights are gathered over these devices where used."""
    tensor: int = 1
    """Parts of every product inside a block, by attention heads and MLP channels."""

    def __post_init__(self):
        for name in (FSDP, TENSOR):
            if getattr(self, name) < 1:
                raise LayoutError(
                    f"Layout: {name}={getattr(self, name)} must be at least 1."
                )

    @property
    def devices(self) -> int:
        return self.fsdp * self.tensor

    # Meshes and placements ------------------------------------------------------------

    @functools.cached_property
    def described(self) -> AbstractMesh:
        """The mesh without devices, for the descriptions of a program's arguments."""
        sizes, auto = (self.fsdp, self.tensor), (AxisType.Auto,) * 2
        return AbstractMesh(sizes, (FSDP, TENSOR), axis_types=auto)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over the first of `devices`, by default those of this machine.

        Raises:
          LayoutError: there are fewer.
        """
        devices = jax.devices() if devices is None else devices
        if len(devices) < self.devices:
            raise LayoutError(
                f"{self} needs {self.devices} devices, and there are {len(devices)}. "
                "Lower fsdp or tensor; to measure without the devices, name a target "
                f"of that size, like 'h200x{self.devices}'."
            )
        grid = np.reshape(np.asarray(devices[: self.devices]), (self.fsdp, self.tensor))
        return Mesh(grid, (FSDP, TENSOR), axis_types=(AxisType.Auto,) * 2)

    def shardings(self, tree: Any, mesh: Mesh | AbstractMesh | None = None) -> Any:
        """A NamedSharding for every leaf of a state, or of a part of one.

        Leaves are arrays or descriptions; those in host memory stay there.

        Raises:
          LayoutError: an axis is not a multiple of the devices (which, and by what), or
            a leaf is of 8-bit moments.
        """
        mesh = self.described if mesh is None else mesh

        def leaf(path, value):
            spec = self._choose_spec(format_path(path), value)
            kind = getattr(getattr(value, "sharding", None), "memory_kind", None)
            return NamedSharding(mesh, spec, memory_kind=HOST if kind == HOST else None)

        return jax.tree.map_with_path(leaf, tree)

    def batch_shardings(
        self, batch: Any, mesh: Mesh | AbstractMesh | None = None
    ) -> Any:
        """A NamedSharding for every [B, ...] leaf of a batch.

        Raises:
          LayoutError: B is not a multiple of `fsdp`.
        """
        mesh = self.described if mesh is None else mesh

        def leaf(value):
            self.check_batch(value.shape[0])
            return NamedSharding(mesh, PartitionSpec(FSDP))

        return jax.tree.map(leaf, batch)

    def check_batch(self, sequences: int) -> None:
        """Refuses sequences that the mesh does not divide."""
        if sequences % self.fsdp:
            raise LayoutError(
                f"{self}: fsdp={self.fsdp} does not divide a batch of {sequences} "
                "sequences (or the part of it that accumulation computes at a time). "
                "Take a multiple."
            )

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Refuses attention heads that the mesh does not divide."""
        for name, value in (("heads", heads), ("kv_heads", kv_heads)):
            if value % self.tensor:
                raise LayoutError(
                    f"{self}: tensor={self.tensor} does not divide {name}={value}. "
                    "Choose a divisor of both heads and kv_heads, and more fsdp."
                )

    def _choose_spec(self, path: str, leaf: Any) -> PartitionSpec:
        rule = find_rule(path)
        if rule is None:
            return PartitionSpec()
        shape = leaf.shape
        if leaf.dtype == jnp.float8_e4m3fn:
            raise LayoutError(
                f"{self}: {path} is of 8-bit moments, whose scales a mesh would cut. "
                "Choose moment_dtype='bfloat16'."
            )
        spec = _build_rest_spec(rule, len(shape))
        for axis, names in enumerate(spec):
            parts = math.prod(self.described.shape[n] for n in _list_names(names))
            if shape[axis] % parts:
                words = " * ".join(
                    f"{n}={self.described.shape[n]}" for n in _list_names(names)
                )
                raise LayoutError(
                    f"{self}: {words} does not divide axis {axis} of {path} "
                    f"{list(shape)}, which is {shape[axis]}. Choose among its divisors."
                )
        return spec

    def cuts_columns(self, path: str) -> bool:
        """Whether each device holds whole rows [in, out] of the kernel at `path`.

        Its columns can then be cut with no traffic; its rows cannot.
        """
        rule = find_rule(path)
        return rule is None or rule.tensor == -2 or self.tensor == 1

    # Inside a program -----------------------------------------------------------------

    def divide_batch(self, x: jax.Array) -> jax.Array:
        """`x` [B, ...] with its sequences divided over devices."""
        self.check_batch(x.shape[0])
        return self._place(x, PartitionSpec(FSDP))

    def divide_rows(self, x: jax.Array) -> jax.Array:
        """`x` [B, T, M], looked up in a table divided along M, divided by sequences."""
        x = self.divide(x, -1)
        if self.tensor > 1:  # one axis at a time, or XLA 0.12 gathers all of it
            x = self._place(x, PartitionSpec(FSDP, None, TENSOR))
        return self.divide_batch(x)

    def divide_heads(self, x: jax.Array) -> jax.Array:
        """`x` [B, T, H, D] with its sequences and heads divided over devices."""
        return self._place(x, PartitionSpec(FSDP, None, TENSOR))

    def count_token_parts(self, tokens: int) -> int:
        """How many devices divide so many tokens: all, or those of `fsdp`."""
        return self.fsdp if tokens % self.devices else self.devices

    def divide_tokens(self, x: jax.Array) -> jax.Array:
        """`x` [N, ...], the tokens of B sequences end to end, divided over devices."""
        all_divide = self.count_token_parts(x.shape[0]) == self.devices
        return self._place(x, PartitionSpec((FSDP, TENSOR) if all_divide else FSDP))

    def replicate(self, x: jax.Array) -> jax.Array:
        """`x` on every device."""
        return self._place(x, PartitionSpec())

    def divide(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` divided along `axis` over all devices."""
        return self._place(x, _build_spec(x.ndim, {axis: ALL}))

    def place_at_rest(self, path: str, x: jax.Array) -> jax.Array:
        """`x`, a part or gradient of the array at `path`, divided as that is stored."""
        rule = find_rule(path)
        return (
            self.replicate(x)
            if rule is None
            else self._place(x, _build_rest_spec(rule, x.ndim))
        )

    def gather(self, layer_params: Any) -> Any:
        """One layer's parameters as products read them; gradients go back divided."""

        def leaf(path, x):
            rule = find_rule(format_path(path))
            if rule is None:
                return x
            in_use = {rule.tensor: TENSOR} if rule.kept else {}
            x = self._move(
                x, _build_spec(x.ndim, in_use), _build_rest_spec(rule, x.ndim)
            )
            return checkpoint_name(x, GATHERED)

        return jax.tree.map_with_path(leaf, layer_params)

    def divide_by_vocabulary(self, head_params: Any) -> Any:
        """The head, or a tied table, divided along V instead of M."""

        def leaf(path, x):
            rule = find_rule(format_path(path))
            if rule is None:
                return x
            other = -1 if rule.fsdp == -2 else -2
            return self._move(
                x, _build_spec(x.ndim, {other: ALL}), _build_rest_spec(rule, x.ndim)
            )

        return jax.tree.map_with_path(leaf, head_params)

    def _move(
        self, x: jax.Array, there: PartitionSpec, back: PartitionSpec
    ) -> jax.Array:
        """`x` placed `there`; its gradient is placed `back`."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return self._place(x, there)
        mesh = self.described
        return _move(x, NamedSharding(mesh, there), NamedSharding(mesh, back))

    def _place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.described, spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    del back
    return jax.lax.with_sharding_constraint(x, there)


def _move_forward(x, there, back):
    return _move(x, there, back), None


def _move_backward(there, back, residuals, gradient):
    del there, residuals
    return (jax.lax.with_sharding_constraint(gradient, back),)


_move.defvjp(_move_forward, _move_backward)


@functools.cache
def find_rule(path: str) -> Rule | None:
    """The rule for the array at a key path; None: it is copied to all devices."""
    words = (rule for rule in RULES if re.search(f"(^|/){rule.path}(/|$)", path))
    return next(words, None)


def _build_rest_spec(rule: Rule, ndim: int) -> PartitionSpec:
    if rule.fsdp == rule.tensor:
        return _build_spec(ndim, {rule.fsdp: ALL})
    return _build_spec(ndim, {rule.fsdp: FSDP, rule.tensor: TENSOR})


def _build_spec(ndim: int, names: Mapping[int, str | tuple[str, ...]]) -> PartitionSpec:
    """A PartitionSpec from mesh axes by array axis, counted from the last (-1)."""
    return PartitionSpec(*(names.get(axis - ndim) for axis in range(ndim)))


def _list_names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def find_layout(model: Any) -> Layout | None:
    """How a mesh divides `model`; None where there is one device."""
    return getattr(model, "layout", None)
