"""Streams that stop no work: nobody may read them, and letters may be unknown to them.

with forgive():          # sys.stdout and sys.stderr, for a whole command
    ...
tell("resumed")          # one line of a library's
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Forgiving:
    """A text stream that can always be written.

    What nobody reads any more (a closed pipe or terminal, a full disk) goes nowhere,
    and letters that its encoding lacks become question marks.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except Exception as error:
            self._leave(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except Exception as error:
            self._leave(error)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except Exception:  # closed, or there is none
            return False

    def _leave(self, error: Exception) -> None:
        """Lets what waits in the buffer go nowhere too, or Python would fail at exit.

        A pipe that is only full, and a write within another (of a signal's handler),
        lose this text alone.
        """
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            silence(self._stream)


@contextlib.contextmanager
def forgive() -> Iterator[None]:
    """Nothing that the block prints ends it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = tuple(map(Forgiving, before))
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def silence(stream: Any) -> None:
    """What a stream is given from now on, and what waits in it, goes nowhere."""
    with contextlib.suppress(Exception):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def tell(words: str) -> None:
    """A line on standard output, if it can be told."""
    print(words, file=Forgiving(sys.stdout), flush=True)
