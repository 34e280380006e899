"""config.json: published models give the zoo's dimensions; other maths is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem import checkpoints
from jmem.checkpoints.files import CheckpointError
from jmem.checkpoints.huggingface import parse_config, render_config
from jmem.models import zoo
from jmem.nn.rope import LinearScaling, YarnScaling

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
    "mistral-7b": {
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
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "gpt2": {  # no n_inner, no tie_word_embeddings
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "vocab_size": 50257,
    },
    "opt-125m": {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "phi-2": {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "phi",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
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
    assert raw["eos_token_id"] == [1, 2]


def test_the_newer_spelling_of_rotary_scaling():
    raw = tiny.hf_config(tiny.VARIANTS["scaled"])
    rope = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    assert parse_config(raw | {"rope_parameters": rope}, "") == tiny.VARIANTS["scaled"]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    expected = dataclasses.replace(tiny.VARIANTS["scaled"], rope_scaling=None)
    assert parse_config(raw | plain, "") == expected


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.mark.parametrize("window", [128, None])
def test_a_window_that_limits_nothing_is_full_attention(window):
    raw = tiny.hf_config(TINY, **MISTRAL, sliding_window=window)
    assert parse_config(raw, "") == TINY


def test_mistrals_window_is_4096_unless_stated():
    raw = tiny.hf_config(TINY, **MISTRAL) | {"max_position_embeddings": 8192}
    assert parse_config(raw, "").sliding_window == 4096


ROTARY = {
    "linear": ({"type": "linear", "factor": 4}, LinearScaling(factor=4.0)),
    "yarn": (  # the context trained at is the one stated outside
        {"rope_type": "yarn", "factor": 4.0},
        YarnScaling(factor=4.0, original_max_positions=128),
    ),
    "yarn of DeepSeek": (
        {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        },
        YarnScaling(
            factor=40.0,
            original_max_positions=64,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=(0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1),
            truncate=False,
        ),
    ),
    "yarn without a factor": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
        YarnScaling(factor=4.0, original_max_positions=32),
    ),
}


@pytest.mark.parametrize("stated, scaling", ROTARY.values(), ids=ROTARY)
def test_rotary_scalings_are_read_and_written(stated, scaling):
    config = parse_config(tiny.hf_config(TINY) | {"rope_scaling": stated}, "")
    assert config == dataclasses.replace(TINY, rope_scaling=scaling)
    written = json.loads(json.dumps(render_config(config, np.dtype("float32"))))
    assert parse_config(written, "") == config


def test_the_share_of_turning_channels_is_stated_in_either_spelling():
    raw = PUBLISHED["phi-2"]
    rope = {"rope_type": "default", "partial_rotary_factor": 0.4, "rope_theta": 10000.0}
    newer = {k: v for k, v in raw.items() if k not in rope} | {"rope_parameters": rope}
    assert parse_config(newer, "") == zoo.get("phi-2")
    absent = {k: v for k, v in raw.items() if k != "partial_rotary_factor"}
    assert parse_config(absent, "").rotary_dim == 40  # half, PhiConfig's default


@pytest.mark.parametrize("head_dim, turning", [(47, 6), (49, 2), (80, 80), (64, 32)])
def test_the_share_of_turning_channels_loses_none_to_rounding(head_dim, turning):
    config = dataclasses.replace(
        zoo.get("phi-2"), head_dim=head_dim, hidden=32 * head_dim, rotary_dim=turning
    )
    raw = render_config(config, np.dtype("float32"))
    assert parse_config(raw, "").rope.channels == turning


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
        MISTRAL | {"sliding_window": 0},
        "sliding_window is 0; supported: an integer of 1",
    ),
    "window a string": (
        MISTRAL | {"sliding_window": "64"},
        "sliding_window is '64'; supported: an integer of 1",
    ),
    "window of qwen2": (
        QWEN | {"sliding_window": 64, "use_sliding_window": True},
        "sliding_window is 64; supported: a window in every layer.*set use_sliding",
    ),
    "layer_types": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .* supported: full_attention",
    ),
    "dynamic": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "rope_scaling.rope_type is 'dynamic'; supported: default, linear, llama3, yarn",
    ),
    "longrope, old spelling": (
        {"rope_scaling": {"type": "longrope", "factor": 4.0}},
        "rope_scaling.rope_type is 'longrope'",
    ),
    "kind a list": ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type is \['yarn'\]"),
    "linear below 1": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "rope_scaling: LinearScaling: factor=0.5 must be at least 1",
    ),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, "factor is missin"),
    "yarn out of order": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 32.0}},
        "rope_scaling: YarnScaling: beta_slow=32.0 must be positive and below",
    ),
    "yarn truncate": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}},
        "rope_scaling: truncate is 1; supported: true or false",
    ),
    "yarn attention_factor": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": -1.0}},
        "attention_factor is -1.0; supported: a positive finite number",
    ),
    "yarn of theta 1": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0},
        "YarnScaling slows some channel pairs.*rope_theta above 1, not rope_theta=1.0",
    ),
    "partial rotary, newer spelling": (
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}},
        "partial_rotary_factor is 0.5; supported: 1.0",
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


OTHERS_REFUSED = {
    "post-norm": (
        "opt-125m",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 512},
        "do_layer_norm_before is False; supported: True",
    ),
    "projected": (
        "opt-125m",
        {"word_embed_proj_dim": 512},
        "word_embed_proj_dim is 512; supported: 768, the hidden_size",
    ),
    "no last norm": (
        "opt-125m",
        {"_remove_final_layer_norm": True},
        "_remove_final_layer_norm is True; supported: False",
    ),
    "norms of nothing": (
        "opt-125m",
        {"layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine is False; supported: True",
    ),
    "opt with gelu": (
        "opt-125m",
        {"activation_function": "gelu"},
        "activation_function is 'gelu'; supported: 'relu'",
    ),
    "opt bias": ("opt-125m", {"enable_bias": 1}, "enable_bias is 1; supported: true"),
    "unknown activation": (
        "gpt2",
        {"activation_function": "tanh"},
        "activation_function is 'tanh'; supported: gelu or gelu_new",
    ),
    "activation a list": ("phi-2", {"hidden_act": []}, r"hidden_act is \[\]; suppo"),
    "gpt2 with relu": (
        "gpt2",
        {"activation_function": "relu"},
        "activation_function is 'relu'; supported: gelu_new, gelu or silu",
    ),
    "unscaled": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    "scaled by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True; supported: False",
    ),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "uneven heads": ("gpt2", {"n_head": 7}, "n_head is 7; supported: a divisor of the"),
    "quantised": ("gpt2", {"quantization_config": {}}, "quantization_config is {}"),
    "normed queries": ("phi-2", {"qk_layernorm": True}, "qk_layernorm is True; suppor"),
    "tied phi": ("phi-2", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "odd share": (
        "phi-2",
        {"partial_rotary_factor": 0.42},
        "rotary_dim=33 must be even, from 2 to head_dim=80",
    ),
    "more than all": (
        "phi-2",
        {"partial_rotary_factor": 1.5},
        "rotary_dim=120 must be even, from 2 to head_dim=80",
    ),
}


@pytest.mark.parametrize(
    "name, more, message", OTHERS_REFUSED.values(), ids=OTHERS_REFUSED
)
def test_what_plain_models_do_not_compute_is_refused_by_name(name, more, message):
    with pytest.raises(CheckpointError, match=message) as error:
        parse_config(PUBLISHED[name] | more, "there/config.json")
    assert str(error.value).startswith("there/config.json: ")


WEIRD = [None, True, False, 0, 1, 2, 3, -1, 2**31 - 1, 10**400, 0.5, 1e-300, 1e300]
WEIRD += [float("nan"), float("inf"), "", "gelu", "yarn", [], [1], {}, {"factor": 2.0}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_value_of_any_field_is_understood_or_refused(name):
    """Never another exception, and what is understood can be written again."""
    raw = PUBLISHED[name]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    optional = ["attention_factor", "beta_fast", "beta_slow", "mscale", "truncate"]
    scalings = [
        {"rope_scaling": LLAMA3 | {field: value}} for field in LLAMA3 for value in WEIRD
    ] + [
        {"rope_scaling": yarn | {"mscale_all_dim": 1.0, field: value}}
        for field in [*yarn, *optional]
        for value in WEIRD
    ]
    known = [*raw, "rope_parameters", "sliding_window", "layer_types", "head_dim"]
    changes = [{field: value} for field in known for value in WEIRD] + scalings
    understood = 0
    for change in changes:
        try:
            config = parse_config(raw | change, "config.json")
        except CheckpointError:
            continue
        understood += 1
        written = render_config(config, np.dtype("float32"))
        assert parse_config(json.loads(json.dumps(written)), "") == config, change
    assert 0 < understood < len(changes)


def test_a_window_with_biases_is_nobodys_configuration():
    config = dataclasses.replace(TINY, sliding_window=8, qkv_bias=True)
    with pytest.raises(CheckpointError, match=r"sliding_window=8 with qkv_bias=True"):
        render_config(config, np.dtype("float32"))


def test_gguf_files_of_plain_models_are_refused(tmp_path):
    """By their own architecture, and where one is expected."""
    params = random_params(TINY)
    path = tiny.write_gguf(tmp_path / "m.gguf", TINY, params)
    with pytest.raises(CheckpointError, match=r"is a gpt2, whose GGUF files are not"):
        checkpoints.load(path, expect=zoo.get("gpt2"))
    for arch in ("gpt2", "phi2"):
        path = tiny.write_gguf(tmp_path / f"{arch}.gguf", TINY, params, arch=arch)
        message = f"architecture is '{arch}'; supported: llama or qwen2"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path)
