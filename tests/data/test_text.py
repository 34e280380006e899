"""`read`: what is in the files arrives unchanged, or one clear error does."""

import json
import random
import re
import socket
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from mutations import count, outcomes

from jmem.data.document import DataError, DataWarning
from jmem.data.text import check_sources, read


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestJsonLines:
    def test_rows_carry_text_and_line(self, write):
        path = write(
            "a.jsonl", '\ufeff{"text": "One."}\n\n  \n{"text": "Two.", "n": 1}'
        )
        data = read(path)
        assert isinstance(data, datasets.Dataset)
        assert data.to_list() == [
            {"text": "One.", "source": f"{path}:1"},
            {"text": "Two.", "source": f"{path}:4"},
        ]

    @pytest.mark.parametrize(
        "text",
        ["2020-01-01 00:00:00", "1", "null", " a\r\nb\x00\u2028c ", "é🐍", "NaN"],
    )
    def test_strings_stay_as_they_are(self, write, text):
        """`load_dataset("json")` gives a datetime for the first of these."""
        assert read(write("a.jsonl", jsonl({"text": text})))["text"][:] == [text]

    def test_other_columns_may_hold_anything(self, write):
        rows = [{"text": "a", "m": 1}, {"text": "b", "m": {"x": []}}, {"text": "c"}]
        assert read(write("a.jsonl", jsonl(*rows)))["text"][:] == ["a", "b", "c"]

    def test_column_is_named_by_the_caller(self, write):
        path = write("a.jsonl", jsonl({"body": "a", "text": "no"}))
        assert read(path, column="body")["text"][:] == ["a"]

    @pytest.mark.parametrize(
        "line, message",
        [
            ("{'text': 'a'}", r"a\.jsonl:2: not JSON \(.* at character 2\)\. .*a line"),
            ("[", r"a\.jsonl:2: not JSON .* array must be written out"),
            (
                '{"text": "a"} {"text": "b"}',
                r":2: not JSON \(Extra data at character 15",
            ),
            ("[" * 100_000, r":2: not JSON \(nested too deeply"),
            (f'{{"n": {"1" * 5000}}}', r":2: not JSON \(Exceeds the limit"),
            ('"text"', r":2: a row must be an object with a column 'text', not str"),
            (
                '{"txt": "a", "id": 1}',
                r":2: no column 'text' among \['id', 'txt'\]; did ",
            ),
            ('{"text": 7}', r":2: column 'text' holds int, not a string"),
            ('{"text": null}', r":2: column 'text' holds NoneType"),
            ('{"text": " \\n\\t"}', r":2: column 'text' is blank.* Remove the row"),
            (
                '{"text": "ab\\ud83d"}',
                r":2: .* lone surrogate '\\ud83d' at character 2",
            ),
            (b'{"text": "\xe9"}', r":2: byte 0xe9 is not UTF-8.*iconv"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_bad_line_is_named(self, write, line, message):
        line = line.encode() if isinstance(line, str) else line
        path = write("a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))

    def test_mutated_files_are_read_or_refused(self, tmp_path):
        """Never another exception, and never a text that the named line lacks."""
        draw = random.Random(20)
        rows = [{"text": f"héllo {i}", "meta": {"k": [i, None]}} for i in range(4)]
        original = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

        def mutant():
            content = bytearray(original.encode())
            for _ in range(draw.randint(1, 2)):
                place, kind = draw.randrange(len(content)), draw.randrange(4)
                if kind == 0:
                    content[place] = draw.choice([*b'abcdefgh1 {"', 0, 0xE9])
                elif kind == 1:
                    del content[place : place + draw.randint(1, 9)]
                elif kind == 2:
                    content[place:place] = draw.choice([b"\n", b'"', b"\\ud800", b"}"])
                else:
                    content = content[: place + 1]
            return bytes(content)

        def texts_of_their_lines(path):
            data = read(path)
            lines = path.read_bytes().split(b"\n")
            for row in data.to_list():
                number = int(row["source"].rpartition(":")[2])
                line = lines[number - 1].decode("utf-8-sig")
                assert json.loads(line)["text"] == row["text"]

        mutants = (mutant() for _ in range(count(300)))
        path = tmp_path / "m.jsonl"
        found = outcomes(mutants, path, texts_of_their_lines, DataError)
        assert sum(found.values()) == count(300)
        assert min(found.values()) > 20, found


class TestPlainText:
    def test_a_file_is_one_document(self, write):
        path = write("a.txt", "\ufeffOne.\r\n\r\nTwo.\rThree.\n")
        assert read(path).to_list() == [
            {"text": "One.\n\nTwo.\nThree.\n", "source": str(path)}
        ]

    def test_a_paragraph_is_one_when_asked(self, write):
        path = write("a.txt", "\n  \nOne,\n  one.\n \t\n\nTwo.\n")
        assert read(path, unit="paragraph").to_list() == [
            {"text": "One,\n  one.", "source": f"{path}:3"},
            {"text": "Two.", "source": f"{path}:7"},
        ]

    @pytest.mark.parametrize("unit", ["file", "paragraph"])
    def test_not_utf8_names_the_line(self, write, unit):
        path = write("a.txt", b"fine\n\nna\xefve\n")
        with pytest.raises(DataError, match=r"a\.txt:3: byte 0xef is not UTF-8"):
            read(path, unit=unit)


class TestFiles:
    def test_files_keep_their_order(self, write):
        one = write("1.jsonl", jsonl({"text": "a"}, {"text": "b"}))
        two = write("2.txt", "c")
        assert read(two, one)["text"][:] == ["c", "a", "b"]

    def test_any_bad_file_is_found_before_a_line_is_read(self, write, tmp_path):
        good = write("good.jsonl", "not JSON at all")
        with pytest.raises(DataError, match=r"gone\.txt: no such file"):
            read(good, tmp_path / "gone.txt")

    def test_missing_file_offers_the_nearest(self, write, tmp_path):
        write("train.jsonl", "")
        with pytest.raises(
            DataError, match=r"no such file; did you mean 'train\.jsonl"
        ):
            read(tmp_path / "trian.jsonl")
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "no folder" / "a.jsonl")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    @pytest.mark.parametrize("unit", ["file", "paragraph"])
    @pytest.mark.parametrize(
        "content, rule", [("", "is empty"), (" \n\n\t\n", "blank")]
    )
    def test_no_text(self, write, name, unit, content, rule):
        path = write(name, content)
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + rule):
            read(path, unit=unit)

    def test_other_kinds_are_pointed_to_datasets(self, write, tmp_path):
        message = (
            r"a\.xlsx: is not \.jsonl, \.json, \.csv, \.parquet or \.txt.*load_data"
        )
        with pytest.raises(DataError, match=message):
            read(write("a.xlsx", "text\nhello\n"))
        with pytest.raises(DataError, match="is a folder"):
            read(tmp_path)

    def test_unreadable_file_says_why(self, write, monkeypatch):
        path = write("a.jsonl", jsonl({"text": "a"}))

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", refuse)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            read(path)

    def test_no_path(self):
        with pytest.raises(DataError, match="no path given"):
            read()

    def test_nothing_is_fetched_or_cached(self, write, tmp_path, monkeypatch):
        def refuse(*_):
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "socket", refuse)
        cache = tmp_path / "cache"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        data = read(write("a.jsonl", jsonl({"text": "a"}, {"text": "b"})))
        assert data.cache_files == []
        assert not cache.exists()


ROW = {"q": "Two and two? ", "a": "Four.", "text": "no"}


class TestPromptAndCompletion:
    def test_the_loss_covers_the_completion(self, write):
        path = write("a.jsonl", jsonl(ROW, {"q": "", "a": "Five."}))
        data = read(path, prompt="q", completion="a")
        assert data.to_list() == [
            {
                "text": "Two and two? Four.",
                "source": f"{path}:1",
                "loss_spans": [[13, 18]],
            },
            {"text": "Five.", "source": f"{path}:2", "loss_spans": [[0, 5]]},
        ]

    @pytest.mark.parametrize("kind", [".csv", ".parquet"])
    def test_of_any_table(self, tmp_path, kind):
        table = pa.table({name: [value] for name, value in ROW.items()})
        path = tmp_path / f"a{kind}"
        write = {".csv": pa_csv.write_csv, ".parquet": pq.write_table}[kind]
        write(table, path)
        (row,) = read(path, prompt="q", completion="a").to_list()
        assert (row["text"], row["loss_spans"]) == ("Two and two? Four.", [[13, 18]])

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"q": "x"}, r":1: no column 'a' among \['q'\]"),
            ({"a": "x"}, r":1: no column 'q' among \['a'\]"),
            ({"q": "x", "a": " "}, ":1: column 'a' is blank"),
            ({"q": None, "a": "x"}, ":1: column 'q' holds NoneType"),
            ({"q": "\ud800", "a": "x"}, ":1: column 'q' holds the lone surrogate"),
        ],
    )
    def test_bad_rows_are_named(self, write, row, message):
        with pytest.raises(DataError, match=message):
            read(write("a.jsonl", jsonl(row)), prompt="q", completion="a")

    def test_one_without_the_other_or_without_columns(self, write):
        path = write("a.jsonl", jsonl(ROW))
        with pytest.raises(DataError, match=r"completion=None go together"):
            read(path, prompt="q")
        with pytest.raises(DataError, match=r"prompt=None and .* go together"):
            read(path, completion="a")
        with pytest.raises(
            DataError, match=r"a\.txt: plain text has no columns 'q' an"
        ):
            read(write("a.txt", "x"), prompt="q", completion="a")


class TestJsonArrays:
    def test_rows_are_told_by_the_line_they_begin_in(self, write):
        path = write(
            "a.json", '\ufeff[{"text": "a"},\n\n {"text":\n"b"}, {"text": "c"}]\n'
        )
        data = read(path)
        assert data["text"][:] == ["a", "b", "c"]
        assert data["source"][:] == [f"{path}:{line}" for line in (1, 3, 4)]

    def test_json_lines_are_called_so_too(self, write):
        path = write("a.json", jsonl({"text": "a"}, {"text": "b"}))
        assert read(path)["text"][:] == ["a", "b"]

    @pytest.mark.parametrize(
        "content, message",
        [
            ('[{"text": "a"},\n{"text": }]', r"a\.json:2: not JSON .*array of rows"),
            ('[{"text": "a"}\n{"text": "b"}]', r"a\.json:1: .* does not go on with"),
            ('[{"text": "a"},', r"a\.json:1: not JSON"),
            ('[{"text": "a"}', r"a\.json:1: .* does not go on with"),
            ('[{"text": "a"}] 7', r"a\.json: holds more than an array"),
            ('["a"]', r"a\.json:1: a row must be an object .* not str"),
            ("[]", r"a\.json: holds no text"),
            ('{"data": [{"text": "a"}]}', r"a\.json:1: no column 'text'"),
            ("[" * 100_000, r"a\.json:1: not JSON \(nested too deeply"),
        ],
    )
    def test_what_is_wrong_is_named(self, write, content, message):
        with pytest.raises(DataError, match=message):
            read(write("a.json", content))


class TestDatasets:
    def test_a_folder_and_a_dataset_are_read_as_files_are(self, tmp_path):
        table = datasets.Dataset.from_list(
            [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
        )
        table.save_to_disk(tmp_path / "saved")
        found = read(tmp_path / "saved", table.with_format("numpy"))
        assert found["text"][:] == ["a", "b"] * 2
        places = [f"{tmp_path / 'saved'}:1", f"{tmp_path / 'saved'}:2"]
        assert found["source"][:] == [*places, "Dataset:1", "Dataset:2"]
        with pytest.raises(
            DataError, match=r"saved: no column 'txt' among \['n', 'tex"
        ):
            read(tmp_path / "saved", column="txt")

    def test_one_of_several_tables_is_asked_for(self, tmp_path):
        table = datasets.Dataset.from_list([{"text": "a"}])
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(
            tmp_path / "d"
        )
        with pytest.raises(DataError, match=r"tables train, test; name one .*d/train"):
            read(tmp_path / "d")
        assert read(tmp_path / "d" / "train")["text"][:] == ["a"]

    def test_a_damaged_folder_is_named(self, tmp_path):
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(DataError, match="not a folder that a Dataset was saved to"):
            read(tmp_path)

    @pytest.mark.parametrize("source", [7, None, [{"text": "a"}]])
    def test_what_is_no_source_is_refused(self, source):
        with pytest.raises(DataError, match=r"read: \w+ is neither a path nor a data"):
            check_sources("read", [source], (".jsonl", ".txt"))


CHATS = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    "row, column, hint",
    [
        (CHATS, "text", r"--chat messages"),
        (CHATS, "messages", r"--chat messages"),
        ({"conversations": []}, "text", r"--chat conversations"),
        ({"instruction": "a", "output": "b"}, "text", r"--chat instruction"),
        ({"prompt": "a", "completion": "b"}, "text", r"--prompt prompt --completion"),
        ({"body": "a"}, "text", r"--column"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_another_kind_say_so(tmp_path, kind, row, column, hint):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(jsonl(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    if kind == "parquet" and column in row:
        hint = "not strings"
    with pytest.raises(DataError, match=hint):
        read(path, column=column)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_alpacas_input_is_not_lost_in_silence(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    row = {"instruction": "Add.", "input": "", "output": "3"}

    def write(row):
        if kind == "jsonl":
            path.write_text(jsonl(row))
        else:
            pq.write_table(pa.Table.from_pylist([row]), path)

    columns: Any = {"prompt": "instruction", "completion": "output"}
    write(row)
    assert read(path, **columns)["text"][:] == ["Add.3"]
    write(row | {"input": "1, 2"})
    with pytest.raises(DataError, match=r":1: .* input, '1, 2', .*--chat instruction"):
        read(path, **columns)


def test_bad_rows_are_left_out_and_counted(write):
    rows = (
        '{"text": "a"}',
        "{",
        "[]",
        '{"text": 7}',
        '{"text": "b"}',
        '{"text": "\\ud83d"}',
    )
    path = write("a.jsonl", "\n".join(rows))
    table = write("a.csv", "text,n\nc,1\nd\ne,2\n")
    message = r"^5 of 9 rows left out\. The first: .*a\.jsonl:2: not JSON"
    with pytest.warns(DataWarning, match=message):
        data = read(path, table, skip_bad_rows=True)
    assert data["text"][:] == ["a", "b", "c", "e"]
    with pytest.raises(DataError, match=r"a\.csv:3: 1 field\(s\), but"):
        read(table)
