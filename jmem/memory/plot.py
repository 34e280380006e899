"""The timeline as a picture: live bytes stacked by kind over the run of a program."""

import io
import pathlib
from typing import Any

import numpy as np

from jmem.disk import write_atomically
from jmem.memory import kinds
from jmem.memory.escape import escape_all, escape_lines
from jmem.memory.report import GiB, MemoryReport

# Blues hold what outlives the program, warm tones what comes and goes.
COLOURS = {
    kinds.PARAMETERS: "#274c77",
    kinds.OPTIMIZER: "#6096ba",
    kinds.KV_CACHE: "#3d8f8a",
    kinds.STATE: "#7fb069",
    kinds.BATCH: "#a3cef1",
    kinds.OTHER_ARGUMENTS: "#c9d6df",
    kinds.OUTPUTS: "#8d99ae",
    kinds.CONSTANTS: "#5c677d",
    kinds.GRADIENTS: "#d1495b",
    kinds.SAVED: "#edae49",
    kinds.RECOMPUTATION: "#f4d58d",
    kinds.COLLECTIVES: "#7d4f9c",
    kinds.WORKSPACE: "#b08968",
    kinds.OTHER: "#bcb8b1",
}
INK = "#22303c"
SMALL = 0.002
"""Share of the peak below which a kind is drawn with the rest."""
NEAR = 1.5
"""The card's limit is drawn when it is below this many times the peak."""


def plot(report: MemoryReport, path: pathlib.Path, *, reserve: int) -> pathlib.Path:
    """Draws `report.timeline` to a PNG at `path`, and returns the path."""
    from matplotlib.figure import Figure

    report = escape_all(report)
    timeline = report.timeline
    scale, unit = (GiB, "GiB") if report.device_bytes >= GiB else (2**20, "MiB")
    series = {k: np.asarray(v) / scale for k, v in timeline.by_kind.items()}
    highest = timeline.max() / scale
    drawn = {
        kind: values
        for kind, values in series.items()
        if kind != kinds.OTHER and values.max() >= SMALL * highest
    }
    rest = np.sum([v for kind, v in series.items() if kind not in drawn], axis=0)
    if np.max(rest) > SMALL * highest:
        drawn["other"] = rest

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # An instant lasts until the next: steps, drawn to one past the last.
    edges = np.arange(len(timeline) + 1)
    axes.stackplot(
        edges,
        [np.append(values, values[-1]) for values in drawn.values()],
        labels=list(drawn),
        colors=[COLOURS.get(kind, COLOURS[kinds.OTHER]) for kind in drawn],
        step="post",
        linewidth=0,
    )
    live = np.asarray(timeline.live) / scale
    axes.step(edges, np.append(live, live[-1]), where="post", color=INK, linewidth=0.8)

    limit = (report.usable_bytes - reserve) / scale
    ceiling = highest * 1.16
    if limit < NEAR * highest:
        ceiling = max(ceiling, limit * 1.08)
        axes.axhline(limit, color="#b00020", linewidth=1.2, linestyle=(0, (6, 3)))
        axes.annotate(
            f"{report.target}: {limit:,.1f} {unit} usable, reserve kept",
            (0, limit),
            (6, 4),
            textcoords="offset points",
            color="#b00020",
            fontsize=9,
            va="bottom",
            bbox={"color": "white", "alpha": 0.8, "pad": 1.5, "linewidth": 0},
        )
    peak = timeline.peak + 0.5
    right, left = peak > 0.8 * len(timeline), peak < 0.2 * len(timeline)
    holes = report.fragmentation / scale
    holes = f" + {holes:,.2f} fragmentation" if holes > 0.001 * highest else ""
    axes.plot([peak], [highest], "o", color=INK, markersize=5, clip_on=False)
    axes.annotate(
        f"peak {highest:,.2f} {unit}{holes}",
        (peak, highest),
        (0, 8),
        textcoords="offset points",
        ha="right" if right else "left" if left else "center",
        fontsize=10,
        fontweight="bold",
        color=INK,
    )
    _draw_phases(axes, timeline.phases)
    axes.set_xlim(0, len(timeline))
    axes.set_ylim(0, ceiling)
    axes.set_ylabel(unit, color=INK)
    axes.set_xlabel("allocations and frees, in the order they happen", color=INK)
    axes.set_title(
        f"{report.name} on {report.target}: {report.device_bytes / scale:,.2f} {unit}",
        loc="left",
        fontsize=12,
        fontweight="bold",
        color=INK,
        pad=22 if any(timeline.phases) else 8,
    )
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(  # in the order of the stack
        handles[::-1],
        names[::-1],
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.1,
    )
    show_as_text(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_atomically(path, drawn.getvalue())
    return path


def show_as_text(figure: Any) -> None:
    """Takes every `$` in a figure's texts for a character; control characters too."""
    from matplotlib.text import Text

    for words in figure.findobj(Text):
        words.set_parse_math(False)
        words.set_text(escape_lines(words.get_text()))


def _draw_phases(axes, phases: tuple[str, ...]) -> None:
    """Names what runs when, above the picture, with a hairline between."""
    starts = [n for n, phase in enumerate(phases) if n == 0 or phases[n - 1] != phase]
    ends = [*starts[1:], len(phases)]
    for start, end in zip(starts, ends):
        if not phases[start]:
            continue
        if start:
            axes.axvline(start, color=INK, alpha=0.35, linewidth=0.7)
        if end - start > 0.07 * len(phases):
            axes.annotate(
                phases[start],
                ((start + end) / 2, 1),
                (0, 5),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=INK,
                alpha=0.75,
            )
