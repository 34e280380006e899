"""LoRA: the weights stay, each chosen linear map gains a trained low-rank product.

Paper    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
         arXiv:2106.09685. Here a baseline beside the methods that jmem is about.
Idea     y = x W + (alpha / rank) x A B, with A [in, rank] random and B [rank, out]
         zero, so training starts at the pretrained model, in a thin subspace.
Memory   w*P + (w + g + 2*m) * rank * sum(in + out) bytes.
See      experiments/lisa.py, tests/finetune/test_lora.py
"""

import dataclasses
import difflib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmem.finetune.adamw import AdamW, gradient_step
from jmem.nn.linear import dense
from jmem.train.loss import next_token_loss

MAPS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear maps of a Llama-like block."""


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*N in"], a: Float[Array, "in rank"], b: Float[Array, "rank out"]
) -> Float[Array, "*N out"]:
    """(x a) b, whose backward pass transposes nothing larger than [N, rank].

    Differentiated by JAX, the gradient of b is (dyᵀ (x a))ᵀ, and XLA's CPU backend
    writes dyᵀ out for every map: a sixth of a training step.
    """
    return (x @ a) @ b


def _low_rank_forward(x, a, b):
    inner = x @ a
    return inner @ b, (x, inner, a, b)


def _low_rank_backward(residuals, dy):
    x, inner, a, b = residuals
    rows = tuple(range(dy.ndim - 1))
    d_inner = dy @ b.T
    d_b = jnp.tensordot(inner, dy, (rows, rows))
    d_a = jnp.tensordot(d_inner, x, (rows, rows)).T
    return d_inner @ a.T, d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def lora_linear(scale: float):
    """A `linear` that adds `scale * (x A) B` where a leaf holds A and B."""

    def linear(name, leaf, x):
        y = dense(name, leaf, x)
        if "lora_a" not in leaf:
            return y
        delta = low_rank(x, leaf["lora_a"], leaf["lora_b"])
        return y + delta * jnp.asarray(scale, y.dtype)

    return linear


def attach(tree: dict, adapters: dict) -> dict:
    """`tree` with the leaves of `adapters` added at the same paths (nothing copied)."""
    added = {
        name: attach(tree.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in adapters.items()
    }
    return tree | added


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """AdamW on low-rank adapters of the blocks' linear maps."""

    rank: int = 8
    alpha: float = 16.0
    """The product is scaled by alpha / rank."""
    maps: tuple[str, ...] = MAPS
    """Linear maps that gain an adapter."""
    adamw: AdamW = AdamW(learning_rate=2e-4)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"Lora: rank={self.rank} must be at least 1.")
        for name in self.maps:
            if name not in MAPS:
                near = difflib.get_close_matches(name, MAPS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"Lora: maps={self.maps} names {name!r}; a block has {MAPS}.{hint}"
                )
        if not self.maps or len(set(self.maps)) < len(self.maps):
            raise ValueError(
                f"Lora: maps={self.maps} must name at least one map, each once."
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapters(self, blocks: dict, key: jax.Array) -> dict:
        """Fresh A (uniform within 1/sqrt(in), Kaiming with a = sqrt(5)) and B (zero).

        The tree mirrors `blocks`: {"attention": {"q": {"lora_a", "lora_b"}}, ...}, with
        lora_a [L, in, rank] and lora_b [L, rank, out] in the kernels' dtype.
        """

        def adapter(name, kernel):
            layers, inputs, outputs = kernel.shape
            # One stream a map, whatever other maps are chosen.
            stream = jax.random.fold_in(key, MAPS.index(name))
            bound = inputs**-0.5
            shape = (layers, inputs, self.rank)
            a = jax.random.uniform(stream, shape, jnp.float32, -bound, bound)
            b = jnp.zeros((layers, self.rank, outputs), kernel.dtype)
            return {"lora_a": a.astype(kernel.dtype), "lora_b": b}

        def walk(tree):
            out = {}
            for name, value in tree.items():
                if name in self.maps:
                    out[name] = adapter(name, value["kernel"])
                elif isinstance(value, dict) and (inner := walk(value)):
                    out[name] = inner
            return out

        return walk(blocks)

    def init(self, model, params, key):
        """State that takes over `params` (frozen) and adds adapters."""
        del model
        lora = self.adapters(params["blocks"], key)
        optimizer = self.adamw.direction().init(lora)
        return {
            "params": params,
            "lora": lora,
            "optimizer": optimizer,
            "step": jnp.int32(0),
        }

    def step(self, model, state, batch):
        """One update of the adapters from one batch: (state, metrics)."""
        params = state["params"]
        ops = model.ops._replace(linear=lora_linear(self.scale))

        def loss(lora):
            adapted = params | {"blocks": attach(params["blocks"], lora)}
            return next_token_loss(model, adapted, batch, ops)

        lora, optimizer, metrics = gradient_step(
            self.adamw, loss, state["lora"], state["optimizer"], state["step"]
        )
        step = state["step"] + 1
        return state | {"lora": lora, "optimizer": optimizer, "step": step}, metrics

    def merged(self, state):
        """The base with every product added to its kernel (float32, then cast)."""

        def merge(tree, lora):
            if "lora_a" in lora:
                wide = [lora[n].astype(jnp.float32) for n in ("lora_a", "lora_b")]
                delta = self.scale * jnp.einsum("lir,lro->lio", *wide)
                kernel = tree["kernel"]
                added = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
                return tree | {"kernel": added}
            return tree | {name: merge(tree[name], lora[name]) for name in lora}

        params = state["params"]
        return params | {"blocks": merge(params["blocks"], state["lora"])}

    def labels(self, state):
        """The state's parts in the user's words."""
        del state
        return {"weights": "params", "lora": "lora", "optimizer": "optimizer"}
