"""`python_reference`: enough text, no overlap across the split, nothing imported."""

import random
import sys
import textwrap

import pytest

from jmem.data import builtin
from jmem.data.builtin import python_reference
from jmem.data.document import DataError, Document
from jmem.data.tokens import tokenise


@pytest.fixture(scope="module")
def corpus() -> builtin.Corpus:
    return python_reference()


def runs(documents, length: int) -> set[tuple[str, ...]]:
    """Runs of words as a person sees them: whatever stands between blanks."""
    found = set()
    for document in documents:
        words = document["text"].split()
        found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


class TestSplit:
    def test_sources_are_disjoint_and_named(self, corpus):
        sources = [d["source"] for part in corpus for d in part]
        assert len(set(sources)) == len(sources)
        held_out = {d["source"] for d in corpus.held_out}
        assert held_out == {f"topic:{name}" for name in builtin.HELD_OUT_TOPICS} | {
            f"module:{name}" for name in builtin.HELD_OUT_MODULES
        }, "a held-out source was cut away whole"

    def test_no_run_of_words_crosses_the_split(self, corpus):
        training, held_out = runs(corpus.training, 12), runs(corpus.held_out, 12)
        assert not training & held_out
        assert len(held_out) > 3000

    def test_topics_without_the_cut_do_overlap(self):
        """Otherwise the test above would prove nothing."""
        topics = builtin._read_topics()
        training = [{"text": t} for n, t in topics.items() if n != "comparisons"]
        assert runs(training, 20) & runs([{"text": topics["comparisons"]}], 20)

    def test_there_is_enough_of_it(self, corpus):
        """English prose has about 4 characters a SmolLM2 token (3.8 here)."""
        training, held_out = (sum(len(d["text"]) for d in part) for part in corpus)
        assert training > 4.5 * 60_000
        assert held_out > 4.5 * 4_096

    def test_the_experiment_has_its_tokens(self, corpus, smollm2_tokenizer):
        training, held_out = (
            sum(
                ids.size for ids in tokenise(part, smollm2_tokenizer, vocab_size=49_152)
            )
            for part in corpus
        )
        assert training >= 60_000
        assert held_out >= 6_000

    def test_it_is_the_same_every_time(self, corpus):
        assert python_reference() == corpus

    def test_further_modules_leave_the_rest_as_it_is(self, corpus):
        further = python_reference(also_held_out=("bisect",))
        assert further.training == corpus.training
        assert further.held_out[:-1] == corpus.held_out
        assert further.held_out[-1]["source"] == "module:bisect"


class TestCut:
    @pytest.mark.parametrize("seed", range(20))
    def test_no_two_documents_share_a_run(self, seed):
        """Paragraphs of all lengths, shared, shuffled: a cut makes new neighbours."""
        draw = random.Random(seed)
        pool = [
            " ".join(draw.choices("abcdefgh", k=draw.randint(2, 20))) for _ in range(30)
        ]
        documents = [
            Document(text="\n\n".join(draw.sample(pool, 15)), source=str(i))
            for i in range(4)
        ]
        kept = list(builtin._drop_repeats(documents, set()))
        assert sum(len(d["text"]) for d in kept) < sum(
            len(d["text"]) for d in documents
        )
        assert len(kept) > 1
        seen: set[tuple[str, ...]] = set()
        for document in kept:
            own = runs([document], builtin.RUN)
            assert not own & seen
            seen |= own

    def test_only_the_repeated_paragraph_goes(self):
        old = " ".join(f"old{i}" for i in range(builtin.RUN))
        fresh = " ".join(f"new{i}" for i in range(40))
        text = f"Title\n*****\n\n\n{fresh}\n\n   So: {old}.\n\n   The end."
        seen = set(builtin._list_runs(builtin.split_words(old)))
        assert builtin._cut_repeats(text, seen) == (
            f"Title\n*****\n\n{fresh}\n\n   The end.\n"
        )


class TestModules:
    SOURCE = '''
        """About toys."""
        class Toy(Base):
            """A toy."""
            def play(self, hours: float = 1.5, *more, loud=False) -> None:
                """Play with it."""
            @property
            def colour(self):
                """Its colour."""
            @staticmethod
            def make(kind, /):
                """Make one."""
            def silent(self): pass
            def _hidden(self):
                """Not shown."""
        async def fetch(name: str, **options):
            """Fetch a toy.

              Slowly.
            Or not.
            """
        raise RuntimeError("this module was run")
    '''
    PAGE = """\
        The "toys" module
        *****************

        About toys.

        class toys.Toy

           A toy.

           play(hours=1.5, *more, loud=False)

              Play with it.

           colour

              Its colour.

           make(kind, /)

              Make one.

        toys.fetch(name, **options)

           Fetch a toy.

             Slowly.
           Or not."""

    @pytest.mark.parametrize("file", ["toys.py", "toys/__init__.py"])
    def test_page_has_the_layout_of_the_reference(self, tmp_path, monkeypatch, file):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(self.SOURCE))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        page = builtin._document_module("toys")
        assert page == {"text": textwrap.dedent(self.PAGE), "source": "module:toys"}


class TestMissing:
    def test_module(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(
            DataError, match=r"without the source of module 'abc' \(.*In"
        ):
            python_reference()

    def test_topics(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(
            DataError, match=r"without pydoc_data\.topics.*whole standa"
        ):
            python_reference()

    def test_one_topic(self, monkeypatch):
        topics = {k: v for k, v in builtin._read_topics().items() if k != "del"}
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        with pytest.raises(DataError, match="without the topic 'del'"):
            python_reference()
