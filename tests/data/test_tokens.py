"""`tokenise`: every token of every document, in order, and closed by the end token."""

import datasets
import numpy as np
import pytest
from tokenizers import normalizers, processors

from jmem.data import tokens
from jmem.data.batch import Batch
from jmem.data.document import DataError
from jmem.data.loader import Loader
from jmem.data.text import read
from jmem.data.tokens import tokenise
from jmem.data.windows import pack

DOCUMENTS = [
    {"text": "the cat sat", "source": "a.txt"},
    {"text": "on a mat", "source": "b.txt"},
    {"text": "the dog", "source": "c.txt"},
]
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
    assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.float32]
    assert {leaf.shape for leaf in batch} == {(2, 3)}
