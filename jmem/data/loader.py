"""Batches by number: shuffled, endless, without state, so that resuming is exact."""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Iterator, Mapping
from typing import SupportsIndex

import jax
import numpy as np
from jaxtyping import Int64

from jmem.data.batch import Batch
from jmem.data.document import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Rows of `data` in a new random order every epoch; `batch(step)` for any step.

    The rows of all epochs stand in one endless line, of which step `s` takes
    `batch_size` from place `s * batch_size` on. A batch at the end of an epoch is thus
    completed from the next one: no row is ever left out, and one row may be in such a
    batch twice.

    Raises:
      DataError: fewer rows than one batch; no weight in the loss; unequal shapes; a
        batch size below 1 or a negative seed.
    """

    data: Batch
    """All rows, as `pack` or `pad` makes them: [N, T]."""
    batch_size: int
    """Rows a batch."""
    seed: int = 0
    """Seed of the order of rows, which depends on it, the epoch, N and nothing else."""

    def __post_init__(self):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(self.data)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise DataError(
                f"Loader: data has shapes {shapes}; need one [N, T] for all."
            )
        if self.batch_size < 1:
            raise DataError(f"Loader: batch_size={self.batch_size}; need at least 1.")
        if self.seed < 0:
            raise DataError(f"Loader: seed={self.seed} is negative; need 0 or more.")
        if self.rows < self.batch_size:
            raise DataError(
                f"Loader: the data give {self.rows} row(s) of {shapes[0][1]} tokens, "
                f"fewer than batch_size={self.batch_size}. Give more text, or lower "
                "batch_size or seq_len."
            )
        if not np.any(self.data.weights):
            raise DataError(
                "Loader: every weight is 0, so there is no loss to train on."
            )

    @property
    def rows(self) -> int:
        """Rows in one epoch, N."""
        return self.data.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens a row, T."""
        return self.data.tokens.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen: N / batch_size, rounded up."""
        return -(-self.rows // self.batch_size)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that other tokens, weights or shapes would change.

        Independent of batch size, seed and machine. A resumed run compares it, and
        `order`.
        """
        return self._digest

    @property
    def order(self) -> dict[str, int]:
        """What says, beside the data, which rows are in which batch."""
        return {"batch_size": int(self.batch_size), "seed": int(self.seed)}

    @functools.cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256()
        leaves = jax.tree.leaves(self.data)  # rows of one document have no segments
        for leaf, dtype in zip(leaves, ("<i4", "<i4", "<f4", "<i4")):
            sha.update(repr(np.shape(leaf)).encode())
            sha.update(np.ascontiguousarray(leaf, dtype).data)
        return sha.hexdigest()[:16]

    def batch(self, step: SupportsIndex) -> Batch:
        """Batch number `step`, counted from 0 and without end; NumPy arrays [B, T]."""
        step = operator.index(step)
        if step < 0:
            raise DataError(f"Loader.batch: step={step} is negative; steps start at 0.")
        epoch, start = divmod(step * self.batch_size, self.rows)
        picked = draw_order(self.seed, epoch, self.rows)[start:][: self.batch_size]
        rest = draw_order(self.seed, epoch + 1, self.rows)[
            : self.batch_size - picked.size
        ]
        rows = np.concatenate([picked, rest])
        return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], self.data)


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """The rows of several loaders in each batch, one loader's after another's.

    For several adapters that are trained at once, each on the rows of its own loader
    (`jmem.finetune.mixlora`), and as well for one model on several tasks: of B rows
    every task has as many. A mean over all their targets is then moved most by the
    task with the longest completions.

    Loaders with as many rows as each other and one seed show the same row numbers in
    one batch: give seeds of their own to those that tell of the same things.

    Raises:
      DataError: no loader; loaders whose batches have unequal shapes.
    """

    loaders: tuple[Loader, ...]
    """Each goes through its own epochs, a short one sooner than a long one."""

    def __post_init__(self):
        if not self.loaders:
            raise DataError("Joint: loaders is empty; give at least one Loader.")
        first = self.loaders[0]
        for number, loader in enumerate(self.loaders):
            if loader.batch_size != first.batch_size:
                raise DataError(
                    f"Joint: loaders[{number}].batch_size={loader.batch_size} and "
                    f"loaders[0].batch_size={first.batch_size}, but each gives as many "
                    "rows to a batch. Make both loaders with one batch_size."
                )
            if loader.seq_len != first.seq_len:
                raise DataError(
                    f"Joint: loaders[{number}] has rows of {loader.seq_len} tokens and "
                    f"loaders[0] of {first.seq_len}, but a batch has one length. Pad "
                    "all to the longest: jmem.data.pad(sequences, seq_len="
                    f"{max(other.seq_len for other in self.loaders)})."
                )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the loaders' own, in order."""
        digests = "".join(loader.digest for loader in self.loaders)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    @property
    def order(self) -> dict[str, int]:
        """What says, beside the data, which rows are in which batch."""
        return {
            f"loaders[{number}].{name}": value
            for number, loader in enumerate(self.loaders)
            for name, value in loader.order.items()
        }

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row of every loader has been seen."""
        return max(loader.steps_per_epoch for loader in self.loaders)

    def batch(self, step: SupportsIndex) -> Batch:
        """Batch number `step`, NumPy arrays [B, T]: of J loaders, B / J rows each.

        Beside packed rows of documents apart, others are one document each.
        """
        batches = [loader.batch(step) for loader in self.loaders]
        if any(own.segments is not None for own in batches):
            batches = [
                own._replace(segments=np.ones_like(own.tokens))
                if own.segments is None
                else own
                for own in batches
            ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def balance(rows: Mapping[str, Batch], batch_size: int, seed: int = 0) -> Joint:
    """Batches with as many rows of each task; `rows` are those of each, by its name.

    Raises:
      DataError: `batch_size` is no multiple of the tasks.
    """
    each, left = divmod(batch_size, len(rows))
    if left or not each:
        raise DataError(
            f"balance: batch_size={batch_size} is not a multiple of the {len(rows)} "
            f"tasks {', '.join(rows)}, which get as many rows each."
        )
    loaders = [
        Loader(own, each, 1000 * seed + number)
        for number, own in enumerate(rows.values())
    ]
    return Joint(tuple(loaders))


@functools.lru_cache(maxsize=16)
def draw_order(seed: int, epoch: int, rows: int) -> Int64[np.ndarray, " N"]:
    """The permutation of an epoch; kept for this epoch and the next of 8 loaders.

    Sorts raw 64-bit draws: NumPy promises that a bit generator's stream stays the same
    from release to release, and does not promise it of `Generator.permutation`.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    permutation = np.argsort(draws, kind="stable")
    permutation.flags.writeable = False
    return permutation


def in_order(data: Batch, batch_size: int) -> Iterator[Batch]:
    """Every row once, as it stands, for evaluation; [batch_size, T] each.

    The last batch is filled with rows of weight 0, so an average over all batches must
    weigh by `weights` (sum of losses over sum of weights).
    """
    if batch_size < 1:
        raise DataError(f"in_order: batch_size={batch_size}; need at least 1.")
    for start in range(0, data.tokens.shape[0], batch_size):
        missing = max(start + batch_size - data.tokens.shape[0], 0)
        yield jax.tree.map(
            lambda leaf, start=start, missing=missing: np.pad(
                np.asarray(leaf)[start : start + batch_size], ((0, missing), (0, 0))
            ),
            data,
        )
