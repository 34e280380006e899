"""Pictures every experiment shares: losses, memory by kind, quality against bytes.

Colour is never the only difference. Curves, in the colours of Okabe and Ito (2008),
have dashes and a name at their end; bars, in those of a memory report's own timeline,
differ in lightness and have their size written on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.harness.report import GiB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, WARNING, REST = "#22303c", "#b00020", "#bcb8b1"
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOST, KEPT = "#FBE8D3", "#00487A"
"""From none to all in a heat map: light to dark, so also in grey."""
OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
"""Of an annotation: its second place counts from its first, in points."""
AT_EDGE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), **OFFSET}
"""The same, with the first place beside an edge of the axes, at a value."""


def _show_as_text[**P](draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    """Draws names as they are written: none of them is a formula or moves a cursor."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        from jmem.memory.plot import show_as_text

        figure = draw(*args, **kwargs)
        show_as_text(figure)
        return figure

    return drawn


def style_curve(index: int, **more: Any) -> dict[str, Any]:
    """How the curve of a method is drawn; alike in all pictures that name it so."""
    return {
        "color": CURVES[index % len(CURVES)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.9,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 6,
        "markeredgecolor": "white",
    } | more


@_show_as_text
def draw_losses(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = ""
) -> "Figure":
    """Held-out loss of each method, bold; its training loss behind it, faint.

    `rows` are what `jmem.train.metrics.read` gives, by method. A training curve is the
    running mean over an eighth of the run; it is bold where nothing is held out.
    """
    figure, axes = _make_figure(8.0, 4.6)
    ends = []
    for index, (method, own) in enumerate(rows.items()):
        bold = style_curve(index, marker="o")
        trained = [(r["step"], r["loss"]) for r in own if "loss" in r]
        held = [(r["step"], r["held_out_loss"]) for r in own if "held_out_loss" in r]
        if trained:
            steps, values = zip(*trained)
            smooth = running_mean(values, max(len(values) // 8, 1))
            faint = {"color": bold["color"], "alpha": 0.35, "linewidth": 1.0}
            axes.plot(steps, smooth, **(faint if held else bold | {"marker": ""}))
            ends.append((smooth[-1], method, bold["color"]))
        if held:
            axes.plot(*zip(*held), **bold)
            ends[-1:] = [(held[-1][1], method, bold["color"])]
    _name_ends(axes, ends)
    _label(axes, "updates", "loss, nats a token", title)
    _write_above(axes, "dots: held out   faint: training, running mean")
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    recent = (values[max(end - window, 0) : end] for end in range(1, len(values) + 1))
    return [sum(own) / len(own) for own in recent]


def _name_ends(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, lowest = (high - low) * 0.055, float("-inf")
    ends, places = sorted(ends), []
    for value, *_ in ends:
        lowest = max(value, lowest + gap)
        places.append(lowest)
    for index in reversed(range(len(places))):  # those pushed out at the top come back
        places[index] = min(places[index], high)
        high = places[index] - gap
    for place, (_, method, colour) in zip(places, ends):
        style = {"va": "center", "color": colour, "fontweight": "bold"}
        axes.annotate(method, (1.0, place), (6, 0), **style, **AT_EDGE)


@_show_as_text
def draw_memory(reports: Mapping[str, Any], *, title: str = "") -> "Figure":
    """Bytes at the peak by kind, one bar a program, with what the card can give.

    `reports` are `jmem.MemoryReport`s of one target, by program.
    """
    from jmem.memory.plot import COLOURS

    own, places = list(reports.values()), range(len(reports))
    figure, axes = _make_figure(8.0, 1.9 + 0.55 * len(own))
    sizes = np.array([report.device_bytes for report in own]) / GiB
    parts = {kind: np.array([r.by_kind.get(kind, 0) for r in own]) for kind in COLOURS}
    left = np.zeros(len(own))
    bar: dict[str, Any] = {"height": 0.62, "edgecolor": "white", "linewidth": 0.8}
    for kind, row in parts.items():
        if (size := row / GiB).max() * 200 > sizes.max():
            colour = COLOURS[kind]
            axes.barh(places, size, left=left, label=kind, color=colour, **bar)
            left = left + size
    axes.barh(places, sizes - left, left=left, label="other", color=REST, **bar)
    for place, report in enumerate(own):
        fits = "" if report.fits() else "  does not fit"
        at, words = sizes[place] + max(sizes) * 0.01, f"{sizes[place]:.2f} GiB{fits}"
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        colour = WARNING if fits else INK
        bold = {"va": "center", "fontweight": "bold", "color": colour}
        axes.text(at, place, words, bbox=clear, **bold)
    usable, right = own[0].usable_bytes / GiB, max(sizes) * 1.28
    words = f"{own[0].target}: {usable:.1f} GiB usable"
    if usable < right:
        axes.axvline(usable, color=INK, linestyle="--", linewidth=1.2)
        side = "left" if usable < right * 0.6 else "right"
        style = {"ha": side, "va": "bottom", "fontsize": 8.5, "color": INK}
        axes.text(usable, -0.62, f" {words}", **style)
    else:
        _write_above(axes, f"{words}, beyond the right edge")
    axes.set(xlim=(0, right), ylim=(len(own) - 0.45, -0.7))
    axes.set_yticks(places, list(reports))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    a_device = ", a device" if own[0].devices > 1 else ""
    _label(axes, f"GiB at the peak{a_device}", "", title, pad=14)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


Point = tuple[float, float, float, float]
"""Share of the full cache's bytes, value, lower and upper end of its interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One measure of quality against bytes, for `draw_quality`."""

    title: str
    label: str
    """Of the vertical axis."""
    curves: Mapping[str, Sequence[Point]]
    """By policy. Policies of one colour in all panels: give them in one order."""
    reference: float
    """The full cache's value."""
    percent: bool = False
    """Whether values are shares."""


@_show_as_text
def draw_quality(
    panels: Sequence[Panel], shares: Sequence[float], *, title: str = ""
) -> "Figure":
    """Quality against the bytes of a cache: a curve a policy, the full cache a line.

    Bars are intervals; points of like bytes stand a little apart. `shares` are the
    budgets, where the axis has its ticks.
    """
    from matplotlib.ticker import FixedLocator

    figure, all_axes = _make_figure(6.6 * len(panels), 4.8, columns=len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        ends, count = [], len(panel.curves)
        for index, (name, points) in enumerate(panel.curves.items()):
            style = style_curve(index, elinewidth=0.9)
            apart = 1.012 ** (index - (count - 1) / 2)
            x = [share * apart for share, *_ in points]
            y, low, high = zip(*((v, v - low, high - v) for _, v, low, high in points))
            axes.errorbar(x, y, yerr=(low, high), **style)
            ends.append((y[-1], name, style["color"]))
        axes.axhline(panel.reference, color=INK, linewidth=1.2)
        small = {"color": INK, "fontsize": 9, **AT_EDGE}
        axes.annotate("full cache", (0.0, panel.reference), (4, 4), **small)
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.xaxis.set_major_locator(FixedLocator(list(shares)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
        if panel.percent:
            axes.yaxis.set_major_formatter("{x:.0%}")
        axes.margins(x=0.06, y=0.1)
        _name_ends(axes, ends)
        words = "bytes of the cache, as a share of the full one's"
        _label(axes, words, panel.label, panel.title)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


@_show_as_text
def draw_against_bytes(
    points: Mapping[str, tuple[float, Sequence[float]]],
    *,
    label: str,
    title: str = "",
) -> "Figure":
    """A value against device bytes: `points[method]` is (bytes, a value a seed).

    Dots are means, bars go from the least to the greatest. A name stands to the right
    of its dot, or to the left where another dot is in its way.
    """
    figure, axes = _make_figure(8.0, 4.8)
    means = {name: sum(values) / len(values) for name, (_, values) in points.items()}
    widest = max(size for size, _ in points.values())
    tallest = max(means.values()) - min(means.values())
    for index, (name, (size, values)) in enumerate(points.items()):
        mean = means[name]
        blocked = any(
            0 < points[other][0] - size < 0.1 * widest
            and abs(means[other] - mean) < 0.1 * tallest
            for other in points
        )
        style = style_curve(index, linestyle="none", markersize=8, elinewidth=1.2)
        spread = [[mean - min(values)], [max(values) - mean]]
        axes.errorbar([size / GiB], [mean], yerr=spread, **style)
        side = {"ha": "right" if blocked else "left", "color": style["color"]}
        offset = (-7 if blocked else 7, 5)
        axes.annotate(name, (size / GiB, mean), offset, fontsize=9.5, **side, **OFFSET)
    axes.margins(x=0.15, y=0.15)
    _label(axes, "device memory of a step, GiB", label, title)
    return figure


@_show_as_text
def draw_by_bytes(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    bytes_label: str,
    label: str,
    title: str = "",
) -> "Figure":
    """A value against bytes, a curve a kind: `curves[name]` is its (bytes, value)s."""
    figure, axes = _make_figure(8.0, 4.8)
    for index, (name, points) in enumerate(curves.items()):
        sizes, values = zip(*points)
        sizes = [size / 2**20 for size in sizes]
        axes.plot(sizes, values, label=name, **style_curve(index))
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    _label(axes, f"{bytes_label}, MiB", label, title)
    return figure


@_show_as_text
def draw_by_index(
    curves: Mapping[str, Sequence[float]],
    marked: int,
    *,
    mark: str,
    index_label: str,
    label: str,
    title: str = "",
) -> "Figure":
    """Shares by a whole number, a curve each; a dashed line says what `marked` is."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _make_figure(8.0, 4.2)
    axes.axvline(marked, color=INK, linewidth=1.2, linestyle=(0, (6, 3)))
    place = {"xycoords": ("data", "axes fraction"), "color": INK, "fontsize": 9}
    axes.annotate(f" {mark}", (marked, 0.02), **place)
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(range(len(values)), values, label=name, **style_curve(index))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, index_label, label, title)
    axes.legend(frameon=False, loc="upper left")
    return figure


@_show_as_text
def draw_cells(
    panels: Mapping[str, Sequence[Sequence[tuple[int, int]]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str = "",
    column_label: str = "",
    title: str = "",
) -> "Figure":
    """Heat maps of hits, one a panel: `panels[name][row][column]` is (hits, of).

    Each cell says its numbers; one that counts nothing is hatched.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("kept", [LOST, "#63A5CB", KEPT])
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width, height = 0.95 + 0.72 * len(columns), 0.95 + 0.42 * len(rows)
    figure, grid = _make_figure(
        max(across * width, 6.0), 0.6 + down * height, rows=down, columns=across
    )
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for place, (axes, (name, values)) in enumerate(zip(grid, panels.items())):
        hits, of = np.moveaxis(np.array(values), -1, 0)
        shares = np.ma.array(hits / np.maximum(of, 1), mask=of == 0)
        axes.patch.set(hatch="////", edgecolor=REST, linewidth=0)  # behind the empty
        white = {"edgecolors": "white", "linewidth": 1.6}
        axes.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, **white)
        for (y, x), count in np.ndenumerate(of):
            words = f"{hits[y, x]}/{count}" if count else ""
            style = {"color": "white" if shares[y, x] > 0.55 else INK, "fontsize": 9}
            axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", **style)
        axes.set_title(f"{name}  {hits.sum()}/{of.sum()}", loc="left", fontsize=10.5)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0, labelsize=9)
        axes.set_ylabel(row_label if place % across == 0 else "")
        axes.set_xlabel(column_label if place + across >= len(panels) else "")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _label(axes: Any, x: str, y: str, title: str, pad: float = 6.0) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", pad=pad)


def _write_above(axes: Any, words: str) -> None:
    """A remark above the right end of the picture."""
    at = {"transform": axes.transAxes, "ha": "right"}
    axes.text(1.0, 1.02, words, fontsize=8.5, color=INK, **at)


def _make_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 0
) -> tuple[Any, Any]:
    """A figure and its axes, made without pyplot: no window, no global state.

    One pair of axes; a list of them, row by row, if `columns` are given.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    grid = figure.subplots(rows, max(columns, 1), squeeze=False).ravel().tolist()
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color="#E8E8E8", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, grid if columns else grid[0]
