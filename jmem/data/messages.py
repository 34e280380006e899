"""Conversations as people keep them, as the messages that a chat template reads.

    {"messages": [{"role": "user", "content": "..."}, ...]}     OpenAI, Hugging Face
    {"conversations": [{"from": "human", "value": "..."}, ...]}              ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                    Alpaca

Idea    What a template gets is what transformers gives it: a key whose value is null is
        no key (here at any depth, as Arrow gives every object every key), reasoning
        goes by every name that templates ask for, and `tools` beside the messages are
        passed on. Beyond that, contents in parts are joined to one text, a tool call
        may have no content, and a message's `weight` says whether it is learnt. What
        can be neither kept nor understood is refused by its name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jmem.data.document import DataError, make_missing_column_error

COLUMNS = ("messages", "conversations", "conversation")
"""Where lists of messages are looked for, if no column is named."""
ALPACA = ("instruction", "input", "output", "history")
BESIDE = ("tools", "system", "chat_template_kwargs")
"""Columns that belong to a conversation, where they are."""

_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "assistant": "assistant",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Who speaks in ShareGPT, and the role that this is."""
_WORD = re.compile(r"\w+")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What reasoning before an answer is called; templates ask for the first or second."""


class Chat(NamedTuple):
    """One conversation."""

    messages: list[dict[str, Any]]
    learnt: list[bool]
    """Whether the loss covers the message: the assistant's, unless its weight is 0."""
    tools: list[Any] | None
    """What the assistant may call, as JSON schemas."""
    options: Mapping[str, Any] = {}
    """Further values that the template may ask for: {"enable_thinking": False}."""


def read_chat(row: Any, column: str | None, place: str) -> Chat:
    """The conversation in a row of a table; `column` holds it, or any known one.

    Raises:
      DataError: there is none, or it is no conversation. Starts with `place`.
    """
    if isinstance(row, DataError):
        raise row
    known = row if isinstance(row, Mapping) else {}
    names = [column] if column else [n for n in (*COLUMNS, ALPACA[0]) if n in known]
    names.sort(key=lambda name: known.get(name) is None)
    if not names or names[0] not in known:
        raise make_missing_column_error(place, column or COLUMNS[0], known)
    value = known[names[0]]
    if isinstance(value, str) and known.get("output") is not None:
        value = _read_alpaca(known, value, place)
    messages, system = [*_check_list(value, place)], known.get("system")
    if not isinstance(system, str | None):
        raise DataError(f"{place}: system={system!r:.80} is not a string.")
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if system and "system" not in (first.get("role"), first.get("from")):
        messages.insert(0, {"role": "system", "content": system})
    chat = make_chat(messages, place, _read_objects(known.get("tools"), "tools", place))
    options = known.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise DataError(
            f"{place}: chat_template_kwargs={options!r:.80} is not an object. Write it "
            'as {"enable_thinking": false}, or rename the column.'
        )
    return chat._replace(options=options)


def make_chat(messages: Any, place: str, tools: list[Any] | None = None) -> Chat:
    """Messages, each checked, and which of them are learnt.

    Raises:
      DataError: what they lack. Starts with `place`.
    """
    found = [
        _read_message(message, f"{place}: message {i}")
        for i, message in enumerate(_check_list(messages, place))
    ]
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(
            f"{place}: no message has the role 'assistant', so there is nothing to "
            "learn. Remove the chat."
        )
    learnt = [
        _is_learnt(message, f"{place}: message {i}") for i, message in enumerate(found)
    ]
    if not any(learnt):
        raise DataError(
            f"{place}: every answer has weight 0, so there is nothing to learn. Remove "
            "the chat."
        )
    return Chat(found, learnt, tools)


def list_said(message: Mapping[str, Any]) -> dict[str, list[str]]:
    """The words of an answer that a model is to learn, by the key they stand in."""
    parts = {key: message.get(key) for key in ("content", "reasoning_content")}
    calls, one = message.get("tool_calls"), message.get("function_call")
    for key, own in (("tool_calls", calls), ("function_call", [one])):
        own = [_get_function(call) for call in own] if isinstance(own, list) else []
        parts[key] = [[call.get("name"), call.get("arguments")] for call in own]
    return {key: [*_list_words(value)] for key, value in parts.items()}


def name_tools(chat: Chat) -> list[str]:
    """The names of the tools that an assistant is told of."""
    names = [_get_function(tool).get("name") for tool in chat.tools or ()]
    return [name for name in names if isinstance(name, str)]


def _get_function(tool: Any) -> Mapping[str, Any]:
    """What a tool, or a call of one, says of the function; {} if it is neither."""
    own = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def _list_words(value: Any) -> Iterator[str]:
    """The words of the strings in a value of JSON, and of the names in it."""
    rest = [value]
    while rest:
        match rest.pop():
            case str() as text:
                yield from dict.fromkeys(_WORD.findall(text))
            case Mapping() as own:
                rest += reversed([*own, *own.values()])
            case list() as own:
                rest += reversed(own)


def _check_list(messages: Any, place: str) -> list[Any] | tuple[Any, ...]:
    if isinstance(messages, list | tuple):
        return messages
    raise DataError(
        f"{place}: a chat is a list of messages, not {type(messages).__name__}. "
        'Write it as [{"role": "user", "content": ...}, ...], or an instruction with '
        'its "output".'
    )


def _read_message(message: Any, place: str) -> dict[str, Any]:
    """The message without nulls, with a role, and with one text as its content."""
    known = message if isinstance(message, Mapping) else {}
    try:
        found = _drop_nulls(known)
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply. Remove the chat.") from error
    if "role" not in found and "from" in found:
        speaker = found.pop("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(
                f"{place} is from {speaker!r:.80}; known are {', '.join(_ROLES)}. "
                'Write it as {"role": ..., "content": ...}.'
            )
        found = {"role": _ROLES[speaker], "content": found.pop("value", None)} | found
    role, content = found.get("role"), found.get("content")
    if isinstance(content, list | tuple):
        content = found["content"] = _join_parts(content, place)
    if "tool_calls" in found:
        found["tool_calls"] = _read_objects(found["tool_calls"], "tool_calls", place)
    if not isinstance(found.get("function_call", {}), Mapping):
        raise DataError(
            f"{place}: function_call={found['function_call']!r:.80} is not an object. "
            'Write it as {"name": ..., "arguments": ...}.'
        )
    calls = found.get("tool_calls") or found.get("function_call")
    if content is None and calls and role == "assistant":
        content = found["content"] = ""
    if not (isinstance(role, str) and role.strip() and isinstance(content, str)):
        raise DataError(
            f"{place} is {message!r:.80}, which lacks a role or a content (strings). "
            'Write it as {"role": "user", "content": ...}.'
        )
    reasoning = [found[name] for name in _REASONING if name in found]
    if reasoning:
        found = {"thinking": reasoning[0]} | found | {"reasoning_content": reasoning[0]}
    return found


def _drop_nulls(value: Any) -> Any:
    """The value without entries that are null; a call's arguments are left as they are.

    A null there is what the assistant says, and elsewhere what another row has.
    """
    if isinstance(value, Mapping):
        return {
            key: own if key == "arguments" else _drop_nulls(own)
            for key, own in value.items()
            if own is not None
        }
    return [*map(_drop_nulls, value)] if isinstance(value, list | tuple) else value


def _join_parts(parts: Any, place: str) -> str:
    """The text of a content in parts, which templates write one after another."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{place}: a part of its content is {kind!r:.80}; only text is read, "
                'as {"type": "text", "text": ...}. Remove the chat.'
            )
    return "".join(part["text"] for part in parts)


def _is_learnt(message: Mapping[str, Any], place: str) -> bool:
    weight, answers = message.get("weight", 1), message["role"] == "assistant"
    if weight not in (0, 1) or (weight and "weight" in message and not answers):
        raise DataError(
            f"{place}, by {message['role']!r}, has weight={weight!r:.80}; an answer "
            "has 1 or 0 (not learnt), and what others say is never learnt. Change or "
            "remove the key."
        )
    return answers and bool(weight)


def _read_alpaca(row: Mapping[str, Any], instruction: str, place: str) -> list[Any]:
    """Turns of an instruction with its input and output, and of those before it."""
    given, history = row.get("input"), row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 for turn in history
    )
    if not isinstance(given, str | None) or not pairs:
        raise DataError(
            f"{place}: input={given!r:.80} is a string and history={history!r:.80} a "
            "list of pairs in Alpaca's rows."
        )
    asked = f"{instruction}\n{given}" if given else instruction
    turns = [*history, (asked, row["output"])]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn)
    ]


def _read_objects(value: Any, name: str, place: str) -> list[Any] | None:
    """Schemas of tools, or calls of them: a list, the same as JSON text, or none."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            found = value
    if found is None or (
        isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)
    ):
        return found
    raise DataError(
        f"{place}: {name}={value!r:.80} is not a list of objects, one a tool. Write "
        "them as JSON, or rename the key."
    )
