"""Reports print within their width, save without loss, and judge by three numbers."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import count, json_mutants, outcomes

from jmem.memory.report import WIDTH, MemoryReport

GiB = 2**30


class TestSaving:
    def test_nothing_is_lost(self, report, tmp_path):
        path = tmp_path / "report.json"
        text = report.to_json(path)
        assert MemoryReport.from_json(text) == report
        assert MemoryReport.from_json(path) == report

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "3", '{"schema": 0}', "[" * 100_000, "9" * 5000]
    )
    def test_what_is_no_report_is_refused(self, text):
        with pytest.raises(ValueError, match=r"report: not (JSON|a MemoryReport)"):
            MemoryReport.from_json(text)

    @pytest.mark.parametrize(
        ("change", "place"),
        [
            ({"device_bytes": "12"}, r"report\.device_bytes: need <class 'int'>"),
            ({"rows": [{"bytes": 1}]}, r"report\.rows\[0\]: missing or unknown"),
            ({"by_kind": [1]}, r"report\.by_kind: need dict"),
            ({"colour": 1}, r"missing or unknown fields \['colour'\]"),
            ({"interval": [1]}, r"report\.interval: need tuple\[int, int\]"),
            ({"interval": [1, 2, 3]}, r"report\.interval: need"),
            ({"device_bytes": True}, r"report\.device_bytes: need"),
            ({"timeline": None}, r"report\.timeline: need"),
        ],
    )
    def test_a_damaged_report_is_refused_at_its_place(self, report_of, change, place):
        values = json.loads(report_of("mlp").to_json()) | change
        with pytest.raises(ValueError, match=place):
            MemoryReport.from_json(json.dumps(values))

    @pytest.mark.parametrize("size", [-1, 10**41])
    def test_a_timeline_that_no_program_has_is_refused(self, report_of, size):
        """It could not be drawn."""
        values = json.loads(report_of("mlp").to_json())
        next(iter(values["timeline"]["by_kind"].values()))[0] = size
        with pytest.raises(ValueError, match="timeline leaves 0 to device_bytes"):
            MemoryReport.from_json(json.dumps(values))

    def test_mutated_reports_are_reports_or_refused(self, report_of, tmp_path):
        """And whatever is read can be printed."""

        def show(path):
            assert str(MemoryReport.from_json(path))

        whole = dataclasses.replace(report_of("mlp"), rows=report_of("mlp").rows[:3])
        path, number = tmp_path / "report.json", count(100)
        mutants = json_mutants(whole.to_json().encode(), number, 5)
        found = outcomes(mutants, path, show, ValueError)
        assert sum(found.values()) == number

    def test_the_file_is_named(self, tmp_path):
        path = tmp_path / "other.json"
        path.write_text("{}")
        with pytest.raises(ValueError, match=r"other\.json: not a MemoryReport"):
            MemoryReport.from_json(path)


class TestTable:
    def test_it_keeps_its_width(self, report):
        assert max(map(len, report.table().splitlines())) <= WIDTH

    def test_it_says_what_a_reader_asks(self, report_of):
        text = str(report_of("rebuilt"))
        for words in (
            "xs_step on h200",
            "what fills the peak",
            "kv cache",
            "2 × 16.00 MiB",
            "bf16[8,4,1024,4,64]",
            "cache/0",
            "could go: 'cache' is donated",
            "fits h200",
        ):
            assert words in text, words

    def test_every_kind_is_in_the_total(self, report_of):
        lines = report_of("mlp").table().splitlines()
        start = next(n for n, line in enumerate(lines) if "what fills" in line)
        end = next(n for n, line in enumerate(lines) if line.startswith("total"))
        shares = [
            float(line[38:46].rstrip("% ")) for line in lines[start + 2 : end - 1]
        ]
        assert sum(shares) == pytest.approx(100, abs=0.5)

    def test_the_rest_is_summed_up(self, report_of):
        assert "smaller buffers" in report_of("mlp").table(top=3)
        assert "smaller buffers" not in report_of("mlp").table(top=1000)


class TestVerdict:
    @pytest.fixture
    def sized(self, report_of):
        """A report that needs so many bytes at the upper end, on a card of 24 GiB."""

        def build(needed):
            return dataclasses.replace(
                report_of("mlp"),
                interval=(needed // 2, needed),
                compiler_bytes=24 * GiB,
                usable_bytes=22 * GiB,
            )

        return build

    def test_the_upper_end_decides_to_the_byte(self, sized):
        assert sized(21 * GiB).fits()
        assert not sized(21 * GiB + 1).fits()
        assert sized(22 * GiB).fits(reserve=0)

    def test_it_prints_all_three_numbers(self, sized):
        text = str(sized(20 * GiB).fits(reserve=GiB // 2))
        assert "needs 20.00 GiB" in text
        assert "usable 22.00 GiB" in text
        assert "512.00 MiB kept in reserve" in text
        assert "1.50 GiB to spare" in text

    def test_a_program_too_large_says_by_how_much(self, sized):
        text = str(sized(30 * GiB).fits())
        assert text.startswith("does not fit h200")
        assert "9.00 GiB too much" in text

    def test_the_fraction_jax_needs(self, sized):
        """JAX takes three quarters of a card unless it is told otherwise."""
        assert sized(10 * GiB).fits().memory_fraction is None
        verdict = sized(20 * GiB).fits()
        assert verdict.memory_fraction == 0.88  # 21 of 24 GiB, rounded up
        assert "XLA_CLIENT_MEM_FRACTION=0.88" in str(verdict)
        assert sized(30 * GiB).fits().memory_fraction is None

    @given(needed=st.integers(0, 40 * GiB), reserve=st.integers(0, 4 * GiB))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_the_fraction_holds_program_and_reserve(self, sized, needed, reserve):
        verdict = sized(needed).fits(reserve)
        if verdict.memory_fraction is not None:
            held = verdict.memory_fraction * 24 * GiB
            assert needed + reserve <= held < needed + reserve + 0.01 * 24 * GiB + 1
            assert 0.75 < verdict.memory_fraction <= 22 / 24 + 0.01

    def test_a_negative_reserve_is_refused(self, sized):
        with pytest.raises(ValueError, match="reserve=-1 must not be negative"):
            sized(GiB).fits(reserve=-1)


class TestPlot:
    def test_it_draws_a_png(self, report, tmp_path):
        path = report.plot(tmp_path / "timeline.png")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 10_000

    def test_the_limit_is_drawn_when_it_is_near(self, report_of, tmp_path, monkeypatch):
        from matplotlib.axes import Axes

        drawn = []
        monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: drawn.append(y))
        report = report_of("mlp")
        near = dataclasses.replace(report, usable_bytes=GiB + report.device_bytes)
        report.plot(tmp_path / "far.png")
        assert not drawn
        near.plot(tmp_path / "near.png")
        assert drawn == [pytest.approx(report.device_bytes / 2**20)]
