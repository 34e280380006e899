"""Imports point down, `import jmem` stays light, and no name hides a module."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
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


MODULE = {"orbax-checkpoint": "orbax", "protobuf": "google"}
"""What is imported under another name than it is installed under."""
ALONG = {"jaxlib", "ml_dtypes", "pyarrow"}
"""What comes with JAX and `datasets`, and is imported beside them."""


def test_what_is_declared_is_imported_and_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [re.match(r"[\w-]+", entry) for entry in project["dependencies"]]
    declared = {MODULE.get(word[0], word[0]) for word in words if word}
    library = {name.split(".")[0] for path in SOURCES for name in imported(path)}
    assert library - {*sys.stdlib_module_names, "jmem"} <= declared | ALONG
    experiments = ROOT.glob("experiments/**/*.py")
    everything = library | {
        name.split(".")[0] for path in experiments for name in imported(path)
    }
    assert declared <= everything


def test_no_requirement_replaces_a_user_s_jax():
    """CUDA is an extra of the wheel, and a group of the checkout."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    assert not [entry for entry in project["dependencies"] if "cuda" in entry]
    (bounds,) = (e[3:] for e in project["dependencies"] if re.match(r"jax\W", e))
    for version in ("cuda12", "cuda13"):
        extra = project["optional-dependencies"][version]
        assert extra == [f"jax[{version}]{bounds}"]
    assert groups["cuda13"] == project["optional-dependencies"]["cuda13"]
    assert "cuda13" in pyproject["tool"]["uv"]["default-groups"]


def test_pictures_and_tables_are_imported_where_they_are_used():
    """Not with their module: whoever neither draws nor reads rows does not wait."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (*SOURCES, *ROOT.glob("experiments/**/*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (getattr(node, "module", None), *(a.name for a in node.names))
        if name and name.split(".")[0] in ("matplotlib", "datasets")
    ]
    assert not wrong, "\n".join(wrong)


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
