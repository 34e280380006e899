"""A user's file as sequences: what each setting of `TextSource` changes."""

import datetime
import json
import types

import pytest
from tokenizers import processors

from jmem.data.document import DataError, DataWarning
from jmem.data.source import TextSource


@pytest.fixture
def checkpoint(word_tokenizer):
    """What `TextSource` asks of one: a tokenizer with `<s>` before every text."""
    word_tokenizer.add_special_tokens(["<s>"])
    word_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 8)]
    )
    config = types.SimpleNamespace(vocab_size=9)
    return types.SimpleNamespace(
        require_tokenizer=lambda: word_tokenizer, eos_ids=(7,), config=config
    )


@pytest.fixture
def path(tmp_path):
    rows = [{"text": "the cat"}, {"text": 7}, {"text": "a mat"}, {"text": "the"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def training(source, checkpoint):
    return [ids.tolist() for ids in source.sequences(checkpoint, 1)[0]]


def test_bad_rows_are_refused_or_left_out(checkpoint, path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'text' holds int"):
        TextSource(data=path).sequences(checkpoint, 1)
    source = TextSource(data=path, skip_bad_rows=True)
    with pytest.warns(DataWarning, match=r"^1 of 4 rows left out\. The first: .*:2: "):
        assert training(source, checkpoint) == [[8, 1, 2, 7], [8, 5, 6, 7]]


def test_the_begin_token_is_the_tokenizers_unless_refused(checkpoint, path):
    source = TextSource(data=path, skip_bad_rows=True, special_tokens=False)
    with pytest.warns(DataWarning):
        assert training(source, checkpoint) == [[1, 2, 7], [5, 6, 7]]


def test_a_text_with_a_token_that_has_no_row_is_refused(checkpoint, tmp_path):
    checkpoint.require_tokenizer().add_special_tokens(["[PAD]"])
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": "a [PAD]"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: token id 9 .* vocab_size=9"):
        TextSource(data=str(path)).sequences(checkpoint, 1)


def test_the_day_of_chats_is_that_of_the_first_start():
    """A resumed run is given it back, so that its rows are the same another day."""
    days = {datetime.date.today().isoformat()}
    date = TextSource(data="a.jsonl", chat="messages").chat_date
    assert date in days | {datetime.date.today().isoformat()}
    told = TextSource(data="a.jsonl", chat="messages", chat_date="2024-07-26")
    assert told.chat_date == "2024-07-26"
    assert TextSource(data="a.jsonl").chat_date == ""
