"""The breakdown checks itself: sums that do not agree raise with both numbers."""

import dataclasses
import pathlib
import types

import pytest

from jmem.memory import breakdown, hlo, kinds
from jmem.targets import resolve

SUMS = (
    *("total_allocation_bytes", "peak_memory_in_bytes", "argument_size_in_bytes"),
    *("output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes"),
)


@pytest.fixture
def compiled(program_of, tmp_path):
    """A small step: its module, its program, and XLA's sums to be falsified."""
    program = program_of("carried")
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_proto": True}
    analysis = program.compile(resolve("h200"), options).memory_analysis()
    (path,) = pathlib.Path(tmp_path).glob("*gpu_after_optimizations.hlo.pb")
    sums = types.SimpleNamespace(**{name: getattr(analysis, name) for name in SUMS})
    return hlo.read(path.read_bytes()), program, sums


@pytest.mark.compat
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_differs_is_an_error_with_both_numbers(compiled, name):
    module, program, sums = compiled
    breakdown.explain(module, program, sums)
    true = getattr(sums, name)
    setattr(sums, name, true + 4096)
    # argument, output, alias and temporaries are checked by their sum
    with pytest.raises(breakdown.AccountError, match=r"[\d,]+ bytes .* [\d,]+ bytes"):
        breakdown.explain(module, program, sums)


def test_an_allocation_that_is_not_read_is_an_error(compiled):
    module, program, sums = compiled
    short = dataclasses.replace(module, allocations=module.allocations[1:])
    with pytest.raises(breakdown.AccountError, match="device memory"):
        breakdown.explain(short, program, sums)


def test_an_argument_that_is_not_there_is_an_error(compiled):
    module, program, sums = compiled
    more = dataclasses.replace(program, args=(*program.args, program.args[2]))
    with pytest.raises(breakdown.AccountError, match="number of arguments"):
        breakdown.explain(module, more, sums)


class TestRows:
    @pytest.fixture
    def rows(self, report_of):
        return report_of("carried").rows

    def test_arguments_are_named_by_their_paths(self, rows):
        names = {row.name for row in rows if row.born is None}
        assert {"params/qkv", "params/out", "cache/0", "cache/1", "x"} <= names

    def test_a_row_of_the_weights_is_a_copy_of_them(self, rows):
        copies = [row for row in rows if row.op == "copy"]
        assert {row.name for row in copies} <= {"params/qkv", "params/out"}
        assert {row.kind for row in copies} == {kinds.PARAMETERS}

    def test_temporaries_are_born_and_die_in_order(self, report_of):
        report = report_of("scanned")
        for row in report.rows:
            if row.born is not None:
                assert 0 < row.born <= report.peak_instant.number < row.dies

    def test_like_buffers_share_a_row(self, report_of):
        rows = report_of("rebuilt").rows
        (twins,) = [r for r in rows if r.kind == kinds.KV_CACHE and r.born is not None]
        assert twins.count == 2
        assert twins.total_bytes == 2 * twins.bytes

    def test_largest_first(self, report):
        totals = [row.total_bytes for row in report.rows]
        assert totals == sorted(totals, reverse=True)
