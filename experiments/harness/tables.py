"""Claims beside their records: whether what must hold does, and tables that show it.

Reads `configs/<slug>/claims.toml` and the records beside it, measures nothing, and
imports no JAX.
"""

import html
import pathlib
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator

from experiments.harness import record
from experiments.harness.claim import BYTES, Claim, Claims, ClaimsError, Relation, read
from experiments.harness.record import Record

Records = dict[str, Record]
Everything = list[tuple[Claims, Records]]
ROOM = {"24 GB": 20.6, "48 GB": 44.5, "80 GB": 76.1, "141 GB": 138.0}
"""GiB that cards have after driver and reserve: rtx4090, a6000, h100 and h200, as
`jmem.targets` has them (a test compares), without importing JAX."""
OUTCOMES = ("holds", "fails", "open", "stale", "not measured", "not checkable")
"""What `judge` can begin with."""
EARLIER = "of an earlier program"
UNKNOWN = "program not noted"


def load(root: pathlib.Path) -> Everything:
    """The claims and records of every method that has any, by slug."""
    paths = sorted(root.glob("configs/*/claims.toml"))
    return [(read(path), record.load(path.with_name("records.json"))) for path in paths]


def list_claims(everything: Everything) -> Iterator[tuple[Claims, Records, Claim]]:
    """Every claim, with the claims and records of its method."""
    for claims, records in everything:
        for claim in claims.by_name.values():
            yield claims, records, claim


# Verdicts -----------------------------------------------------------------------------


def judge(claim: Claim, claims: Claims, records: Records) -> str:
    """One of `OUTCOMES`, in bold where it is "fails" or "stale"; and after ":" why."""
    if claim.kind == "not-checkable":
        return f"not checkable: {claim.reason}"
    mine = records.get(claim.name)
    if mine is None:
        return "not measured"
    if mine.definition != claim.definition:
        return "**stale**: the claim was edited after it was measured"

    def value(name: str) -> float | None:
        if named := claim if name == "ours" else claims.by_name.get(name):
            found = find_current(named, records)
            return found and found.value
        bar = name in ("paper", "expect", "margin")
        number = getattr(claim, name) if bar else float(name)
        return None if number is None else number * claim.scale

    relations = {text: Relation.parse(text).holds(value) for text in claim.relations}
    if failing := [text for text, holds in relations.items() if holds is False]:
        return f"**fails**: {_quote_code(failing)}"
    if waiting := [text for text, holds in relations.items() if holds is None]:
        return f"open: {_quote_code(waiting)} waits for a number"
    return "holds"


def find_current(claim: Claim, records: Records) -> Record | None:
    """The record of a claim, if it was measured for the claim as it stands."""
    found = records.get(claim.name)
    return found if found and found.definition == claim.definition else None


def count(claims: Claims, records: Records) -> Counter[str]:
    """How many of a method's claims have each of the `OUTCOMES`."""
    words = (judge(claim, claims, records) for claim in claims.by_name.values())
    return Counter(text.partition(":")[0].strip("*") for text in words)


# Tables -------------------------------------------------------------------------------


def format_table(claims: Claims, records: Records) -> str:
    """Markdown rows of all claims of one method."""
    heads = ("claim", "paper", "expected", "ours", "must hold", "verdict", "measured")
    rows = []
    for claim in claims.by_name.values():
        mine, words = records.get(claim.name), judge(claim, claims, records)
        what = html.escape(claim.what, quote=False)
        asked = what, _describe_paper(claim), _format_amount(claim.expect, claim)
        found = describe_value(claim, mine), _quote_code(claim.relations), words
        rows.append((*asked, *found, _describe_measuring(claim, mine)))
    return _format_markdown(heads, rows)


def format_page(everything: Everything) -> str:
    """The whole of docs/claims.md: counts, what fails, and a section for each slug."""
    counts = {claims.slug: count(claims, records) for claims, records in everything}
    counted = [
        (f"[{slug}](#{slug})", own.total(), *(own[word] for word in OUTCOMES))
        for slug, own in counts.items()
    ]
    failing = []
    for claims, records, claim in list_claims(everything):
        outcome, _, why = judge(claim, claims, records).partition(": ")
        if outcome == "**fails**":
            ours = describe_value(claim, records.get(claim.name))
            failing.append((claims.slug, claim.what, ours, why))
    parts = [
        "# What the papers claim, and what we find",
        "Written by `python -m experiments.claims` from `configs/<slug>/claims.toml`\n"
        "and `records.json`; a test fails when page and records differ.",
        _format_markdown(("claims of", "all", *OUTCOMES), counted),
        f"## The {len(failing)} that fail",
        _format_markdown(("method", "claim", "ours", "does not hold"), failing),
    ]
    for claims, records in everything:
        setting = " ".join(claims.setting.split())
        parts += [f"## {claims.slug}", setting, format_table(claims, records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summarise(everything: Everything) -> str:
    """The README's paragraph: how many claims hold and fail, and where they all are."""
    counts = {claims.slug: count(claims, records) for claims, records in everything}
    total = sum(counts.values(), Counter())
    failing = {slug: own["fails"] for slug, own in counts.items() if own["fails"]}
    most = sorted(failing, key=lambda slug: -failing[slug])
    by_slug = ", ".join(f"{slug} {failing[slug]}" for slug in most)
    numbers = [f"{total[word]} {word.replace('holds', 'hold')}" for word in OUTCOMES]
    numbers[1] = f"{total['fails']} fail" + (f" ({by_slug})" if by_slug else "")
    doubts = Counter(
        _describe_doubt(mine) for _, records in everything for mine in records.values()
    )
    return textwrap.fill(
        f"Of {total.total()} claims, {', '.join(numbers[:-1])} and {numbers[-1]}."
        f" {doubts[EARLIER]} numbers are {EARLIER} than today's; {doubts[UNKNOWN]}, of"
        " runs and of a GPU, were recorded before their programs were noted."
        " [docs/claims.md](docs/claims.md) has every one: the paper's number, ours,"
        " what must hold, and how and when it was measured.",
        90,
        break_on_hyphens=False,
    )


def format_choices(everything: Everything) -> str:
    """Which method trains which model on which card: claims with a `choice`.

    By model and bytes. A card is named if the interval's upper end fits in its `ROOM`.
    """
    found = [
        (claim.choice, mine)
        for _, records, claim in list_claims(everything)
        if claim.choice and (mine := find_current(claim, records))
    ]
    found.sort(key=lambda row: row[1].value)
    models = list(dict.fromkeys(choice[0] for choice, _ in found))
    found.sort(key=lambda row: models.index(row[0][0]))
    rows = []
    for choice, mine in found:
        most = max(mine.interval or (mine.value,))
        cards = [card for card, room in ROOM.items() if most <= room * 2**30]
        size = f"{mine.value / 2**30:.1f} GiB"
        rows.append((*choice, size, ", ".join(cards) or "none of these"))
    return _format_markdown(
        ("model", "method", "trains", "device memory", "fits"), rows
    )


def _format_markdown(
    heads: tuple[str, ...], rows: Iterable[tuple[str | int, ...]]
) -> str:
    """A table; "" without rows."""
    lines = [[_show_cell(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def _show_cell(cell: str | int) -> str:
    """On one line, and in one column."""
    shown = "".join(c if c.isprintable() else " " for c in str(cell))
    return shown.replace("|", r"\|")


def _quote_code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _format_amount(value: float | str | None, claim: Claim) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:g} {claim.unit}"


def _describe_paper(claim: Claim) -> str:
    if claim.paper is None:
        return claim.source
    doubt = "" if claim.confirmed else ", unconfirmed"
    return f"{_format_amount(claim.paper, claim)} ({claim.source}{doubt})"


def describe_value(claim: Claim, mine: Record | None) -> str:
    """A record's value and interval in the claim's unit."""
    if mine is None:
        return ""
    text = f"{mine.value / claim.scale:.{2 if claim.unit in BYTES else 4}f}"
    low, high = (f"{bound / claim.scale:.2f}" for bound in mine.interval or (0, 0))
    bounds = f" ({low} to {high})" if low != high else ""
    return f"{text} {claim.unit}{bounds}"


def _describe_measuring(claim: Claim, mine: Record | None) -> str:
    if mine is None:
        return ""
    how = f"compiled for {claim.target}" if claim.kind == "compile" else mine.device
    parts = (how, f"jax {mine.versions['jax']}", mine.date, _describe_doubt(mine))
    return ", ".join(filter(None, parts))


def _describe_doubt(mine: Record) -> str:
    """Whether an earlier or an unknown program was measured; "" of today's."""
    if mine.moved:
        return EARLIER
    return "" if mine.programs else UNKNOWN


# Files --------------------------------------------------------------------------------


def render_files(
    everything: Everything, root: pathlib.Path, methods: str
) -> dict[pathlib.Path, str]:
    """Every generated file, and the text it should hold; `methods` is their table."""
    sections = {
        root / "README.md": {"claims": summarise(everything), "methods": methods},
        root / "docs" / "finetune.md": {"choices": format_choices(everything)},
    }
    texts = {root / "docs" / "claims.md": format_page(everything)}
    for path, parts in sections.items():
        texts[path] = path.read_text()
        for name, section in parts.items():
            texts[path] = splice(texts[path], name, section, path.name)
    return texts


def splice(text: str, name: str, section: str, file: str) -> str:
    """`text` of a file, with what is between the markers called `name` replaced.

    Raises:
      ClaimsError: the file has no such markers.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ClaimsError(f"{file} has lost its markers '<!-- {name}:begin -->', end")
    return f"{before}{begin}{section}{end}{after}"
