"""Training states on disk: atomic, and checked bit for bit before they are read back.

Orbax writes the arrays into a folder of another name, a manifest of what was written
follows, and a rename makes the checkpoint appear: a process killed in the middle
leaves the older ones. The manifest is there because a flipped bit in an array file is
otherwise read back without a word, and a missing one ends in a page of errors from
Orbax's threads (both seen in Orbax 0.12). It carries a digest of itself, and what it
says counts, whatever the folder is called.

    folder/400/state/...        the leaves by key path, not compressed
    folder/400/manifest.json    {"format", "step", "data",
                                 "order": {"seed": 0, ...}     (`jmem.train.order`)
                                 "leaves": {path: "float32[2,3]"},
                                 "files": {path: [bytes, CRC-32]},
                                 "sha256": of all this; older ones have none}
"""

import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmem import disk
from jmem.offload import HOST_SPACE
from jmem.program import HOST, by_key
from jmem.terminal import tell
from jmem.train.errors import DivergedError
from jmem.train.finite import find_not_finite, name_leaves
from jmem.train.folder import Hold
from jmem.train.order import explain_difference

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that does not belong to this run."""


class Checkpoints:
    """The checkpoints of one run: `folder/<step>/`, of which the last `keep` stay.

    The folder is this process's until `close`, or until nobody has this object.

    Raises:
      FolderError: another process holds the folder; nothing was touched.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2):
        self.folder = folder.absolute()
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold = Hold(self.folder)

    def close(self) -> None:
        """Let other processes have the folder."""
        self._hold.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def list_steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending."""
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return tuple(sorted(int(n) for n in names if re.fullmatch("0|[1-9][0-9]*", n)))

    def remove_unfinished(self) -> None:
        """Delete what a process that was killed left of a checkpoint."""
        for unfinished in self.folder.glob("*.partial/"):
            shutil.rmtree(unfinished)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: str,
        order: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `state` as the checkpoint of `step`; drop the oldest beyond `keep`.

        `data` is the digest of the data that it was trained on, and `order` says in
        which order they came.

        Raises:
          DivergedError: a floating leaf is not finite; nothing was touched.
          CheckpointError: it could not be written; the older ones are still there.
        """
        from orbax import checkpoint

        if names := find_not_finite(state):
            raise DivergedError.after(step, name_leaves(names), self.list_steps())
        leaves = _name_leaves(state)
        arrays = {name: _unwrap_key(leaf) for name, leaf in leaves.items() if leaf.size}
        partial = self.folder / f"{step}.partial"
        handler = checkpoint.PyTreeCheckpointHandler(use_compression=False)
        try:
            self.remove_unfinished()
            with checkpoint.Checkpointer(handler) as writer:
                writer.save(partial / "state", args=checkpoint.args.PyTreeSave(arrays))
            manifest = {
                "format": FORMAT,
                "step": step,
                "data": data,
                "order": dict(order or {}),
                "leaves": _describe_leaves(state),
                "files": _digest_files(partial / "state"),
            }
            sealed = disk.seal(manifest, indent=1)
            disk.write_atomically(partial / "manifest.json", sealed)
            os.rename(partial, self.folder / str(step))
            disk.sync_folder(self.folder)
        except Exception as error:  # Orbax and TensorStore have no error class
            shutil.rmtree(partial, ignore_errors=True)  # the room may be needed
            kept = self.list_steps()
            raise CheckpointError(
                f"step {step}: the checkpoint could not be written to {self.folder}: "
                f"{_take_first_line(error)}\n"
                + (f"The last complete one is of step {kept[-1]}." if kept else "")
            ) from error
        for old in self.list_steps()[: -self.keep]:
            self.remove(old)

    def restore(
        self,
        like: Any,
        *,
        data: str | None,
        order: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> tuple[int, Any]:
        """The latest intact checkpoint as (step, state).

        `like` gives the state's tree, shapes, dtypes and shardings (`abstract`), and
        `order` of a step what a run says that saves it. Who trains no further gives no
        `data`, and takes what was trained on any. A damaged checkpoint is passed
        over, with a line that says so, and removed: the run is about to write that step
        again.

        Raises:
          CheckpointError: the latest checkpoint is of another state (the first leaf
            that differs is named), of other data, or of data in another order; or no
            checkpoint is intact.
        """
        damaged = {}
        self._name_by_content()
        for step in reversed(self.list_steps()):
            try:
                manifest = self._read_manifest(step)
                self._check(step, manifest, like, data, order)
                state = self._read(step, like)
            except disk.DamagedError as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                tell(f"checkpoint {bad} is damaged ({why}); going back to {step}")
                self.remove(bad)
            return step, state
        reasons = [f"step {step}: {why}" for step, why in damaged.items()]
        raise CheckpointError(
            f"{self.folder}: no checkpoint is intact: {'; '.join(reasons) or 'none'}.\n"
            "Start again in a new folder."
        )

    def remove(self, step: int) -> None:
        """Delete one checkpoint; killed in between, it is gone and not half there."""
        partial = self.folder / f"{step}.partial"
        os.rename(self.folder / str(step), partial)
        shutil.rmtree(partial)

    def _name_by_content(self) -> None:
        """Gives a folder of another name that of the step that its manifest says."""
        for name in self.list_steps():
            try:
                step = _parse_manifest(self.folder / str(name))["step"]
            except disk.DamagedError:
                continue
            if step != name and not (self.folder / str(step)).exists():
                os.rename(self.folder / str(name), self.folder / str(step))
                tell(f"checkpoint {name} is of step {step}, and is called so now")

    def _read_manifest(self, step: int) -> dict[str, Any]:
        """A checkpoint's manifest, which is of that step and of the files beside it.

        Raises:
          DamagedError: it is not.
          CheckpointError: it is of another version.
        """
        where = self.folder / str(step)
        manifest = _parse_manifest(where)
        if (written := manifest["format"]) != FORMAT:
            raise CheckpointError(
                f"{where}: format={written!r}; this version reads format {FORMAT}.\n"
                "Resume with the version that wrote it, or start in a new folder."
            )
        if manifest["step"] != step:
            raise disk.DamagedError(f"manifest.json is of step {manifest['step']}")
        files = manifest["files"]
        try:
            found = _digest_files(where / "state")
        except OSError as error:
            raise disk.DamagedError(_take_first_line(error)) from error
        for name in sorted(files.keys() | found.keys()):
            if files.get(name) != found.get(name):
                raise disk.DamagedError(
                    f"state/{name} is {_describe_file(found.get(name))} and was "
                    f"written as {_describe_file(files.get(name))}"
                )
        return manifest

    def _check(
        self, step: int, manifest: Mapping, like: Any, data: str | None, order: Any
    ) -> None:
        where = self.folder / str(step)
        if changed := _find_first_difference(
            manifest["leaves"], _describe_leaves(like)
        ):
            name, before, after = changed
            raise CheckpointError(
                f"{where}: leaf {name!r} is {before}, and this run's is {after}.\n"
                "The checkpoint is of another model or method: resume it with its own "
                "settings, or start in a new folder."
            )
        if data is not None and manifest["data"] != data:
            raise CheckpointError(
                f"{where}: was trained on data with digest={manifest['data']!r}, "
                f"and this run's is {data!r}.\n"
                "Resume with the same data, or start in a new folder."
            )
        saved = manifest["order"]
        if saved and order and (why := explain_difference(saved, order(step))):
            raise CheckpointError(
                f"{where}: the order of its data had {why}.\n"
                "Rows would be seen twice and others never. Resume with the same order "
                "(seed, batch size, shuffling), or start in a new folder."
            )

    def _read(self, step: int, like: Any) -> Any:
        from orbax import checkpoint

        templates = _name_leaves(like)
        raw = {
            n: _describe_unwrapped(leaf) for n, leaf in templates.items() if leaf.size
        }
        told = checkpoint.checkpoint_utils.construct_restore_args(raw)
        wanted = checkpoint.args.PyTreeRestore(item=raw, restore_args=told)
        handler = checkpoint.PyTreeCheckpointHandler(use_compression=False)
        with checkpoint.Checkpointer(handler) as reader:
            restored = reader.restore(self.folder / str(step) / "state", args=wanted)
        leaves = []
        for name, template in templates.items():
            leaf = restored.pop(name, None)  # Orbax saves no array of size zero
            if leaf is None:
                leaf = jnp.zeros(template.shape, template.dtype)
            if _is_key(template):
                leaf = _wrap_key(leaf, template)
            leaf = jax.device_put(leaf, template.sharding)
            if template.sharding.memory_kind == HOST:
                # Its placement is right, its type says device (Orbax 0.12): a program
                # lowered for that type would bring it there, and abort.
                leaf = jax.device_put(leaf, HOST_SPACE)
            leaves.append(leaf)
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        if names := find_not_finite(state):  # saved by an older version
            raise disk.DamagedError(f"{name_leaves(names)} is not finite")
        return state


def _parse_manifest(where: pathlib.Path) -> dict[str, Any]:
    """The manifest in a checkpoint's folder, whose fields are what they must be."""
    try:
        raw = (where / "manifest.json").read_bytes()
    except OSError as error:
        raise disk.DamagedError(f"manifest.json: {_take_first_line(error)}") from error
    manifest: dict[str, Any] = {"order": {}}
    manifest |= disk.open_sealed(raw, "manifest.json")
    for field, kind in _FIELDS.items():
        if type(manifest.get(field)) is not kind:
            raise disk.DamagedError(
                f"manifest.json: {field} is {str(manifest.get(field, 'absent'))[:40]}"
            )
    if manifest["step"] < 0 or not all(map(_is_digest, manifest["files"].values())):
        raise disk.DamagedError("manifest.json: step or files are out of range")
    return manifest


_FIELDS = {"format": int, "step": int, "data": str} | dict.fromkeys(
    ("order", "leaves", "files"), dict
)


def _is_digest(value: Any) -> bool:
    return isinstance(value, list) and [type(v) for v in value] == [int, int]


def _digest_files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            crc = 0
            with path.open("rb") as file:
                while chunk := file.read(2**22):
                    crc = zlib.crc32(chunk, crc)
            digests[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return digests


def _describe_file(digest: list[int] | None) -> str:
    return f"{digest[0]} bytes, CRC {digest[1]:08x}" if digest else "absent"


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state,
    )


def _name_leaves(tree: Any) -> dict[str, Any]:
    named = by_key(tree)
    count = len(jax.tree.leaves(tree))
    assert len(named) == count, "two leaves of the state share a key path"
    return named


def _describe_leaf(leaf: Any) -> str:
    """A leaf's layout in words, as `float32[2,3]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _describe_leaves(tree: Any) -> dict[str, str]:
    return {name: _describe_leaf(leaf) for name, leaf in _name_leaves(tree).items()}


def find_difference(first: Any, second: Any) -> tuple[str, str, str] | None:
    """Path and both layouts of a leaf that two trees do not have alike, or None.

    >>> find_difference({"m": jnp.ones(3)}, {"m": jnp.ones(4)})
    ('m', 'float32[3]', 'float32[4]')
    """
    return _find_first_difference(_describe_leaves(first), _describe_leaves(second))


def _find_first_difference(
    first: dict[str, str], second: dict[str, str]
) -> tuple[str, str, str] | None:
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return name, first.get(name, "absent"), second.get(name, "absent")
    return None


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _wrap_key(words: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    found = []  # an abstract key tells its implementation only to a traced function
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(words, impl=found[0])


def _unwrap_key(leaf: jax.Array) -> jax.Array:
    """A typed random key as its words; every other leaf as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _describe_unwrapped(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    words = jax.eval_shape(_unwrap_key, leaf)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def _take_first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
