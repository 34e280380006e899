"""Imports point down, `import jmem` stays light, and no name hides a module."""

import ast
import pathlib
import subprocess
import sys
import typing
from collections.abc import Iterator

import pytest

import jmem
from jmem.methods import Family

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = (
    ("cards",),
    ("targets", "confined", "disk", "terminal"),
    ("program", "lowering"),
    ("memory", "kernels"),
    ("offload",),
    ("sharding",),
    ("nn",),
    ("models", "checkpoints", "data"),
    ("kvcache",),
    ("train", "generate"),
    ("evaluate",),
    tuple(family for family in typing.get_args(Family) if family != "kvcache"),
)
"""Parts of `jmem`, lowest first; a part imports its own layer or lower ones."""
FREE = ("methods",)
"""Parts that import nothing of `jmem` and are imported by none of it."""

HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
SOURCES = sorted(
    path for folder in ("jmem", "kernels") for path in ROOT.glob(f"{folder}/**/*.py")
)


def imported(path: pathlib.Path) -> Iterator[str]:
    """Dotted names a file imports, anywhere in it, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] == "kernels":
        package = ("jmem", *package)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def part_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def edges() -> dict[tuple[str, str], str]:
    """(part, part it imports): a file that does so."""
    found = {}
    for path in SOURCES:
        if (mine := part_of(path)) == "__init__":
            continue  # the front door may lead anywhere, lazily
        for name in imported(path):
            words = name.split(".")
            if words[0] == "jmem" and words[1] != mine:
                found[mine, words[1]] = str(path.relative_to(ROOT))
    return found


def test_every_part_has_its_layer():
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= {*HEIGHT, *FREE}, "give the new part a place in LAYERS"


def test_imports_point_down():
    assert ("models", "nn") in edges()  # the reader sees what is surely there
    wrong = [
        f"{path}: {mine} imports {other}"
        for (mine, other), path in edges().items()
        if mine in FREE or other not in HEIGHT or HEIGHT[other] > HEIGHT[mine]
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_one_layer_do_not_import_in_a_circle():
    remaining = dict(edges())
    while remaining:
        inner = {mine for mine, _ in remaining}
        leaves = {other for _, other in remaining} - inner
        assert leaves, f"a circle among {sorted(inner)}"
        remaining = {edge: at for edge, at in remaining.items() if edge[1] in inner}


def test_the_library_knows_neither_experiments_nor_tests():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imported(path)
        if name.split(".")[0] in ("experiments", "tests", "kernels", "configs")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_is_no_package_of_its_own():
    """It would be found instead of PyPI's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "jmem" / "kernels").is_symlink()
    assert (ROOT / "jmem" / "kernels").resolve() == ROOT / "kernels"


PACKAGES = sorted(path for path in SOURCES if path.name == "__init__.py")


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_no_package_hides_a_module_behind_its_name(path):
    """`from jmem.memory import measure` must not depend on who imported what before."""
    modules = {entry.stem for entry in path.parent.iterdir() if entry.suffix == ".py"}
    modules |= {entry.parent.name for entry in path.parent.glob("*/__init__.py")}
    bound = {
        alias.asname or alias.name.split(".")[-1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and not _is_package(node, path)
        for alias in node.names
    }
    assert not bound & modules


def _is_package(node: ast.ImportFrom, path: pathlib.Path) -> bool:
    """Whether `from X import y` takes y out of this very package, as a module."""
    here = ".".join(path.parent.relative_to(ROOT).parts)
    return node.module == here or (node.level == 1 and node.module is None)


HEAVY = ("flax", "orbax", "datasets", "matplotlib", "tyro", "jax.experimental.pallas")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_part_opens_from_the_front_door():
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(dir(jmem))


def test_import_jmem_brings_nothing_heavy():
    loaded = python("import sys, jmem; print(*sys.modules)").split()
    assert "jmem" in loaded
    assert not [name for name in HEAVY if name in loaded]


def test_import_jmem_adds_under_a_third_of_a_second_to_import_jax():
    code = (
        "import time, jax; start = time.perf_counter(); import jmem;"
        "print(time.perf_counter() - start)"
    )
    assert any(float(python(code)) < 0.3 for _ in range(3))  # a busy machine is slow
