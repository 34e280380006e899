"""Token sequences of any length as rows of one static length: packed, or padded.

A row of `seq_len` targets spans `seq_len + 1` tokens: `tokens` are all but the last,
`targets` all but the first. Padding has id 0 and weight 0; it comes last in its row, so
under causal attention no counted position sees it.

A target has weight 1 unless it is padding, masked in its sequence (a masked array, as
`tokenise` makes of a prompt with its completion), or the first token of a document that
does not see the one before it.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from jmem.data.batch import Batch
from jmem.data.document import DataError

Documents = Literal["apart", "joined"]
"""How the documents of a row stand to each other: none sees another, or one stream."""


def pack(
    sequences: Sequence[Int32[np.ndarray, " _"]],
    seq_len: int,
    documents: Documents = "apart",
) -> Batch:
    """All sequences end to end, in their order, cut into rows: [N, seq_len].

    A row starts with the last token of the row before, and only the last row is padded.
    A document that is longer than a row goes on in the next, which sees nothing of what
    came before.

    Documents are "apart": each is learnt as if it were alone in its row, by `segments`,
    and its first token is no target. If they are "joined" a row is one text: attention
    reaches back into the documents before, positions run on, and every token but the
    very first is a target once, that of a document predicted from the end token before.

    >>> data = pack([np.array([5, 6, 7, 0], np.int32), np.array([8, 0], np.int32)], 3)
    >>> data.tokens.tolist(), data.targets.tolist(), data.weights.tolist()
    ([[5, 6, 7], [0, 8, 0]], [[6, 7, 0], [8, 0, 0]], [[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    >>> data.segments.tolist()
    [[1, 1, 1], [1, 2, 2]]
    """
    _check("pack", sequences, seq_len)
    if documents not in get_args(Documents):
        raise DataError(
            f"pack: documents={documents!r}; choose one of {get_args(Documents)}."
        )
    stream = np.concatenate([np.ma.getdata(ids) for ids in sequences])
    counts = np.concatenate([~np.ma.getmaskarray(ids) for ids in sequences])
    numbers = np.repeat(np.arange(len(sequences)), [ids.size for ids in sequences])
    targets = stream.size - 1
    if targets < 1:
        raise DataError(
            "pack: one token in all, so nothing to predict; give more text."
        )
    rows = -(-targets // seq_len)
    padded = np.zeros(rows * seq_len + 1, np.int32)
    padded[: stream.size] = stream
    weights = np.zeros(rows * seq_len, np.float32)
    weights[:targets] = counts[1:]
    segments = None
    if documents == "apart":
        weights[:targets] *= numbers[1:] == numbers[:-1]
        segments = _number_in_rows(numbers, rows, seq_len)
    shape = (rows, seq_len)
    return Batch(
        padded[:-1].reshape(shape),
        padded[1:].reshape(shape),
        weights.reshape(shape),
        segments,
    )


def _number_in_rows(
    numbers: np.ndarray, rows: int, seq_len: int
) -> Int32[np.ndarray, "N T"]:
    """Each token's document, counted from 1 in every row; 0 is padding."""
    padded = np.full(rows * seq_len, -1)
    padded[: numbers.size] = numbers[: padded.size]
    padded = padded.reshape(rows, seq_len)
    changes = np.diff(padded, axis=1, prepend=padded[:, :1]) != 0
    counted = (1 + changes.cumsum(axis=1)).astype(np.int32)
    return np.where(padded < 0, np.int32(0), counted)


def keep_trainable(sequences: Sequence[np.ndarray], seq_len: int) -> list[np.ndarray]:
    """Those that have something to learn in a row of `seq_len` targets, as `pad` cuts.

    Of a prompt and its completion, those whose completion begins early enough.
    """
    return [
        own for own in sequences if not np.ma.getmaskarray(own)[1 : seq_len + 1].all()
    ]


def pad(sequences: Sequence[Int32[np.ndarray, " _"]], seq_len: int) -> Batch:
    """One sequence a row: [N, seq_len], cut after `seq_len + 1` tokens or padded.

    What is cut is lost to training; the end token goes with it.

    Raises:
      DataError: a sequence of one token, or one whose first `seq_len` targets are all
        masked: its row would teach nothing.

    >>> data = pad([np.array([5, 6, 7, 0], np.int32), np.array([8, 0], np.int32)], 2)
    >>> data.tokens.tolist(), data.targets.tolist(), data.weights.tolist()
    ([[5, 6], [8, 0]], [[6, 7], [0, 0]], [[1.0, 1.0], [1.0, 0.0]])
    """
    _check("pad", sequences, seq_len)
    shape = (len(sequences), seq_len)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, sequence in enumerate(sequences):
        counted = min(sequence.size - 1, seq_len)
        if counted < 1:
            raise DataError(
                f"pad: sequence {row} has {sequence.size} token(s), and a target needs "
                "one before it. Remove it, or close each document with an end token."
            )
        tokens[row, :counted] = np.ma.getdata(sequence)[:counted]
        targets[row, :counted] = np.ma.getdata(sequence)[1 : counted + 1]
        weights[row, :counted] = ~np.ma.getmaskarray(sequence)[1 : counted + 1]
    silent = np.flatnonzero(~weights.any(axis=1))
    if silent.size:
        raise DataError(
            f"pad: {silent.size} of {len(sequences)} sequences have no counted target "
            f"within seq_len={seq_len}, the first is number {silent[0]}. Raise "
            "seq_len, or leave out rows with such long prompts."
        )
    return Batch(tokens, targets, weights)


def _check(caller: str, sequences: Sequence[np.ndarray], seq_len: int) -> None:
    if seq_len < 1:
        raise DataError(
            f"{caller}: seq_len={seq_len} holds no target; need at least 1."
        )
    if not sequences:
        raise DataError(f"{caller}: no sequence given; tokenise some text first.")
