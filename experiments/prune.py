"""Prunes a checkpoint and packs it: a folder whose linear maps stay packed in memory.

    python -m experiments.prune my-llama --sparsity 0.5 --to pruned
    python -m experiments.prune my-llama --criterion wanda --data my.jsonl --to pruned
    python -m experiments.prune my-llama --criterion magnitude --to pruned
    python -m experiments.prune pruned --unpack --to plain

The folder opens as any checkpoint: `--model pruned` of every experiment, and

    checkpoint = jmem.checkpoints.load("pruned")
    params = checkpoint.params(packed=True)      # as packed; without it, kernels

The linear maps of the blocks lose the share `--sparsity` of their weights, by SparseGPT
if nothing else is said, which looks at what they read of some text (`--data`, or
Python's documentation). Each map takes the smallest of `--formats`, for all its layers;
what none makes smaller keeps its kernel. Embedding, norms, biases and head stay.
`--unpack` writes a packed folder as a Hugging Face folder, whose kernels have zeros.

By magnitude the host holds what is packed and one layer's kernel, and no GPU is
touched; the others hold the model, and run a layer at a time where JAX runs.
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
from jmem.data.source import TextSource
from jmem.memory.report import format_size
from jmem.models.decoder import Decoder
from jmem.nn.maps import find_maps, replace_maps
from jmem.nn.pruned import find_shape
from jmem.sparse import flash_llm
from jmem.sparse import prune as removal
from jmem.sparse.flash_llm import FormatName, KeptDense, Values, count_bytes
from jmem.sparse.prune import CRITERIA
from jmem.train.folder import require_free

ROWS = 4
"""Rows of calibration text that are read together."""

Criterion = Literal[
    "sparsegpt", "wanda", "magnitude", "sparsegpt-2:4", "wanda-2:4", "magnitude-2:4"
]
"""Some of `jmem.sparse.prune.CRITERIA`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(TextSource):
    model: str
    """What `jmem.checkpoints.load` opens: a folder, a file, or "smollm2-135m"."""
    sparsity: float = 0.5
    """The share of a map's weights that becomes zero; 0 packs what is zero already."""
    to: pathlib.Path = pathlib.Path("pruned")
    """The folder to write: absent, or empty."""
    criterion: Criterion = "sparsegpt"
    """Which weights become zero. "magnitude": of each row the least, whatever the text;
    so a model larger than memory is pruned. 2:4: two of every four."""
    calibration_tokens: int = 16384
    """Of the text, what the others look at."""
    seq_len: int = 512
    """Tokens of it that are read together."""
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
    streams = command.criterion == "magnitude" or command.sparsity == 0
    make = flash_llm.packer(
        sparsity=command.sparsity if streams else 0,
        formats=command.formats,
        values=command.values,
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

    if streams:
        return checkpoint.params(packed=make_and_tell)
    params, maps = zero(command, checkpoint), {}
    for name, leaf in find_maps(params["blocks"]).items():
        rest = {key: part for key, part in leaf.items() if key != "kernel"}
        kernel = np.asarray(leaf["kernel"])
        maps[name] = rest | make_and_tell(name, kernel.__getitem__, len(kernel))
    return params | {"blocks": replace_maps(params["blocks"], maps)}


def zero(command: Command, checkpoint: Checkpoint) -> dict:
    """The checkpoint's parameters, whose maps hold zeros by a calibrated criterion.

    Raises:
      ValueError: text that cannot be used, or what the criterion refuses.
    """
    config = checkpoint.config
    seq_len = min(command.seq_len, config.max_positions)
    # Two bytes a weight as stored, but a CPU multiplies float32 faster.
    model = Decoder(config, dtype=np.dtype("float32"), param_dtype=checkpoint.dtype)
    data, _ = command.batches(
        checkpoint, batch_size=ROWS, seq_len=seq_len, held_out_tokens=1
    )
    count = max(command.calibration_tokens // (ROWS * seq_len), 1)
    batches = [data.batch(index) for index in range(count)]
    criterion = CRITERIA[command.criterion]
    return removal.prune(
        model, checkpoint.params(), criterion, command.sparsity, batches
    )


def _format_map(
    name: str, parts: Mapping[str, Any], dtype: np.dtype, seconds: float
) -> str:
    """A map's name, format, bytes before and after, and kernels packed a second."""
    matrix, after = parts.get("sparse"), count_bytes(parts)
    shape = parts["kernel"].shape if matrix is None else find_shape(matrix)
    before = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    kind = "kernel" if matrix is None else type(matrix).__name__
    return (
        f"{name:<20}{kind:<12}{format_size(before):>12}{format_size(after):>12}"
        f"{before / after:>8.2f}{before / 1e9 / seconds:>8.2f} GB/s"
    )


def main(command: Command) -> None:
    if command.unpack or command.criterion == "magnitude":
        jax.config.update("jax_platforms", "cpu")  # a GPU may be training just now
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
