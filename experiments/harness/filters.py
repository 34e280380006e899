"""Studies of what cuts a prompt: which layer finds needles, and the time it takes."""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.harness import plots
from experiments.harness.comparison import keep
from experiments.harness.report import Column, percent, seconds
from experiments.harness.run import Run
from jmem.evaluate.compare import Part
from jmem.evaluate.needle import Needles
from jmem.generate.programs import prefill_program
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter, filter_program, layer_recall, split
from jmem.models.decoder import Decoder
from jmem.offload import on_device
from jmem.program import Program

FOUND = 0.95
"""Mean recall from which on a layer counts as one that finds the needles."""


def calibrate(
    run: Run,
    model: Decoder,
    params: dict,
    vary: Callable[[int], Sequence[GemFilter]],
    tasks: Sequence[Needles],
    *,
    batch_size: int,
    names: Sequence[str],
    title: str,
) -> int:
    """The first layer that finds the needles, by the first of the filters.

    `vary(length)` are filters for prompts of that length, as many as `names`.
    """

    def measure(task: Needles, places: Sequence[int]) -> dict[str, np.ndarray]:
        prompts = [task.rows[place] for place in places]
        spans = [task.cases[place].span for place in places]
        gems = vary(task.prompt)
        return {"recall": layer_recall(model, params, gems, prompts, spans)}

    parts = [
        Part(
            f"calibration {task.prompt} {number}",
            *(task, prompts, functools.partial(measure, task, prompts.places)),
        )
        for task in tasks
        for number, prompts in enumerate(task.batches(batch_size))
    ]
    found = [
        np.asarray(values["recall"]) * len(part.prompts.places)
        for part, values in keep(run, parts)
    ]
    count = sum(map(len, tasks))
    recall = np.sum(found, axis=0) / count
    layer = choose_layer(recall[0])
    run.table(
        "Recall of the needle by layer",
        ["layer", *(Column(name, percent) for name in names)],
        [(index, *row) for index, row in enumerate(recall.T.tolist())],
    )
    first = f"the first that keeps {FOUND:.0%}" if recall[0][layer] >= FOUND else "best"
    run.note(
        f"Filter layer: {layer}, {first} of the needles' tokens ({recall[0][layer]:.0%}"
        f") with {names[0]}, over {count} prompts that are not used again."
    )
    curves = dict(zip(names, recall.tolist()))
    run.plot(
        "recall",
        lambda: plots.by_index(
            *(curves, layer),
            mark=f"layer {layer} is used",
            index_label="layer whose attention chooses",
            label="recall of the needle",
            title=title,
        ),
    )
    return layer


def choose_layer(recall: Float[np.ndarray, " L"]) -> int:
    """The first layer of at least `FOUND`; where there is none, the first of the best.

    >>> found = np.array([0.1, 0.97, 1.0]), np.array([0.1, 0.6, 0.5])
    >>> choose_layer(found[0]), choose_layer(found[1])
    (1, 1)
    """
    return int(np.argmax(recall >= min(FOUND, recall.max())))


def time_fastest(program: Program, *args, donated=None, repeats: int = 2) -> float:
    """Seconds of the fastest of some runs; `donated()` makes the last argument anew."""
    call, taken = program.compile(), []
    for _ in range(repeats):
        given = (*args, donated()) if donated else args
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(call(*given))
        taken.append(time.perf_counter() - start)
    return min(taken)


def report_time(
    run: Run,
    model: Decoder,
    params: dict,
    gem: GemFilter,
    prompts: Sequence[Sequence[int]],
    *,
    kept: Sequence[int],
    name: str,
) -> None:
    """Filter pass and second prefill against the prefill of the whole prompt.

    Of each prompt as many tokens are read again as `kept` says.
    """
    early, rows = on_device(split(params, gem.layer)[0]), []

    def time_prefill(tokens: jax.Array) -> float:
        plan = Full().plan(model, prompt=tokens.shape[1], new_tokens=1)
        given = params, tokens, jnp.array(tokens.shape[1:])
        program = prefill_program(model, plan)
        return time_fastest(program, *given, donated=lambda: plan.method.begin(plan))

    for prompt, left in zip(prompts, kept, strict=True):
        tokens, length = jnp.asarray([prompt], jnp.int32), len(prompt)
        filtering = filter_program(model, gem, prompt=length)
        with run.console.status(f"timing {length:,} tokens"):
            whole = time_prefill(tokens)
            first = time_fastest(filtering, early, tokens, jnp.array([length]))
            second = time_prefill(tokens[:, :left])
        both = (first + second) / whole
        rows.append((f"{length:,} tokens", whole, first, second, both))
    run.table(
        f"Seconds to the first token on {jax.devices()[0].device_kind}",
        [
            "prompt",
            *(Column(head, seconds) for head in ("whole prefill", "filter pass", name)),
            Column("both, of whole", percent),
        ],
        rows,
    )
    run.note(
        "The fastest of two runs, one prompt at a time, without compiling. The filter "
        f"pass reads {gem.layer} of {model.config.layers} layers; both is that and the "
        "prefill of what it kept."
    )
