"""What is kept between runs saves time, and never decides what a test finds."""

import os

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_one_folder_for_a_lock_file_and_a_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("JMEM_TEST_CACHE", str(tmp_path / "kept"))
    lock = tmp_path / "uv.lock"
    folders = set()
    for content in ("one", "another", "one"):
        lock.write_text(content)
        monkeypatch.setattr(kept, "LOCK", lock)
        told = kept.settings()
        folders |= {told["JMEM_CACHE_DIR"], told["JAX_COMPILATION_CACHE_DIR"]}
    assert len(folders) == 4
    assert all(map(os.path.isdir, folders))


@pytest.mark.parametrize("where", ["", "file/below"])
def test_nothing_is_kept_where_nothing_can_be(tmp_path, monkeypatch, where):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JMEM_TEST_CACHE", where and str(tmp_path / where))
    assert kept.settings() == {"JMEM_CACHE_DIR": ""}


def test_a_folder_that_grew_is_emptied_by_the_first_process_only(tmp_path, monkeypatch):
    monkeypatch.setenv("JMEM_TEST_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "LIMIT", 10)
    (tmp_path / "old").write_text("more than ten bytes")
    with monkeypatch.context() as worker:
        worker.setenv("PYTEST_XDIST_WORKER", "gw0")
        kept.settings()
        assert (tmp_path / "old").exists()
    kept.settings()
    assert not (tmp_path / "old").exists()


@pytest.fixture
def folder(tmp_path):
    """JAX's cache, in a folder of this test."""
    with kept.apart(tmp_path / "programs"):
        yield tmp_path / "programs"


def test_a_damaged_program_is_compiled_again(folder):
    """Half written by a process that was killed, empty, or no program at all."""

    def found():
        return jax.jit(lambda x: jnp.tanh(x @ x.T) + 7)(np.eye(4, dtype=np.float32))

    first = found()
    entries = list(folder.glob("*-cache"))
    assert entries
    whole = {entry: entry.read_bytes() for entry in entries}
    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no program"):
        for entry, content in whole.items():
            entry.write_bytes(damage(content))
        np.testing.assert_array_equal(found(), first)


def test_apart_from_the_folder_nothing_is_read_or_written(folder):
    with kept.apart():
        jax.jit(lambda x: x * 3 + 1)(np.ones(3, np.float32))
    assert not folder.exists() or not list(folder.iterdir())
