"""Rotary embedding in a `config.json`: theta, scaling, and the share of channels.

Source   transformers' modeling_rope_utils; both spellings, `rope_scaling` beside
         `rope_theta`, and the newer `rope_parameters`, which holds everything.
"""

import math
from collections.abc import Mapping
from typing import Any

from jmem.checkpoints import fields
from jmem.checkpoints.fields import unsupported
from jmem.checkpoints.files import CheckpointError
from jmem.nn.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling

_ORIGINAL = "original_max_position_embeddings"
_UNSCALED = {"rope_theta", "partial_rotary_factor"}


def parse(
    raw: Mapping[str, Any], max_positions: int, where: str, share: float = 1.0
) -> tuple[float, Scaling | None, float]:
    """(theta, scaling, share of a head's channels that rotate), by default `share`.

    Raises:
      CheckpointError: a kind of scaling that is not supported, or a value missing or
        out of range; names the field and its value.
    """
    given = [(f, raw[f]) for f in ("rope_scaling", "rope_parameters") if raw.get(f)]
    field, rope = given[0] if given else ("rope_scaling", {})
    if len(given) > 1 and given[0][1] != given[1][1]:
        raise unsupported(where, "rope_parameters", given[1][1], "one rope_scaling")
    if not isinstance(rope, dict):
        raise unsupported(where, field, rope, "an object")

    def stated(name: str, default: float) -> float:
        return fields.number(rope if name in rope else raw, name, where, default)

    theta = stated("rope_theta", 10_000.0)
    share = stated("partial_rotary_factor", share)
    plain = not rope.keys() - _UNSCALED
    kind = rope.get("rope_type") or rope.get("type") or ("default" if plain else None)
    if kind == "default":
        return theta, None, share
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if not isinstance(kind, str) or kind not in readers:
        supported = "default, " + ", ".join(readers)
        raise unsupported(where, f"{field}.rope_type", kind, supported)
    where = f"{where}: {field}"
    try:
        return theta, readers[kind](rope, max_positions, where), share
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _linear(rope: Mapping[str, Any], max_positions: int, where: str) -> LinearScaling:
    del max_positions
    return LinearScaling(factor=fields.number(rope, "factor", where))


def _llama3(rope: Mapping[str, Any], max_positions: int, where: str) -> Llama3Scaling:
    del max_positions
    return Llama3Scaling(
        factor=fields.number(rope, "factor", where),
        low_freq_factor=fields.number(rope, "low_freq_factor", where),
        high_freq_factor=fields.number(rope, "high_freq_factor", where),
        original_max_positions=fields.size(rope, _ORIGINAL, where),
    )


def _yarn(rope: Mapping[str, Any], max_positions: int, where: str) -> YarnScaling:
    original = fields.size(rope, _ORIGINAL, where, max_positions)
    factor = fields.number(rope, "factor", where, max_positions / original)
    attention_factor = None
    if rope.get("attention_factor") is not None:
        attention_factor = fields.number(rope, "attention_factor", where)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's spelling
        upper, lower = (
            1 + 0.1 * fields.number(rope, name, where) * math.log(max(factor, 1.0))
            for name in ("mscale", "mscale_all_dim")
        )
        attention_factor = upper / lower
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise unsupported(where, "truncate", truncate, "true or false")
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=fields.number(rope, "beta_fast", where, 32.0),
        beta_slow=fields.number(rope, "beta_slow", where, 1.0),
        attention_factor=attention_factor,
        truncate=truncate,
    )


def render(scaling: Scaling | None) -> dict[str, Any] | None:
    """The value of `rope_scaling`; `parse` gives back an equal scaling."""
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_max_positions,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                _ORIGINAL: scaling.original_max_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
    return None
