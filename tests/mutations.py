"""Seeded damage to files: nothing but an error of ours may come of it.

`JMEM_MUTATIONS=10000 uv run pytest -k "mutated or damaged"` takes as many of each kind.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

ODD = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = (
    b"=",
    b'"',
    b"[",
    b"]",
    b"\n",
    b"nan",
    b"1e999",
    b"-1",
    b"9" * 40,
    b"\0",
    b"\xe9",
)

STRANGE = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**64, 0.5, 1e308, float("nan")),
    *("", "F16", "llama3", "a\0b", "\ud800", "../x", [], [1], [[[]]], {}, {"a": None}),
]


def count(usual: int) -> int:
    """How many mutants a test makes."""
    return int(os.environ.get("JMEM_MUTATIONS", usual))


def damage_bytes(raw: bytes, random: np.random.Generator) -> bytes:
    """One to three small injuries, most of them near the start, where headers are."""
    data = bytearray(raw)
    for _ in range(random.integers(1, 4)):
        reach = len(data) if random.random() < 0.2 else min(len(data), 4096)
        at = int(random.integers(0, max(reach, 1)))
        span = int(random.integers(1, 40))
        match random.integers(0, 6):
            case 0:
                data[at : at + 1] = bytes([random.integers(0, 256)])
            case 1:
                width = int(random.choice([1, 2, 4, 8]))
                value = ODD[random.integers(0, len(ODD))] % (1 << 8 * width)
                data[at : at + width] = value.to_bytes(width, "little")
            case 2:
                del data[at : at + (span if random.random() < 0.5 else len(data))]
            case 3:
                data[at:at] = random.bytes(span)
            case 4:
                data += random.bytes(span)
            case 5:
                data[at:at] = data[at : at + span]
    return bytes(data)


def damage_json(value, random: np.random.Generator):
    """The same object with one value somewhere replaced, removed or copied."""
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[random.integers(0, len(keys))]
        if random.random() < 0.1:
            del value[key]
        elif random.random() < 0.1:
            value[key] = value[keys[random.integers(0, len(keys))]]
        else:
            value[key] = damage_json(value[key], random)
        return value
    return STRANGE[random.integers(0, len(STRANGE))]


def damage_text(raw: bytes, random: np.random.Generator) -> bytes:
    """One or two places where a piece of syntax is put in, or a few bytes go."""
    data = bytearray(raw)
    for _ in range(random.integers(1, 3)):
        at = int(random.integers(0, len(data) + 1))
        gone = int(random.integers(0, 4))
        data[at : at + gone] = TOKENS[random.integers(0, len(TOKENS))]
    return bytes(data)


def toml_mutants(raw: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Damaged copies of a TOML file, three in four of them by pieces of syntax."""
    for case in range(number):
        damage = damage_text if case % 4 else damage_bytes
        yield damage(raw, np.random.default_rng([case, seed]))


def json_mutants(raw: bytes, number: int, seed: int) -> Iterator[bytes]:
    """As `toml_mutants`; half of them change, drop or double one value of the document.

    The document stays JSON there, so that what is tested is what becomes of its values.
    """
    odd: tuple[Any, ...] = (
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "\x1b[2J",
        [],
        {},
        [[]],
    )
    for case in range(number):
        random = np.random.default_rng([case, seed])
        if case % 2:
            yield (damage_text if case % 4 == 1 else damage_bytes)(raw, random)
            continue
        document = json.loads(raw)
        places = [*_list_places(document)]
        holder, key = places[random.integers(0, len(places))]
        match random.integers(0, 3):
            case 0:
                del holder[key]
            case 1:
                holder[key] = odd[random.integers(0, len(odd))]
            case 2:
                holder[key] = [holder[key], holder[key]]
        yield json.dumps(document).encode()


def _list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with each of its keys, the long lists' first."""
    many = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        many = enumerate(value[:8])
    for key, held in many:
        yield value, key
        yield from _list_places(held)


def outcomes(
    mutants: Iterable[bytes],
    path: pathlib.Path,
    read: Callable[[pathlib.Path], Any],
    error: type[Exception],
) -> dict[str, int]:
    """How many mutants, each written to `path`, are read and how many refused.

    A refusal is an `error` that begins with the file's name; any other exception, and a
    failed assertion of `read`, goes through.
    """
    found = {"read": 0, "refused": 0}
    for content in mutants:
        path.write_bytes(content)
        refusals = []
        try:
            read(path)
        except error as refusal:
            refusals = [str(refusal)]
        assert all(text.startswith(str(path)) for text in refusals), refusals
        found["refused" if refusals else "read"] += 1
    return found
