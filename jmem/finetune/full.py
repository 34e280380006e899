"""Full fine-tuning: every parameter is trained. The baseline of every other method.

Memory   w*P + 2*m*T of state and w*T of gradients, for P parameters of w bytes, T of
         them trained (all, unless `train` says which), with moments of m bytes: 10 + 2
         bytes a parameter with bf16 weights, f32 moments.
         With the moments on the host they take host memory instead, and the device
         that of a piece (`jmem.finetune.streamed`).
See      experiments/lisa.py, tests/finetune/
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jmem.finetune.accumulate import accumulated, check_parts
from jmem.finetune.adamw import AdamW, gradient_step
from jmem.finetune.patterns import join, split
from jmem.finetune.streamed import init_on_host, streamed_step
from jmem.nn.quantised import refuse_packed
from jmem.nn.stack import depth
from jmem.train.loss import next_token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """AdamW on all parameters, or on those that patterns mean."""

    train: tuple[str, ...] = ()
    """Patterns of what is trained (`jmem.finetune.patterns`): ("blocks/attention",).
    The rest has no gradient and no moments. Empty: everything is trained."""
    adamw: AdamW = AdamW(learning_rate=1e-5)
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    moments: Literal["device", "host"] = "device"
    """Where the moments live: "host" is pinned memory that the GPU reads and writes a
    piece at a time."""

    def __post_init__(self):
        check_parts("Full", self.accumulate)
        if self.moments not in ("device", "host"):
            raise ValueError(
                f"Full: moments={self.moments!r} must be 'device' or 'host'."
            )

    def init(self, model, params, key):
        """State that takes over `params` (donated by the training step).

        Raises:
          ValueError: a pattern of `train`, or of `adamw.rates`, matches nothing.
        """
        del model, key
        refuse_packed("Full", params)
        trained, _ = self._split(params)
        self.adamw.factors(trained)  # refuses a pattern that means nothing
        if self.moments == "host":
            optimizer = init_on_host(self.adamw, trained)
        else:
            optimizer = self.adamw.direction().init(trained)
        return {"params": params, "optimizer": optimizer, "step": jnp.int32(0)}

    def _split(self, params):
        return split(params, self.train, f"Full: train={self.train}")

    def step(self, model, state, batch):
        """One update from one batch: (state, metrics)."""
        layers = depth(state["params"]["blocks"])
        trained, frozen = self._split(state["params"])

        def gradients(part, number):
            del number
            return jax.value_and_grad(
                lambda trained: next_token_loss(model, join(trained, frozen), part)
            )(trained)

        loss, grads = accumulated(gradients, batch, self.accumulate)
        update = streamed_step if self.moments == "host" else gradient_step
        trained, optimizer, metrics = update(
            self.adamw,
            loss,
            grads,
            trained,
            state["optimizer"],
            state["step"],
            layers,
        )
        params, step = join(trained, frozen), state["step"] + 1
        return {"params": params, "optimizer": optimizer, "step": step}, metrics

    def merged(self, state):
        """The parameters, trained or not."""
        return state["params"]

    def labels(self, state):
        """The state's parts in the user's words."""
        del state
        return {"weights": "params", "optimizer": "optimizer"}
