"""A record: what was measured for a claim, on what, with what, and when.

`configs/<slug>/records.json` maps names of claims to records. It is written by
`python -m experiments.claims` only. JAX is imported where something is measured, not
where records are only read.

A record knows its programs by the hash of their lowered StableHLO, by name:

compile   the program that was compiled
train     each program of the run's config, as the run lowered it for the GPU of the
          config. What ran is made of the same functions, in the dtype and with the
          attention of the machine that ran it; a step that was trained there is noted
          besides, as `here/NAME`.
live      each program that the number comes from, as it is lowered for the described
          GPU that the attached one was. The GPU's own compiler tunes it further.

So any of them but `here/NAME` can be lowered again without the machine that ran it.
Records from before hashes were noted have none, and their tables say so.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import pathlib
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from experiments.harness import cli
from experiments.harness import config as configs
from experiments.harness.claim import Claim, Claims, ClaimsError, fits

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = "here/"
"""Before the name of a program that only the machine of a run had."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number. Memory is in bytes, anything else in the claim's unit."""

    value: float | int
    interval: tuple[int, int] | None = None
    """compile: device bytes with and without Triton matmuls, the smaller first."""
    definition: dict[str, Any]
    """The claim's definition when it was measured."""
    programs: dict[str, str] | None = None
    """Hashes by name, as said above; None where they were not noted."""
    config: str = ""
    """train, live: hash of the whole config of the run or the check."""
    versions: dict[str, str]
    device: str
    """What ran the program, or that it was only compiled."""
    commit: str
    """HEAD when it was recorded; "+" if the tree differed from it, "" outside git."""
    date: str
    moved: str = ""
    """The day on which its programs were first seen to be others; "" if never."""


# Files --------------------------------------------------------------------------------


def load(path: pathlib.Path) -> dict[str, Record]:
    """Read a records.json; one that is not there is empty.

    Raises:
      ClaimsError: it is not what `save` writes.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
        found = {name: _make_record(own, name) for name, own in values.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ClaimsError(f"{path}: not a file of records: {error}") from error
    return found


def _make_record(values: dict[str, Any], name: str) -> Record:
    record = configs.from_plain(Record, values)
    for field in dataclasses.fields(Record):
        if not fits(value := getattr(record, field.name), field.type):
            raise TypeError(f"{name}: {field.name}={value!r:.60}")
    if "jax" not in record.versions:
        raise ValueError(f"{name}: versions={record.versions!r:.60} says no jax")
    return record


def save(claims: Claims, records: dict[str, Record]) -> None:
    """Write the records of the claims that there are, in their order, atomically."""
    from jmem.disk import write_atomically

    known = {name: records[name] for name in claims.by_name if name in records}
    plain = {name: dataclasses.asdict(record) for name, record in known.items()}
    path = claims.path.with_name("records.json")
    write_atomically(path, json.dumps(plain, indent=2) + "\n")


# Programs -----------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A record's programs beside today's."""

    outcome: Literal["same", "changed", "unknown"]
    words: str = ""
    """What changed, or why it cannot be known."""


def compare(slug: str, claim: Claim, record: Record) -> Comparison:
    """Lower the programs of a record again, and compare their hashes."""
    import jax

    if not record.programs:
        return Comparison("unknown", "its program was not noted")
    if (then := record.versions["jax"]) != (now := jax.__version__):
        words = f"recorded under jax {then}, which jax {now} cannot confirm"
        return Comparison("unknown", words)
    programs, target = _build_programs(slug, claim, record.device)
    changed = [
        name
        for name, hashed in record.programs.items()
        if not name.startswith(HERE)
        and (name not in programs or _hash_once(programs[name], target) != hashed)
    ]
    if not changed:
        return Comparison("same")
    names = "" if len(record.programs) == 1 else f" {', '.join(changed)}"
    return Comparison("changed", f"its program{names} changed since {record.date}")


def _build_programs(
    slug: str, claim: Claim, device: str
) -> tuple[Mapping[str, Any], Any]:
    """Today's programs that a claim is about, and their target."""
    from jmem.memory.card import find_described
    from jmem.targets import resolve

    if claim.kind == "live":
        module = importlib.import_module(f"experiments.{claim.experiment}")
        target = find_described(device)
        return module.programs(claim.report[1], target, module.settings()), target
    module, config = _load_experiment(slug, claim)
    target = resolve(claim.target if claim.kind == "compile" else config.gpu)
    return _build_once(module.programs, config, target), target


@functools.cache
def _build_once(build: Callable, config: Any, target: Any) -> Mapping[str, Any]:
    """The programs of a config; kept, so that its claims share what is made of them."""
    return build(config, target)


@functools.cache
def _hash_once(program: Any, target: Any) -> str:
    """The hash of a program's StableHLO; kept, as claims share programs."""
    from jmem.memory.measure import hash_stablehlo

    return hash_stablehlo(program.lower(target).as_text())


@functools.cache
def _measure_once(program: Any, target: Any, bounds: bool) -> Any:
    """The memory report of a program; kept, as claims share programs."""
    from jmem.memory.measure import measure

    return measure(program, target=target, bounds=bounds, cache=False)


def _load_experiment(slug: str, claim: Claim) -> tuple[Any, Any]:
    """The experiment's module, and its config as its command line would read it."""
    module = importlib.import_module(f"experiments.{slug}")
    preset = ("--preset", claim.preset) if claim.preset else ()
    words = [*preset, *claim.flags]
    try:
        return module, cli.parse(module.Config, slug, words)[1]
    except SystemExit as error:  # what was wrong has been printed
        raise ClaimsError(
            f"experiments.{slug} has no flags {' '.join(words)}"
        ) from error


def measure(slug: str, claim: Claim, *, bounds: bool = True) -> Record:
    """Compile a claim's program and record it.

    Args:
      slug: the method; `experiments.<slug>` builds the program.
      claim: of kind compile.
      bounds: compile a second time, for the interval.

    Raises:
      ClaimsError: the experiment has no such preset, flag, program or quantity.
    """
    from jmem.targets import suggest

    programs, target = _build_programs(slug, claim, "")
    if (name := claim.program) not in programs:
        raise ClaimsError(
            f"experiments.{slug} builds no program {name!r}{suggest(name, programs)}"
        )
    report = _measure_once(programs[name], target, bounds)
    field, _, part = claim.quantity.partition("/")
    value = getattr(report, field, None)
    if part and isinstance(value, dict):
        value = value.get(part)
    if not isinstance(value, int):
        raise ClaimsError(
            f"{slug}/{claim.name}: quantity={claim.quantity!r} is no number of a memory"
            " report, as 'device_bytes' and 'by_label/weights' are"
        )
    whole = claim.quantity == "device_bytes" and bounds
    return Record(
        value=value,
        interval=report.interval if whole else None,
        definition=claim.definition,
        programs={name: report.stablehlo_hash},
        versions=report.versions,
        device="compiled ahead of time",
        commit=read_commit(),
        date=datetime.date.today().isoformat(),
    )


# Runs and checks ----------------------------------------------------------------------


def read_report(run: pathlib.Path) -> dict[str, Any]:
    """The report of a finished run, from its folder; or of a check, from its file.

    Raises:
      ClaimsError: there is none, it is damaged, or the run did not end well.
    """
    from jmem.disk import open_sealed

    path = run if run.is_file() else run / "report.json"
    try:
        report = open_sealed(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise ClaimsError(f"--from-run {run}: no report there: {error}") from None
    if report.get("status") != "complete":
        raise ClaimsError(
            f"--from-run {run}: the run is {report.get('status')}; claims are read from"
            " runs that are complete"
        )
    return report


class NotAnsweredError(ClaimsError):
    """A run of another config than the claim's, or a check without the claim's row."""


def take(slug: str, claim: Claim, run: pathlib.Path) -> Record:
    """Take a claim's number out of a finished run of the claim's own config.

    Raises:
      NotAnsweredError: the run was not asked what the claim says.
      ClaimsError: it was, but its report has no such number; or a check was of other
        sizes.
    """
    report = read_report(run)
    live = claim.kind == "live"
    config = "" if live else _run_config(slug, claim, run)
    value: Any = report
    programs = report.get("programs")
    for key in claim.report:
        if not isinstance(value, dict) or key not in value:
            known = map(repr, value) if isinstance(value, dict) else ("nothing",)
            raise (NotAnsweredError if live else ClaimsError)(
                f"--from-run {run}: report.json has no {key!r} of"
                f" {'/'.join(claim.report)}; there is {', '.join(known)}"
            )
        value = value[key]
        if isinstance(value, dict):  # a row of a check has its own
            programs = value.get("programs", programs)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClaimsError(
            f"--from-run {run}: {'/'.join(claim.report)} is {value!r}, no number"
        )
    if live:
        config = _check_config(slug, claim, run)
    return Record(
        value=value,
        definition=claim.definition,
        programs=programs,
        config=hashlib.sha256(config.encode()).hexdigest(),
        versions=report["versions"],
        device=report["device"],
        commit=read_commit(),
        date=report["started"][:10],
    )


def _check_config(slug: str, claim: Claim, file: pathlib.Path) -> str:
    """The config of a check as JSON, if it is that of its defaults."""
    module = importlib.import_module(f"experiments.{claim.experiment}")
    ran = json.dumps(read_report(file).get("config"), sort_keys=True)
    if ran != (wanted := json.dumps(module.settings(), sort_keys=True)):
        raise ClaimsError(
            f"--from-run {file}: config={ran}, but {slug}/{claim.name} is about"
            f" {wanted}"
        )
    return ran


def _run_config(slug: str, claim: Claim, run: pathlib.Path) -> str:
    """The config of a run as TOML, if it is the claim's; else the field is named."""
    _, wanted = _load_experiment(slug, claim)
    ran = configs.read(run / "config.toml", wanted)
    for field, expected, found in configs.find_differences(wanted, ran):
        if field == "export":  # what a run leaves changes no number
            continue
        raise NotAnsweredError(
            f"--from-run {run}: {field}={found!r}, but {slug}/{claim.name} is about"
            f" {field}={expected!r}"
        )
    return configs.write(ran)


def read_commit() -> str:
    """HEAD of the checkout, with "+" if the working tree differs; "" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=10", "HEAD")
    return head + "+" if head and git("status", "--porcelain") else head
