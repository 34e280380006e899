"""Nothing that is printed ends the work: no reader, no such letter, no stream."""

import io
import os
import subprocess
import sys

import pytest

from jmem.terminal import Forgiving, forgive, tell


def broken():
    """A pipe that nobody reads, as `... | head` leaves it."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full():
    return open("/dev/full", "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [broken, full, closed, lambda: None])
def test_what_cannot_be_told_is_not_told(make, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream := make())
    print("x" * 100_000, file=Forgiving(stream), flush=True)
    tell("once more")
    assert not Forgiving(stream).isatty()
    if stream is not None:
        stream.close()  # nothing waits in it that would fail now


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_it_lacks_become_question_marks(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding)
    print("50 % █ – é", file=Forgiving(stream), flush=True)
    expected = "50 % ? ? ?\n" if encoding == "ascii" else "50 % ? ? é\n"
    assert raw.getvalue().decode(encoding) == expected


def test_a_whole_command_ends_well_without_a_reader():
    code = (
        "from jmem.terminal import forgive\n"
        "with forgive():\n"
        "    for number in range(100_000): print(number)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr  # noqa: PT018
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_streams_are_as_before():
    before = sys.stdout, sys.stderr
    with forgive():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
