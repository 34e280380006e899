"""`config.json`, Hugging Face's description of a model, to `DecoderConfig` and back.

Supported are model_type llama (SmolLM2 and TinyLlama are llamas), mistral, qwen2, phi,
gpt2 and opt. A field that would make the model compute something else than `Decoder` is
refused by name; fields that only describe training, tokens or defaults of generation
are ignored.

Source   transformers' configuration classes and the models that read them; both
         spellings of rotary scaling (rope_scaling, and rope_parameters).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jmem.checkpoints import fields, names, rotary
from jmem.checkpoints.fields import unsupported
from jmem.checkpoints.files import CheckpointError
from jmem.models.config import DecoderConfig

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi": "PhiForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
}
"""Supported model_type, and the one class of it that is a language model."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's names of the activations that `jmem.nn.mlp` computes."""

_ROTARY_NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),  # would add one to o as well
    "mlp_bias": (False, None),
}
_NEUTRAL: Mapping[str, Mapping[str, tuple]] = {
    "llama": _ROTARY_NEUTRAL,
    "mistral": _ROTARY_NEUTRAL,
    "qwen2": _ROTARY_NEUTRAL,
    "phi": {"qk_layernorm": (False, None), "tie_word_embeddings": (False, None)},
    "gpt2": {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "opt": {
        "do_layer_norm_before": (True,),  # opt-350m normalises after
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
}
_ALL_NEUTRAL: Mapping[str, tuple] = {
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
    fields.neutral(raw, _NEUTRAL[kind], where)
    fields.neutral(raw, _ALL_NEUTRAL, where)
    parse = {"gpt2": _gpt2, "opt": _opt, "phi": _phi}.get(kind, _llama)
    try:
        return DecoderConfig(**parse(raw, kind, where))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _llama(raw: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Fields of llama, mistral and qwen2."""
    heads = fields.size(raw, "num_attention_heads", where)
    hidden = fields.size(raw, "hidden_size", where)
    # Other kinds have a constant as default, and always state the field.
    kv_heads = heads if kind == "llama" else None
    head_dim = hidden // heads if hidden % heads == 0 else None
    max_positions = fields.size(raw, "max_position_embeddings", where)
    theta, scaling, share = rotary.parse(raw, max_positions, where)
    if share != 1:
        raise unsupported(where, "partial_rotary_factor", share, "1.0")
    return {
        "vocab_size": fields.size(raw, "vocab_size", where),
        "layers": fields.size(raw, "num_hidden_layers", where),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": fields.size(raw, "num_key_value_heads", where, kv_heads),
        "head_dim": fields.size(raw, "head_dim", where, head_dim),
        "intermediate": fields.size(raw, "intermediate_size", where),
        "max_positions": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _window(raw, kind, max_positions, where),
        "rms_eps": fields.number(raw, "rms_norm_eps", where),
        "tied": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": kind == "qwen2",
    }


def _phi(raw: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    del kind
    heads = fields.size(raw, "num_attention_heads", where)
    hidden = fields.size(raw, "hidden_size", where)
    head_dim = _head_dim(hidden, heads, "num_attention_heads", where)
    max_positions = fields.size(raw, "max_position_embeddings", where)
    theta, scaling, share = rotary.parse(raw, max_positions, where, share=0.5)
    rotary_dim = int(head_dim * share)
    return _plain(raw, "hidden_act", "gelu_new", where) | {
        "vocab_size": fields.size(raw, "vocab_size", where),
        "layers": fields.size(raw, "num_hidden_layers", where),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": fields.size(raw, "num_key_value_heads", where, heads),
        "head_dim": head_dim,
        "intermediate": fields.size(raw, "intermediate_size", where),
        "max_positions": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "rms_eps": fields.number(raw, "layer_norm_eps", where, 1e-5),
        "parallel": True,
        "head_bias": True,
    }


def _gpt2(raw: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    del kind
    heads = fields.size(raw, "n_head", where)
    hidden = fields.size(raw, "n_embd", where)
    found = _plain(raw, "activation_function", "gelu_new", where) | {
        "vocab_size": fields.size(raw, "vocab_size", where),
        "layers": fields.size(raw, "n_layer", where),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": _head_dim(hidden, heads, "n_head", where),
        "intermediate": fields.size(raw, "n_inner", where, 4 * hidden),
        "max_positions": fields.size(raw, "n_positions", where),
        "positions": "learned",
        "rms_eps": fields.number(raw, "layer_norm_epsilon", where, 1e-5),
        "tied": bool(raw.get("tie_word_embeddings", True)),
    }
    if found["activation"] == "relu":  # its tensors would be taken for OPT's
        supported = "gelu_new, gelu or silu"
        raise unsupported(where, "activation_function", "relu", supported)
    return found


def _opt(raw: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    del kind
    heads = fields.size(raw, "num_attention_heads", where)
    hidden = fields.size(raw, "hidden_size", where)
    width = fields.size(raw, "word_embed_proj_dim", where, hidden)
    if width != hidden:
        supported = f"{hidden}, the hidden_size (opt-350m projects)"
        raise unsupported(where, "word_embed_proj_dim", width, supported)
    bias = raw.get("enable_bias", True)
    if type(bias) is not bool:
        raise unsupported(where, "enable_bias", bias, "true or false")
    activation = raw.get("activation_function", "relu")
    if activation != "relu":  # its tensors would be taken for GPT-2's
        raise unsupported(where, "activation_function", activation, "'relu'")
    return _plain(raw, "activation_function", "relu", where) | {
        "vocab_size": fields.size(raw, "vocab_size", where),
        "layers": fields.size(raw, "num_hidden_layers", where),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": _head_dim(hidden, heads, "num_attention_heads", where),
        "intermediate": fields.size(raw, "ffn_dim", where),
        "max_positions": fields.size(raw, "max_position_embeddings", where),
        "positions": "learned",
        "tied": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
    }


def _plain(
    raw: Mapping[str, Any], field: str, default: str, where: str
) -> dict[str, Any]:
    """What phi, gpt2 and opt share: LayerNorms, an MLP of two maps, biases."""
    activation = raw.get(field, default)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise unsupported(where, field, activation, " or ".join(ACTIVATIONS))
    return {
        "norm": "layer",
        "gated": False,
        "activation": ACTIVATIONS[activation],
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }


def _head_dim(hidden: int, heads: int, field: str, where: str) -> int:
    if hidden % heads:
        supported = f"a divisor of the width, {hidden}"
        raise unsupported(where, field, heads, supported)
    return hidden // heads


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

    Raises:
      CheckpointError: no model_type describes such a decoder.

    >>> from jmem.models import zoo
    >>> raw = render_config(zoo.get("qwen2-7b"), np.dtype("float32"))
    >>> raw["model_type"], parse_config(raw, "") == zoo.get("qwen2-7b")
    ('qwen2', True)
    """
    kind = names.family(config)
    if kind == "llama":
        kind = _llama_kind(config)
    own = {"gpt2": _gpt2_fields, "opt": _opt_fields, "phi": _phi_fields}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        **own.get(kind, _llama_fields)(config),
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": list(eos_ids)
        if len(eos_ids) > 1
        else next(iter(eos_ids), None),
        "torch_dtype": dtype.name,
    }


def _llama_kind(config: DecoderConfig) -> str:
    if config.sliding_window is None:
        return "qwen2" if config.qkv_bias else "llama"
    if config.qkv_bias:
        raise CheckpointError(
            f"save: sliding_window={config.sliding_window} with qkv_bias=True is no "
            "model_type: mistral has no biases, qwen2 a window in some layers only."
        )
    return "mistral"


def _shared_fields(config: DecoderConfig) -> dict[str, Any]:
    """Fields that llama, mistral, qwen2 and phi write alike."""
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": rotary.render(config.rope_scaling),
    }


def _llama_fields(config: DecoderConfig) -> dict[str, Any]:
    window = config.sliding_window
    return _shared_fields(config) | {
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        **({} if window is None else {"sliding_window": window}),
    }


def _phi_fields(config: DecoderConfig) -> dict[str, Any]:
    turning = config.rope.channels
    share = turning / config.head_dim
    if int(share * config.head_dim) < turning:  # read so, it would lose a channel
        share = math.nextafter(share, 1.0)
    return _shared_fields(config) | {
        "partial_rotary_factor": share,
        "hidden_act": config.activation,
        "layer_norm_eps": config.rms_eps,
    }


def _gpt2_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_layer": config.layers,
        "n_embd": config.hidden,
        "n_inner": config.intermediate,
        "n_head": config.heads,
        "n_positions": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.rms_eps,
    }


def _opt_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "word_embed_proj_dim": config.hidden,
        "ffn_dim": config.intermediate,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "activation_function": config.activation,
        "do_layer_norm_before": True,
        "enable_bias": config.mlp_bias,
    }


def _window(
    raw: Mapping[str, Any], kind: str, max_positions: int, where: str
) -> int | None:
    """The sliding window in positions; None if it covers all `max_positions`."""
    layer_types = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or any(
        layer != "full_attention" for layer in layer_types
    ):
        raise unsupported(where, "layer_types", layer_types, "full_attention")
    # MistralConfig's default is 4096; Llama has none, Qwen2's is behind a switch.
    window = raw.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or (kind == "qwen2" and not raw.get("use_sliding_window")):
        return None
    if window is None:
        return None
    window = fields.size({"sliding_window": window}, "sliding_window", where)
    if window >= max_positions:
        return None
    if kind == "qwen2":  # in the layers from max_window_layers on
        raise unsupported(
            where,
            "sliding_window",
            window,
            "a window in every layer (mistral) or none. Up to the window's length it "
            "is the same: set use_sliding_window to false and max_position_embeddings "
            "to the window",
        )
    return window
