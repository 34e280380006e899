"""The programs of several cache methods at once, to be measured beside each other."""

from collections.abc import Mapping
from typing import Unpack

from jmem.generate.programs import decode_program, prefill_program
from jmem.kvcache.budget import Sized
from jmem.kvcache.plan import Plan, Sizes
from jmem.program import Program


def plan_caches(
    model, methods: Mapping[str, Sized], **sizes: Unpack[Sizes]
) -> dict[str, Plan]:
    """The plan of each method's cache, by the method's name.

    A filter's is a full cache of the prompt that it leaves. Sizes are those of
    `CacheMethod.plan`: prompt, new_tokens, batch_size=1, target=None.
    """
    return {name: method.plan(model, **sizes) for name, method in methods.items()}


def build_programs(
    model, methods: Mapping[str, Sized], **sizes: Unpack[Sizes]
) -> dict[str, Program]:
    """`<name>-prefill` and `<name>-decode` of each method, and of a filter `-filter`.

    The filter is given the weights it reads alone; the prefill behind it reads what it
    left. Sizes are those of `plan_caches`.
    """
    found = {}
    for name, plan in plan_caches(model, methods, **sizes).items():
        if (shorten := methods[name].filter) is not None:
            found[f"{name}-filter"] = shorten.program(
                model, prompt=sizes["prompt"], batch_size=plan.batch_size
            )
        found[f"{name}-prefill"] = prefill_program(model, plan)
        found[f"{name}-decode"] = decode_program(model, plan)
    return found
