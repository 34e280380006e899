"""Adapters of maps that one module computes side by side: joined to one, and cut again.

GPT-2's `c_attn` computes q, k and v; an adapter of it has one A [in, rank] for the
three, and a B [rank, 3 out]. Arrays are stacked: a [L, in, rank], b [L, rank, out].

A magnitude [L, out] (DoRA) belongs to columns, and is joined and cut as they are; a map
without an adapter has none, so there all three have one.

Joined   Adapters whose A's are equal, bit for bit, share it: the rank stays. Others are
         stacked, A = [A_q A_k A_v], and B holds theirs on its diagonal: three times the
         rank, and the very products. A map without an adapter is zeros.
Cut      A of the rank that is asked for goes to all, with a third of B each. One of
         three times the rank whose B is zero off its diagonal gives what was joined; if
         it is not (it was trained so), all share A at its whole rank.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

Pair = dict[str, np.ndarray]
"""{"lora_a": [L, in, rank], "lora_b": [L, rank, out]}, and perhaps "magnitude"."""


def join(pairs: Sequence[Pair | None]) -> Pair:
    """One adapter that computes the products of all, side by side; not all are None.

    None of them is None where they have magnitudes.
    """
    present = [pair for pair in pairs if pair is not None]
    a, b = present[0]["lora_a"], present[0]["lora_b"]
    zeros = {"lora_a": np.zeros_like(a), "lora_b": np.zeros_like(b)}
    filled = [pair or zeros for pair in pairs]
    if all(pair["lora_a"].tobytes() == a.tobytes() for pair in present):
        b = np.concatenate([pair["lora_b"] for pair in filled], axis=-1)
    else:
        layers, rank, outputs = b.shape
        blocks = np.zeros((layers, len(pairs), rank, len(pairs), outputs), b.dtype)
        for i, pair in enumerate(filled):
            blocks[:, i, :, i] = pair["lora_b"]
        a = np.concatenate([pair["lora_a"] for pair in filled], axis=-1)
        b = blocks.reshape(layers, len(pairs) * rank, len(pairs) * outputs)
    found = {"lora_a": a, "lora_b": b}
    if "magnitude" in present[0]:
        lengths = [pair["magnitude"] for pair in present]
        found["magnitude"] = np.concatenate(lengths, axis=-1)
    return found


def cut(pair: Pair, parts: int, rank: int) -> list[Pair | None]:
    """The adapter of each map; None where A and B are both zeros, which never learn.

    One with a magnitude does learn, and stays.
    """
    a, b = pair["lora_a"], pair["lora_b"]
    found = [{"lora_a": a, "lora_b": third} for third in np.split(b, parts, axis=-1)]
    learns = [True] * parts
    if a.shape[-1] == parts * rank:
        blocks = _cut_blocks(b, parts, rank)
        own = [
            {"lora_a": piece, "lora_b": blocks[i, i]}
            for i, piece in enumerate(np.split(a, parts, axis=-1))
        ]
        alive = [any(map(np.any, one.values())) for one in own]
        if any(alive) and not blocks[~np.eye(parts, dtype=bool)].any():
            found, learns = own, alive
    if "magnitude" in pair:
        lengths = np.split(pair["magnitude"], parts, axis=-1)
        return [one | {"magnitude": part} for one, part in zip(found, lengths)]
    return [one if alive else None for one, alive in zip(found, learns)]


def _cut_blocks(
    b: Shaped[np.ndarray, "L wide width"], parts: int, rank: int
) -> Shaped[np.ndarray, "P P L rank out"]:
    """B cut along both axes: the block of each A, for each map."""
    grid = b.reshape(len(b), parts, rank, parts, -1)
    return np.moveaxis(grid, (1, 3), (0, 1))


def pad(pair: Pair, rank: int) -> Pair:
    """The adapter at a higher rank, with zeros: its product is the same."""
    a, b = pair["lora_a"], pair["lora_b"]
    more = rank - a.shape[-1]
    if not more:
        return pair
    return pair | {
        "lora_a": np.pad(a, ((0, 0), (0, 0), (0, more))),
        "lora_b": np.pad(b, ((0, 0), (0, more), (0, 0))),
    }
