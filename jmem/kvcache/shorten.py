"""What cuts a prompt before it is read: the tokens that stay, in their order.

    short = GemFilter(layer=13).shorten(model, params, tokens, lengths)
    generate(model, params, prompts, max_new_tokens=64, shorten=GemFilter(layer=13))

A member chooses by itself, reading no more of the model than it needs (`choose`), or in
a pass that others share (`follow`): then a prompt is read once for any number of them
and of caches (`jmem.generate.reading.prefill_for_all`).
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmem.kvcache.full import Full
from jmem.kvcache.method import Read
from jmem.kvcache.plan import Plan, Sizes
from jmem.program import Program


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


class Shorten(abc.ABC):
    """Which tokens of a prompt the model reads; hashable, so it is compiled in.

    A member is a frozen dataclass with a field `tokens` and two ways to choose, which
    give the same: N is the smaller of `tokens` and T, positions ascend, and are -1
    behind the last. Rows are padded on the right to T tokens, each gets what it would
    get alone, and a row of no more than `tokens` stays whole.
    """

    tokens: int
    """The most that it keeps of a prompt."""

    @abc.abstractmethod
    def choose(
        self, model, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Int[Array, "B N"], Float[Array, "B T"]]:
        """Positions to keep, and every token's score, by a pass of the member's own.

        Scores are float32, finite but for padding, whose are -inf.
        """

    @abc.abstractmethod
    def follow(self, read: Read, chosen: Int[Array, "B N"]) -> Int[Array, "B N"]:
        """The positions to keep once one more layer has read the prompts.

        Asked in every layer, with -1 everywhere before the first.
        """

    def check(self, model) -> None:
        """Refuses a model that it cannot choose by.

        Raises:
          ValueError: names what the model lacks.
        """
        del model

    @property
    def basis(self) -> str:
        """What made the scores, as an error message names it."""
        return type(self).__name__

    # As a method among others that are compared (`jmem.kvcache.budget`).

    @property
    def filter(self) -> "Shorten":
        """What shortens a prompt before it is read."""
        return self

    @property
    def capacity(self) -> int:
        """Tokens kept, by the name that caches have for it."""
        return self.tokens

    def resize(self, capacity: int) -> Any:
        """The same that keeps at most `capacity` tokens."""
        return dataclasses.replace(self, **{"tokens": capacity})  # pyright: ignore

    def plan(self, model, **sizes: Unpack[Sizes]) -> Plan:
        """A full cache of what it leaves of a prompt; else as `CacheMethod.plan`."""
        sizes["prompt"] = min(sizes["prompt"], self.tokens)
        return Full().plan(model, **sizes)

    def init_params(self, model, key: jax.Array) -> dict:
        """Random weights for `choose`; those that it does not read may be left out."""
        return model.init(key)

    def program(self, model, *, prompt: int, batch_size: int = 1) -> Program:
        """`choose` over prompts of that length, to be measured.

        It is given the weights of `init_params`.
        """

        def make(key):
            shape = (batch_size, prompt)
            tokens = jax.random.randint(key, shape, 0, model.config.vocab_size)
            lengths = jnp.full((batch_size,), prompt, jnp.int32)
            return self.init_params(model, key), tokens, lengths

        def filtered(params, tokens, lengths):
            return self.choose(model, params, tokens, lengths)

        self.check(model)
        labels = {"weights": (0, ""), "batch": [(1, ""), (2, "")]}
        args = jax.eval_shape(make, jax.random.key(0))
        return Program(filtered, args, labels=labels, make=make)

    def begin(self, tokens: Int[Array, "B T"]) -> Int[Array, "B N"]:
        """What `follow` gets in the first layer."""
        batch, length = tokens.shape[:2]
        return jnp.full((batch, min(self.tokens, length)), -1, jnp.int32)

    def shorten(
        self, model, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Shortened:
        """`choose` as one compiled program, and the tokens it keeps.

        Waits for the result, to look at it.

        Raises:
          ValueError: an empty row, one longer than T or than the model's positions, a
            token outside the vocabulary, what `check` refuses, or scores that are no
            numbers.
        """
        length, limit = tokens.shape[1], model.config.max_positions
        if length > limit:
            raise ValueError(
                f"shorten: {length} tokens a row exceed the model's max_positions="
                f"{limit}."
            )
        own = np.asarray(lengths)
        if own.min() < 1 or own.max() > length:
            raise ValueError(
                f"shorten: lengths={own.tolist()} must lie in [1, {length}], the width "
                "of tokens; an empty prompt has no last token to choose by."
            )
        words, size = np.asarray(tokens), model.config.vocab_size
        strange = np.argwhere((words < 0) | (words >= size))
        if len(strange):
            row, place = strange[0].tolist()
            raise ValueError(
                f"shorten: token {words[row, place]} at place {place} of row {row} is "
                f"outside [0, {size}); was it made with another model's tokenizer?"
            )
        self.check(model)
        short = _shorten(model, params, self, tokens, lengths)
        self._check_finite(short.scores, own)
        return short

    def _check_finite(self, scores: jax.Array, lengths: np.ndarray) -> None:
        there = np.arange(scores.shape[1])[None] < lengths[:, None]
        broken = np.argwhere(there & ~np.isfinite(np.asarray(scores)))
        if len(broken):
            row, token = broken[0].tolist()
            raise ValueError(
                f"shorten: the scores of {self.basis} are not finite, first that of "
                f"token {token} in row {row}. A weight or activation that they are "
                "made of is infinite or no number."
            )


@functools.partial(jax.jit, static_argnames=("model", "shorten"))
def _shorten(model, params: dict, shorten: Shorten, tokens, lengths) -> Shortened:
    positions, scores = shorten.choose(model, params, tokens, lengths)
    return Shortened(*keep_tokens(tokens, positions), positions, scores)


def keep_tokens(
    tokens: Int[Array, "B T"], positions: Int[Array, "B N"]
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """The tokens at `positions`, 0 where these are -1, and how many are there."""
    there = positions >= 0
    kept = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    return jnp.where(there, kept, 0), there.sum(axis=1)


def pad_rows(
    rows: Sequence[Sequence[int]], width: int = 0
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Token ids, padded with 0 to the longest row or to `width`, and the lengths."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(width, lengths.max())), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray(lengths)
