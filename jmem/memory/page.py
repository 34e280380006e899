"""A report as a page: Markdown for an issue or a pull request, HTML for a browser.

The HTML is one file with the timeline inside, and no script.
"""

import base64
import html
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

from jmem.memory.escape import escape_all, escape_markdown
from jmem.memory.report import GiB, MemoryReport, format_size

TOP = 20
"""Rows of each table; what is smaller is summed in the last one."""

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""(title, column headings, rows)."""


def write_markdown(report: MemoryReport, reserve: int = GiB) -> str:
    """The report as Markdown: heading, verdict, advice, and tables."""
    text = escape_markdown
    report = escape_all(report)
    lines = [
        f"# {text(report.name)} on {text(report.target)}",
        "",
        text(_write_summary(report)),
        "",
    ]
    lines += [f"    {line}" for line in str(report.fits(reserve)).splitlines()] + [""]
    for advice in report.advice:
        size = format_size(advice.saves_bytes)
        lines.append(f"- **{size} could go**: {text(advice.text)}")
    lines += [f"- {text(flag)}" for flag in report.flags]
    for title, heads, rows in _build_tables(report):
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |"]
        lines.append(f"|{' --- |' * len(heads)}")
        lines += [f"| {' | '.join(map(text, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def write_html(report: MemoryReport, reserve: int = GiB) -> str:
    """The report as one HTML file, with its timeline as a picture."""
    report = escape_all(report)
    with tempfile.TemporaryDirectory() as folder:
        png = report.plot(pathlib.Path(folder) / "timeline.png", reserve=reserve)
        picture = base64.b64encode(png.read_bytes()).decode()
    text = html.escape
    title = text(f"{report.name} on {report.target}")
    parts = [f"<h1>{title}</h1>", f"<p>{text(_write_summary(report))}</p>"]
    parts.append(f"<pre>{text(str(report.fits(reserve)))}</pre>")
    said = [
        f"<b>{format_size(a.saves_bytes)} could go</b>: {text(a.text)}"
        for a in report.advice
    ]
    said += [text(flag) for flag in report.flags]
    if said:
        parts.append("<ul>" + "".join(f"<li>{line}</li>" for line in said) + "</ul>")
    parts.append(f'<img alt="live bytes" src="data:image/png;base64,{picture}">')
    for name, heads, rows in _build_tables(report):
        parts.append(
            f"<h2>{text(name)}</h2><table><tr>{_write_cells('th', heads)}</tr>"
        )
        parts += [f"<tr>{_write_cells('td', row)}</tr>" for row in rows]
        parts.append("</table>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#22303c;max-width:72rem;"
    "margin:2rem auto;padding:0 1rem}img{max-width:100%}"
    "table{border-collapse:collapse}"
    "td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "td:first-child,th:first-child{text-align:right;white-space:nowrap}"
)


def _write_summary(report: MemoryReport) -> str:
    low, high = map(format_size, report.interval)
    between = f" (between {low} and {high})" if low != high else ""
    host = (
        f", {format_size(report.host_bytes)} in host memory"
        if report.host_bytes
        else ""
    )
    how = "compiled for the attached GPU" if report.attached else "ahead of time"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    device = f"{format_size(report.device_bytes)} on the device"
    return f"{device}{between}{host}; {how}, {versions}"


def _build_tables(report: MemoryReport) -> Iterable[Table]:
    total = report.device_bytes

    def shares(sums: dict[str, int], unnamed: str) -> list[tuple[str, ...]]:
        listed = list(sums.items())[:TOP]
        if left := list(sums.items())[TOP:]:
            listed.append((f"{len(left)} smaller", sum(held for _, held in left)))
        return [
            (format_size(h), f"{h / total:.1%}", name or unnamed) for name, h in listed
        ]

    by_kind = dict(sorted(report.by_kind.items(), key=lambda item: -item[1]))
    size = ("size", "share")
    yield "What fills the peak", (*size, "kind"), shares(by_kind, "")
    yield "By scope", (*size, "phase and scope"), shares(report.by_scope(), "unnamed")
    lines = shares(report.by_source(), "arguments, and what no line made")
    yield "By line", (*size, "line"), lines
    rows = [
        (
            format_size(row.total_bytes),
            str(row.count),
            row.kind,
            row.shape,
            " · ".join(word for word in (row.phase, row.name, row.op) if word),
            row.source,
        )
        for row in report.top(TOP)
    ]
    heads = ("size", "buffers", "kind", "each", "what", "line")
    yield "Largest buffers at the peak", heads, rows


def _write_cells(tag: str, words: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(word)}</{tag}>" for word in words)
