"""Documents as token ids, and which of them the loss covers."""

import warnings
from collections.abc import Iterable, Mapping
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from jmem.confined import is_failure
from jmem.data.document import (
    DataError,
    DataWarning,
    read_text,
    suggest_nearest,
    warn_of_bad_rows,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODED_AT_ONCE = 1024
"""Documents handed to the tokenizer together; it encodes them in parallel."""


def encode_start(
    tokenizer: "Tokenizer", text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text that goes on: a prompt, or what stands before one.

    They begin as `tokenise` begins the text. What the tokenizer puts behind every text
    (an end token, if any) is left off. Warns as `tokenise` of a begin token too many.
    """
    tokenizer = _lift_limits(tokenizer)
    encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if _begins_twice(encoding):
        _warn_of_begins(tokenizer, encoding, "a prompt")
    own = [i for i, part in enumerate(encoding.sequence_ids) if part is not None]
    if own or not encoding.ids:
        return encoding.ids[: own[-1] + 1 if own else 0]
    # Of an empty text all is added; what is added before one shows beside a letter.
    parts = tokenizer.encode("a").sequence_ids
    return encoding.ids[: next((i for i, p in enumerate(parts) if p is not None), 0)]


def tokenise(
    documents: Iterable[Any],
    tokenizer: "Tokenizer",
    *,
    end: str = "<|endoftext|>",
    column: str = "text",
    add_special_tokens: bool | None = None,
    vocab_size: int | None = None,
    skip_bad_rows: bool = False,
) -> list[Int32[np.ndarray, " _"]]:
    """Token ids of each document, closed by the token `end`.

    `documents` are `Document`s, or rows of any `datasets.Dataset`. The tokenizer
    adds what it always adds to a text (a begin token for Llama, nothing for SmolLM2),
    as in transformers and in `jmem.generate.text.complete`, unless a document says that
    its text has it (a chat, as its template writes it) or `add_special_tokens` says
    so of all. It reads special tokens spelled out in the text as such; truncation and
    padding that it was left with are not applied. A text that already ends in `end`,
    spelled out (with blanks behind it, perhaps) or added by the tokenizer, gets no
    second one. The ids stay in host memory, 4 bytes a token.

    A document with `loss_spans` becomes a `numpy.ma.MaskedArray`, masked where the loss
    does not look: a token counts if its last character lies in a span, and the end
    token if a span ends with the text. All others are plain arrays, and all count.

    With `skip_bad_rows`, documents that cannot be used are left out, and a
    `DataWarning` says how many. Another one tells of a text that spells out the begin
    token which the tokenizer puts before it once more.

    Raises:
      DataError: no document; a row without usable text in `column`, or with
        `loss_spans` that do not lie in it; a document without a single token (or none
        that counts); a tokenizer that does not know `end`, or that makes an id which
        `vocab_size` (the model's, if given) has no row for. JAX would clamp such an id
        to the last row in silence.
    """
    end_id = tokenizer.token_to_id(end)
    if end_id is None:
        known = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        raise DataError(
            f"tokenise: end={end!r} is not a token of this tokenizer"
            f"{suggest_nearest(end, known)}. Its special tokens: {known}."
        )
    tokenizer = _lift_limits(tokenizer)
    sequences: list[np.ndarray] = []
    bad, counted, twice = [], 0, False
    for rows in batched(documents, ENCODED_AT_ONCE):
        texts = []
        for number, row in enumerate(rows, start=counted):
            try:
                place = _name_place(row, number)
                adds = _adds_special_tokens(row, add_special_tokens)
                texts.append((row, place, read_text(row, column, place), adds))
            except DataError as error:
                bad.append(error)
        counted += len(rows)
        for (row, place, text, _), encoding in zip(texts, _encode(tokenizer, texts)):
            try:
                ids = _close(encoding, text, end_id, place, vocab_size)
                if not twice and (twice := _begins_twice(encoding)):
                    _warn_of_begins(tokenizer, encoding, place)
                spans = row.get("loss_spans")
                if spans is not None:
                    ids = _mask(ids, encoding.offsets, spans, len(text), place)
                sequences.append(ids)
            except DataError as error:
                bad.append(error)
        if bad and not skip_bad_rows:
            raise bad[0]
    if not sequences:
        nothing = "tokenise: no document given; name files that hold text."
        raise bad[0] if bad else DataError(nothing)
    warn_of_bad_rows(bad, counted)
    return sequences


def _begins_twice(encoding: Any) -> bool:
    """Whether the tokenizer put a begin token before a text that spells it out."""
    first, *rest = encoding.sequence_ids[:2] or (0,)
    return first is None and rest == [0] and encoding.ids[0] == encoding.ids[1]


def _warn_of_begins(tokenizer: "Tokenizer", encoding: Any, place: str) -> None:
    begin = tokenizer.id_to_token(encoding.ids[0])
    warnings.warn(
        f"{place}: the text spells out {begin!r}, and the tokenizer puts another "
        "before it (as in transformers). For text that has its own, as a chat template "
        "writes it, give add_special_tokens=False.",
        DataWarning,
        stacklevel=3,
    )


def _adds_special_tokens(row: Any, given: bool | None) -> bool:
    """What the caller says, else what the document says, else yes."""
    said = row.get("add_special_tokens") if isinstance(row, Mapping) else None
    return next((flag for flag in (given, said) if flag is not None), True)


def _encode(tokenizer: "Tokenizer", texts: list[tuple[Any, str, str, bool]]) -> list:
    """The encoding of each text, in order, many at a time, or why there is none."""
    found: list[Any] = [None] * len(texts)
    for adds in (True, False):
        own = [i for i, (*_, flag) in enumerate(texts) if flag is adds]
        given = [texts[i][2] for i in own]
        try:
            encodings = tokenizer.encode_batch(given, add_special_tokens=adds)
        except BaseException as error:
            if not is_failure(error):
                raise
            encodings = [_encode_one(tokenizer, text, adds) for text in given]
        for i, encoding in zip(own, encodings):
            found[i] = encoding
    return found


def _encode_one(tokenizer: "Tokenizer", text: str, adds: bool) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=adds)
    except BaseException as error:
        if not is_failure(error):
            raise
        return error


def _close(
    encoding: Any, text: str, end_id: int, place: str, vocab_size: int | None
) -> np.ndarray:
    """The ids with an end token: the text's own, or one that is put behind it."""
    if isinstance(encoding, BaseException):
        raise DataError(
            f"{place}: the tokenizer fails at the text ({encoding}). Remove the "
            "document, or use another tokenizer."
        )
    if not encoding.ids:
        raise DataError(
            f"{place}: the tokenizer finds no token in the text. "
            "Remove the document, or use the tokenizer of the model."
        )
    last = len(encoding.ids) - 1
    while last > 0 and _is_blank(text, *encoding.offsets[last]):
        last -= 1
    closed = encoding.ids[last] == end_id
    ids = np.array([*encoding.ids, *[end_id] * (not closed)], np.int32)
    if vocab_size is not None and ids.max() >= vocab_size:
        raise DataError(
            f"{place}: token id {ids.max()} does not fit in vocab_size="
            f"{vocab_size}. Use the tokenizer that belongs to the model."
        )
    return ids


def _is_blank(text: str, start: int, stop: int) -> bool:
    return start < stop and text[start:stop].isspace()


def _mask(
    ids: np.ndarray,
    offsets: list[tuple[int, int]],
    spans: Any,
    length: int,
    place: str,
) -> np.ma.MaskedArray:
    """`ids` without the tokens, and perhaps the end, that lie outside of `spans`."""
    edges = _check_edges(spans, length, place)
    # Tokens that the tokenizer adds have offsets (0, 0): they go with what is before.
    ends = [*(end for _, end in offsets), length][: ids.size]
    ends = np.maximum.accumulate(ends)
    # Inside a span lies what has an odd number of edges before it.
    counted = np.searchsorted(edges, ends, side="left") % 2 == 1
    if not counted.any():
        raise DataError(
            f"{place}: no token lies in loss_spans={spans!r:.200}, so there is nothing "
            "to learn. Remove the document."
        )
    return np.ma.masked_array(ids, mask=~counted)


def _check_edges(spans: Any, length: int, place: str) -> list[int]:
    """Starts and ends of `spans`, one after the other."""

    def is_pair(span: Any) -> bool:
        return isinstance(span, list | tuple) and [*map(type, span)] == [int, int]

    sound = isinstance(spans, list | tuple) and all(map(is_pair, spans))
    edges = [edge for span in spans for edge in span] if sound else []
    if not edges or edges != sorted(edges) or edges[0] < 0 or edges[-1] > length:
        raise DataError(
            f"{place}: loss_spans={spans!r:.200} must be pairs [start, end), ascending "
            f"and apart, within the {length} characters of the text."
        )
    return edges


def _name_place(row: Any, index: int) -> str:
    named = isinstance(row, Mapping) and isinstance(row.get("source"), str)
    return row["source"] if named else f"document {index}"


def _lift_limits(tokenizer: "Tokenizer") -> "Tokenizer":
    """The tokenizer without truncation and padding: a copy, if it has them set."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
