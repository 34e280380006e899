"""Files are whole or not there; what was changed since is not believed."""

import contextlib
import json
import os
import resource

import pytest

from jmem import disk


@contextlib.contextmanager
def most_bytes(size):
    """No file may become longer: what a full disk is, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestWriteAtomically:
    def test_a_disk_that_is_full_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "report.json"
        disk.write_atomically(path, "before")
        with pytest.raises(OSError, match="large"), most_bytes(1000):
            disk.write_atomically(path, "x" * 2000)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]

    def test_it_is_synced_before_it_has_its_name(self, tmp_path, monkeypatch):
        path, order = tmp_path / "a", []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: order.append("sync") or fsync(fd))
        monkeypatch.setattr(
            os, "replace", lambda *given: order.append("name") or replace(*given)
        )
        disk.write_atomically(path, b"1")
        assert order == ["sync", "name", "sync"]  # the file, then its folder

    def test_a_link_still_leads_to_what_it_led_to(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "real")
        disk.write_atomically(tmp_path / "link", "1")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "1"

    def test_a_device_is_written_and_stays_one(self):
        disk.write_atomically("/dev/null", "1")
        assert not os.path.isfile("/dev/null")

    def test_a_name_of_any_bytes_can_be_written_down(self, tmp_path):
        name = b"\xff".decode(errors="surrogateescape")
        disk.write_atomically(tmp_path / "a", json.dumps(name, ensure_ascii=False))
        assert json.loads((tmp_path / "a").read_text()) == name


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    with (tmp_path / "rows").open("ab", buffering=0) as file:
        disk.append(file, b"one\n")
        with pytest.raises(OSError, match="large"), most_bytes(6):
            disk.append(file, b"two\n")
        disk.append(file, b"three\n")
    assert (tmp_path / "rows").read_bytes() == b"one\nthree\n"


class TestSeal:
    values = {"bytes": 12, "names": ["a", "b"], "share": 0.1}  # noqa: RUF012

    def test_it_is_opened_again_whatever_the_order(self):
        told = json.loads(disk.seal(self.values, indent=1))
        assert disk.open_sealed(json.dumps(told, sort_keys=True), "a") == self.values

    @pytest.mark.parametrize(
        "change", [{"bytes": 13}, {"names": ["a"]}, {"more": 1}, {"sha256": "0"}]
    )
    def test_other_values_are_refused(self, change):
        told = json.loads(disk.seal(self.values)) | change
        with pytest.raises(disk.DamagedError, match=r"^here: its values are not"):
            disk.open_sealed(json.dumps(told), "here")

    @pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\ud800"])
    def test_what_is_no_object_is_refused(self, text):
        with pytest.raises(disk.DamagedError, match=r"^here: "):
            disk.open_sealed(text, "here")

    def test_an_older_one_has_no_digest(self):
        text = json.dumps(self.values)
        assert disk.open_sealed(text, "here") == self.values
        with pytest.raises(disk.DamagedError, match="not those that were written"):
            disk.open_sealed(text, "here", bare=False)
