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
See      `GemFilter.choose` is the idea; `staged` has the weights of two passes, `study`
         which layer to choose and what was kept. tests/kvcache/test_gemfilter.py

    generate(model, params, prompts, max_new_tokens=64, shorten=GemFilter(layer=13))

The same with the upper layers in host memory while a prompt is filtered:

    weights = StagedWeights(params, gem)                       # takes params over
    with weights.filter_prompts(model, prompts) as (params, short):
        generate(model, params, short.prompts(), max_new_tokens=64)
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmem.kvcache.gemfilter.staged import StagedWeights, split
from jmem.kvcache.gemfilter.study import (
    calibrate_filter_layer,
    explain,
    measure_layer_recall,
)
from jmem.kvcache.method import Read
from jmem.kvcache.prefill import read_prompts
from jmem.kvcache.scores import average_windows, column_mass, pool
from jmem.kvcache.seen import find_last_places, take_last_queries
from jmem.kvcache.select import select
from jmem.kvcache.settings import check_settings
from jmem.kvcache.shorten import Shorten
from jmem.models.next_token import token_positions
from jmem.nn.chunk import apply_by_chunks
from jmem.nn.joined import split_maps
from jmem.nn.norm import normalise
from jmem.nn.stack import depth
from jmem.offload import fetch, fetch_row

__all__ = [
    "GemFilter",
    "StagedWeights",
    "Votes",
    "calibrate_filter_layer",
    "choose_best",
    "collect_votes",
    "explain",
    "measure_layer_recall",
    "score_tokens",
    "split",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemFilter(Shorten):
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
        check_settings(
            self,
            positive=("tokens", "queries", "window"),
            not_negative=("layer", "keep_first", "keep_last"),
            odd=["kernel"],
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

    def choose(
        self, model, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Int[Array, "B N"], Float[Array, "B T"]]:
        """Positions to keep, ascending, -1 behind the last, and every token's score.

        `params` are the model's, or the early part of `split`. A model with a sliding
        window has it below the filter layer, while the votes there reach all tokens.

        Raises:
          ValueError: the model has no such layer, or `params` are cut below it.
        """
        # The layers below, and of the filter layer no more than its queries and keys.
        queries, at, keys = collect_votes(model, params, self, tokens, lengths)
        # How well each key fits the last queries, in all heads and with its neighbours.
        scores = score_tokens(self, queries, at, keys, lengths)
        return choose_best(self, scores, lengths), scores

    def choose_in(self, read: Read) -> Int[Array, "B N"]:
        """The positions that it would keep, were the layer that reads its own."""
        queries, at = take_last_queries(read.queries, read.lengths, self.queries)
        scores = score_tokens(self, queries, at, read.keys, read.lengths)
        return choose_best(self, scores, read.lengths)

    def follow(self, read: Read, chosen: Int[Array, "B N"]) -> Int[Array, "B N"]:
        mine = read.layer == self.layer
        return jax.lax.cond(mine, lambda: self.choose_in(read), lambda: chosen)

    def resize(self, capacity: int) -> "GemFilter":
        """The same that keeps the whole windows of `capacity` tokens."""
        return dataclasses.replace(self, tokens=capacity // self.window * self.window)

    def init_params(self, model, key: jax.Array) -> dict:
        config = dataclasses.replace(model.config, layers=self.layer + 1)
        shallow = dataclasses.replace(model, config=config)
        return split(shallow.init(key), self.layer)[0]

    def check(self, model) -> None:
        if self.layer >= model.config.layers:
            raise ValueError(
                f"GemFilter: layer={self.layer} is not below the model's "
                f"{model.config.layers} layers; calibrate_filter_layer says which one "
                "finds what matters."
            )

    @property
    def basis(self) -> str:
        return f"layer {self.layer}"


# The first pass -----------------------------------------------------------------------


class Votes(NamedTuple):
    """What scores are made of, in the filter layer; queries and keys are rotated."""

    queries: Float[Array, "B W H D"]
    """Of a prompt's last W tokens."""
    at: Int[Array, "B W"]
    """Their positions; negative where there is none."""
    keys: Float[Array, "B T K D"]
    """Of all tokens."""


def collect_votes(
    model,
    params: dict,
    gem: GemFilter,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Votes:
    """What `gem.layer`'s last `gem.queries` queries vote by; reads nothing else of gem.

    Filters that share both can choose by the same votes (`score_tokens`,
    `choose_best`). Arguments and refusals are those of `GemFilter.choose`.
    """
    gem.check(model)
    _check_split(params, gem)
    positions = token_positions(tokens)
    ops = model.ops._replace(attend=read_prompts(model, (), lengths))
    blocks = params["blocks"]

    def below(layer, x):
        # By row, as a slice of a stack would be a copy of it.
        row = fetch_row(blocks, layer)
        return model.block(row, x, positions, layer, ops, ())[0]

    x = model.embed(params, tokens, positions)
    if gem.layer:
        x = jax.lax.fori_loop(0, gem.layer, below, x)
    apart = split_maps({"attention": blocks["attention"]}, model.config)
    voting = {name: apart["attention"][name] for name in ("q", "k")}
    norm, voting = fetch(
        jax.tree.map(lambda leaf: leaf[gem.layer], (blocks["attention_norm"], voting))
    )
    config = model.config
    x = normalise(config.norm, norm, x, config.rms_eps)
    at = find_last_places(lengths, min(gem.queries, tokens.shape[1]))

    def projected(name, x, heads, positions):
        y = ops.linear(f"attention/{name}", voting[name], x)
        y = y.reshape(*x.shape[:2], heads, config.head_dim)
        return apply_by_chunks(config.rope, y, positions, size=model.chunk)

    keys = projected("k", x, config.kv_heads, positions)
    rows = jnp.maximum(at, 0)
    last = jnp.take_along_axis(x, rows[:, :, None], axis=1)
    return Votes(projected("q", last, config.heads, rows), at, keys)


def score_tokens(
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


def choose_best(
    gem: GemFilter, scores: Float[Array, "B T"], lengths: Int[Array, " B"]
) -> Int[Array, "B N"]:
    """Positions of the tokens to keep, as `GemFilter.choose` gives them."""
    batch, length = scores.shape
    tokens = jnp.arange(length, dtype=jnp.int32)[None]
    lengths = lengths[:, None]
    kept = (tokens < gem.keep_first) | (tokens >= lengths - gem.keep_last)
    scores = jnp.where(kept & (tokens < lengths), jnp.inf, scores)
    mean = average_windows(scores, gem.window)
    size = min(gem.tokens // gem.window, mean.shape[1])
    windows = select(mean[:, None], jnp.int32(size), size)[:, 0, :, None]
    within = jnp.arange(gem.window, dtype=jnp.int32)[None, None]
    positions = windows * gem.window + within
    there = (windows >= 0) & (positions < lengths[..., None])
    positions = jnp.where(there, positions, -1).reshape(batch, -1)
    return positions[:, : min(gem.tokens, length)]


def _check_split(params: dict, gem: GemFilter) -> None:
    blocks = params["blocks"]
    whole, voting = depth(blocks["mlp"]), depth(blocks["attention_norm"])
    if whole < gem.layer or voting <= gem.layer:
        raise ValueError(
            f"GemFilter: layer={gem.layer} needs that many blocks and the next one's q "
            f"and k, but params hold {whole} and {voting} of those. They were split "
            "for another filter; split again, by this layer."
        )
