"""The pictures say what their numbers are."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Annotation
from toy_experiment import Memory, memories

from experiments.harness import plots


class TestPictures:
    def texts(self, figure):
        figure.draw_without_rendering()
        [axes] = figure.axes
        return [text.get_text() for text in axes.texts]

    def test_memory_names_size_verdict_and_limit(self):
        figure = plots.draw_memory(memories(), title="x")
        assert self.texts(figure) == [
            "12.00 GiB",
            "24.00 GiB  does not fit",
            " toy: 20.0 GiB usable",
        ]
        [axes] = figure.axes
        ends = axes.dataLim.get_points()[:, 0].tolist()
        assert ends == pytest.approx([0, 24], abs=1e-3)

    def test_memory_says_when_the_limit_is_out_of_sight(self):
        reports = {"small": Memory({"parameters": 2**30})}
        assert "beyond the right edge" in self.texts(plots.draw_memory(reports))[-1]

    def test_losses_name_each_curve_once_and_apart(self):
        rows = {
            name: [{"step": s, "loss": 2.0 + 1 / s} for s in range(1, 9)]
            + [{"step": s, "held_out_loss": 2.5} for s in (0, 8)]
            for name in ("full", "lora", "lisa")
        }
        figure = plots.draw_losses(rows)
        assert self.texts(figure)[:3] == ["full", "lisa", "lora"]
        texts = figure.axes[0].texts
        places = [text.xy[1] for text in texts if isinstance(text, Annotation)]
        assert len(places) == 3
        assert places == sorted(set(places))

    def test_names_that_would_leave_the_top_stay_apart_below_it(self):
        rows = {name: [{"step": s, "loss": 2.0} for s in (1, 2)] for name in "abcdef"}
        rows["low"] = [{"step": s, "loss": 1.0} for s in (1, 2)]
        figure = plots.draw_losses(rows)
        figure.draw_without_rendering()
        [axes] = figure.axes
        places = [text.xy[1] for text in axes.texts if isinstance(text, Annotation)]
        low, high = axes.get_ylim()
        assert all(low <= place <= high for place in places)
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert min(gaps) > 0.05 * (high - low)

    def test_quality_has_a_curve_a_policy_and_the_full_cache(self):
        curves = {
            name: [(share, share + up, share, 1.0) for share in (0.1, 0.2, 0.4)]
            for name, up in (("snapkv", 0.1), ("windowkv", 0.5))
        }
        panels = [
            plots.Panel(
                title="needles",
                label="kept",
                curves=curves,
                reference=1.0,
                percent=percent,
            )
            for percent in (True, False)
        ]
        figure = plots.draw_quality(panels, (0.1, 0.2, 0.4), title="at equal bytes")
        figure.draw_without_rendering()
        first, second = figure.axes
        for axes in (first, second):
            words = [text.get_text() for text in axes.texts]
            assert words == ["full cache", "snapkv", "windowkv"]
            shown = [label.get_text() for label in axes.get_xticklabels()]
            assert shown == ["10 %", "20 %", "40 %"]
            assert len(axes.containers) == 2
        drawn = [np.asarray(line.get_ydata()).tolist() for line in first.lines]
        assert [point[1] for point in curves["snapkv"]] in drawn
        assert first.get_yticklabels()[-1].get_text().endswith("%")
        assert not second.get_yticklabels()[-1].get_text().endswith("%")

    def test_a_curve_for_each_share_and_the_layer_that_is_used(self):
        curves = {"12.5 % kept": [0.1, 0.6, 1.0], "50 % kept": [0.5, 1.0, 1.0]}
        figure = plots.draw_by_index(
            *(curves, 2), mark="layer 2 is used", index_label="layer", label="recall"
        )
        assert self.texts(figure) == [" layer 2 is used"]
        [axes] = figure.axes
        drawn = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
        assert drawn[1:] == list(curves.values())
        styles = {(line.get_color(), line.get_marker()) for line in axes.lines[1:]}
        assert len(styles) == 2
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == list(curves)

    def test_cells_say_their_numbers_and_a_panel_its_sum(self):
        panels = {
            "full": [[(4, 4), (3, 4)], [(2, 4), (0, 0)]],
            "snapkv": [[(4, 4), (0, 3)], [(1, 2), (0, 0)]],
        }
        figure = plots.draw_cells(
            panels, rows=["0 %", "100 %"], columns=["512", "1,024"]
        )
        figure.draw_without_rendering()
        full, snapkv = figure.axes
        assert full.get_title(loc="left") == "full  9/12"
        words = [text.get_text() for text in snapkv.texts]
        assert words == ["4/4", "0/3", "1/2", ""]
        [mesh] = snapkv.collections
        colours = np.asarray(mesh.get_facecolor())
        light = colours[:, :3].sum(axis=1)
        assert light[0] < light[2] < light[1]  # all kept is dark
        assert colours[3, 3] == 0  # nothing drawn above the hatches
        assert snapkv.patch.get_hatch()
        assert [tick.get_text() for tick in full.get_yticklabels()] == ["0 %", "100 %"]

    def test_a_last_row_of_panels_may_be_short(self):
        figure = plots.draw_cells(
            {name: [[(1, 2)]] for name in "abcde"}, rows=["0 %"], columns=["512"]
        )
        assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]
