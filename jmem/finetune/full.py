"""Full fine-tuning: every parameter is trained. The baseline of every other method.

Memory   w*P + 2*m*T of state and w*T of gradients, for P parameters of w bytes, T of
         them trained (all, unless `train` says which), with moments of m bytes: 10 + 2
         bytes a parameter with bf16 weights, f32 moments.
         With the moments on the host they take host memory instead, and the device
         that of a piece (`jmem.finetune.streamed`).
See      experiments/lisa.py, tests/finetune/
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jmem.finetune.adamw import AdamW, Place, gradient_step
from jmem.finetune.checks import check_choice, check_parts
from jmem.finetune.descent import loss_step, needs_key
from jmem.finetune.patterns import join, split
from jmem.finetune.streamed import init_on_host, stream_step
from jmem.nn.quantised import refuse_packed
from jmem.nn.stack import depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """AdamW on all parameters, or on those that patterns mean."""

    train: tuple[str, ...] = ()
    """Patterns of what is trained (`jmem.finetune.patterns`): ("blocks/attention",).
    The rest has no gradient and no moments. Empty: everything is trained."""
    adamw: AdamW = AdamW(learning_rate=1e-5)
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    moments: Place = "device"
    """Where the moments live: "host" is pinned memory that the GPU reads and writes a
    piece at a time."""
    keep_zeros: bool = False
    """Weights of the blocks' maps that are exactly 0 stay so, as in a pruned model
    (`jmem.finetune.zeros`)."""

    def __post_init__(self):
        check_parts("Full", self.accumulate)
        check_choice("Full", "moments", self.moments, Place)

    def init(self, model, params, stats, key=None):
        """State that takes over `params` (donated by the training step).

        `key` is for a model that draws noise in training, and for no other.

        Raises:
          ValueError: a pattern of `train`, or of `adamw.rates`, matches nothing; the
            rate is to decay over blocks, and the model has none.
        """
        refuse_packed("Full", params)
        trained, _ = self._split(params)
        self.adamw.find_factors(trained)  # refuses a pattern that means nothing
        if self.adamw.layer_decay < 1 and "blocks" not in params:
            raise ValueError(
                f"Full: adamw.layer_decay={self.adamw.layer_decay} is over stacked "
                f"blocks, and the model's parameters are {sorted(params)}. Set it to "
                "1, or give rates by pattern (adamw.rates)."
            )
        if self.moments == "host":
            optimizer = init_on_host(self.adamw, trained)
        else:
            optimizer = self.adamw.direction().init(trained)
        state = {
            "params": params,
            "stats": stats,
            "optimizer": optimizer,
            "step": jnp.int32(0),
        }
        if needs_key(model):
            if key is None:
                raise ValueError("Full: key=None, and the model draws noise; give one.")
            state["key"] = jax.random.key_data(key)
        return state

    def _split(self, params):
        return split(params, self.train, f"Full: train={self.train}")

    def step(self, model, state, batch):
        """One update from one batch: (state, metrics)."""
        params = state["params"]
        trained, frozen = self._split(params)
        update = stream_step if self.moments == "host" else gradient_step
        layers = depth(params["blocks"]) if "blocks" in params else 0
        trained, new, metrics = loss_step(
            model,
            state,
            batch,
            trained,
            lambda trained, _: join(trained, frozen),
            functools.partial(
                update, self.adamw, layers=layers, keep_zeros=self.keep_zeros
            ),
            parts=self.accumulate,
        )
        return state | new | {"params": join(trained, frozen)}, metrics

    def merged(self, state):
        """The parameters, trained or not, and the statistics."""
        return state["params"], state["stats"]

    def labels(self, state):
        """The state's parts in the user's words."""
        stats = {"statistics": "stats"} if jax.tree.leaves(state["stats"]) else {}
        return {"weights": "params", "optimizer": "optimizer"} | stats
