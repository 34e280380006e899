"""A few damaged inputs of every format; `python -m tests.fuzz` takes more."""

import fuzz
import pytest

from jmem import confined


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files_are_read_or_refused(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(confined, "SECONDS", 2.0)
    found = dict(fuzz.attack(name, tmp_path, range(5), 3))
    assert len(found) == 5
    assert set(found.values()) <= {"read", "refused"}, found
