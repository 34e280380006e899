"""A run's folder has one process."""

import subprocess
import sys

import pytest

from jmem.train import checkpoint, metrics
from jmem.train.folder import FolderError, Hold

from . import tiny

HOLDING = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""
FORKING = """
import os, sys
from jmem.train.folder import FolderError, Hold
held = Hold(sys.argv[1])
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
try:
    Hold(sys.argv[1])
except FolderError:
    os._exit(7)
"""


@pytest.fixture
def elsewhere():
    """`elsewhere(folder)` starts a process that holds it until it is killed."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_refused_until_it_is_gone(tmp_path, elsewhere):
    other = elsewhere(tmp_path)
    with pytest.raises(FolderError) as caught:
        Hold(tmp_path)
    assert f"is in use by process {other.pid} ({sys.executable} -c" in str(caught.value)
    assert "wait until it ends, stop it, or choose another" in str(caught.value)
    other.kill()
    other.wait()
    Hold(tmp_path).release()


def test_every_door_is_closed_before_anything_is_touched(tmp_path, elsewhere):
    tiny.run(tmp_path, steps=3)
    unfinished = tmp_path / "checkpoints" / "8.partial"
    unfinished.mkdir()
    rows = tmp_path / "metrics.jsonl"
    rows.write_text(rows.read_text() + '{"step": 4}\n')

    def list_all():
        return {
            path: path.read_bytes() if path.is_file() else b""
            for path in tmp_path.rglob("*")
        }

    before = list_all()
    elsewhere(tmp_path)
    elsewhere(tmp_path / "checkpoints")
    doors = (
        lambda: tiny.run(tmp_path, steps=6, resume=True),
        lambda: metrics.MetricsFile(tmp_path, step=2),
        lambda: checkpoint.Checkpoints(tmp_path / "checkpoints"),
    )
    for door in doors:
        with pytest.raises(FolderError, match="is in use by process"):
            door()
    assert list_all() == before


def test_within_a_process_it_is_held_as_often_as_one_likes(tmp_path, elsewhere):
    first, second = Hold(tmp_path), Hold(tmp_path)
    first.release()
    first.release()  # once counts
    command = [sys.executable, "-c", HOLDING, tmp_path]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr
    del second
    elsewhere(tmp_path)


def test_a_child_that_was_forked_is_another_process(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKING, tmp_path]
    assert subprocess.run(command, timeout=60).returncode == 7


def test_two_files_of_one_process_lose_no_row(tmp_path):
    first = metrics.MetricsFile(tmp_path)
    first.write({"step": 1})
    second = metrics.MetricsFile(tmp_path, step=1)
    first.write({"step": 2})
    second.write({"step": 3})
    first.close()
    second.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_a_run_that_failed_lets_its_folder_go(tmp_path, elsewhere):
    with pytest.raises(ValueError, match="steps=1") as caught:
        tiny.run(tmp_path, steps=3)
        tiny.run(tmp_path, steps=1, resume=True)
    elsewhere(tmp_path)
    elsewhere(tmp_path / "checkpoints")
    assert caught.value.__traceback__  # it is still known where
