"""The answer to "how much memory, what fills it, does it fit": printed and saved.

A `MemoryReport` holds plain numbers and words only, so it outlives the process that
measured it: `to_json` and `from_json` lose nothing.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, ClassVar

from jmem import disk
from jmem.memory import kinds
from jmem.memory.advice import Advice
from jmem.memory.breakdown import Contents, Row, shorten_source
from jmem.memory.escape import escape_all, escape_controls

GiB = 2**30
DEFAULT_FRACTION = 0.75
"""Share of a card's memory that JAX takes at start unless told otherwise."""
WIDTH = 88
SMALL = 0.0005
"""Share of the peak below which a kind is not listed on its own."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program fits a card, and the three numbers that decide it."""

    fits: bool
    needed_bytes: int
    """Device bytes the program may need: the upper end of the report's interval."""
    usable_bytes: int
    reserve_bytes: int
    target: str
    memory_fraction: float | None
    """XLA_PYTHON_CLIENT_MEM_FRACTION that JAX must be started with; None when its
    default is enough, or no fraction is."""

    def __bool__(self):
        return self.fits

    def __str__(self):
        room = self.usable_bytes - self.reserve_bytes - self.needed_bytes
        head = "fits" if self.fits else "does not fit"
        lines = [
            f"{head} {escape_controls(self.target)}: {format_size(abs(room))} "
            f"{'to spare' if room >= 0 else 'too much'}",
            f"  needs {format_size(self.needed_bytes)}, usable "
            f"{format_size(self.usable_bytes)}, of which "
            f"{format_size(self.reserve_bytes)} kept in reserve",
        ]
        if self.memory_fraction:
            lines.append(
                f"  start JAX with XLA_CLIENT_MEM_FRACTION={self.memory_fraction:.2f}; "
                f"its default, {DEFAULT_FRACTION}, is too little"
            )
        elif self.fits:
            lines.append(
                f"  JAX's default memory fraction, {DEFAULT_FRACTION}, will do"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A report of plain values that is written as JSON and read again."""

    schema: ClassVar[int]
    """Version of the JSON; a report of another one is refused."""

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """The whole report as JSON; written to `path` when one is given."""
        text = json.dumps({"schema": self.schema} | dataclasses.asdict(self))
        if path is not None:
            disk.write_atomically(path, text + "\n")
        return text

    @classmethod
    def from_json[T: "Saved"](cls: type[T], text: str | pathlib.Path) -> T:
        """A report from `to_json`'s text, or from the path of a file of it.

        Raises:
          ValueError: not a report, or one of another version; the place is named.
        """
        if isinstance(text, pathlib.Path):
            where, raw = str(text), text.read_bytes()
        else:
            where, raw = "report", text
        values = disk.parse_json(raw, where)
        if not isinstance(values, dict) or values.pop("schema", None) != cls.schema:
            raise ValueError(f"{where}: not a {cls.__name__} of schema {cls.schema}.")
        report = _build(cls, values, where)
        if fault := report.find_fault():
            raise ValueError(f"{where}: {fault}.")
        return report

    def find_fault(self) -> str:
        """What in the values contradicts the rest; "" for a report that was made."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport(Contents, Saved):
    """Memory of one program on one target, per device of a mesh.

    `timeline.max() + fragmentation == device_bytes`.
    """

    schema: ClassVar[int] = 2
    name: str
    target: str
    attached: bool
    """Compiled for a GPU that is there, with its autotuner; else ahead of time."""
    devices: int
    compiler_bytes: int
    """Bytes of device memory that XLA was told the card has."""
    usable_bytes: int
    device_bytes: int
    """What the card must hold: arguments + outputs - aliased + temporaries +
    constants, XLA's `total_allocation_bytes`."""
    interval: tuple[int, int]
    """Device bytes with and without Triton matmuls, the smaller first. A real card's
    autotuner chooses between them, product by product."""
    host_bytes: int
    """Pinned host memory: arguments, outputs that reuse none, temporaries."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Bytes of outputs that reuse the memory of donated arguments."""
    temp_bytes: int
    flags: tuple[str, ...]
    """What the numbers leave out or a reader should know."""
    advice: tuple[Advice, ...]
    """Changes to the program, and what each would take off the peak; largest first."""
    versions: dict[str, str]
    stablehlo_hash: str
    """sha256 of the lowered text: the same program has the same, in every process."""
    options: dict[str, Any]
    compile_seconds: float
    """Seconds to trace, lower and compile (for the interval, compiled twice)."""
    cached: bool
    """Taken from the cache; `compile_seconds` are those of the first time."""

    def find_fault(self) -> str:
        """As `Saved.find_fault`: sums that are none, and sizes below 0."""
        line, rows = self.timeline, self.rows
        sizes = [*self.by_kind.values(), *self.interval, self.usable_bytes]
        sizes += [size for row in rows for size in (row.bytes, row.count)]
        if min([*sizes, *self.by_label.values(), self.host_bytes], default=0) < 0:
            return "a size is below 0"
        if sum(self.by_kind.values()) != self.device_bytes:
            return "by_kind does not sum to device_bytes"
        if len(self.interval) != 2 or self.interval[0] > self.interval[1]:
            return f"interval={self.interval} is no pair of bytes, the smaller first"
        if self.compiler_bytes < 1 or not {"jax", "jaxlib"} <= set(self.versions):
            return "compiler_bytes or versions are missing"
        if not line.by_kind or {*map(len, line.by_kind.values())} != {len(line) or -1}:
            return "the timeline's kinds are not of one length"
        held = [size for sizes in line.by_kind.values() for size in sizes]
        if not 0 <= min(held) <= max(held) <= self.device_bytes:
            return "the timeline leaves 0 to device_bytes"
        return ""

    @property
    def fragmentation(self) -> int:
        """Bytes of holes and alignment in the temporary block."""
        return self.by_kind.get(kinds.FRAGMENTATION, 0)

    def top(self, n: int = 10) -> tuple[Row, ...]:
        """The `n` largest rows at the peak; like buffers share a row."""
        return self.rows[:n]

    def by_scope(self) -> dict[str, int]:
        """Device bytes at the peak by phase and scope, the largest first.

        "backward Block/mlp" is what the backward pass computes in that scope; arguments
        go by their own names, one level deep. All but fragmentation is in the sum.
        """

        def scope(row: Row) -> str:
            if not (row.phase or row.op):
                return "/".join(row.name.split("/")[:2]) or row.kind
            return f"{row.phase} {row.name}".strip() or row.kind

        return _sum_by_name((scope(row), row.total_bytes) for row in self.rows)

    def by_layer(self) -> dict[str, int]:
        """Device bytes at the peak by numbered layer, in order; "" holds the rest.

        For models whose layers are modules of their own, as flax numbers them. Layers
        that a scan walks share one name, and are in the rest.
        """
        held = _sum_by_name(
            (find_layer(row.name), row.total_bytes) for row in self.rows
        )
        last = {"": held.pop("", 0)}
        return {name: held[name] for name in sorted(held, key=_split_number)} | last

    def by_source(self) -> dict[str, int]:
        """Device bytes at the peak by the line that made them, the largest first.

        "" holds arguments, and what no line of the program made.
        """
        return _sum_by_name((row.source, row.total_bytes) for row in self.rows)

    def fits(self, reserve: int = GiB) -> Verdict:
        """Whether the upper end of the interval leaves `reserve` bytes on the card.

        A program that fits in every number here can still fail on a card that other
        processes use, or whose libraries keep more than `usable_bytes` allows for.
        """
        if reserve < 0:
            raise ValueError(f"fits: reserve={reserve} must not be negative.")
        needed = self.interval[1]
        fits = needed <= self.usable_bytes - reserve
        fraction = (needed + reserve) / self.compiler_bytes
        raised = fits and not self.attached and fraction > DEFAULT_FRACTION
        return Verdict(
            fits=fits,
            needed_bytes=needed,
            usable_bytes=self.usable_bytes,
            reserve_bytes=reserve,
            target=self.target,
            memory_fraction=math.ceil(fraction * 100) / 100 if raised else None,
        )

    # Printed --------------------------------------------------------------------------

    def __str__(self):
        return self.table()

    def table(self, top: int = 12, reserve: int = GiB) -> str:
        """The report as text of 88 columns: kinds, largest buffers, verdict."""
        shown = escape_all(self)
        return "\n".join(
            [
                *shown._format_heading(),
                "",
                *shown._format_kinds(),
                "",
                *shown._format_largest(top),
                "",
                *(
                    textwrap.fill(line, WIDTH, subsequent_indent="      ")
                    for line in shown._format_remarks()
                ),
                *([""] if self.flags or self.advice else []),
                str(self.fits(reserve)),
            ]
        )

    def _format_remarks(self) -> list[str]:
        saving = (
            f"{format_size(a.saves_bytes)} could go: {a.text}" for a in self.advice
        )
        return [*(f"note: {flag}" for flag in self.flags), *saving]

    def _format_heading(self) -> list[str]:
        how = "compiled for the attached GPU" if self.attached else "ahead of time"
        jax, jaxlib = self.versions["jax"], self.versions["jaxlib"]
        unit = _choose_unit(self.device_bytes)
        low, high = (_format_number(end, unit) for end in self.interval)
        each = " a device" if self.devices > 1 else ""
        lines = [
            _clip(f"{self.name} on {self.target}", WIDTH),
            f"{how}, jax {jax}, jaxlib {jaxlib}, "
            + ("from the cache" if self.cached else f"{self.compile_seconds:.1f} s"),
            "",
            f"device  {_format_number(self.device_bytes, unit):>9} {unit}{each}"
            f"   {self.device_bytes:,} bytes",
        ]
        if low != high:
            lines.append(f"between {low:>9} and {high} {unit}, with and without Triton")
        if self.host_bytes:
            lines.append(
                f"host    {_format_number(self.host_bytes, unit):>9} {unit}{each}"
                f"   {self.host_bytes:,} bytes, pinned"
            )
        return lines

    def _format_kinds(self) -> list[str]:
        unit = _choose_unit(self.device_bytes)
        lines = [f"{'what fills the peak':<28}{unit:>10}{'%':>8}", "─" * WIDTH]
        shares = {k: held / self.device_bytes for k, held in self.by_kind.items()}
        small = [kind for kind, share in shares.items() if share < SMALL]
        listed = {k: held for k, held in self.by_kind.items() if k not in small}
        if small:
            listed["all else"] = sum(self.by_kind[kind] for kind in small)
        for kind, held in listed.items():
            share = held / self.device_bytes
            number, bar = _format_number(held, unit), _draw_bar(share, 40)
            lines.append(f"{kind:<28}{number:>10}{share:>8.1%}  {bar}".rstrip())
        lines.append("─" * WIDTH)
        lines.append(
            f"{'total':<28}{_format_number(self.device_bytes, unit):>10}{1:>8.1%}"
        )
        return lines

    def _format_largest(self, top: int) -> list[str]:
        at = self.peak_instant
        doing = " · ".join(word for word in (at.phase, at.scope, at.op) if word)
        where = f"  {shorten_source(at.source)}" if at.source else ""
        doing = _clip(doing or "the arguments and results", WIDTH - 13 - len(where))
        lines = [f"at the peak: {doing}{where}", "─" * WIDTH]
        for row in self.top(top):
            many = f"{row.count} × " if row.count > 1 else ""
            unit = _choose_unit(row.bytes)
            size = f"{many}{_format_number(row.bytes, unit)} {unit}"
            head = f"{size:>16}  {row.kind:<18}  {_clip(row.shape, 24):<24}  "
            if row.op:  # computed: where, by what, on which line
                what = f"{row.name} · {row.op}" if row.name else row.op
                line = _clip_start(shorten_source(row.source), WIDTH - len(head))
                lines.append(f"{head}{line}".rstrip())
                lines.append(_clip(f"{'':>16}  {what}", WIDTH))
            else:
                lines.append(
                    f"{head}{_clip_start(row.name, WIDTH - len(head))}".rstrip()
                )
        left = self.rows[top:]
        if left:
            held = sum(row.total_bytes for row in left)
            unit = _choose_unit(held)
            size = f"{_format_number(held, unit)} {unit}"
            count = sum(row.count for row in left)
            lines.append(f"{size:>16}  in {count} smaller buffers")
        return lines

    def plot(self, path: str | pathlib.Path, *, reserve: int = GiB) -> pathlib.Path:
        """The timeline as a PNG: live bytes stacked by kind, the peak marked."""
        from jmem.memory.plot import plot

        return plot(self, pathlib.Path(path), reserve=reserve)


def find_layer(name: str) -> str:
    """The outermost numbered part of a scope or an argument's path; "" without one.

    >>> find_layer("GPT/Block_3/Dense_0"), find_layer("state/0/mu/layers/11/up/kernel")
    ('Block_3', 'layers/11')
    >>> find_layer("blocks/mlp")
    ''
    """
    found = _NUMBERED.search(name)
    return found[1] if found else ""


_NUMBERED = re.compile(r"(?:^|/)((?:blocks?|layers?|h)[/.]\d+|[A-Za-z]\w*_\d+)(?=/|$)")


def _split_number(name: str) -> tuple[str, int]:
    word, number = re.split(r"[/._](?=\d+$)", name)
    return word, int(number)


def _sum_by_name(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: collections.Counter[str] = collections.Counter()
    for key, held in pairs:
        sums[key] += held
    return dict(sums.most_common())


def _build(wanted: Any, value: Any, where: str) -> Any:
    """`value`, read from JSON, converted to the type `wanted` or refused."""
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if dataclasses.is_dataclass(wanted):
        _check(isinstance(value, dict), where, wanted, value)
        fields = typing.get_type_hints(wanted)
        names = {field.name for field in dataclasses.fields(wanted)}
        if set(value) != names:
            odd = sorted(set(value) ^ names)
            raise ValueError(f"{where}: missing or unknown fields {odd}.")
        built = {n: _build(fields[n], value[n], f"{where}.{n}") for n in names}
        return wanted(**built)  # pyright: ignore[reportCallIssue]
    if origin is dict:
        _check(isinstance(value, dict), where, wanted, value)
        return {k: _build(inside[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin is tuple:
        _check(isinstance(value, list), where, wanted, value)
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        _check(len(value) == len(kinds), where, wanted, value)
        pairs = enumerate(zip(kinds, value))
        return tuple(_build(kind, v, f"{where}[{n}]") for n, (kind, v) in pairs)
    if origin is types.UnionType:
        return None if value is None else _build(inside[0], value, where)
    kinds = (int, float) if wanted is float else (wanted,)
    _check(type(value) in kinds, where, wanted, value)  # true is no number
    return value


def _check(holds: bool, where: str, wanted: Any, value: Any) -> None:
    if not holds:
        raise ValueError(f"{where}: need {wanted}, found {str(value)[:40]!r}.")


def _choose_unit(size: int) -> str:
    return "GiB" if size >= GiB else "MiB" if size >= 2**20 else "KiB"


def _format_number(size: int, unit: str) -> str:
    value = size / {"GiB": GiB, "MiB": 2**20, "KiB": 2**10}[unit]
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def format_size(size: int) -> str:
    """A size in bytes as text, in the largest unit of which it has at least one.

    >>> format_size(3 * 2**30), format_size(1536)
    ('3.00 GiB', '1.50 KiB')
    """
    unit = _choose_unit(size)
    return f"{_format_number(size, unit)} {unit}"


def _draw_bar(share: float, width: int) -> str:
    """A bar of eighths of a character; empty below half of one."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _clip_start(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
