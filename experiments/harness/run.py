"""One run of an experiment: its folder, what it prints, and the report it leaves.

runs/<experiment>/<time>-<hash of the config>/
  config.toml       the config, all fields; itself a preset
  report.json       every number as computed;  report.md  the same, to read
  *.png             pictures
  memory/           one JSON a measured program
  <method>/         metrics.jsonl, checkpoints/, trace/ of one trained method
  tuned/<method>/   what it trained, as other programs open it
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from experiments.harness import config as configs
from experiments.harness.record import HERE
from experiments.harness.report import Column, GiB, Report, Table, gib, seconds
from jmem.disk import DamagedError, open_sealed, write_atomically
from jmem.memory.escape import escape_controls, escape_lines
from jmem.targets import Target
from jmem.train.folder import Hold, prepare

if TYPE_CHECKING:
    from experiments.harness.exports import Exports

WIDTH = 120
"""Columns printed where the output is no terminal."""


class Run(contextlib.AbstractContextManager):
    """What an experiment's `main` is given beside its config.

    Used as a context: the report is written when it ends, however it ends. The folder
    is made when something is first written to it, so that a refused config leaves
    nothing behind; that it can be made is proved at once. From then on until the run
    ends it is this process's alone.

    Raises:
      FolderError: `runs` (or `resume`) cannot be written, or another process goes on
        with `resume`, and nothing was touched.
    """

    def __init__(
        self,
        slug: str,
        config: Any,
        *,
        target: Target | None = None,
        runs: pathlib.Path = pathlib.Path("runs"),
        measure_only: bool = False,
        resume: pathlib.Path | None = None,
        trace: bool = False,
    ):
        from rich.console import Console

        self.slug = slug
        self.config = config
        self._target = target
        self.measure_only = measure_only
        """Compile only: nothing runs, and the report names no device."""
        self.resume = resume is not None
        """Whether the folder holds an earlier session; `train` takes it as it is."""
        self.trace = trace
        """Whether the user asked for profiler traces."""
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)
        self._began = time.monotonic()
        self._now = now = datetime.datetime.now().astimezone()
        toml = configs.write(config)
        self._made = resume is not None
        if resume is None:
            hashed = hashlib.sha256(toml.encode()).hexdigest()[:8]
            self._folder = runs / slug / f"{now:%Y%m%d-%H%M%S}-{hashed}"
            prepare(self._folder.parent)
        else:
            self._hold = Hold(resume)
            self._folder = prepare(resume)
        self._toml = f"# Config of a run of {slug}; --preset takes this file.\n{toml}\n"
        if resume is not None:  # with more steps, say
            write_atomically(self._folder / "config.toml", self._toml)
        self.report = Report(config=dataclasses.asdict(config))
        self.memory: dict[str, Any] = {}
        """Recorded memory reports, by program."""
        self.exports: Exports | None = None
        """What goes into `tuned/`, if anything does; told at the end."""

    @property
    def target(self) -> Target:
        """The described GPU that programs are compiled for (`config.gpu`)."""
        if self._target is None:
            raise TypeError(f"the config of {self.slug} has no field `gpu`.")
        return self._target

    # Files ----------------------------------------------------------------------------

    @property
    def folder(self) -> pathlib.Path:
        """The run's folder, made with config.toml in it when it is first asked for."""
        if not self._made:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            name = self._folder.name
            for number in itertools.count(2):
                with contextlib.suppress(FileExistsError):
                    self._folder.mkdir()
                    break
                # Another run of the same second.
                self._folder = self._folder.with_name(f"{name}-{number}")
            self._hold = Hold(self._folder)
            write_atomically(self._folder / "config.toml", self._toml)
            self._made = True
        return self._folder

    @property
    def place(self) -> pathlib.Path:
        """Where the folder is, or is going to be."""
        return self._folder

    def folder_of(self, method: str) -> pathlib.Path:
        """A method's own folder, for metrics, checkpoints and trace."""
        path = self.folder / method
        path.mkdir(exist_ok=True)
        return path

    def read_plan(self, method: str) -> dict[str, Any]:
        """What XLA planned for a method's step here; {}, and a note, if damaged."""
        path = self.folder / method / "plan.json"
        try:
            plan = open_sealed(path.read_bytes(), str(path))
            for name, kind in {"bytes": int, "program": str}.items():
                if not isinstance(found := plan.get(name, kind()), kind):
                    raise DamagedError(f"{path}: {name} is {found!r:.40}.")
            return plan
        except (OSError, DamagedError) as error:  # the report is not lost for that
            self.note(f"{error} What was planned for {method} here is not told.")
            return {}

    # Saying ---------------------------------------------------------------------------

    def note(self, words: str) -> None:
        """A paragraph, or lines to be kept as they are: printed, and in the report."""
        self._say(words)
        if words not in self.report.parts:
            self.report.parts.append(words)

    def table(
        self,
        title: str,
        columns: Iterable[str | Column],
        rows: Iterable[Sequence[Any]],
    ) -> None:
        """A table: printed, and kept; a later one of the same title replaces it.

        The first column names the row. Values go in as computed (bytes, seconds); a
        `Column` says how they are shown.
        """
        heads = tuple(Column(c) if isinstance(c, str) else c for c in columns)
        table = Table(title, heads, tuple(tuple(row) for row in rows))
        parts = self.report.parts
        parts[:] = [p for p in parts if not (isinstance(p, Table) and p.title == title)]
        parts.append(table)
        self._say(f"\n{title}")
        self.console.print(table.rich())

    def record(self, report: Any, name: str, *, reserve: int = GiB) -> None:
        """Keep a program's `jmem.MemoryReport`, and print its size and verdict."""
        self.memory[name] = report
        self.report.programs[name] = report.stablehlo_hash
        verdict = report.fits(reserve)
        whole = report.to_json()
        write_atomically(self.folder_of("memory") / f"{name}.json", whole + "\n")
        plain = json.loads(whole)
        self.report.memory[name] = {field: plain[field] for field in _KEPT} | {
            "fits": bool(verdict),
            "reserve_bytes": reserve,
        }
        from rich.markup import escape

        host = report.host_bytes
        more = f" + {gib(host)} of host memory" if host else ""
        fits = "[green]fits[/]" if verdict else "[red]does not fit[/]"
        shown, target = (escape(escape_controls(w)) for w in (name, report.target))
        self.console.print(
            f"[bold]{shown}[/]  {gib(report.device_bytes)}{more}  {fits} {target}"
            f"  [dim]compiled in {seconds(report.compile_seconds)}[/]",
            highlight=False,
        )

    def plot(self, name: str, make: Callable[[], Any]) -> None:
        """Save the matplotlib figure that `make` draws as `name`.png."""
        make().savefig(content := io.BytesIO(), format="png")
        write_atomically(self.picture(name), content.getvalue())

    def picture(self, name: str) -> pathlib.Path:
        """Where to save a picture that the report is to show."""
        if f"{name}.png" not in self.report.plots:
            self.report.plots.append(f"{name}.png")
        return self.folder / f"{name}.png"

    # Ending ---------------------------------------------------------------------------

    def __exit__(self, kind, error, trace) -> Literal[False]:
        try:
            return self._end(kind, error)
        finally:
            if self._made:
                self._hold.release()

    def _end(self, kind: Any, error: BaseException | None) -> Literal[False]:
        if error is None:
            if self.exports is not None:
                self.note(self.exports.tell())
            if self.trace:
                traces = sorted(map(str, self._folder.glob("*/trace")))
                self.note(
                    "Traces: " + (", ".join(traces) or "none; nothing was trained")
                )
            self.finish("complete")
            return False
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            self._say(str(error) or "interrupted")
        if self._made or self.report.parts:
            status = "interrupted" if interrupted else "failed"
            try:
                self.finish(status, error=str(error) or kind.__name__)
            except OSError as failed:  # what ended the run is what is told
                self._say(f"the report cannot be written: {failed}")
        if interrupted and self._made and not self.measure_only:
            folder = shlex.quote(str(self._folder))
            self._say(f"python -m experiments.{self.slug} --resume {folder}")
        return False

    def finish(self, status: str, **more: str) -> None:
        """Write report.json and report.md; `more` goes into their head."""
        self.report.head = {
            "experiment": self.slug,
            "command": quote_command(self.slug),
            "status": status,
            "started": f"{self._now:%Y-%m-%d %H:%M:%S %z}",
            "seconds": round(time.monotonic() - self._began, 1),
            "target": self._target.name if self._target else None,
            "device": None if self.measure_only else name_device(),
            "versions": read_versions(),
            **more,
        }
        for plan in sorted(self.folder.glob("*/plan.json")):  # of what was trained here
            if hashed := self.read_plan(plan.parent.name).get("program"):
                self.report.programs[f"{HERE}{plan.parent.name}"] = hashed
        write_atomically(self.folder / "report.json", self.report.json())
        write_atomically(self.folder / "report.md", self.report.markdown())
        self._say(f"report: {self.folder / 'report.md'}")

    def _say(self, words: str) -> None:
        shown = escape_lines(words)
        self.console.print(shown, markup=False, highlight=False, soft_wrap=True)


_KEPT = (
    *("target", "device_bytes", "interval", "host_bytes", "argument_bytes"),
    *("by_kind", "by_label", "stablehlo_hash", "compile_seconds"),
)
"""Of a memory report, what report.json repeats; memory/ holds all of it."""


def quote_command(slug: str) -> str:
    """The command line that started this process, ready to be pasted."""
    return shlex.join(["python", "-m", f"experiments.{slug}", *sys.argv[1:]])


def read_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("jmem", "jax", "jaxlib", "flax", "optax")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def name_device() -> str:
    """The default device that programs ran on, in words."""
    import jax

    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{count} x {kind}"
