"""`python_tasks`: enough of each, no overlap across the split, prompts not learnt."""

import textwrap
from collections import Counter

import numpy as np
import pytest

from jmem.data import builtin, tasks
from jmem.data.document import DataError, Document
from jmem.data.tasks import INSTRUCTIONS, python_tasks
from jmem.data.tokens import tokenise
from jmem.data.windows import pad

FUNCTIONS = ("summary", "signature", "module")


@pytest.fixture(scope="module")
def found() -> dict[str, builtin.Corpus]:
    return python_tasks()


def parts(document: Document) -> tuple[str, str, str]:
    """Instruction, what is given, and the answer that the loss covers."""
    [(start, end)] = document.get("loss_spans", [])
    assert end == len(document["text"])
    instruction, given = document["text"][:start].split("\n", 1)
    return instruction, given, document["text"][start:]


def sources(documents) -> list[str]:
    return [document["source"] for document in documents]


class TestTasks:
    def test_there_is_enough_of_each(self, found):
        assert list(found) == ["summary", "signature", "module", "prose"]
        for training, held_out in found.values():
            assert len(training) >= 400
            assert len(held_out) >= 60

    def test_the_first_line_names_the_task_and_nothing_else_does(self, found):
        assert len(set(INSTRUCTIONS.values())) == 4
        for name, corpus in found.items():
            lines = {parts(d)[0] for part in corpus for d in part}
            assert lines == {INSTRUCTIONS[name]}

    def test_prompt_and_answer_are_there_and_differ(self, found):
        for corpus in found.values():
            for document in (*corpus.training, *corpus.held_out):
                _, given, answer = parts(document)
                assert given.strip()
                assert answer.strip()
                assert answer.strip() not in given.splitlines()

    def test_one_known_function(self, found):
        definition = "def heappush(heap, item):"
        summary = "Push item onto heap, maintaining the heap invariant."
        expected = {
            "summary": ("Summarise:", f"{definition}\n", summary),
            "signature": ("Define:", f"{summary}\n", definition),
        }
        for name, text in expected.items():
            [known] = [
                document
                for document in found[name].held_out
                if document["source"] == "module:heapq.heappush"
            ]
            assert parts(known) == text

    def test_module_is_that_of_the_function(self, found):
        for document in (*found["module"].training, *found["module"].held_out):
            _, given, answer = parts(document)
            assert document["source"].startswith(f"module:{answer}.")
            assert answer in builtin.TRAINING_MODULES
            assert given.count("\n") == 2, "a definition line and a summary"

    def test_prose_is_cut_in_the_middle(self, found):
        for document in (*found["prose"].training, *found["prose"].held_out):
            _, given, answer = parts(document)
            assert answer.startswith(" ")
            first, second = len(given.split()), len(answer.split())
            assert 0 <= second - first <= 1
            assert 60 <= first + second <= 200

    def test_it_is_the_same_every_time(self, found):
        assert python_tasks() == found


class TestSplit:
    def test_no_source_occurs_twice_in_a_task(self, found):
        for training, held_out in found.values():
            named = sources(training) + sources(held_out)
            assert len(set(named)) == len(named)

    @pytest.mark.parametrize("name", ["summary", "signature", "prose"])
    def test_whole_modules_and_topics_are_held_out(self, found, name):
        modules = {*builtin.HELD_OUT_MODULES, *tasks.ALSO_HELD_OUT}
        allowed = tuple(
            [f"topic:{topic}:" for topic in builtin.HELD_OUT_TOPICS]
            + [f"module:{module}{sign}" for module in modules for sign in ".:"]
        )
        training, held_out = found[name]
        assert all(source.startswith(allowed) for source in sources(held_out))
        assert not any(source.startswith(allowed) for source in sources(training))

    def test_no_module_is_trained_on_and_held_out(self):
        training = set(builtin.TRAINING_MODULES)
        assert not training & {*builtin.HELD_OUT_MODULES, *tasks.ALSO_HELD_OUT}
        assert not {*builtin.HELD_OUT_MODULES} & {*tasks.ALSO_HELD_OUT}

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_no_definition_and_no_summary_occurs_twice(self, found, name):
        """A method like `close(self)` would be asked in training and then again."""
        documents = [*found[name].training, *found[name].held_out]
        prompts = Counter(parts(d)[1].lower() for d in documents)
        assert max(prompts.values()) == 1
        if name != "module":
            assert max(Counter(parts(d)[2].lower() for d in documents).values()) == 1

    @pytest.mark.parametrize("name", ["summary", "prose"])
    def test_no_run_of_words_crosses_the_split(self, found, name):
        training, held_out = (
            {
                run
                for document in part
                for run in builtin._list_runs(
                    builtin.split_words("".join(parts(document)[1:]))
                )
            }
            for part in found[name]
        )
        assert held_out
        assert not training & held_out

    def test_every_held_out_module_is_named_in_training(self, found):
        training, held_out = ({parts(d)[2] for d in part} for part in found["module"])
        assert held_out <= training
        assert len(held_out) > 20

    def test_module_split_looks_at_the_name_only(self):
        """Another function in the module must not move this one across."""
        one = tasks._Member("heapq", "heappush", "def heappush(heap):", "Push it.")
        two = one._replace(definition="def heappush(heap, item, key):", summary="!")
        assert tasks._is_drawn(one) == tasks._is_drawn(two)


class TestTokens:
    def test_only_answers_are_learnt(self, found, word_tokenizer):
        for training, _ in found.values():
            documents = training[:20]
            for document, ids in zip(documents, tokenise(documents, word_tokenizer)):
                words = len(parts(document)[2].split())
                np.testing.assert_array_equal(
                    np.flatnonzero(~np.ma.getmaskarray(ids)),
                    np.arange(ids.size - words - 1, ids.size),
                )

    def test_rows_of_256_tokens_hold_all(self, found, smollm2_tokenizer):
        for corpus in found.values():
            for part in corpus:
                longest = sorted(part, key=lambda document: len(document["text"]))[-20:]
                sequences = tokenise(longest, smollm2_tokenizer, vocab_size=49_152)
                assert max(ids.size for ids in sequences) <= 257
                assert pad(sequences, 256).weights.any(axis=1).all()


class TestMembers:
    SOURCE = '''
        class Toy(Base, metaclass=Kind):
            """A toy to play with, e.g. Lego. It has parts."""
            @property
            def colour(self):
                """The colour
                of it."""
            def play(self, hours: float = 1.5, *more, loud=False) -> None:
                """Play with it (again)!

                For hours.
                """
        async def fetch(name, /):
            """Fetch a toy."""
        def fetch_all():
            """fetch_all() calls fetch for each."""
        def take():
            """take([name]) -> toy"""
        def short():
            """Too short."""
        def wide(NAMES):
            """A definition that is too long."""
        def _hidden():
            """This one is not public."""
        def silent():
            pass
        raise RuntimeError("this module was run")
    '''

    def test_definitions_and_first_sentences(self, tmp_path, monkeypatch):
        names = ", ".join(f"name{i}" for i in range(40))
        source = textwrap.dedent(self.SOURCE).replace("NAMES", names)
        (tmp_path / "toys.py").write_text(source)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        members = {
            m.name: (m.definition, m.summary) for m in tasks._list_members(["toys"])
        }
        play = "def play(self, hours: float=1.5, *more, loud=False) -> None:"
        assert members == {
            "Toy": (
                "class Toy(Base, metaclass=Kind):",
                "A toy to play with, e.g. Lego.",
            ),
            "Toy.colour": ("def colour(self):", "The colour of it."),
            "Toy.play": (play, "Play with it (again)!"),
            "fetch": ("async def fetch(name, /):", "Fetch a toy."),
        }

    def test_what_occurs_again_is_dropped(self):
        first = tasks._Member("a", "close", "def close(self):", "Close the file.")
        others = [
            first._replace(module="b", summary="Close the socket now."),
            first._replace(
                module="b", definition="def shut():", summary="close the FILE"
            ),
        ]
        fresh = tasks._Member("b", "open", "def open(self):", "Open the file.")
        seen: set[str] = set()
        assert list(tasks._drop_repeats([first, *others, fresh], seen)) == [
            first,
            fresh,
        ]
        assert not list(tasks._drop_repeats([fresh], seen))


class TestPassages:
    PROSE = "This sentence has ten words and is one of many."

    def passages(self, *paragraphs: str) -> list[Document]:
        document = Document(text="\n\n".join(paragraphs), source="topic:toys")
        return list(tasks._cut_passages([document]))

    def test_neighbours_are_joined_until_they_are_enough(self):
        made = self.passages("Title", *[self.PROSE] * 13)
        assert sources(made) == ["topic:toys:1", "topic:toys:2"]
        assert {len(parts(d)[2].split()) for d in made} == {30}

    @pytest.mark.parametrize(
        "other",
        [
            "Toys\n****",
            ">>> play(1)\n2",
            "   toy: part\n      more of it that stands further to the right.",
            "toy ::= 'a' | 'b' | 'c' | 'd' | 'e' | 'f' | 'g'.",
            "- " + PROSE,
            "It has no end that one could see, or has it",
        ],
    )
    def test_what_is_no_prose_parts_them(self, other):
        assert not self.passages(*[self.PROSE] * 4, other, *[self.PROSE] * 4)

    def test_a_passage_may_not_be_long(self):
        assert not self.passages(" ".join([self.PROSE] * 21))
        assert len(self.passages(" ".join([self.PROSE] * 20))) == 1


class TestMissing:
    def test_module(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(DataError, match=r"without the source of module 'abc'"):
            python_tasks()
