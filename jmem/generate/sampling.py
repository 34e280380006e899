"""How the next token is drawn from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, then top-k, then top-p; hashable, so it is compiled in.

    Source: top-p (nucleus) is Holtzman et al., 2020, arXiv:1904.09751; top-k is Fan et
    al., 2018, arXiv:1805.04833.
    """

    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens (and ties of the last); 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum, exactly those
    that transformers keeps; of equal ones at the edge the later. 1 for all."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(
                f"Sampling: temperature={self.temperature} must not be negative."
            )
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k={self.top_k} must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p={self.top_p} must lie in (0, 1].")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"Sampling: top_k={self.top_k} and top_p={self.top_p} do nothing at "
                "temperature=0, which takes the likeliest token; give a temperature."
            )

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        """One token a row; computed in float32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scores = logits.astype(jnp.float32) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = jax.lax.top_k(scores, self.top_k)[0][:, -1:]
            scores = jnp.where(scores < least, -jnp.inf, scores)
        if self.top_p < 1:
            # As transformers: the least likely go while their sum stays within the
            # rest. Ties are broken by place, and the likeliest always stays.
            order = jnp.argsort(scores, axis=-1)
            rising = jnp.take_along_axis(scores, order, axis=-1)
            mass = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1)
            goes = (mass <= 1 - self.top_p).at[:, -1].set(False)
            rising = jnp.where(goes, -jnp.inf, rising)
            scores = jnp.put_along_axis(scores, order, rising, axis=-1, inplace=False)
        return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)
