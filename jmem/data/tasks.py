r"""Four tasks on one kind of text with no download: prompts and what answers them.

    tasks = python_tasks()                  # "summary", "signature", "module", "prose"
    training, held_out = tasks["summary"]   # documents; the loss covers the answer
    rows = pad(tokenise(training, tokenizer), seq_len=256)

What    The documented functions and classes of standard library modules, read from
        their sources and never imported: what one does, how it is defined, which module
        it is in; and passages of the reference to be continued.
Form    "Summarise:\ndef heappush(heap, item):\n" is read, "Push item onto heap,
        maintaining the heap invariant." is learnt. The first line names the task and is
        always the same, so a router can tell tasks apart.
Honest  A narrow domain that every pretrained model has met before. It shows that tasks
        differ, and that an adapter learns its own; it is no benchmark.
Split   Whole modules and topics are held out. Of "module" it is functions, as nobody
        can name a module that was never shown. No definition and no summary occurs in
        two functions, on either side of the split, and no run of 12 words in two
        sources of "prose".
Stable  The same for everybody on one release of Python, as `jmem.data.builtin` is.
"""

import ast
import copy
import functools
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jmem.data.builtin import (
    HELD_OUT_MODULES,
    TRAINING_MODULES,
    Corpus,
    Definition,
    list_documented,
    python_reference,
    read_source,
    split_paragraphs,
    split_words,
)
from jmem.data.document import Document, join_completion

# fmt: off
ALSO_HELD_OUT = (
    "base64", "bisect", "fileinput", "getopt", "graphlib", "locale", "mimetypes",
    "pkgutil", "platform", "queue", "shelve", "timeit",
)
# fmt: on
"""Held out beside `jmem.data.builtin.HELD_OUT_MODULES`, which have few functions."""
INSTRUCTIONS = {
    "summary": "Summarise:",
    "signature": "Define:",
    "module": "Name the module:",
    "prose": "Continue:",
}
"""The first line of every prompt, by task."""
DEFINITION_CHARACTERS = 160
"""Characters of the longest definition that is used."""
SUMMARY_WORDS = range(3, 41)
"""How many words a summary may have; others are left out."""
PASSAGE_WORDS = range(60, 201)
"""How many words a passage may have."""
ONE_IN = 8
"""One in so many functions of the task "module" is held out."""


class _Member(NamedTuple):
    """A documented function, method or class."""

    module: str
    name: str
    """Within the module: `Counter.most_common`."""
    definition: str
    summary: str

    @property
    def source(self) -> str:
        return f"module:{self.module}.{self.name}"


def python_tasks() -> dict[str, Corpus]:
    """Prompts with completions for four tasks, by name; each split for itself.

    "summary"    a definition line         -> the first sentence of its documentation
    "signature"  that sentence             -> the definition line
    "module"     both                      -> the name of the module, one of 50
    "prose"      half of 60 to 200 words   -> the other half

    Documents on Python 3.12.1; their SmolLM2 tokens with the end (those in the loss):

                 training  held out   mean     longest
    "summary"       1,081       153    31 (14)     104
    "signature"     1,081       153    29 (12)     102
    "module"          953       128    34 (3)      108
    "prose"           479        90   115 (57)     248

    Of the modules `logging` is named most: by 7% of "module" in training and 8% held
    out; 24 of its 128 held-out prompts contain the name itself. Methods are functions
    here, and a method's definition does not say of which class. What one task holds
    out, another may show: "summary" trains on functions that "module" asks for, though
    never with the module's name.

    A source is `module:heapq.heappush`, or for a passage `topic:del:1`. The prompt is
    the text before the one span in `loss_spans`, the answer is what it covers. Takes a
    few seconds. For one model on all tasks, or an adapter for each, see
    `jmem.data.Joint`.

    Raises:
      DataError: this Python was installed without one of the sources.
    """
    seen: set[str] = set()
    training = list(_drop_repeats(_list_members(TRAINING_MODULES), seen))
    held_out = list(
        _drop_repeats(_list_members((*HELD_OUT_MODULES, *ALSO_HELD_OUT)), seen)
    )
    shown = [member for member in training if not _is_drawn(member)]
    modules = {member.module for member in shown}
    drawn = [m for m in training if _is_drawn(m) and m.module in modules]
    prose = python_reference(also_held_out=ALSO_HELD_OUT)
    return {
        "summary": _make_corpus("summary", training, held_out),
        "signature": _make_corpus("signature", training, held_out),
        "module": _make_corpus("module", shown, drawn),
        "prose": Corpus(tuple(_cut_passages(prose[0])), tuple(_cut_passages(prose[1]))),
    }


def _make_corpus(
    task: str, training: Iterable[_Member], held_out: Iterable[_Member]
) -> Corpus:
    document = functools.partial(_make_document, task)
    return Corpus(tuple(map(document, training)), tuple(map(document, held_out)))


def _make_document(task: str, member: _Member) -> Document:
    """A document whose completion has lines of its own: no token crosses its start."""
    definition, summary = member.definition, member.summary
    given, completion = {
        "summary": (definition, summary),
        "signature": (summary, definition),
        "module": (f"{definition}\n{summary}", member.module),
    }[task]
    return join_completion(
        f"{INSTRUCTIONS[task]}\n{given}\n", completion, member.source
    )


def _is_drawn(member: _Member) -> bool:
    """Whether the task "module" holds a member out, which its name alone decides."""
    return zlib.crc32(member.source.encode()) % ONE_IN == 0


def _list_members(modules: Iterable[str]) -> Iterator[_Member]:
    for module in modules:
        for name, node, text in _walk(ast.parse(read_source(module))):
            definition, summary = _write_definition(node), _take_first_sentence(text)
            if (
                len(definition) <= DEFINITION_CHARACTERS
                and len(summary.split()) in SUMMARY_WORDS
                # Some begin with a signature, which gives it away and sums up nothing.
                and f"{node.name}(" not in summary
                and " -> " not in summary
            ):
                yield _Member(module, name, definition, summary)


def _walk(
    parent: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, Definition, str]]:
    for node, text in list_documented(parent):
        yield prefix + node.name, node, text
        if isinstance(node, ast.ClassDef):
            yield from _walk(node, f"{prefix}{node.name}.")


def _write_definition(node: Definition) -> str:
    """A definition's first line, without decorators: `def heappush(heap, item):`."""
    head = copy.copy(node)
    head.body, head.decorator_list = [], []
    return ast.unparse(head).strip()


def _take_first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, or all of it, on one line."""
    line = " ".join(split_paragraphs(text)[0].split())
    return re.split(r"(?<=[.!?])(?<!e\.g\.|i\.e\.) (?=[\"'`*]*[A-Z])", line)[0]


def _drop_repeats(members: Iterable[_Member], seen: set[str]) -> Iterator[_Member]:
    """Members whose source, definition and summary are new (`seen` is updated)."""
    for member in members:
        summary = " ".join(split_words(member.summary))
        keys = {member.source, member.definition, summary}
        if not keys & seen:
            seen |= keys
            yield member


def _cut_passages(documents: Iterable[Document]) -> Iterator[Document]:
    """Neighbouring paragraphs of prose, enough for a passage, cut in the middle."""
    for document in documents:
        number, words = 0, []
        for paragraph in split_paragraphs(document["text"]):
            words = words + paragraph.split() if _is_prose(paragraph) else []
            if len(words) < PASSAGE_WORDS.start:
                continue
            if len(words) in PASSAGE_WORDS:
                number += 1
                half = len(words) // 2
                yield join_completion(
                    f"{INSTRUCTIONS['prose']}\n{' '.join(words[:half])}",
                    f" {' '.join(words[half:])}",
                    f"{document['source']}:{number}",
                )
            words = []


_WORD = re.compile(r"""["“‘(*`']*[A-Za-z][A-Za-z'’-]*[.,;:!?)"”’*`']*""")


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is no title, list, grammar rule, table or code."""
    lines, words = textwrap.dedent(paragraph).splitlines(), paragraph.split()
    return (
        len(words) >= 8
        and not any(line[:1] in (*" >-=|",) for line in lines)
        and words[-1][-1] in ".:)"
        and sum(_WORD.fullmatch(word) is not None for word in words) > 0.75 * len(words)
    )
