"""What XLA writes to stderr of its own accord, kept back while it compiles.

It calls a program too large for the card an error in its calculation and goes on; the
verdict says it better. Every other line is passed on at once. Programs that are
compiled at the same time, in threads, share one filter.
"""

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Iterator

_NOISE = (
    b"exceeds the base limit",
    b"Can't reduce memory use below",
    b"Missing deviceless CUB scratch size data",  # a flag of the report
)
_lock = threading.Lock()
_filters: list["_Filter"] = []
"""The filter in place, once for each that is inside `hide_noise`."""


@contextlib.contextmanager
def hide_noise() -> Iterator[None]:
    """Keeps XLA's noise back from stderr inside a `with` block, of all threads."""
    with _lock:
        _filters.append(_filters[0] if _filters else _Filter())
    try:
        yield
    finally:
        with _lock:
            last = _filters.pop()
            if not _filters:
                last.close()


class _Filter:
    """Stands in for stderr, and passes its lines on, but for noise."""

    def __init__(self):
        try:
            self._stderr = os.dup(2)
        except OSError:  # there is none
            self._stderr = None
            return
        sys.stderr.flush()
        source, self._pipe = os.pipe()
        self._end, self._passed = uuid.uuid4().hex.encode(), threading.Event()
        threading.Thread(
            target=self._pass_on, args=(source, os.dup(self._stderr)), daemon=True
        ).start()
        os.dup2(self._pipe, 2)

    def close(self) -> None:
        """Gives stderr back, when all that was written before is passed on."""
        if self._stderr is None:
            return
        sys.stderr.flush()
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        os.write(self._pipe, self._end + b"\n")
        os.close(self._pipe)
        self._passed.wait()

    def _pass_on(self, source: int, stderr: int) -> None:
        # To the end of the pipe: a process started meanwhile goes on writing to it.
        with open(source, "rb") as lines, open(stderr, "wb", buffering=0) as out:
            for line in lines:
                text, end, _ = line.partition(self._end)
                if text and not any(noise in text for noise in _NOISE):
                    with contextlib.suppress(OSError):
                        out.write(text)
                if end:
                    self._passed.set()
