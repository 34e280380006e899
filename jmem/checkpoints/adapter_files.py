"""The folder of an adapter: adapter_config.json beside adapter_model.safetensors."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmem.checkpoints import files, layout, safetensors
from jmem.checkpoints.fields import Fields
from jmem.checkpoints.files import CheckpointError, LazyTensor, read_finite

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PICKLE = "adapter_model.bin"
_CONFIG_LIMIT = 1 << 24
"""Longest adapter_config.json, in bytes."""


def read_config(folder: Path) -> Fields:
    """The fields of adapter_config.json.

    Raises:
      CheckpointError: it is absent, too long, or not a JSON object.
    """
    where = folder / CONFIG
    return Fields(files.read_json(where, _CONFIG_LIMIT), str(where))


def read_settings(given: Fields) -> dict[str, Any]:
    """rank, alpha, rslora and dropout, which every kind has."""
    return {
        "rank": given.size("r"),
        "alpha": given.number("lora_alpha"),
        "rslora": given.flag("use_rslora"),
        "dropout": given.probability("lora_dropout", 0.0),
    }


def read_weights(folder: Path, way_out: str) -> dict[str, LazyTensor]:
    """The tensors by name; no values are read.

    `way_out` tells a user whose folder holds a pickle how to get such a file.

    Raises:
      CheckpointError: the file is absent or damaged, or there is only a pickle.
    """
    if not (folder / WEIGHTS).exists() and (folder / _PICKLE).exists():
        raise CheckpointError(
            f"{folder}: holds {_PICKLE}, a pickle, which is never opened; {way_out}."
        )
    return safetensors.read_file(folder / WEIGHTS)


def read_base(given: Fields) -> str | None:
    """The model that an adapter was trained on, as its configuration says.

    Raises:
      CheckpointError: it says something that is no name.
    """
    base = given.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise given.make_error("base_model_name_or_path", base, "a name")
    return base


def shorten(number: float) -> int | float:
    """The number as an int if it is whole, as other programs write most alphas."""
    return int(number) if float(number).is_integer() else float(number)


def write(
    folder: str | os.PathLike[str] | None,
    raw: Mapping[str, Any],
    tensors: Sequence[LazyTensor],
) -> int:
    """Writes both files, and returns their bytes but for a header; None: only that.

    The folder appears whole or not at all.

    Raises:
      CheckpointError: it exists and is not empty, or cannot be written; a value is not
        finite (names the tensor).
    """
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    nbytes = layout.count_bytes(tensors) + len(text.encode())
    if folder is None:
        return nbytes
    files.check_free(folder := Path(folder))
    with files.stage_write(folder, nbytes) as stage:
        stage.mkdir()
        files.write_text(stage / CONFIG, text)
        safetensors.write(stage / WEIGHTS, map(_check_finite, tensors))
    return nbytes


def _check_finite(tensor: LazyTensor) -> LazyTensor:
    return dataclasses.replace(tensor, read=functools.partial(read_finite, tensor))
