"""What strangers wrote, run in a child process with limits on its time and memory.

    ask("render", source=template, ...)      # the chat template's text
    ask("tokenizer", path=str(path))         # whether it can be loaded at all

A chat template is a program, and one line of either it or a tokenizer.json can ask for
hours or for terabytes inside a single call, where no check in the same process gets a
word in. The child has SECONDS of processor time a request and MEMORY_BYTES of address
space. It serves one request after another, so that a request costs a write and a read;
one that dies is replaced by the next request.

This file is the child's program too: there it imports nothing of `jmem`, and JAX least.
What the child answers is text and numbers, and comes from a stranger like its input.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

SECONDS = 6.0
"""Processor time of one request; the largest published tokenizers take under 3."""
MEMORY_BYTES = 2 << 30
"""Address space of the child; the largest published tokenizers take under 1 GiB."""


class ConfinedError(Exception):
    """What failed in the child, or which limit it met."""


def is_failure(error: BaseException) -> bool:
    """Whether a Rust package failed: an error, or a panic, which is no Exception."""
    # The class of panics cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# In the parent ------------------------------------------------------------------------

_lock = threading.Lock()
_child: subprocess.Popen | None = None
_owner = 0
"""The process that started the child: after a fork, not the one that asks."""


def ask(kind: str, **request: Any) -> Any:
    """The child's answer to a request of one of `KINDS`, JSON both ways.

    Raises:
      ConfinedError: the request fails there, or takes more than the limits.
    """
    try:
        raw = json.dumps([kind, SECONDS, request]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfinedError(f"what is given is not JSON: {error}") from error
    with _lock:
        try:
            child = _start()
        except OSError as error:
            raise ConfinedError(f"no process can be started for it: {error}") from error
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _write(child.stdin, raw)
            answer = _read(child.stdout)
        except (OSError, EOFError):
            raise ConfinedError(_explain_death(child)) from None
        except BaseException:  # interrupted: its answer would be taken for the next one
            _stop()
            raise
    found, value = json.loads(answer)
    if not found:
        raise ConfinedError(value)
    return value


def make_environment() -> dict[str, str]:
    """What the child sees of the caller's environment: where things are, no more."""
    known = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "TZ")
    found = {key: os.environ[key] for key in known if key in os.environ}
    return found | {"TOKENIZERS_PARALLELISM": "false"}


def _start() -> subprocess.Popen:
    global _child, _owner
    if _child is None or _child.poll() is not None or _owner != os.getpid():
        _stop()
        _child = subprocess.Popen(
            [sys.executable, "-P", __file__, str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=make_environment(),
        )
        _owner = os.getpid()
    return _child


def _explain_death(child: subprocess.Popen) -> str:
    code = child.wait()
    _stop()
    if code == -signal.SIGPROF:
        return f"it takes more than {SECONDS:g} s"
    return f"it takes more than {MEMORY_BYTES >> 20} MiB, or crashes ({code})"


def _stop() -> None:
    global _child
    child, _child = _child, None
    if child is None:
        return
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if _owner == os.getpid():
        child.kill()
        child.wait()


atexit.register(_stop)


def _write(pipe: IO[bytes], raw: bytes) -> None:
    pipe.write(len(raw).to_bytes(8, "little") + raw)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    head = pipe.read(8)
    raw = pipe.read(int.from_bytes(head, "little"))
    if len(head) < 8 or len(raw) < int.from_bytes(head, "little"):
        raise EOFError
    return raw


# In the child -------------------------------------------------------------------------


def compile_template(source: str) -> None:
    """Compiles a chat template, which folds constants and so runs parts of it."""
    _compile(source)


def render(
    source: str,
    tokens: dict[str, str],
    messages: list[Any],
    parts: list[tuple[int, bool]],
    tools: list[Any] | None,
    today: str,
    limit: int,
    options: dict[str, Any] | None = None,
) -> list[str]:
    """The text of the first so many messages, with or without the prompt for an answer.

    Args:
      source: the template.
      tokens: special tokens by the names that the template has for them.
      messages: of the chat.
      parts: how many of them, and whether the prompt for an answer follows.
      tools: that the template may describe.
      today: the day that `strftime_now` tells, as ISO; empty: now.
      limit: most characters of one text.
      options: further values by the names that the template has for them.
    """
    template, texts = _compile(source), []
    now = datetime.datetime.fromisoformat(today) if today else datetime.datetime.now()
    names = {"documents": None, **tokens, **(options or {})}
    names |= {"tools": tools, "strftime_now": now.strftime}
    for stop, asks in parts:
        own = names | {"messages": messages[:stop], "add_generation_prompt": asks}
        pieces, length = [], 0
        for piece in template.generate(own):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise ValueError(f"it writes more than {limit} characters")
        texts.append("".join(pieces))
    return texts


def load_tokenizer(path: str, probe: str) -> None:
    """Loads a tokenizer.json and encodes and decodes `probe` with it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.decode(tokenizer.encode(probe).ids)


KINDS: dict[str, Callable] = {
    "compile": compile_template,
    "render": render,
    "tokenizer": load_tokenizer,
}
"""What can be asked for."""


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> "jinja2.Template":
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """Renders what stands between `generation` and `endgeneration`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:
        """`value` as JSON, not escaped for HTML as Jinja's own filter does."""
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(source)


def _describe_error(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.200}"


def _serve() -> None:
    """Answers requests until there are none."""
    for kind, most in (
        (resource.RLIMIT_AS, int(sys.argv[1])),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        own = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(kind, (own, own))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act upon
    while True:
        try:
            kind, seconds, request = json.loads(_read(sys.stdin.buffer))
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # which ends the process
        try:
            answer = [True, KINDS[kind](**request)]
        # A stranger's program may raise anything, and a panic is no Exception.
        except BaseException as error:
            answer = [False, _describe_error(error)]
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sys.stdout.buffer, json.dumps(answer).encode())


if __name__ == "__main__":
    _serve()
