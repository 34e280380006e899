"""GemFilter: which layer finds a needle, what is then answered, time and memory.

    python -m experiments.gemfilter            SmolLM2-135M on this machine (8 minutes)
    python -m experiments.gemfilter --preset llama31_8b_128k --measure-only --gpu h200
    python -m experiments.gemfilter --model ./my-checkpoint --lengths 4096 --gpu l4

Paper   Shi et al., GemFilter, 2024, arXiv:2409.17422, figure 1 (memory and time by
        phase), its study of layers, and needle in a haystack.
Expect  Recall of a needle jumps to 1 at a middle layer. Filtered by that layer, answers
        stay those of the whole prompt, but where the filter drops the question: then
        the model goes on from another sentence. For 131,072 tokens of Llama-3.1-8B the
        filter pass takes at most 11.2 GB of an H200.

Calibration and test share no text drawn and no needle. Every variant keeps the same
number of tokens of a prompt, and SnapKV as many bytes of its cache. What runs here is
compared on this machine; memory is that of the same programs compiled for `gpu`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import jmem.data
from experiments.harness import cli, filters, memory, plots
from experiments.harness.comparison import Trial, examine, prepare
from experiments.harness.journal import keep
from experiments.harness.needles import report_answered
from experiments.harness.report import make_columns, percent, share
from experiments.harness.run import Run
from experiments.harness.settings import Card, Here, Weights, need
from jmem.checkpoints import Checkpoint
from jmem.data.needle import Haystack
from jmem.evaluate.compare import Part
from jmem.evaluate.needle import FilteredNeedles, hide_needles
from jmem.evaluate.programs import build_programs
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter, measure_layer_recall
from jmem.kvcache.gemfilter.study import FOUND, choose_layer
from jmem.kvcache.snapkv import SnapKV
from jmem.memory.report import format_size
from jmem.models.decoder import Decoder
from jmem.program import Program
from jmem.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Here, Card, Weights):
    gemfilter: GemFilter = GemFilter(layer=21, tokens=256)
    """As it is in the programs compiled for `gpu`. What runs here takes the layer that
    calibration finds, and `shares` of a prompt for its number of tokens."""
    snapkv: SnapKV = SnapKV(window=4, kernel=13)
    """The baseline, as experiments.kvcache has it; its capacity there is
    `gemfilter.tokens`, here what fits the bytes of the filtered prompt's cache."""
    shares: tuple[float, ...] = (1 / 8, 1 / 16)
    """Of a prompt, what is kept. The first is what the layer is chosen by, and whose
    needles are drawn cell by cell."""
    keep_first: int = 4
    """Leading tokens that the variants "ends" keep."""
    keep_last: int = 12
    """Final ones: the question."""
    window: int = 4
    """Tokens that the variant "windows" keeps or drops together."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of the prompts that needles are hidden in."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the prompt, from its front to its end."""
    seeds: tuple[int, ...] = (0, 1)
    """Each draws a text and a needle for every length."""
    calibration_lengths: tuple[int, ...] = (512, 1024)
    """As `lengths`, of the prompts that the layer is chosen by."""
    calibration_seeds: tuple[int, ...] = (1000,)
    """As `seeds`; none of them."""
    batch_size: int = 5
    """Prompts read together."""
    prompt_tokens: int = 2048
    """Of the programs compiled for `gpu`."""
    new_tokens: int = 64
    """Room for an answer in those."""
    chunk: int = 4096
    """Tokens of a row that those handle at a time where each is handled alone; 0: all
    at once."""

    def __post_init__(self):
        need(self, "window", "batch_size", "prompt_tokens", "new_tokens", least=1)
        need(self, "keep_first", "keep_last", "chunk", least=0)
        listed: dict[str, Any] = {"some": True, "once": True}
        need(self, "shares", above=0, below=1, **listed)
        need(self, "depths", least=0, most=1, **listed)
        need(self, "lengths", "calibration_lengths", least=1, **listed)
        need(self, "seeds", "calibration_seeds", least=0, **listed)
        if both := set(self.seeds) & set(self.calibration_seeds):
            raise ValueError(
                f"gemfilter: calibration_seeds={self.calibration_seeds} share {both} "
                "with seeds; a layer must not be chosen on what it is judged by."
            )

    def count_kept(self, length: int, share: float) -> int:
        """Tokens kept of a prompt: whole windows, so that all variants keep as many."""
        return max(int(share * length) // self.window, 1) * self.window


# Memory on a GPU ----------------------------------------------------------------------


def programs(config: Config, target: Target) -> dict[str, Program]:
    """The phases of an answer: `<method>-prefill`, `-decode` and GemFilter's `-filter`.

    `gemfilter-filter` is given the weights it reads, `gemfilter-resident` all of them.
    """
    model = config.build(target, config.dimensions(), chunk=config.chunk)
    gem = config.gemfilter
    snapkv = config.snapkv.resize(gem.tokens)
    found = build_programs(
        *(model, {"standard": Full(), "snapkv": snapkv, "gemfilter": gem}),
        prompt=config.prompt_tokens,
        new_tokens=config.new_tokens,
        target=target,
    )
    first = found["gemfilter-filter"]
    whole = (model.abstract(), *first.args[1:])
    resident = dataclasses.replace(first, args=whole, make=None)
    return {"gemfilter-filter": first, "gemfilter-resident": resident} | found


def list_phases(found: memory.Reports) -> Iterable[Sequence[Any]]:
    """Of each method the bytes of its phases, the most of them, and the host's."""
    weights = {name: own.by_label["weights"] for name, own in found.items()}
    late = weights["gemfilter-resident"] - weights["gemfilter-filter"]
    for name, first, host in (
        ("standard", None, 0),
        ("snapkv", None, 0),
        ("gemfilter", "gemfilter-filter", late),
        ("gemfilter, all resident", "gemfilter-resident", 0),
    ):
        method = name.partition(",")[0]
        phases = [first, f"{method}-prefill", f"{method}-decode"]
        peaks = [found[phase].device_bytes if phase else None for phase in phases]
        yield name, *peaks, max(filter(None, peaks)), host


def report_memory(config: Config, run: Run) -> None:
    """What the phases of an answer hold on the described GPU, and the most of them."""
    gem, sizes = config.gemfilter, f"{config.prompt_tokens:,} + {config.new_tokens:,}"
    model = config.build(run.target, config.dimensions())
    chunks = f"{config.chunk:,} tokens" if config.chunk else "all tokens"
    phases = make_columns(
        format_size, "filter pass", "prefill", "decode", "peak", "on the host"
    )
    memory.report(
        *(run, programs(config, run.target)),
        title=f"Memory of an answer on {run.target.name}",
        columns=["method", *phases],
        rows=list_phases,
        note=f"{config.model}, {sizes} tokens, {config.dtype}, {model.attention} "
        f"attention, {chunks} at a time in the MLP. GemFilter chooses {gem.tokens:,} "
        f"tokens in layer {gem.layer}, meanwhile the weights above are in host memory; "
        "SnapKV keeps as many of each head. The peak is that of the phase that needs "
        "most.",
        picture=f"{config.model}, {sizes} tokens",
        bounds=run.measure_only,
    )
    if not run.measure_only:
        run.note(
            "Compiled once; --measure-only adds the interval of Triton's products."
        )


# What runs here -----------------------------------------------------------------------


class Bench(NamedTuple):
    """All that a run needs, opened and checked."""

    checkpoint: Checkpoint
    model: Decoder
    calibration: Sequence[FilteredNeedles]
    tasks: Sequence[FilteredNeedles]
    """One a length, as are those of the calibration."""


def open_bench(config: Config) -> Bench:
    """Reads everything but the weights, and refuses what cannot work."""
    model = config.build_here(config.dimensions())
    checkpoint, tokenizer = config.open(model)
    texts = jmem.data.python_reference().training
    haystack = Haystack(tokenizer, "\n\n".join(text["text"] for text in texts))
    hide = functools.partial(
        hide_needles, haystack, depths=config.depths, kind=FilteredNeedles
    )
    first, seeds = config.calibration_lengths, config.calibration_seeds
    calibration = hide(lengths=first, seeds=seeds)
    tasks = hide(lengths=config.lengths, seeds=config.seeds)
    bench = Bench(checkpoint, model, calibration, tasks)
    for task in (*tasks, *calibration):
        contend(config, bench, task, layer=0)  # what cannot be cut is refused here
    return bench


def make_variants(config: Config, *, layer: int, tokens: int) -> dict[str, GemFilter]:
    """The filters that are compared, by name.

    Raises:
      ValueError: `tokens` have no room for what a variant always keeps.
    """
    plain = dataclasses.replace(config.gemfilter, layer=layer, tokens=tokens)
    keeping = {"keep_first": config.keep_first, "keep_last": config.keep_last}
    ends = dataclasses.replace(plain, **keeping)
    return {
        "as given": plain,
        "ends": ends,
        "ends, probability": dataclasses.replace(ends, score="probability"),
        "ends, windows": dataclasses.replace(ends, window=config.window),
    }


def contend(
    config: Config, bench: Bench, task: FilteredNeedles, *, layer: int
) -> Trial[FilteredNeedles]:
    """A trial of the filters at each share, and of SnapKV in the bytes of their caches.

    Raises:
      ValueError: a share is too small for SnapKV's window or for a variant's ends.
    """
    rows = min(config.batch_size, len(task))
    size: Any = {"new_tokens": task.steps, "batch_size": rows}
    budgets = {}
    for part in config.shares:
        kept = config.count_kept(task.prompt, part)
        budgets[part] = Full().plan(bench.model, prompt=kept, **size).bytes()
    whole = config.count_kept(task.prompt, 1)
    methods = {
        "snapkv": config.snapkv,
        **make_variants(config, layer=layer, tokens=whole),
    }
    return prepare(task, bench.model, methods, budgets, batch_size=rows)


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    bench = open_bench(config)
    params = bench.checkpoint.params()
    layer = calibrate(config, run, bench, params)
    trials = [contend(config, bench, task, layer=layer) for task in bench.tasks]
    report = functools.partial(
        *(report_answered, run),
        title=f"{config.model}: needles answered",
        note='"as given" is the configured filter, "ends" also keeps the first '
        f"{config.keep_first} and the last {config.keep_last} tokens, which are the "
        f'question, "probability" scores by attention weights, "windows" keeps '
        f"{config.window} tokens in a row or none. SnapKV has the bytes of the "
        "filtered prompts' caches.",
    )
    examine(run, bench.model, params, trials, report)
    report_phases(config, run, bench, params, layer)
    run.note(
        f"Run here: {config.describe(bench.model)}. Measured below are other programs: "
        f"{config.dtype}, for {config.gpu}."
    )
    report_memory(config, run)


# Which layer chooses ------------------------------------------------------------------


def calibrate(config: Config, run: Run, bench: Bench, params: dict) -> int:
    """The first layer that finds the needles, by the filter of the first share.

    A table and a picture show how much each layer finds, by each share.
    """

    def measure(task: FilteredNeedles, places: Sequence[int]) -> dict[str, np.ndarray]:
        prompts = [task.rows[place] for place in places]
        spans = [task.cases[place].span for place in places]
        kept = [config.count_kept(task.prompt, part) for part in config.shares]
        gems = [dataclasses.replace(config.gemfilter, tokens=count) for count in kept]
        return {
            "recall": measure_layer_recall(bench.model, params, gems, prompts, spans)
        }

    parts = [
        Part(
            f"calibration {task.prompt} {number}",
            *(task, prompts, functools.partial(measure, task, prompts.places)),
        )
        for task in bench.calibration
        for number, prompts in enumerate(task.batches(config.batch_size))
    ]
    found = [
        np.asarray(values["recall"]) * len(part.prompts.places)
        for part, values in keep(run, parts)
    ]
    count = sum(map(len, bench.calibration))
    recall = np.sum(found, axis=0) / count  # [shares, layers]
    layer = choose_layer(recall[0])
    names = [f"{share(part)} kept" for part in config.shares]
    rows = [(index, *row) for index, row in enumerate(recall.T.tolist())]
    columns = ["layer", *make_columns(percent, *names)]
    run.table("Recall of the needle by layer", columns, rows)
    first = f"the first that keeps {FOUND:.0%}" if recall[0][layer] >= FOUND else "best"
    run.note(
        f"Filter layer: {layer}, {first} of the needles' tokens ({recall[0][layer]:.0%}"
        f") with {names[0]}, over {count} prompts that are not used again."
    )
    curves = dict(zip(names, recall.tolist()))
    run.plot(
        "recall",
        lambda: plots.draw_by_index(
            *(curves, layer),
            mark=f"layer {layer} is used",
            index_label="layer whose attention chooses",
            label="recall of the needle",
            title=f"{config.model}: share of the needle's tokens among those kept",
        ),
    )
    return layer


# Time and weights of an answer --------------------------------------------------------


def report_phases(
    config: Config, run: Run, bench: Bench, params: dict, layer: int
) -> None:
    """Time of the first prompt of each length; text and weights of one in the middle.

    Both cut to the first share. Consumes `params`.
    """
    part, gem = config.shares[0], dataclasses.replace(config.gemfilter, layer=layer)
    prompts = [task.rows[0] for task in bench.tasks]
    kept = [config.count_kept(len(prompt), part) for prompt in prompts]
    again = f"prefill of {share(part)}"
    filters.report_time(run, bench.model, params, gem, prompts, kept, again)

    cases = [case for task in bench.tasks for case in task.cases]
    middle = min(cases, key=lambda case: (abs(case.depth - 0.5), case.length))
    tokens = config.count_kept(middle.length, part)
    gem = make_variants(config, layer=layer, tokens=tokens)["ends"]
    tokenizer, steps = bench.checkpoint.require_tokenizer(), bench.tasks[0].steps
    answer: Any = {"tokenizer": tokenizer, "steps": steps}
    filters.report_kept(run, bench.model, params, gem, middle, **answer)


if __name__ == "__main__":
    cli.run(main, Config)
