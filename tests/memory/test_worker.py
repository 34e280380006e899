"""JAX started too early: a worker measures the function, or a way out is named."""

import functools
import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jmem.memory import worker
from jmem.memory.measure import measure
from jmem.program import ProgramError

MODULE = """\
from typing import NamedTuple
import jax

class State(NamedTuple):
    params: dict
    opt_state: list

def step(state, x, power):
    return state._replace(params=jax.tree.map(lambda w: (x @ w) ** power, state.params))

jitted = jax.jit(step, static_argnums=2, donate_argnums=0)
"""

SCRIPT = """\
import logging
logging.disable(logging.CRITICAL)  # JAX logs that its plugin found no driver
import jax, jax.numpy as jnp
jax.devices()
import jmem, mine
x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
state = mine.State({"a": x, "b": x}, [x, x])
report = jmem.measure(mine.jitted, state, x, 2, bounds=False)
print(report.device_bytes, report.alias_bytes, sorted(report.by_kind))
print(report.flags[-1])
try:
    jmem.measure(lambda x: x, x)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the script prints, run without the variable and with every platform."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "mine.py").write_text(MODULE)
    (folder / "script.py").write_text(SCRIPT)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"}
    }
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")],
        env=environment | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.compat
def test_an_importable_function_is_measured_all_the_same(answer):
    kib = 256 * 256 * 4
    device_bytes, alias_bytes, *kinds = answer.splitlines()[0].split(maxsplit=2)
    assert int(alias_bytes) == 4 * kib
    assert int(device_bytes) >= 5 * kib
    assert "parameters" in kinds[0]
    assert "optimizer" in kinds[0]
    assert "measured in a worker process" in answer


@pytest.mark.compat
def test_another_function_gets_the_two_line_fix(answer):
    assert "Set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment" in answer
    assert "or write `import jmem` above the first line that uses JAX" in answer
    assert "'<lambda>' cannot be imported by name" in answer


def there_and_back(tree):
    import json

    return worker._decode(json.loads(json.dumps(worker._encode(tree))))


class Pair(NamedTuple):
    left: object
    right: object


class TestArguments:
    spec = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)

    @pytest.mark.parametrize(
        "tree",
        [
            {"a": [spec, None], "b": (spec, {"c": spec})},
            {3: spec, 1: spec},
            Pair(spec, [spec]),
            jax.ShapeDtypeStruct((), jnp.int32, weak_type=True),
        ],
        ids=["nested", "numbered", "named tuple", "weak"],
    )
    def test_trees_arrive_as_they_were(self, tree):
        again = there_and_back(tree)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        assert jax.tree.leaves(again) == jax.tree.leaves(tree)

    @pytest.mark.parametrize("axes", [P("x"), P(("x", "y"), None), P()])
    def test_placements_arrive_as_they_were(self, axes):
        auto = (AxisType.Auto,) * 2
        mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=auto)
        host = NamedSharding(mesh, axes, memory_kind="pinned_host")
        assert there_and_back(host) == host

    @pytest.mark.parametrize(
        "tree", [jax.random.key(0), {("a", 1): 2}, object()], ids=["key", "dict", "any"]
    )
    def test_what_json_cannot_carry_is_refused(self, tree):
        if isinstance(tree, jax.Array):
            tree = jax.ShapeDtypeStruct(tree.shape, tree.dtype)
        with pytest.raises(TypeError):
            worker._encode(tree)


def test_names_that_cannot_be_imported_are_refused():
    with pytest.raises(TypeError, match="cannot be imported by name"):
        worker.write_name(lambda: None)
    assert worker.import_name(worker.write_name(textwrap.dedent)) is textwrap.dedent
    assert worker.write_name(jax.jit(textwrap.dedent)) == "textwrap:dedent"
    bound = functools.partial(textwrap.indent, prefix="other")
    with pytest.raises(TypeError, match="cannot be imported by name"):
        worker.write_name(functools.wraps(textwrap.dedent)(bound))


class TestIsolated:
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    @pytest.fixture(autouse=True)
    def functions(self, tmp_path, monkeypatch):
        (tmp_path / "apart.py").write_text(
            "import os, sys\n"
            "def double(x):\n"
            "    return x * 2\n"
            "def abort(x):\n"
            "    print('the compiler says why', file=sys.stderr, flush=True)\n"
            "    os.abort()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import apart  # pyright: ignore[reportMissingImports]

        return apart

    def test_the_report_is_the_same(self, functions):
        apart = measure(functions.double, self.x, bounds=False, isolate=True)
        here = measure(functions.double, self.x, bounds=False)
        assert apart.rows == here.rows
        assert apart.flags == here.flags == ()

    def test_an_abort_is_an_exception_with_the_last_lines(self, functions):
        with pytest.raises(ProgramError, match="SIGABRT") as raised:
            measure(functions.abort, self.x, bounds=False, isolate=True)
        assert "abort: the worker process" in str(raised.value)
        assert "the compiler says why" in str(raised.value)

    def test_what_cannot_be_sent_is_refused(self):
        with pytest.raises(ProgramError, match=r"isolate=True, but .*imported by name"):
            measure(lambda x: x, self.x, isolate=True)
