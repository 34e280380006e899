"""Pictures every experiment shares: loss curves, and memory by kind.

Colour is never the only difference. Curves, in the colours of Okabe and Ito (2008),
have dashes and a name at their end; bars, in those of a memory report's own timeline,
differ in lightness and have their size written on them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.report import GiB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, WARNING, REST = "#22303c", "#b00020", "#bcb8b1"
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), "-", "--")


def losses(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = ""
) -> "Figure":
    """Held-out loss of each method, bold; its training loss behind it, faint.

    `rows` are what `jmem.train.metrics.read` gives, by method. A training curve is the
    running mean over an eighth of the run; it is bold where nothing is held out.
    """
    figure, axes = _figure(8.0, 4.6)
    ends = []
    for index, (method, own) in enumerate(rows.items()):
        colour, dash = CURVES[index % len(CURVES)], DASHES[index % len(DASHES)]
        bold = {"color": colour, "linestyle": dash, "linewidth": 1.9}
        trained = [(r["step"], r["loss"]) for r in own if "loss" in r]
        held = [(r["step"], r["held_out_loss"]) for r in own if "held_out_loss" in r]
        if trained:
            steps, values = zip(*trained)
            smooth = running_mean(values, max(len(values) // 8, 1))
            faint = {"color": colour, "alpha": 0.35, "linewidth": 1.0}
            axes.plot(steps, smooth, **(faint if held else bold))
            ends.append((smooth[-1], method, colour))
        if held:
            dots = {"marker": "o", "markersize": 6, "markeredgecolor": "white"}
            axes.plot(*zip(*held), **bold, **dots)
            ends[-1:] = [(held[-1][1], method, colour)]
    _name_ends(axes, ends)
    axes.set_xlabel("updates")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title, loc="left")
    axes.text(
        *(1.0, 1.02, "dots: held out   faint: training, running mean"),
        transform=axes.transAxes,
        ha="right",
        fontsize=8,
        color=INK,
    )
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(end - window, 0) : end]
        means.append(sum(recent) / len(recent))
    return means


def _name_ends(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, lowest = (high - low) * 0.055, float("-inf")
    for value, method, colour in sorted(ends):
        lowest = max(value, lowest + gap)
        axes.annotate(
            method,
            xy=(1.0, lowest),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def memory(
    reports: Mapping[str, Any], *, title: str = "", reserve: int = GiB
) -> "Figure":
    """Bytes at the peak by kind, one bar a program, with what the card can give.

    `reports` are `jmem.MemoryReport`s of one target, by program.
    """
    from matplotlib.patches import Patch

    from jmem.memory.plot import COLOURS

    names = list(reports)
    figure, axes = _figure(8.0, 1.9 + 0.55 * len(names))
    peak = max(report.device_bytes for report in reports.values())
    kinds = [
        kind
        for kind in COLOURS
        if max(r.by_kind.get(kind, 0) for r in reports.values()) * 200 > peak
    ]
    for place, name in enumerate(names):
        report, left = reports[name], 0.0
        parts = {kind: report.by_kind.get(kind, 0) for kind in kinds}
        parts["other"] = report.device_bytes - sum(parts.values())
        for kind, size in parts.items():
            axes.barh(
                *(place, size / GiB),
                left=left,
                height=0.62,
                color=COLOURS.get(kind, REST),
                edgecolor="white",
                linewidth=0.8,
            )
            left += size / GiB
        fits = "" if report.fits(reserve) else "  does not fit"
        axes.text(
            left + peak / GiB * 0.01,
            place,
            f"{left:.2f} GiB{fits}",
            va="center",
            fontweight="bold",
            color=WARNING if fits else INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    first = reports[names[0]]
    usable = first.usable_bytes / GiB
    right = peak / GiB * 1.28
    if usable < right:
        axes.axvline(usable, color=INK, linestyle="--", linewidth=1.2)
        axes.text(
            *(usable, -0.62, f" {first.target}: {usable:.1f} GiB usable"),
            ha="left" if usable < right * 0.6 else "right",
            va="bottom",
            fontsize=8.5,
            color=INK,
        )
    else:
        words = f"{first.target}: {usable:.1f} GiB usable, beyond the right edge"
        axes.text(
            *(1.0, 1.02, words),
            transform=axes.transAxes,
            ha="right",
            fontsize=8.5,
            color=INK,
        )
    axes.set_xlim(0, right)
    axes.set_ylim(len(names) - 0.45, -0.7)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(
        "GiB at the peak, a device" if first.devices > 1 else "GiB at the peak"
    )
    axes.set_title(title, loc="left", pad=14)
    shown = {kind: COLOURS[kind] for kind in kinds} | {"other": REST}
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in shown.items()],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8.5,
    )
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, made without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#E8E8E8", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes
