"""GemFilter: an early layer picks the prompt's tokens, and the model reads only those.

Paper    Shi et al., Discovering the Gems in Early Layers: Accelerating Long-Context
         LLMs with 1000x Input Token Reduction, 2024, arXiv:2409.17422. Official code:
         SalesforceAIResearch/GemFilter.
Idea     What the prompt's last token attends in an early layer already tells which
         tokens matter. Run the layers below it, keep no cache, take the best tokens in
         their order, and start again with those as the prompt. It shortens a prompt
         for whatever comes then: any cache policy, any way to decode.
Memory   The first pass needs the embedding, `layer` blocks, the next one's norm, q and
         k, and the activations of one block: nothing grows with the model's depth. For
         131,072 tokens of Llama-3.1-8B that is 10.8 GB on an H200, with the decoder's
         chunk=4096. The cache is that of a prompt of `tokens` tokens.
Differs  The official code computes all of the filter layer and the head for nothing,
         keeps all weights on the device, and takes one prompt at a time. The paper's
         neighbours, keeping the first pass's keys and values (FastKV) and filtering
         again for a later turn, are not here: a later turn starts from its whole text.
See      tests/kvcache/test_gemfilter.py

    generate(model, params, prompts, max_new_tokens=64, shorten=GemFilter(layer=13))

The same with the upper layers in host memory while a prompt is filtered:

    weights = StagedWeights(params, gem)                       # takes params over
    with weights.filtered(model, prompts) as (params, short):
        generate(model, params, short.prompts(), max_new_tokens=64)
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jmem.kvcache.cache import prefill_attend
from jmem.kvcache.scores import column_mass, pool
from jmem.kvcache.select import select
from jmem.nn.chunk import by_chunks
from jmem.nn.norm import normalise
from jmem.nn.ops import Attend
from jmem.nn.stack import depth, run_stack
from jmem.offload import (
    check_host,
    fetch,
    fetch_row,
    is_on_host,
    on_device,
    on_host,
    store_row,
)
from jmem.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemFilter:
    """The official code's setting, for Llama-3.1-8B; hashable, so it is compiled in."""

    layer: int = 13
    """Whose attention chooses, counted from 0. 13 for Llama-3.1-8B, 19 for Mistral-Nemo
    and Phi-3.5-mini (the code); `calibrate_filter_layer` looks for another model's."""
    tokens: int = 1024
    """Kept of a prompt; a shorter one stays whole."""
    kernel: int = 5
    """Neighbouring tokens whose scores are averaged; odd."""
    edge: Literal["zeros", "renormalize"] = "zeros"
    """Beyond both ends of a prompt lie scores of zero (the code), or nothing."""
    keep_first: int = 0
    """Leading tokens that are always kept."""
    keep_last: int = 0
    """Final tokens that are always kept, such as the question; the code may drop it."""
    queries: int = 1
    """Final tokens that vote. A token's score is the mean vote of those that see it
    (raw), or the attention all of them pay it (probability)."""
    score: Literal["raw", "probability"] = "raw"
    """What a vote is: the inner products of query and key summed over heads (the code),
    or the attention weights. A head of large products outvotes the others in raw."""
    window: int = 1
    """Consecutive tokens kept or dropped together, by the mean of their scores."""

    def __post_init__(self):
        for field in ("tokens", "kernel", "queries", "window"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"GemFilter: {field}={getattr(self, field)} must be at least 1."
                )
        for field in ("layer", "keep_first", "keep_last"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"GemFilter: {field}={getattr(self, field)} must not be negative."
                )
        if self.kernel % 2 == 0:
            raise ValueError(
                f"GemFilter: kernel={self.kernel} must be odd, so that a token lies in "
                "the middle of its neighbours."
            )
        choices = {"edge": ("zeros", "renormalize"), "score": ("raw", "probability")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"GemFilter: {field}={getattr(self, field)!r} is not one of "
                    f"{', '.join(allowed)}."
                )
        if self.tokens % self.window:
            raise ValueError(
                f"GemFilter: tokens={self.tokens} must be a multiple of window="
                f"{self.window}, as whole windows are kept."
            )
        forced = -(-self.keep_first // self.window)
        if self.keep_last:  # they may begin anywhere in a window
            forced += (self.keep_last + self.window - 2) // self.window + 1
        if forced * self.window > self.tokens:
            raise ValueError(
                f"GemFilter: keep_first={self.keep_first} and keep_last="
                f"{self.keep_last} can take {forced * self.window} tokens in whole "
                f"windows of {self.window}, more than tokens={self.tokens}. Raise "
                "tokens, or keep fewer."
            )


# Weights of the two passes ------------------------------------------------------------


def split(params: dict, layer: int) -> tuple[dict, dict]:
    """`params` as what the filter pass of `layer` reads, and all the rest.

    Both are trees like `params`, with fewer rows in a stack: early holds the embedding,
    `layer` whole blocks, and row `layer` of attention norm, q and k. NumPy arrays are
    cut without a copy; arrays on a device are copied once.

    Raises:
      ValueError: there is no such layer.
    """
    rows = _early_rows(params, layer)
    early = jax.tree.map(lambda leaf, n: leaf[:n], params["blocks"], rows)
    late = jax.tree.map(lambda leaf, n: leaf[n:], params["blocks"], rows)
    return {"embed": params["embed"], "blocks": early}, {"blocks": late} | _rest(params)


def _early_rows(params: dict, layer: int) -> dict:
    """Of each stack, how many rows the filter pass reads."""
    layers = depth(params["blocks"])
    if not 0 <= layer < layers:
        raise ValueError(f"split: layer={layer} is not one of the {layers} in params.")

    def rows(path, _) -> int:
        part, name = path[0].key, path[1].key
        voting = part == "attention_norm" or (part == "attention" and name in "qk")
        return layer + voting

    return jax.tree.map_with_path(rows, params["blocks"])


def _rest(params: dict) -> dict:
    """What is in no stack, but the embedding."""
    return {name: params[name] for name in params.keys() - {"embed", "blocks"}}


class StagedWeights:
    """Weights of which only the early part is on the device while a prompt is filtered.

    The late part lies in pinned host memory, always; for an answer it is copied to the
    device, and dropped there afterwards. The copy begins when the filter pass is done:
    during it both would be on the device, which is what this is to avoid.

    Memory: the filter pass beside the early part, or what answers beside all weights,
    whichever is more. On the way from one to the other a leaf is copied at a time, the
    largest first, and what is in no stack comes last, so that the device holds at most
    the whole weights and one leaf's early rows. For Llama-3.1-8B at layer 13 that is
    never more than the whole weights. The host holds the late part.
    """

    def __init__(self, params: dict, gem: GemFilter):
        """Takes `params` over, a leaf at a time: JAX arrays that are cut are deleted.

        They may be on the device or the host, or NumPy arrays, which stay as they are.

        Raises:
          ValueError: `params` have no layer `gem.layer`.
          HostMemoryError: the late part does not fit the host; nothing has been moved.
        """
        self.gem = gem
        self._rows = jax.tree.leaves(_early_rows(params, gem.layer))
        blocks, self._structure = jax.tree.flatten(params["blocks"])
        late_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(_rest(params)))
        for leaf, rows in zip(blocks, self._rows, strict=True):
            late_bytes += leaf.nbytes // len(leaf) * (len(leaf) - rows)
        check_host(late_bytes, "StagedWeights")
        self._embed = on_device(params["embed"])
        rest = on_host(_rest(params))
        jax.block_until_ready(rest)
        for leaf in jax.tree.leaves(_rest(params)):
            if isinstance(leaf, jax.Array) and not is_on_host(leaf):
                leaf.delete()
        late = []
        self._blocks: list[jax.Array] = []
        for leaf, rows in zip(blocks, self._rows, strict=True):
            self._blocks.append(on_device(_plain(leaf)[:rows]))
            late.append(on_host(_plain(leaf)[rows:]))
            jax.block_until_ready((self._blocks[-1], late[-1]))
            if isinstance(leaf, jax.Array) and len(late[-1]):
                leaf.delete()
        self.late = {"blocks": jax.tree.unflatten(self._structure, late)} | rest
        """All but the early part, in pinned host memory."""

    @property
    def early(self) -> dict:
        """What the filter pass reads, on the device; also the weights, while whole."""
        blocks = jax.tree.unflatten(self._structure, self._blocks)
        return {"embed": self._embed, "blocks": blocks}

    @contextlib.contextmanager
    def filtered(
        self, model, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[dict, "Shortened"]]:
        """All weights, on the device, and the prompts that they are to answer.

        Behind the `with` the stacks and the head of those weights are deleted, and the
        early part is what it was, also if an error was raised.

        Raises:
          ValueError: no prompts, or what `shorten` refuses; nothing has been copied.
        """
        if not prompts:
            raise ValueError(
                "StagedWeights: prompts is empty; give at least one list of token ids."
            )
        short = shorten(model, self.early, self.gem, *_padded(prompts))
        rest = {}
        try:
            self._join()
            rest = on_device(_rest(self.late))
            yield self.early | rest, short
        finally:
            for leaf in jax.tree.leaves(rest):
                leaf.delete()
            self._part()

    def _join(self) -> None:
        late = jax.tree.leaves(self.late["blocks"])
        for at in self._by_size()[::-1]:
            if len(late[at]):
                self._replace(at, _joined(self._blocks[at], late[at]))

    def _part(self) -> None:
        for at in self._by_size():
            if len(self._blocks[at]) > self._rows[at]:
                self._replace(at, _first(self._blocks[at], self._rows[at]))

    def _by_size(self) -> list[int]:
        """Places of the leaves, that of the smallest row first."""

        def row_bytes(at: int) -> int:
            leaf = self._blocks[at]
            return math.prod(leaf.shape[1:]) * leaf.dtype.itemsize

        return sorted(range(len(self._blocks)), key=row_bytes)

    def _replace(self, at: int, leaf: jax.Array) -> None:
        jax.block_until_ready(leaf)
        self._blocks[at].delete()
        self._blocks[at] = leaf


def _plain(leaf: Any) -> Any:
    """A leaf that can be cut: what is on the host is cut there, by NumPy."""
    return np.asarray(leaf) if is_on_host(leaf) else leaf


@jax.jit
def _joined(early: Shaped[Array, "R ..."], late: Shaped[Array, "S ..."]) -> jax.Array:
    """Rows on the device and rows on the host as one stack on the device.

    A row at a time into the result: joined at once, XLA would hold `late` as well.
    """
    shape = (len(early) + len(late), *early.shape[1:])
    start = (0,) * early.ndim
    whole = jnp.zeros(shape, early.dtype)
    whole = jax.lax.dynamic_update_slice(whole, early, start)

    def turn(row, whole):
        return store_row(whole, len(early) + row, fetch_row(late, row))

    return jax.lax.fori_loop(0, len(late), turn, whole)


@functools.partial(jax.jit, static_argnames="rows")
def _first(whole: Shaped[Array, "L ..."], rows: int) -> jax.Array:
    return whole[:rows]


# The first pass -----------------------------------------------------------------------


def filter_pass(
    model,
    params: dict,
    gem: GemFilter,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[Int[Array, "B N"], Float[Array, "B T"]]:
    """Positions to keep, ascending, -1 behind the last, and every token's score.

    N is the smaller of `gem.tokens` and T. Rows are padded on the right to T tokens;
    each gets what it would get alone. Scores are float32, and -inf for padding.
    `params` are the model's, or the early part of `split`. A model with a sliding
    window has it below the filter layer, while the votes there reach all tokens.

    Raises:
      ValueError: the model has no such layer, or `params` are cut below it.
    """
    scores = token_scores(gem, *votes(model, params, gem, tokens, lengths), lengths)
    return best(gem, scores, lengths), scores


class Votes(NamedTuple):
    """What scores are made of, in the filter layer; queries and keys are rotated."""

    queries: Float[Array, "B W H D"]
    """Of a prompt's last W tokens."""
    at: Int[Array, "B W"]
    """Their positions; negative where there is none."""
    keys: Float[Array, "B T K D"]
    """Of all tokens."""


def votes(
    model,
    params: dict,
    gem: GemFilter,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Votes:
    """The layers of `filter_pass`, which read `gem.layer` and `gem.queries` only.

    Filters that share both can choose by the same votes (`token_scores`, `best`).
    Memory and refusals are those of `filter_pass`.
    """
    _check_layer(model, params, gem)
    positions = _positions(tokens)
    ops = model.ops._replace(attend=_attend(model, lengths))
    blocks = params["blocks"]

    def below(layer, x):
        # By row, as a slice of a stack would be a copy of it.
        row = fetch_row(blocks, layer)
        return model.block(row, x, positions, layer, ops, ())[0]

    x = model.embed(params, tokens, positions)
    if gem.layer:
        x = jax.lax.fori_loop(0, gem.layer, below, x)
    voting = {name: blocks["attention"][name] for name in ("q", "k")}
    norm, voting = fetch(
        jax.tree.map(lambda leaf: leaf[gem.layer], (blocks["attention_norm"], voting))
    )
    config = model.config
    x = normalise(config.norm, norm, x, config.rms_eps)
    at = _voters(gem, tokens, lengths)

    def projected(name, x, heads, positions):
        y = ops.linear(name, voting[name], x)
        y = y.reshape(*x.shape[:2], heads, config.head_dim)
        return by_chunks(config.rope, y, positions, size=model.chunk)

    keys = projected("k", x, config.kv_heads, positions)
    seats = jnp.maximum(at, 0)
    last = jnp.take_along_axis(x, seats[:, :, None], axis=1)
    return Votes(projected("q", last, config.heads, seats), at, keys)


def token_scores(
    gem: GemFilter,
    queries: Float[Array, "B W H D"],
    at: Int[Array, "B W"],
    keys: Float[Array, "B T K D"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B T"]:
    """What queries at positions `at` say of each key, averaged with its neighbours.

    All rotated; a query at a negative position is none. Float32, -inf for padding.
    """
    tokens = jnp.arange(keys.shape[1], dtype=jnp.int32)
    there = tokens[None] < lengths[:, None]
    if gem.score == "probability":
        votes = column_mass(queries, at, keys).sum(axis=1)
    else:
        # Query heads that share a key head are summed first: H / K times less to do.
        grouped = queries.reshape(*at.shape, keys.shape[2], -1, keys.shape[3])
        summed = grouped.astype(jnp.float32).sum(axis=3)
        raw = jnp.einsum("bwkd,btkd->bwt", summed, keys.astype(jnp.float32))
        seen = tokens[None, None] <= at[:, :, None]
        votes = jnp.where(seen, raw, 0.0).sum(axis=1)
        votes /= jnp.maximum(seen.sum(axis=1), 1).astype(jnp.float32)
    # No query sees padding, whose votes are the zeros that lie beyond the end.
    pooled = pool(votes[:, None], gem.kernel, "average")
    if gem.edge == "renormalize":
        share = pool(there[:, None].astype(jnp.float32), gem.kernel, "average")
        pooled /= jnp.maximum(share, 1 / gem.kernel)
    return jnp.where(there, pooled[:, 0], -jnp.inf)


def best(
    gem: GemFilter, scores: Float[Array, "B T"], lengths: Int[Array, " B"]
) -> Int[Array, "B N"]:
    """Positions of the tokens to keep, as `filter_pass` gives them."""
    batch, length = scores.shape
    tokens = jnp.arange(length, dtype=jnp.int32)[None]
    lengths = lengths[:, None]
    kept = (tokens < gem.keep_first) | (tokens >= lengths - gem.keep_last)
    scores = jnp.where(kept & (tokens < lengths), jnp.inf, scores)
    short = ((0, 0), (0, -length % gem.window))
    scores = jnp.pad(scores, short, constant_values=-jnp.inf)
    scores = scores.reshape(batch, -1, gem.window)
    there = scores > -jnp.inf
    count = there.sum(axis=-1)
    mean = jnp.where(there, scores, 0.0).sum(axis=-1)
    mean /= jnp.maximum(count, 1).astype(jnp.float32)
    mean = jnp.where(count > 0, mean, -jnp.inf)
    size = min(gem.tokens // gem.window, mean.shape[1])
    windows = select(mean[:, None], jnp.int32(size), size)[:, 0, :, None]
    within = jnp.arange(gem.window, dtype=jnp.int32)[None, None]
    positions = windows * gem.window + within
    there = (windows >= 0) & (positions < lengths[..., None])
    positions = jnp.where(there, positions, -1).reshape(batch, -1)
    return positions[:, : min(gem.tokens, length)]


def _positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    row = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(row[None], tokens.shape)


def _attend(model, lengths: Int[Array, " B"]) -> Attend:
    """Of a prompt that enters no cache."""
    window = model.config.sliding_window
    return prefill_attend((), lengths, model.attention, window, model.chunk)


def _voters(gem: GemFilter, tokens, lengths) -> Int[Array, "B W"]:
    """Positions of each row's last tokens; negative where there is none."""
    width = min(gem.queries, tokens.shape[1])
    return lengths[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]


def _check_layer(model, params: dict, gem: GemFilter) -> None:
    layers, blocks = model.config.layers, params["blocks"]
    if gem.layer >= layers:
        raise ValueError(
            f"GemFilter: layer={gem.layer} is not below the model's {layers} layers; "
            "calibrate_filter_layer says which one finds what matters."
        )
    whole, voting = depth(blocks["mlp"]), depth(blocks["attention_norm"])
    if whole < gem.layer or voting <= gem.layer:
        raise ValueError(
            f"GemFilter: layer={gem.layer} needs that many blocks and the next one's q "
            f"and k, but params hold {whole} and {voting} of those. They were split "
            "for another filter; split again, by this layer."
        )


# Prompts ------------------------------------------------------------------------------


class Shortened(NamedTuple):
    """Prompts cut to their best tokens, and where those come from."""

    tokens: Int[Array, "B N"]
    """Kept tokens, in the prompt's order; 0 behind the last."""
    lengths: Int[Array, " B"]
    """How many tokens each row keeps."""
    positions: Int[Array, "B N"]
    """Where they were in the prompt; -1 behind the last."""
    scores: Float[Array, "B T"]
    """Of every token of the prompt; -inf for padding."""

    def prompts(self) -> list[list[int]]:
        """The kept tokens of each row, without padding."""
        rows = zip(np.asarray(self.tokens).tolist(), np.asarray(self.lengths))
        return [row[:length] for row, length in rows]


@functools.partial(jax.jit, static_argnames=("model", "gem"))
def _shorten(model, params: dict, gem: GemFilter, tokens, lengths) -> Shortened:
    positions, scores = filter_pass(model, params, gem, tokens, lengths)
    kept = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    kept = jnp.where(positions >= 0, kept, 0)
    return Shortened(kept, (positions >= 0).sum(axis=1), positions, scores)


def shorten(
    model,
    params: dict,
    gem: GemFilter,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Shortened:
    """`filter_pass` as one compiled program, and the tokens it keeps.

    Waits for the result, to look at it.

    Raises:
      ValueError: an empty row, one longer than T or than the model's positions, a token
        outside the vocabulary, a layer that the model or `params` lack, or scores that
        are no numbers.
    """
    length, limit = tokens.shape[1], model.config.max_positions
    if length > limit:
        raise ValueError(
            f"shorten: {length} tokens a row exceed the model's max_positions={limit}."
        )
    own = np.asarray(lengths)
    if own.min() < 1 or own.max() > length:
        raise ValueError(
            f"shorten: lengths={own.tolist()} must lie in [1, {length}], the width of "
            "tokens; an empty prompt has no last token to choose by."
        )
    words, size = np.asarray(tokens), model.config.vocab_size
    strange = np.argwhere((words < 0) | (words >= size))
    if len(strange):
        row, place = strange[0].tolist()
        raise ValueError(
            f"shorten: token {words[row, place]} at place {place} of row {row} is "
            f"outside [0, {size}); was it made with another model's tokenizer?"
        )
    short = _shorten(model, params, gem, tokens, lengths)
    _check_finite(gem, short.scores, own)
    return short


def _padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompts as rows of one length, and how long each is."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _check_finite(gem: GemFilter, scores: jax.Array, lengths: np.ndarray) -> None:
    there = np.arange(scores.shape[1])[None] < lengths[:, None]
    broken = np.argwhere(there & ~np.isfinite(np.asarray(scores)))
    if len(broken):
        row, token = broken[0].tolist()
        raise ValueError(
            f"shorten: the scores of layer {gem.layer} are not finite, first that of "
            f"token {token} in row {row}. A weight or activation up to that layer is "
            "infinite or no number."
        )


def filter_program(
    model, gem: GemFilter, *, prompt: int, batch_size: int = 1
) -> Program:
    """The filter pass over `prompt` tokens a row, given only the weights it reads."""
    config = dataclasses.replace(model.config, layers=gem.layer + 1)
    shallow = dataclasses.replace(model, config=config)

    def make(key):
        early, _ = split(shallow.init(key), gem.layer)
        shape = (batch_size, prompt)
        tokens = jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32)
        return early, tokens, jnp.full((batch_size,), prompt, jnp.int32)

    def filtered(params, tokens, lengths):
        return filter_pass(model, params, gem, tokens, lengths)

    args = jax.eval_shape(make, jax.random.key(0))
    _check_layer(model, args[0], gem)
    labels = {"weights": (0, ""), "batch": [(1, ""), (2, "")]}
    return Program(filtered, args, labels=labels, make=make)


# Which layer, and what it kept --------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "gems"))
def _recall(model, params: dict, gems: tuple[GemFilter, ...], tokens, lengths, spans):
    positions, plain = _positions(tokens), _attend(model, lengths)

    def share(gem, q, k, rope):
        at = _voters(gem, tokens, lengths)
        seats = jnp.maximum(at, 0)
        last = jnp.take_along_axis(q, seats[:, :, None, None], axis=1)
        scores = token_scores(gem, rope(last, seats), at, k, lengths)
        kept = best(gem, scores, lengths)
        hits = ((kept >= spans[:, :1]) & (kept < spans[:, 1:])).sum(axis=1)
        return hits / (spans[:, 1] - spans[:, 0])

    def attend(q, k, v, rope, positions, layer, recall):
        rotated = rope(k, positions)
        shares = jnp.stack([share(gem, q, rotated, rope) for gem in gems])
        out, _ = plain(q, k, v, rope, positions, layer, ())
        return out, recall.at[:, layer].set(shares)

    x = model.embed(params, tokens, positions)
    shape = (len(gems), model.config.layers, len(tokens))
    recall, ops = jnp.zeros(shape, jnp.float32), model.ops._replace(attend=attend)
    _, recall, _ = run_stack(model.block, params["blocks"], x, positions, ops, recall)
    return recall.mean(axis=2)


def layer_recall(
    model,
    params: dict,
    gems: Sequence[GemFilter],
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
        raise ValueError("layer_recall: gems is empty; give at least one filter.")
    if not prompts or len(prompts) != len(spans):
        raise ValueError(
            f"layer_recall: {len(prompts)} prompts and {len(spans)} spans; need one "
            "span for each prompt, and at least one."
        )
    for index, (prompt, (begin, end)) in enumerate(zip(prompts, spans)):
        if not 0 <= begin < end <= len(prompt):
            raise ValueError(
                f"layer_recall: spans[{index}]={(begin, end)} is empty or not within "
                f"its prompt of {len(prompt)} tokens."
            )
    found = jnp.asarray(np.asarray(spans, np.int32))
    return np.asarray(_recall(model, params, tuple(gems), *_padded(prompts), found))


def calibrate_filter_layer(
    model,
    params: dict,
    gem: GemFilter,
    prompts: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
) -> Float[np.ndarray, " L"]:
    """`layer_recall` of one filter: the paper takes the first layer that finds it all.

    For needles, say, which lie at positions `spans[i]` = (begin, end) of `prompts[i]`.
    """
    return layer_recall(model, params, (gem,), prompts, spans)[0]


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
