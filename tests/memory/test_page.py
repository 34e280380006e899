"""Reports as Markdown and HTML."""

import dataclasses
import html.parser
import re

import jax
import pytest

from jmem.memory import diff, page
from jmem.memory.measure import measure
from jmem.memory.report import WIDTH
from jmem.program import Program
from jmem.targets import resolve


def test_markdown_has_every_part(report_of):
    report = report_of("deep rebuilt")
    text = page.write_markdown(report)
    for part in ("# xs_step on h200", "could go**", "| kv cache |", "By scope"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_html_is_one_well_formed_file(report_of):
    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen, self.links = [], set(), []

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)
            self.links += [v for k, v in attrs if k in ("src", "href")]
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page.write_html(report_of("mlp")))
    assert not reader.open
    assert {"h1", "table", "img", "pre"} <= reader.seen
    assert "script" not in reader.seen
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)


def test_names_cannot_break_out(report_of):
    report = dataclasses.replace(report_of("mlp"), name="<b>|x")
    assert "<b>" not in page.write_html(report).split("<pre>")[0]
    assert "# &lt;b&gt;\\|x on" in page.write_markdown(report)


HOSTILE = "[bold]<script>a\x1b[2J\n| `$\\frac` |\u202e\x9b[link](javascript:b)"


@pytest.fixture(scope="module")
def hostile():
    """A report in which every name is hostile: argument, function, scope, card."""

    def step(**arrays):
        with jax.named_scope(HOSTILE):
            return {name: array @ array for name, array in arrays.items()}

    step.__name__ = HOSTILE
    x = {HOSTILE: jax.ShapeDtypeStruct((1024, 1024), "f4")}
    card = dataclasses.replace(resolve("l4"), name=HOSTILE)
    program = Program(lambda x: step(**x), (x,), labels={HOSTILE: (0, HOSTILE)})
    report = measure(program, target=card, bounds=False, cache=False)
    row = dataclasses.replace(report.rows[0], source=f"{HOSTILE}.py:1", op=HOSTILE)
    return dataclasses.replace(
        report, name=HOSTILE, flags=(HOSTILE,), rows=(row, *report.rows)
    )


def test_a_terminal_gets_nothing_to_obey(hostile):
    for text in (hostile.table(), str(diff(hostile, hostile)), str(hostile.fits())):
        assert all(line.isprintable() for line in text.split("\n"))
        assert "a\\x1b[2J\\n" in text
    assert max(map(len, hostile.table().split("\n")[:-3])) <= WIDTH


def test_hostile_names_as_markdown(hostile):
    text = page.write_markdown(hostile)
    outside = "\n".join(n for n in text.split("\n") if not n.startswith("    "))
    assert "<script>" not in outside
    assert "&lt;script&gt;" in outside
    assert not re.search(r"(?<!\\)\[(?!bold)", outside)  # no link of another's
    assert all(line.isprintable() for line in text.split("\n"))
    rows = [line for line in outside.split("\n") if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(cells) == {4, 7}  # of 3 and of 6 columns


def test_hostile_names_as_html(hostile):
    text = page.write_html(hostile)  # and drawn, where `$` begins no formula
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_sums_by_scope_and_line_are_the_peak(report_of):
    for name in ("mlp", "scanned", "deep rebuilt"):
        report = report_of(name)
        peak = report.device_bytes - report.fragmentation
        assert sum(report.by_scope().values()) == peak
        assert sum(report.by_source().values()) == peak
