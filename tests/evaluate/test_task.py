"""What holds of every task; and what each refuses, reads and tells for itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_task import RECALL, TASKS, TOKENIZER
from tiny_decoder import TINY, random_params
from tokenizers import processors

from jmem.data.needle import Haystack
from jmem.evaluate.compare import collect, compare
from jmem.evaluate.contenders import at_equal_bytes
from jmem.evaluate.continuation import Continuations, take_passages
from jmem.evaluate.interval import wilson
from jmem.evaluate.longbench import LongBench
from jmem.evaluate.needle import Needles, make_grid
from jmem.evaluate.recall import Questions
from jmem.evaluate.task import Summary
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.models.decoder import Decoder


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    @pytest.mark.parametrize("size", [1, 2, 5, 7])
    def test_batches_have_one_shape_and_every_case_once(self, name, size):
        task = TASKS[name]().task
        seen, shapes = [], set()
        for prompts in task.batches(size):
            shapes.add(prompts.tokens.shape)
            assert prompts.lengths.shape == (size,)
            assert len(prompts.cases) == size
            for row, place in enumerate(prompts.cases):
                length = prompts.lengths[row]
                assert prompts.tokens[row, :length].tolist() == list(task.rows[place])
                assert not prompts.tokens[row, length:].any()
            seen += prompts.places
        assert seen == list(range(len(task)))
        [(rows, width)] = shapes
        assert rows == size
        assert width <= task.prompt

    def test_what_is_right_scores_best(self, name):
        asked = TASKS[name]()
        places = range(len(asked.task))
        right = asked.task.score(asked.right, places)
        wrong = asked.task.score(asked.wrong, places)
        assert np.all(right == asked.best)
        assert np.all(wrong != asked.best)

    def test_a_score_is_that_of_the_case_named(self, name):
        asked = TASKS[name]()
        mixed = np.where(np.arange(5)[:, None] % 2, asked.right, asked.wrong)
        whole = asked.task.score(mixed, range(5))
        part = asked.task.score(mixed[[3, 0]], (3, 0))
        np.testing.assert_array_equal(part, whole[[3, 0]])

    def test_full_beside_itself_has_kept_everything(self, name):
        asked = TASKS[name]()
        right, wrong = (
            asked.task.score(produced, range(5))
            for produced in (asked.right, asked.wrong)
        )
        own = asked.task.summary(right, right)
        assert own.value == own.full
        assert own.cases == 5
        lost = asked.task.summary(right, wrong)
        assert lost.value != lost.full == own.full
        for one in (own, lost):
            if one.interval is not None:
                low, high = one.interval
                assert one.value is not None
                assert low <= one.value <= high

    def test_contenders_are_asked_all_cases(self, name):
        """A full cache keeps all; what is cut keeps less of something, or as much."""
        asked = TASKS[name]()
        config = dataclasses.replace(
            TINY, layers=1, vocab_size=asked.vocab_size, max_positions=256
        )
        model = Decoder(config)
        params = jax.tree.map(jnp.asarray, random_params(config, scale=0.1))
        size: Any = {"prompt": asked.task.prompt, "new_tokens": asked.task.steps}
        methods = {"streaming_llm": StreamingLLM()}
        contenders = at_equal_bytes(model, methods, (0.5,), **size, batch_size=3)
        found = collect(compare(model, params, contenders, asked.task))
        assert list(found) == ["full", "streaming_llm 50 %"]
        assert {len(scores) for scores in found.values()} == {5}
        again = asked.task.summary(found["full"], found["full"])
        assert again.value == again.full


def test_needles_keep_what_the_full_cache_answers():
    asked = TASKS["needles"]()
    full, cut = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 0], bool)
    summary = asked.task.summary(full, cut)
    assert summary == Summary(2 / 3, wilson(2, 3), 1.0, 3)
    assert asked.task.summary(~full & False, cut) == Summary(None, None, None, 0)


def test_losses_are_told_above_the_full_caches():
    full = np.array([[1.0, 2.0], [0.5, 0.5]])
    own = full + np.array([[0.5], [1.5]])
    task = TASKS["continuations"]().task
    assert task.summary(full, own) == Summary(1.0, (0.5, 1.5), 0.0, 2)
    assert task.summary(full[:1], own[:1]) == Summary(0.5, None, 0.0, 1)


def test_passages_overlap_and_continuations_do_not():
    text = "".join(chr(97 + index % 26) for index in range(64))
    documents: Any = [{"text": text}, {"text": "short"}, {"text": text}]
    sizes: Any = {"passage": 20, "continuation": 4}
    rows = take_passages(TOKENIZER, documents, count=8, **sizes)
    tokens = TOKENIZER.encode(text).ids
    assert rows == [tokens[start : start + 24] for start in (0, 12, 24, 36)] * 2
    with pytest.raises(ValueError, match="passages=9, but the text has only 8 pieces"):
        take_passages(TOKENIZER, documents, count=9, **sizes)


def test_an_answer_of_longbench_ends_at_an_end_token():
    asked = TASKS["longbench"]()
    more = TOKENIZER.encode("And a dog.").ids
    end = len(TOKENIZER.encode("The cat.").ids)
    rows = asked.right.copy()
    rows[:, end + 1 : end + 1 + len(more)] = more  # behind the end token
    assert np.all(asked.task.score(rows, range(5)) == 1)


def _cases(lengths):
    haystack = Haystack(TOKENIZER, "One is here. Two is there, and so on. " * 8)
    return make_grid(haystack, lengths=lengths, depths=(0.5,), seeds=(0,))


REFUSED = {
    "no cases": (lambda: Continuations([], continuation=2), "there are no cases"),
    "no case of a needle": (lambda: Needles(TOKENIZER, []), "the lengths"),
    "two lengths": (
        lambda: Needles(TOKENIZER, _cases((150, 160))),
        r"the lengths \[150, 160\]; need those of one",
    ),
    "no room to follow": (
        lambda: Continuations([[1, 2]], continuation=2),
        r"texts of \[2\] tokens must all have one length, above continuation=2",
    ),
    "texts of two lengths": (
        lambda: Continuations([[1] * 5, [1] * 6], continuation=2),
        r"texts of \[5, 6\] tokens must all have one length",
    ),
    "no examples": (
        lambda: LongBench(TOKENIZER, [], limit=100),
        "examples are of no data set",
    ),
    "no questions": (
        lambda: Questions(
            "find", RECALL, RECALL.sample(1, seed=0)._replace(tokens=np.zeros((0, 99)))
        ),
        "find: there are no cases",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=list(REFUSED))
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_passage_begins_with_what_begins_every_text():
    tokenizer = type(TOKENIZER).from_str(TOKENIZER.to_str())
    (begin,) = TOKENIZER.encode("z").ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single="z $A z", special_tokens=[("z", begin)]
    )
    text = "".join(chr(97 + index % 26) for index in range(64))
    sizes: Any = {"passage": 20, "continuation": 4}
    documents: Any = [{"text": text}]
    rows = take_passages(tokenizer, documents, count=2, **sizes)
    tokens = TOKENIZER.encode(text).ids
    assert rows == [[begin, *tokens[start : start + 23]] for start in (0, 11)]
