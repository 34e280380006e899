"""Reports as Markdown and HTML."""

import dataclasses
import html.parser

from jmem.memory import page


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
    assert "# <b>\\|x on" in page.write_markdown(report)


def test_sums_by_scope_and_line_are_the_peak(report_of):
    for name in ("mlp", "scanned", "deep rebuilt"):
        report = report_of(name)
        peak = report.device_bytes - report.fragmentation
        assert sum(report.by_scope().values()) == peak
        assert sum(report.by_source().values()) == peak
