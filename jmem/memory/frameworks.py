"""Functions of flax NNX and Equinox, partials and callable models, as JAX sees them.

`jax.jit` compiles a function of arrays. `nnx.jit` and `eqx.filter_jit` compile another
one than their users write: modules go in as their arrays, what changed in them comes
out, donation is theirs. `read` returns that function and its arrays, so that what is
measured is what runs. Neither library is imported: who has such a function has it.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType

from jmem.lowering import ProgramError, explain_errors
from jmem.memory.calls import (
    Call,
    bind,
    hold_descriptions,
    hold_static,
    name_arrays,
    name_of,
    place,
    prepend,
)
from jmem.program import by_key, format_path, is_described


def read(
    what: Callable, args: tuple, donate: tuple[int, ...], static: tuple[int, ...]
) -> Call:
    """What JAX compiles where a function is called with `args`.

    Args:
      what: a function, compiled by `jax.jit`, `nnx.jit` or `eqx.filter_jit` or not; a
        partial of one, a bound method, or a module that can be called.
      args: its arguments; NNX and Equinox modules may hold descriptions of arrays.
      donate: positions of `args`; () takes those that the function itself donates.
      static: positions of `args`, likewise.

    Raises:
      ProgramError: the function's changes to a module would be lost, which of its
        arguments are static cannot be told, or it is compiled already; says what to
        write instead.
    """
    if isinstance(what, jax.stages.Compiled):
        raise ProgramError(
            "measure: what is compiled for other devices already.\nGive the function "
            "that it was compiled of: jmem.measure(jax.jit(step), ...)"
        )
    call = _open(Call(what, args, donate, static))
    if _is_equinox_jit(call.fn) or _asks_for_equinox(call):
        return _read_equinox(call)
    if _is_nnx_jit(call.fn):
        return _read_nnx(call)
    if hasattr(call.fn, "trace"):
        call, names = _find_jit_arguments(call)
        jitted: Any = call.fn
        inner = place(dataclasses.replace(call, fn=jitted.__wrapped__), names)
        refuse_lost_changes(inner.fn, inner.args, inner.static)
        return place(call, names)
    call = place(call, name_arrays(call.keywords))
    if _find_changed(call.fn, call.args, call.static):
        return _read_nnx(call)
    return call


# Partials, methods and models ---------------------------------------------------------


def _open(call: Call) -> Call:
    """The call with what is bound to its function, or is its function, as arguments.

    What is bound to a plain function stays bound, as `jax.jit` leaves it: constants.
    """
    fn: Any = call.fn
    modules = (*_nnx_types(), *_equinox_types())
    own, method = (getattr(fn, name, None) for name in ("__self__", "__func__"))
    if method and (isinstance(own, modules) or hasattr(method, "trace")):
        return _open(prepend(call, method, own))
    bound = getattr(fn, "args", ()), getattr(fn, "keywords", {})
    if isinstance(fn, functools.partial) or (
        isinstance(fn, _equinox_types()) and hasattr(fn, "func")
    ):
        inner: Any = fn.func
        opened = hasattr(inner, "trace") or _is_equinox_jit(inner)
        if not (opened or _hold(bound, modules) or hold_descriptions(bound)):
            return call
        if any(value is getattr(functools, "Placeholder", call) for value in bound[0]):
            raise ProgramError(
                f"{name_of(inner)}: a partial with placeholders cannot be opened. Give "
                "measure the function itself, and its arguments in order."
            )
        found = bind(prepend(call, inner, *bound[0]), bound[1])
        before, behind = len(bound[0]), len(bound[0]) + len(call.args)
        own = (*range(before), *range(behind, len(found.args)))
        return _open(found if opened else hold_static(found, own))
    if isinstance(fn, modules) and not (_is_equinox_jit(fn) or _is_nnx_jit(fn)):
        return prepend(call, type(fn).__call__, fn)
    return call


# jax.jit ------------------------------------------------------------------------------


def _find_jit_arguments(call: Call) -> tuple[Call, list[str]]:
    """The call with the positions that a jitted function donates or holds static.

    And its keywords that are traced, which count as the last arguments.
    """
    jitted: Any = call.fn
    with _tracing(jitted, (call.args, call.keywords)):
        traced = jitted.trace(*_unplace(call.args), **_unplace(call.keywords))
    infos, named = traced.args_info
    found = list(_list_statics(infos, call.args))
    if len(found) > 1:  # two numbers, one of them static
        found = [some for some in found if all(_is_static(call, n) for n in some)]
    if call.static:
        found = [call.static]
    if len(found) != 1:
        raise ProgramError(
            f"{name_of(jitted)}: its static arguments cannot be told from its others; "
            "give their positions as static=(...)."
        )
    [static] = found
    kept = [n for n in range(len(call.args)) if n not in static]
    kept += range(len(call.args), len(call.args) + len(named))
    donate = call.donate or _list_donated(kept, (*infos, *named.values()))
    return dataclasses.replace(call, donate=donate, static=static), [*named]


def _list_statics(infos: tuple, args: tuple):
    """Every choice of positions without which the arguments can be the traced ones."""
    missing = len(args) - len(infos)
    for static in itertools.combinations(range(len(args)), missing):
        kept = [n for n in range(len(args)) if n not in static]
        if all(_is_described_by(info, args[n]) for n, info in zip(kept, infos)):
            yield static


def _list_donated(kept: list[int], infos: tuple) -> tuple[int, ...]:
    return tuple(
        n
        for n, info in zip(kept, infos)
        if any(leaf.donated for leaf in jax.tree.leaves(info))
    )


def _is_described_by(info: Any, value: Any) -> bool:
    """Whether JAX's description of a traced argument can be that of `value`."""
    leaves, structure = jax.tree.flatten(value)
    described, other = jax.tree.flatten(info)
    return structure == other and all(
        is_described(leaf) and (np.shape(leaf) == of.shape)
        for leaf, of in zip(leaves, described)
    )


def _is_static(call: Call, position: int) -> bool:
    """Whether JAX refuses an argument that has no hash there, as it does of statics."""
    args = list(call.args)
    args[position] = jax.tree.map(np.asarray, [args[position]])
    try:
        call.fn.trace(*args, **call.keywords)  # pyright: ignore[reportFunctionMemberAccess]
    except Exception as error:
        return isinstance(error, ValueError) and "hashable" in str(error)
    return False


# Equinox ------------------------------------------------------------------------------


def _equinox_types() -> tuple[type, ...]:
    equinox = sys.modules.get("equinox")
    return (equinox.Module,) if equinox else ()


def _is_equinox_jit(fn: Any) -> bool:
    return isinstance(fn, _equinox_types()) and hasattr(fn, "donate_first")


def _asks_for_equinox(call: Call) -> bool:
    """Whether an argument is a module that `jax.jit` would not take, or was not asked.

    It takes those that hold arrays alone, as a part of `eqx.partition`.
    """
    own = [arg for arg in call.args if _hold(arg, _equinox_types())]
    jitted = hasattr(call.fn, "trace")
    return bool(own) and not (jitted and all(map(is_described, jax.tree.leaves(own))))


def _read_equinox(call: Call) -> Call:
    """The function of the arrays among its arguments; all else is compiled in."""
    fn: Any = call.fn
    donate, args = call.donate, call.args
    if _is_equinox_jit(fn):
        first, rest = fn.donate_first, fn.donate_rest
        fn = fn.__wrapped__
        inner = _open(Call(fn, args, donate, call.static, call.keywords))
        more = [rest for _ in name_arrays(inner.keywords)]
        own = range(len(inner.args) - len(args))  # arrays of the function itself
        donated = [first, *[rest] * (len(args) - 1)]
        given = [rest] * len(own) + donated[: len(args)] + more
        found = tuple(n for n, donates in enumerate(given) if donates)
        return _keep_usable(_filter(inner), inner.donate or found)
    if hasattr(fn, "trace"):
        raise ProgramError(
            f"{name_of(fn)}: jax.jit takes no Equinox module that holds more than "
            "arrays.\nCompile it as Equinox does:\n"
            "    step = eqx.filter_jit(step, donate='all')\n"
            "    jmem.measure(step, model, ...)"
        )
    return _filter(call)


def _filter(call: Call) -> Call:
    """The function of its arguments' arrays, that returns its result's arrays."""
    call = place(call, name_arrays(call.keywords))
    fn, static = call.fn, call.static
    held = [arg if n in static else _take(arg, True) for n, arg in enumerate(call.args)]
    rest = [
        None if n in static else _take(arg, False) for n, arg in enumerate(call.args)
    ]

    @functools.wraps(fn)
    def filtered(*arrays):
        args = [
            array if n in static else jax.tree.map(_choose, array, other, is_leaf=_none)
            for n, (array, other) in enumerate(zip(arrays, rest))
        ]
        return _take(fn(*args), True)

    return Call(filtered, tuple(held), call.donate, static)


def _keep_usable(call: Call, donate: tuple[int, ...]) -> Call:
    """The call with what a result can reuse donated; Equinox says nothing of others."""
    arrays = [arg for n, arg in enumerate(call.args) if n not in call.static]
    with _tracing(call.fn, arrays):
        results = _list_kinds(jax.eval_shape(call.fn, *_unplace(tuple(arrays))))
    usable = (n for n in donate if _list_kinds(call.args[n]) & results)
    return dataclasses.replace(call, donate=tuple(usable))


def _list_kinds(tree: Any) -> set[tuple]:
    return {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)}


def _take(tree: Any, arrays: bool) -> Any:
    """The tree with None for every leaf that is an array, or for every other one."""
    return jax.tree.map(lambda leaf: leaf if _is_array(leaf) == arrays else None, tree)


def _choose(one: Any, other: Any) -> Any:
    return other if one is None else one


def _none(value: Any) -> bool:
    return value is None


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


# Flax NNX -----------------------------------------------------------------------------


def _nnx_types() -> tuple[type, ...]:
    nnx = sys.modules.get("flax.nnx")
    names = ("Pytree", "Object", "Module", "Variable")
    return tuple(getattr(nnx, name) for name in names if hasattr(nnx, name))


def _nnx_states() -> tuple[type, ...]:
    nnx = sys.modules.get("flax.nnx")
    return (nnx.State,) if nnx else ()


def _is_nnx_jit(fn: Any) -> bool:
    """Whether it is what `nnx.jit` returns: traced, but not by JAX's own words."""
    return hasattr(fn, "trace") and type(fn).__module__.startswith("flax.nnx")


def _read_nnx(call: Call) -> Call:
    """The function that `nnx.jit` makes JAX compile: state in, changed state out.

    Raises:
      ProgramError: arguments on a mesh whose arrays cannot be told apart.
    """
    nnx = sys.modules["flax.nnx"]
    fn: Any = call.fn
    if not _is_nnx_jit(fn) or call.donate or call.static:
        plain = fn.__wrapped__ if _is_nnx_jit(fn) else fn
        more = {"donate_argnums": call.donate, "static_argnums": call.static}
        fn = nnx.jit(plain, **{name: given for name, given in more.items() if given})
    if any(
        getattr(fn, name, None) is not None
        for name in ("in_shardings", "out_shardings")
    ):
        raise ProgramError(
            f"{name_of(fn)}: measure cannot follow the shardings of nnx.jit.\n"
            "Leave them out, and place the arrays instead:\n"
            "    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))"
        )
    with _tracing(fn, (call.args, call.keywords)):
        traced = fn.trace(*_unplace(call.args), **_unplace(call.keywords)).traced
    infos, keyword_infos = traced.args_info
    owners = [*call.args, *(call.keywords[name] for name in keyword_infos)]
    kept, static = _pair_nnx(infos, call, fn)
    kept += range(len(call.args), len(owners))
    infos = (*infos, *keyword_infos.values())
    described = {n: _describe_nnx(owners[n], info, fn) for n, info in zip(kept, infos)}
    order = [(n, path) for n in kept for path in described[n]]
    run = jaxpr_as_fun(traced.jaxpr)

    @functools.wraps(fn)
    def pure(*args):
        held = {n: by_key(args[n]) for n in kept}
        return run(*(held[n][path] for n, path in order))

    args = tuple(
        _nest(described[n]) if n in described else owner
        for n, owner in enumerate(owners)
    )
    return Call(pure, args, _list_donated(kept, infos), static)


def _pair_nnx(infos: tuple, call: Call, fn: Any) -> tuple[list[int], tuple[int, ...]]:
    """Positions of the traced arguments, and of the static ones."""
    if len(infos) > len(call.args):  # nnx.jit_partial holds what it was given in front
        raise ProgramError(
            f"{name_of(fn)}: measure cannot look into nnx.jit_partial.\n"
            "Give it the function and all its arguments:\n"
            "    jmem.measure(nnx.jit(step), model, ...)"
        )
    types = (*_nnx_types(), *_nnx_states())
    movable = [n for n, arg in enumerate(call.args) if not _hold(arg, types)]
    missing = len(call.args) - len(infos)
    for static in itertools.combinations(movable, missing):
        kept = [n for n in range(len(call.args)) if n not in static]
        if all(
            n not in movable or _is_described_by(info, call.args[n])
            for n, info in zip(kept, infos)
        ):
            return kept, static
    raise ProgramError(
        f"{name_of(fn)}: its static arguments cannot be told from its others; give "
        "their positions as static=(...)."
    )


def _describe_nnx(arg: Any, info: Any, fn: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Descriptions of an argument's arrays by their paths, in the order of tracing."""
    nnx = sys.modules["flax.nnx"]
    infos = jax.tree.leaves(info)
    tree = nnx.state(arg) if _hold(arg, _nnx_types()) else arg
    named = [(format_path(p), leaf) for p, leaf in jax.tree.leaves_with_path(tree)]
    short = [(name.removesuffix("/value"), leaf) for name, leaf in named]
    named = short if _are_apart(short) else named
    own = [np.shape(leaf) for _, leaf in named]
    if own == [of.shape for of in infos] and not _are_apart(named):
        named = [(f"leaf {n}", leaf) for n, (_, leaf) in enumerate(named)]
    if own != [of.shape for of in infos]:
        # Shared between two arguments, and so traced in one of them only.
        if any(_find_placement(leaf) for _, leaf in named):
            raise ProgramError(
                f"{name_of(fn)}: its arguments share arrays that lie on a mesh, and "
                "measure cannot tell which is which.\nSplit them, and merge inside:\n"
                "    graph, state = nnx.split((model, optimizer))\n"
                "    jmem.measure(lambda state, batch: ..., state, batch)"
            )
        named = [(str(n), None) for n in range(len(infos))]
    return {
        name: jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=_find_placement(leaf))
        for (name, leaf), of in zip(named, infos)
    }


def _are_apart(named: list[tuple[str, Any]]) -> bool:
    """Whether no path of a leaf is that of another, or leads to another."""
    paths = {name for name, _ in named}
    above = {"/".join(p.split("/")[:n]) for p in paths for n in range(p.count("/") + 1)}
    return len(paths) == len(named) and not paths & above


def _unplace[Arguments](args: Arguments) -> Arguments:
    """The arguments without the mesh that they are on, which is not in scope here."""

    def describe(leaf: Any) -> Any:
        if _find_placement(leaf) is None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not _hold(args, _nnx_types()):
        return jax.tree.map(describe, args)
    if not any(map(_find_placement, jax.tree.leaves(args))):
        return args
    graph, state = nnx.split(args)  # keeps what two modules share
    return nnx.merge(graph, jax.tree.map(describe, state))


def _nest(by_path: Mapping[str, Any]) -> Any:
    """A tree of dicts whose leaves have these paths."""
    if list(by_path) == [""]:
        return by_path[""]
    inside: dict[str, dict[str, Any]] = {}
    for path, leaf in by_path.items():
        first, _, rest = path.partition("/")
        inside.setdefault(first, {})[rest] = leaf
    return {name: _nest(leaves) for name, leaves in inside.items()}


def _find_placement(leaf: Any) -> jax.sharding.NamedSharding | None:
    """Where an array lies on a mesh; None for one that lies on no mesh."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def refuse_lost_changes(fn: Any, args: tuple, static: tuple[int, ...]) -> None:
    """Refuses a function that changes NNX modules in a way that `jax.jit` loses.

    Raises:
      ProgramError: it changes one of its arguments; names the position.
    """
    inner = fn.__wrapped__ if hasattr(fn, "trace") else fn
    if changed := _find_changed(inner, args, static):
        raise ProgramError(
            f"{name_of(fn)}: it changes the NNX modules of argument {min(changed)}, "
            "and jax.jit loses the change.\nCompile it as NNX does:\n"
            "    step = nnx.jit(step, donate_argnums=...)\n"
            "    jmem.measure(step, model, ...)"
        )


def _find_changed(fn: Any, args: tuple, static: tuple[int, ...]) -> set[int]:
    """Positions of arguments with NNX modules that a function changes.

    One that it returns as well is not lost.
    """
    modules = _nnx_types()
    own = [n for n, arg in enumerate(args) if _hold(arg, modules)]
    changed = set()
    if any(not _is_array(leaf) for n in own for leaf in jax.tree.leaves(args[n])):
        return {*own}  # modules that are no pytrees: nothing but nnx.jit takes them

    def look(*arrays):
        every = iter(arrays)
        given = [a if n in static else next(every) for n, a in enumerate(args)]
        before = {n: jax.tree.leaves(given[n]) for n in own}
        result = fn(*given)
        returned = {*map(id, jax.tree.leaves(result))}
        for n in own:
            after = [*map(id, jax.tree.leaves(given[n]))]
            if after != [*map(id, before[n])] and not returned >= {*after}:
                changed.add(n)

    if own:
        arrays = [arg for n, arg in enumerate(args) if n not in static]
        with _tracing(fn, arrays):
            jax.eval_shape(look, *_unplace(tuple(arrays)))
    return changed


# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tracing(fn: Any, args: Any) -> Iterator[None]:
    """Known errors in words, and the mesh that arguments are on in scope."""
    placed = filter(None, map(_find_placement, jax.tree.leaves(args)))
    scope = contextlib.nullcontext()
    if found := next(placed, None):
        shape = found.mesh.shape
        auto = (AxisType.Auto,) * len(shape)
        mesh = AbstractMesh((*shape.values(),), (*shape,), axis_types=auto)
        scope = jax.sharding.use_abstract_mesh(mesh)
    with explain_errors(name_of(fn)), scope:
        yield


def _hold(tree: Any, types: tuple[type, ...]) -> bool:
    """Whether an object of these types is anywhere in a tree, in a split state not."""
    if not types:
        return False

    def stops(value: Any) -> bool:
        return isinstance(value, (*types, *_nnx_states()))

    leaves = jax.tree.leaves(tree, is_leaf=stops)
    return any(isinstance(leaf, types) for leaf in leaves)
