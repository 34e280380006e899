"""Rotary position embedding, half-split convention, with Llama-3's frequency scaling.

Source  Su et al., RoFormer, 2021, arXiv:2104.09864; the half-split ("rotate_half")
        pairing of channel i with channel i + D/2 is Hugging Face's. GGUF files pair
        2i with 2i+1: `jmem.checkpoints` permutes their rows on the way in.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Stretches low frequencies so that a model serves longer contexts (Llama 3.1)."""

    factor: float = 8.0
    """Slow-down of the channels whose wavelength exceeds the trained context."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """Context the frequencies were first trained at, in tokens."""

    def __post_init__(self):
        if self.factor < 1 or self.original_max_positions < 1:
            raise ValueError(
                f"Llama3Scaling: factor={self.factor} and original_max_positions="
                f"{self.original_max_positions} must both be at least 1."
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"Llama3Scaling: low_freq_factor={self.low_freq_factor} must be "
                f"positive and below high_freq_factor={self.high_freq_factor}."
            )

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Scaled angular frequencies [D/2], in radians a token."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """`rope(x, positions)` rotates queries or keys by their absolute positions."""

    head_dim: int
    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None

    def frequencies(self) -> np.ndarray:
        """Angular frequency of each channel pair, float64 [D/2], radians a token."""
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        frequencies = self.theta**-exponents
        return self.scaling(frequencies) if self.scaling else frequencies

    def __call__(
        self, x: Float[Array, "B T N D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T N D"]:
        """Rotates in float32 and returns x's dtype."""
        frequencies = jnp.asarray(self.frequencies(), jnp.float32)
        angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies.reshape(
            1, 1, 1, -1
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
