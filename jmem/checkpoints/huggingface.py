"""`config.json`, Hugging Face's description of a model, to `DecoderConfig` and back.

Supported are model_type llama (SmolLM2 and TinyLlama are llamas), mistral and qwen2.
A field that would make the model compute something else than `Decoder` is refused by
name; fields that only describe training, tokens or defaults of generation are ignored.

Source   transformers' LlamaConfig, MistralConfig, Qwen2Config and the models that read
         them; both spellings of rotary scaling (rope_scaling, and rope_parameters).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jmem.checkpoints import fields
from jmem.checkpoints.fields import unsupported
from jmem.checkpoints.files import CheckpointError
from jmem.models.decoder import DecoderConfig
from jmem.nn.rope import Llama3Scaling

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
"""Supported model_type, and the one class of it that is a language model."""

_NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),  # would add one to o as well
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "tie_word_embeddings": (False, True, None),
}
"""Fields that change the result unless absent or one of these values."""


def parse_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder that a parsed `config.json` describes.

    Raises:
      CheckpointError: an architecture or field that `Decoder` does not compute, or a
        value out of range; names the field, its value and what is supported.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise unsupported(where, "model_type", kind, " or ".join(ARCHITECTURES))
    classes = raw.get("architectures") or [ARCHITECTURES[kind]]
    if classes != [ARCHITECTURES[kind]]:
        raise unsupported(where, "architectures", classes, f"[{ARCHITECTURES[kind]}]")
    fields.neutral(raw, _NEUTRAL, where)

    heads = fields.size(raw, "num_attention_heads", where)
    hidden = fields.size(raw, "hidden_size", where)
    # Other kinds have a constant as default, and always state the field.
    kv_heads = heads if kind == "llama" else None
    head_dim = hidden // heads if hidden % heads == 0 else None
    max_positions = fields.size(raw, "max_position_embeddings", where)
    _check_window(raw, kind, max_positions, where)
    theta, scaling = _rope(raw, where)
    try:
        return DecoderConfig(
            vocab_size=fields.size(raw, "vocab_size", where),
            layers=fields.size(raw, "num_hidden_layers", where),
            hidden=hidden,
            heads=heads,
            kv_heads=fields.size(raw, "num_key_value_heads", where, kv_heads),
            head_dim=fields.size(raw, "head_dim", where, head_dim),
            intermediate=fields.size(raw, "intermediate_size", where),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_eps=fields.number(raw, "rms_norm_eps", where),
            tied=bool(raw.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def parse_eos(raw: Mapping[str, Any], vocab_size: int, where: str) -> tuple[int, ...]:
    """Ids that end a text: `eos_token_id`, which may be one, several or none.

    Raises:
      CheckpointError: anything else, or an id beyond the vocabulary.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise unsupported(where, "eos_token_id", value, f"ids below {vocab_size}")
    return tuple(ids)


def render_config(
    config: DecoderConfig, dtype: np.dtype, eos_ids: tuple[int, ...] = ()
) -> dict[str, Any]:
    """`config.json` for weights of `dtype`; `parse_config` gives back an equal config.

    >>> from jmem.models import zoo
    >>> raw = render_config(zoo.get("qwen2-7b"), np.dtype("float32"))
    >>> raw["model_type"], parse_config(raw, "") == zoo.get("qwen2-7b")
    ('qwen2', True)
    """
    kind = "qwen2" if config.qkv_bias else "llama"
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": list(eos_ids)
        if len(eos_ids) > 1
        else next(iter(eos_ids), None),
        "torch_dtype": dtype.name,
    }


def _check_window(
    raw: Mapping[str, Any], kind: str, max_positions: int, where: str
) -> None:
    """Refuses attention that is limited to a window within `max_positions`."""
    window = raw.get("sliding_window")
    if kind == "llama" or (kind == "qwen2" and not raw.get("use_sliding_window")):
        window = None
    if window is not None and (type(window) is not int or window < max_positions):
        raise unsupported(
            where,
            "sliding_window",
            window,
            "full attention. Up to the window's length it is the same: set "
            "sliding_window to null and max_position_embeddings to the window",
        )
    layer_types = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or any(
        layer != "full_attention" for layer in layer_types
    ):
        raise unsupported(where, "layer_types", layer_types, "full_attention")


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """(theta, scaling) from either spelling."""
    given = [(f, raw[f]) for f in ("rope_scaling", "rope_parameters") if raw.get(f)]
    field, rope = given[0] if given else ("rope_scaling", {})
    if len(given) > 1 and given[0][1] != given[1][1]:
        raise unsupported(where, "rope_parameters", given[1][1], "one rope_scaling")
    if not isinstance(rope, dict):
        raise unsupported(where, field, rope, "an object")
    holder = rope if "rope_theta" in rope else raw
    theta = fields.number(holder, "rope_theta", where, 10_000.0)
    plain = not rope.keys() - {"rope_theta"}
    kind = rope.get("rope_type") or rope.get("type") or ("default" if plain else None)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise unsupported(where, f"{field}.rope_type", kind, "default or llama3")
    where = f"{where}: {field}"
    original = "original_max_position_embeddings"
    try:
        return theta, Llama3Scaling(
            factor=fields.number(rope, "factor", where),
            low_freq_factor=fields.number(rope, "low_freq_factor", where),
            high_freq_factor=fields.number(rope, "high_freq_factor", where),
            original_max_positions=fields.size(rope, original, where),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
