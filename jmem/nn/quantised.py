"""Linear maps kept in quantised types, dequantised where they are used.

Idea     A map stays bytes, a GGUF file's or those that `pack` makes of a kernel, and
         each block turns its own into numbers just before the product, so that one map
         at a time exists at full width.
Memory   Bytes a value: Q8_0 34/32, Q6_K 210/256, Q5_1 24/32, Q5_0 22/32, Q5_K 176/256,
         Q4_1 20/32, Q4_0 18/32, Q4_K 144/256, QLoRA's NF4 36/64 and NF4_DOUBLE 33/64
         and 8 bytes a row (`jmem.nn.nf4`), where bfloat16 has 2. While it is used,
         a map takes [out, in] in x's dtype besides, and two where two read the same x;
         nothing where x is a single row, as in decoding one sequence.
Values   The types' definitions in float32, bit for bit: their products have at most 24
         significant bits and are exact, so that a fused multiply-add rounds as its two
         parts do. Then in x's dtype.
Differs  llama.cpp quantises x too, and multiplies integers.
Source   https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, the layouts
See      jmem/checkpoints (`params(packed=True)`), jmem/finetune/lora.py (`base`),
         tests/nn/test_quantised.py, test_nf4.py

A packed leaf has lost "kernel" [L, in, out]; in its place, layers stacked as ever:

    leaf["packed"]   uint8 [L, out, row_bytes]   rows, whose blocks lie along `in`
    leaf["kind"]     {"Q4_K": bool [L], ...}     which layers are of that type

The types are names in the tree, and so static. A map of one type compiles to that type
alone. Where layers differ, as in Q4_K_M, rows are as long as the widest type's, shorter
ones end in zeros, and the flags choose inside the scan. That costs a Q4_K layer beside
Q6_K ones 66/256 bytes a value: of llama3-8b in Q4_K_M 0.24 GiB, 6 % of its blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from jmem.nn import nf4, pruned
from jmem.nn.linear import add_bias, dense, tie
from jmem.nn.maps import choose_maps, find_dicts, find_maps, replace_maps
from jmem.offload import fetch
from jmem.program import by_key


def _read_half(pair: jax.Array) -> jax.Array:
    """The float16 of two bytes, low one first, in float32: [..., 2] to [..., 1]."""
    low, high = (pair[..., i : i + 1].astype(jnp.uint16) for i in (0, 1))
    bits = low | (high << 8)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _split_bits(data: jax.Array, width: int) -> jax.Array:
    """Fields of `width` bits, lowest first: [..., n] bytes to [..., 8 / width, n]."""
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    shifts = shifts.reshape((1,) * (data.ndim - 1) + (-1, 1))
    return (data[..., None, :] >> shifts) & (2**width - 1)


def _read_signed(data: jax.Array) -> jax.Array:
    """Bytes as int8, in float32."""
    return jax.lax.bitcast_convert_type(data, jnp.int8).astype(jnp.float32)


def _join(blocks: jax.Array, axes: int = 2) -> jax.Array:
    """The last `axes` axes as one."""
    return blocks.reshape(*blocks.shape[:-axes], -1)


def _read_four_bits(data: jax.Array) -> jax.Array:
    """The 32 four-bit values in 16 bytes: all low halves, then all high ones."""
    return _join(_split_bits(data, 4))


def _read_fifth_bits(data: jax.Array) -> jax.Array:
    """The fifth bits of 32 values, from 4 bytes, each where it is added (16 or 0)."""
    bits = jnp.swapaxes(_split_bits(data, 1), -1, -2)
    return _join(bits) << 4


def _decode_q8_0(b: jax.Array) -> jax.Array:
    return _read_half(b[..., :2]) * _read_signed(b[..., 2:])


def _decode_q4_0(b: jax.Array) -> jax.Array:
    return _read_half(b[..., :2]) * (
        _read_four_bits(b[..., 2:]).astype(jnp.float32) - 8
    )


def _decode_q4_1(b: jax.Array) -> jax.Array:
    q = _read_four_bits(b[..., 4:]).astype(jnp.float32)
    return _read_half(b[..., :2]) * q + _read_half(b[..., 2:4])


def _decode_q5_0(b: jax.Array) -> jax.Array:
    q = _read_four_bits(b[..., 6:]) | _read_fifth_bits(b[..., 2:6])
    return _read_half(b[..., :2]) * (q.astype(jnp.float32) - 16)


def _decode_q5_1(b: jax.Array) -> jax.Array:
    q = (_read_four_bits(b[..., 8:]) | _read_fifth_bits(b[..., 4:8])).astype(
        jnp.float32
    )
    return _read_half(b[..., :2]) * q + _read_half(b[..., 2:4])


def _read_steps(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and minimum of a block's 8 groups of 32 values, each [..., 8, 1].

    Twelve bytes hold them in six bits each: the first four scales, then the first four
    minima, whose top two bits belong to the last four; the low four bits of those lie
    in the last four bytes, scales in the lower half.
    """
    scale, minimum, rest = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = [scale & 63, (rest & 15) | ((scale >> 2) & 48)]
    minima = [minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)]
    d, least = (
        _read_half(b[..., at : at + 2])
        * jnp.concatenate(six, axis=-1).astype(jnp.float32)
        for at, six in ((0, scales), (2, minima))
    )
    return d[..., None], least[..., None]


def _read_groups(data: jax.Array) -> jax.Array:
    """The low four bits of 256 values, from 128 bytes: [..., 8, 32]."""
    q = _split_bits(data.reshape(*data.shape[:-1], 4, 32), 4)
    return q.reshape(*data.shape[:-1], 8, 32)


def _decode_q4_k(b: jax.Array) -> jax.Array:
    d, least = _read_steps(b)
    return _join(d * _read_groups(b[..., 16:]).astype(jnp.float32) - least)


def _decode_q5_k(b: jax.Array) -> jax.Array:
    d, least = _read_steps(b)
    q = _read_groups(b[..., 48:]) | (_split_bits(b[..., 16:48], 1) << 4)
    return _join(d * q.astype(jnp.float32) - least)


def _decode_q6_k(b: jax.Array) -> jax.Array:
    low = _split_bits(b[..., :128].reshape(*b.shape[:-1], 2, 64), 4)
    high = _split_bits(b[..., 128:192].reshape(*b.shape[:-1], 2, 32), 2)
    low, high = (x.reshape(*b.shape[:-1], 16, 16) for x in (low, high))
    q = (low | (high << 4)).astype(jnp.float32) - 32
    d = _read_half(b[..., 208:210]) * _read_signed(b[..., 192:208])
    return _join(d[..., None] * q)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One quantised type: how many values a block holds in how many bytes."""

    values: int
    nbytes: int
    decode: Callable[[jax.Array], jax.Array]
    """uint8 [..., nbytes] to float32 [..., values]; whole rows if there is `encode`."""
    encode: Callable[[jax.Array], jax.Array] | None = None
    """float32 [..., in] to uint8 [..., row_bytes]; None: such rows come from a file."""
    tail: int = 0
    """Bytes that a row has besides its blocks."""

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` values, which are whole blocks."""
        return width // self.values * self.nbytes + self.tail

    def row_values(self, row_bytes: int) -> int:
        """Values of a row of so many bytes."""
        return (row_bytes - self.tail) // self.nbytes * self.values


GGUF: Mapping[str, Kind] = {
    "Q4_0": Kind(32, 18, _decode_q4_0),
    "Q4_1": Kind(32, 20, _decode_q4_1),
    "Q5_0": Kind(32, 22, _decode_q5_0),
    "Q5_1": Kind(32, 24, _decode_q5_1),
    "Q8_0": Kind(32, 34, _decode_q8_0),
    "Q4_K": Kind(256, 144, _decode_q4_k),
    "Q5_K": Kind(256, 176, _decode_q5_k),
    "Q6_K": Kind(256, 210, _decode_q6_k),
}
"""The types of a file that can stay packed, by llama.cpp's names."""

PACKERS: Mapping[str, Kind] = {
    "NF4": Kind(nf4.BLOCK, 36, nf4.decode, nf4.encode),
    "NF4_DOUBLE": Kind(nf4.BLOCK, 33, nf4.decode_double, nf4.encode_double, tail=8),
}
"""The types that `pack` makes."""

WEIGHTS = ("kernel", "packed", "kind", "sparse")
"""Keys of a leaf that stand for its kernel."""

KINDS: Mapping[str, Kind] = {**GGUF, **PACKERS}
"""All types of packed rows."""


def dequantise(kind: str, rows: UInt8[Array, "*N bytes"]) -> Float[Array, "*N in"]:
    """The values of whole blocks, float32, bit-equal to the type's definition.

    A scale that is infinite or no number gives what float32 arithmetic gives.
    """
    found = KINDS[kind]
    if found.encode is not None:
        return found.decode(rows)
    blocks = rows.reshape(*rows.shape[:-1], -1, found.nbytes)
    return _join(found.decode(blocks))


def linear(name: str, leaf: dict, x: jax.Array) -> jax.Array:
    """An `ops.linear` for packed and sparse leaves; any other leaf is `dense`.

    Multiplies in x's dtype, as `dense` does with a kernel of that dtype, or in float32
    if x is a single row. Its backward pass gives the gradient of x, dequantising again:
    what is kept for it is bytes.

    Raises:
      ValueError: x is not as wide as the map's rows.
    """
    if "sparse" in leaf:
        y = pruned.multiply(name, x, leaf["sparse"])
        return add_bias(leaf, y)
    if "packed" not in leaf:
        return dense(name, leaf, x)
    inputs, _ = find_kernel_shape(leaf)[-2:]
    if x.shape[-1] != inputs:
        raise ValueError(
            f"linear: the input of map {name!r} is {x.shape[-1]} wide, but its rows of "
            f"{leaf['packed'].shape[-1]} bytes hold {inputs} values of "
            f"{' and '.join(sorted(leaf['kind']))}. They are another model's."
        )
    return add_bias(leaf, _multiply(x, leaf["packed"], leaf["kind"]))


def find_kernel_shape(leaf: dict) -> tuple[int, ...]:
    """[..., in, out] of the kernel that a packed or sparse leaf stands for."""
    if "sparse" in leaf:
        return pruned.find_shape(leaf["sparse"])
    *stacked, outputs, row_bytes = leaf["packed"].shape
    widest = max((KINDS[k] for k in leaf["kind"]), key=lambda k: k.row_bytes(256))
    return (*stacked, widest.row_values(row_bytes), outputs)


def describe_kernel(leaf: dict, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf's kernel; if packed, of what `unpack` would make."""
    if "kernel" not in leaf:
        return jax.ShapeDtypeStruct(find_kernel_shape(leaf), dtype)
    return jax.ShapeDtypeStruct(leaf["kernel"].shape, leaf["kernel"].dtype)


def read_kernel(leaf: dict, dtype: DTypeLike) -> Float[Array, "in out"]:
    """The kernel of one layer's leaf as it is, or of a packed one, in `dtype`."""
    if "kernel" in leaf:
        return leaf["kernel"]
    weights = _take_weights(leaf)
    return _use_values(lambda values: values.T.astype(dtype), *weights)


def find_unpacked_dtype(blocks: dict) -> jnp.dtype:
    """The dtype that packed maps of these blocks are dequantised to: their norms'."""
    scales = (v.dtype for path, v in by_key(blocks).items() if path.endswith("/scale"))
    return next(scales, jnp.dtype("float32"))


def unpack(tree: dict, dtype: DTypeLike) -> dict:
    """`tree` with every packed or sparse leaf expanded: kernels [L, in, out]."""

    def unpack_map(leaf: dict) -> dict:
        kernel = jax.lax.map(  # one layer's float32 values at a time
            lambda row: _use_values(lambda values: values.T.astype(dtype), *row),
            _take_weights(leaf),
        )
        kept = {name: leaf[name] for name in leaf.keys() - {*WEIGHTS}}
        return kept | {"kernel": kernel}

    packed = find_dicts(tree, lambda leaf: bool(leaf.keys() & {"packed", "sparse"}))
    return replace_maps(tree, {name: unpack_map(leaf) for name, leaf in packed.items()})


def pack(params: dict, kind: str = "NF4") -> dict:
    """`params` with the kernels of its blocks' linear maps quantised to `kind`.

    Maps that are packed already stay, as do biases, norms, embedding and head. Beside a
    stack of kernels and its packed form there is one layer in float32; the kernels
    themselves live as long as the caller holds them. What never had them whole is
    `jmem.checkpoints.load(path).params(packed=kind)`.

    Raises:
      ValueError: a type that cannot be made here, or rows that are not whole blocks.

    >>> leaf = {"kernel": jnp.ones((2, 128, 3), jnp.bfloat16)}
    >>> packed = pack({"blocks": {"mlp": {"up": leaf}}}, "NF4")["blocks"]["mlp"]["up"]
    >>> packed["packed"].shape, list(packed["kind"])  # 128 / 64 * 36 bytes
    ((2, 3, 72), ['NF4'])
    """
    check_packer("pack", "kind", kind)

    def pack_map(name: str, leaf: dict) -> dict:
        if "kernel" not in leaf:
            return leaf
        check_blocks("pack", name, kind, leaf["kernel"].shape[1])
        kept = {key: part for key, part in leaf.items() if key != "kernel"}
        flags = {kind: jnp.ones(leaf["kernel"].shape[:1], jnp.bool)}
        return kept | {"packed": _pack_stack(kind, leaf["kernel"]), "kind": flags}

    blocks = params["blocks"]
    maps = {name: pack_map(name, leaf) for name, leaf in find_maps(blocks).items()}
    return params | {"blocks": replace_maps(blocks, maps)}


def check_packer(who: str, argument: str, kind: object) -> None:
    """Refuses a type that kernels cannot be packed to; `who` begins the message.

    Raises:
      ValueError: it is none of `PACKERS`.
    """
    if kind not in PACKERS:
        raise ValueError(
            f"{who}: {argument}={kind!r} is no type that kernels can be packed to; "
            f"choose among {', '.join(PACKERS)}. Others come from GGUF files."
        )


def check_blocks(who: str, name: str, kind: str, inputs: int) -> None:
    """Refuses rows of a map that are not whole blocks.

    Raises:
      ValueError: `inputs` values are not.
    """
    values = KINDS[kind].values
    if inputs % values:
        way_out = (
            "Leave this model's maps in 16 bits."
            if kind in PACKERS
            else "llama.cpp stores such a map as Q5_0, Q5_1 or Q8_0, whose blocks are "
            "of 32."
        )
        raise ValueError(
            f"{who}: map {name!r} has rows of {inputs} values, which are not whole "
            f"{kind} blocks of {values}. {way_out}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _pack_stack(kind: str, kernel: jax.Array) -> jax.Array:
    """Rows [L, out, bytes] of kernels [L, in, out], a layer at a time."""
    return jax.lax.map(lambda w: pack_rows(kind, fetch(w).T), kernel)


def pack_rows(kind: str, values: Float[Array, "out in"]) -> UInt8[Array, "out bytes"]:
    """The values of one layer quantised to `kind`, one of `PACKERS`."""
    encode = KINDS[kind].encode
    assert encode is not None  # of PACKERS
    return encode(values)


def sum_squares(leaf: dict) -> Float[Array, "L out"]:
    """The sum over `in` of each column's squares, float32, of a stacked leaf.

    Summed as they are dequantised or widened: no kernel is made for it.
    """

    def dense_row(kernel):
        return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0)

    def packed_row(*weights):
        return _use_values(lambda values: jnp.sum(jnp.square(values), -1), *weights)

    if "kernel" not in leaf:
        return jax.lax.map(lambda row: packed_row(*fetch(row)), _take_weights(leaf))
    return jax.lax.map(lambda row: dense_row(fetch(row)), leaf["kernel"])


def refuse_packed(who: str, params: dict) -> None:
    """Refuses packed parameters, for a method that trains the parameters themselves.

    Raises:
      ValueError: a leaf is packed: integers, which have no gradient, or a sparse
        matrix, which has none here.
    """
    for path in list_packed(params):
        what = (
            "quantised bytes"
            if "packed" in path.split("/")
            else "a sparse matrix's arrays"
        )
        raise ValueError(
            f"{who}: {path} holds {what}, which have no gradient. Train adapters over "
            "them (Lora), or load the checkpoint with packed=False."
        )


def list_packed(tree: dict) -> list[str]:
    """The paths of packed leaves in parameters, or in a state that holds them."""
    return [p for p in by_key(tree) if {"packed", "sparse"} & {*p.split("/")}]


def _take_weights(leaf: dict) -> tuple:
    """What `_use_values` reads, of a leaf without a kernel."""
    return (leaf["sparse"],) if "sparse" in leaf else (leaf["packed"], leaf["kind"])


def _use_values(
    use: Callable, packed: Any, flags: Mapping[str, jax.Array] | None = None
):
    """Calls `use` with a layer's float32 values [out, in], of the type flagged.

    Without flags `packed` is a sparse matrix (`jmem.nn.pruned`).
    """
    if flags is None:
        return use(pruned.decode(packed, jnp.float32))
    inputs, _ = find_kernel_shape({"packed": packed, "kind": flags})

    def branch(kind: str):
        rows = packed[:, : KINDS[kind].row_bytes(inputs)]
        return use(dequantise(kind, rows))

    kinds = sorted(flags)
    branches = [functools.partial(branch, kind) for kind in kinds]
    if len(kinds) == 1:
        return branches[0]()
    which = jnp.argmax(jnp.stack([flags[kind] for kind in kinds]))
    return jax.lax.switch(which, branches)


@jax.custom_vjp
def _multiply(x, packed, flags):
    """The product of x [..., in] and a layer's packed values [out, in]: [..., out]."""

    def multiply(values):
        if x.size == x.shape[-1]:
            # A single row, as in decoding. XLA fuses this into one pass over the bytes,
            # where a matrix product would have the values written out first.
            y = jnp.sum(values * x.reshape(1, -1).astype(jnp.float32), axis=-1)
            return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
        return jnp.einsum("...i,oi->...o", x, values.astype(x.dtype))

    return _use_values(multiply, tie(x, packed), flags)


def _multiply_forward(x, packed, flags):
    return _multiply(x, packed, flags), (packed, flags)


def _multiply_backward(stored, dy):
    packed, flags = stored
    dx = _use_values(lambda w: dy @ w.astype(dy.dtype), tie(dy, packed), flags)
    return dx, None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


Q4_K_M: Mapping[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("q", "k", "o", "gate", "up"), "Q4_K"),
    **dict.fromkeys(("v", "down"), ("Q4_K", "Q6_K")),
}
"""The types of a block's maps in llama.cpp's mix of that name, for `abstract`."""


def abstract(params: dict, kind: str | Mapping[str, str | tuple[str, ...]]) -> dict:
    """`params` described with packed blocks: what to measure when there is no file.

    Args:
      params: the decoder's tree, arrays or descriptions (`Decoder.abstract()`).
      kind: the type of every map, or types by patterns (`jmem.nn.maps`): several, if
        a map's layers differ. A map that is not named keeps its kernel.

    Raises:
      ValueError: an unknown type or map, or rows that are not whole blocks.

    >>> from jmem.models import zoo
    >>> from jmem.models.decoder import Decoder
    >>> params = abstract(Decoder(zoo.get("llama3-8b")).abstract(), "Q4_K")
    >>> params["blocks"]["mlp"]["down"]["packed"].shape  # 14336 / 256 * 144 bytes
    (32, 4096, 8064)
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    blocks = params["blocks"]
    maps = find_maps(blocks)
    packed = {}
    for pattern, types in ({"*": kind} if isinstance(kind, str) else kind).items():
        types = (types,) if isinstance(types, str) else types
        for name in choose_maps((pattern,), maps, "abstract: kind"):
            packed[name] = _describe_packed(name, maps[name], types)
    return params | {"blocks": replace_maps(blocks, packed)}


def _describe_packed(name: str, leaf: dict, kinds: tuple[str, ...]) -> dict:
    layers, inputs, outputs = leaf["kernel"].shape
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(
                f"abstract: map {name!r} is of type {kind!r}, which cannot stay "
                f"packed; choose among {', '.join(KINDS)}."
            )
        check_blocks("abstract", name, kind, inputs)
    row_bytes = max(KINDS[kind].row_bytes(inputs) for kind in kinds)
    kept = {key: value for key, value in leaf.items() if key != "kernel"}
    return kept | {
        "packed": jax.ShapeDtypeStruct((layers, outputs, row_bytes), jnp.uint8),
        "kind": {kind: jax.ShapeDtypeStruct((layers,), jnp.bool) for kind in kinds},
    }
