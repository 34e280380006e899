"""Real English text with no download: the reference documentation inside Python.

What    Two kinds of document, both about Python and both laid out as `help()` prints
        the language reference: its topics (`pydoc_data.topics`), and documentation
        strings of standard library modules, read from their sources with `ast` and
        never imported.
Honest  A narrow domain (technical prose with signatures, grammar rules and doctests)
        that every pretrained model has met before. It shows that training lowers a
        loss and feeds the tests; it is no benchmark of language modelling.
Split   Whole documents are held out. Topics quote each other at length, so a paragraph
        that repeats an earlier document is cut, and the held-out documents come last:
        no run of `RUN` words occurs in two documents, on either side of the split.
Stable  The same for everybody on one release of Python. Another release has other
        documentation, and the digest of the tokens (`Loader.digest`) tells.
"""

import ast
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jmem.data.document import DataError, Document

RUN = 12
"""Documents that share so many words in a row count as saying the same thing."""
SHORTEST = 40
"""Fewest words of a document, once paragraphs that repeat others are cut out of it."""

# fmt: off
HELD_OUT_TOPICS = (
    "assert", "booleans", "comparisons", "del", "dict", "global", "import", "raise",
)
HELD_OUT_MODULES = ("contextlib", "heapq", "shlex", "textwrap")
TRAINING_MODULES = (
    "abc", "argparse", "ast", "calendar", "cmd", "codecs", "collections",
    "configparser", "copy", "csv", "difflib", "doctest", "email.message", "enum",
    "fnmatch", "fractions", "functools", "glob", "http.client", "http.cookiejar",
    "inspect", "ipaddress", "json", "logging", "numbers", "os", "pickle", "random",
    "selectors", "shutil", "smtplib", "socketserver", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "threading", "tokenize", "traceback", "types",
    "typing", "unittest.case", "unittest.mock", "urllib.parse", "urllib.request",
    "uuid", "warnings", "weakref", "zipfile",
)
# fmt: on


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Corpus(NamedTuple):
    """Documents to train on, and documents from other sources to judge by."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def python_reference(*, also_held_out: Iterable[str] = ()) -> Corpus:
    """The default text: Python's own reference, split by source.

    A source is named `topic:del` or `module:heapq`. Modules in `also_held_out` are
    held out too, after the others, which stay as they are. Takes about a second.

    Raises:
      DataError: this Python was installed without one of the sources.
    """
    topics = _read_topics()
    # The longest first: a short topic is mostly an extract, and is cut, not the whole.
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))
    training = [_make_topic(topics, n) for n in names if n not in HELD_OUT_TOPICS]
    training += map(_document_module, TRAINING_MODULES)
    held_out = [_make_topic(topics, name) for name in HELD_OUT_TOPICS]
    held_out += map(_document_module, (*HELD_OUT_MODULES, *also_held_out))
    seen: set[str] = set()
    return Corpus(
        tuple(_drop_repeats(training, seen)), tuple(_drop_repeats(held_out, seen))
    )


def _read_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _make_missing_error("pydoc_data.topics") from error
    return topics


def _make_topic(topics: dict[str, str], name: str) -> Document:
    if name not in topics:
        raise _make_missing_error(f"the topic {name!r} of pydoc_data.topics")
    return Document(text=topics[name], source=f"topic:{name}")


def _document_module(name: str) -> Document:
    """Documentation strings of a module, laid out as the language reference is."""
    tree = ast.parse(read_source(name))
    title = f'The "{name}" module'
    parts = [f"{title}\n{'*' * len(title)}", ast.get_docstring(tree) or ""]
    parts += _write_entries(tree, prefix=f"{name}.")
    return Document(text="\n\n".join(filter(None, parts)), source=f"module:{name}")


def read_source(name: str) -> str:
    """The source of a standard library module, which is not imported.

    Raises:
      DataError: this Python was installed without it.
    """
    path = Path(sysconfig.get_path("stdlib"), *name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise _make_missing_error(f"the source of module {name!r} ({path})") from error


def list_documented(
    parent: ast.Module | ast.ClassDef,
) -> Iterator[tuple[Definition, str]]:
    """Public members that have a documentation string, each with that string."""
    for node in parent.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def _write_entries(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """A signature line and an indented text for each public, documented member."""
    for node, text in list_documented(parent):
        if isinstance(node, ast.ClassDef):
            head = f"class {prefix}{node.name}"
            text = "\n\n".join([text, *_write_entries(node, prefix="")])
        else:
            head = prefix + _write_signature(
                node, bound=isinstance(parent, ast.ClassDef)
            )
        yield f"{head}\n\n{textwrap.indent(text, '   ')}"


def _write_signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool
) -> str:
    """A signature as a caller writes it: no annotations or `self`; properties bare."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "functools.cached_property"}:
        return node.name
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    variadic = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    for argument in positional + arguments.kwonlyargs + variadic:
        argument.annotation = None
    if bound and positional and "staticmethod" not in decorators:
        (arguments.posonlyargs or arguments.args).pop(0)
    return f"{node.name}({ast.unparse(arguments)})"


def _drop_repeats(documents: Iterable[Document], seen: set[str]) -> Iterator[Document]:
    """Each document without paragraphs that repeat earlier ones (`seen`, updated)."""
    for document in documents:
        text = _cut_repeats(document["text"], seen)
        words = split_words(text)
        if len(words) >= SHORTEST:
            seen.update(_list_runs(words))
            yield Document(text=text, source=document["source"])


def _cut_repeats(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs that take part in a run of words in `seen`.

    Blank lines between paragraphs become one. A cut makes new neighbours, hence the
    loop.
    """
    paragraphs = split_paragraphs(text)
    while True:
        words = [(w, i) for i, p in enumerate(paragraphs) for w in split_words(p)]
        repeated = {
            paragraph
            for start, run in enumerate(_list_runs([word for word, _ in words]))
            if run in seen
            for _, paragraph in words[start : start + RUN]
        }
        if not repeated:
            return "\n\n".join(paragraphs) + "\n"
        paragraphs = [p for i, p in enumerate(paragraphs) if i not in repeated]


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text: what stands between blank lines."""
    return re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return re.findall(r"\w+", text.lower())


def _list_runs(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def _make_missing_error(what: str) -> DataError:
    return DataError(
        f"Python {platform.python_version()} comes without {what}, which the "
        "built-in text is made of. Install the whole standard library, or give text of "
        "your own: jmem.data.read(path)."
    )
