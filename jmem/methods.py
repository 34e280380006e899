"""The 21 methods: one card each, and the table of them that stands in the README.

A card's slug is its name everywhere: the module `jmem/<family>/<slug>.py`, the
experiment `experiments/<slug>.py`, the presets and claims `configs/<slug>/`, the tests
`tests/<family>/test_<slug>.py`. The cards themselves are written in methods.toml;
tests/test_methods.py keeps them true.
"""

import dataclasses
import json
import pathlib
import tomllib
from typing import Any, Literal

Family = Literal[
    "finetune",
    "kvcache",
    "moe",
    "sparse",
    "multimodal",
    "vision",
    "spatial",
    "timeseries",
    "precision",
]

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
"""Where claims and records stand, in a checkout; a wheel has none."""
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What a paper says of memory, and which claim of ours answers it."""

    paper: str
    """The paper's number, or its words where it gives none."""
    what: str
    """What was measured: model, sizes, against what."""
    source: str
    """Where the paper says so."""
    confirmed: bool = True
    """False while the number has not been re-read in the paper itself."""
    claim: str = ""
    """Name in configs/<slug>/claims.toml; its record is our number."""
    against: tuple[str, ...] = ()
    """Claims whose records, added up, are what our number is compared with."""
    ours: str = "{amount}"
    """How our number is told: by `{amount}`, in the claim's unit; and with `against` by
    `{share}` of that, or by how much `{less}` than that it is, in percent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One published method and where it stands in this library."""

    slug: str
    """The method's one name; a Python identifier."""
    family: Family
    """The package under `jmem` that holds it."""
    title: str
    """The paper's title."""
    arxiv: str
    """The paper's arXiv identifier, without a version."""
    idea: str
    """What it does to memory, in ten words at most."""
    memory: Memory
    """What the paper says of memory, and what we find."""
    kernels: tuple[str, ...] = ()
    """Folders of `kernels/` that it calls, or will call once built."""
    status: Literal["planned", "begun", "built"] = "planned"
    """"begun": module and tests are there. "built": experiment, presets and claims
    too."""

    @property
    def module(self) -> str:
        """Dotted name of the module that implements it."""
        return f"jmem.{self.family}.{self.slug}"

    @property
    def experiment(self) -> str:
        """Dotted name of its experiment, for `python -m`."""
        return f"experiments.{self.slug}"


def _read_cards(path: pathlib.Path) -> tuple[Method, ...]:
    def build(card: dict[str, Any]) -> Method:
        memory = Memory(**_freeze(card.pop("memory")))
        return Method(**_freeze(card), memory=memory)

    return tuple(map(build, tomllib.loads(path.read_text())["method"]))


def _freeze(fields: dict[str, Any]) -> dict[str, Any]:
    """TOML's arrays as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


METHODS = _read_cards(pathlib.Path(__file__).with_suffix(".toml"))
"""Every method of the library, in the order of the README table."""


def read_number(method: Method, configs: pathlib.Path = CONFIGS) -> str:
    """Our number beside the paper's, read from the records; "" where there is none.

    Raises:
      ValueError: the card names a claim that configs/<slug>/claims.toml does not have.
    """
    memory, folder = method.memory, configs / method.slug
    if not memory.claim or not folder.is_dir():
        return ""
    claims = tomllib.loads((folder / "claims.toml").read_text())
    records = json.loads((folder / "records.json").read_text())
    by_name = {claim["name"]: claim for claim in claims["claim"]}
    if missing := {memory.claim, *memory.against} - by_name.keys():
        raise ValueError(
            f"methods: the card of {method.slug} names the claim {missing.pop()!r}, but"
            f" {folder / 'claims.toml'} has none of that name."
        )
    if not {memory.claim, *memory.against} <= records.keys():
        return ""
    defaults = claims.get("defaults", {})
    unit = by_name[memory.claim].get("unit", defaults.get("unit", "GiB"))
    value = records[memory.claim]["value"]
    share = value / (sum(records[name]["value"] for name in memory.against) or value)
    return memory.ours.format(
        amount=f"{value / UNITS[unit]:.1f} {unit}",
        share=f"{100 * share:.1f} %",
        less=f"{100 * (1 - share):.0f} % less",
    )


def _find_page(method: Method) -> str:
    """The method's page, from the root of the repository: a file, or a folder's own."""
    page = method.module.replace(".", "/")
    is_file = (CONFIGS.parent / f"{page}.py").is_file()
    return f"{page}.py" if is_file else f"{page}/__init__.py"


def render_table(configs: pathlib.Path = CONFIGS) -> str:
    """The README's table of methods, as Markdown lines joined by newlines."""
    rows = [
        "| method | idea | memory: the paper | ours | status |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        memory, name = method.memory, method.slug
        doubt = "" if memory.confirmed else " (?)"
        paper = f"[{memory.paper}](https://arxiv.org/abs/{method.arxiv}){doubt}"
        ours = read_number(method, configs)
        if method.status != "planned":
            name = f"[{name}]({_find_page(method)})"
            ours = ours and f"[{ours}](docs/claims.md#{method.slug})"
        cells = [name, method.idea, f"{paper}: {memory.what}", ours or "-"]
        rows.append(f"| {' | '.join(cells)} | {method.status} |")
    return "\n".join(rows)
