"""Prunes a checkpoint and packs it: a folder whose linear maps stay packed in memory.

    python -m experiments.prune my-llama --sparsity 0.6 --to pruned
    python -m experiments.prune my-llama --sparsity 0.7 --values int4 --to pruned
    python -m experiments.prune pruned --unpack --to plain

The folder opens as any checkpoint: `--model pruned` of every experiment, and

    checkpoint = jmem.checkpoints.load("pruned")
    params = checkpoint.params(packed=True)      # as packed; without it, kernels

An output row loses the share `--sparsity` of its weights, those of least magnitude.
Each map takes the smallest of `--formats`, for all its layers; what none makes smaller
keeps its kernel. Embedding, norms, biases and head stay. `--unpack` writes a packed
folder as an ordinary Hugging Face folder, whose kernels have zeros.

The host holds what is packed and one layer's kernel. No GPU is touched.
"""

import dataclasses
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

import jmem.checkpoints
from experiments.harness import cli
from jmem.checkpoints import Checkpoint, files
from jmem.memory.report import format_size
from jmem.models.decoder import Decoder
from jmem.nn.maps import find_maps
from jmem.sparse import flash_llm
from jmem.sparse.flash_llm import FormatName, KeptDense, Values, count_bytes
from jmem.train.folder import require_free

Criterion = Literal["magnitude"]
"""What says which weights go. One that reads activations calls for the whole model:
`prune(model, params, criterion, sparsity, batches)` gives parameters with zeros, and
`flash_llm.pack` packs them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    model: str
    """What `jmem.checkpoints.load` opens: a folder, a file, or "smollm2-135m"."""
    sparsity: float = 0.6
    """The share of each output row's weights that becomes zero; 0 packs what is zero
    already."""
    to: pathlib.Path = pathlib.Path("pruned")
    """The folder to write: absent, or empty."""
    criterion: Criterion = "magnitude"
    """Which weights become zero: those of least magnitude."""
    values: Values = "stored"
    """What the others are kept as: as stored, in another dtype, or as int8 or int4 with
    a float32 scale an output row."""
    formats: tuple[FormatName, ...] = flash_llm.DEFAULT
    """The formats that a map may take. The kernel reads FragBitmap alone."""
    unpack: bool = False
    """Write `model`, a packed folder, as an ordinary Hugging Face folder."""


def prune(
    command: Command, checkpoint: Checkpoint, tell: Callable[[str], None] = print
) -> dict:
    """The checkpoint's parameters, pruned and packed; tells each map as it is done.

    Raises:
      CheckpointError: a file changed, or a value is not finite.
      ValueError: a setting, or a kernel whose values do not fit `values`.
    """
    make = flash_llm.packer(
        sparsity=command.sparsity, formats=command.formats, values=command.values
    )

    def make_and_tell(name: str, give: Callable, layers: int) -> dict[str, Any]:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KeptDense)
            parts = make(name, give, layers)
        seconds = time.perf_counter() - start
        tell(_format_map(name, parts, checkpoint.dtype, seconds))
        for warning in caught:
            tell(f"  {warning.message}")
        return parts

    return checkpoint.params(packed=make_and_tell)


def _format_map(
    name: str, parts: Mapping[str, Any], dtype: np.dtype, seconds: float
) -> str:
    """A map's name, format, bytes before and after, and kernels packed a second."""
    matrix, after = parts.get("sparse"), count_bytes(parts)
    shape = parts["kernel"].shape if matrix is None else _find_shape(matrix)
    before = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    kind = "kernel" if matrix is None else type(matrix).__name__
    return (
        f"{name:<20}{kind:<12}{format_size(before):>12}{format_size(after):>12}"
        f"{before / after:>8.2f}{before / 1e9 / seconds:>8.2f} GB/s"
    )


def _find_shape(matrix: Any) -> tuple[int, ...]:
    layers = jax.tree.leaves(matrix)[0].shape[0]
    return layers, matrix.inputs, matrix.outputs


def main(command: Command) -> None:
    jax.config.update("jax_platforms", "cpu")  # a GPU may be training at this moment
    checkpoint = jmem.checkpoints.load(command.model)
    files.check_free(command.to)
    if command.unpack:
        command.to.parent.mkdir(parents=True, exist_ok=True)
        nbytes = _save(checkpoint.params(), checkpoint, command)
        print(f"{command.to}: {format_size(nbytes)}, a Hugging Face folder")
        return
    plain = Decoder(checkpoint.config, dtype=checkpoint.dtype).abstract()
    described = flash_llm.abstract(
        plain, command.sparsity, format=command.formats[0], values=command.values
    )
    command.to.parent.mkdir(parents=True, exist_ok=True)
    require_free(command.to.parent, count_bytes(described), f"{command.to}")
    print(f"{'map':<20}{'format':<12}{'before':>12}{'after':>12}{'times':>8}")
    params = prune(command, checkpoint)
    nbytes = _save(params, checkpoint, command)
    for what, before, after in (
        ("linear maps", plain["blocks"], params["blocks"]),
        ("the whole model", plain, params),
    ):
        before, after = _count(before, what), _count(after, what)
        print(
            f"{what:<32}{format_size(before):>12}{format_size(after):>12}"
            f"{before / after:>8.2f}"
        )
    on_disk = _count_files(checkpoint.path)
    print(
        f"{'on disk':<32}{format_size(on_disk):>12}{format_size(nbytes):>12}"
        f"{on_disk / nbytes:>8.2f}\n{command.to}: jmem.checkpoints.load("
        f'"{command.to}").params(packed=True)'
    )


def _save(params: dict, checkpoint: Checkpoint, command: Command) -> int:
    return jmem.checkpoints.save(params, checkpoint.config, command.to, like=checkpoint)


def _count(tree: Any, what: str) -> int:
    """Bytes of parameters, or of their linear maps alone."""
    return count_bytes(find_maps(tree) if what == "linear maps" else tree)


def _count_files(path: pathlib.Path) -> int:
    """Bytes of a checkpoint's weights."""
    found = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in found)


if __name__ == "__main__":
    cli.script(main, Command)
