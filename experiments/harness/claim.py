"""A claim: a number of the paper, the program that answers it, and what must hold.

`configs/<slug>/claims.toml` holds the claims of one method, written by hand:

    setting = "..."     how our setting differs from the paper's, shown with the table
    [defaults]          values for every claim below
    [[claim]]           one claim; the keys are the fields of `Claim`

Reads files only and imports no JAX, so that the tables can be checked in a blink.
"""

import builtins
import dataclasses
import difflib
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from experiments.harness.config import from_plain, locate

BYTES = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
"""Units of memory. Values in any other unit are kept as they are written."""

Number = float | int


class ClaimsError(ValueError):
    """A claims.toml, a records.json or a run that cannot be used, and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the table, and one `[[claim]]` of the file."""

    name: str
    """Unique within the method; the key of its record."""
    what: str
    """The row's words."""
    kind: Literal["compile", "train", "live", "not-checkable"]
    """Measured by compiling, read from a run's report (train), read from the report of
    a check that needs a GPU (live), or none of these."""
    source: str
    """Table or section of the paper."""
    paper: Number | str | None = None
    """The paper's number in `unit`, or its word for it, as "OOM"."""
    confirmed: bool = True
    """False while the number has not been re-read in the paper."""
    unit: str = "GiB"
    expect: Number | None = None
    """Our expectation in `unit`, written before measuring."""
    relations: tuple[str, ...] = ()
    """What must hold; see `Relation`."""
    preset: str = ""
    """Preset of the experiment; empty for its defaults."""
    flags: tuple[str, ...] = ()
    """Further arguments, as on the experiment's command line."""
    program: str = ""
    """compile: a name in the experiment's `programs(config, target)`."""
    target: str = "h200"
    """compile: the GPU that is compiled for."""
    quantity: str = "device_bytes"
    """compile: what of the MemoryReport is recorded: a field, or a part of one, as
    "by_label/kv cache"."""
    report: tuple[str, ...] = ()
    """train, live: the keys that lead to the number in the report."""
    experiment: str = ""
    """live: the module of `experiments` whose report answers, run with its defaults."""
    margin: Number | None = None
    """A bar in `unit`, set after the first honest run."""
    reason: str = ""
    """not-checkable: why."""
    cheap: bool = False
    """Measured again by the tests, which allow 3 %."""
    choice: tuple[str, ...] = ()
    """Model, method, and what it trains: a row of "which method for my card"."""

    @property
    def definition(self) -> dict[str, Any]:
        """What a record must have been measured on to answer this claim."""
        if self.kind == "live":
            return {"experiment": self.experiment, "report": list(self.report)}
        setting = {"preset": self.preset, "flags": list(self.flags)}
        if self.kind != "compile":
            return setting | {"report": list(self.report)}
        program = {"program": self.program, "target": self.target}
        return setting | program | {"quantity": self.quantity}

    @property
    def scale(self) -> int:
        """What a number in `unit` is multiplied by to compare: bytes, or as it is."""
        return BYTES.get(self.unit, 1)


KEYS = {
    "compile": ("program", "target", "quantity", "relations"),
    "train": ("report", "relations"),
    "live": ("experiment", "report", "relations"),
    "not-checkable": ("reason",),
}
"""Keys that a claim of a kind needs; what only other kinds need, it must not set."""


class Relation(NamedTuple):
    """What must hold: `TERM < TERM` (or <=, >, >=), or `TERM within P % of TERM`.

    A term is a number in the claim's unit, `ours`, `paper`, `expect`, `margin`, or the
    name of another claim, which stands for its measured value; each with a factor if
    wanted, as in `ours < 0.5 * full`.
    """

    left: tuple[float, str]
    sign: str
    right: tuple[float, str]
    tolerance: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Relation":
        """Read a relation; ValueError shows how one is written."""
        term = r"(?:([\d.]+)\s*\*\s*)?([\w.-]+)"
        sign = r"(?:(<=?|>=?)|within\s+([\d.]+)\s*%\s+of)"
        found = re.fullmatch(rf"{term}\s*{sign}\s*{term}", text.strip())
        if found is None:
            raise ValueError(
                f"{text!r} is not a relation; write it as 'ours <= 0.5 * paper' or as"
                " 'ours within 2 % of 19.3'"
            )
        by, name, compares, percent, other_by, other = found.groups()
        left, right = (float(by or 1), name), (float(other_by or 1), other)
        return cls(left, compares or "within", right, float(percent or 0) / 100)

    @property
    def names(self) -> tuple[str, ...]:
        """Its terms that are not plain numbers."""
        terms = (self.left[1], self.right[1])
        return tuple(name for name in terms if not re.fullmatch(r"\d+(\.\d+)?", name))

    def holds(self, value: Callable[[str], float | None]) -> bool | None:
        """Whether it holds for the values of its terms; None while one is missing."""
        known = [(factor, value(name)) for factor, name in (self.left, self.right)]
        sides = [factor * number for factor, number in known if number is not None]
        if len(sides) < 2:
            return None
        left, right = sides
        return {
            "<": left < right,
            "<=": left <= right,
            ">": left > right,
            ">=": left >= right,
            "within": abs(left - right) <= self.tolerance * abs(right),
        }[self.sign]


@dataclasses.dataclass(frozen=True)
class Claims:
    """The claims of one method, in the order of its file."""

    path: pathlib.Path
    setting: str
    by_name: dict[str, Claim]

    @property
    def slug(self) -> str:
        return self.path.parent.name


def read(path: pathlib.Path) -> Claims:
    """Read one claims.toml, strictly.

    Raises:
      ClaimsError: it is not TOML, a key is unknown or missing, a value is of the wrong
        kind, or a relation names nothing; with file, line and the nearest name.
    """
    try:
        document = tomllib.loads(text := path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ClaimsError(f"{path}: {error}") from None

    def fail(message: str, key: str, block: int = -1) -> typing.NoReturn:
        lines = locate(text)
        own = ("claim", block)
        places = [(*own, key), ("defaults", key), own] if block >= 0 else [(key,)]
        line = next(lines[place] for place in places if place in lines)
        raise ClaimsError(f"{path}:{line}: {message}")

    parts: dict[str, Any] = {"setting": "", "defaults": {}, "claim": []}
    for key, value in document.items():
        if key not in parts:
            fail(_describe_unknown("key", key, parts), key)
        if type(value) is not type(parts[key]):
            fail("write setting = '...', [defaults] and [[claim]]", key)
    parts |= document
    by_name: dict[str, Claim] = {}
    for block, values in enumerate(parts["claim"]):
        values = parts["defaults"] | values
        for key, message in _find_mistakes(values):
            fail(message, key, block)
        claim = from_plain(Claim, values)
        if claim.name in by_name:
            fail(f"the name {claim.name!r} is used twice", "name", block)
        by_name[claim.name] = claim
    for block, claim in enumerate(by_name.values()):
        for message in _find_broken_relations(claim, by_name):
            fail(message, "relations", block)
    return Claims(path, parts["setting"], by_name)


def _find_mistakes(values: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Key and message of everything wrong with one claim's values."""
    fields = {field.name: field for field in dataclasses.fields(Claim)}
    for key, value in values.items():
        if key not in fields:
            yield key, _describe_unknown("key", key, fields)
        elif key == "kind" and str(value) not in KEYS:  # it may be a list
            yield key, _describe_unknown("kind", value, KEYS)
        elif not fits(value, hint := fields[key].type):
            yield key, f"{key}={value!r} should be {getattr(hint, '__name__', hint)}"
    for key in ("name", "what", "kind", "source"):
        if not values.get(key):
            yield "name", f"a claim needs {key!r}"
    needed = KEYS[values["kind"]]
    defaults = {key: field.default for key, field in fields.items()}
    for key in {key for keys in KEYS.values() for key in keys}:
        if key in needed and not values.get(key, defaults[key]):
            yield "name", f"a claim of kind {values['kind']!r} needs {key!r}"
        if key not in needed and values.get(key, defaults[key]) != defaults[key]:
            yield key, f"{key!r} says nothing about a claim of kind {values['kind']!r}"
    if values["kind"] == "compile" and values.get("unit", "GiB") not in BYTES:
        yield "unit", _describe_unknown("unit of memory", values["unit"], BYTES)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has the type of a field's annotation; true is no number."""
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return value in inner
        case types.UnionType:
            return any(fits(value, kind) for kind in inner)
        case builtins.dict:
            return isinstance(value, dict) and all(
                fits(held, inner[1]) for held in value.values()
            )
        case builtins.tuple:
            if not isinstance(value, list | tuple):
                return False
            kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            return len(value) == len(kinds) and all(map(fits, value, kinds))
    return hint is Any or type(value) is hint


def _find_broken_relations(claim: Claim, others: dict[str, Claim]) -> Iterable[str]:
    """A message for each relation that cannot be read, or whose terms are not there."""
    for text in claim.relations:
        try:
            relation = Relation.parse(text)
        except ValueError as error:
            yield str(error)
            continue
        for name in relation.names:
            if name in ("paper", "expect"):
                if not isinstance(getattr(claim, name), int | float):
                    yield f"{text!r} needs {name!r} to be a number"
            elif name in others:
                if (others[name].unit in BYTES) != (claim.unit in BYTES):
                    yield f"{text!r} compares {claim.unit} with {others[name].unit}"
            elif name not in ("ours", "margin"):
                words = ("ours", "paper", "expect", "margin", *others)
                yield _describe_unknown("name in a relation", name, words)


def _describe_unknown(what: str, name: Any, names: Iterable[str]) -> str:
    """The message of a name that is none, with the nearest one that is."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    return f"unknown {what} {name!r}; {hint}"
