"""A method cut to a number of bytes, so that methods are compared at equal memory.

A policy's `capacity` counts tokens, and not all count the same ones: some the observed
tokens, some the new ones, some a mean over layers; what shortens a prompt counts the
tokens that it leaves. Bytes are common to all.

    budget = Full().plan(model, prompt=2048, new_tokens=64).bytes() // 8
    sizes = {"prompt": 2048, "new_tokens": 64}
    fit_to_bytes(SnapKV(), model, budget, **sizes)      # SnapKV(capacity=...)
"""

from typing import Unpack

from jmem.kvcache.method import CacheMethod
from jmem.kvcache.plan import Sizes
from jmem.kvcache.shorten import Shorten

Sized = CacheMethod | Shorten
"""What fills a cache of some bytes: a cache's method, or what shortens a prompt that a
full cache then holds."""

REACH = 256
"""Capacities that are tried beyond the first that does not fit. Rounding can give back
half a token a layer and a window: far fewer."""


def fit_to_bytes[Method: Sized](
    policy: Method, model, nbytes: int, **sizes: Unpack[Sizes]
) -> Method:
    """`policy` with the largest capacity whose cache takes at most `nbytes` bytes.

    No larger than `prompt + new_tokens`, which is all there is to keep. The model and
    the sizes are those of `CacheMethod.plan` (prompt, new_tokens, batch_size=1,
    target=None), by which bytes of the device are counted; for a kernel of `target`
    slots are rounded up. A policy without a capacity, as `Full`, comes back as it is,
    if it fits. What shortens a prompt keeps as many tokens as a full cache of those
    bytes has room for.

    Raises:
      ValueError: no capacity fits, or the policy and the model do not go together at
        any.
    """

    def size(candidate: Method) -> int:
        return candidate.plan(model, **sizes).device_bytes()

    prompt, new_tokens = sizes["prompt"], sizes["new_tokens"]
    name, what = type(policy).__name__, f"{prompt:,} + {new_tokens:,} tokens"
    if (rows := sizes.get("batch_size", 1)) > 1:
        what += f" a row, {rows:,} rows"
    given = getattr(policy, "capacity", None)
    if given is None:
        if (least := size(policy)) > nbytes:
            raise ValueError(
                f"fit_to_bytes: nbytes={nbytes:,}, but {name} takes {least:,} bytes "
                f"for {what}, and has no capacity to lower. Raise nbytes, or choose a "
                "policy that drops tokens."
            )
        return policy

    at = policy.resize  # with another capacity

    def allowed(capacity: int) -> bool:
        try:
            at(capacity)
        except ValueError:
            return False
        return True

    def fits(capacity: int) -> bool:
        return size(at(capacity)) <= nbytes

    most = prompt + new_tokens
    if not allowed(most):  # a short prompt, of which the policy keeps all anyway
        most = max(most, given)
    size(at(most))  # what is wrong with the policy itself is said by itself
    if fits(most):
        return at(most)
    smallest = _find_first(allowed, 0, most)
    first = smallest  # that does not fit
    if fits(smallest):
        first = _find_first(lambda capacity: not fits(capacity), smallest, most)
    # Bytes rise with capacity but for rounding: the equal steps of a pyramid come out
    # smaller now and then, and a larger capacity may fit again.
    beyond = range(min(first + REACH, most), first, -1)
    best = next(filter(fits, beyond), first - 1)
    if best < smallest:
        least, capacity = min((size(at(n)), n) for n in (smallest, *beyond))
        raise ValueError(
            f"fit_to_bytes: nbytes={nbytes:,} is too small for {name}, which takes "
            f"{least:,} bytes for {what} with capacity={capacity}, and no less with "
            "another. Raise nbytes, or lower what it keeps besides: "
            f"{policy}."
        )
    return at(best)


def _find_first(holds, low: int, high: int) -> int:
    """The least number in (low, high] from which on `holds`, as it does at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
