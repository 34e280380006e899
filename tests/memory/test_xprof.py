"""The plan laid out for xprof is the one the report was made of."""

import json

import pytest

import jmem
from jmem.memory import hlo


def test_the_plan_is_written_where_xprof_looks(program_of, report_of, tmp_path):
    plan = jmem.memory.export_xprof(program_of("scanned"), folder=tmp_path)
    assert plan == tmp_path / "plugins/profile/jmem/step.hlo_proto.pb"
    assert (plan.parent / "host.xplane.pb").exists()
    allocations = hlo.read(plan.read_bytes()).allocations
    device = sum(a.bytes for a in allocations if not (a.host or a.thread_local))
    assert device == report_of("scanned").device_bytes


def test_xprof_finds_the_same_peak(program_of, report_of, tmp_path):
    """The extra `profile` installs xprof; its viewer is the independent reader."""
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data")
    plan = jmem.memory.export_xprof(program_of("mlp"), folder=tmp_path)
    options = {"module_name": "step", "memory_space": "0"}
    answer, _ = convert.xspace_to_tool_data(
        [str(plan.parent / "host.xplane.pb")], "memory_viewer", options
    )
    viewed = json.loads(answer)
    report = report_of("mlp")
    peak, total = report.timeline.max() / 2**20, report.device_bytes / 2**20
    assert viewed["peakHeapMib"] == pytest.approx(peak, abs=1e-3)
    assert viewed["totalBufferAllocationMib"] == pytest.approx(total, abs=1e-3)
