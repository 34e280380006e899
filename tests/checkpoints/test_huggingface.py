"""config.json: published models give the zoo's dimensions; other maths is refused."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_decoder import TINY

from jmem.checkpoints.files import CheckpointError
from jmem.checkpoints.huggingface import parse_config, parse_eos, render_config
from jmem.models import zoo

from . import tiny

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "llama2-7b": {  # no head_dim, no rope_theta
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "qwen2-7b": {  # its window is switched off
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_zoos(name):
    assert parse_config(PUBLISHED[name], "") == zoo.get(name)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_survives_the_round_trip_through_json(name):
    text = json.dumps(render_config(zoo.get(name), np.dtype("float32"), (1, 2)))
    raw = json.loads(text)
    assert parse_config(raw, "") == zoo.get(name)
    assert parse_eos(raw, 10, "") == (1, 2)


def test_the_newer_spelling_of_rotary_scaling():
    raw = tiny.hf_config(tiny.VARIANTS["scaled"])
    rope = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    assert parse_config(raw | {"rope_parameters": rope}, "") == tiny.VARIANTS["scaled"]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    expected = dataclasses.replace(tiny.VARIANTS["scaled"], rope_scaling=None)
    assert parse_config(raw | plain, "") == expected


def test_a_window_that_limits_nothing_is_full_attention():
    more = {"model_type": "mistral", "architectures": None}
    raw = tiny.hf_config(TINY, **more, sliding_window=128)
    assert parse_config(raw, "") == TINY


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
REFUSED = {
    "model_type": (
        {"model_type": "gemma3"},
        "model_type is 'gemma3'; supported: llama",
    ),
    "no model_type": ({"model_type": None}, "model_type is missing"),
    "classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures is \['LlamaForSequenceClassification'\]; supported: \[Llama",
    ),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    "attention_bias": (
        {"attention_bias": True},
        "attention_bias is True; supported: F",
    ),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is {'quant_method': 'gptq'}; supported: None",
    ),
    "window of mistral": (
        MISTRAL | {"sliding_window": 64},
        "sliding_window is 64; supported: full attention.*set sliding_window to null",
    ),
    "window of qwen2": (
        QWEN | {"sliding_window": 64, "use_sliding_window": True},
        "sliding_window is 64; supported: full attention",
    ),
    "layer_types": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .* supported: full_attention",
    ),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling.rope_type is 'yarn'; supported: default or llama3",
    ),
    "linear, old spelling": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_scaling.rope_type is 'linear'",
    ),
    "unnamed scaling": ({"rope_scaling": {"factor": 4.0}}, "rope_type is missing"),
    "incomplete llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
        "rope_scaling: low_freq_factor is missing",
    ),
    "llama3 out of order": (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        "rope_scaling: .*low_freq_factor=4.0 must be positive and below",
    ),
    "two scalings": (
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        "rope_parameters is .* supported: one rope_scaling",
    ),
    "scaling a list": ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
    "no heads": ({"num_attention_heads": None}, "num_attention_heads is missing"),
    "heads float": ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0"),
    "heads bool": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "layers 0": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; supported: an int"),
    "layers huge": ({"num_hidden_layers": 10**20}, "num_hidden_layers is 1000000"),
    "kv heads": ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
    "head_dim odd": ({"head_dim": 7}, "head_dim=7 is odd"),
    "no head_dim": ({"head_dim": None, "hidden_size": 33}, "head_dim is missing"),
    "eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; supported: a positive"),
    "eps NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "theta": ({"rope_theta": float("inf")}, "rope_theta is inf; supported: a positive"),
    "tied": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
}


@pytest.mark.parametrize("more, message", REFUSED.values(), ids=REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(more, message):
    with pytest.raises(CheckpointError, match=message) as error:
        parse_config(tiny.hf_config(TINY) | more, "there/config.json")
    assert str(error.value).startswith("there/config.json: ")


@pytest.mark.parametrize("value", [40, -1, "2", [1, 2.0], {"id": 2}, True])
def test_ends_of_text_are_ids_of_the_vocabulary(value):
    with pytest.raises(CheckpointError, match=r"eos_token_id is .* ids below 40"):
        parse_eos({"eos_token_id": value}, 40, "config.json")
