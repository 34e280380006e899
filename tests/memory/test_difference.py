"""Two reports side by side: every byte of the change is in the table."""

import jmem


def test_kinds_sum_to_the_change_of_the_device(report_of):
    before, after = report_of("scanned"), report_of("remat")
    found = jmem.memory.diff(before, after)
    assert found.device.bytes == after.device_bytes - before.device_bytes < 0
    assert sum(change.bytes for change in found.by_kind) == found.device.bytes
    sizes = [abs(change.bytes) for change in found.by_kind]
    assert sizes == sorted(sizes, reverse=True)


def test_scopes_sum_to_the_change_of_the_peaks(report_of):
    before, after = report_of("scanned"), report_of("remat")
    found = jmem.memory.diff(before, after)
    peaks = [report.device_bytes - report.fragmentation for report in (before, after)]
    assert sum(change.bytes for change in found.by_scope) == peaks[1] - peaks[0]
    assert any("expand" in change.name for change in found.by_scope)


def test_prints_what_changed(report_of):
    text = str(jmem.memory.diff(report_of("scanned"), report_of("remat")))
    assert "saved activations" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_a_report_does_not_differ_from_itself(report_of):
    found = jmem.memory.diff(report_of("mlp"), report_of("mlp"))
    assert found.by_kind == found.by_scope == ()
    assert "nothing" in str(found)


def test_host_memory_is_told_apart(report_of):
    found = jmem.memory.diff(report_of("remat"), report_of("offloaded"))
    assert found.host.after_bytes == report_of("offloaded").host_bytes > 0
    assert "host" in str(found)
