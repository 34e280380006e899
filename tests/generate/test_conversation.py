"""Many turns: one cache, one program a shape, and the same as reading it all again."""

# pyright: reportAttributeAccessIssue=false

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.generate import decode, reading
from jmem.generate.conversation import Conversation
from jmem.generate.decode import generate
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.models.decoder import Decoder

MODEL = Decoder(dataclasses.replace(TINY, layers=2, max_positions=256))
TURNS = (
    [[5, 9, 1, 30], [2, 40, 11, 8, 3, 19, 7]],
    [[17, 4], [21, 3, 3, 6]],
    [[8, 8, 1, 12, 40], [33]],
)
SNAP = SnapKV(capacity=10, window=4, kernel=3)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))


def begun(params, policy=None, **options) -> Conversation:
    sizes: dict[str, Any] = {"prompt": 60, "max_new_tokens": 6, "batch_size": 2}
    return Conversation(MODEL, params, policy, **sizes | options)


def test_a_conversation_is_what_reading_everything_again_gives(params):
    """Also where answers end early, at different places in the rows."""
    stops = []
    for _ in range(2):
        talk, texts, answers = begun(params, stop_tokens=stops), [[], []], []
        for turn in TURNS:
            texts = [text + row for text, row in zip(texts, turn)]
            answers.append(talk.say(turn))
            texts = [text + row for text, row in zip(texts, answers[-1])]
        assert talk.lengths == [*map(len, texts)]
        whole = [text[: -len(row)] for text, row in zip(texts, answers[-1])]
        options: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": stops}
        assert answers[-1] == generate(MODEL, params, whole, **options)
        assert (len({len(row) for rows in answers for row in rows}) > 1) == bool(stops)
        stops = [answers[0][0][2], answers[1][1][1]]


def test_a_stream_is_the_same_conversation(params):
    talk, streamed = begun(params, SNAP), begun(params, SNAP)
    for turn in TURNS:
        pieces = [*streamed.stream(turn, every=4)]
        assert [len(row) for piece in pieces for row in piece] == [4, 4, 2, 2]
        rows = [[token for part in row for token in part] for row in zip(*pieces)]
        assert rows == talk.say(turn)


def test_who_stops_asking_goes_on_from_there(params):
    """The cache holds what was given, whatever was left."""
    talk, texts = begun(params), TURNS[0]
    left = talk.stream(TURNS[0], every=2)
    texts = [text + row + more for text, row, more in zip(texts, next(left), TURNS[1])]
    unheard = talk.stream(TURNS[1])
    assert next(unheard) == generate(MODEL, params, texts, max_new_tokens=6)
    talk.stream([[1], [1]])
    for pieces in (left, unheard):
        with pytest.raises(RuntimeError, match=r"another turn .* turn [12] ends"):
            next(pieces)


def test_turns_of_any_length_are_two_programs(params):
    talk = begun(params, SNAP)
    random, sizes = np.random.default_rng(0), []
    for turn in range(6):
        length = int(random.integers(1, 30))
        talk.say([random.integers(0, 48, n).tolist() for n in (length, 3)])
        sizes.append(
            (reading._read_on.jit()._cache_size(), decode._further.jit()._cache_size())
        )
        assert turn == 0 or sum(talk.lengths) > 60
    assert len(set(sizes[1:])) == 1
    assert talk._cache.keys.shape == talk.plan.arrays()["keys"].shape


def test_it_takes_the_options_of_generate(params):
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "cache_bytes": 20_000}
    rows = []
    for seed in (1, 1, 2):
        talk = begun(params, SNAP, key=jax.random.key(seed), prompt_chunk=3, **options)
        rows.append([talk.say(turn) for turn in TURNS])
    assert rows[0] == rows[1] != rows[2]
    assert 19_000 < talk.plan.bytes() <= 20_000


def test_a_ring_goes_on_for_ever(params):
    talk = begun(params, StreamingLLM(capacity=16))
    for _ in range(20):
        talk.say([[1] * 20, [2] * 30])
    assert talk.lengths == [520, 720]
    with pytest.raises(ValueError, match=r"254 prompt tokens .* max_positions=256"):
        begun(params, SNAP, prompt_chunk=8).say([[1] * 254, [2]])


REFUSED = {
    "rows": ([[1]], "1 rows, but it was begun with batch_size=2"),
    "no rows": ([], "at least one prompt"),
    "empty": ([[1], []], "each at least one token"),
    "foreign token": ([[1], [48]], r"prompts\[1\].*\[0, 48\)"),
    "no slots": ([[1] * 51, [1]], "row 0 comes to 61 tokens and 6 .* Full keeps"),
    "no chunk": ([[1], [1]], "every=0 must be positive"),
}


@pytest.mark.parametrize("turn, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses_and_goes_on(params, turn, message):
    talk, other = begun(params), begun(params)
    assert talk.say(TURNS[0]) == other.say(TURNS[0])
    with pytest.raises(ValueError, match=message):
        talk.stream(turn, every=0 if "every" in message else 4)
    assert talk.say(TURNS[1]) == other.say(TURNS[1])


def test_refuses_settings(params):
    with pytest.raises(ValueError, match=r"temperature=0.5 .* needs key"):
        begun(params, temperature=0.5)
    with pytest.raises(ValueError, match="prompt_chunk=0"):
        begun(params, prompt_chunk=0)
    with pytest.raises(ValueError, match=r"stop_tokens=\[48\] must lie in \[0, 48\)"):
        begun(params, stop_tokens=[48])
    with pytest.raises(ValueError, match=r"row 0 has 61 tokens, .* prompt=60"):
        begun(params).stream([[1] * 61, [1]])
