"""Flash-LLM: pruned weights stay packed in memory, and are expanded as they are used.

Paper    Xia et al., Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large
         Generative Model Inference with Unstructured Sparsity, VLDB 2024,
         arXiv:2309.10285; code AlibabaResearch/flash-llm.
Idea     Decoding a few sequences reads every weight for a few products: it waits for
         memory. So weights are loaded sparse and computed dense: what is read is the
         non-zeros and where they are, and a tile is expanded on the chip, just before
         the matrix unit takes it.
Memory   Bits a value, where a share d is not zero: Tiled-CSL, the paper's, 32 d;
         FragBitmap 16 d + 1.25, and with int4 values 4 d + 1.25; both besides a few
         bytes a tile. Without a kernel one map at a time is expanded besides.
Differs  FragBitmap is this library's (`jmem.kernels.spmm`): a bitmap whose bits lie as
         tensor cores take them, for any density, shape and number of rows. The paper's
         format and SpInfer's TCA-BME are packed bit for bit as their code does, and
         multiply everywhere, expanded by XLA; the kernel reads FragBitmap alone.
         Weights are pruned in truth (`jmem.sparse`), where the paper's demo draws
         which are zero.
See      jmem/nn/pruned (the formats), kernels/spmm, experiments/prune.py,
         tests/sparse/test_flash_llm.py

    params = jmem.checkpoints.load("my-llama").params(packed=packer(sparsity=0.6))
    params = pack(pruned)                                  # of kernels with zeros
    jmem.checkpoints.save(params, checkpoint.config, "small", like=checkpoint)
    params = jmem.checkpoints.load("small").params(packed=True)
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jmem.kernels.spmm import FragBitmap
from jmem.nn import pruned
from jmem.nn.maps import find_maps, replace_maps
from jmem.nn.pruned import FORMATS, TcaBme, TiledCSL, count_bytes, frag_bitmap
from jmem.nn.pruned.tiles import FLOATS, HALVES, count_tiles
from jmem.sparse.magnitude import check_sparsity, zero_smallest

FormatName = Literal["FragBitmap", "TiledCSL", "TcaBme"]
Values = Literal["stored", "bfloat16", "float16", "float32", "int8", "int4"]
"""What non-zeros are kept as: the kernel's dtype, another, or integers with a float32
scale an output row (FragBitmap alone)."""

DEFAULT: tuple[FormatName, ...] = ("FragBitmap", "TiledCSL")
"""The formats that a map is packed in unless others are named. Tiled-CSL is the
smallest above 91 % sparsity. TCA-BME is 1 to 5 % smaller than FragBitmap, but no kernel
reads it: it is taken where it is named."""
TILE = 64


class KeptDense(UserWarning):
    """A map that no format makes smaller, and that keeps its kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How maps are packed.

    Raises:
      ValueError: a format or a kind of values that there is not, or no format for them.
    """

    formats: tuple[str, ...] = DEFAULT
    """Of these, each map takes the smallest, for all of its layers."""
    values: str = "stored"

    def __post_init__(self):
        if not self.formats or not {*self.formats} <= FORMATS.keys():
            raise ValueError(
                f"pack: formats={self.formats} must name some of {', '.join(FORMATS)}."
            )
        if self.values not in get_args(Values):
            raise ValueError(
                f"pack: values={self.values!r} must be one of {get_args(Values)}."
            )

    def cast(self, kernel: np.ndarray) -> np.ndarray:
        """The kernel in the dtype that it is packed from.

        Raises:
          ValueError: a finite value is infinite in that dtype, or no format holds it.
        """
        dtype = kernel.dtype
        if self.values in ("bfloat16", "float16", "float32"):
            dtype = np.dtype(jnp.dtype(self.values))
        if dtype not in FLOATS:
            raise ValueError(
                f"pack: kernels are {dtype}; need {', '.join(map(str, FLOATS))}."
            )
        if dtype == kernel.dtype:
            return kernel
        with np.errstate(all="ignore"):
            cast = kernel.astype(dtype)
        if np.isinf(cast).sum() > np.isinf(kernel).sum():
            raise ValueError(
                f"pack: values={self.values!r}: a kernel holds finite values beyond "
                f"{jnp.finfo(dtype).max}. Take bfloat16 or float32."
            )
        return cast

    def choose_from(self, dtype: np.dtype) -> tuple[str, ...]:
        """The formats that hold such values.

        Raises:
          ValueError: none of `formats` does.
        """
        if not self.is_integer and dtype in HALVES:
            return self.formats
        if "FragBitmap" in self.formats:
            return ("FragBitmap",)
        kind = self.values if self.is_integer else dtype
        raise ValueError(
            f"pack: formats={self.formats} hold no {kind} values; FragBitmap does. Add "
            "it, or take values='bfloat16'."
        )

    @property
    def is_integer(self) -> bool:
        return self.values in frag_bitmap.INTEGERS


def pack(
    params: dict,
    *,
    formats: tuple[str, ...] = DEFAULT,
    values: str = "stored",
) -> dict:
    """`params` whose blocks' linear maps are sparse matrices, where that is smaller.

    Kernels with zeros, as pruning leaves them. Maps that are packed already stay, as do
    biases, norms, embedding and head. Each map has one format for all of its layers,
    the smallest of `formats` by its bytes; one that none makes smaller keeps its
    kernel, with a `KeptDense` warning. NaN and infinities stay what they are.

    Packs on the host, a layer at a time. Beside kernels and result, that layer.

    Raises:
      ValueError: `formats` or `values` that there are not or that do not fit, or a
        value that is infinite in their dtype, or not finite for integers.
    """
    how = Packing(formats=formats, values=values)
    blocks, found = params["blocks"], {}
    for name, leaf in find_maps(blocks).items():
        if "kernel" in leaf:
            give = functools.partial(_take, leaf["kernel"])
            parts = pack_map(name, give, len(leaf["kernel"]), how)
            if "sparse" in parts:
                rest = {key: part for key, part in leaf.items() if key != "kernel"}
                found[name] = rest | parts
    return params | {"blocks": replace_maps(blocks, found)}


def _take(kernel: Any, layer: int) -> np.ndarray:
    return np.asarray(kernel[layer])


def packer(
    *,
    sparsity: float = 0.0,
    formats: tuple[str, ...] = DEFAULT,
    values: str = "stored",
) -> Callable[[str, Callable[[int], np.ndarray], int], dict[str, Any]]:
    """For `Checkpoint.params(packed=...)`: kernels are packed as they are read.

    So the host holds what is packed and one layer's kernel. Before, the share
    `sparsity` of each output row, its least magnitudes, becomes zero
    (`jmem.sparse.magnitude`).

    Raises:
      ValueError: as `pack`, or a sparsity outside [0, 1).
    """
    check_sparsity("packer", sparsity)
    how = Packing(formats=formats, values=values)

    def make(name: str, give: Callable[[int], np.ndarray], layers: int) -> dict:
        def give_pruned(layer: int) -> np.ndarray:
            return zero_smallest(give(layer).T, sparsity).T

        return pack_map(name, give_pruned, layers, how)

    return make


def pack_map(
    name: str, give: Callable[[int], np.ndarray], layers: int, how: Packing
) -> dict[str, Any]:
    """What replaces "kernel": {"sparse": matrix}, or a kernel that nothing is below.

    `give` gives the kernel [in, out] of each layer.
    """
    matrices, counts, candidates = [], [], ()
    shape, dtype = (0, 0), np.dtype(np.float32)
    for layer in range(layers):
        w = how.cast(give(layer)).T
        candidates, shape, dtype = how.choose_from(w.dtype), w.shape, w.dtype
        matrices.append(frag_bitmap.pack(w, how.values if how.is_integer else None))
        counts.append(frag_bitmap.count_nonzero(matrices[-1]))
    bits = {"int8": 8, "int4": 4}.get(how.values, 8 * dtype.itemsize)
    sizes = {
        kind: find_bytes(kind, np.stack(counts), shape, bits) for kind in candidates
    }
    best = min(sizes, key=lambda kind: sizes[kind])
    dense = layers * math.prod(shape) * dtype.itemsize
    if sizes[best] >= dense:
        share = sum(int(own.sum()) for own in counts) / (dense / dtype.itemsize)
        warnings.warn(
            f"map {name!r} keeps its kernel, {dense:,} bytes: {share:.1%} of its "
            f"values are not zero, and {best} would take {sizes[best]:,}.",
            KeptDense,
            stacklevel=3,
        )
        del matrices
        return {"kernel": jnp.stack([how.cast(give(layer)) for layer in range(layers)])}
    if best != "FragBitmap":
        for layer, matrix in enumerate(matrices):
            matrices[layer] = FORMATS[best].pack(frag_bitmap.unpack(matrix))
    return {"sparse": jax.tree.map(jnp.asarray, pruned.stack(matrices))}


def find_bytes(kind: str, counts: np.ndarray, shape: tuple[int, int], bits: int) -> int:
    """Bytes of a stack of matrices [out, in], by the non-zeros of its 64 x 64 tiles.

    Args:
      kind: one of `FORMATS`.
      counts: [L, tiles down, tiles across].
      shape: of one matrix.
      bits: of one value.
    """
    layers, tiles = len(counts), counts[0].size
    if kind == "FragBitmap":
        rows = -(-counts // TILE)
        longest = rows.sum((1, 2)).max() + max(1, rows.max())
        scales = 4 * shape[0] if bits < 16 else 0
        own = longest * TILE * bits // 8 + tiles * (512 + 128 + 4) + 4 + scales
    elif kind == "TiledCSL":
        down = counts.shape[1]
        counts = np.pad(counts, ((0, 0), (0, down % 2), (0, 0)))
        counts = counts[:, ::2] + counts[:, 1::2]
        own = 4 * (-(-counts // 4) * 4).sum((1, 2)).max() + 4 * (counts[0].size + 2)
    else:
        longest = (-(-counts // 8) * 8).sum((1, 2)).max()
        own = 2 * longest + tiles * (512 + 4 + 16) + 4
    return layers * int(own)


# Described, without weights -----------------------------------------------------------


def abstract(
    params: dict,
    sparsity: float,
    *,
    format: str = "FragBitmap",
    values: str = "stored",
) -> dict:
    """`params` described with sparse blocks: what to measure when there are no weights.

    Arrays are as long as is expected where each value is zero by itself with the
    probability `sparsity`: the mean over tiles, of the longest layer, and `cap` such
    that any tile of the map exceeds it with a probability below 1 in 1,000 (Chernoff's
    bound). Of a real mask drawn so, the bytes are within 0.2 % and `cap` at most two
    rows less. Pruning by rows has the same mean; how far its fullest tile is above
    depends on the weights, for `cap` rows of 128 bytes a layer.

    Args:
      params: the decoder's tree, arrays or descriptions (`Decoder.abstract()`).
      sparsity: the share of zeros, in [0, 1).
      format: of every map.
      values: as `pack`'s.

    Raises:
      ValueError: a sparsity, a format or values that there are not.

    >>> from jmem.models import zoo
    >>> from jmem.models.decoder import Decoder
    >>> params = abstract(Decoder(zoo.get("llama2-7b")).abstract(), 0.8, values="int4")
    >>> params["blocks"]["mlp"]["up"]["sparse"].values.shape
    (32, 146329, 32)
    """
    check_sparsity("abstract", sparsity)
    how = Packing(formats=(format,), values=values)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    found = {}
    for name, leaf in find_maps(params["blocks"]).items():
        if "kernel" in leaf:
            rest = {key: part for key, part in leaf.items() if key != "kernel"}
            found[name] = rest | {"sparse": _describe(leaf["kernel"], sparsity, how)}
    return params | {"blocks": replace_maps(params["blocks"], found)}


def _describe(kernel: jax.ShapeDtypeStruct, sparsity: float, how: Packing) -> Any:
    layers, inputs, outputs = kernel.shape
    named = how.values in ("bfloat16", "float16", "float32")
    dtype = jnp.dtype(how.values) if named else kernel.dtype
    (kind,), shape = how.choose_from(np.dtype(dtype)), (outputs, inputs)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((layers, *shape), jnp.dtype(dtype))

    def count(rows: int, columns: int, unit: int) -> int:
        return _expect(shape, (rows, columns), 1 - sparsity, unit, layers)

    if kind == "TiledCSL":
        tiles = math.prod(count_tiles(shape, 128, TILE))
        entries = array("uint32", count(128, TILE, 4) * 4)
        return TiledCSL(
            entries, array("int32", tiles + 2), outputs, inputs, str(np.dtype(dtype))
        )
    tiles = math.prod(count_tiles(shape, TILE, TILE))
    if kind == "TcaBme":
        return TcaBme(
            array(dtype, count(TILE, TILE, 8) * 8),
            array("uint32", tiles * 64, 2),
            array("int32", tiles + 1),
            array("int32", tiles * 4),
            outputs,
            inputs,
        )
    full = min(outputs, TILE) * min(inputs, TILE)
    cap = max(1, -(-_bound(full, 1 - sparsity, layers * tiles) // TILE))
    rows = count(TILE, TILE, TILE) + cap
    stored, width = {"int8": ("int8", 64), "int4": ("uint8", 32)}.get(
        how.values, (dtype, TILE)
    )
    return FragBitmap(
        array(stored, rows, width),
        array("uint32", tiles, 128),
        array("uint16", tiles, TILE),
        array("int32", tiles + 1),
        array("float32", outputs) if how.is_integer else None,
        outputs,
        inputs,
        cap,
    )


def _expect(
    shape: tuple[int, int],
    tile: tuple[int, int],
    density: float,
    unit: int,
    layers: int,
) -> int:
    """Units of `unit` places of the longest of so many layers, rounded up a tile."""
    mean = variance = 0.0
    sides = [(n // t, n % t) for n, t in zip(shape, tile, strict=True)]
    for rows, down in ((tile[0], sides[0][0]), (sides[0][1], 1)):
        for columns, across in ((tile[1], sides[1][0]), (sides[1][1], 1)):
            own_mean, own_variance = _round_up(rows * columns, density, unit)
            mean += down * across * own_mean
            variance += down * across * own_variance
    return math.ceil(mean + math.sqrt(2 * variance * math.log(layers)))


@functools.cache
def _round_up(size: int, density: float, unit: int) -> tuple[float, float]:
    """Mean and variance of ceil(n / unit), for n of `size` values that are not zero."""
    if not size or density == 1:
        return float(-(-size // unit)), 0.0
    n = np.arange(size + 1)
    log = np.array([math.lgamma(k + 1) for k in range(size + 1)])
    share = log[-1] - log - log[::-1] + n * math.log(density)
    share = np.exp(share + (size - n) * math.log1p(-density))
    units = -(-n // unit)
    mean = float(share @ units)
    return mean, float(share @ units**2) - mean**2


def _bound(size: int, density: float, tiles: int) -> int:
    """What the non-zeros of no tile exceed, but with a probability below 1/1,000."""
    n = np.arange(math.ceil(size * density), size + 1)
    share = n / size
    with np.errstate(divide="ignore", invalid="ignore"):
        near = share * np.log(share / density)
        far = (1 - share) * np.log((1 - share) / (1 - density))
    distance = size * (near + np.where(share < 1, far, 0))
    kept = np.flatnonzero(distance >= math.log(1000 * tiles))
    return int(n[kept[0]]) if kept.size else size


__all__ = [
    "DEFAULT",
    "FORMATS",
    "FormatName",
    "FragBitmap",
    "KeptDense",
    "Packing",
    "TcaBme",
    "TiledCSL",
    "Values",
    "abstract",
    "count_bytes",
    "find_bytes",
    "pack",
    "pack_map",
    "packer",
]
