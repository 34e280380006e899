"""Chats as documents: a checkpoint's own template, the loss on the assistant's turns.

Idea    A template is a Jinja program in the checkpoint. What an assistant turn renders
        to is found by rendering the chat up to it (with the prompt that asks for an
        answer) and through it: what the second adds to the first. Both must be how the
        whole rendering starts, so training sees each turn as generation would.
        Templates that drop the reasoning of earlier turns break that: such a chat is
        refused, or made one document an answer (`render_each`).
Thought An answer may begin with its reasoning, <think> ... </think>. Where a template
        leaves that out, or has opened it in the prompt for the answer, the answer
        follows its prompt as it would be generated, and ends as the template ends it.
Source  `apply_chat_template` of Hugging Face's transformers 5: whitespace control,
        `raise_exception`, `tojson`, `strftime_now`, loop controls, `generation` blocks
        (whose contents are rendered; the spans do not need them), tools. No documents.
Safety  Templates come from somebody else: they run in Jinja's immutable sandbox, in a
        process whose time and memory are limited (`jmem.confined`).
"""

import datetime
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmem import confined
from jmem.data import rows
from jmem.data.document import DataError, Document, read_text
from jmem.data.messages import (
    ALPACA,
    BESIDE,
    COLUMNS,
    Chat,
    list_said,
    make_chat,
    name_tools,
    read_chat,
)
from jmem.data.text import Source, check_sources, gather

if TYPE_CHECKING:
    import datasets

    from jmem.checkpoints import Checkpoint

KINDS = (".jsonl", ".json", ".parquet")
TEMPLATE_LIMIT = 1 << 18
"""Longest template, in bytes of UTF-8 (those in use have some 10 KiB)."""
RENDERED_LIMIT = 1 << 24
"""Longest rendering of a chat, in characters."""
CONFIG_LIMIT = 1 << 26
"""Longest tokenizer_config.json, in bytes (it may list every added token)."""

_JINJA, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_THOUGHT = re.compile(r"<(\w+)>.*?</\1>", re.DOTALL)
"""How an answer begins that brings its reasoning."""
_OPENED = re.compile(r"<(\w+)>\s*\Z")
"""How a prompt ends that has begun the reasoning."""
_BEGINS = (
    'Message 0 is an answer that nobody asked for: give it "weight": 0 or remove it. '
)
_KINDS_OF_TOKEN = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class ChatTemplate:
    """How a model's chats are written out as text.

    Raises:
      DataError: a template that is too long, or not Jinja; a day that is none.
    """

    source: str = field(repr=False)
    """The Jinja program."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the program may name: `bos_token`, `eos_token` ..."""
    today: str = ""
    """The day that `strftime_now` tells, as 2026-12-31; empty: the day it is."""

    def __post_init__(self):
        size = len(self.source.encode(errors="replace"))
        if size > TEMPLATE_LIMIT:
            raise DataError(
                f"ChatTemplate: source has {size} bytes; a template has at most "
                f"{TEMPLATE_LIMIT}. Give the template itself."
            )
        try:
            datetime.date.fromisoformat(self.today or "2000-01-01")
        except ValueError as error:
            raise DataError(
                f"ChatTemplate: today={self.today!r} is no day ({error}). Write it "
                "as 2026-12-31 (--chat-date)."
            ) from error
        try:
            confined.ask("compile", source=self.source)
        except confined.ConfinedError as error:
            raise DataError(
                f"the chat template is not Jinja that can be used ({error}). Repair "
                "it, or use another."
            ) from error

    def render(
        self,
        messages: Any,
        source: str = "messages",
        tools: list[Any] | None = None,
    ) -> Document:
        """The chat as text, with the loss on what its assistant turns render to.

        That is the content and whatever the template writes behind it (an end marker,
        a line end), not the header that a generation prompt already holds. A turn with
        `"weight": 0` is not learnt.

        Raises:
          DataError: messages that are not a list of objects with the strings `role`
            (not empty) and `content`; none by the assistant; a template that fails, or
            that writes earlier turns otherwise once later ones follow. Starts with
            `source`.
        """
        return self._render(make_chat(messages, source, tools), source)

    def render_each(
        self,
        messages: Any,
        source: str = "messages",
        tools: list[Any] | None = None,
    ) -> list[Document]:
        """The chat as a document an answer, each up to it, with the loss on it alone.

        Every answer is read as it is generated, whatever the template makes of it once
        later turns follow.

        Raises:
          DataError: as `render`, but for earlier turns that are written otherwise.
        """
        return self._render_each(make_chat(messages, source, tools), source)

    def _render(self, chat: Chat, source: str) -> Document:
        text, *pairs = self._write(chat, source, whole=True)
        spans: list[tuple[int, int]] = []
        for i, (before, after) in zip(_list_answers(chat), _pair(pairs)):
            said, place = chat.messages[i]["content"], f"{source}: message {i}"
            through = _read_answer(before, after, said, place)
            if through is not None and text == after:
                text = through
            if through is None or not text.startswith(through):
                raise DataError(
                    f"{source}: this template rewrites earlier turns: message {i} (by "
                    "the assistant) is written otherwise in the whole chat than when "
                    f"it is generated. {_BEGINS * chat.learnt[0]}Make a document "
                    "of each answer (--split-chats, split=True), cut the chat after "
                    "its first answer, or use another template."
                )
            spans.append((len(before), len(through)))
        return _make_document(text, chat, spans, source)

    def _render_each(self, chat: Chat, source: str) -> list[Document]:
        found = []
        pairs = _pair(self._write(chat, source, whole=False))
        for i, (before, after) in zip(_list_answers(chat), pairs):
            said, place = chat.messages[i]["content"], f"{source}: message {i}"
            through = _read_answer(before, after, said, place)
            if through is None:
                raise DataError(
                    f"{place}: this template writes an answer otherwise than it asks "
                    "for one: the prompt for it is not how it begins. "
                    f"{_BEGINS * chat.learnt[0]}Use another template."
                )
            own = chat._replace(learnt=[n == i for n in range(len(chat.learnt))])
            span = len(before), len(through)
            found.append(_make_document(through, own, [span], source))
        return found

    def _write(self, chat: Chat, place: str, *, whole: bool) -> list[str]:
        """The chat's text, if `whole`; then, by answer, the text before and through."""
        parts = [(len(chat.messages), False)] if whole else []
        for i in _list_answers(chat):
            parts += [(i, True), (i + 1, False)]
        try:
            return confined.ask(
                "render",
                source=self.source,
                tokens=dict(self.tokens),
                messages=chat.messages,
                parts=parts,
                tools=chat.tools,
                options=dict(chat.options),
                today=self.today,
                limit=RENDERED_LIMIT,
            )
        except confined.ConfinedError as error:
            raise DataError(
                f"{place}: the chat template refuses these messages or fails ({error})."
                f" {_BEGINS * chat.learnt[0]}Change the messages, or use another "
                "template."
            ) from error


def read_template(
    source: "str | os.PathLike[str] | Checkpoint", today: str = ""
) -> ChatTemplate:
    """The chat template of a checkpoint.

    Of a Hugging Face folder from `chat_template.jinja`, else `chat_template` of
    `tokenizer_config.json` (of several, the one named "default"), which also names the
    special tokens; of a GGUF file from its metadata, or else from such files beside it.

    Args:
      source: an opened checkpoint, or what `jmem.checkpoints.load` takes.
      today: the day that the template is told, as `ChatTemplate` says.

    Raises:
      DataError: no such folder, no template in it, or a file that is damaged or too
        long.
    """
    from jmem import checkpoints

    if isinstance(source, str | os.PathLike) and not Path(source).is_dir():
        source = checkpoints.load(source)
    if isinstance(source, checkpoints.Checkpoint):
        place, texts = source.path, source.tokenizer_files
        found = _find_template(texts, place)
        if found is None and not place.is_dir():
            found = _find_template(_read_texts(place.parent), place.parent)
    else:
        place = Path(source)
        found = _find_template(_read_texts(place), place)
    if found is None:
        raise DataError(
            f"{place}: no chat template: looked for {_JINJA}, and for 'chat_template' "
            f"in {_CONFIG} (of a GGUF file, tokenizer.chat_template). Give the "
            "checkpoint of a chat model, or write ChatTemplate(source, tokens)."
        )
    where, program, tokens = found
    try:
        return ChatTemplate(program, tokens, today)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_chats(
    *sources: Source,
    template: ChatTemplate,
    column: str | None = None,
    split: bool = False,
    skip_bad_rows: bool = False,
) -> "datasets.Dataset":
    """Chats of the files, in order, as a Dataset: `text`, `source`, `loss_spans`.

    Each row of a `.jsonl`, `.json` (an array) or `.parquet` file, of a folder that
    `datasets` saved, or of a Dataset holds a conversation in one of the forms of
    `jmem.data.messages`; further keys of a message go to the template as they are. The
    source is `path:line` (in Parquet and Arrow `path:row`, from 1). The template writes
    the begin token where there is one, which the documents say to `tokenise`.

    Args:
      *sources: files, folders or Datasets.
      template: writes the chats out.
      column: holds the messages, or Alpaca's instruction; None: the first of messages,
        conversations, conversation and instruction that a row has.
      split: a document an answer (`ChatTemplate.render_each`), not one a chat.
      skip_bad_rows: leave out rows that cannot be used, with a warning that counts
        them, instead of refusing the first.

    Raises:
      DataError: as `read` for files and rows, as `ChatTemplate.render` for messages.
        The message starts with `path:line` where there is one.
    """
    columns = (column,) if column else ()
    beside = (*BESIDE, *ALPACA, *(() if column else COLUMNS))

    def documents(place: str, row: Any) -> list[Document]:
        chat = read_chat(row, column, place)
        if split:
            return template._render_each(chat, place)
        return [template._render(chat, place)]

    return gather(
        check_sources("read_chats", sources, KINDS),
        lambda s: rows.read_rows(s, columns, strings=False, beside=beside) or (),
        documents,
        skip_bad_rows=skip_bad_rows,
    )


def _list_answers(chat: Chat) -> list[int]:
    return [i for i, learnt in enumerate(chat.learnt) if learnt]


def _pair(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(texts[::2], texts[1::2])


def _read_answer(before: str, after: str, said: str, place: str) -> str | None:
    """The text through an answer as it is generated: `before` is how it begins.

    None if the template writes it otherwise than it asks for it.

    Raises:
      DataError: the prompt has begun a reasoning that the answer does not bring.
    """
    said = said.strip()
    thought, opened = _THOUGHT.match(said), _OPENED.search(before)
    if opened and not thought and f"</{opened[1]}>" in said:
        thought = opened  # it goes on from there
    begins = after.startswith(before)
    if thought and not (begins and f"</{thought[1]}>" in after[len(before) :]):
        through = _put_thought(before, after, said, thought[1])
        if through is not None:
            return through
    if begins:
        return after
    if opened and not thought and after.startswith(before[: opened.start()]):
        tag = opened[1]
        raise DataError(
            f"{place}: this template writes an answer otherwise than it asks for one: "
            f"the prompt for it ends in <{tag}>, and the answer brings no reasoning. "
            f"Begin its content so, <{tag}>...</{tag}>, or use another template."
        )
    return None


def _put_thought(before: str, after: str, said: str, tag: str) -> str | None:
    """`before`, all that is said, and what the template writes behind an answer.

    None if what follows the thought is not how the template goes on.
    """
    begin, end = f"<{tag}>", f"</{tag}>"
    opening = re.search(rf"{begin}(\s*)\Z", before)
    head = before[: opening.start()] if opening else before
    written, answer = after[len(head) :].lstrip(), said.partition(end)[2].lstrip()
    if end in written:
        written = written.partition(end)[2].lstrip()
    if not (after.startswith(head) and written.startswith(answer)):
        return None
    if opening:
        said = said.removeprefix(begin).removeprefix(opening[1])
    return before + said + written[len(answer) :]


def _make_document(
    text: str, chat: Chat, spans: list[tuple[int, int]], source: str
) -> Document:
    text = read_text({"messages": text}, "messages", source)
    for i, (start, stop) in zip(_list_answers(chat), spans):
        for what, words in list_said(chat.messages[i]).items():
            if left_out := _find_left_out(words, text[start:stop]):
                raise DataError(
                    f"{source}: this template leaves out what message {i} (by the "
                    f"assistant) says: {left_out!r:.80} of its {what}. It may be for "
                    "images, or of another kind of model; use another, or change the "
                    "message."
                )
    if left_out := _find_left_out(name_tools(chat), text):
        raise DataError(
            f"{source}: this template says nothing of the tool {left_out!r:.80}, so "
            "nobody would tell the model what it may call. Use a template that does, "
            "or leave out the column 'tools'."
        )
    return Document(
        text=text, source=source, loss_spans=spans, add_special_tokens=False
    )


def _find_left_out(words: Iterable[str], text: str) -> str | None:
    """The first of some words that a text does not hold, as it is or as in JSON."""
    for word in words:
        if word not in text and json.dumps(word)[1:-1] not in text:
            return word
    return None


def _read_texts(folder: Path) -> dict[str, str]:
    """The files of a folder that hold a template and special tokens."""
    from jmem.checkpoints.files import CheckpointError, read_whole

    found = {}
    try:
        for name in (_JINJA, _CONFIG, _SPECIAL):
            path = folder / name
            if path.exists():
                limit = TEMPLATE_LIMIT if name == _JINJA else CONFIG_LIMIT
                found[name] = rows.decode(read_whole(path, limit), path, first_line=1)
    except CheckpointError as error:
        raise DataError(f"{error} Copy it again.") from error
    return found


def _find_template(
    texts: Mapping[str, str], place: Path
) -> tuple[Path, str, dict[str, str]] | None:
    """(where it stands, the template, special tokens); None if there is none."""
    from jmem.checkpoints.files import CheckpointError, parse_json

    folder = place if place.is_dir() else place.parent
    named: dict[str, Any] = {}
    config: dict[str, Any] = {}
    try:
        for name in (_SPECIAL, _CONFIG):
            if name in texts:
                config = parse_json(texts[name].encode(), str(folder / name))
                named |= {k: v for k, v in config.items() if v is not None}
    except CheckpointError as error:
        raise DataError(f"{error} Copy it again.") from error
    where, source = folder / _CONFIG, named.get("chat_template")
    if _JINJA in texts:
        where, source = folder / _JINJA, texts[_JINJA]
    if isinstance(source, list):
        several = [t for t in source if isinstance(t, Mapping)]
        source = next(
            (t.get("template") for t in several if t.get("name") == "default"), 0
        )
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(
            f"{where}: 'chat_template' is neither a string nor a list of {{'name', "
            "'template'}} with one named 'default'. Write ChatTemplate(source, tokens)."
        )
    try:
        return where, source, _read_special_tokens(named)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _read_special_tokens(raw: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that are set, each a string or an object that holds one."""
    found = {}
    for name in (f"{kind}_token" for kind in _KINDS_OF_TOKEN):
        value = raw.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            found[name] = content
        elif value is not None:
            raise DataError(
                f"{name}={value!r:.80} is not a token. Write it as a string."
            )
    return found
