"""Documents as token ids, and which of them the loss covers."""

from collections.abc import Iterable, Mapping
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from jmem.data.document import DataError, read_text, suggest_nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODED_AT_ONCE = 1024
"""Documents handed to the tokenizer together; it encodes them in parallel."""


def tokenise(
    documents: Iterable[Any],
    tokenizer: "Tokenizer",
    *,
    end: str = "<|endoftext|>",
    column: str = "text",
    add_special_tokens: bool = True,
    vocab_size: int | None = None,
) -> list[Int32[np.ndarray, " _"]]:
    """Token ids of each document, closed by the token `end`.

    `documents` are `Document`s, or rows of any `datasets.Dataset`. The tokenizer
    adds what it always adds to a text (a begin token for Llama, nothing for SmolLM2;
    not with `add_special_tokens=False`, right for chats, whose template writes it)
    and reads special tokens spelled out in the text as such; truncation and padding
    that it was left with are not applied. The ids stay in host memory, 4 bytes a token.

    A document with `loss_spans` becomes a `numpy.ma.MaskedArray`, masked where the loss
    does not look: a token counts if its last character lies in a span, and the end
    token if a span ends with the text. All others are plain arrays, and all count.

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
    for rows in batched(documents, ENCODED_AT_ONCE):
        places = [_name_place(row, len(sequences) + i) for i, row in enumerate(rows)]
        texts = [read_text(row, column, place) for row, place in zip(rows, places)]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        for row, place, text, encoding in zip(rows, places, texts, encodings):
            if not encoding.ids:
                raise DataError(
                    f"{place}: the tokenizer finds no token in the text. "
                    "Remove the document, or use the tokenizer of the model."
                )
            ids = np.array([*encoding.ids, end_id], np.int32)
            if vocab_size is not None and ids.max() >= vocab_size:
                raise DataError(
                    f"{place}: token id {ids.max()} does not fit in vocab_size="
                    f"{vocab_size}. Use the tokenizer that belongs to the model."
                )
            spans = row.get("loss_spans")
            if spans is not None:
                ids = _mask(ids, encoding.offsets, spans, len(text), place)
            sequences.append(ids)
    if not sequences:
        raise DataError("tokenise: no document given; name files that hold text.")
    return sequences


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
    ends = np.maximum.accumulate([*(end for _, end in offsets), length])
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
