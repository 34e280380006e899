"""What a run found, as terminal tables, report.md and report.json.

Numbers are kept as they were computed and formatted only when they are shown: a column
says how (`gib`, `seconds`, ...), a plain one shows what `text` makes of a value. None
is shown as "–" in every column.
"""

import dataclasses
import math
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jmem.disk import seal
from jmem.memory.escape import escape_controls, escape_lines, escape_markdown

GiB = 2**30
DASH = "–"
"""What a table shows where there is nothing to show."""


# Numbers ------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A value in words: four significant digits, thousands separated, "–" for None.

    >>> text(1234567), text(0.000123456), text(2.0), text(None), text(True)
    ('1,234,567', '0.0001235', '2', '–', 'yes')
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def _make_format(form: str, factor: float) -> Callable[[float], str]:
    """A function that formats `factor` times a value."""
    return lambda value: form.format(value * factor)


gib = _make_format("{:,.2f} GiB", 1 / GiB)
"""Bytes as GiB with two decimals."""
gib_number = _make_format("{:,.2f}", 1 / GiB)
"""The same, for a table whose title names the unit."""
mib = _make_format("{:,.1f} MiB", 1 / 2**20)
"""Bytes as MiB with one decimal."""
kib = _make_format("{:,.1f} KiB", 1 / 2**10)
"""Bytes as KiB with one decimal."""
loss = "{:.4f}".format
"""A loss in nats a token."""
percent = _make_format("{:.1f} %", 100)
"""A fraction as percent."""
rate = "{:,.0f}/s".format
"""Tokens, or anything else, a second."""
milliseconds = _make_format("{:.2f} ms", 1e3)
"""A duration in seconds as milliseconds."""
score = "{:.2f}".format
"""A mark from 0 to 100, or anything else with two decimals."""


def share(value: float) -> str:
    """A fraction as percent with as many digits as it has: of a budget, in a name.

    >>> share(0.125), share(0.5)
    ('12.5 %', '50 %')
    """
    return f"{100 * value:g} %"


def seconds(value: float) -> str:
    """A duration: seconds with one decimal, minutes from two minutes on.

    >>> seconds(3.14159), seconds(250.0)
    ('3.1 s', '4:10 min')
    """
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60}:{int(value) % 60:02} min"


# Tables -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's head, and how its values are shown."""

    name: str
    show: Callable[[Any], str] = text


def make_columns(show: Callable[[Any], str], *names: str) -> list[Column]:
    """Columns of these names, whose values are all shown by `show`."""
    return [Column(name, show) for name in names]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values under named columns; the first column names the row."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {row!r} has {len(row)} values for "
                    f"{len(self.columns)} columns."
                )
        names = [str(row[0]) for row in self.rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"table {self.title!r}: two rows are named {min(twice)!r}; the first "
                "column names a row."
            )

    def cells(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [
            [DASH if v is None else c.show(v) for c, v in zip(self.columns, row)]
            for row in self.rows
        ]

    def rich(self) -> Any:
        """The table for a terminal, without its title: rich would wrap it."""
        from rich import box, table
        from rich.text import Text

        shown = table.Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            style = None if index else "bold"
            justify, whole = self._justify(index), not index
            head = Text(escape_controls(column.name))
            shown.add_column(head, style=style, justify=justify, no_wrap=whole)
        for row in self.cells():
            shown.add_row(*(Text(escape_controls(cell)) for cell in row))
        return shown

    def _justify(self, index: int) -> Literal["left", "right"]:
        """Numbers are to the right, but in the column that names the rows."""
        values = [row[index] for row in self.rows]
        numbers = index and all(isinstance(v, int | float | None) for v in values)
        return "right" if numbers else "left"

    def markdown(self) -> str:
        """The table for report.md."""
        heads = [column.name for column in self.columns]
        rules = {"left": "---", "right": "---:"}
        ruled = [rules[self._justify(index)] for index in range(len(heads))]
        lines = [
            "| " + " | ".join(cells) + " |"
            for cells in [
                map(escape_markdown, heads),
                ruled,
                *(map(escape_markdown, row) for row in self.cells()),
            ]
        ]
        return "\n".join([f"### {escape_markdown(self.title)}", "", *lines])

    def json(self) -> dict[str, dict[str, Any]]:
        """Row name -> column -> value as computed, so that a value has an address."""
        heads = [column.name for column in self.columns[1:]]
        return {str(row[0]): dict(zip(heads, row[1:])) for row in self.rows}


# Reports ------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """All that a run has to say, in the order it was said."""

    config: Mapping[str, Any]
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What ran: experiment, command, versions, device, status, times."""
    parts: list[Table | str] = dataclasses.field(default_factory=list)
    """Tables and notes."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Memory reports by program, as plain values."""
    programs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Hash of the lowered StableHLO of each program: `experiments.harness.record`."""
    plots: list[str] = dataclasses.field(default_factory=list)
    """File names of the pictures."""

    def json(self) -> str:
        """report.json, with its digest in it."""
        values = {
            **self.head,
            "config": self.config,
            "tables": {p.title: p.json() for p in self.parts if isinstance(p, Table)},
            "notes": [p for p in self.parts if isinstance(p, str)],
            "memory": self.memory,
            "programs": self.programs,
            "plots": self.plots,
        }
        return seal(_make_plain(values), indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """report.md."""
        command = escape_controls(self.head["command"])
        lines = [f"# {escape_markdown(self.head['experiment'])}", ""]
        lines += [_quote_code(command), ""]
        lines += [
            f"- {name}: {_format_inline(self.head[name])}"
            for name in list(self.head)[2:]
        ]
        for part in self.parts:
            lines += [
                "",
                part.markdown() if isinstance(part, Table) else _format_note(part),
            ]
        for plot in self.plots:
            link = urllib.parse.quote(plot)
            lines += ["", f"![{escape_markdown(pathlib.Path(plot).stem)}]({link})"]
        return "\n".join(lines) + "\n"


def _format_note(words: str) -> str:
    """A paragraph, or several lines as they are."""
    if "\n" not in words:
        return escape_markdown(words)
    fence = "`" * max(3, _count_quotes(words) + 1)
    return f"{fence}text\n{escape_lines(words)}\n{fence}"


def _quote_code(words: str) -> str:
    """A code span, whatever quotes are in it."""
    quotes = _count_quotes(words)
    around = "`" * (quotes + 1)
    return f"{around} {words} {around}" if quotes else f"`{words}`"


def _count_quotes(words: str) -> int:
    """The length of the longest run of back quotes."""
    return max(map(len, re.findall("`+", words)), default=0)


def _format_inline(value: Any) -> str:
    """A value of the report's head on one line."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{escape_markdown(name)} {_format_inline(v)}" for name, v in value.items()
        )
    return escape_markdown(text(value))


def _make_plain(value: Any) -> Any:
    """Values that JSON knows; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _make_plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy's and JAX's scalars and arrays
        return _make_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
