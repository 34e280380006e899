"""A record: what was measured for a claim, on what, with what, and when.

`configs/<slug>/records.json` maps names of claims to records. It is written by
`python -m experiments.claims` only. JAX is imported where something is measured, not
where records are only read.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import os
import pathlib
import subprocess
from typing import Any

from experiments.harness.claim import Claim, Claims, ClaimsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number. Memory is in bytes, anything else in the claim's unit."""

    value: float | int
    interval: tuple[int, int] | None = None
    """compile: device bytes with and without Triton matmuls, the smaller first."""
    definition: dict[str, Any]
    """The claim's definition when it was measured."""
    program: str
    """compile: hash of the lowered StableHLO; else of the run's whole config."""
    versions: dict[str, str]
    device: str
    """What ran the program, or that it was only compiled."""
    commit: str
    """HEAD when it was recorded; "+" if the tree differed from it, "" outside git."""
    date: str


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
        return {name: _from_plain(fields) for name, fields in values.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ClaimsError(f"{path}: not a file of records: {error}") from error


def _from_plain(fields: dict[str, Any]) -> Record:
    if (interval := fields.get("interval")) is not None:
        fields["interval"] = tuple(interval)
    return Record(**fields)


def save(claims: Claims, records: dict[str, Record]) -> None:
    """Write the records of the claims that there are, in their order, atomically."""
    known = {name: records[name] for name in claims.by_name if name in records}
    plain = {name: dataclasses.asdict(record) for name, record in known.items()}
    path = claims.path.with_name("records.json")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(plain, indent=2) + "\n")
    os.replace(partial, path)


# Measuring ----------------------------------------------------------------------------


def measured(slug: str, claim: Claim, *, bounds: bool = True) -> Record:
    """Compile a claim's program and record it.

    Args:
      slug: the method; `experiments.<slug>` builds the program.
      claim: of kind compile.
      bounds: compile a second time, for the interval.

    Raises:
      ClaimsError: the experiment has no such preset, flag, program or quantity.
    """
    where = (slug, claim.preset, claim.flags, claim.target, claim.program)
    report = _report(*where, bounds)
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
        program=report.stablehlo_hash,
        versions=report.versions,
        device="compiled ahead of time",
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )


def moved(slug: str, claim: Claim, record: Record) -> str:
    """Lower a recorded program again: "", or in words how it differs."""
    import jax

    from jmem.memory.measure import stablehlo_hash
    from jmem.targets import resolve

    if (then := record.versions["jax"]) != jax.__version__:
        return f"recorded under jax {then}, which jax {jax.__version__} cannot confirm"
    program = _program(slug, claim.preset, claim.flags, claim.target, claim.program)
    now = stablehlo_hash(program.lower(resolve(claim.target)).as_text())
    return "" if now == record.program else f"its program changed since {record.date}"


@functools.cache
def _report(slug, preset, flags, target, program, bounds) -> Any:
    """Claims about one program share its report."""
    from jmem.memory.measure import measure

    built = _program(slug, preset, flags, target, program)
    return measure(built, target=target, bounds=bounds, cache=False)


def _program(slug, preset, flags, target, name) -> Any:
    from jmem.targets import nearest, resolve

    module, config = _experiment(slug, preset, flags)
    programs = module.programs(config, resolve(target))
    if name not in programs:
        raise ClaimsError(
            f"experiments.{slug} builds no program {name!r}{nearest(name, programs)}"
        )
    return programs[name]


def _experiment(slug: str, preset: str, flags: tuple[str, ...]) -> tuple[Any, Any]:
    """The experiment's module, and its config as its command line would read it."""
    from experiments.harness import cli

    module = importlib.import_module(f"experiments.{slug}")
    words = [*(("--preset", preset) if preset else ()), *flags]
    try:
        return module, cli.parse(module.Config, slug, words)[1]
    except SystemExit as error:  # what was wrong has been printed
        raise ClaimsError(
            f"experiments.{slug} has no flags {' '.join(words)}"
        ) from error


# Runs ---------------------------------------------------------------------------------


def of_run(run: pathlib.Path) -> dict[str, Any]:
    """The report of a finished run, from its folder; or of a check, from its file.

    Raises:
      ClaimsError: there is none, or the run did not end well.
    """
    path = run if run.is_file() else run / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ClaimsError(f"--from-run {run}: no report there: {error}") from None
    if report.get("status") != "complete":
        raise ClaimsError(
            f"--from-run {run}: the run is {report.get('status')}; claims are read from"
            " runs that are complete"
        )
    return report


def answers(slug: str, claim: Claim, run: pathlib.Path) -> bool:
    """Whether a run is of the claim's config; of a check, whether it has the row."""
    if claim.kind == "train":
        return not _differences(slug, claim, run)[0]
    value: Any = of_run(run)
    for key in claim.report:
        value = value.get(key) if isinstance(value, dict) else None
    return value is not None


def reported(slug: str, claim: Claim, run: pathlib.Path) -> Record:
    """Take a claim's number out of a finished run of the claim's own config.

    Raises:
      ClaimsError: the run had another config, or its report has no such number.
    """
    report = of_run(run)
    if claim.kind == "live":
        module = importlib.import_module(f"experiments.{claim.experiment}")
        ran = json.dumps(report.get("config"), sort_keys=True)
        if ran != (wanted := json.dumps(module.settings(), sort_keys=True)):
            raise ClaimsError(
                f"--from-run {run}: config={ran}, but {slug}/{claim.name} is about"
                f" {wanted}"
            )
    else:
        ran = _ran(slug, claim, run)
    value: Any = report
    for key in claim.report:
        if not isinstance(value, dict) or key not in value:
            known = (
                ", ".join(map(repr, value)) if isinstance(value, dict) else "nothing"
            )
            raise ClaimsError(
                f"--from-run {run}: report.json has no {key!r} of"
                f" {'/'.join(claim.report)}; there is {known}"
            )
        value = value[key]
    if type(value) not in (int, float):
        raise ClaimsError(
            f"--from-run {run}: {'/'.join(claim.report)} is {value!r}, no number"
        )
    return Record(
        value=value,
        definition=claim.definition,
        program=hashlib.sha256(ran.encode()).hexdigest(),
        versions=report["versions"],
        device=report["device"],
        commit=commit(),
        date=report["started"][:10],
    )


def _ran(slug: str, claim: Claim, run: pathlib.Path) -> str:
    """The config of a run as TOML, if it is the claim's.

    Raises:
      ClaimsError: it is another; names the field.
    """
    from experiments.harness import config as configs

    differences, ran = _differences(slug, claim, run)
    for field, expected, found in differences:
        raise ClaimsError(
            f"--from-run {run}: {field}={found!r}, but {slug}/{claim.name} is about"
            f" {field}={expected!r}"
        )
    return configs.write(ran)


def _differences(slug: str, claim: Claim, run: pathlib.Path) -> tuple[list, Any]:
    """Fields in which a run's config is not the claim's, and the run's config."""
    from experiments.harness import config as configs

    _, wanted = _experiment(slug, claim.preset, claim.flags)
    ran = configs.read(run / "config.toml", wanted)
    return list(configs.differences(wanted, ran)), ran


def commit() -> str:
    """HEAD of the checkout, with "+" if the working tree differs; "" outside git."""

    def git(*words: str) -> str:
        here = pathlib.Path(__file__).parent
        done = subprocess.run(("git", *words), cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=10", "HEAD")
    return head + "+" if head and git("status", "--porcelain") else head
