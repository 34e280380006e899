"""Rotary position embedding, half-split convention, and its scalings for long texts.

Source  Su et al., RoFormer, 2021, arXiv:2104.09864; the half-split ("rotate_half")
        pairing of channel i with channel i + D/2 is Hugging Face's. GGUF files pair
        2i with 2i+1: `jmem.checkpoints` permutes their rows on the way in.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions count as 1 / factor of themselves (Chen et al., arXiv:2306.15595)."""

    factor: float

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"LinearScaling: factor={self.factor} must be at least 1.")

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Scaled angular frequencies, in radians a token."""
        return frequencies / self.factor


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
        _check_stretch(self)
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
class YarnScaling:
    """Slows channels that rotate slowly, and sharpens attention a little (YaRN).

    Source: Peng et al., 2023, arXiv:2309.00071, section 3.2 and 3.4; the ramp runs over
    channel pairs, its ends rounded outwards, as in Hugging Face's implementation.
    """

    factor: float
    original_max_positions: int
    """Context the frequencies were first trained at, in tokens."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this within that context keep their speed."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this are slowed by `factor`."""
    attention_factor: float | None = None
    """Multiplies cos and sin of queries and keys; None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the ramp's ends are rounded outwards to whole pairs."""

    def __post_init__(self):
        _check_stretch(self)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"YarnScaling: beta_slow={self.beta_slow} must be positive and below "
                f"beta_fast={self.beta_fast}."
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(
                f"YarnScaling: attention_factor={self.attention_factor} must be "
                "positive, or None."
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Scaled angular frequencies [D/2]; those given are two or more, falling."""
        pairs = len(frequencies)

        def pair_turning(turns: float) -> float:
            """The (fractional) number of the channel pair that makes so many turns."""
            wanted = 2 * math.pi * turns / self.original_max_positions
            return math.log(wanted / frequencies[0]) / math.log(
                frequencies[1] / frequencies[0]
            )

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # Hugging Face's bounds, 2 * pairs - 1 among them.
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        span = high - low if high != low else 0.001
        slowed = np.clip((np.arange(pairs) - low) / span, 0.0, 1.0)
        return (1 - slowed) * frequencies + slowed * frequencies / self.factor


def _check_stretch(scaling: Llama3Scaling | YarnScaling) -> None:
    if scaling.factor < 1 or scaling.original_max_positions < 1:
        raise ValueError(
            f"{type(scaling).__name__}: factor={scaling.factor} and "
            f"original_max_positions={scaling.original_max_positions} must both be at "
            "least 1."
        )


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """`rope(x, positions)` rotates queries or keys by their absolute positions."""

    head_dim: int
    theta: float = 10_000.0
    scaling: Scaling | None = None
    rotary_dim: int | None = None
    """Leading channels that are rotated; the others pass. None: all; 0: none."""

    @property
    def channels(self) -> int:
        """How many leading channels are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def frequencies(self) -> np.ndarray:
        """Angular frequency of each channel pair, float64, radians a token."""
        exponents = np.arange(0, self.channels, 2) / self.channels
        frequencies = self.theta**-exponents
        return self.scaling(frequencies) if self.scaling else frequencies

    def __call__(
        self, x: Float[Array, "B T N D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T N D"]:
        """Rotates in float32 and returns x's dtype."""
        return self.at(positions)(x)

    def at(self, positions: Int[Array, "B T"]) -> Callable[[jax.Array], jax.Array]:
        """The rotation by these positions, whose angles are computed once, here."""
        if self.channels == 0:
            return lambda x: x
        frequencies = jnp.asarray(self.frequencies(), jnp.float32)
        angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies.reshape(
            1, 1, 1, -1
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if isinstance(self.scaling, YarnScaling):
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude

        def turn(x):
            first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
            rotated = (first * cos - second * sin, second * cos + first * sin)
            return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

        def turn_leading(x):
            turning, passing = jnp.split(x, [self.channels], axis=-1)
            return jnp.concatenate([turn(turning), passing], axis=-1)

        return turn if self.channels == self.head_dim else turn_leading
