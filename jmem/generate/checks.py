"""What is refused before anything is traced, and logits that are no numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jmem.generate.sampling import Sampling
from jmem.kvcache.method import CacheMethod
from jmem.kvcache.plan import Plan


def check_tokens(where: str, model, rows: Sequence[Sequence[int]]) -> None:
    """Refuses rows that are none, empty, or of another vocabulary."""
    size = model.config.vocab_size
    if not rows or not all(map(len, rows)):
        raise ValueError(
            f"{where}: prompts must hold at least one prompt, and each at least one "
            "token; start an empty one with the model's begin-of-text token."
        )
    for index, row in enumerate(rows):
        if min(row) < 0 or max(row) >= size:
            raise ValueError(
                f"{where}: prompts[{index}] holds a token outside [0, {size}); was it "
                "made with another model's tokenizer?"
            )


def check_stops(where: str, model, stop_tokens: Sequence[int]) -> None:
    """Refuses stop tokens of another vocabulary, which would never come."""
    size = model.config.vocab_size
    if any(not 0 <= token < size for token in stop_tokens):
        raise ValueError(
            f"{where}: stop_tokens={list(stop_tokens)} must lie in [0, {size}), the "
            "vocabulary."
        )


def check_positive(where: str, **sizes: int | None) -> None:
    """Refuses sizes below 1; None is no size."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{where}: {name}={size} must be positive.")


def require_key(where: str, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """The key to draw with; any serves where nothing is drawn."""
    if sampling.temperature and key is None:
        raise ValueError(
            f"{where}: temperature={sampling.temperature} draws at random and needs "
            "key; pass jax.random.key(seed), or temperature=0 for the likeliest tokens."
        )
    return jax.random.key(0) if key is None else key


def check_method(where: str, method: Any) -> None:
    """Refuses the class of a cache where an instance is meant."""
    if isinstance(method, type):
        name = method.__name__
        raise TypeError(f"{where}: policy={name} is a class; pass {name}(...).")


def check_positions(
    where: str, model, method: CacheMethod, text: int, new_tokens: int
) -> None:
    """Refuses more tokens than the model has positions, unless an answer needs none."""
    limit = model.config.max_positions
    if text + (0 if method.is_endless(model) else new_tokens) > limit:
        raise ValueError(
            f"{where}: {text} prompt tokens + max_new_tokens={new_tokens} exceed the "
            f"model's max_positions={limit}."
        )


def check_lengths(
    where: str,
    tokens: Array,
    lengths: Int[Array, " B"],
    caches: Sequence[Any],
    plans: Sequence[Plan],
    *,
    least: int,
) -> np.ndarray | None:
    """The lengths, None while they are traced; refuses other plans' rows or caches."""
    batch, width = tokens.shape[:2]
    for plan, cache in zip(plans, caches, strict=True):
        if plan.batch_size != batch or lengths.shape != (batch,):
            raise ValueError(
                f"{where}: tokens have {batch} rows and lengths {lengths.shape[0]}, "
                f"but the plan is for batch_size={plan.batch_size}; plan for these."
            )
        plan.check_cache(where, cache)
    if isinstance(lengths, Tracer):
        return None
    own = np.asarray(lengths)
    if own.min() < least or own.max() > width:
        raise ValueError(
            f"{where}: lengths={own.tolist()} must lie in [{least}, {width}], the "
            "width of tokens; they count each row's own tokens, without padding."
        )
    return own


_is_finite = jax.jit(lambda logits: jnp.isfinite(logits).all(axis=-1))


def check_finite(logits: Float[Array, "B V"], cache: Any, plan: Plan) -> None:
    """Refuses logits that are no numbers, and says where they come from.

    Waits for the logits, and looks at the cache only where something is wrong.

    Raises:
      ValueError: names the first row whose logits are not finite, and the first layer
        of whose keys and values it keeps some that are not.
    """
    finite = np.asarray(_is_finite(logits))
    if finite.all():
        return
    row = int(finite.argmin())
    layer = plan.method.find_broken(plan, cache, row)
    if layer is not None:
        raise ValueError(
            f"The logits of row {row} are not finite, nor, first of all layers, are "
            f"the keys and values of layer {layer}. A weight that makes those, or one "
            "in a layer below, is infinite or no number, or overflows."
        )
    raise ValueError(
        f"The logits of row {row} are not finite, but all keys and values are. A "
        "weight of the last block behind those, of the final norm or of the head is "
        "infinite or no number, or overflows."
    )
