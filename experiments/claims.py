"""What the papers claim, what we measure, and whether what must hold does hold.

    python -m experiments.claims                       measure all that is compiled
    python -m experiments.claims --only 'lisa/tiny*'   measure these
    python -m experiments.claims --missing             measure what has no record yet
    python -m experiments.claims --from-run DIR        take up a finished run's report
    python -m experiments.claims --from-run FILE       ... or that of a check on a GPU
    python -m experiments.claims --table               write the tables from the records
    python -m experiments.claims --check               tables == records? exit 1 if not
    python -m experiments.claims --stale               has a measured program changed?

`configs/<slug>/claims.toml` is written by hand, its expectations before anything is
measured; `configs/<slug>/records.json`, `configs/<slug>/claims.md` and the table in
README.md are written by this program only. A number whose claim was edited since is
shown as stale until it is measured again. A claim that does not hold is a row like the
others, and always in the README.
"""

import dataclasses
import fnmatch
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

from experiments.harness import record
from experiments.harness.claim import BYTES, Claim, Claims, ClaimsError, Relation, read
from experiments.harness.record import Record

ROOT = pathlib.Path(__file__).resolve().parents[1]

Records = dict[str, Record]
ROOM = {"24 GB": 20.6, "48 GB": 44.5, "80 GB": 76.1, "141 GB": 138.0}
"""GiB that cards have after driver and reserve: rtx4090, a6000, h100 and h200, as
`jmem.targets` has them (a test compares), without importing JAX."""


def load(root: pathlib.Path = ROOT) -> list[tuple[Claims, Records]]:
    """The claims and records of every method that has any, by slug."""
    paths = sorted(root.glob("configs/*/claims.toml"))
    return [(read(path), record.load(path.with_name("records.json"))) for path in paths]


# ------------------------------------------------------------------ the verdict


def verdict(claim: Claim, claims: Claims, records: Records) -> str:
    """One of: holds, fails, open, stale, not measured, not checkable; and why."""
    if claim.kind == "not-checkable":
        return f"not checkable: {claim.reason}"
    mine = records.get(claim.name)
    if mine is None:
        return "not measured"
    if mine.definition != claim.definition:
        return "**stale**: the claim was edited after it was measured"

    ours = mine.value
    bars: dict[str, Any] = {"paper": claim.paper, "expect": claim.expect}
    bars["margin"] = claim.margin

    def value(name: str) -> float | None:
        if name == "ours":
            return ours
        if name in claims.by_name:
            theirs = current(claims.by_name[name], records)
            return None if theirs is None else theirs.value
        number = bars[name] if name in bars else float(name)
        return None if number is None else number * claim.scale

    relations = {text: Relation.parse(text).holds(value) for text in claim.relations}
    if failing := [text for text, holds in relations.items() if holds is False]:
        return f"**fails**: {_code(failing)}"
    if waiting := [text for text, holds in relations.items() if holds is None]:
        return f"open: {_code(waiting)} waits for a number"
    return "holds"


def current(claim: Claim, records: Records) -> Record | None:
    """The record of a claim, if it was measured for the claim as it stands."""
    found = records.get(claim.name)
    return found if found and found.definition == claim.definition else None


def shown(claim: Claim, claims: Claims, records: Records) -> bool:
    """Whether the README shows a claim: the chosen ones, and all that went wrong."""
    return claim.headline or verdict(claim, claims, records).startswith("**")


# ------------------------------------------------------------------- the tables


def table(claims: Claims, records: Records, *, headlines: bool = False) -> str:
    """Markdown rows of one method's claims: all of them, or those of the README."""
    rows = [
        "| claim | paper | expected | ours | must hold | verdict | measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for claim in claims.by_name.values():
        if headlines and not shown(claim, claims, records):
            continue
        mine = records.get(claim.name)
        cells = [
            claim.what,
            _paper(claim),
            _amount(claim.expect, claim),
            _ours(claim, mine),
            _code(claim.relations),
            verdict(claim, claims, records),
            _measured(claim, mine),
        ]
        rows.append(f"| {' | '.join(cell.replace('|', r'\|') for cell in cells)} |")
    return "\n".join(rows)


def readme_section(everything: list[tuple[Claims, Records]]) -> str:
    """What stands between the markers of README.md."""
    parts = []
    for claims, records in everything:
        path = f"configs/{claims.slug}/claims.md"
        head = f"### {claims.slug}\n\n{_sentence(claims.setting)}"
        rows = table(claims, records, headlines=True)
        count = len(claims.by_name)
        parts.append(f"{head}\n\n{rows}\n\nAll {count} claims: [{path}]({path}).")
    return "\n\n".join(parts)


def page(claims: Claims, records: Records) -> str:
    """The whole of configs/<slug>/claims.md."""
    return (
        f"# Claims of {claims.slug}\n\n"
        "Written by `python -m experiments.claims` from claims.toml and"
        " records.json.\n\n"
        f"{_sentence(claims.setting)}\n\n{table(claims, records)}\n"
    )


def choices(everything: list[tuple[Claims, Records]]) -> str:
    """Which method trains which model on which card: claims with a `choice`.

    By model and bytes. A card is named if the interval's upper end fits in its `ROOM`.
    """
    rows = [
        "| model | method | trains | device memory | fits |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = [
        (claim.choice, mine)
        for claims, records in everything
        for claim in claims.by_name.values()
        if claim.choice and (mine := current(claim, records))
    ]
    found.sort(key=lambda row: row[1].value)
    models = list(dict.fromkeys(choice[0] for choice, _ in found))
    found.sort(key=lambda row: models.index(row[0][0]))
    for choice, mine in found:
        most = max(mine.interval or (mine.value,))
        cards = [card for card, room in ROOM.items() if most <= room * 2**30]
        size = f"{mine.value / 2**30:.1f} GiB"
        cells = [*choice, size, ", ".join(cards) or "none of these"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _sentence(setting: str) -> str:
    return " ".join(setting.split())


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _amount(value: float | str | None, claim: Claim) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:g} {claim.unit}"


def _paper(claim: Claim) -> str:
    if claim.paper is None:
        return claim.source
    doubt = "" if claim.confirmed else ", unconfirmed"
    return f"{_amount(claim.paper, claim)} ({claim.source}{doubt})"


def _ours(claim: Claim, mine: Record | None) -> str:
    if mine is None:
        return ""
    text = f"{mine.value / claim.scale:.{2 if claim.unit in BYTES else 4}f}"
    low, high = (f"{bound / claim.scale:.2f}" for bound in mine.interval or (0, 0))
    bounds = f" ({low} to {high})" if low != high else ""
    return f"{text} {claim.unit}{bounds}"


def _measured(claim: Claim, mine: Record | None) -> str:
    if mine is None:
        return ""
    how = f"compiled for {claim.target}" if claim.kind == "compile" else mine.device
    return f"{how}, jax {mine.versions['jax']}, {mine.date}"


def files(
    everything: list[tuple[Claims, Records]], root: pathlib.Path
) -> dict[pathlib.Path, str]:
    """Every generated file, and the text it should hold."""
    readme = root / "README.md"
    text = splice(readme.read_text(), "claims", readme_section(everything))
    texts = {readme: splice(text, "choices", choices(everything))}
    for claims, records in everything:
        texts[claims.path.with_name("claims.md")] = page(claims, records)
    return texts


def splice(text: str, name: str, section: str) -> str:
    """`text` with what stands between the markers called `name` replaced."""
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ClaimsError(
            f"README.md has lost its markers '<!-- {name}:begin -->', end"
        )
    return f"{before}{begin}{section}{end}{after}"


# ----------------------------------------------------------------- the commands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    only: tuple[str, ...] = ()
    """Claims to measure, as slug/name with * for anything; empty means all."""
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
    """Only lower the measured programs again; exit 1 if one has changed."""


def main(command: Command, root: pathlib.Path = ROOT) -> int:
    """Carry out one command; the exit status."""
    everything = load(root)
    if command.check:
        return check(everything, root)
    if command.stale:
        return stale(everything)
    if command.from_run is not None:
        take_up(command.from_run, everything)
    elif not command.table:
        measure(everything, command.only, missing=command.missing)
    write(root)
    return 0


def write(root: pathlib.Path) -> None:
    """Write and print every table, that of the methods too, from what is recorded."""
    from jmem import methods

    everything = load(root)
    for claims, records in everything:
        if records:
            record.save(claims, records)  # without those whose claim is gone
        print(f"\n{claims.slug}\n{table(claims, records)}")
    texts = files(everything, root)
    readme = root / "README.md"
    texts[readme] = splice(texts[readme], "methods", methods.table())
    for path, text in texts.items():
        path.write_text(text)


def check(everything: list[tuple[Claims, Records]], root: pathlib.Path) -> int:
    """Compare the generated files with claims and records; 1 if one differs."""
    status = 0
    for path, text in files(everything, root).items():
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


def measure(
    everything: list[tuple[Claims, Records]], only: tuple[str, ...], *, missing: bool
) -> None:
    """Measure claims of kind compile, keeping each record as soon as it is there."""
    wanted = [
        (claims, records, claim)
        for claims, records in everything
        for claim in claims.by_name.values()
        if claim.kind == "compile"
        and (not only or any(_matches(claims, claim, pattern) for pattern in only))
        and not (missing and current(claim, records))
    ]
    if only and not wanted:
        raise ClaimsError(
            f"--only {' '.join(only)}: no claim of kind compile is so named"
        )
    for number, (claims, records, claim) in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {claims.slug}/{claim.name}", flush=True)
        start = time.monotonic()
        records[claim.name] = record.measured(claims.slug, claim)
        record.save(claims, records)
        ours, seconds = _ours(claim, records[claim.name]), time.monotonic() - start
        print(f"    {ours}: {verdict(claim, claims, records)} ({seconds:.0f} s)")


def _matches(claims: Claims, claim: Claim, pattern: str) -> bool:
    return fnmatch.fnmatch(f"{claims.slug}/{claim.name}", pattern)


def take_up(run: pathlib.Path, everything: list[tuple[Claims, Records]]) -> None:
    """Record the claims that a finished run, or a check on a GPU, answers."""
    report = record.of_run(run)
    kind = "live" if run.is_file() else "train"
    asked = [
        (claims, records, claim)
        for claims, records in everything
        for claim in claims.by_name.values()
        if claim.kind == kind
        and report["experiment"] == (claim.experiment or claims.slug)
    ]
    if not asked:
        raise ClaimsError(
            f"--from-run {run}: no claim of kind {kind!r} asks for a run of"
            f" {report['experiment']!r}"
        )
    # A method has claims about runs of several presets, a check rows not asked for.
    mine = [one for one in asked if record.answers(one[0].slug, one[2], run)]
    if kind == "train":
        mine = mine or asked[:1]  # which says what differs
    taken = [
        (claims, records, claim.name, record.reported(claims.slug, claim, run))
        for claims, records, claim in mine
    ]
    for claims, records, name, found in taken:  # all or none
        records[name] = found
        record.save(claims, records)


def stale(everything: list[tuple[Claims, Records]]) -> int:
    """List measured programs whose lowered text has changed; 1 if there is one."""
    status = 0
    for claims, records in everything:
        for claim in claims.by_name.values():
            mine = current(claim, records)
            if claim.kind != "compile" or mine is None:
                continue
            if moved := record.moved(claims.slug, claim, mine):
                print(f"{claims.slug}/{claim.name}: {moved}")
                status = 1
    if status:
        print("measure them again: python -m experiments.claims --only SLUG/NAME")
    return status


def run() -> int:
    """Read the command line; the exit status."""
    import tyro

    options = (tyro.conf.FlagCreatePairsOff,)
    command = tyro.cli(Command, description=__doc__, config=options)
    try:
        return main(command)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is recorded", file=sys.stderr)
        return 130
    except Exception as error:
        from experiments.harness import cli

        if not cli.is_refusal(error):
            raise
        print(cli.message(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
