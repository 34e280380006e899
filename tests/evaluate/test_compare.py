"""Parts run when they are asked to; contenders are methods in the same bytes."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.evaluate import compare as comparing
from jmem.evaluate.compare import collect, compare, join
from jmem.evaluate.contenders import (
    at_equal_bytes,
    find_share_of_full,
    split_contenders,
)
from jmem.evaluate.decoding import answer_prompts
from jmem.evaluate.programs import build_programs, plan_caches
from jmem.evaluate.task import Summary, Task
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import WindowKV
from jmem.models.decoder import Decoder

MODEL = Decoder(dataclasses.replace(TINY, layers=4))
METHODS = {
    "streaming_llm": StreamingLLM(),
    "snapkv": SnapKV(window=4, kernel=3),
    "pyramidkv": PyramidKV(window=4, kernel=3),
    "windowkv": WindowKV(group=2, observation=4, pyramid="flat"),
    "gemfilter": GemFilter(layer=1),
    "gem windows": GemFilter(layer=1, window=4),
}
SIZE: Any = {"prompt": 100, "new_tokens": 9, "batch_size": 2}


class Echo(Task):
    """What is produced is the first token of each prompt; right where it is even."""

    def __init__(self, count=5):
        rows = [[place, 1, 2] for place in range(count)]
        super().__init__("echo", rows, prompt=100, steps=9)

    def produce(self, model, params, context, prompts):
        return prompts.tokens[:, :1]

    def score(self, produced, places):
        assert len(produced) == len(places)
        return produced[:, 0] % 2 == 0

    def summary(self, full, own):
        return Summary(float(own.mean()), None, float(full.mean()), len(own))


@pytest.fixture
def read(monkeypatch):
    """How many rows at a time each batch was read; no model is run."""
    found = []

    def read_all(model, params, plans, tokens, lengths, *, rows, **more):
        found.append(rows)
        return ((name, None) for name in [*plans][::-1])

    monkeypatch.setattr(comparing, "read_all", read_all)
    return found


def contend(methods=METHODS, shares=(0.25, 0.5), **more):
    return at_equal_bytes(MODEL, methods, shares, **(SIZE | more))


class TestCompare:
    def test_a_part_runs_when_its_scores_are_asked_for(self, read):
        parts = list(compare(MODEL, {}, contend({}), Echo()))
        assert [part.name for part in parts] == ["echo 0", "echo 1", "echo 2"]
        assert read == []
        [scores] = parts[2].scores().values()
        assert scores.tolist() == [True]  # what fills the batch up is no case
        assert read == [2]

    def test_scores_are_in_the_order_of_cases_and_contenders(self, read):
        contenders = contend({"snapkv": METHODS["snapkv"]})
        found = collect(compare(MODEL, {}, contenders, Echo()))
        assert list(found) == list(contenders)
        for scores in found.values():
            assert scores.tolist() == [True, False, True, False, True]

    @pytest.mark.parametrize("rows, most", [(None, 6), (1, 1), (4, 3), (9, 6)])
    def test_as_many_rows_are_read_as_divide_a_batch(self, read, rows, most):
        collect(compare(MODEL, {}, contend({}, batch_size=6), Echo(6), rows=rows))
        assert read == [most]

    def test_scores_of_parts_are_those_of_all(self):
        found = join([{"a": np.array([1.0, 2.0])}, {"a": np.array([3.0])}])
        assert found["a"].tolist() == [1.0, 2.0, 3.0]

    def test_refuses_contenders_of_unlike_batches(self):
        mixed = contend({}) | {"other": contend({}, batch_size=3)["full"]}
        with pytest.raises(ValueError, match=r"batches of \[2, 3\]; need one size"):
            list(compare(MODEL, {}, mixed, Echo()))
        with pytest.raises(ValueError, match=r"batches of \[\]"):
            list(compare(MODEL, {}, {}, Echo()))


class TestContenders:
    def test_no_contender_has_more_bytes_and_none_could_have_more_room(self):
        found = contend()
        assert len(found) == 1 + 2 * len(METHODS)
        whole = Full().plan(MODEL, **SIZE).bytes()
        slot = whole / (100 + 9)
        for name, contender in found.items():
            assert name == contender.name
            room = contender.share * whole - contender.plan.bytes()
            assert room >= 0, name
            # WindowKV takes whole windows, and PyramidKV's steps are rounded.
            most = {"windowkv": 8, "pyramidkv": 2, "gem windows": 4}
            assert room < 1.1 * most.get(contender.method, 1) * slot, name
            assert find_share_of_full(found, name) == contender.plan.bytes() / whole

    def test_a_filter_keeps_what_a_full_cache_of_those_bytes_holds(self):
        found = contend()
        for name in ("gemfilter 25 %", "gem windows 25 %"):
            filter, plan = found[name].filter, found[name].plan
            assert isinstance(filter, GemFilter)
            assert plan == Full().plan(MODEL, **(SIZE | {"prompt": filter.tokens}))
            assert filter.tokens % filter.window == 0
            more = filter.tokens + filter.window
            beyond = Full().plan(MODEL, **(SIZE | {"prompt": more})).bytes()
            assert beyond > 0.25 * found["full"].plan.bytes()
        plans, filters = split_contenders(found)
        assert plans.keys() | filters.keys() == found.keys()
        assert [name.rpartition(" ")[0] for name in filters] == [
            *(["gemfilter 25", "gemfilter 50", "gem windows 25", "gem windows 50"])
        ]

    def test_room_for_an_answer_may_come_on_top(self):
        whole = Full().plan(MODEL, **SIZE).bytes()
        prompt = Full().plan(MODEL, **(SIZE | {"new_tokens": 0})).bytes()
        room = math.floor(0.25 * prompt) + whole - prompt
        slot = whole / 109
        for name, own in contend(shares=(0.25,), answer_besides=True).items():
            if name != "full":
                assert room - 9 * slot < own.plan.bytes() <= room

    def test_bytes_of_a_share_may_be_given(self):
        nbytes = Full().plan(MODEL, **(SIZE | {"prompt": 40})).bytes()
        given = contend({"gemfilter": GemFilter(layer=1)}, {0.3: nbytes})
        filter = given["gemfilter 30 %"].filter
        assert filter is not None
        assert filter.tokens == 40

    @pytest.mark.parametrize(
        "methods, shares, message",
        [
            ({}, (0.5, 1.0), None),
            (METHODS, (1.0,), r"shares=1\.0 must lie within \(0, 1\)"),
            (
                METHODS,
                (0.05,),
                r"shares=0\.05 of the full cache for 100 \+ 9 tokens is too little for "
                r"snapkv(.|\n)*takes [\d,]+ bytes",
            ),
            (
                {"gemfilter": GemFilter(layer=1)},
                (0.05,),
                "too little for gemfilter(.|\n)*too small for GemFilter",
            ),
            ({"w": WindowKV(group=3)}, (0.5,), "group=3 does not divide"),
        ],
    )
    def test_refuses(self, methods, shares, message):
        if message is None:
            assert list(contend(methods, shares)) == ["full"]
            return
        with pytest.raises(ValueError, match=message):
            contend(methods, shares)


class TestPrograms:
    METHODS: ClassVar = {"full": Full(), "gem": GemFilter(layer=1, tokens=32)}

    def test_a_filter_has_a_program_and_a_full_cache_of_what_it_leaves(self):
        plans = plan_caches(MODEL, self.METHODS, **SIZE)
        assert plans["gem"] == Full().plan(MODEL, **(SIZE | {"prompt": 32}))
        short = plan_caches(MODEL, self.METHODS, **(SIZE | {"prompt": 20}))
        assert short["gem"] == short["full"]

    def test_every_method_has_its_programs(self):
        built = build_programs(MODEL, self.METHODS, **SIZE)
        assert list(built) == [
            *("full-prefill", "full-decode"),
            *("gem-filter", "gem-prefill", "gem-decode"),
        ]
        assert built["gem-filter"].args[1].shape == (2, 100)
        assert built["gem-prefill"].args[1].shape == (2, 32)


def test_a_comparison_is_what_each_answers_alone():
    """Policies and filters, after one prefill, in batches of which one is filled up."""

    class Tokens(Echo):
        """What is produced is itself the score."""

        produce = Task.produce

        def score(self, produced, places):
            return produced

    params = jax.tree.map(jnp.asarray, random_params(MODEL.config, scale=0.3))
    random = np.random.default_rng(0)
    task = Tokens(3)
    task.rows = random.integers(0, TINY.vocab_size, (3, 60)).tolist()
    methods = {"gem": METHODS["gemfilter"], "snapkv": METHODS["snapkv"]}
    contenders = contend(methods, (0.3,))
    found = collect(compare(MODEL, params, contenders, task, rows=1))
    assert list(found) == ["full", "gem 30 %", "snapkv 30 %"]
    plans, filters = split_contenders(contenders)
    tokens = np.asarray(task.rows, np.int32)
    for part in (slice(0, 2), slice(1, 3)):
        given = plans, tokens[part], np.array([60, 60], np.int32)
        alone = answer_prompts(MODEL, params, *given, steps=9, filters=filters)
        for name, rows in alone.items():
            np.testing.assert_array_equal(found[name][part], rows)
