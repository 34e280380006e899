"""Hours of answers: kept whatever happens, and believed only as they were written."""

import re
import resource

import mutations
import numpy as np
import pytest

from experiments.harness.journal import Journal
from jmem.disk import DamagedError
from jmem.train.folder import FolderError


def fill(folder):
    journal = Journal(folder)
    for number in range(3):
        journal(f"n{number}", lambda n=number: {"a": np.array([n, 0.5])})
    return folder / "results.jsonl"


def test_what_is_whole_is_not_written_again(tmp_path):
    path = fill(tmp_path)
    before, content = path.stat(), path.read_bytes()
    Journal(tmp_path)
    after = path.stat()  # st_atime may move: it was read
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert path.read_bytes() == content
    path.write_bytes(path.read_bytes() + b'["n3", {"a"')
    inode = path.stat().st_ino
    Journal(tmp_path)
    after = path.stat()
    assert (after.st_ino, after.st_size) == (inode, before.st_size)


def test_a_line_of_an_older_version_has_no_digest(tmp_path):
    (tmp_path / "results.jsonl").write_text('["n0", {"a": [1]}]\n')
    assert Journal(tmp_path)("n0", dict) == {"a": [1]}


@pytest.mark.parametrize(
    "line",
    ['["n1"; {}]', '{"n1": 1}', '["n1", {"a": "x"}]', "[" * 100_000, '["n1", []]'],
)
def test_a_garbled_line_is_told_with_its_place(tmp_path, line):
    path = fill(tmp_path)
    path.write_text(f"{path.read_text()}{line}\n")
    place = re.escape(f"{path}:4: ")
    with pytest.raises(DamagedError, match=f"^{place}"):
        Journal(tmp_path)


def test_results_that_are_not_gone_on_with_stop_a_new_run(tmp_path):
    fill(tmp_path)
    with pytest.raises(FolderError, match=r"results\.jsonl: results are there"):
        Journal(tmp_path, resume=False)


def test_a_full_disk_loses_nothing(tmp_path):
    path = fill(tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(FolderError, match="result of 'n3' could not be"):
            journal("n3", lambda: {"a": np.array([3])})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_mutated_journals(tmp_path):
    """What is read is what was written, or the file is refused at its line."""
    path = fill(tmp_path)
    raw, known = path.read_bytes(), Journal(tmp_path)
    names = [f"n{number}" for number in range(3)]
    values = {name: known(name, dict) for name in names}
    damages = (mutations.damage_text, mutations.damage_bytes)

    def read(path):
        journal = Journal(path.parent)
        for name in names:
            assert journal(name, dict) in ({}, values[name])

    mutants = (
        damages[case % 2](raw, np.random.default_rng([case, 17]))
        for case in range(mutations.count(200))
    )
    found = mutations.outcomes(mutants, path, read, DamagedError)
    assert all(found.values())
