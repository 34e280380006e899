"""The programs of several cache methods at once, to be measured beside each other."""

from collections.abc import Mapping

from jmem.generate.programs import decode_program, prefill_program
from jmem.kvcache.budget import Sized
from jmem.kvcache.plan import Plan
from jmem.program import Program
from jmem.targets import Target


def plan_caches(
    model,
    methods: Mapping[str, Sized],
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int = 1,
    target: Target | None = None,
) -> dict[str, Plan]:
    """The cache of each method; a filter's is a full one of the prompt that it leaves.

    Sizes are those of `Policy.plan`.
    """
    return {
        name: method.plan(
            model,
            prompt=prompt,
            new_tokens=new_tokens,
            batch_size=batch_size,
            target=target,
        )
        for name, method in methods.items()
    }


def build_programs(
    model,
    methods: Mapping[str, Sized],
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int = 1,
    target: Target | None = None,
) -> dict[str, Program]:
    """`<name>-prefill` and `<name>-decode` of each method, and of a filter `-filter`.

    The filter is given the weights it reads alone; the prefill behind it reads what it
    left. Sizes are those of `Policy.plan`.
    """
    plans = plan_caches(
        model,
        methods,
        prompt=prompt,
        new_tokens=new_tokens,
        batch_size=batch_size,
        target=target,
    )
    found = {}
    for name, method in methods.items():
        if method.filter is not None:
            found[f"{name}-filter"] = method.filter.program(
                model, prompt=prompt, batch_size=batch_size
            )
        found[f"{name}-prefill"] = prefill_program(model, plans[name])
        found[f"{name}-decode"] = decode_program(model, plans[name])
    return found
