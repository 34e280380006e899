"""GGUF metadata: the decoder they describe; other maths is refused by name."""

import dataclasses

import numpy as np
import pytest
from tiny_decoder import TINY, random_params

from jmem.checkpoints import llamacpp
from jmem.checkpoints.files import CheckpointError
from jmem.checkpoints.gguf import read_file
from jmem.nn.rope import Llama3Scaling

from . import tiny


def opened(tmp_path, config=TINY, **more):
    path = tmp_path / "a.gguf"
    return read_file(tiny.write_gguf(path, config, random_params(config), **more))


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_variant_is_recognised(tmp_path, name):
    config = tiny.VARIANTS[name]
    assert llamacpp.parse_config(opened(tmp_path, config)) == config


def test_defaults_of_older_files(tmp_path):
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    absent = {f"llama.{key}": None for key in (*keys, "attention.head_count_kv")}
    config = dataclasses.replace(TINY, kv_heads=4)
    assert llamacpp.parse_config(opened(tmp_path, config, metadata=absent)) == config


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_its_divisors(tmp_path, factor):
    scaling = Llama3Scaling(factor=factor)
    config = dataclasses.replace(
        tiny.VARIANTS["scaled"], rope_scaling=scaling, head_dim=64
    )
    assert len(set(tiny.llamacpp_divisors(config))) > 3  # all three branches
    assert llamacpp.parse_config(opened(tmp_path, config)) == config


@pytest.mark.parametrize(
    "wrong", [[1, 2, 3, 4], [np.inf] * 4, [np.nan] * 4, [0] * 4, [1] * 5], ids=str
)
def test_other_divisors_are_refused(tmp_path, wrong):
    extra = {"rope_freqs.weight": np.array(wrong, np.float32)}
    with pytest.raises(CheckpointError, match=r"does not hold Llama-3 scaling"):
        llamacpp.parse_config(opened(tmp_path, extra=extra))


REFUSED = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8; supported: 0"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'; supported"),
    "not causal": ({"llama.attention.causal": False}, "attention.causal is False"),
    "logit scale": ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
    "window": (
        {"llama.attention.sliding_window": 64},
        "attention.sliding_window is 64; supported: full attention, or 128",
    ),
    "partial rotary": (
        {"llama.rope.dimension_count": 4},
        "dimension_count is 4; .*: 8",
    ),
    "values": ({"llama.attention.value_length": 4}, "value_length is 4; supported: 8"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is missing"),
    "layers 0": ({"llama.block_count": 0}, "llama.block_count is 0"),
    "layers text": ({"llama.block_count": "3"}, "llama.block_count is '3'"),
    "heads a layer": (
        {"llama.attention.head_count_kv": [2, 2, 1]},
        r"attention.head_count_kv is \[2, 2, 1\]; supported: an integer",
    ),
    "kv heads": ({"llama.attention.head_count_kv": 3}, "not a multiple of kv_heads=3"),
    "theta": ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0"),
    "no eps": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        "layer_norm_rms_epsilon is missing",
    ),
}


@pytest.mark.parametrize("more, message", REFUSED.values(), ids=REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(tmp_path, more, message):
    source = opened(tmp_path, metadata=more)
    with pytest.raises(CheckpointError, match=message) as error:
        llamacpp.parse_config(source)
    assert str(error.value).startswith(f"{source.path}: ")


def test_other_architectures_are_refused(tmp_path):
    source = opened(tmp_path, arch="gemma3")
    with pytest.raises(
        CheckpointError, match=r"architecture is 'gemma3'; supported: ll"
    ):
        llamacpp.parse_config(source)
