"""Where each parameter of the decoder lies in a checkpoint, and the way there and back.

One table serves both namings. A checkpoint holds linear maps as torch does, [out, in],
one tensor a layer; the decoder holds kernels [in, out] stacked on axis 0.

Memory   `assemble` fills one stacked leaf at a time, in place on the device: the peak
         is the result and one tensor.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jmem.checkpoints.files import CheckpointError, LazyTensor
from jmem.models.decoder import DecoderConfig

Naming = Literal["huggingface", "gguf"]

WEIGHT_DTYPES = tuple(np.dtype(d) for d in ("float32", ml_dtypes.bfloat16, "float16"))
"""What weights may be stored, returned and exported as."""

_NOT_PARAMETERS = re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight")
"""Tables that some exporters store beside the weights; they follow from the config."""


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and its names elsewhere (`{}` is the layer)."""

    path: str
    shape: tuple[int, ...]
    """Of one layer, in the decoder's layout."""
    huggingface: str
    gguf: str

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one layer, as in torch."""
        return self.shape[::-1] if self.path.endswith("/kernel") else self.shape

    def orient(self, values):
        """From one layout to the other; a view."""
        return values.T if self.path.endswith("/kernel") else values

    def names(self, naming: Naming, layers: int) -> Iterator[str]:
        template = getattr(self, naming)
        return (template.format(i) for i in range(layers if self.stacked else 1))


def leaves(config: DecoderConfig) -> tuple[Leaf, ...]:
    """Every leaf of `Decoder(config)`'s parameters."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    linear = (  # ours, Hugging Face's, GGUF's, [in, out]
        ("attention/q", "self_attn.q_proj", "attn_q", (c.hidden, queries)),
        ("attention/k", "self_attn.k_proj", "attn_k", (c.hidden, keys)),
        ("attention/v", "self_attn.v_proj", "attn_v", (c.hidden, keys)),
        ("attention/o", "self_attn.o_proj", "attn_output", (queries, c.hidden)),
        ("mlp/gate", "mlp.gate_proj", "ffn_gate", (c.hidden, c.intermediate)),
        ("mlp/up", "mlp.up_proj", "ffn_up", (c.hidden, c.intermediate)),
        ("mlp/down", "mlp.down_proj", "ffn_down", (c.intermediate, c.hidden)),
    )
    norms = (
        ("attention_norm", "input_layernorm", "attn_norm"),
        ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    )

    def block(path: str, shape: tuple[int, ...], hf: str, gguf: str) -> Leaf:
        return Leaf(
            f"blocks/{path}", shape, f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}"
        )

    table, width = (c.vocab_size, c.hidden), (c.hidden,)
    rows = [
        Leaf("embed/embedding", table, "model.embed_tokens.weight", "token_embd.weight")
    ]
    for ours, hf, gguf in norms:
        rows.append(block(f"{ours}/scale", width, f"{hf}.weight", f"{gguf}.weight"))
    for ours, hf, gguf, shape in linear:
        rows.append(block(f"{ours}/kernel", shape, f"{hf}.weight", f"{gguf}.weight"))
    if c.qkv_bias:
        for ours, hf, gguf, shape in linear[:3]:
            rows.append(block(f"{ours}/bias", shape[1:], f"{hf}.bias", f"{gguf}.bias"))
    rows.append(
        Leaf("final_norm/scale", width, "model.norm.weight", "output_norm.weight")
    )
    if not c.tied:
        rows.append(Leaf("head/kernel", table[::-1], "lm_head.weight", "output.weight"))
    return tuple(rows)


def match(
    config: DecoderConfig, tensors: Mapping[str, LazyTensor], naming: Naming, where: str
) -> dict[str, tuple[LazyTensor, ...]]:
    """The tensors of each leaf, layer by layer; `where` says which model is expected.

    Raises:
      CheckpointError: a tensor is missing, has another shape or dtype than the decoder
        needs, or belongs to no leaf (it would change what the model computes).
    """
    found: dict[str, tuple[LazyTensor, ...]] = {}
    used = set()
    origin = next(iter(tensors.values())).origin if tensors else where
    for leaf in leaves(config):
        members = []
        for name in leaf.names(naming, config.layers):
            tensor = tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{origin}: tensor {name!r} is missing; {where} needs it with "
                    f"shape {leaf.stored_shape}. It is the checkpoint of another "
                    "model, or not whole."
                )
            if tensor.shape != leaf.stored_shape:
                raise CheckpointError(
                    f"{tensor.origin}: tensor {name!r} has shape {tensor.shape}, but "
                    f"{where} needs {leaf.stored_shape}. It is the checkpoint of "
                    "another model."
                )
            if tensor.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{tensor.origin}: tensor {name!r} has dtype {tensor.dtype}; "
                    f"weights are {_listed(WEIGHT_DTYPES)}. Dequantise it first."
                )
            members.append(tensor)
            used.add(name)
        found[leaf.path] = tuple(members)
    for name, tensor in tensors.items():
        # A tied model's own copy of its head is ignored, as transformers does.
        tied_copy = config.tied and name == "lm_head.weight"
        if name not in used and not tied_copy and not _NOT_PARAMETERS.fullmatch(name):
            raise CheckpointError(
                f"{tensor.origin}: tensor {name!r} of shape {tensor.shape} has no "
                f"place in {where}. Supported are Llama-like decoders with no other "
                "parameters; adapters must be merged first."
            )
    return found


def widest(tensors: Iterable[LazyTensor]) -> np.dtype:
    """The stored dtype if there is one, float32 if there are several."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def assemble(
    config: DecoderConfig,
    found: Mapping[str, tuple[LazyTensor, ...]],
    dtype: np.dtype,
) -> dict:
    """Reads the tensors that `match` found into the decoder's parameter tree.

    Raises:
      CheckpointError: a file changed since it was checked, or a value overflows dtype.
    """
    params: dict = {}
    for leaf in leaves(config):
        members = found[leaf.path]
        if leaf.stacked:
            value = jnp.zeros((len(members), *leaf.shape), dtype)
            for layer, tensor in enumerate(members):
                row = leaf.orient(_cast(tensor, dtype))
                value = _write_row(value, row, layer).block_until_ready()
        else:
            value = jnp.array(leaf.orient(_cast(members[0], dtype)))
        _insert(params, leaf.path, value.block_until_ready())
    return params


@functools.partial(jax.jit, donate_argnums=0)
def _write_row(stacked: jax.Array, row: jax.Array, layer: jax.Array) -> jax.Array:
    """`stacked[layer] = row` in the same buffer, which is donated."""
    return jax.lax.dynamic_update_index_in_dim(stacked, row, layer, 0)


def _cast(tensor: LazyTensor, dtype: np.dtype) -> np.ndarray:
    values = tensor.read()
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
    if np.isinf(cast).any() and not np.isinf(values).any():
        raise CheckpointError(
            f"{tensor.origin}: tensor {tensor.name!r} holds values beyond "
            f"{ml_dtypes.finfo(dtype).max}, the largest {dtype}. Load it as bfloat16 "
            "or float32."
        )
    return cast


def _insert(tree: dict, path: str, value: jax.Array) -> None:
    *folders, name = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value


def disassemble(config: DecoderConfig, params: Mapping) -> list[LazyTensor]:
    """The tree's tensors under Hugging Face names, each copied to the host when read.

    Raises:
      CheckpointError: the tree is not that of `Decoder(config)`; names the leaf.
    """
    given = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree.leaves_with_path(params)
    }
    tensors = []
    for leaf in leaves(config):
        shape = (config.layers, *leaf.shape) if leaf.stacked else leaf.shape
        value = given.pop(leaf.path, None)
        if value is None or value.shape != shape:
            raise CheckpointError(
                f"save: parameter {leaf.path!r} "
                + ("is missing" if value is None else f"has shape {value.shape}")
                + f", but config needs shape {shape}."
            )
        if value.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"save: parameter {leaf.path!r} has dtype {value.dtype}; weights are "
                f"{_listed(WEIGHT_DTYPES)}."
            )
        for layer, name in enumerate(leaf.names("huggingface", config.layers)):
            read = functools.partial(_fetch, leaf, value, layer)
            dtype = np.dtype(value.dtype)
            tensors.append(LazyTensor(name, leaf.stored_shape, dtype, read, "params"))
    if given:
        raise CheckpointError(
            f"save: parameter {next(iter(given))!r} has no place in config. Merge "
            "adapters first (`finetuner.merged(state)`)."
        )
    return tensors


def _fetch(leaf: Leaf, value: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    if not leaf.stacked:
        return leaf.orient(np.asarray(value))
    if isinstance(value, np.ndarray):
        return leaf.orient(value[layer])
    # The layer is an operand: one compiled slice serves all of them.
    row = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    return leaf.orient(np.asarray(row))


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes that the values take."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def _listed(dtypes: Iterable[np.dtype]) -> str:
    return ", ".join(map(str, dtypes))
