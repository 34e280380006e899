"""The folder of an adapter: adapter_config.json beside adapter_model.safetensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmem.checkpoints import layout, safetensors
from jmem.checkpoints.fields import unsupported
from jmem.checkpoints.files import (
    CheckpointError,
    LazyTensor,
    must_be_free,
    parse_json,
    read_whole,
    staged,
    write_text,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PICKLE = "adapter_model.bin"
_CONFIG_LIMIT = 1 << 24
"""Longest adapter_config.json, in bytes."""


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The fields of adapter_config.json, and its place for error messages.

    Raises:
      CheckpointError: it is absent, too long, or not a JSON object.
    """
    where = folder / CONFIG
    return parse_json(read_whole(where, _CONFIG_LIMIT), str(where)), str(where)


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


def base_of(raw: Mapping[str, Any], where: str) -> str | None:
    """The model that an adapter was trained on, as its configuration says.

    Raises:
      CheckpointError: it says something that is no name.
    """
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise unsupported(where, "base_model_name_or_path", base, "a name")
    return base


def shortest(number: float) -> int | float:
    """The number as an int if it is whole, as other programs write most alphas."""
    return int(number) if float(number).is_integer() else float(number)


def write(folder: Path, raw: Mapping[str, Any], tensors: Sequence[LazyTensor]) -> None:
    """Writes both files; the folder appears whole or not at all.

    Raises:
      CheckpointError: it exists and is not empty, or cannot be written.
    """
    must_be_free(folder)
    with staged(folder, layout.total_bytes(tensors)) as stage:
        stage.mkdir()
        write_text(stage / CONFIG, json.dumps(raw, indent=2, sort_keys=True) + "\n")
        safetensors.write(stage / WEIGHTS, tensors)
