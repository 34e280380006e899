"""Published dimensions of well-known decoders, by name.

Source: each model's published configuration file; `tests/models/test_zoo.py` checks
the parameter counts against those the model cards state.
"""

import difflib

from jmem.models.decoder import DecoderConfig
from jmem.nn.rope import Llama3Scaling


def _llama(layers, hidden, intermediate, heads, kv_heads=None, **more) -> DecoderConfig:
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
_SMOLLM2 = {"vocab_size": 49_152, "max_positions": 8192, "tied": True}

MODELS: dict[str, DecoderConfig] = {
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, rope_theta=100_000.0, **_SMOLLM2),
    "smollm2-360m": _llama(32, 960, 2560, 15, 5, rope_theta=100_000.0, **_SMOLLM2),
    "smollm2-1.7b": _llama(24, 2048, 8192, 32, rope_theta=130_000.0, **_SMOLLM2),
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, 4, max_positions=2048),
    "llama-7b": _llama(32, 4096, 11_008, 32, **_LLAMA1),
    "llama-13b": _llama(40, 5120, 13_824, 40, **_LLAMA1),
    "llama-30b": _llama(60, 6656, 17_920, 52, **_LLAMA1),
    "llama-65b": _llama(80, 8192, 22_016, 64, **_LLAMA1),
    "llama2-7b": _llama(32, 4096, 11_008, 32),
    "llama2-13b": _llama(40, 5120, 13_824, 40),
    "llama2-70b": _llama(80, 8192, 28_672, 64, 8),
    "llama3-8b": _llama(32, 4096, 14_336, 32, 8, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 28_672, 64, 8, **_LLAMA3),
    "llama3.1-8b": _llama(32, 4096, 14_336, 32, 8, **_LLAMA31),
    "llama3.1-70b": _llama(80, 8192, 28_672, 64, 8, **_LLAMA31),
    "llama3.2-1b": _llama(16, 2048, 8192, 32, 8, **_LLAMA32),
    "llama3.2-3b": _llama(28, 3072, 8192, 24, 8, **_LLAMA32),
    # v0.1 limits attention to a window of 4,096 tokens: the same up to that length.
    "mistral-7b": _llama(32, 4096, 14_336, 32, 8, max_positions=4096),
    "mistral-7b-v0.3": _llama(
        32,
        4096,
        14_336,
        32,
        8,
        vocab_size=32_768,
        rope_theta=1_000_000.0,
        max_positions=32_768,
    ),
    "qwen2-0.5b": _llama(24, 896, 4864, 14, 2, tied=True, **_QWEN2),
    "qwen2-1.5b": _llama(28, 1536, 8960, 12, 2, tied=True, **_QWEN2),
    "qwen2-7b": _llama(28, 3584, 18_944, 28, 4, **(_QWEN2 | {"vocab_size": 152_064})),
    "qwen2-72b": _llama(80, 8192, 29_568, 64, 8, **(_QWEN2 | {"vocab_size": 152_064})),
    "qwen2.5-3b": _llama(
        36, 2048, 11_008, 16, 2, tied=True, **(_QWEN2 | {"max_positions": 32_768})
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
