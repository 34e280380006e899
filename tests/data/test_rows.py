"""CSV and Parquet: what another writer wrote arrives unchanged, or one clear error."""

import csv
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import count, outcomes

from jmem.data.document import DataError
from jmem.data.text import read

TEXTS = [
    "plain",
    'say "hello", then go',
    "two\nlines",
    "carriage\r\nreturn\rtoo",
    "é🐍\x00\u2028 end",
    "2020-01-01 00:00:00",
    "1",
    "NA",
    " spaces ",
    "x" * 200_000,  # beyond the csv module's own limit
]


def all_texts(path):
    """Reads a mutant; a text that comes out of it is not blank."""
    assert all(read(path)["text"][:])


class TestCsv:
    def test_what_the_csv_module_writes(self, tmp_path):
        """RFC 4180 line ends, quotes doubled, fields over several lines."""
        path = tmp_path / "a.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "body"])
            writer.writerows(enumerate(TEXTS))
        data = read(path, column="body")
        assert data["text"][:] == TEXTS
        starts = [2, 3, 4, 6, 9, 10, 11, 12, 13, 14]  # a lone \r ends a line too
        assert data["source"][:] == [f"{path}:{line}" for line in starts]

    def test_blank_lines_and_a_byte_order_mark(self, write):
        path = write("a.csv", "\ufeff\ntext,n\n\nOne.,1\n\nTwo.,2\n\n")
        assert read(path).to_list() == [
            {"text": "One.", "source": f"{path}:4"},
            {"text": "Two.", "source": f"{path}:6"},
        ]

    def test_the_limit_of_a_field_is_the_processs_again(self, write):
        before = csv.field_size_limit()
        read(write("a.csv", "text\n" + "x" * 300_000))
        with pytest.raises(DataError):
            read(write("b.csv", 'text\n"' + "x" * 300_000))
        assert csv.field_size_limit() == before

    @pytest.mark.parametrize(
        "content, message",
        [
            ("txt,id\na,1\n", r"a\.csv:2: no column 'text' among \['id', 'txt'\]; did"),
            ("text;id\na;1\n", r"a\.csv:2: no column 'text' among \['text;id'\]"),
            ("text,id\na,1\nb\n", r"a\.csv:3: 1 field\(s\), but the header names 2: "),
            ("text,id\nfine,1\na, b,2\n", r"a\.csv:3: 3 field\(s\), but .* Quote"),
            ("text\n \n", r"a\.csv:2: column 'text' is blank"),
            ('text\n""\n', r"a\.csv:2: column 'text' is blank"),
            ('text\n"two\nlines"\n\n"open\n', r"a\.csv:5: not CSV \(unexpected end of"),
            ('text\n"a"b\n', r"a\.csv:2: not CSV \(',' expected after '\"'\).*doubled"),
            ("text,text\na,b\n", r"a\.csv: the header .* names a column twice"),
            ("text,id\n", r"a\.csv: holds no text, only blank lines or a header"),
            ("\n\n", r"a\.csv: holds no text"),
            ("", r"a\.csv: is empty"),
            (b"text\nna\xefve\n", r"a\.csv:2: byte 0xef is not UTF-8"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_bad_files_are_named(self, write, content, message):
        path = write("a.csv", content)
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))

    def test_mutated_files_are_read_or_refused(self, tmp_path):
        draw = random.Random(3)
        original = b'text,id\nalpha,1\n"be, ta",2\n"ga""mma\nd",3\ndelta,4\n'

        def mutant():
            content = bytearray(original)
            for _ in range(draw.randint(1, 2)):
                place = draw.randrange(len(content))
                change = draw.choice([b"", b",", b'"', b"\n", b"\r", b"\0", b"\xe9"])
                content[place : place + draw.randint(0, 2)] = change
            return bytes(content)

        mutants = (mutant() for _ in range(count(300)))
        found = outcomes(mutants, tmp_path / "m.csv", all_texts, DataError)
        assert sum(found.values()) == count(300)
        assert min(found.values()) > 20, found


class TestParquet:
    def make(self, path, table, **options):
        pq.write_table(table, path, **options)
        return path

    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    )
    def test_what_pyarrow_writes(self, tmp_path, kind):
        texts = [text for text in TEXTS if text.strip()]
        columns = {"id": range(len(texts)), "body": pa.array(texts).cast(kind)}
        table = pa.table({**columns, "nested": [{"x": [i]} for i in columns["id"]]})
        path = self.make(tmp_path / "a.parquet", table, row_group_size=3)
        data = read(path, column="body")
        assert data["text"][:] == texts
        rows = range(1, len(texts) + 1)
        assert data["source"][:] == [f"{path}:{row}" for row in rows]

    def test_a_dataset_of_datasets(self, tmp_path):
        import datasets

        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"text": ["One.", "Two."]}).to_parquet(str(path))
        assert read(path)["text"][:] == ["One.", "Two."]

    @pytest.mark.parametrize(
        "columns, message",
        [
            ({"txt": ["a"]}, r"no column 'text' among \['txt'\]; did you mean 'txt'\?"),
            ({"text": [1, 2]}, r"column 'text' holds int64, not strings"),
            ({"text": [b"a"]}, r"column 'text' holds binary, not strings"),
            ({"text": [["a"]]}, r"column 'text' holds list<.*string>, not strings"),
            ({"text": [None]}, r"column 'text' holds null, not strings"),
            ({"text": ["a", None]}, r":2: column 'text' holds NoneType, not a string"),
            ({"text": ["a", " "]}, r":2: column 'text' is blank"),
            ({"text": pa.array([], pa.string())}, r"holds no text"),
        ],
        ids=["absent", "int", "bytes", "list", "null", "one null", "blank", "none"],
    )
    def test_bad_columns_are_named(self, tmp_path, columns, message):
        path = self.make(tmp_path / "a.parquet", pa.table(columns))
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + message):
            read(path)

    def test_a_column_that_is_there_twice(self, tmp_path):
        table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
        path = self.make(tmp_path / "a.parquet", table)
        with pytest.raises(DataError, match=r"column 'text' is there twice"):
            read(path)

    def test_a_column_beside_another_that_starts_like_it(self, tmp_path):
        table = pa.table({"text.b": ["no"], "text": ["yes"], "c.text": ["no"]})
        path = self.make(tmp_path / "a.parquet", table)
        assert read(path)["text"][:] == ["yes"]
        assert read(path, column="text.b")["text"][:] == ["no"]

    def test_truncated_at_any_place(self, tmp_path):
        table = pa.table({"text": ["héllo " * 20, "b"]})
        raw = self.make(tmp_path / "a.parquet", table).read_bytes()
        path = tmp_path / "b.parquet"
        for length in {1, 4, 8, len(raw) // 2, len(raw) - 8, len(raw) - 1}:
            path.write_bytes(raw[:length])
            with pytest.raises(DataError, match=r"b\.parquet: not readable as Parquet"):
                read(path)

    def test_other_bytes(self, write):
        path = write("a.parquet", '{"text": "I am JSON, not Parquet."}\n')
        with pytest.raises(DataError, match=r"not readable as Parquet .*magic bytes"):
            read(path)

    def test_a_checksum_that_does_not_hold(self, tmp_path):
        table = pa.table({"text": ["Hello there."] * 9})
        options = {"compression": "none", "use_dictionary": False}
        path = self.make(
            tmp_path / "a.parquet", table, write_page_checksum=True, **options
        )
        path.write_bytes(path.read_bytes().replace(b"Hello", b"Jello"))
        with pytest.raises(DataError, match=r"not readable .*CRC"):
            read(path)

    def test_mutated_files_are_read_or_refused(self, tmp_path):
        table = pa.table({"text": [f"héllo {i}" for i in range(30)]})
        path = self.make(tmp_path / "a.parquet", table, row_group_size=10)
        original, draw = path.read_bytes(), random.Random(5)

        def mutant():
            content = bytearray(original)
            place = draw.randrange(len(content))
            change = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff", b"", b"a"])
            content[place : place + draw.randint(1, 4)] = change
            return bytes(content)

        mutants = (mutant() for _ in range(count(200)))
        found = outcomes(mutants, path, all_texts, DataError)
        assert sum(found.values()) == count(200)
        assert min(found.values()) > 5, found

    def test_text_that_is_not_utf8(self, tmp_path):
        array = pa.Array.from_buffers(
            pa.string(),
            1,
            [None, pa.py_buffer(b"\0\0\0\0\x05\0\0\0"), pa.py_buffer(b"na\xefve")],
        )
        path = self.make(tmp_path / "a.parquet", pa.table({"text": array}))
        with pytest.raises(DataError, match=r"not readable as Parquet .*utf-8"):
            read(path)
