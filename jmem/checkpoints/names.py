"""Every leaf of the decoder's parameters, its names in files and how it lies there.

One table a published architecture. torch stores a linear map as [out, in], one tensor
a layer; GPT-2 alone stores [in, out], with q, k and v side by side in one tensor. OPT's
table of positions begins with two rows that no position reads (zeros when written).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jmem.checkpoints.files import CheckpointError
from jmem.models.config import DecoderConfig

Naming = Literal["huggingface", "gguf"]


def _prefix_names(
    block: str, inside: Mapping[str, str], above: str, outside: Mapping[str, str]
) -> dict[str, str]:
    """Stored names of modules, by their path in the parameters.

    Those `inside` a block follow `block`, those outside of the blocks `above`.
    """
    found = {f"blocks/{path}": block + name for path, name in inside.items()}
    return found | {path: above + name for path, name in outside.items()}


_HEAD = {"head": "lm_head"}
_LLAMA = _HEAD | _prefix_names(
    "model.layers.{}.",
    {f"attention/{n}": f"self_attn.{n}_proj" for n in "qkvo"}
    | {f"mlp/{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    | {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "model.",
    {"embed/embedding": "embed_tokens", "final_norm": "norm"},
)
_PHI = _LLAMA | _prefix_names(
    "model.layers.{}.",
    {"attention/o": "self_attn.dense", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"},
    "model.",
    {"final_norm": "final_layernorm"},
)
_OPT = _HEAD | _prefix_names(
    "model.decoder.layers.{}.",
    {f"attention/{n}": f"self_attn.{n}_proj" for n in "qkv"}
    | {"attention/o": "self_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2"}
    | {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
    "model.decoder.",
    {"embed/embedding": "embed_tokens", "embed/positions": "embed_positions"}
    | {"final_norm": "final_layer_norm"},
)
_GPT2 = _HEAD | _prefix_names(
    "transformer.h.{}.",
    {f"attention/{n}": "attn.c_attn" for n in "qkv"}
    | {"attention/o": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    | {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    "transformer.",
    {"embed/embedding": "wte", "embed/positions": "wpe", "final_norm": "ln_f"},
)
HUGGINGFACE = {"llama": _LLAMA, "phi": _PHI, "opt": _OPT, "gpt2": _GPT2}
"""Names by family; Mistral and Qwen2 use Llama's."""
_GGUF = _prefix_names(
    "blk.{}.",
    {f"attention/{n}": f"attn_{n}" for n in "qkv"}
    | {f"mlp/{n}": f"ffn_{n}" for n in ("gate", "up", "down")}
    | {"attention/o": "attn_output"}
    | {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    "",
    {"embed/embedding": "token_embd", "final_norm": "output_norm", "head": "output"},
)


def find_family(config: DecoderConfig) -> Literal["llama", "phi", "opt", "gpt2"]:
    """The published architecture that computes what `config` says, up to sizes.

    "llama" stands for Mistral and Qwen2 too; "opt" is GPT-2 with relu.

    Raises:
      CheckpointError: there is none; names the fields that tell them apart.
    """
    c = config
    biases = {c.qkv_bias, c.o_bias, c.mlp_bias}
    whole = c.heads * c.head_dim == c.hidden and c.sliding_window is None
    shape = c.norm, c.positions, c.gated, c.parallel, c.head_bias
    match shape:
        case "rms", "rotary", True, False, False:
            turned = c.rotary_dim in (None, c.head_dim)
            if turned and c.activation == "silu" and not (c.o_bias or c.mlp_bias):
                return "llama"
        case "layer", "rotary", False, True, True:
            if whole and biases == {True}:
                return "phi"
        case "layer", "learned", False, False, False:
            whole = whole and c.heads == c.kv_heads
            if whole and c.activation == "relu":
                if len(biases) == 1 and c.rms_eps == 1e-5:
                    return "opt"
            elif whole and biases == {True}:
                return "gpt2"
    told = ("norm", "positions", "gated", "parallel", "activation", "sliding_window")
    told += ("qkv_bias", "o_bias", "mlp_bias", "head_bias", "rms_eps", "rotary_dim")
    given = ", ".join(f"{name}={getattr(c, name)!r}" for name in told)
    raise CheckpointError(
        f"no published architecture is a decoder with {given}, {c.heads} heads "
        f"({c.kv_heads} of keys) of {c.head_dim} and hidden={c.hidden}, so its tensors "
        f"have no names. Supported are those of {', '.join(HUGGINGFACE)}."
    )


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and its names elsewhere (`{}` is the layer)."""

    path: str
    shape: tuple[int, ...]
    """Shape of one layer's part, in the decoder's layout."""
    huggingface: str
    gguf: str = ""
    """Its name in GGUF files; empty where GGUF is not supported."""
    transposed: bool = False
    """The stored tensor is [out, in]."""
    part: int | None = None
    """Which third of the stored tensor it is, where q, k and v lie side by side."""
    unread_rows: int = 0
    """How many rows of the stored tensor come before the leaf's first one."""

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one layer's stored tensor."""
        shape = self.shape[::-1] if self.transposed else self.shape
        if self.part is not None:
            return (*shape[:-1], 3 * shape[-1])
        return (shape[0] + self.unread_rows, *shape[1:])

    def take_from(self, stored: np.ndarray) -> np.ndarray:
        """The leaf's values in the decoder's layout; a view of the stored tensor."""
        if self.part is not None:
            stored = np.split(stored, 3, axis=-1)[self.part]
        return stored.T if self.transposed else stored[self.unread_rows :]

    def as_stored(self, values: np.ndarray) -> np.ndarray:
        """The stored tensor, or its part; a view unless rows are put before it."""
        if self.unread_rows:
            before = np.zeros((self.unread_rows, *values.shape[1:]), values.dtype)
            return np.concatenate([before, values])
        return values.T if self.transposed else values

    def list_names(self, naming: Naming, layers: int) -> Iterator[str]:
        template = getattr(self, naming)
        return (template.format(i) for i in range(layers if self.stacked else 1))


def list_leaves(config: DecoderConfig) -> tuple[Leaf, ...]:
    """Every leaf of `Decoder(config)`'s parameters.

    Raises:
      CheckpointError: no published architecture is such a decoder.
    """
    c, kind = config, find_family(config)
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    maps = [  # [in, out], and whether there is a bias
        ("blocks/attention/q", (c.hidden, queries), c.qkv_bias),
        ("blocks/attention/k", (c.hidden, keys), c.qkv_bias),
        ("blocks/attention/v", (c.hidden, keys), c.qkv_bias),
        ("blocks/attention/o", (queries, c.hidden), c.o_bias),
        ("blocks/mlp/gate", (c.hidden, c.intermediate), c.mlp_bias),
        ("blocks/mlp/up", (c.hidden, c.intermediate), c.mlp_bias),
        ("blocks/mlp/down", (c.intermediate, c.hidden), c.mlp_bias),
    ]
    if not c.gated:
        del maps[4]
    norms = ["blocks/attention_norm", "blocks/mlp_norm"][: 1 if c.parallel else 2]
    vectors = ("scale", "bias") if c.norm == "layer" else ("scale",)
    table, width = (c.vocab_size, c.hidden), (c.hidden,)

    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": table}
    if c.positions == "learned":
        shapes["embed/positions"] = (c.max_positions, c.hidden)
    shapes |= {f"{norm}/{vector}": width for norm in norms for vector in vectors}
    shapes |= {f"{path}/kernel": shape for path, shape, _ in maps}
    shapes |= {f"{path}/bias": shape[1:] for path, shape, bias in maps if bias}
    shapes |= {f"final_norm/{vector}": width for vector in vectors}
    if not c.tied:
        shapes["head/kernel"] = table[::-1]
    if c.head_bias:
        shapes["head/bias"] = table[:1]
    return tuple(_make_leaf(kind, path, shape) for path, shape in shapes.items())


def _make_leaf(kind: str, path: str, shape: tuple[int, ...]) -> Leaf:
    module, _, name = path.rpartition("/")
    suffix = ".bias" if name == "bias" else ".weight"

    def stored(names: Mapping[str, str]) -> str:
        return names.get(path, names.get(module, "")) + suffix

    conv1d = kind == "gpt2" and path.startswith("blocks/")
    fused = conv1d and re.match("blocks/attention/([qkv])/", path)
    return Leaf(
        path,
        shape,
        stored(HUGGINGFACE[kind]),
        stored(_GGUF) if kind == "llama" else "",
        transposed=name == "kernel" and not conv1d,
        part="qkv".index(fused[1]) if fused else None,
        unread_rows=2 if (kind, path) == ("opt", "embed/positions") else 0,
    )
