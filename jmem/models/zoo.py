"""Published dimensions of well-known decoders, by name.

Source: each model's published configuration file; `tests/models/test_zoo.py` checks
the parameter counts against those the model cards state.
"""

import difflib

from jmem.models.config import DecoderConfig
from jmem.nn.rope import Llama3Scaling


def _build(layers, hidden, intermediate, heads, kv_heads=None, **more) -> DecoderConfig:
    fields = {
        "vocab_size": 32_000,
        "max_positions": 4096,
        "head_dim": hidden // heads,
        "kv_heads": kv_heads or heads,
    }
    return DecoderConfig(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        **(fields | more),
    )


_LLAMA1 = {"max_positions": 2048, "rms_eps": 1e-6}
_LLAMA3 = {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_positions": 8192}
_LLAMA31 = _LLAMA3 | {"max_positions": 131_072, "rope_scaling": Llama3Scaling()}
_LLAMA32 = _LLAMA31 | {"rope_scaling": Llama3Scaling(factor=32.0), "tied": True}
_QWEN2 = {
    "vocab_size": 151_936,
    "rope_theta": 1_000_000.0,
    "rms_eps": 1e-6,
    "max_positions": 131_072,
    "qkv_bias": True,
}
_PLAIN = {
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}
"""LayerNorms, an MLP of two maps, and a bias on each map of a block."""
_LEARNED = _PLAIN | {"positions": "learned", "tied": True}
_GPT2 = _LEARNED | {
    "vocab_size": 50_257,
    "max_positions": 1024,
    "activation": "gelu_new",
}
_OPT = _LEARNED | {"vocab_size": 50_272, "max_positions": 2048, "activation": "relu"}
_SMOLLM2 = {"vocab_size": 49_152, "max_positions": 8192, "tied": True}

MODELS: dict[str, DecoderConfig] = {
    "smollm2-135m": _build(30, 576, 1536, 9, 3, rope_theta=100_000.0, **_SMOLLM2),
    "smollm2-360m": _build(32, 960, 2560, 15, 5, rope_theta=100_000.0, **_SMOLLM2),
    "smollm2-1.7b": _build(24, 2048, 8192, 32, rope_theta=130_000.0, **_SMOLLM2),
    "tinyllama-1.1b": _build(22, 2048, 5632, 32, 4, max_positions=2048),
    "llama-7b": _build(32, 4096, 11_008, 32, **_LLAMA1),
    "llama-13b": _build(40, 5120, 13_824, 40, **_LLAMA1),
    "llama-30b": _build(60, 6656, 17_920, 52, **_LLAMA1),
    "llama-65b": _build(80, 8192, 22_016, 64, **_LLAMA1),
    "llama2-7b": _build(32, 4096, 11_008, 32),
    "llama2-13b": _build(40, 5120, 13_824, 40),
    "llama2-70b": _build(80, 8192, 28_672, 64, 8),
    "llama3-8b": _build(32, 4096, 14_336, 32, 8, **_LLAMA3),
    "llama3-70b": _build(80, 8192, 28_672, 64, 8, **_LLAMA3),
    "llama3.1-8b": _build(32, 4096, 14_336, 32, 8, **_LLAMA31),
    "llama3.1-70b": _build(80, 8192, 28_672, 64, 8, **_LLAMA31),
    "llama3.2-1b": _build(16, 2048, 8192, 32, 8, **_LLAMA32),
    "llama3.2-3b": _build(28, 3072, 8192, 24, 8, **_LLAMA32),
    "mistral-7b": _build(  # v0.1, the one with a window
        32, 4096, 14_336, 32, 8, max_positions=32_768, sliding_window=4096
    ),
    "mistral-7b-v0.3": _build(
        32,
        4096,
        14_336,
        32,
        8,
        vocab_size=32_768,
        rope_theta=1_000_000.0,
        max_positions=32_768,
    ),
    "mistral-nemo-12b": _build(
        40,
        5120,
        14_336,
        32,
        8,
        head_dim=128,
        vocab_size=131_072,
        rope_theta=1_000_000.0,
        max_positions=128_000,
    ),
    "qwen2-0.5b": _build(24, 896, 4864, 14, 2, tied=True, **_QWEN2),
    "qwen2-1.5b": _build(28, 1536, 8960, 12, 2, tied=True, **_QWEN2),
    "qwen2-7b": _build(28, 3584, 18_944, 28, 4, **(_QWEN2 | {"vocab_size": 152_064})),
    "qwen2-72b": _build(80, 8192, 29_568, 64, 8, **(_QWEN2 | {"vocab_size": 152_064})),
    "qwen2.5-3b": _build(
        36, 2048, 11_008, 16, 2, tied=True, **(_QWEN2 | {"max_positions": 32_768})
    ),
    "gpt2": _build(12, 768, 3072, 12, **_GPT2),
    "gpt2-medium": _build(24, 1024, 4096, 16, **_GPT2),
    "gpt2-large": _build(36, 1280, 5120, 20, **_GPT2),
    "gpt2-xl": _build(48, 1600, 6400, 25, **_GPT2),
    "opt-125m": _build(12, 768, 3072, 12, **_OPT),
    "opt-1.3b": _build(24, 2048, 8192, 32, **_OPT),
    "opt-6.7b": _build(32, 4096, 16_384, 32, **_OPT),
    "opt-13b": _build(40, 5120, 20_480, 40, **_OPT),
    "opt-30b": _build(48, 7168, 28_672, 56, **_OPT),
    "opt-66b": _build(64, 9216, 36_864, 72, **_OPT),
    "opt-175b": _build(96, 12_288, 49_152, 96, **_OPT),
    "phi-2": _build(
        32,
        2560,
        10_240,
        32,
        vocab_size=51_200,
        max_positions=2048,
        rotary_dim=32,
        parallel=True,
        activation="gelu_new",
        head_bias=True,
        **_PLAIN,
    ),
}


def get(name: str) -> DecoderConfig:
    """The configuration called `name`.

    Raises:
      ValueError: no such model; the nearest names are offered.

    >>> get("llama2-7b").layers
    32
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"unknown model {name!r}; {hint or 'known: ' + ', '.join(MODELS) + '.'}"
        )
    return MODELS[name]
