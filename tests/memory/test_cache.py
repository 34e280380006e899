"""A kept report is the one that measuring again would give, or it is not taken."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest

from jmem.memory import cache
from jmem.memory.measure import measure
from jmem.program import ProgramError

x = jax.ShapeDtypeStruct((256, 256), jnp.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JMEM_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def product(x, w):
    return jnp.tanh(x @ w)


def ask(fn=product, **more):
    return measure(fn, x, x, bounds=False, **more)


def test_the_second_answer_is_the_first_and_says_so(folder):
    first, second = ask(), ask()
    assert (first.cached, second.cached) == (False, True)
    assert dataclasses.replace(second, cached=False) == first
    assert "from the cache" in str(second)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"target": "rtx4090"},
        {"donate": (0,)},
        {"labels": {"weights": (1, "")}},
        {"options": {"xla_gpu_enable_triton_gemm": False}},
        {"fn": lambda x, w: jnp.tanh(x @ w)},  # the same program on another line
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_question_is_measured(other):
    ask()
    assert not ask(**other).cached


def test_it_can_be_told_not_to_look(folder):
    ask()
    assert not ask(cache=False).cached


def test_a_damaged_entry_is_measured_again_and_replaced(folder):
    first = ask()
    (entry,) = folder.iterdir()
    entry.write_text(entry.read_text()[:100])
    assert not ask().cached
    assert ask().device_bytes == first.device_bytes
    assert ask().cached


def test_an_entry_that_was_changed_since_counts_as_none(folder):
    """Also a digit, which is as good a number; and what a print would stumble over."""
    first = ask()
    (path,) = folder.iterdir()
    entry = json.loads(path.read_text())
    report = json.loads(entry["report"])
    for change in ({"device_bytes": 42}, {"versions": {}}, {"interval": []}):
        changed = entry | {"report": json.dumps(report | change)}
        bare = {name: changed[name] for name in ("sources", "report")}
        for text in (json.dumps(changed), json.dumps(bare), "[" * 100_000):
            path.write_text(text)
            assert cache.load(path.stem) is None
    assert ask().device_bytes == first.device_bytes


def test_mutated_entries(folder):
    """The report that was kept, or none: never another."""
    first = ask()
    (path,) = folder.iterdir()
    raw, same = path.read_bytes(), 0
    for case in range(mutations.count(100)):
        random = np.random.default_rng([case, 18])
        damage = (mutations.damage_text, mutations.damage_bytes)[case % 2]
        path.write_bytes(damage(raw, random))
        if found := cache.load(path.stem):
            assert dataclasses.replace(found, cached=False) == first
            same += 1
    assert same < mutations.count(100)


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("JMEM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.pathlib.Path, "home", none)
    assert cache.folder() is None
    monkeypatch.setenv("JMEM_CACHE_DIR", "elsewhere")
    assert str(cache.folder()) == "elsewhere"


def test_two_processes_share_it(folder):
    """One keeps replacing the entry that the other reads: it is whole at every read."""
    ask()
    (entry,) = folder.iterdir()
    replacing = (
        "from jmem.memory import cache\n"
        f"report = cache.load({entry.stem!r})\n"
        "print('ready', flush=True)\n"
        f"while True: cache.store({entry.stem!r}, report)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", replacing], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        versions = set()
        for _ in range(200):
            assert cache.load(entry.stem) is not None
            versions.add(entry.stat().st_ino)
    finally:
        other.kill()
        other.communicate()
    assert len(versions) > 1  # it was replaced in between


def test_failures_are_not_kept(folder):
    with pytest.raises(ProgramError, match="no_such_option"):
        ask(options={"no_such_option": True})
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JMEM_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert not ask().cached
    assert not ask().cached


def test_nothing_is_kept_where_the_folder_is_empty(monkeypatch):
    monkeypatch.setenv("JMEM_CACHE_DIR", "")
    assert cache.folder() is None
    assert not ask().cached
    assert not ask().cached


def test_a_report_is_not_taken_once_its_source_has_changed(tmp_path, monkeypatch):
    source = tmp_path / "edited.py"
    source.write_text("import jax.numpy as jnp\n\ndef fn(x, w):\n    return x @ w\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited  # pyright: ignore[reportMissingImports]

    assert not ask(edited.fn).cached
    assert ask(edited.fn).cached
    source.write_text("# one line more\n" + source.read_text())
    assert not ask(edited.fn).cached
