"""Studies of what cuts a prompt: the time it takes, and what is left of a prompt."""

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from experiments.harness.report import Column, make_columns, percent, seconds
from experiments.harness.run import Run
from jmem.data.needle import NeedleCase
from jmem.generate.decode import generate
from jmem.generate.programs import prefill_program
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter, StagedWeights, explain, split
from jmem.memory.report import format_size
from jmem.models.decoder import Decoder
from jmem.offload import count_host_bytes, on_device
from jmem.program import Program

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def report_time(
    run: Run,
    model: Decoder,
    params: dict,
    gem: GemFilter,
    prompts: Sequence[Sequence[int]],
    kept: Sequence[int],
    again: str,
) -> None:
    """Filter pass and second prefill against the prefill of the whole prompt.

    Of each prompt as many tokens are read again as `kept` says; `again` names that.
    """
    early, rows = on_device(split(params, gem.layer)[0]), []

    def time_prefill(tokens: jax.Array) -> float:
        plan = Full().plan(model, prompt=tokens.shape[1], new_tokens=1)
        given = params, tokens, jnp.array(tokens.shape[1:])
        program = prefill_program(model, plan)
        return time_fastest(program, *given, donated=lambda: plan.method.begin(plan))

    for prompt, left in zip(prompts, kept, strict=True):
        tokens, length = jnp.asarray([prompt], jnp.int32), len(prompt)
        filtering = gem.program(model, prompt=length)
        with run.console.status(f"timing {length:,} tokens"):
            whole = time_prefill(tokens)
            first = time_fastest(filtering, early, tokens, jnp.array([length]))
            second = time_prefill(tokens[:, :left])
        both = (first + second) / whole
        rows.append((f"{length:,} tokens", whole, first, second, both))
    times = make_columns(seconds, "whole prefill", "filter pass", again)
    title = f"Seconds to the first token on {jax.devices()[0].device_kind}"
    run.table(title, ["prompt", *times, Column("both, of whole", percent)], rows)
    run.note(
        "The fastest of two runs, one prompt at a time, without compiling. The filter "
        f"pass reads {gem.layer} of {model.config.layers} layers; both is that and the "
        "prefill of what it kept."
    )


def time_fastest(program: Program, *args, donated=None) -> float:
    """Seconds of the faster of two runs; `donated()` makes the last argument anew."""
    call, taken = program.compile(), []
    for _ in range(2):
        given = (*args, donated()) if donated else args
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(call(*given))
        taken.append(time.perf_counter() - start)
    return min(taken)


def report_kept(
    run: Run,
    model: Decoder,
    params: dict,
    gem: GemFilter,
    case: NeedleCase,
    *,
    tokenizer: "Tokenizer",
    steps: int,
) -> None:
    """One prompt: the text that is kept, and its answer from staged weights.

    Consumes `params`.
    """
    ask = functools.partial(generate, model, max_new_tokens=steps)
    expected = ask(params, [case.tokens], shorten=gem)
    staged = StagedWeights(params, gem)
    rows = [weigh_phase("filter pass", staged.early, staged.late)]
    with staged.filter_prompts(model, [case.tokens]) as (whole, short):
        rows.append(weigh_phase("answer", whole, staged.late))
        found = ask(whole, short.prompts())
    rows.append(weigh_phase("next filter pass", staged.early, staged.late))
    text = explain(case.tokens, short.positions[0], short.scores[0], tokenizer)
    run.note(
        f"What layer {gem.layer} keeps of a prompt of {case.length:,} tokens (ends), "
        f"and each span's mean score:\n{text}\nAnswer: "
        f"{tokenizer.decode(found[0])!r}, hidden was {case.answer!r}."
    )
    title = "Weights of that answer, of which the late part waits on the host"
    run.table(
        title,
        ["phase", *make_columns(format_size, "on the device", "on the host")],
        rows,
    )
    same = "the same as" if found == expected else "OTHER THAN"
    run.note(f"Its tokens are {same} those with all weights on the device throughout.")


def weigh_phase(phase: str, *trees: Any) -> tuple[str, int, int]:
    """A row of a table: a phase, and the bytes of its arrays on device and host."""
    host = count_host_bytes(trees)
    return phase, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) - host, host
