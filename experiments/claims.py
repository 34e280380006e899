"""What the papers claim, what we measure, and whether what must hold does hold.

    python -m experiments.claims                       measure all that is compiled
    python -m experiments.claims --only 'lisa/tiny*'   measure these
    python -m experiments.claims --missing             measure what has no record yet
    python -m experiments.claims --from-run DIR        take up a finished run's report
    python -m experiments.claims --from-run FILE       ... or that of a check on a GPU
    python -m experiments.claims --table               write the tables from the records
    python -m experiments.claims --check               tables == records? exit 1 if not
    python -m experiments.claims --stale               has a recorded program changed?

`configs/<slug>/claims.toml` is written by hand, its expectations before anything is
measured; `configs/<slug>/records.json`, docs/claims.md and what stands between the
markers of README.md and docs/finetune.md are written by this program only. A number
whose claim was edited since is shown as stale until it is measured again; one whose
program changed since is marked, and so is one whose program was not noted. A claim that
does not hold is a row like the others, and counted in the README.
"""

import dataclasses
import datetime
import fnmatch
import pathlib
import runpy
import time
from collections import Counter
from collections.abc import Collection

from experiments.harness import cli, record, tables
from experiments.harness.claim import ClaimsError
from experiments.harness.record import ROOT
from experiments.harness.tables import Everything, find_current


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    only: tuple[str, ...] = ()
    """Claims to measure, or to lower again with --stale, as slug/name with * for
    anything; empty means all."""
    missing: bool = False
    """Measure only claims that have no current record."""
    from_run: pathlib.Path | None = None
    """Folder of a finished run, whose report answers claims of kind train; or the file
    that a check on a GPU wrote, which answers those of kind live."""
    table: bool = False
    """Only write the tables, from what is recorded."""
    check: bool = False
    """Only compare the tables with the records; exit 1 if they differ."""
    stale: bool = False
    """Only lower the recorded programs again, and mark those that have changed; exit 1
    if one has."""


def main(command: Command, root: pathlib.Path = ROOT) -> int:
    """Carry out one command; the exit status."""
    everything = tables.load(root)
    if command.check:
        return check(everything, root)
    if command.stale:
        return compare(everything, root, command.only)
    slugs = {claims.slug for claims, _ in everything}
    if command.from_run is not None:
        slugs = take_up(command.from_run, everything)
    elif not command.table:
        slugs = measure(everything, command.only, missing=command.missing)
    write(root, slugs)
    return 0


def generate(everything: Everything, root: pathlib.Path) -> dict[pathlib.Path, str]:
    """Every generated file; the methods' cards are read without importing `jmem`."""
    methods = runpy.run_path(str(ROOT / "jmem" / "methods.py"))["render_table"]()
    return tables.render_files(everything, root, methods)


def write(root: pathlib.Path, slugs: Collection[str]) -> None:
    """Write every generated file from what is recorded, and print tables of `slugs`."""
    everything = tables.load(root)
    for claims, records in everything:
        if records:
            record.save(claims, records)  # without those whose claim is gone
        if claims.slug in slugs:
            print(f"\n{claims.slug}\n{tables.format_table(claims, records)}")
    write_files(root)


def write_files(root: pathlib.Path) -> None:
    """Write every generated file from what is recorded."""
    from jmem.disk import write_atomically  # with JAX, which --check does without

    for path, text in generate(tables.load(root), root).items():
        write_atomically(path, text)


def check(everything: Everything, root: pathlib.Path) -> int:
    """Compare the generated files with claims and records; 1 if one differs."""
    status = 0
    for path, text in generate(everything, root).items():
        if not path.exists() or path.read_text() != text:
            print(f"{path.relative_to(root)} differs from claims and records")
            status = 1
    for claims, records in everything:
        for name in records.keys() - claims.by_name.keys():
            print(f"{claims.slug}: a record of {name!r}, which is no claim")
            status = 1
    if status:
        print("write them again: python -m experiments.claims --table")
    return status


def is_asked(name: str, only: tuple[str, ...]) -> bool:
    """Whether a claim is one of those that --only means."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in only or ("*",))


def measure(
    everything: Everything, only: tuple[str, ...], *, missing: bool
) -> set[str]:
    """Measure claims of kind compile, keeping each record as soon as it is there.

    The slugs of what was measured.
    """
    wanted = [
        (claims, records, claim)
        for claims, records, claim in tables.list_claims(everything)
        if claim.kind == "compile"
        and is_asked(f"{claims.slug}/{claim.name}", only)
        and not (missing and find_current(claim, records))
    ]
    if only and not wanted:
        raise ClaimsError(
            f"--only {' '.join(only)}: no claim of kind compile is so named"
        )
    for number, (claims, records, claim) in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {claims.slug}/{claim.name}", flush=True)
        start = time.monotonic()
        records[claim.name] = record.measure(claims.slug, claim)
        record.save(claims, records)
        ours = tables.describe_value(claim, records[claim.name])
        words = tables.judge(claim, claims, records)
        print(f"    {ours}: {words} ({time.monotonic() - start:.0f} s)")
    return {claims.slug for claims, _, _ in wanted}


def take_up(run: pathlib.Path, everything: Everything) -> set[str]:
    """Record the claims that a finished run, or a check on a GPU, answers.

    The slugs of what was recorded.
    """
    report = record.read_report(run)
    kind = "live" if run.is_file() else "train"
    asked = [
        (claims, records, claim)
        for claims, records, claim in tables.list_claims(everything)
        if claim.kind == kind
        and report["experiment"] == (claim.experiment or claims.slug)
    ]
    if not asked:
        raise ClaimsError(
            f"--from-run {run}: no claim of kind {kind!r} asks for a run of"
            f" {report['experiment']!r}"
        )
    taken, refused = [], []
    for claims, records, claim in asked:
        try:
            found = record.take(claims.slug, claim, run)
            taken.append((claims, records, claim.name, found))
        except record.NotAnsweredError as error:
            # A method has claims about runs of several presets, a check rows not asked.
            refused.append(error)
    if kind == "train" and not taken:
        raise refused[0]
    for claims, records, name, found in taken:  # all or none
        records[name] = found
        record.save(claims, records)
    return {claims.slug for claims, _, _, _ in taken}


def compare(everything: Everything, root: pathlib.Path, only: tuple[str, ...]) -> int:
    """Lower the recorded programs that are asked for, and mark those that have changed.

    1 if one has, or if that of a compiled claim cannot be lowered as it was. What was
    measured by a run or on a GPU may be of another JAX, or have no program noted: it is
    counted, and its tables say so.
    """
    status, unknown = 0, Counter[str]()
    today = datetime.date.today().isoformat()
    for claims, records, claim in tables.list_claims(everything):
        name = f"{claims.slug}/{claim.name}"
        mine = find_current(claim, records) if is_asked(name, only) else None
        if mine is None:
            continue
        outcome, words = record.compare(claims.slug, claim, mine)
        if outcome == "unknown" and claim.kind != "compile":
            unknown[f"{claim.kind}: {words}"] += 1
            continue
        moved = (mine.moved or today) if outcome == "changed" else ""
        records[claim.name] = dataclasses.replace(mine, moved=moved)
        if words:
            print(f"{name}: {words}")
            status = 1
    for claims, records in everything:
        record.save(claims, records)
    for words, number in unknown.items():
        print(f"{number} of kind {words}")
    if status:
        print("measure them again: python -m experiments.claims --only SLUG/NAME")
    write_files(root)
    return status


if __name__ == "__main__":
    cli.script(main, Command)
