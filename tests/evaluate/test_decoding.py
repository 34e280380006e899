"""Answers and losses of many plans are those that each plan gives alone."""

# pyright: reportAttributeAccessIssue=false

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.evaluate.decoding import (
    answer_prompts,
    continue_text,
    measure_losses,
    read_all,
)
from jmem.generate import decode, reading
from jmem.generate.decode import generate
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.policy import Policy
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.models.decoder import Decoder
from jmem.models.next_token import token_positions
from jmem.nn.stack import run_stack

MODEL = Decoder(dataclasses.replace(TINY, layers=2))
LENGTHS = np.array([40, 23], np.int32)
STEPS = 6
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(capacity=12, window=4, kernel=3),
    "streaming_llm": StreamingLLM(capacity=12),
}
FILTERS = {
    "few": GemFilter(layer=1, tokens=9, kernel=3),
    "most": GemFilter(layer=0, tokens=39, queries=2, score="probability"),
    "windows": GemFilter(layer=1, tokens=12, window=4, keep_first=2, keep_last=3),
}
"""The second keeps all of the shorter row, and more than is not recent of both."""


@functools.cache
def params() -> dict:
    return jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))


def prompts(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, TINY.vocab_size, (2, 40)).astype(np.int32)
    return np.where(np.arange(40)[None] < LENGTHS[:, None], tokens, 1).astype(np.int32)


def plans(**more: Any) -> dict:
    sizes: Any = {"prompt": 40, "new_tokens": STEPS, "batch_size": 2} | more
    return {name: policy.plan(MODEL, **sizes) for name, policy in POLICIES.items()}


def test_answers_are_those_of_generate():
    tokens = prompts()
    rows = [tokens[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    found = answer_prompts(MODEL, params(), plans(), tokens, LENGTHS, steps=STEPS)
    assert list(found) == list(POLICIES)
    for name, policy in POLICIES.items():
        alone = generate(MODEL, params(), rows, max_new_tokens=STEPS, policy=policy)
        assert found[name].tolist() == alone
    assert found["full"].tolist() != found["snapkv"].tolist()


def test_losses_of_everything_kept_are_those_of_the_whole_text():
    """Teacher-forced decoding equals one forward pass over prompt and continuation."""
    tokens, random = prompts(), np.random.default_rng(5)
    after = random.integers(0, TINY.vocab_size, (2, STEPS)).astype(np.int32)
    found = measure_losses(MODEL, params(), plans(), tokens, LENGTHS, after)

    @jax.jit
    def logits(params, tokens):
        x = MODEL.embed(params, tokens)
        positions = token_positions(tokens)
        x, *_ = run_stack(MODEL.block, params["blocks"], x, positions, MODEL.ops)
        return MODEL.head(params, x, MODEL.ops)

    for row, length in enumerate(LENGTHS):
        whole = np.zeros((1, 46), np.int32)
        whole[0, : length + STEPS] = [*tokens[row, :length], *after[row]]
        ours = jax.nn.log_softmax(logits(params(), jnp.asarray(whole))[0])
        at = np.arange(length - 1, length - 1 + STEPS)
        expected = -np.asarray(ours)[at, after[row]]
        np.testing.assert_allclose(found["full"][row], expected, atol=2e-5)
        # A prompt attends all of itself: the first loss is everybody's.
        np.testing.assert_allclose(found["snapkv"][row, 0], expected[0], atol=2e-5)
    assert np.abs(found["snapkv"] - found["full"])[:, 1:].max() > 0.01


def test_one_prefill_and_one_loop_a_plan_are_compiled():
    def compiled():
        return reading._prefill._cache_size(), decode.extend.jit()._cache_size()

    answer_prompts(MODEL, params(), plans(), prompts(), LENGTHS, steps=STEPS)
    before = compiled()
    answer_prompts(MODEL, params(), plans(), prompts(1), LENGTHS, steps=STEPS)
    assert compiled() == before


def test_rows_read_one_by_one_are_rows_read_together():
    few, filters = {"snapkv": plans()["snapkv"]}, {"few": FILTERS["few"]}
    given = MODEL, params(), few, prompts(), LENGTHS
    together = answer_prompts(*given, steps=STEPS, filters=filters)
    apart = answer_prompts(*given, steps=STEPS, filters=filters, rows=1)
    assert list(apart) == ["snapkv", "few"]
    for name, rows in together.items():
        np.testing.assert_array_equal(apart[name], rows)


@pytest.mark.parametrize("name", list(FILTERS))
def test_a_filter_s_answers_are_those_of_generate(name):
    """The filter reads the lower layers there, and all of them here."""
    tokens = prompts()
    rows = [tokens[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    filters = {name: FILTERS[name]}
    found = answer_prompts(
        MODEL, params(), {}, tokens, LENGTHS, steps=STEPS, filters=filters
    )
    alone = generate(MODEL, params(), rows, max_new_tokens=STEPS, shorten=FILTERS[name])
    assert found[name].tolist() == alone


def test_a_filter_that_keeps_all_has_the_losses_of_the_full_cache():
    after = prompts(5)[:, :STEPS]
    filters = {"all": GemFilter(layer=1, tokens=50), "few": FILTERS["few"]}
    found = measure_losses(
        MODEL, params(), plans(), prompts(), LENGTHS, after, filters=filters
    )
    np.testing.assert_allclose(found["all"], found["full"], atol=2e-5)
    assert np.abs(found["few"] - found["full"])[:, 0].min() > 1e-3


def test_a_last_token_read_again_changes_nothing_where_nothing_was_dropped():
    """And lets the first token too be answered from what a cut cache kept."""
    filters = {"few": FILTERS["few"]}

    def continued(**how):
        given = MODEL, params(), plans(), prompts(), LENGTHS
        read = read_all(*given, steps=STEPS, filters=filters)
        return {
            name: continue_text(MODEL, params(), context, STEPS, **how)
            for name, context in read
        }

    once, again = continued(), continued(reread_last=True)
    for name in ("full", "few"):  # a filter's prompt is cut before it is read at all
        np.testing.assert_array_equal(again[name], once[name])
    cut = "streaming_llm"
    np.testing.assert_array_equal(once[cut][:, 0], once["full"][:, 0])
    assert (again[cut][:, 0] != once["full"][:, 0]).any(), "not from the cut cache"


REFUSED: dict[str, tuple[dict, str]] = {
    "no plans": ({"plans": {}}, "plans is empty"),
    "one name": ({"filters": {"full": FILTERS["few"]}}, "'full' is both"),
    "no such layer": (
        {"filters": {"g": GemFilter(layer=2)}},
        "filter 'g': .* layer=2 is not",
    ),
    "odd rows": ({"rows": 3}, "rows=3 must divide the 2 rows"),
    "no rows": ({"rows": 0}, "rows=0 must divide"),
    "no steps": ({"steps": 0}, "0 steps"),
    "other rows": ({"plans": plans(batch_size=3)}, "'full' is for batch_size=3"),
    "shorter prompts": ({"plans": plans(prompt=39)}, "prompt=39"),
    "fewer steps": ({"steps": STEPS + 1}, "7 steps follow"),
    "empty row": ({"lengths": np.array([40, 0], np.int32)}, r"\[1, 40\]"),
    "long row": ({"lengths": np.array([41, 2], np.int32)}, r"\[1, 40\]"),
    "positions": (
        {"plans": plans(new_tokens=100), "steps": 89},
        "89 steps exceed the model's max_positions=128",
    ),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(changed, message):
    given = {"plans": plans(), "lengths": LENGTHS, "steps": STEPS} | changed
    places = given.pop("plans"), prompts(), given.pop("lengths")
    with pytest.raises(ValueError, match=message):
        answer_prompts(MODEL, params(), *places, **given)
