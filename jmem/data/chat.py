"""Chats as documents: a checkpoint's own template, the loss on the assistant's turns.

Idea    A template is a Jinja program in the checkpoint. What an assistant turn renders
        to is found by rendering the chat up to it (with the prompt that asks for an
        answer) and through it: what the second adds to the first. Both must be how the
        whole rendering starts, so training sees each turn as generation would.
Source  `apply_chat_template` of Hugging Face's transformers: whitespace control,
        `raise_exception`, `tojson`, loop controls, `generation` blocks (whose contents
        are rendered; the spans do not need them).
Differs `strftime_now` is not defined: a rendering does not depend on the day, and
        templates that ask whether it is defined write their fixed date. No tools and
        no documents are passed.
Safety  Templates come from somebody else: they run in Jinja's immutable sandbox, with
        no loader. Their length and what they write are bounded; their time and the
        memory of a single expression are not.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jmem.data import rows
from jmem.data.document import DataError, Document, make_missing_column_error, read_text
from jmem.data.text import check_files, gather

if TYPE_CHECKING:
    import datasets
    import jinja2

KINDS = (".jsonl", ".parquet")
TEMPLATE_LIMIT = 1 << 18
"""Longest template, in bytes of UTF-8 (those in use have some 10 KiB)."""
RENDERED_LIMIT = 1 << 24
"""Longest rendering of a chat, in characters."""
CONFIG_LIMIT = 1 << 26
"""Longest tokenizer_config.json, in bytes (it may list every added token)."""

_JINJA, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_KINDS_OF_TOKEN = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class ChatTemplate:
    """How a model's chats are written out as text.

    Raises:
      DataError: a template that is too long, or not Jinja.
    """

    source: str = field(repr=False)
    """The Jinja program."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the program may name: `bos_token`, `eos_token` ..."""

    def __post_init__(self):
        size = len(self.source.encode(errors="replace"))
        if size > TEMPLATE_LIMIT:
            raise DataError(
                f"ChatTemplate: source has {size} bytes; a template has at most "
                f"{TEMPLATE_LIMIT}. Give the template itself."
            )
        _compile(self.source)

    def render(self, messages: Any, source: str = "messages") -> Document:
        """The chat as text, with the loss on what its assistant turns render to.

        That is the content and whatever the template writes behind it (an end marker,
        a line end), not the header that a generation prompt already holds.

        Raises:
          DataError: messages that are not a list of objects with the strings `role`
            (not empty) and `content`; none by the assistant; a template that fails, or
            that writes earlier turns otherwise once later ones follow. Starts with
            `source`.
        """
        _check(messages, source)
        text = self._write(messages, source)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._write(messages[:i], source, add_generation_prompt=True)
            after = self._write(messages[: i + 1], source)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{source}: this template rewrites earlier turns: message {i} (by "
                    "the assistant) is written otherwise in the whole chat than when "
                    "it is generated. Cut the chat after its first answer, or use "
                    "another template."
                )
            spans.append((len(before), len(after)))
        text = read_text({"messages": text}, "messages", source)
        return Document(text=text, source=source, loss_spans=spans)

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        place: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        names = {"messages": messages, "tools": None, "documents": None}
        names["add_generation_prompt"] = add_generation_prompt
        pieces, length = [], 0
        try:
            for piece in _compile(self.source).generate(self.tokens, **names):
                pieces.append(piece)
                length += len(piece)
                if length > RENDERED_LIMIT:
                    break
        # It runs a stranger's program, which may raise anything.
        except Exception as error:
            raise DataError(
                f"{place}: the chat template refuses these messages or fails "
                f"({_describe_error(error)}). Change the messages, or use another "
                "template."
            ) from error
        if length > RENDERED_LIMIT:
            raise DataError(
                f"{place}: the chat template writes more than {RENDERED_LIMIT} "
                "characters. Split the chat, or use another template."
            )
        return "".join(pieces)


def read_template(folder: str | os.PathLike[str]) -> ChatTemplate:
    """The chat template of a Hugging Face checkpoint's folder.

    From `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (of
    several, the one named "default"), which also names the special tokens.

    Raises:
      DataError: no such folder, no template in it, or a file that is damaged or too
        long.
    """
    from jmem.checkpoints.files import CheckpointError, parse_json, read_whole

    program, config = Path(folder, _JINJA), Path(folder, _CONFIG)
    try:
        raw: dict[str, Any] = {}
        if config.exists():
            raw = parse_json(read_whole(config, CONFIG_LIMIT), str(config))
        where, source = config, raw.get("chat_template")
        if program.exists():
            content = read_whole(program, TEMPLATE_LIMIT)
            where, source = program, rows.decode(content, program, first_line=1)
    except CheckpointError as error:
        raise DataError(f"{error} Copy it again.") from error
    if isinstance(source, list):
        named = [t for t in source if isinstance(t, Mapping)]
        source = next(
            (t.get("template") for t in named if t.get("name") == "default"), 0
        )
    if source is None:
        raise DataError(
            f"{os.fspath(folder)}: no chat template: looked for {_JINJA}, and for "
            f"'chat_template' in {_CONFIG}. Give the folder of a chat model, or write "
            "ChatTemplate(source, tokens)."
        )
    if not isinstance(source, str):
        raise DataError(
            f"{where}: 'chat_template' is neither a string nor a list of {{'name', "
            "'template'}} with one named 'default'. Write ChatTemplate(source, tokens)."
        )
    try:
        return ChatTemplate(source, _read_special_tokens(raw))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_chats(
    *paths: str | os.PathLike[str], template: ChatTemplate, column: str = "messages"
) -> "datasets.Dataset":
    """Chats of the files, in order, as a Dataset: `text`, `source`, `loss_spans`.

    Each row of a `.jsonl` or `.parquet` file holds in `column` a list of messages
    {"role", "content"}; their further keys go to the template as they are. The source
    is `path:line` (in Parquet `path:row`, from 1). Most templates write the begin token
    themselves: give the Dataset to `tokenise` with `add_special_tokens=False`.

    Raises:
      DataError: as `read` for files and rows, as `ChatTemplate.render` for messages.
        The message starts with `path:line` where there is one.
    """

    def documents(path: Path) -> Iterator[Document]:
        for place, row in rows.read_rows(path, (column,), strings=False) or ():
            if not isinstance(row, Mapping) or column not in row:
                found = row if isinstance(row, Mapping) else ()
                raise make_missing_column_error(place, column, found)
            yield template.render(row[column], place)

    return gather(check_files("read_chats", paths, KINDS), documents)


def _check(messages: Any, place: str) -> None:
    if not isinstance(messages, list | tuple):
        raise DataError(
            f"{place}: a chat is a list of messages, not {type(messages).__name__}. "
            'Write it as [{"role": "user", "content": ...}, ...].'
        )
    for i, message in enumerate(messages):
        known = message if isinstance(message, Mapping) else {}
        role, content = known.get("role"), known.get("content")
        if not (isinstance(role, str) and role.strip() and isinstance(content, str)):
            raise DataError(
                f"{place}: message {i} is {message!r:.80}, which lacks a role or "
                'a content (strings). Write it as {"role": "user", "content": ...}.'
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{place}: no message has the role 'assistant', so there is nothing to "
            "learn. Remove the chat."
        )


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


@functools.lru_cache(maxsize=8)
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

    def tojson(value: Any, indent: int | None = None) -> str:
        """`value` as JSON, not escaped for HTML as Jinja's own filter does."""
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    # Compiling folds constants, and so runs parts of the program.
    except Exception as error:
        raise DataError(
            f"the chat template is not Jinja that can be used "
            f"({_describe_error(error)}). Repair it, or use another."
        ) from error


def _describe_error(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.200}"
