"""LOMO and AdaLomo: every parameter moves inside the backward pass, almost no state.

Paper    Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited
         Resources, 2023, arXiv:2306.09782; AdaLomo: Low-memory Optimization with
         Adaptive Learning Rate, 2023, arXiv:2310.10195.
Idea     A weight whose gradient is known can move at once, and then the gradient is not
         needed: with a rule that keeps no moments, or those of rows and columns alone,
         full fine-tuning needs little beside weights and activations.
Memory   w*P + L*B*T*M*w of block inputs, and a tile of a gradient. AdaLomo: a float a
         row and a column besides, and the float32 gradient of one matrix of a block.
Differs  The official code cuts the gradient by its global norm in a second backward
         pass, which is not offered: AdaLomo's paper finds that its normalisation makes
         that pass needless, and for LOMO there is `clip_value`. A stacked leaf is a
         matrix a layer, as there. In AdaLomo, embedding and head are walked three times
         a step (`jmem.finetune.rules`).
See      jmem/finetune/fused.py, jmem/finetune/rules.py, tests/finetune/test_lomo.py
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jmem.finetune.adamw import AdamW, Convention
from jmem.finetune.checks import check_choice, check_rate
from jmem.finetune.descent import refuse_stats
from jmem.finetune.fused import fused_step
from jmem.finetune.patterns import split
from jmem.finetune.rules import Factored, Sgd
from jmem.nn.quantised import refuse_packed

Variant = Literal["lomo", "adalomo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lomo:
    """Full fine-tuning without moments, or with those of rows and columns."""

    variant: Variant = "adalomo"
    """"lomo" is gradient descent. "adalomo" divides by factored second moments, and the
    size of an update is that of the matrix it moves times the rate."""
    learning_rate: float = 1e-3
    """Peak rate: the papers take 0.01 to 0.05 for LOMO and 5e-4 to 1e-3 for AdaLomo."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    convention: Convention = "plain"
    """These four as `AdamW`'s."""
    weight_decay: float = 0.0
    clip_value: float = 0.0
    """Size that each value of a gradient is cut to; 0 leaves them alone."""
    train: tuple[str, ...] = ()
    """Patterns of what is trained (`jmem.finetune.patterns`). Empty: everything."""
    keep_zeros: bool = False
    """As `jmem.finetune.full.Full.keep_zeros`. AdaLomo's means are over all of a
    matrix, its zeros among them."""

    def __post_init__(self):
        check_choice("Lomo", "variant", self.variant, Variant)
        for name in ("learning_rate", "weight_decay"):
            check_rate("Lomo", name, getattr(self, name))
        if not 0 <= self.clip_value < float("inf"):
            raise ValueError(
                f"Lomo: clip_value={self.clip_value} must be finite and not negative; "
                "0 leaves gradients alone."
            )
        _ = self.adamw  # refuses a schedule that cannot be

    @property
    def adamw(self) -> AdamW:
        """What says the rates, as of every method. Its moments are not used."""
        return AdamW(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            weight_decay=self.weight_decay,
            convention=self.convention,
            max_grad_norm=0,
        )

    @property
    def rule(self) -> Sgd | Factored:
        """How a matrix moves."""
        kept = {"weight_decay": self.weight_decay, "clip_value": self.clip_value}
        return (
            Sgd(**kept) if self.variant == "lomo" else Factored(relative=True, **kept)
        )

    def init(self, model, params, stats, key):
        """State that takes over `params` (donated by the training step).

        Raises:
          ValueError: a pattern of `train` matches nothing; the model has statistics;
            AdaLomo's factors would be divided over a mesh.
        """
        del key
        refuse_stats("Lomo", model, stats)
        if self.variant == "adalomo" and getattr(model, "layout", None) is not None:
            raise ValueError(
                f"Lomo: the model has layout={model.layout}, and AdaLomo's means over "
                "rows and columns are not divided over a mesh. Use one device "
                "(layout=None), variant='lomo', or Lisa."
            )
        refuse_packed("Lomo", params)
        trained, _ = split(params, self.train, f"Lomo: train={self.train}")
        init = self.rule.init
        moments = {  # of stacked leaves, a state for each layer: [L, ...]
            name: jax.tree.map(jax.vmap(init) if name == "blocks" else init, tree)
            for name, tree in trained.items()
        }
        return {"params": params, "moments": moments, "step": jnp.int32(0)}

    def step(self, model, state, batch):
        """One update from one batch: (state, metrics)."""
        layers, step = model.config.layers, state["step"]
        trained, _ = split(state["params"], self.train, "Lomo: train")
        rate = self.adamw.rate(step)
        moments = state["moments"]
        every = jnp.arange(layers, dtype=jnp.int32)
        # With nothing to train in them, no block has a row.
        rows = every if jax.tree.leaves(trained["blocks"]) else jnp.full_like(every, -1)
        moved = fused_step(
            model,
            state["params"],
            batch,
            self.rule,
            row_of=rows,
            blocks=moments["blocks"],
            block_counts=jnp.full((layers,), step + 1),
            outside={k: v for k, v in moments.items() if k != "blocks"},
            outside_count=step + 1,
            rates=self.adamw.find_leaf_rates(trained, rate, layers),
            step=step,
            decays=self.adamw.decays,
            train=self.train,
            keep_zeros=self.keep_zeros,
        )
        moments = moved.outside | {"blocks": moved.blocks}
        state = {"params": moved.params, "moments": moments, "step": step + 1}
        norm = jnp.sqrt(moved.square)
        return state, {"loss": moved.loss, "lr": rate, "grad_norm": norm}

    def merged(self, state):
        """The parameters, trained or not; there are no statistics."""
        return state["params"], {}

    def labels(self, state):
        """The state's parts in the user's words."""
        held = {"optimizer": "moments"} if jax.tree.leaves(state["moments"]) else {}
        return {"weights": "params"} | held
