"""A report as a page: Markdown for an issue or a pull request, HTML for a browser.

The HTML is one file with the timeline inside, and no script.
"""

import base64
import html
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

from jmem.memory.report import GiB, MemoryReport, sized

TOP = 20
"""Rows of each table; what is smaller is summed in the last one."""

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""(title, column headings, rows)."""


def markdown(report: MemoryReport, reserve: int = GiB) -> str:
    """The report as Markdown: heading, verdict, advice, and tables."""
    lines = [f"# {_cell(report.name)} on {report.target}", "", _summary(report), ""]
    lines += [f"    {line}" for line in str(report.fits(reserve)).splitlines()] + [""]
    for advice in report.advice:
        lines.append(f"- **{sized(advice.saves_bytes)} could go**: {advice.text}")
    lines += [f"- {flag}" for flag in report.flags]
    for title, heads, rows in _tables(report):
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |"]
        lines.append(f"|{' --- |' * len(heads)}")
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def page(report: MemoryReport, reserve: int = GiB) -> str:
    """The report as one HTML file, with its timeline as a picture."""
    with tempfile.TemporaryDirectory() as folder:
        png = report.plot(pathlib.Path(folder) / "timeline.png", reserve=reserve)
        picture = base64.b64encode(png.read_bytes()).decode()
    text = html.escape
    title = text(f"{report.name} on {report.target}")
    parts = [f"<h1>{title}</h1>", f"<p>{text(_summary(report))}</p>"]
    parts.append(f"<pre>{text(str(report.fits(reserve)))}</pre>")
    said = [
        f"<b>{sized(a.saves_bytes)} could go</b>: {text(a.text)}" for a in report.advice
    ]
    said += [text(flag) for flag in report.flags]
    if said:
        parts.append("<ul>" + "".join(f"<li>{line}</li>" for line in said) + "</ul>")
    parts.append(f'<img alt="live bytes" src="data:image/png;base64,{picture}">')
    for name, heads, rows in _tables(report):
        parts.append(f"<h2>{text(name)}</h2><table><tr>{_cells('th', heads)}</tr>")
        parts += [f"<tr>{_cells('td', row)}</tr>" for row in rows]
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


def _summary(report: MemoryReport) -> str:
    low, high = map(sized, report.interval)
    between = f" (between {low} and {high})" if low != high else ""
    host = f", {sized(report.host_bytes)} in host memory" if report.host_bytes else ""
    how = "compiled for the attached GPU" if report.attached else "ahead of time"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"{sized(report.device_bytes)} on the device{between}{host}; {how}, {versions}"
    )


def _tables(report: MemoryReport) -> Iterable[Table]:
    total = report.device_bytes

    def shares(sums: dict[str, int], unnamed: str) -> list[tuple[str, ...]]:
        listed = list(sums.items())[:TOP]
        if left := list(sums.items())[TOP:]:
            listed.append((f"{len(left)} smaller", sum(held for _, held in left)))
        return [(sized(h), f"{h / total:.1%}", name or unnamed) for name, h in listed]

    by_kind = dict(sorted(report.by_kind.items(), key=lambda item: -item[1]))
    size = ("size", "share")
    yield "What fills the peak", (*size, "kind"), shares(by_kind, "")
    yield "By scope", (*size, "phase and scope"), shares(report.by_scope(), "unnamed")
    lines = shares(report.by_source(), "arguments, and what no line made")
    yield "By line", (*size, "line"), lines
    rows = [
        (
            sized(row.total_bytes),
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(tag: str, words: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(word)}</{tag}>" for word in words)
