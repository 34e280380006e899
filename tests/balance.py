"""How the suite is divided over its workers, and what each took.

A worker gets whole files, so that what a file shares is made once, and files that share
more than that together. The dearest come first: a long one that starts last leaves the
other worker idle. The summary tells seconds by folder and file, and each worker's idle
time; take `FIRST` from there when it no longer fits.
"""

import collections
import resource

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/memory",)
"""Folders whose files share what takes long to make: reports of the same programs."""
FIRST = (
    "tests/memory",
    "tests/test_sharding.py",
    "tests/test_launches.py",
    "tests/experiments/test_lisa.py",
    "tests/finetune/",
    "tests/experiments/",
    "tests/test_docs.py",
    "tests/kvcache/",
    "tests/checkpoints/",
    "tests/generate/",
    "tests/kernels/",
)
"""Beginnings of paths, the dearest first; what is not listed comes last."""


def scope(nodeid: str) -> str:
    """What a test is given to a worker with: its file, or its folder.

    >>> scope("tests/memory/test_page.py::test_a[1]"), scope("tests/nn/test_nf4.py::b")
    ('tests/memory', 'tests/nn/test_nf4.py')
    """
    file = nodeid.split("::", 1)[0]
    folder = file.rpartition("/")[0]
    return folder if folder in TOGETHER else file


class Balance:
    """A pytest plugin: the order, the division, and what was taken."""

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        """By file, CPU seconds in user mode, of processes the tests started too."""
        self.busy: collections.Counter[str] = collections.Counter()
        self.spans: dict[str, tuple[float, float]] = {}
        """By worker, when its first test started and its last one ended."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def rank(item):
            found = (
                n for n, start in enumerate(FIRST) if item.nodeid.startswith(start)
            )
            return next(found, len(FIRST))

        items.sort(key=rank)  # stable: files stay whole, and as they were

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        config.option.loadscopereorder = False  # else files of many tests come first
        return Divided(config, log)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        item.stash[BEFORE] = user_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.when == "teardown":
            taken = user_seconds() - item.stash[BEFORE]
            item.user_properties.append(("user_seconds", taken))
        return (yield)

    def pytest_runtest_logreport(self, report) -> None:
        worker = report.node.gateway.id if hasattr(report, "node") else "this process"
        start, stop = self.spans.get(worker, (report.start, report.stop))
        self.spans[worker] = min(start, report.start), max(stop, report.stop)
        self.busy[worker] += report.duration
        if report.when == "teardown":
            taken = dict(report.user_properties).get("user_seconds", 0.0)
            self.seconds[report.nodeid.split("::", 1)[0]] += taken

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.seconds.total() < 60:
            return
        folders: collections.Counter[str] = collections.Counter()
        for file, taken in self.seconds.items():
            folders[file.rpartition("/")[0]] += taken
        begun = min(start for start, _ in self.spans.values())
        whole = max(stop for _, stop in self.spans.values()) - begun
        terminalreporter.section("CPU seconds of the tests, user mode")
        line = terminalreporter.write_line
        line(f"{self.seconds.total():8.0f}  in all")
        for name, taken in [*folders.most_common(), *self.seconds.most_common(15)]:
            line(f"{taken:8.0f}  {name}")
        for worker, busy in sorted(self.busy.items()):
            idle = whole - busy
            line(f"{worker}: busy {busy:.0f} s of {whole:.0f}, idle {idle:.0f} s")


class Divided(LoadScopeScheduling):
    """Whole files to each worker, or whole folders."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


BEFORE = pytest.StashKey[float]()


def user_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(
        resource.getrusage(who).ru_utime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
