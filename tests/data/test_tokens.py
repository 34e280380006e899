"""`tokenise`: every token of every document, in order, and closed by the end token."""

import datasets
import jax
import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jmem.data import tokens
from jmem.data.batch import Batch
from jmem.data.document import DataError, DataWarning
from jmem.data.loader import Loader
from jmem.data.text import read
from jmem.data.tokens import encode_start, tokenise
from jmem.data.windows import pack, pad

DOCUMENTS = [
    {"text": "the cat sat", "source": "a.txt"},
    {"text": "on a mat", "source": "b.txt"},
    {"text": "the dog", "source": "c.txt"},
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END_OF_ANOTHER = "<|end|>"
IDS = [[1, 2, 3, 7], [4, 5, 6, 7], [1, 0, 7]]


def lists(sequences) -> list[list[int]]:
    assert all(sequence.dtype == np.int32 for sequence in sequences)
    return [sequence.tolist() for sequence in sequences]


def test_documents_become_ids(word_tokenizer):
    assert lists(tokenise(DOCUMENTS, word_tokenizer)) == IDS


def test_any_dataset_will_do(word_tokenizer):
    """Not only ours: another column name, no `source`."""
    data = datasets.Dataset.from_dict({"body": [d["text"] for d in DOCUMENTS]})
    assert lists(tokenise(data, word_tokenizer, column="body")) == IDS


def test_order_survives_the_chunks(word_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "ENCODED_AT_ONCE", 2)
    assert lists(tokenise(iter(DOCUMENTS), word_tokenizer)) == IDS


def test_truncation_and_padding_left_on_are_not_applied(word_tokenizer):
    """Many tokenizer.json files carry them; they would drop text in silence."""
    word_tokenizer.enable_truncation(2)
    word_tokenizer.enable_padding(length=9)
    assert lists(tokenise(DOCUMENTS, word_tokenizer)) == IDS
    assert len(word_tokenizer.encode("the cat sat").ids) == 9, "changed the caller's"


def test_the_tokenizer_adds_what_it_always_adds(word_tokenizer):
    word_tokenizer.add_special_tokens(["<s>"])
    word_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 8)]
    )
    assert lists(tokenise(DOCUMENTS[:1], word_tokenizer)) == [[8, 1, 2, 3, 7]]


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], "no document given"),
        ([{"text": "the"}, {"txt": "a"}], r"^document 1: no column 'text' among"),
        (
            [{"text": " ", "source": "a.jsonl:3"}],
            r"^a\.jsonl:3: column 'text' is blank",
        ),
        (["the cat"], "^document 0: a row must be an object"),
    ],
)
def test_bad_rows_are_named(word_tokenizer, documents, message):
    with pytest.raises(DataError, match=message):
        tokenise(documents, word_tokenizer)


def test_text_without_a_token_is_refused(word_tokenizer):
    word_tokenizer.normalizer = normalizers.Replace("mat", "")
    with pytest.raises(DataError, match=r"b\.txt: the tokenizer finds no token"):
        tokenise([{"text": "mat", "source": "b.txt"}], word_tokenizer)


def test_tokenizer_of_another_model_is_refused(word_tokenizer):
    assert tokenise(DOCUMENTS, word_tokenizer, vocab_size=8)
    with pytest.raises(
        DataError, match=r"a\.txt: token id 7 .* vocab_size=7\. Use the"
    ):
        tokenise(DOCUMENTS, word_tokenizer, vocab_size=7)


def test_unknown_end_token_lists_the_known(word_tokenizer):
    with pytest.raises(
        DataError, match=r"end='<\|endoftxt\|>' .*; did you mean '<\|end"
    ):
        tokenise(DOCUMENTS, word_tokenizer, end="<|endoftxt|>")


def test_file_to_batch(word_tokenizer, tmp_path):
    """The whole way, as an experiment goes it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the cat sat"}\n{"text": "on a mat"}\n')
    sequences = tokenise(read(path), word_tokenizer, vocab_size=8)
    batch = Loader(pack(sequences, seq_len=3), batch_size=2).batch(5)
    assert isinstance(batch, Batch)
    leaves = jax.tree.leaves(batch)
    assert [leaf.dtype for leaf in leaves] == [np.int32, np.int32, np.float32, np.int32]
    assert {leaf.shape for leaf in leaves} == {(2, 3)}


class TestLossSpans:
    """`on a mat` is [4, 5, 6]; its words end at characters 2, 4 and 8."""

    def masked(self, tokenizer, spans, text="on a mat"):
        row = {"text": text, "source": "b.txt", "loss_spans": spans}
        (sequence,) = tokenise([row], tokenizer)
        assert isinstance(sequence, np.ma.MaskedArray)
        assert sequence.dtype == np.int32
        return sequence.tolist()

    @pytest.mark.parametrize(
        "spans, expected",
        [
            ([[0, 8]], [4, 5, 6, 7]),
            ([[3, 8]], [None, 5, 6, 7]),  # the end token follows what is trained on
            ([[0, 2]], [4, None, None, None]),
            ([[0, 2], [5, 8]], [4, None, 6, 7]),
            ([[0, 4], [4, 8]], [4, 5, 6, 7]),
            ([[3, 3], [5, 7]], [None, None, None, None]),
            ([[0, 1], [7, 8]], [None, None, 6, 7]),  # where its last character lies
            ([(2, 4)], [None, 5, None, None]),
        ],
    )
    def test_a_token_counts_where_its_last_character_lies(
        self, word_tokenizer, spans, expected
    ):
        if expected == [None] * 4:
            with pytest.raises(DataError, match=r"b\.txt: no token lies in loss_spans"):
                self.masked(word_tokenizer, spans)
        else:
            assert self.masked(word_tokenizer, spans) == expected

    def test_characters_are_counted_and_not_bytes(self, word_tokenizer):
        text = "é🐍 cat"
        assert self.masked(word_tokenizer, [[3, 6]], text) == [None, 2, 7]
        assert self.masked(word_tokenizer, [[0, 2]], text) == [0, None, None]

    def test_a_begin_token_is_not_learnt_and_an_added_end_is(self, word_tokenizer):
        word_tokenizer.add_special_tokens(["<s>", "</s>"])
        word_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 8), ("</s>", 9)]
        )
        found = self.masked(word_tokenizer, [[3, 8]])
        assert found == [None, None, 5, 6, 9, 7]
        assert self.masked(word_tokenizer, [[0, 8]]) == [None, 4, 5, 6, 9, 7]

    def test_a_token_of_several_bytes_of_one_character(self):
        """Byte-level, as SmolLM2: each part of a character has the span of all."""
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(BYTES)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        row = {"text": "aé b", "source": "", "loss_spans": [[1, 2], [3, 4]]}
        (found,) = tokenise([row], tokenizer)
        assert np.ma.getmaskarray(found).tolist() == [
            *(True, False, False, True, False),
            False,
        ]

    @pytest.mark.parametrize(
        "spans",
        [
            *([], [[]], [1, 2], [[1]], [[1, 2, 3]], [[1], [2, 3]], "text", 7, {"a": 1}),
            *([[0.0, 1.0]], [[True, 2]], [[-1, 2]], [[0, 9]], [[3, 1]]),
            *([[4, 8], [0, 2]], [[0, 5], [4, 8]], [[0, 2**70]], [["0", "1"]]),
        ],
        ids=str,
    )
    def test_spans_outside_of_the_text_are_refused(self, word_tokenizer, spans):
        with pytest.raises(DataError, match=r"^b\.txt: loss_spans=.* must be pairs"):
            self.masked(word_tokenizer, spans)

    def test_other_documents_count_whole(self, word_tokenizer):
        rows = [*DOCUMENTS, {**DOCUMENTS[0], "loss_spans": None}]
        sequences = tokenise(rows, word_tokenizer)
        assert not any(isinstance(ids, np.ma.MaskedArray) for ids in sequences)

    def test_file_to_batch(self, word_tokenizer, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("q,a\nthe cat ,sat\n,on a mat\n")
        documents = read(path, prompt="q", completion="a")
        sequences = tokenise(documents, word_tokenizer, vocab_size=8)
        packed, padded = pack(sequences, 7), pad(sequences, 3)
        assert packed.targets.tolist() == [[2, 3, 7, 4, 5, 6, 7]]
        # Of a document apart from the one before, the first token is no target.
        assert packed.weights.tolist() == [[0, 1, 1, 0, 1, 1, 1]]
        assert padded.targets.tolist() == [[2, 3, 7], [5, 6, 7]]
        assert padded.weights.tolist() == [[0, 1, 1], [1, 1, 1]]


class TestEnd:
    """A text that ends already gets no second end."""

    @pytest.fixture
    def tokenizer(self, word_tokenizer):
        word_tokenizer.add_special_tokens(["<s>", "</s>"])
        word_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 8), ("</s>", 9)]
        )
        return word_tokenizer

    def test_that_the_tokenizer_adds(self, tokenizer):
        (ids,) = tokenise([{"text": "the cat"}], tokenizer, end="</s>")
        assert ids.tolist() == [8, 1, 2, 9]
        row = {"text": "the cat", "loss_spans": [[4, 7]]}
        (ids,) = tokenise([row], tokenizer, end="</s>")
        assert ids.tolist() == [None, None, 2, 9]

    @pytest.mark.parametrize("text", ["the cat </s>", "the cat</s>", "the cat </s> \n"])
    def test_that_is_spelled_out(self, tokenizer, text):
        (ids,) = tokenise(
            [{"text": text}], tokenizer, end="</s>", add_special_tokens=False
        )
        assert ids.tolist() == [1, 2, 9]

    def test_blanks_that_are_tokens_may_follow_it(self):
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(BYTES)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["</s>"])
        end = tokenizer.token_to_id("</s>")
        row = {"text": "a</s>\n", "loss_spans": [[0, 6]]}
        (ids,) = tokenise([row], tokenizer, end="</s>")
        assert (ids.size, ids[1]) == (3, end)
        (ids,) = tokenise([{"text": "a</s>b"}], tokenizer, end="</s>")
        assert ids.tolist().count(end) == 2

    def test_what_goes_on_has_a_begin_and_no_end(self, tokenizer):
        assert encode_start(tokenizer, "the cat") == [8, 1, 2]
        assert encode_start(tokenizer, "") == [8]
        assert encode_start(tokenizer, "", add_special_tokens=False) == []
        tokenizer.enable_truncation(2)
        assert encode_start(tokenizer, "the cat sat") == [8, 1, 2, 3]

    def test_documents_say_whether_anything_is_added(self, tokenizer):
        rows = [
            {"text": "the", "add_special_tokens": flag} for flag in (None, False, True)
        ]
        assert lists(tokenise(rows, tokenizer, end="</s>")) == [
            [8, 1, 9],
            [1, 9],
            [8, 1, 9],
        ]
        found = tokenise(rows, tokenizer, end="</s>", add_special_tokens=False)
        assert lists(found) == [[1, 9]] * 3


def test_bad_documents_are_left_out_and_counted(word_tokenizer):
    rows = [*DOCUMENTS, {"text": " "}, {"txt": "a"}, {"text": END_OF_ANOTHER}]
    word_tokenizer.add_special_tokens([END_OF_ANOTHER])
    with pytest.raises(DataError, match=r"^document 3: column 'text' is blank"):
        tokenise(rows, word_tokenizer, vocab_size=8)
    message = r"^3 of 6 rows left out\. The first: document 3: "
    with pytest.warns(DataWarning, match=message):
        found = tokenise(rows, word_tokenizer, vocab_size=8, skip_bad_rows=True)
    assert lists(found) == IDS
    with pytest.raises(DataError, match=r"^document 0: column 'text' is blank"):
        tokenise(rows[3:], word_tokenizer, vocab_size=8, skip_bad_rows=True)


def test_a_text_that_the_tokenizer_breaks_at_is_named(word_tokenizer, capfd):
    """Its core panics, which is no Exception."""
    pattern = Regex(r"([ -~]+)*[^ -~]")
    word_tokenizer.normalizer = normalizers.Replace(pattern, "")
    rows = [DOCUMENTS[1], {"text": "a" * 40, "source": "b.jsonl:7"}]
    with pytest.raises(
        DataError, match=r"^b\.jsonl:7: the tokenizer fails at the text"
    ):
        tokenise(rows, word_tokenizer)
