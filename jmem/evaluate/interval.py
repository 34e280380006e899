"""How sure a share is, from few trials."""

import math
import statistics


def wilson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of shares that `hits` of `trials` leave possible.

    Stays within [0, 1], and has a width even where all or none hit. Trials count as
    independent.

    Raises:
      ValueError: no trials, more hits than trials, or a confidence outside (0, 1).

    Source: Wilson, Probable Inference, 1927, equation 4.

    >>> low, high = wilson(38, 40)
    >>> round(low, 3), round(high, 3)
    (0.835, 0.986)
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(
            f"wilson: hits={hits} of trials={trials} is no share; need at least 1 "
            "trial, and hits from 0 to all of them."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"wilson: confidence={confidence} must lie within (0, 1).")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / trials, z * z / trials
    centre = share + spread / 2
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # By the formula an end is exact where none or all hit, but for rounding.
    return (0.0 if hits == 0 else low), (1.0 if hits == trials else high)
