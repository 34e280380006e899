"""LoRA: the weights stay, each chosen linear map gains a trained low-rank product.

Paper    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
         arXiv:2106.09685. Here a baseline beside the methods that jmem is about.
         rsLoRA: Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with
         LoRA, 2023, arXiv:2312.03732: alpha / sqrt(rank), so that a high rank learns.
         QLoRA: Dettmers et al., 2023, arXiv:2305.14314: W in 4 bits (`jmem.nn.nf4`).
         DoRA: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024,
         arXiv:2402.09353: each column of W + s A B has a trained length, its magnitude.
Idea     y = x W + (alpha / rank) x A B, with A [in, rank] random and B [rank, out]
         zero, so training starts at the pretrained model, in a thin subspace.
         DoRA: y = x (W + s A B) * magnitude / norm, which starts as the norms of W's
         columns, and the norm, of W + s A B now, has no gradient (its section 4.3).
Memory   w*P + (w + g + 2*m) * rank * sum(in + out) bytes. Dropout gives each map an
         input of its own: about [B, T, in] more a map, of one layer where blocks are
         rematerialised, of all layers otherwise. DoRA: 24 * out a map, in float32. A
         base in NF4: 0.56 or 0.52 bytes a value of the blocks' maps in place of w, and
         at most two maps of one layer at full width while they are used.
Differs  The norm of W + s A B is |W|^2 + 2 s <W'A, B> + s^2 <A'A B, B>, by columns:
         |W|^2 is kept, W'A is a product of `rank` rows, and W + s A B is never made.
         DoRA's dropout is before A alone; PEFT's drops x for (magnitude / norm - 1) W
         as well, which takes another product with W. Without dropout they agree.
See      experiments/lisa.py, jmem/checkpoints/peft.py, tests/finetune/test_lora.py,
         test_dora.py
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.finetune.adamw import AdamW, gradient_step, read_moments, replace_moments
from jmem.finetune.adapters import adapter_step, attach, check_fit, fuses, move_leaves
from jmem.finetune.checks import check_choice, check_update
from jmem.finetune.descent import draw_part, loss_step, needs_key, refuse_stats
from jmem.finetune.walk import Update, sum_squares
from jmem.finetune.zeros import hold, multiply_held
from jmem.models.next_token import mean_head_loss
from jmem.nn import quantised
from jmem.nn.linear import expand_to
from jmem.nn.maps import MAPS, check_maps, choose_maps, find_maps, insert, number_map
from jmem.nn.stack import depth
from jmem.offload import fetch
from jmem.program import by_key

Base = Literal["given", "nf4", "nf4-double"]
Stored = Literal["kernel", "float32"]
_PACKED: Mapping[Base, str] = {"nf4": "NF4", "nf4-double": "NF4_DOUBLE"}
"""What `base` is called in `jmem.nn.quantised`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply_low_rank(
    x: Float[Array, "*N in"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    scale: float = 1.0,
) -> Float[Array, "*N out"]:
    """The product, scaled, of which only [N, rank] is scaled, and only that transposed.

    Scaled at full width, cuBLAS's products wait for a copy of each [N, out] and of its
    gradient: 0.8 GiB at LLaMA-2-7B and 16,384 tokens. Differentiated by JAX, the
    gradient of b is (dyᵀ (x a))ᵀ, and XLA's CPU backend writes dyᵀ out for every map: a
    sixth of a training step.
    """
    return _scale(x @ a, scale) @ b


def _scale(inner, scale):
    return inner * jnp.asarray(scale, inner.dtype)


def _low_rank_forward(x, a, b, scale):
    inner = _scale(x @ a, scale)
    return inner @ b, (x, inner, a, b)


def _low_rank_backward(scale, residuals, dy):
    x, inner, a, b = residuals
    rows = tuple(range(dy.ndim - 1))
    d_inner = _scale(dy @ b.T, scale)
    d_b = jnp.tensordot(inner, dy, (rows, rows))
    d_a = jnp.tensordot(d_inner, x, (rows, rows)).T
    return d_inner @ a.T, d_a, d_b


multiply_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@jax.custom_vjp
def scale_columns(
    y: Float[Array, "*N out"], factor: Float[Array, " out"]
) -> Float[Array, "*N out"]:
    """The product in float32, then in y's dtype; y is all that it keeps.

    A factor near one would lose its last two digits in bfloat16, and with them what a
    step moves it by.
    """
    return (y.astype(jnp.float32) * expand_to(factor, y)).astype(y.dtype)


def _scaled_forward(y, factor):
    return scale_columns(y, factor), (y, factor)


def _scaled_backward(residuals, dz):
    y, factor = residuals
    wide = dz.astype(jnp.float32)
    rows = tuple(range(y.ndim - 1))
    d_factor = jnp.sum(wide * y.astype(jnp.float32), rows)
    return scale_columns(dz, factor), d_factor


scale_columns.defvjp(_scaled_forward, _scaled_backward)


def find_scale(alpha: float, rank: int, rslora: bool) -> float:
    """What a product A B is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def drop_out(x: Float[Array, "*N in"], rate: float, key: jax.Array):
    """Zeroes each value with probability `rate`; the others grow, so the mean stays."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def lora_linear(scale: float, dropout: float = 0.0, keep_zeros: bool = False):
    """A `linear` that adds `scale * (x A) B` where a leaf holds A and B.

    With `keep_zeros` the product A B is 0 where the leaf's kernel is.

    The leaf may be packed (`jmem.nn.quantised`). One that also holds `lora_key` has x
    dropped out for that product. One that holds `magnitude` has the sum, but not the
    bias, multiplied by it and divided by `lora_norm`; where that is not there, it is
    computed (`norms` does it once a step).
    """

    def linear(name, leaf, x):
        decomposed = "magnitude" in leaf
        bias = leaf["bias"] if decomposed and "bias" in leaf else None
        base = leaf if bias is None else {k: v for k, v in leaf.items() if k != "bias"}
        y = quantised.linear(name, base, x)
        if "lora_a" not in leaf:
            return y
        if "lora_key" in leaf:
            x = drop_out(x, dropout, leaf["lora_key"])
        a, b = (leaf[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
        if keep_zeros:
            delta = multiply_held(x, a, b, take_kernel(leaf))
            y = y + delta * jnp.asarray(scale, y.dtype)
        else:
            y = y + multiply_low_rank(x, a, b, scale)
        if not decomposed:
            return y
        if (norm := leaf.get("lora_norm")) is None:
            one = jax.tree.map(lambda value: value[None], base)
            square = quantised.sum_squares(one)[0]
            norm = compute_column_norm(name, base, square, scale, keep_zeros)
            norm = jax.lax.stop_gradient(norm)
        y = scale_columns(y, leaf["magnitude"] / norm)
        return y if bias is None else y + expand_to(bias.astype(y.dtype), y)

    return linear


def take_kernel(leaf: dict) -> dict:
    """What of a leaf is the kernel, packed or not."""
    return {key: leaf[key] for key in quantised.WEIGHTS if key in leaf}


def compute_column_norm(
    name: str,
    leaf: dict,
    square: Float[Array, " out"],
    scale: float,
    keep_zeros: bool = False,
) -> Float[Array, " out"]:
    """Norms of the columns of W + scale A B, float32, of one layer's leaf.

    `square` is that of W's columns. The rows A'W are computed in the kernel's dtype
    (packed: A's), all else in float32. A column that is zero has norm 1. With
    `keep_zeros` A B is 0 where W is, and made for it, in float32.
    """
    a, b = leaf["lora_a"], leaf["lora_b"].astype(jnp.float32)
    bare = take_kernel(leaf)
    if keep_zeros:
        kernel = quantised.read_kernel(bare, jnp.float32).astype(jnp.float32)
        delta = scale * hold(a.astype(jnp.float32) @ b, kernel)
        total = square + jnp.sum(delta * (2 * kernel + delta), axis=0)
        return jnp.where(total > 0, jnp.sqrt(total), 1)
    dtype = leaf["kernel"].dtype if "kernel" in leaf else a.dtype
    crossed = quantised.linear(name, bare, a.T.astype(dtype)).astype(jnp.float32)
    wide = a.astype(jnp.float32)
    within = (wide.T @ wide) @ b
    total = square + jnp.sum((2 * scale * crossed + scale**2 * within) * b, axis=0)
    return jnp.where(total > 0, jnp.sqrt(total), 1)


def norms(
    blocks: dict,
    adapters: dict,
    squares: dict,
    scale: float,
    keep_zeros: bool = False,
) -> dict:
    """A tree like `adapters` with a `lora_norm` [L, out] in each, a layer at a time.

    `squares` has {"square": [L, out]} in their places. For `attach`: what a loss is
    given so has no gradient.
    """

    def make_norm(name, adapter, leaf, squares):
        held = take_kernel(leaf)

        def row(each):
            leaf, square = each
            return compute_column_norm(name, fetch(leaf), square, scale, keep_zeros)

        return {"lora_norm": jax.lax.map(row, (held | adapter, squares["square"]))}

    return map_adapters(make_norm, adapters, blocks, squares)


def compute_squares(blocks: dict, adapters: dict) -> dict:
    """Like `adapters`, with {"square": [L, out]}: squared norms of W's columns."""

    def sum_squares(name, adapter, leaf):
        del name, adapter
        return {"square": quantised.sum_squares(leaf)}

    return map_adapters(sum_squares, adapters, blocks)


def dropout_keys(adapters: dict, key: jax.Array) -> dict:
    """A tree like `adapters` with a `lora_key` [L] in each: a key a layer and map."""

    def make_keys(name, adapter):
        stream = jax.random.fold_in(key, number_map(name))
        return {"lora_key": jax.random.split(stream, len(adapter["lora_a"]))}

    return map_adapters(make_keys, adapters)


def map_adapters(make: Callable, adapters: dict, *trees: dict, name: str = "") -> dict:
    """A tree like `adapters`: in the place of each map's, `make(name, adapter, *own)`.

    `own` are what `trees` hold at the same path, which is `name`.
    """
    if "lora_a" in adapters:
        return make(name, adapters, *trees)
    return {
        key: map_adapters(
            make, own, *(tree[key] for tree in trees), name=f"{name}/{key}".lstrip("/")
        )
        for key, own in adapters.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """AdamW on low-rank adapters of the blocks' linear maps."""

    rank: int = 8
    alpha: float = 16.0
    """The product is scaled by alpha / rank ..."""
    rslora: bool = False
    """... or, rank-stabilised, by alpha / sqrt(rank)."""
    dropout: float = 0.0
    """Share of the product's input values that are zeroed in training, anew at every
    step, layer and map."""
    dora: bool = False
    """Train the length of each column of W + s A B as well (DoRA), in float32."""
    base: Base = "given"
    """What `init` makes of the blocks' kernels, which stay frozen:
    "nf4" (QLoRA's, 4.5 bits a value with its scales), "nf4-double" (4.13) or nothing.
    Maps that are packed already stay as they are. The kernels live beside the packed
    rows until the caller lets them go; `checkpoint.params(packed="NF4")` never has them
    whole."""
    maps: tuple[str, ...] = MAPS
    """Linear maps that gain an adapter (`jmem.nn.maps`): "q" means every map whose path
    ends so, "cross/q" that one, "cross/*" all below. The default: those a block has."""
    adapter_dtype: Stored = "kernel"
    """Of A and B as they are stored and updated, their kernel's or float32; products
    are in the activations' dtype. Above a bfloat16 kernel, float32 keeps updates that
    bfloat16 would round away, and its gradients, for 4 bytes an adapter value more."""
    keep_zeros: bool = False
    """The product is 0 wherever the kernel is, in training as in what is merged: a
    pruned model stays pruned (`jmem.finetune.zeros`). The product of one map exists for
    it. What was trained so is no adapter of PEFT's, and is saved merged."""
    adamw: AdamW = AdamW(learning_rate=2e-4)
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    update: Update = "auto"
    """"fused" moves a layer's adapters inside the backward pass, and makes no other
    gradients (`jmem.finetune.adapters`); it can neither clip by the norm nor
    accumulate, and keeps nothing of a block but its input. "separate" makes all
    gradients first. "auto" fuses where neither is asked for and the model's `remat` is
    "block"."""

    def __post_init__(self):
        check_update("Lora", self.update, self.adamw.max_grad_norm, self.accumulate)
        if self.rank < 1:
            raise ValueError(f"Lora: rank={self.rank} must be at least 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"Lora: alpha={self.alpha} must be positive and finite.")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"Lora: dropout={self.dropout} must be at least 0 and below 1: it is "
                "the share of values that are left out."
            )
        check_choice("Lora", "adapter_dtype", self.adapter_dtype, Stored)
        if self.base not in get_args(Base):
            raise ValueError(
                f"Lora: base={self.base!r} is not one of {', '.join(get_args(Base))}. "
                "GGUF's types are packed by the checkpoint: params(packed=True)."
            )
        check_maps("Lora", self.maps)

    @property
    def scale(self) -> float:
        return find_scale(self.alpha, self.rank, self.rslora)

    def adapters(self, blocks: dict, key: jax.Array) -> dict:
        """Fresh A (uniform within 1/sqrt(in), Kaiming with a = sqrt(5)) and B (zero).

        The tree mirrors `blocks`: {"attention": {"q": {"lora_a", "lora_b"}}, ...}, with
        lora_a [L, in, rank] and lora_b [L, rank, out] in `adapter_dtype`; a packed
        kernel's is that of the norms. With `dora` also magnitude [L, out], float32.
        """
        found = find_maps(blocks)
        chosen = choose_maps(self.maps, found, f"Lora: maps={self.maps}")
        dtype = quantised.find_unpacked_dtype(blocks)
        tree: dict = {}
        for name in chosen:
            # One stream a map, whatever other maps are chosen.
            stream = jax.random.fold_in(key, number_map(name))
            insert(tree, name, self._init_map(found[name], stream, dtype))
        return tree

    def _init_map(self, leaf: dict, key: jax.Array, dtype) -> dict:
        """The adapter of one map; `dtype` is that of a packed map's kernel."""
        kernel = quantised.describe_kernel(leaf, dtype)
        layers, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        shape = (layers, inputs, self.rank)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        stored = jnp.float32 if self.adapter_dtype == "float32" else kernel.dtype
        b = jnp.zeros((layers, self.rank, outputs), stored)
        pair = {"lora_a": a.astype(stored), "lora_b": b}
        if self.dora:
            pair["magnitude"] = jnp.sqrt(quantised.sum_squares(leaf))
        return pair

    def init(self, model, params, stats, key, adapters: dict | None = None):
        """State that takes over `params` (frozen, packed for `base`) and adds adapters.

        They are fresh, or `adapters` trained before (jmem.checkpoints.load_adapter), in
        `adapter_dtype`.

        Raises:
          ValueError: `adapters` are not of this rank, these maps and these blocks, a
            pattern of `adamw.rates` matches none of them, a map's rows are not whole
            blocks of `base`, or update="fused" meets a model with statistics.
        """
        if self.update == "fused":
            refuse_stats("Lora", model, stats)
        if self.base != "given":
            params = quantised.pack(params, _PACKED[self.base])
        blocks = params["blocks"]
        if adapters is None:
            lora = self.adapters(blocks, key)
        else:
            lora = self._adopt(adapters, blocks)
        self.adamw.find_factors(lora, "blocks/")  # refuses a pattern that means nothing
        state = {
            "params": params,
            "stats": stats,
            "lora": lora,
            "optimizer": self.adamw.direction().init(lora),
            "step": jnp.int32(0),
        }
        if self.dora:
            state["squares"] = compute_squares(blocks, lora)
        if self.dropout or needs_key(model):
            # A stream beside those of the maps.
            state["key"] = jax.random.key_data(jax.random.fold_in(key, len(MAPS)))
        return state

    def _adopt(self, adapters: dict, blocks: dict) -> dict:
        """`adapters` in `adapter_dtype`, once they are known to fit."""
        fresh = jax.eval_shape(self.adapters, blocks, jax.random.key(0))
        settings = f"rank={self.rank}, maps={self.maps}, dora={self.dora}"
        check_fit("Lora", adapters, fresh, settings)
        return jax.tree.map(lambda a, f: jnp.asarray(a, f.dtype), adapters, fresh)

    def fuses(self, model) -> bool:
        """Whether adapters move inside the backward pass."""
        return fuses(model, self.update, self.adamw.max_grad_norm, self.accumulate)

    def step(self, model, state, batch):
        """One update of the adapters from one batch: (state, metrics)."""
        params = state["params"]
        # DoRA's norms are those of the adapters that the step begins with.
        base = attach(params["blocks"], self._compute_norms(state))
        linear = lora_linear(self.scale, self.dropout, self.keep_zeros)
        ops = model.ops._replace(linear=linear)

        def drawn(number):
            """The frozen blocks, with keys for the dropout of one part."""
            if not self.dropout:
                return base
            return attach(base, dropout_keys(state["lora"], draw_part(state, number)))

        if self.fuses(model):
            frozen = params | {"blocks": drawn(0)}
            return self._fused(model, state, batch, frozen, ops)

        lora, new, metrics = loss_step(
            model,
            state,
            batch,
            state["lora"],
            lambda lora, number: params | {"blocks": attach(drawn(number), lora)},
            functools.partial(
                gradient_step,
                self.adamw,
                layers=depth(params["blocks"]),
                above="blocks/",
            ),
            parts=self.accumulate,
            ops=ops,
        )
        return state | new | {"lora": lora}, metrics

    def _fused(self, model, state, batch, params, ops):
        """`step` whose adapters move inside the backward pass."""
        count, moments = read_moments(state["optimizer"])
        rate, layers = self.adamw.rate(state["step"]), depth(params["blocks"])
        rates = by_key(
            self.adamw.find_leaf_rates(state["lora"], rate, layers, "blocks/")
        )
        head_params = model.head_params(params)

        def head(x):
            loss = mean_head_loss(model, ops, head_params, x, batch)
            return loss, loss

        def balance(aux):
            more = sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))
            return more, more

        def move(layer, lora, moments, gradients):
            def update(path, w, held, dw, salt):
                own = rates[path][layer] if rates[path].ndim else rates[path]
                own = own.reshape((1,) * w.ndim)
                return self.adamw.rule(w, held, dw, own, count + 1, salt)

            squares = [sum_squares(g) for g in jax.tree.leaves(gradients)]
            fresh = move_leaves(lora, moments, gradients, update, state["step"], layer)
            return *fresh, sum(squares, jnp.float32(0))

        lora, moments, square, loss, more = adapter_step(
            *(model, params, state["lora"], moments, batch, ops, jnp.float32(0)),
            head=head,
            balance=balance,
            move=move,
        )
        optimizer = replace_moments(state["optimizer"], count + 1, moments, lora)
        metrics = {"loss": loss + more, "lr": rate, "grad_norm": jnp.sqrt(square)}
        step = state["step"] + 1
        return state | {"lora": lora, "optimizer": optimizer, "step": step}, metrics

    def _compute_norms(self, state) -> dict:
        """DoRA's `norms` of the adapters as they are; of plain LoRA nothing."""
        if not self.dora:
            return {}
        blocks = state["params"]["blocks"]
        return norms(
            blocks, state["lora"], state["squares"], self.scale, self.keep_zeros
        )

    def merged(self, state):
        """The base with every product added to its kernel (float32, then cast).

        With `dora` its columns then have the trained lengths. A packed base is
        dequantised for it, all of it, to the dtype of the norms. With the statistics.
        """

        def merge(tree, lora):
            if "lora_a" in lora:
                wide = [lora[n].astype(jnp.float32) for n in ("lora_a", "lora_b")]
                delta = self.scale * jnp.einsum("lir,lro->lio", *wide)
                kernel = tree["kernel"]
                delta = hold(delta, kernel) if self.keep_zeros else delta
                added = kernel.astype(jnp.float32) + delta
                if self.dora:
                    added *= (lora["magnitude"] / lora["lora_norm"])[:, None]
                return tree | {"kernel": added.astype(kernel.dtype)}
            return tree | {name: merge(tree[name], lora[name]) for name in lora}

        params, lora = (
            state["params"],
            attach(state["lora"], self._compute_norms(state)),
        )
        dtype = quantised.find_unpacked_dtype(params["blocks"])
        blocks = quantised.unpack(params["blocks"], dtype)
        return params | {"blocks": merge(blocks, lora)}, state["stats"]

    def labels(self, state):
        """The state's parts in the user's words."""
        weights = ("params", "squares") if "squares" in state else "params"
        stats = {"statistics": "stats"} if jax.tree.leaves(state["stats"]) else {}
        return {"weights": weights, "lora": "lora", "optimizer": "optimizer"} | stats
