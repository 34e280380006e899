"""Caches that take part in a comparison: the full one, and others in as many bytes.

A share is of the full cache's bytes, and every method gets the most that fits in them:
a policy its largest capacity, what shortens a prompt as many tokens as a full cache of
those bytes holds.

    contenders = at_equal_bytes(
        model, {"snapkv": SnapKV()}, (1 / 8,), prompt=2048, new_tokens=64, batch_size=8
    )
    list(contenders)                                        # ['full', 'snapkv 12.5 %']
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

from jmem.kvcache.budget import Sized, fit_to_bytes
from jmem.kvcache.full import Full
from jmem.kvcache.plan import Plan, Sizes
from jmem.kvcache.shorten import Shorten


class Contender(NamedTuple):
    """A method cut to a budget, for prompts of one length."""

    name: str
    method: str
    share: float
    """The budget, of the full cache's bytes; 1 for the full cache itself."""
    plan: Plan
    filter: Shorten | None = None
    """What shortens a prompt before it is read into the plan's cache."""
    answer_bytes: int = 0
    """Those of the plan's bytes that hold an answer and come on top of the share."""


def name_contender(method: str, share: float) -> str:
    """A method at a budget, as tables name it.

    >>> name_contender("snapkv", 0.125)
    'snapkv 12.5 %'
    """
    return f"{method} {100 * share:g} %"


def at_equal_bytes(
    model,
    methods: Mapping[str, Sized],
    shares: Sequence[float] | Mapping[float, int],
    *,
    answer_besides: bool = False,
    **sizes: Unpack[Sizes],
) -> dict[str, Contender]:
    """The full cache, and each method at each share of its bytes, by name.

    With `answer_besides` a share is of the prompt's bytes alone, and room for the new
    tokens comes on top of it, for all alike. A mapping says itself how many bytes each
    of its shares is. Sizes are those of `CacheMethod.plan`: prompt, new_tokens,
    batch_size=1, target=None.

    Raises:
      ValueError: a share outside (0, 1), or one that is too small for a method, which
        is named with what it needs.
    """
    whole = Full().plan(model, **sizes)
    besides = 0
    if answer_besides:
        alone: Sizes = {**sizes, "new_tokens": 0}
        besides = whole.device_bytes() - Full().plan(model, **alone).device_bytes()
    shared = whole.device_bytes() - besides
    found = {"full": Contender("full", "full", 1.0, whole, None, besides)}
    for method, given in methods.items():
        if given.filter is not None:
            given.filter.check(model)
        for share in shares:
            if not 0 < share < 1:
                raise ValueError(
                    f"at_equal_bytes: shares={share} must lie within (0, 1); the full "
                    "cache is there in any case."
                )
            nbytes = math.floor(share * shared) + besides
            if isinstance(shares, Mapping):
                nbytes = shares[share]
            try:
                cut = fit_to_bytes(given, model, nbytes, **sizes)
                plan = cut.plan(model, **sizes)
            except ValueError as error:
                raise ValueError(
                    f"at_equal_bytes: shares={share:g} of the full cache for "
                    f"{whole.prompt:,} + {whole.new_tokens:,} tokens is too little for "
                    f"{method}; raise it, leave that method out, or lower what it "
                    f"keeps in any case.\n{error}"
                ) from error
            name = name_contender(method, share)
            found[name] = Contender(name, method, share, plan, cut.filter, besides)
    return found


def find_share_of_full(contenders: Mapping[str, Contender], name: str) -> float:
    """The bytes of a contender's cache, as a share of the full one's.

    Room for an answer that is there besides, for all alike, counts in neither.
    """
    own, whole = (contenders[one] for one in (name, "full"))
    return (own.plan.device_bytes() - own.answer_bytes) / (
        whole.plan.device_bytes() - whole.answer_bytes
    )


def split_contenders(
    contenders: Mapping[str, Contender],
) -> tuple[dict[str, Plan], dict[str, Shorten]]:
    """Plans of those that read whole prompts, and filters of the others, by name."""
    plans = {name: c.plan for name, c in contenders.items() if c.filter is None}
    filters = {name: c.filter for name, c in contenders.items() if c.filter is not None}
    return plans, filters
