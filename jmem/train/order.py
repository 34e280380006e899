"""Which rows come when: what a run that goes on must have as it was."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jmem.models.contract import Batch
from jmem.program import by_key

LAST = "last batch"
"""The digest of the batch of the last update, beside the settings."""


def describe_order(data: Any, last: Batch) -> dict[str, Any]:
    """What says in which order `data` came, of which `last` was the last batch.

    The settings in `data.order`, where it has a mapping of them, and a digest of the
    batch: whatever changes which rows come when, changes that.
    """
    order = getattr(data, "order", None)
    settings = dict(order) if isinstance(order, Mapping) else {}
    plain = json.loads(json.dumps(settings, default=str))  # as it will be read back
    return plain | {LAST: digest_batch(last)}


def digest_batch(batch: Batch) -> str:
    """16 hexadecimal digits of a batch's integers, or of all of it if it has none.

    A fraction that is computed on another machine may differ in its last bit.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in by_key(batch).items()}
    exact = {name: leaf for name, leaf in leaves.items() if leaf.dtype.kind in "biu"}
    sha = hashlib.sha256()
    for name, leaf in (exact or leaves).items():
        sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def explain_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two orders, in words; "" if nothing that both know does.

    >>> explain_difference({"seed": 0, "batch_size": 2}, {"seed": 7, "batch_size": 2})
    'seed=0, and this run has seed=7'
    """
    changed = [n for n in before if n in now and n != LAST and before[n] != now[n]]
    if changed:
        first, second = (
            ", ".join(f"{name}={order[name]!r}" for name in changed)
            for order in (before, now)
        )
        return f"{first}, and this run has {second}"
    if LAST in before and before[LAST] != now.get(LAST):
        return "another batch at the last update than this run's data give for it"
    return ""
