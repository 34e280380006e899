"""A program: one function with the arguments it will be given, not yet run.

Everything `jmem` measures, runs, traces or tests is a `Program`. Its arguments are
descriptions (`jax.ShapeDtypeStruct`) or arrays; nothing is put on a device before
somebody runs it. Compiling one for a described GPU needs no GPU:

    step = Program(train_step, (state, batch), donate=(0,),
                   labels={"weights": (0, "params"), "batch": (1, "")})
    step.compile(resolve("h200")).memory_analysis()

Labels speak the user's words. They are matched by the position of a flattened argument
through JAX's own tree paths, never by names inside the compiled program.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
)

from jmem.lowering import (
    DETERMINISTIC,
    ProgramError,
    ahead_of_time,
    explain_errors,
    find_ignored_donation,
    list_positions,
    run_in_place,
    use_device,
    use_mesh,
)
from jmem.targets import Target, suggest

Place = tuple[int, str]
"""Position of an argument, and the key path inside it ("params/blocks"; "" = all)."""

Kind = Literal[
    "parameters",
    "optimizer",
    "gradients",
    "kv cache",
    "state",
    "batch",
    "other arguments",
]
"""What memory an argument can be (`jmem.memory.kinds` explains each)."""


@dataclasses.dataclass(frozen=True)
class Label:
    """The parts of the arguments that a word names, and what kind of memory they are.

        labels={"weights": (0, "params"),
                "map": Label((0, "gaussians"), kind="state"),
                "poses": Label([(0, "rotations"), (0, "shifts")], kind="state")}

    Raises:
      ValueError: a kind that no argument has.
    """

    where: Place | Sequence[Place]
    kind: Kind | None = None
    """None: guessed from the word (`jmem.memory.kinds.classify_label`)."""

    def __post_init__(self):
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ValueError(
                f"Label: kind={self.kind!r} is none of an argument's kinds, "
                f"{', '.join(get_args(Kind))}{suggest(str(self.kind), get_args(Kind))}"
            )

    @property
    def places(self) -> tuple[Place, ...]:
        """Every place that the word names."""
        if any(isinstance(part, int) for part in self.where):
            return (cast(Place, self.where),)
        return tuple(cast(Sequence[Place], self.where))

    @classmethod
    def read(cls, given: "Place | Sequence[Place] | Label") -> "Label":
        """The label that an entry of `Program.labels` stands for."""
        return given if isinstance(given, Label) else cls(given)


Labels = Mapping[str, Place | Sequence[Place] | Label]
"""Words for parts of a program's arguments."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function, its arguments, and how it is to be compiled.

    Raises:
      TypeError: an argument holds something that is neither an array nor a description
        of one, or a static argument cannot be hashed.
      ValueError: a position in `donate`, `static` or `labels` does not exist, or a
        label's key path matches nothing.
    """

    fn: Callable
    args: tuple
    donate: tuple[int, ...] = ()
    """Positions of arguments whose buffers the program may overwrite."""
    static: tuple[int, ...] = ()
    """Positions of arguments that are hashable values and are compiled in."""
    out_shardings: Any = None
    labels: Labels = dataclasses.field(default_factory=dict)
    """The user's word for a part of the arguments: "weights", "adam m", "kv cache". Its
    kind is guessed from the word; a `Label` states it."""
    make: Callable[[jax.Array], tuple] | None = None
    """Makes real arguments from a random key, for live runs."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """XLA's compile options that belong to the program, by name, with typed values."""

    def __post_init__(self):
        if not callable(self.fn):
            raise TypeError(f"Program: fn={self.fn!r} cannot be called.")
        if not isinstance(self.args, tuple):
            raise TypeError(
                f"Program: args is a {type(self.args).__name__}; need a tuple with one "
                "entry an argument, as (state, batch)."
            )
        for field in ("donate", "static"):
            given = list_positions(field, getattr(self, field))
            positions = tuple(self._check_position(field, p) for p in given)
            object.__setattr__(self, field, positions)
        both = sorted(set(self.donate) & set(self.static))
        if both:
            raise ValueError(
                f"Program: argument {both[0]} is in donate={self.donate} and in "
                f"static={self.static}; a static value has no buffer to donate."
            )
        for position, value in enumerate(self.args):
            if position in self.static:
                self._check_static(position, value)
            else:
                self._check_arrays(position, value)
        self.label_leaves()  # refuses a label that matches nothing

    def _check_position(self, field: str, position: int) -> int:
        index = operator.index(position)
        if not 0 <= index < len(self.args):
            raise ValueError(
                f"Program: {field} names argument {index}, but {self.name} is "
                f"given {len(self.args)}; need 0 <= position < {len(self.args)}."
            )
        return index

    def _check_static(self, position: int, value: Any) -> None:
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"Program: static argument {position} ({type(value).__name__}) cannot "
                "be hashed, so JAX could not tell one program from another. Use a "
                "frozen dataclass, a tuple, a string or a number."
            ) from error

    def _check_arrays(self, position: int, value: Any) -> None:
        for path, leaf in jax.tree.leaves_with_path(value):
            if not is_described(leaf):
                where = f"argument {position}" + (
                    f", {format_path(path)!r}" if path else ""
                )
                raise TypeError(
                    f"Program: {where} is a {type(leaf).__name__}, which has no shape "
                    "and dtype. Pass an array or a jax.ShapeDtypeStruct, or name the "
                    f"argument static: static=({position},)."
                    + (_OF_EQUINOX if callable(leaf) else "")
                )

    @property
    def name(self) -> str:
        """The function's name, or its type's."""
        fn = self.fn
        while isinstance(fn, functools.partial):
            fn = fn.func
        return getattr(fn, "__name__", type(fn).__name__)

    # Labels ---------------------------------------------------------------------------

    def list_leaves(self) -> list[tuple[int, str, Any]]:
        """Position, key path and description of every array argument, flattened.

        The order is that of the compiled program's parameters.
        """
        return [
            (position, format_path(path), leaf)
            for position, value in enumerate(self.args)
            if position not in self.static
            for path, leaf in jax.tree.leaves_with_path(value)
        ]

    def name_arguments(self) -> list[str]:
        """The function's own names of its arguments; "argument 0" where it has none."""
        named = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        number = len(self.args)
        try:
            parameters = list(inspect.signature(self.fn).parameters.values())[:number]
        except (TypeError, ValueError):  # some callables written in C have none
            parameters = []
        names = [parameter.name for parameter in parameters if parameter.kind in named]
        return names + [f"argument {n}" for n in range(len(names), number)]

    def label_leaves(self) -> list[str | None]:
        """The label of every flattened argument; None where no label reaches.

        Where two labels reach one leaf, the longer key path holds.
        """
        leaves = self.list_leaves()
        found: list[tuple[int, str | None]] = [(-1, None)] * len(leaves)
        for label, given in self.labels.items():
            for position, prefix in Label.read(given).places:
                words = tuple(prefix.split("/")) if prefix else ()
                for index in self._find_leaves(label, position, prefix, leaves):
                    if len(words) > found[index][0]:
                        found[index] = (len(words), label)
        return [label for _, label in found]

    def classify_leaves(self) -> list[Kind | None]:
        """The kind that its label states for every flattened argument, or None."""
        stated: dict[str | None, Kind | None] = {None: None}
        for name, given in self.labels.items():
            stated[name] = Label.read(given).kind
        return [stated[name] for name in self.label_leaves()]

    def _find_leaves(
        self, label: str, position: int, prefix: str, leaves: list
    ) -> list[int]:
        """Numbers of the flattened arguments at one place of a label."""
        position = self._check_position(f"labels[{label!r}]", position)
        if position in self.static:
            raise ValueError(
                f"Program: labels[{label!r}] names argument {position}, which is "
                "static and holds no array."
            )
        words = tuple(prefix.split("/")) if prefix else ()
        hits = [
            index
            for index, (owner, path, _) in enumerate(leaves)
            if owner == position and tuple(path.split("/"))[: len(words)] == words
        ]
        if not hits and words:
            paths = [path for owner, path, _ in leaves if owner == position]
            parts = [path.split("/") for path in paths]
            known = {"/".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}
            near = suggest(prefix, known)
            raise ValueError(
                f"Program: labels[{label!r}]={(position, prefix)!r} matches no "
                f"array of argument {position}{near}"
            )
        return hits

    # Compiling ------------------------------------------------------------------------

    def lower(self, target: Target | None = None) -> "Lowered":
        """Traced and lowered for `target`; None means the attached default backend.

        Unused arguments are kept: the user's card holds them, whether or not the
        function looks at them.

        Raises:
          ProgramError: the function cannot be lowered ahead of time as it is written
            (an eager operation, a host callback, meshes that do not agree).
        """
        args, out_shardings, mesh, named = self.place_arguments(target)
        devices = target.compile_only_devices() if target else None
        platforms = ("cuda",) if target else None
        jitted = jax.jit(
            self.fn,
            static_argnums=self.static,
            donate_argnums=self.donate,
            keep_unused=True,
            **({} if out_shardings is None else {"out_shardings": out_shardings}),
        )
        with (
            explain_errors(self.name),
            use_device(devices),
            use_mesh(mesh, named, devices),
        ):
            traced = jitted.trace(*args)
            stage = traced.lower(lowering_platforms=platforms)
        ignored = find_ignored_donation(traced, [n for n, *_ in self.list_leaves()])
        return Lowered(
            stage,
            devices,
            math.prod(mesh.axis_sizes) if mesh else 1,
            self,
            {n: name for n, name in ignored.items() if n not in self.donate},
        )

    def compile(
        self, target: Target | None = None, options: Mapping[str, Any] | None = None
    ) -> jax.stages.Compiled:
        """Compiled for `target`; None means the attached default backend.

        `options` are further compile options, before the program's own.

        Raises:
          ProgramError: as `lower`; or an unknown option, or an option that needs a GPU.
        """
        return self.lower(target).compile(options)

    def _list_shardings(self) -> list[Any]:
        """Where each argument and result is placed; None where that is not said."""
        own = [getattr(leaf, "sharding", None) for *_, leaf in self.list_leaves()]
        return own + jax.tree.leaves(self.out_shardings, is_leaf=_is_sharding)

    def asks_for_host(self) -> bool:
        """Whether an argument or a result is placed in host memory by its sharding."""
        return any(_is_host(sharding) for sharding in self._list_shardings())

    def names_parts(self) -> bool:
        """Whether the sharding of an argument or a result divides it over a mesh."""
        specs = (
            sharding if isinstance(sharding, PartitionSpec) else sharding.spec
            for sharding in self._list_shardings()
            if isinstance(sharding, NamedSharding | PartitionSpec)
        )
        return any(part is not None for spec in specs for part in spec)

    def place_arguments(self, target: Target | None) -> tuple[tuple, Any, Any, bool]:
        """Descriptions of the arguments, and out_shardings, placed on one mesh.

        Also the mesh, if one is needed at all, and whether it is the user's own, whose
        axes the function may name. For a described GPU the mesh is abstract, with Auto
        axes: concrete meshes of compile-only devices silently drop host memory (seen in
        JAX 0.11.2 and 0.12).
        """
        named = [s.mesh for s in self._list_shardings() if isinstance(s, NamedSharding)]
        shapes = {tuple(mesh.shape.items()) for mesh in named}
        if len(shapes) > 1:
            raise ProgramError(
                f"{self.name}: the arguments are placed on different meshes, "
                f"{' and '.join(str(dict(shape)) for shape in sorted(shapes))}; "
                "place them all on one."
            )
        devices = target.devices if target else None
        if shapes:
            shape = dict(*shapes)
            size = math.prod(shape.values())
            if target and target.devices != size:
                raise ProgramError(
                    f"{self.name}: the arguments are placed on a mesh {shape} of "
                    f"{size} devices, but target {target.name!r} has {target.devices}. "
                    f"Name a target of that size, like 'h200x{size}'."
                )
        elif (devices or 1) > 1 or self.asks_for_host():
            shape = {"devices": devices or 1}
        else:
            return self.describe_arguments(), self.out_shardings, None, False
        axes, sizes = tuple(shape), tuple(shape.values())
        auto = (AxisType.Auto,) * len(axes)
        if target and shapes:  # JAX 0.11.2 wants that of the mesh in scope
            described = np.reshape(target.compile_only_devices(), sizes)
            mesh = Mesh(described, axes, axis_types=auto).abstract_mesh
        elif target:
            mesh = AbstractMesh(sizes, axes, axis_types=auto)
        else:
            attached = jax.devices()[: math.prod(sizes)]
            mesh = jax.make_mesh(sizes, axes, devices=attached, axis_types=auto)
        out_shardings = jax.tree.map(  # where None, XLA chooses
            lambda s: _place(mesh, s), self.out_shardings, is_leaf=_is_sharding
        )
        return self.describe_arguments(mesh), out_shardings, mesh, bool(shapes)

    def describe_arguments(self, mesh: Any = None) -> tuple:
        """The arguments with every array replaced by its description.

        With a mesh, placements are put onto it; without one, only those that name a
        mesh or host memory are kept.
        """

        def describe(leaf):
            kind = leaf if hasattr(leaf, "weak_type") else jax.typeof(leaf)
            sharding = getattr(leaf, "sharding", None)
            if mesh is not None:
                sharding = _place(mesh, sharding)
            elif not isinstance(sharding, NamedSharding):
                sharding = None
            return jax.ShapeDtypeStruct(
                kind.shape, kind.dtype, weak_type=kind.weak_type, sharding=sharding
            )

        return tuple(
            value if position in self.static else jax.tree.map(describe, value)
            for position, value in enumerate(self.args)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Lowered:
    """A program lowered to StableHLO, to be compiled where it was lowered for."""

    stage: jax.stages.Lowered
    devices: tuple[Any, ...] | None
    """Compile-only devices; None compiles for the attached ones."""
    device_count: int
    program: Program
    ignored_donation: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Arguments that a jitted function inside donates and the program does not, with
    that function's name."""

    def as_text(self) -> str:
        """StableHLO, free of line numbers: the same text in every process."""
        return self.stage.as_text()

    def compile(self, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """Compiled by XLA; `options` as in `Program.compile`."""
        options = {**self.program.options, **(options or {})}
        if options.get("xla_gpu_deterministic_ops") and self.devices:
            raise ProgramError(DETERMINISTIC)
        if self.devices:
            options = _UNTUNED | options

        def compile_with(given):
            return self.stage.compile(
                compiler_options=given, device_assignment=self.devices
            )

        # With no default device JAX hands those to the CPU client, which crashes.
        cache = ahead_of_time() if self.devices else contextlib.nullcontext()
        with explain_errors(self.program.name), use_device(self.devices), cache:
            compiled = run_in_place(compile_with, options)
        on_gpu = self.devices or jax.default_backend() != "cpu"  # a CPU has one memory
        if on_gpu and self.program.asks_for_host():
            check_host_bytes(self.program, compiled.memory_analysis())
        return compiled


_UNTUNED = {"xla_gpu_autotune_level": 0} if jax.__version_info__ >= (0, 12) else {}
"""With no GPU to time on, XLA would take the first config of each fusion that compiles,
and compile every fusion alone to know: a third to a half of its time, to the same plan.
JAX 0.11's XLA plans otherwise then: 32 MiB for cuBLAS instead of 4.
"""
HOST = "pinned_host"
"""JAX's name of host memory a GPU can read and write."""


def check_host_bytes(program: Program, analysis: Any) -> None:
    """Refuses a program that XLA gave device memory for what lies on the host.

    Raises:
      ProgramError: names the bytes asked for and the bytes XLA placed there.
    """
    asked = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for *_, leaf in program.list_leaves()
        if _is_host(getattr(leaf, "sharding", None))
    )
    found = analysis.host_argument_size_in_bytes
    if found < asked or not found + analysis.host_output_size_in_bytes:
        raise ProgramError(
            f"{program.name}: arguments of {asked:,} bytes are placed in {HOST!r}, but "
            f"XLA placed {found:,} bytes of arguments there, and "
            f"{analysis.host_output_size_in_bytes:,} of results."
        )


def format_path(path: tuple) -> str:
    """A tree path in words: `blocks/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_key(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths in words.

    >>> by_key({"blocks": {"q": 1, "k": 2}})
    {'blocks/k': 2, 'blocks/q': 1}
    """
    return {format_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(flat: dict, like: Any) -> Any:
    """The reverse of `by_key`: the tree `like`, whose None it keeps, of `flat`."""
    return jax.tree.map_with_path(lambda path, _: flat[format_path(path)], like)


def is_described(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: an array, a description, a number."""
    return isinstance(leaf, bool | int | float | complex) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


_OF_EQUINOX = "\nOf an Equinox module: jmem.measure(eqx.filter_jit(step), model, ...)."


def _is_sharding(leaf: Any) -> bool:
    return isinstance(leaf, Sharding | PartitionSpec)


def _is_host(sharding: Any) -> bool:
    """Whether a sharding says host memory; a PartitionSpec or None does not."""
    return getattr(sharding, "memory_kind", None) == HOST


def _place(mesh: Any, sharding: Any) -> NamedSharding:
    """The same placement over `mesh`; no placement means a copy on every device."""
    spec = PartitionSpec()
    if isinstance(sharding, NamedSharding):
        spec = sharding.spec
    elif isinstance(sharding, PartitionSpec):
        spec = sharding
    elif sharding is not None and len(sharding.device_set) > 1:
        raise ProgramError(
            f"sharding={sharding} names devices without a mesh; "
            "place the array with a jax.sharding.NamedSharding."
        )
    # Other kinds are the own memory of the device the array is on now.
    return NamedSharding(mesh, spec, memory_kind=HOST if _is_host(sharding) else None)
