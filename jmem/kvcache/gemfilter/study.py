"""Which layer finds what matters, and what a filter kept of a prompt."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.kvcache.prefill import read_prompts
from jmem.kvcache.shorten import pad_rows
from jmem.models.next_token import token_positions
from jmem.nn.stack import run_stack

if TYPE_CHECKING:
    from jmem.kvcache.gemfilter import GemFilter

FOUND = 0.95
"""Mean recall from which on a layer counts as one that finds what is asked for."""


def measure_layer_recall(
    model,
    params: dict,
    gems: "Sequence[GemFilter]",
    prompts: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
) -> Float[np.ndarray, "N L"]:
    """Share of a labelled span that each filter would keep, were it in each layer.

    One forward pass over all layers; the filters' own `layer` is not read. The spans
    are positions (begin, end) in the prompts; the mean over these, float32.

    Raises:
      ValueError: no filter, not one span a prompt, or one that is empty or beyond its
        prompt.
    """
    if not gems:
        raise ValueError(
            "measure_layer_recall: gems is empty; give at least one filter."
        )
    if not prompts or len(prompts) != len(spans):
        raise ValueError(
            f"measure_layer_recall: {len(prompts)} prompts and {len(spans)} spans; "
            "need one span for each prompt, and at least one."
        )
    for index, (prompt, (begin, end)) in enumerate(zip(prompts, spans)):
        if not 0 <= begin < end <= len(prompt):
            raise ValueError(
                f"measure_layer_recall: spans[{index}]={(begin, end)} is empty or not "
                f"within its prompt of {len(prompt)} tokens."
            )
    found = jnp.asarray(np.asarray(spans, np.int32))
    return np.asarray(
        _measure_recall(model, params, tuple(gems), *pad_rows(prompts), found)
    )


def calibrate_filter_layer(
    model,
    params: dict,
    gem: "GemFilter",
    prompts: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
) -> Float[np.ndarray, " L"]:
    """`measure_layer_recall` of one filter: the paper takes the first layer that finds
    it all.

    For needles, say, which lie at positions `spans[i]` = (begin, end) of `prompts[i]`.
    """
    return measure_layer_recall(model, params, (gem,), prompts, spans)[0]


def choose_layer(recall: Float[np.ndarray, " L"]) -> int:
    """The first layer of recall `FOUND` or more; else the first of the best layers.

    `recall` is a row of `measure_layer_recall`.

    >>> found = np.array([0.1, 0.97, 1.0]), np.array([0.1, 0.6, 0.5])
    >>> choose_layer(found[0]), choose_layer(found[1])
    (1, 1)
    """
    return int(np.argmax(recall >= min(FOUND, recall.max())))


def explain(
    prompt: Sequence[int],
    positions: Int[Array, " N"],
    scores: Float[Array, " T"],
    tokenizer: Any,
) -> str:
    """What was kept of one prompt, as text: a line a span of consecutive tokens.

    Each with its positions and mean score, and between them how much is left out.
    `positions` and `scores` are a row of `Shortened`; `tokenizer` has `decode(ids,
    skip_special_tokens=False)`.
    """
    kept = np.asarray(positions)
    kept = kept[kept >= 0]
    spans = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
    lines = [f"{len(kept):,} of {len(prompt):,} tokens, in {len(spans):,} spans"]
    ends = [0, *(int(span[-1]) + 1 for span in spans)]
    begins = [*(int(span[0]) for span in spans), len(prompt)]
    for index, begin in enumerate(begins):
        if gap := begin - ends[index]:
            lines.append(f"    ... {gap:,} left out")
        if index < len(spans):
            end = ends[index + 1]
            mean = float(np.asarray(scores)[begin:end].mean())
            text = tokenizer.decode(list(prompt[begin:end]), skip_special_tokens=False)
            lines.append(f"{begin:,} to {end - 1:,}  score {mean:.4g}  {text!r}")
    return "\n".join(lines)


@functools.partial(jax.jit, static_argnames=("model", "gems"))
def _measure_recall(
    model, params: dict, gems: "tuple[GemFilter, ...]", tokens, lengths, spans
) -> Float[Array, "N L"]:
    def keep(read, recall):
        shares = []
        for gem in gems:
            kept = gem.choose_in(read)
            hits = ((kept >= spans[:, :1]) & (kept < spans[:, 1:])).sum(axis=1)
            shares.append(hits / (spans[:, 1] - spans[:, 0]))
        return recall.at[:, read.layer].set(jnp.stack(shares))

    positions = token_positions(tokens)
    ops = model.ops._replace(attend=read_prompts(model, (), lengths, (keep,)))
    recall = jnp.zeros((len(gems), model.config.layers, len(tokens)), jnp.float32)
    x = model.embed(params, tokens, positions)
    given = model.block, params["blocks"], x, positions, ops, (recall,)
    _, (recall,), _ = run_stack(*given)
    return recall.mean(axis=2)
