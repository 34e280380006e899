"""`import jmem` is light, and lets the GPU compiler load where there is no driver."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
from typing import Any

import pytest

VARIABLE = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
HEAVY = (
    *("flax", "orbax", "datasets", "matplotlib", "jax.experimental.pallas", "tyro"),
    *("rich", "google.protobuf", "safetensors", "tokenizers", "gguf", "optax"),
)
CODE = f"""\
import json, os, sys, time
def heavy():
    return [module for module in {HEAVY} if module in sys.modules]
import jax
start = time.perf_counter()
import jmem
seconds = time.perf_counter() - start
imported, variable = heavy(), os.environ.get({VARIABLE!r})
platform = jax.devices()[0].platform
spec = jax.ShapeDtypeStruct((4,), "float32")
jmem.measure(lambda x: x + 1, spec, bounds=False)
print(json.dumps([seconds, imported, variable, platform, heavy()]))
"""


def run(code, *options: str, **variables: str):
    """A fresh process that is told nothing about platforms, and has no reports kept."""
    told = {"JAX_PLATFORMS", VARIABLE}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={name: value for name, value in os.environ.items() if name not in told}
        | {"JMEM_CACHE_DIR": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@functools.cache
def fresh() -> Any:
    done = run(CODE)
    return *json.loads(done.stdout), done.stderr


@pytest.mark.compat
class TestFreshProcess:
    def test_it_adds_little_to_import_jax(self):
        assert fresh()[0] < 0.3

    def test_it_imports_nothing_heavy(self):
        assert fresh()[1] == []

    def test_the_variable_is_set(self):
        assert fresh()[2] == "1"

    def test_a_plugin_without_a_driver_is_quiet(self):
        *_, platform, _, stderr = fresh()
        assert platform in {"cpu", "gpu"}
        assert stderr == ""

    def test_measuring_imports_no_plotting(self):
        assert fresh()[4] == ["google.protobuf"]


def test_the_variable_is_left_alone_once_it_is_too_late():
    code = f"import jax; jax.devices()\nimport jmem, os; print(os.getenv({VARIABLE!r}))"
    assert run(code).stdout.strip() == "None"


def test_without_the_cuda_plugin_jmem_opens_and_measure_names_the_extra(tmp_path):
    """An environment with the wheel and no extra, and nothing of the dev group."""
    absent = ("jax_plugins", "jax_cuda", "nvidia", "chex", "safetensors")
    for entry in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(absent):
            (tmp_path / entry.name).symlink_to(entry)
    code = """\
import jmem, jmem.checkpoints, jmem.methods
try:
    jmem.measure(lambda x: x, 1.0)
except jmem.targets.NoCompilerError as error:
    print(error)
"""
    path = f"{tmp_path}:{pathlib.Path(__file__).parents[1]}"
    said = run(code, "-S", PYTHONPATH=path).stdout
    assert 'pip install "jmem[cuda13]"' in said


def test_every_name_of_the_top_level_is_there():
    import jmem

    assert callable(jmem.measure)
    assert callable(jmem.live)
    assert jmem.targets.resolve("h200").name == "h200"
    assert {"measure", "live", "targets", "__version__"} <= set(dir(jmem))
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        jmem.mesure  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
