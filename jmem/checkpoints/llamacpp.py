"""GGUF metadata, llama.cpp's description of a model, to `DecoderConfig`.

Supported are the architectures llama (Mistral, SmolLM2 and TinyLlama are llamas) and
qwen2. A key that would make the model compute something else than `Decoder` is refused
by name.

Rotary   For llama, llama.cpp orders rows of q and k so that a channel pair lies side by
         side (2i, 2i+1); they are put back into Hugging Face's halves (i, i + D/2).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from jmem.checkpoints.fields import Fields
from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.checkpoints.gguf import Gguf
from jmem.models.config import DecoderConfig
from jmem.nn.rope import Llama3Scaling, Rope

ARCHITECTURES = ("llama", "qwen2")
"""Supported general.architecture."""

_NEUTRAL: Mapping[str, tuple] = {
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
"""Keys (below the architecture's name) that change the result unless they are absent
or hold one of these values."""

_TABLES = ("token_embd.weight", "output.weight")
"""Embedding and head; a file that holds one of them has a tied model."""


def parse_config(source: Gguf) -> DecoderConfig:
    """The decoder that the metadata describe.

    Raises:
      CheckpointError: an architecture or key that `Decoder` does not compute, or a
        value missing or out of range; names the key and its value.
    """
    metadata, tensors = Fields(source.metadata, str(source.path)), source.tensors
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        supported = " or ".join(ARCHITECTURES)
        raise metadata.make_error("general.architecture", kind, supported)
    given = dataclasses.replace(metadata, prefix=f"{kind}.")
    given.check_neutral(_NEUTRAL)
    hidden, heads = given.size("embedding_length"), given.size("attention.head_count")
    even = hidden // heads if hidden % heads == 0 else None
    head_dim = given.size("attention.key_length", even)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := given.size(key, head_dim)) != head_dim:
            raise given.make_error(key, value, f"{head_dim}, as for keys")
    max_positions = given.size("context_length")
    window = given.get("attention.sliding_window") or max_positions
    if type(window) is not int or window < max_positions:
        supported = f"full attention, or {max_positions}"
        raise given.make_error("attention.sliding_window", window, supported)
    theta = given.number("rope.freq_base", 10_000.0)
    tables = [t for n in _TABLES if (t := tensors.get(n)) is not None]
    with given.name_errors():
        return DecoderConfig(
            vocab_size=given.size("vocab_size", tables[0].shape[0] if tables else None),
            layers=given.size("block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=given.size("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate=given.size("feed_forward_length"),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=_parse_scaling(source, head_dim, theta),
            rms_eps=given.number("attention.layer_norm_rms_epsilon"),
            tied=len(tables) < 2,
            qkv_bias="blk.0.attn_q.bias" in tensors,
        )


def _parse_scaling(source: Gguf, head_dim: int, theta: float) -> Llama3Scaling | None:
    """Llama-3 scaling, which GGUF holds as a tensor of frequency divisors [D/2].

    All published models share every constant but `factor`, the largest divisor.

    Raises:
      CheckpointError: the divisors are not those of any such scaling.
    """
    tensor = source.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.shape == (head_dim // 2,):
        divisors = tensor.read()
        with np.errstate(all="ignore"):  # a damaged file may hold anything
            plain = Rope(head_dim=head_dim, theta=theta).frequencies()
            scaling = Llama3Scaling(factor=max(1.0, float(divisors.max())))
            if np.allclose(divisors, plain / scaling(plain), rtol=1e-4):
                return scaling
    raise CheckpointError(
        f"{source.path}: tensor 'rope_freqs.weight' of shape {tensor.shape} does not "
        f"hold Llama-3 scaling ({Llama3Scaling()} with any factor), the only one "
        "supported."
    )


def reorder_tensors(source: Gguf, config: DecoderConfig) -> dict[str, LazyTensor]:
    """The file's tensors, rows of q and k in the decoder's order of channel pairs."""
    if source.metadata["general.architecture"] != "llama":
        return dict(source.tensors)
    heads = {"q": config.heads, "k": config.kv_heads}

    def halves(tensor: LazyTensor) -> LazyTensor:
        rotated = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
        if rotated is None:
            return tensor
        assert tensor.read_packed is not None  # every tensor of a GGUF file has it
        # Whole rows move, so packed ones move as well.
        read, read_packed = (
            functools.partial(_reorder_rows, source, heads[rotated[1]])
            for source in (tensor.read, tensor.read_packed)
        )
        return dataclasses.replace(tensor, read=read, read_packed=read_packed)

    return {name: halves(tensor) for name, tensor in source.tensors.items()}


def _reorder_rows(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """Reorders rows: (head, channel pair, member) to (head, member, pair)."""
    rows = read()
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
