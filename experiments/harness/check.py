"""Checks that only a GPU can make: rows, each measured in processes of its own.

A check is a module of `experiments` with

    settings()                      its report's config, when run by its defaults
    programs(row, target, config)   the programs of a row, by name, for a described GPU
    main(command)                   which measures rows with `Check.measure`

This process never holds the GPU. The report is one JSON file, written as rows come:

    {"experiment", "status", "started", "device", "versions", "config", "PART": ROWS}

Each row holds what was measured, and under "programs" the hashes of its programs as
they are lowered for the described GPU that the attached one is: what can be lowered
again anywhere. `python -m experiments.claims --from-run FILE` takes the report up when
it is complete. With `--minutes` a call ends in time, and the next one with the same
file keeps every row whose program is still the same.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

from experiments.harness.config import find_slug, from_plain
from jmem.disk import open_sealed, seal, write_atomically
from jmem.memory import protocol
from jmem.memory.card import NoGPUError, find_described
from jmem.memory.measure import hash_stablehlo
from jmem.program import Program
from jmem.targets import resolve, suggest

type Row = dict[str, Any]
"""What was measured of a row, as JSON holds it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What every check understands; its own flags come after."""

    only: tuple[str, ...] = ()
    """Rows to measure; all if it is not given."""
    out: pathlib.Path = pathlib.Path("runs/check.json")
    """File of the report."""
    minutes: float | None = None
    """Begin no row that would end later, and keep the rows that the report holds."""


@dataclasses.dataclass
class Check:
    """One call of a check.

    Raises:
      ValueError: `only` names no row, or the attached GPU is not a described one.
      NoGPUError: none is attached.
    """

    name: str
    """The module, without `experiments.`."""
    flags: Flags
    config: Mapping[str, Any]
    """The module's `settings()`, or what this call has in their place."""
    every: Iterable[str]
    """Names of all rows."""
    gpu: str = ""
    """The described GPU that the attached one is; by its own name if empty."""
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    """Rows whose processes failed, and what they said."""

    def __post_init__(self):
        self._began = time.monotonic()
        self._longest = 0.0
        self.every = tuple(self.every)
        for row in self.flags.only:
            if row not in self.every:
                tail = suggest(row, self.every)
                raise ValueError(
                    f"{self.name}: --only {row}: there is no such row{tail}"
                )
        self.rows = self.flags.only or self.every
        self.probed = protocol.probe()
        known = find_described(self.probed["device"])
        if known is None and not self.gpu:
            raise ValueError(
                f"{self.name}: {self.probed['device']!r} is not a described GPU, so"
                " nothing can be predicted; name one like it by --gpu."
            )
        self.gpu = self.gpu or getattr(known, "name", "")
        print(f"{self.probed['device']}, jax {self.probed['versions']['jax']}")

    def measure(
        self,
        part: str,
        measure: Callable[[str], Row],
        show: Callable[[str, Row], str],
        lanes: int = 1,
    ) -> dict[str, Row]:
        """The rows that are there in the end, which may be some of all.

        Args:
          part: of the report, that holds the rows.
          measure: a row's numbers, from processes of its own.
          show: a row's lines, printed when it is there.
          lanes: rows measured beside each other.
        """
        lock = threading.Lock()
        with (
            futures.ThreadPoolExecutor(1) as aside,
            futures.ThreadPoolExecutor(lanes) as beside,
        ):
            hashes = aside.submit(self._hash_programs)
            found = self._keep(part, hashes) if self.flags.minutes else {}
            for row in found:
                print(show(row, found[row]), flush=True)

            def one(row: str) -> None:
                try:
                    if (own := self._time(measure, row)) is None:
                        return
                    own |= {"programs": hashes.result()[row]}
                except protocol.StageError as error:
                    self.broken[row] = str(error)
                    print(f"{row}: {error}", flush=True)
                    return
                with lock:
                    found[row] = own
                    print(show(row, own), flush=True)
                    self._write(part, found)

            left = [row for row in self.rows if row not in found]
            list(beside.map(one, left))  # or what one of them raised
        if none := [r for r in left if r not in found and r not in self.broken]:
            print(f"no time for {' '.join(none)}; the same call goes on with them")
        return self._sort(found)

    def confirm(self, row: str, **how: Any) -> Row:
        """A `LiveReport` of a row's one program; `how` as `protocol.confirm` takes it.

        Also how far the peak is from its prediction, in percent.
        """
        given = (self.name, row, self.config, self.gpu)
        report = protocol.confirm(build, *given, target=self.gpu, **how)
        return dataclasses.asdict(report) | {
            "off_percent": 100 * abs(report.compute_error())
        }

    def _time(self, measure: Callable[[str], Row], row: str) -> Row | None:
        """A row's numbers; None where no time is left for one as long as the last."""
        began = time.monotonic()
        limit = self.flags.minutes
        if limit and began - self._began + self._longest > 60 * limit:
            return None
        found = measure(row)
        self._longest = max(self._longest, time.monotonic() - began)
        return found

    def _hash_programs(self) -> dict[str, dict[str, str]]:
        """`hash_programs` of the rows, in a process of its own without the GPU."""
        arguments = (self.name, self.rows, self.config, self.gpu)
        without_gpu = protocol.make_environment("predict", "")
        return protocol.call(hash_programs, *arguments, environment=without_gpu)

    def _keep(self, part: str, hashes: futures.Future) -> dict[str, Row]:
        """Rows of the report that is there, of the same GPU, versions and programs."""
        try:
            where = self.flags.out
            report = open_sealed(where.read_bytes(), str(where), bare=False)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            print(f"{error} All of it is measured again.", flush=True)
            return {}
        ours = {**self.probed, "config": json.loads(json.dumps(self.config))}
        if any(report.get(key) != value for key, value in ours.items()):
            return {}
        kept, now = self._sort(report.get(part, {})), hashes.result()
        return {row: kept[row] for row in kept if kept[row].get("programs") == now[row]}

    def _write(self, part: str, rows: Mapping[str, Row]) -> None:
        """Writes the report with the rows so far; with all of them it is complete."""
        head = (self.name, self.probed, self.config, len(rows) == len(self.rows))
        write(self.flags.out, *head, **{part: self._sort(rows)})

    def _sort(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        """Those of this call's rows that are there, in their order."""
        return {row: rows[row] for row in self.rows if row in rows}


def write(
    path: pathlib.Path,
    experiment: str,
    probed: Mapping[str, Any],
    config: Mapping[str, Any],
    complete: bool,
    **parts: Any,
) -> None:
    """Writes the whole report anew; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "experiment": experiment,
        "status": "complete" if complete else "running",
        "started": time.strftime("%Y-%m-%d"),
        **probed,
        "config": config,
    }
    write_atomically(path, seal(head | parts, indent=1) + "\n")


def restore[Value](kind: type[Value], row: Row) -> Value:
    """A dataclass whose fields are a row's entries, lists as tuples."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return from_plain(kind, {name: row[name] for name in names})


# Programs -----------------------------------------------------------------------------


def build(name: str, row: str, config: Mapping[str, Any], gpu: str) -> Program:
    """The one program of a check's row, for the GPU called `gpu`."""
    module = importlib.import_module(f"experiments.{name}")
    (program,) = module.programs(row, resolve(gpu), config).values()
    return program


def hash_programs(
    name: str, rows: Iterable[str], config: Mapping[str, Any], gpu: str
) -> dict[str, dict[str, str]]:
    """By row and name, the hashes of a check's programs, lowered for the GPU `gpu`."""
    module, target = importlib.import_module(f"experiments.{name}"), resolve(gpu)
    return {
        row: {
            name: hash_stablehlo(program.lower(target).as_text())
            for name, program in module.programs(row, target, config).items()
        }
        for row in rows
    }


def needs_gpu[Command](main: Callable[[Command], int]) -> Callable[[Command], int]:
    """`main`, which without a GPU says so and measures nothing: exit status 0."""

    @functools.wraps(main)
    def wrapped(command: Command) -> int:
        try:
            return main(command)
        except NoGPUError as error:
            print(f"{find_slug(main)}: {error}\nNothing was measured.")
            return 0

    return wrapped
