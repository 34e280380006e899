"""Full fine-tuning: every parameter is trained. The baseline of every other method.

Memory   w*P + 2*m*P of state and w*P of gradients, for P parameters of w bytes with
         moments of m bytes: 10 + 2 bytes a parameter with bf16 weights, f32 moments.
See      experiments/lisa.py, tests/finetune/
"""

import dataclasses

import jax
import jax.numpy as jnp

from jmem.finetune.accumulate import accumulated, check_parts
from jmem.finetune.adamw import AdamW, gradient_step
from jmem.train.loss import next_token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """AdamW on all parameters."""

    adamw: AdamW = AdamW(learning_rate=1e-5)
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""

    def __post_init__(self):
        check_parts("Full", self.accumulate)

    def init(self, model, params, key):
        """State that takes over `params` (donated by the training step)."""
        del model, key
        optimizer = self.adamw.direction().init(params)
        return {"params": params, "optimizer": optimizer, "step": jnp.int32(0)}

    def step(self, model, state, batch):
        """One update from one batch: (state, metrics)."""
        params = state["params"]

        def gradients(part, number):
            del number
            return jax.value_and_grad(
                lambda params: next_token_loss(model, params, part)
            )(params)

        loss, grads = accumulated(gradients, batch, self.accumulate)
        params, optimizer, metrics = gradient_step(
            self.adamw, loss, grads, params, state["optimizer"], state["step"]
        )
        state = {"params": params, "optimizer": optimizer, "step": state["step"] + 1}
        return state, metrics

    def merged(self, state):
        """The trained parameters."""
        return state["params"]

    def labels(self, state):
        """The state's parts in the user's words."""
        del state
        return {"weights": "params", "optimizer": "optimizer"}
