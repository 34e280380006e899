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
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import jmem
import jmem.checkpoints
import jmem.data
from experiments.harness import cli, plots
from experiments.harness.journal import Journal, told
from experiments.harness.models import attached, dimensions
from experiments.harness.report import DASH, Column, percent, seconds
from experiments.harness.run import Run
from jmem.data.needle import Haystack, NeedleCase
from jmem.evaluate import needle
from jmem.evaluate.decoding import answers
from jmem.evaluate.interval import wilson
from jmem.generate.decode import generate
from jmem.generate.programs import decode_program, prefill_program
from jmem.kvcache.budget import fitted
from jmem.kvcache.cache import empty
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import (
    GemFilter,
    StagedWeights,
    best,
    explain,
    filter_program,
    layer_recall,
    split,
    token_scores,
    votes,
)
from jmem.kvcache.plan import Plan
from jmem.kvcache.snapkv import SnapKV
from jmem.memory import report
from jmem.models.decoder import PRECISIONS, Decoder, Precision
from jmem.offload import host_bytes, on_device
from jmem.program import Program
from jmem.targets import Target

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOUND = 0.95
"""Mean recall from which on a layer counts as one that finds the needles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to run, "smollm2-135m" or a checkpoint's path."""
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
    dtype: Precision = "bfloat16"
    """Of weights, activations and caches in those."""
    run_dtype: Precision = "float32"
    """As `dtype`, in what runs here."""
    gpu: str = "h200"
    """GPU that is compiled for: a name, or a TOML file of your own."""

    def __post_init__(self):
        least = {"window": 1, "batch_size": 1, "prompt_tokens": 1, "new_tokens": 1}
        least |= {"keep_first": 0, "keep_last": 0, "chunk": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(
                    f"gemfilter: {name}={getattr(self, name)}; need >= {bound}."
                )
        lists = ("shares", "lengths", "depths", "seeds")
        for name in (*lists, "calibration_lengths", "calibration_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"gemfilter: {name}={values} must name at least one, none twice."
                )
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(
                    f"gemfilter: shares={share} must lie within (0, 1), as 0.125."
                )
        if both := set(self.seeds) & set(self.calibration_seeds):
            raise ValueError(
                f"gemfilter: calibration_seeds={self.calibration_seeds} share {both} "
                "with seeds; a layer must not be chosen on what it is judged by."
            )


# Memory on a GPU ----------------------------------------------------------------------


def sized(nbytes: int | None) -> str:
    """Bytes in the unit that suits them."""
    return DASH if nbytes is None else report.sized(nbytes)


def build(config: Config, target: Target) -> Decoder:
    """The model as it is compiled for the described GPU."""
    dims, precision = dimensions(config.model), PRECISIONS[config.dtype]
    model = Decoder.on(target, dims, **precision, remat="none")
    return dataclasses.replace(model, chunk=config.chunk or None)


def programs(config: Config, target: Target) -> dict[str, Program]:
    """The phases of an answer: `<method>-prefill`, `-decode` and GemFilter's `-filter`.

    `gemfilter-filter` is given the weights it reads, `gemfilter-resident` all of them.
    """
    model, gem = build(config, target), config.gemfilter
    kept = min(gem.tokens, config.prompt_tokens)
    size = {"new_tokens": config.new_tokens, "target": target}
    snapkv = dataclasses.replace(config.snapkv, capacity=gem.tokens)
    plans = {
        "standard": Full().plan(model, prompt=config.prompt_tokens, **size),
        "snapkv": snapkv.plan(model, prompt=config.prompt_tokens, **size),
        "gemfilter": Full().plan(model, prompt=kept, **size),
    }
    first = filter_program(model, gem, prompt=config.prompt_tokens)
    whole = (model.abstract(), *first.args[1:])
    found = {
        "gemfilter-filter": first,
        "gemfilter-resident": dataclasses.replace(first, args=whole, make=None),
    }
    for name, plan in plans.items():
        found[f"{name}-prefill"] = prefill_program(model, plan)
        found[f"{name}-decode"] = decode_program(model, plan)
    return found


def report_memory(config: Config, run: Run) -> None:
    """What the phases of an answer hold on the described GPU, and the most of them."""
    for name, program in programs(config, run.target).items():
        with run.console.status(f"compiling {name}"):
            found = jmem.measure(program, target=run.target, bounds=run.measure_only)
        run.record(found, name)
    device = {name: found.device_bytes for name, found in run.memory.items()}
    weights = {name: found.by_label["weights"] for name, found in run.memory.items()}
    late = weights["gemfilter-resident"] - weights["gemfilter-filter"]

    def line(name: str, method: str, first: str | None, host: int):
        phases = [device[first] if first else None]
        phases += [device[f"{method}-{phase}"] for phase in ("prefill", "decode")]
        return name, *phases, max(filter(None, phases)), host

    run.table(
        f"Memory of an answer on {run.target.name}",
        [
            "method",
            *(Column(n, sized) for n in ("filter pass", "prefill", "decode", "peak")),
            Column("on the host", sized),
        ],
        [
            line("standard", "standard", None, 0),
            line("snapkv", "snapkv", None, 0),
            line("gemfilter", "gemfilter", "gemfilter-filter", late),
            line("gemfilter, all resident", "gemfilter", "gemfilter-resident", 0),
        ],
    )
    gem, sizes = config.gemfilter, f"{config.prompt_tokens:,} + {config.new_tokens:,}"
    attention = build(config, run.target).attention
    chunks = f"{config.chunk:,} tokens" if config.chunk else "all tokens"
    run.note(
        f"{config.model}, {sizes} tokens, {config.dtype}, {attention} attention, "
        f"{chunks} at a time in the MLP. GemFilter chooses {gem.tokens:,} tokens in "
        f"layer {gem.layer}, meanwhile the weights above are in host memory; SnapKV "
        "keeps as many of each head. The peak is that of the phase that needs most."
    )
    if not run.measure_only:
        run.note(
            "Compiled once; --measure-only adds the interval of Triton's products."
        )
    title = f"{config.model}, {sizes} tokens"
    run.plot("memory", lambda: plots.memory(run.memory, title=title))


# What runs here -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """All that a run needs, opened and checked."""

    checkpoint: jmem.checkpoints.Checkpoint
    tokenizer: "Tokenizer"
    model: Decoder
    calibration: Sequence[NeedleCase]
    cases: Sequence[NeedleCase]

    @property
    def steps(self) -> int:
        """Tokens of an answer."""
        return needle.answer_steps(self.cases)


def open_bench(config: Config) -> Bench:
    """Reads everything but the weights, and refuses what cannot work."""
    dims, precision = dimensions(config.model), PRECISIONS[config.run_dtype]
    model = Decoder.on(attached(), dims, **precision, remat="none")
    checkpoint = jmem.checkpoints.load(config.model, model.stored_dtype)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"gemfilter: {checkpoint.path} holds no tokenizer; put the model's "
            "tokenizer.json beside its config.json."
        )
    texts = jmem.data.python_reference().training
    text = "\n\n".join(document["text"] for document in texts)
    haystack = Haystack(checkpoint.tokenizer, text)

    def cases(lengths, seeds):
        return needle.grid(haystack, lengths=lengths, depths=config.depths, seeds=seeds)

    bench = Bench(
        checkpoint=checkpoint,
        tokenizer=checkpoint.tokenizer,
        model=model,
        calibration=cases(config.calibration_lengths, config.calibration_seeds),
        cases=cases(config.lengths, config.seeds),
    )
    longest = max(*config.lengths, *config.calibration_lengths)
    if longest + bench.steps > dims.max_positions:
        raise ValueError(
            f"gemfilter: prompts of {longest:,} tokens and answers of {bench.steps} "
            f"exceed the {dims.max_positions:,} positions of {config.model}; lower "
            "lengths or calibration_lengths."
        )
    for length in config.lengths:  # what cannot be cut so far is refused here
        contenders(config, bench, length, layer=0)
    return bench


def kept_tokens(config: Config, length: int, share: float) -> int:
    """Of a prompt, in whole windows, so that every variant keeps as many."""
    return max(int(share * length) // config.window, 1) * config.window


def variants(config: Config, *, layer: int, tokens: int) -> dict[str, GemFilter]:
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


type Part = tuple[Int[np.ndarray, " N"], Int[np.ndarray, "B T"]]
"""Places of some cases, and their prompts."""


def _tokens(part: Part) -> int:
    return part[1].size


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    bench = open_bench(config)
    params = bench.checkpoint.params()
    journal = Journal(run.folder, resume=run.resume)
    layer = calibrate(config, run, bench, params, journal)
    report_needles(config, run, bench, grid(config, run, bench, params, layer, journal))
    report_time(config, run, bench, params, layer)
    report_kept(config, run, bench, params, layer)
    run.note(
        f"Run here: {config.run_dtype}, {bench.model.attention} attention, on "
        f"{jax.devices()[0].device_kind}. Measured below are other programs: "
        f"{config.dtype}, for {config.gpu}."
    )
    gem = dataclasses.replace(config.gemfilter, layer=layer)
    report_memory(dataclasses.replace(config, gemfilter=gem), run)


# The filter layer ---------------------------------------------------------------------


def calibrate(config, run: Run, bench: Bench, params: dict, journal: Journal) -> int:
    """The first layer that finds the needles of the calibration prompts."""

    def measure(cases: Sequence[NeedleCase]) -> dict[str, np.ndarray]:
        gems = [
            dataclasses.replace(
                config.gemfilter, tokens=kept_tokens(config, cases[0].length, share)
            )
            for share in config.shares
        ]
        prompts = [case.tokens for case in cases]
        spans = [case.span for case in cases]
        return {"recall": layer_recall(bench.model, params, gems, prompts, spans)}

    parts = list(needle.batches(bench.calibration, config.batch_size))
    found = []
    for places, _ in told(run, parts, name=lambda _: "calibration", size=_tokens):
        cases = [bench.calibration[place] for place in places]
        make = functools.partial(measure, cases)
        recall = journal(f"calibration {places.tolist()}", make)["recall"]
        found.append(np.asarray(recall) * len(cases))
    recall = np.sum(found, axis=0) / len(bench.calibration)
    layer = chosen(recall[0])
    names = [f"{100 * share:g} % kept" for share in config.shares]
    run.table(
        "Recall of the needle by layer",
        ["layer", *(Column(name, percent) for name in names)],
        [(index, *row) for index, row in enumerate(recall.T.tolist())],
    )
    first = f"the first that keeps {FOUND:.0%}" if recall[0][layer] >= FOUND else "best"
    run.note(
        f"Filter layer: {layer}, {first} of the needles' tokens ({recall[0][layer]:.0%}"
        f") with {names[0]}, over {len(bench.calibration)} prompts that are not used "
        "again."
    )
    title = f"{config.model}: share of the needle's tokens among those kept"
    curves = dict(zip(names, recall.tolist()))
    run.plot("recall", lambda: recall_figure(curves, layer, title=title))
    return layer


def chosen(recall: Float[np.ndarray, " L"]) -> int:
    """The first layer of at least `FOUND`; where there is none, the first of the best.

    >>> chosen(np.array([0.1, 0.97, 1.0])), chosen(np.array([0.1, 0.6, 0.5]))
    (1, 1)
    """
    return int(np.argmax(recall >= min(FOUND, recall.max())))


def recall_figure(
    curves: Mapping[str, Sequence[float]], layer: int, *, title: str
) -> Any:
    """Recall against layer, a curve for each number of tokens kept."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8.0, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E8E8E8", linewidth=0.7)
    axes.axvline(layer, color=plots.INK, linewidth=1.2, linestyle=(0, (6, 3)))
    axes.annotate(
        f" layer {layer} is used",
        (layer, 0.02),
        color=plots.INK,
        fontsize=9,
        xycoords=("data", "axes fraction"),
    )
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(
            range(len(values)),
            values,
            label=name,
            color=plots.CURVES[index % len(plots.CURVES)],
            linestyle=plots.DASHES[index % len(plots.DASHES)],
            linewidth=1.9,
            marker=plots.MARKERS[index % len(plots.MARKERS)],
            markersize=5,
            markeredgecolor="white",
        )
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer whose attention chooses")
    axes.set_ylabel("recall of the needle")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure


# Needles ------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a contender did with every case, in their order."""

    hits: Bool[np.ndarray, " N"]
    needle: Float[np.ndarray, " N"] | None = None
    """Share of the needle's tokens that the filter kept."""
    last: Bool[np.ndarray, " N"] | None = None
    """Whether it kept the prompt's last token."""


def label(name: str, share: float) -> str:
    """A contender that keeps a share, as tables name it.

    >>> label("ends", 0.125)
    'ends 12.5 %'
    """
    return f"{name} {100 * share:g} %"


def full_plan(config: Config, bench: Bench, prompt: int) -> Plan:
    """Of the full cache for a batch of prompts of one length, and their answers."""
    return Full().plan(
        bench.model,
        prompt=prompt,
        new_tokens=bench.steps,
        batch_size=config.batch_size,
    )


def contenders(
    config: Config, bench: Bench, length: int, *, layer: int
) -> tuple[dict[str, Plan], dict[str, GemFilter]]:
    """The caches of whole prompts of `length` tokens, and the filters, by name.

    Raises:
      ValueError: a share is too small for SnapKV's window or for a variant's ends.
    """
    plans, filters = {"full": full_plan(config, bench, length)}, {}
    for share in config.shares:
        kept = kept_tokens(config, length, share)
        nbytes = full_plan(config, bench, kept).bytes()
        model, rows, new = bench.model, config.batch_size, bench.steps
        try:
            gems = variants(config, layer=layer, tokens=kept)
            snapkv = fitted(
                *(config.snapkv, model, nbytes),
                prompt=length,
                new_tokens=new,
                batch_size=rows,
            )
        except ValueError as error:
            raise ValueError(
                f"gemfilter: shares={share:g} of a prompt of {length:,} tokens: {error}"
            ) from error
        plans[label("snapkv", share)] = snapkv.plan(
            model, prompt=length, new_tokens=new, batch_size=rows
        )
        filters |= {label(name, share): gem for name, gem in gems.items()}
    return plans, filters


@functools.partial(jax.jit, static_argnames=("model", "gems"))
def _filtered(model, params, gems: tuple[GemFilter, ...], tokens, lengths):
    """Positions that each of several filters of one layer keeps, by one pass."""
    cast = votes(model, params, gems[0], tokens, lengths)
    return [best(g, token_scores(g, *cast, lengths), lengths) for g in gems]


def grid(
    config, run: Run, bench: Bench, params: dict, layer: int, journal: Journal
) -> dict[str, Answers]:
    """Every contender's answers to all cases."""
    parts = list(needle.batches(bench.cases, config.batch_size))
    rows: dict[str, list[np.ndarray]] = {}
    for places, tokens in told(run, parts, name=lambda _: "needles", size=_tokens):
        cases = [bench.cases[place] for place in places]
        make = functools.partial(answered, config, bench, params, layer, tokens, cases)
        for name, values in journal(f"needles {places.tolist()}", make).items():
            rows.setdefault(name, []).append(np.asarray(values))
    found = {}
    for name, values in rows.items():
        hits, kept, last = np.concatenate(values, axis=1)
        filtered = name != "full" and not name.startswith("snapkv")
        own = (kept, last.astype(bool)) if filtered else ()
        found[name] = Answers(hits.astype(bool), *own)
    return found


def answered(
    config,
    bench: Bench,
    params: dict,
    layer: int,
    tokens: Int[np.ndarray, "B T"],
    cases: Sequence[NeedleCase],
) -> dict[str, Float[np.ndarray, "3 N"]]:
    """Hits, share of the needle kept and whether the last token is, by contender.

    The prompts are those of `cases`, filled up to a whole batch. One prefill serves
    the full cache and SnapKV's, one filter pass all filters.
    """
    model, (batch, length) = bench.model, tokens.shape
    lengths = np.full(batch, length, np.int32)
    plans, filters = contenders(config, bench, length, layer=layer)

    def judged(produced, *kept):
        hits = needle.hits(bench.tokenizer, cases, produced[: len(cases)])
        kept = kept or (hits, hits)  # nothing was filtered
        return np.stack([hits, *kept]).astype(float)

    ask = functools.partial(answers, model, params, steps=bench.steps)
    found = {name: judged(r) for name, r in ask(plans, tokens, lengths).items()}
    positions = _filtered(model, params, tuple(filters.values()), tokens, lengths)
    spans = np.array([case.span for case in cases])[:, :, None]
    for (name, gem), chosen in zip(filters.items(), map(np.asarray, positions)):
        short = np.take_along_axis(tokens, chosen, axis=1)
        plan = full_plan(config, bench, gem.tokens)
        full = np.full(batch, gem.tokens, np.int32)
        [produced] = ask({name: plan}, short, full).values()
        own = chosen[: len(cases)]
        inside = (own >= spans[:, 0]) & (own < spans[:, 1])
        share = inside.sum(axis=1) / (spans[:, 1] - spans[:, 0])[:, 0]
        found[name] = judged(produced, share, own[:, -1] == length - 1)
    return found


def report_needles(
    config: Config, run: Run, bench: Bench, found: Mapping[str, Answers]
) -> None:
    """Needles answered, with intervals, and a map of them by length and depth."""
    lengths = np.array([case.length for case in bench.cases])

    def line(name: str, own: Answers):
        hits, cells = int(own.hits.sum()), len(own.hits)
        kept = [None if x is None else float(x.mean()) for x in own[1:]]
        return name, hits, cells, hits / cells, *wilson(hits, cells), *kept

    run.table(
        "Needles answered",
        [
            *("contender", "hits", "of"),
            *(Column(n, percent) for n in ("share", "low", "high")),
            *(Column(f"{n} kept", percent) for n in ("needle", "last token")),
        ],
        [line(name, own) for name, own in found.items()],
    )
    run.note(
        f"{len(config.lengths)} lengths x {len(config.depths)} depths x "
        f"{len(config.seeds)} seeds; low and high bound the share (Wilson, 95 %). "
        '"as given" is the configured filter, "ends" also keeps the first '
        f"{config.keep_first} and the last {config.keep_last} tokens, which are the "
        f'question, "probability" scores by attention weights, "windows" keeps '
        f"{config.window} tokens in a row or none. SnapKV has the bytes of the "
        "filtered prompts' caches."
    )
    depths = np.array([case.depth for case in bench.cases])

    def cells(own: Answers):
        at = [
            [own.hits[(lengths == n) & (depths == d)] for n in config.lengths]
            for d in config.depths
        ]
        return [[(int(cell.sum()), len(cell)) for cell in row] for row in at]

    first = label("", config.shares[0])
    drawn = {n: own for n, own in found.items() if n == "full" or n.endswith(first)}
    run.plot(
        "needles",
        lambda: plots.cells(
            {name: cells(own) for name, own in drawn.items()},
            rows=[f"{depth:g}" for depth in config.depths],
            columns=[f"{n:,}" for n in config.lengths],
            row_label="depth of the needle",
            column_label="tokens of the prompt",
            title=f"{config.model}: needles answered",
        ),
    )


# Time ---------------------------------------------------------------------------------


def fastest(call: Callable[[], Any], repeats: int = 2) -> float:
    """Seconds of the fastest of some runs."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def report_time(
    config: Config, run: Run, bench: Bench, params: dict, layer: int
) -> None:
    """Filter pass and second prefill against the prefill of the whole prompt."""
    model, share = bench.model, config.shares[0]
    early = on_device(split(params, layer)[0])

    def prefill(tokens: Int[Array, "1 T"]) -> float:
        plan = Full().plan(model, prompt=tokens.shape[1], new_tokens=bench.steps)
        call = prefill_program(model, plan).compile()
        length = jnp.array(tokens.shape[1:])
        return fastest(lambda: call(params, tokens, length, empty(plan)))

    def filtering(tokens: Int[Array, "1 T"]) -> float:
        gem = dataclasses.replace(config.gemfilter, layer=layer)
        call = filter_program(model, gem, prompt=tokens.shape[1]).compile()
        length = jnp.array(tokens.shape[1:])
        return fastest(lambda: call(early, tokens, length))

    rows = []
    for length in config.lengths:
        case = next(case for case in bench.cases if case.length == length)
        tokens = jnp.asarray([case.tokens], jnp.int32)
        with run.console.status(f"timing {length:,} tokens"):
            whole, first = prefill(tokens), filtering(tokens)
            second = prefill(tokens[:, : kept_tokens(config, length, share)])
        both = (first + second) / whole
        rows.append((f"{length:,} tokens", whole, first, second, both))
    names = ("whole prefill", "filter pass", f"prefill of {100 * share:g} %")
    run.table(
        f"Seconds to the first token on {jax.devices()[0].device_kind}",
        [
            "prompt",
            *(Column(name, seconds) for name in names),
            Column("both, of whole", percent),
        ],
        rows,
    )
    run.note(
        "The fastest of two runs, one prompt at a time, without compiling. The filter "
        f"pass reads {layer} of {model.config.layers} layers; both is that and the "
        "prefill of what it kept."
    )


# What was kept ------------------------------------------------------------------------


def report_kept(
    config: Config, run: Run, bench: Bench, params: dict, layer: int
) -> None:
    """One prompt: the text that is kept, and its answer from staged weights.

    Consumes `params`.
    """
    middle = min(bench.cases, key=lambda case: (abs(case.depth - 0.5), case.length))
    tokens = kept_tokens(config, middle.length, config.shares[0])
    gem = variants(config, layer=layer, tokens=tokens)["ends"]
    model, decode = bench.model, bench.tokenizer.decode
    ask = functools.partial(generate, model, max_new_tokens=bench.steps)
    expected = ask(params, [middle.tokens], shorten=gem)
    staged = StagedWeights(params, gem)
    rows = [placed("filter pass", staged.early, staged.late)]
    with staged.filtered(model, [middle.tokens]) as (whole, short):
        rows.append(placed("answer", whole, staged.late))
        found = ask(whole, short.prompts())
    rows.append(placed("next filter pass", staged.early, staged.late))
    text = explain(middle.tokens, short.positions[0], short.scores[0], bench.tokenizer)
    run.note(
        f"What layer {layer} keeps of a prompt of {middle.length:,} tokens (ends), and "
        f"each span's mean score:\n{text}\nAnswer: {decode(found[0])!r}, hidden was "
        f"{middle.answer!r}."
    )
    run.table(
        "Weights of that answer, of which the late part waits on the host",
        ["phase", Column("on the device", sized), Column("on the host", sized)],
        rows,
    )
    same = "the same as" if found == expected else "OTHER THAN"
    run.note(f"Its tokens are {same} those with all weights on the device throughout.")


def placed(phase: str, *trees: Any) -> tuple[str, int, int]:
    """A phase, and the bytes of its arrays on the device and on the host."""
    host = host_bytes(trees)
    return phase, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) - host, host


if __name__ == "__main__":
    cli.run(main, Config)
