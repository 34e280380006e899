"""A conversation: several turns over one cache, which selects again at each.

    talk = Conversation(
        model, params, SnapKV(capacity=1024), prompt=8192, max_new_tokens=256,
        stop_tokens=[2],
    )
    (answer,) = talk.say([first_question])
    for (tokens,) in talk.stream([second_question]):     # eight at a time
        ...

The first turn is a prefill. A later one is read against what the cache kept of all that
was said, questions and answers, in which the policy then chooses again: with `Full` as
if all had been read at once, with another policy in its plan's bytes for any number of
turns (`jmem.kvcache.turn`). The cache is donated from call to call, so it exists once.

GemFilter keeps no cache to go on from: for a turn with it give `generate` the whole
text, and `shorten=`.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmem.generate.checks import (
    check_method,
    check_positions,
    check_positive,
    check_stops,
    check_tokens,
    require_key,
)
from jmem.generate.decode import Decoding, answer, join_pieces, make_plan
from jmem.generate.reading import read
from jmem.generate.sampling import Sampling
from jmem.kvcache.full import Full
from jmem.kvcache.method import CacheMethod
from jmem.kvcache.plan import Sizes

PADDING = 64
"""Turns are padded to multiples of it, so that one program serves many of them."""


class Conversation:
    """What was said so far, by `batch_size` rows, as one cache.

    `plan` has its sizes and `lengths` counts each row's tokens. The options are those
    of `jmem.generate.decode.generate`.
    """

    def __init__(
        self,
        model,
        params: dict,
        policy: CacheMethod | None = None,
        *,
        prompt: int,
        max_new_tokens: int,
        batch_size: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
        stop_tokens: Sequence[int] = (),
        cache_bytes: int | None = None,
        prompt_chunk: int | None = None,
    ):
        """Makes an empty cache for a first turn of up to `prompt` tokens a row.

        `Full` needs room for everything: `prompt` then counts the tokens of all turns
        and answers but the last. `max_new_tokens` is the longest answer.
        """
        where = type(self).__name__
        check_method(where, policy)
        self.model, self.params = model, params
        self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self.key = require_key(where, self.sampling, key)
        check_stops(where, model, stop_tokens)
        check_positive(where, max_new_tokens=max_new_tokens, prompt_chunk=prompt_chunk)
        sizes = Sizes(prompt=prompt, new_tokens=max_new_tokens, batch_size=batch_size)
        self.plan = make_plan(where, model, policy or Full(), cache_bytes, **sizes)
        self.stop_tokens, self.prompt_chunk = tuple(stop_tokens), prompt_chunk
        self.turns = 0
        self.lengths = [0] * batch_size
        self._cache = self.plan.method.begin(self.plan)

    def say(self, turn: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each row's answer to its next tokens; what `stream` gives, whole."""
        return join_pieces(self.stream(turn, every=self.plan.new_tokens))

    def stream(
        self, turn: Sequence[Sequence[int]], every: int = 8
    ) -> Iterator[list[list[int]]]:
        """The answer to each row's next tokens, `every` tokens at a time.

        They are read at once. Who stops asking leaves an answer that ends there, and
        may go on with the next turn.

        Raises:
          ValueError: rows that are not the plan's, empty or of another vocabulary, more
            tokens than the plan has slots for or the model positions, or logits that
            are not finite, after which there is no going on.
        """
        where, plan, method = type(self).__name__, self.plan, self.plan.method
        check_positive(where, every=every)
        check_tokens(where, self.model, turn)
        if len(turn) != plan.batch_size:
            raise ValueError(
                f"{where}: {len(turn)} rows, but it was begun with batch_size="
                f"{plan.batch_size}; every turn needs tokens for each."
            )
        before, more = np.asarray(self.lengths), np.asarray([len(row) for row in turn])
        if self.prompt_chunk is None and not before.any():
            method.check_prompt(where, plan, more)
        method.check_turn(plan, before, more, plan.new_tokens)
        if method.is_endless(self.model):
            before = np.minimum(before, plan.most_tokens)
        longest = int((before + more).max())
        check_positions(where, self.model, method, longest, plan.new_tokens)
        width = -(-int(more.max()) // PADDING) * PADDING
        logits, self._cache = read(
            *(self.model, self.params, turn, self.lengths, self._cache, plan),
            chunk=self.prompt_chunk,
            width=min(width, self.model.config.max_positions),
        )
        self.lengths = [n + len(row) for n, row in zip(self.lengths, turn)]
        self.turns += 1
        return self._answer(logits, every, self.turns)

    def _answer(self, logits, every: int, turn: int) -> Iterator[list[list[int]]]:
        given = answer(
            *(self.model, self.params, logits),
            jnp.asarray(self.lengths, jnp.int32),
            *(self._cache, jax.random.fold_in(self.key, turn)),
            Decoding(self.plan, every, self.sampling, self.stop_tokens),
        )
        while self.turns == turn:
            rows, self._cache = next(given, (None, self._cache))
            if rows is None:
                return
            self.lengths = [n + len(row) for n, row in zip(self.lengths, rows)]
            yield rows
        raise RuntimeError(
            f"{type(self).__name__}: another turn has begun, so the answer to turn "
            f"{turn} ends where it was left."
        )
