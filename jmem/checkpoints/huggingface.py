"""`config.json`, Hugging Face's description of a model, to `DecoderConfig` and back.

Supported are model_type llama (SmolLM2 and TinyLlama are llamas), mistral, qwen2, phi,
gpt2 and opt. A field that would make the model compute something else than `Decoder` is
refused by name; fields that only describe training, tokens or defaults of generation
are ignored.

Source   transformers' configuration classes and the models that read them; both
         spellings of rotary scaling (rope_scaling, and rope_parameters).
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jmem.checkpoints import names, rotary
from jmem.checkpoints.fields import Fields
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

GENERATION = "generation_config.json"
"""The file of what transformers generates by: end tokens, defaults of sampling."""

_SIZES: Mapping[str, str] = {
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
"""Sizes that every kind states, and what most of them call these."""
_OWN_SIZES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "heads": "n_head",
        "hidden": "n_embd",
        "layers": "n_layer",
        "intermediate": "n_inner",
        "max_positions": "n_positions",
    },
    "opt": {"intermediate": "ffn_dim"},
}
"""What others call them."""

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
    given = Fields(raw, where)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise given.make_error("model_type", kind, " or ".join(ARCHITECTURES))
    classes = given.get("architectures") or [ARCHITECTURES[kind]]
    if classes != [ARCHITECTURES[kind]]:
        raise given.make_error("architectures", classes, f"[{ARCHITECTURES[kind]}]")
    given.check_neutral(_NEUTRAL[kind])
    given.check_neutral(_ALL_NEUTRAL)
    parse = {"gpt2": _parse_gpt2, "opt": _parse_opt, "phi": _parse_phi}
    sizes = _parse_sizes(given, kind)
    own = parse.get(kind, _parse_llama)(given, kind, sizes)
    with given.name_errors():
        return DecoderConfig(**(sizes | own))


def _name_sizes(kind: str) -> dict[str, str]:
    """A kind's name for each of the sizes that it states."""
    found = {**_SIZES, **_OWN_SIZES.get(kind, {})}
    if kind in ("gpt2", "opt"):
        del found["kv_heads"]  # as many as there are heads
    return found


def _parse_sizes(given: Fields, kind: str) -> dict[str, Any]:
    """The sizes, by our names of them."""
    sizes: dict[str, Any] = {}
    for field, name in _name_sizes(kind).items():
        default = None
        if field == "kv_heads" and kind in ("llama", "phi"):
            # Mistral and Qwen2 have a constant as default, and always state the field.
            default = sizes["heads"]
        if field == "intermediate" and kind == "gpt2":
            default = 4 * sizes["hidden"]
        sizes[field] = given.size(name, default)
    return sizes


def _parse_llama(given: Fields, kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fields of llama, mistral and qwen2 beside their sizes."""
    hidden, heads = sizes["hidden"], sizes["heads"]
    head_dim = hidden // heads if hidden % heads == 0 else None
    theta, scaling, share = rotary.parse(given, sizes["max_positions"])
    if share != 1:
        raise given.make_error("partial_rotary_factor", share, "1.0")
    return {
        "head_dim": given.size("head_dim", head_dim),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _parse_window(given, kind, sizes["max_positions"]),
        "rms_eps": given.number("rms_norm_eps"),
        "tied": bool(given.get("tie_word_embeddings", False)),
        "qkv_bias": kind == "qwen2",
    }


def _parse_phi(given: Fields, kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    found = _parse_plain(given, kind, sizes)
    theta, scaling, share = rotary.parse(given, sizes["max_positions"], share=0.5)
    rotary_dim = int(found["head_dim"] * share)
    return found | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": None if rotary_dim == found["head_dim"] else rotary_dim,
        "rms_eps": given.number("layer_norm_eps", 1e-5),
        "parallel": True,
        "head_bias": True,
    }


def _parse_gpt2(given: Fields, kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    found = _parse_learned(given, kind, sizes)
    if found["activation"] == "relu":  # its tensors would be taken for OPT's
        supported = "gelu_new, gelu or silu"
        raise given.make_error("activation_function", "relu", supported)
    eps = given.number("layer_norm_epsilon", 1e-5)
    return found | {"rms_eps": eps}


def _parse_opt(given: Fields, kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    hidden = sizes["hidden"]
    width = given.size("word_embed_proj_dim", hidden)
    if width != hidden:
        supported = f"{hidden}, the hidden_size (opt-350m projects)"
        raise given.make_error("word_embed_proj_dim", width, supported)
    bias = given.get("enable_bias", True)
    if type(bias) is not bool:
        raise given.make_error("enable_bias", bias, "true or false")
    activation = given.get("activation_function", "relu")
    if activation != "relu":  # its tensors would be taken for GPT-2's
        raise given.make_error("activation_function", activation, "'relu'")
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bias)
    return _parse_learned(given, kind, sizes) | biases


def _parse_learned(
    given: Fields, kind: str, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """What gpt2 and opt share: a learned table of positions, keys for every head."""
    return _parse_plain(given, kind, sizes) | {
        "kv_heads": sizes["heads"],
        "positions": "learned",
        "tied": bool(given.get("tie_word_embeddings", True)),
    }


def _parse_plain(given: Fields, kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What phi, gpt2 and opt share: LayerNorms, an MLP of two maps, biases."""
    hidden, heads = sizes["hidden"], sizes["heads"]
    if hidden % heads:
        supported = f"a divisor of the width, {hidden}"
        raise given.make_error(_name_sizes(kind)["heads"], heads, supported)
    field = "hidden_act" if kind == "phi" else "activation_function"
    activation = given.get(field, "relu" if kind == "opt" else "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise given.make_error(field, activation, " or ".join(ACTIVATIONS))
    return {
        "head_dim": hidden // heads,
        "norm": "layer",
        "gated": False,
        "activation": ACTIVATIONS[activation],
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }


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
    kind = names.find_family(config)
    if kind == "llama":
        kind = _choose_llama_kind(config)
    sizes = {name: getattr(config, field) for field, name in _name_sizes(kind).items()}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **sizes,
        **_render_own(config, kind),
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": _render_ids(eos_ids),
        "torch_dtype": dtype.name,
    }


def _render_ids(ids: tuple[int, ...]) -> list[int] | int | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def render_generation(beside: Mapping[str, str], eos_ids: tuple[int, ...]) -> str:
    """`generation_config.json`: that among the files `beside`, with these end tokens.

    >>> render_generation({GENERATION: '{"top_k": 5, "eos_token_id": 7}'}, (2, 3))
    '{"top_k": 5, "eos_token_id": [2, 3]}'
    """
    text = beside.get(GENERATION, "{}")
    raw = json.loads(text)
    stated = raw.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    if all(type(number) is int for number in ids) and {*ids} == {*eos_ids}:
        return text
    return json.dumps(raw | {"eos_token_id": _render_ids(eos_ids)})


def _choose_llama_kind(config: DecoderConfig) -> str:
    if config.sliding_window is None:
        return "qwen2" if config.qkv_bias else "llama"
    if config.qkv_bias:
        raise CheckpointError(
            f"save: sliding_window={config.sliding_window} with qkv_bias=True is no "
            "model_type: mistral has no biases, qwen2 a window in some layers only."
        )
    return "mistral"


def _render_own(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """What a kind writes beside its sizes."""
    if kind == "gpt2":
        return {
            "activation_function": config.activation,
            "layer_norm_epsilon": config.rms_eps,
        }
    if kind == "opt":
        return {
            "word_embed_proj_dim": config.hidden,
            "activation_function": config.activation,
            "do_layer_norm_before": True,
            "enable_bias": config.mlp_bias,
        }
    found = {
        "rope_theta": config.rope_theta,
        "rope_scaling": rotary.render(config.rope_scaling),
        "hidden_act": config.activation,
    }
    if kind == "phi":
        turning = config.rope.channels
        share = turning / config.head_dim
        if int(share * config.head_dim) < turning:  # read so, it would lose a channel
            share = math.nextafter(share, 1.0)
        return found | {
            "partial_rotary_factor": share,
            "layer_norm_eps": config.rms_eps,
        }
    if config.sliding_window is not None:
        found["sliding_window"] = config.sliding_window
    return found | {"head_dim": config.head_dim, "rms_norm_eps": config.rms_eps}


def _parse_window(given: Fields, kind: str, max_positions: int) -> int | None:
    """The sliding window in positions; None if it covers all `max_positions`."""
    layer_types = given.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or any(
        layer != "full_attention" for layer in layer_types
    ):
        raise given.make_error("layer_types", layer_types, "full_attention")
    # MistralConfig's default is 4096; Llama has none, Qwen2's is behind a switch.
    window = given.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or (kind == "qwen2" and not given.get("use_sliding_window")):
        return None
    if window is None:
        return None
    window = given.size("sliding_window", 4096)
    if window >= max_positions:
        return None
    if kind == "qwen2":  # in the layers from max_window_layers on
        raise given.make_error(
            "sliding_window",
            window,
            "a window in every layer (mistral) or none. Up to the window's length it "
            "is the same: set use_sliding_window to false and max_position_embeddings "
            "to the window",
        )
    return window
