"""Rotary embedding in a `config.json`: theta, scaling, and the share of channels.

Source   transformers' modeling_rope_utils; both spellings, `rope_scaling` beside
         `rope_theta`, and the newer `rope_parameters`, which holds everything.
"""

import dataclasses
import math
from typing import Any

from jmem.checkpoints.fields import Fields
from jmem.nn.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling

_ORIGINAL = "original_max_position_embeddings"
_SPELLING = {"original_max_positions": _ORIGINAL}
"""Fields of scalings that have another name in a `config.json`."""
_UNSCALED = {"rope_theta", "partial_rotary_factor"}
_SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
"""By `rope_type`."""


def parse(
    given: Fields, max_positions: int, share: float = 1.0
) -> tuple[float, Scaling | None, float]:
    """(theta, scaling, share of a head's channels that rotate), by default `share`.

    Raises:
      CheckpointError: a kind of scaling that is not supported, or a value missing or
        out of range; names the field and its value.
    """
    spellings = ("rope_scaling", "rope_parameters")
    stated = [(name, given.get(name)) for name in spellings if given.get(name)]
    field, raw = stated[0] if stated else ("rope_scaling", {})
    if len(stated) > 1 and stated[1][1] != raw:
        raise given.make_error("rope_parameters", stated[1][1], "one rope_scaling")
    if not isinstance(raw, dict):
        raise given.make_error(field, raw, "an object")
    rope = Fields(raw, f"{given.where}: {field}")

    either = Fields({**given.raw, **raw}, given.where)
    theta = either.number("rope_theta", 10_000.0)
    share = either.number("partial_rotary_factor", share)
    plain = not raw.keys() - _UNSCALED
    kind = raw.get("rope_type") or raw.get("type") or ("default" if plain else None)
    if kind == "default":
        return theta, None, share
    if not isinstance(kind, str) or kind not in _SCALINGS:
        supported = "default, " + ", ".join(_SCALINGS)
        raise given.make_error(f"{field}.rope_type", kind, supported)
    with rope.name_errors():
        if kind == "yarn":
            return theta, _read_yarn(rope, max_positions), share
        return theta, _read_plain(_SCALINGS[kind], rope), share


def _read_plain(kind: type, rope: Fields) -> Scaling:
    """A scaling of which every field is stated."""
    stated = {}
    for field in dataclasses.fields(kind):
        read = rope.size if field.name == "original_max_positions" else rope.number
        stated[field.name] = read(_SPELLING.get(field.name, field.name))
    return kind(**stated)


def _read_yarn(rope: Fields, max_positions: int) -> YarnScaling:
    original = rope.size(_ORIGINAL, max_positions)
    factor = rope.number("factor", max_positions / original)
    attention_factor = None
    if rope.get("attention_factor") is not None:
        attention_factor = rope.number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's spelling
        upper, lower = (
            1 + 0.1 * rope.number(name) * math.log(max(factor, 1.0))
            for name in ("mscale", "mscale_all_dim")
        )
        attention_factor = upper / lower
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise rope.make_error("truncate", truncate, "true or false")
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=truncate,
    )


def render(scaling: Scaling | None) -> dict[str, Any] | None:
    """The value of `rope_scaling`; `parse` gives back an equal scaling."""
    if scaling is None:
        return None
    kinds = {scaling: kind for kind, scaling in _SCALINGS.items()}
    stated = dataclasses.asdict(scaling)
    named = {_SPELLING.get(name, name): value for name, value in stated.items()}
    return {"rope_type": kinds[type(scaling)]} | named
