"""Every cache policy at equal bytes: needles, perplexity, LongBench files, GPU memory.

    python -m experiments.kvcache                SmolLM2-135M on this machine (minutes)
    python -m experiments.kvcache --preset long  to the end of its 8,192 positions
    python -m experiments.kvcache --longbench hotpotqa.jsonl trec.jsonl
    python -m experiments.kvcache --preset llama31_8b_128k --measure-only --gpu h200

A budget is a share of the bytes that the full cache takes for the same prompt and
answer; every policy gets the largest capacity whose cache takes no more. GemFilter,
which cuts the prompt, keeps as many tokens as a full cache of those bytes has room for.
(Of LongBench, whose answers may be as long as a budget, a share is of the prompt, and
every cache has room for the answer besides.) One prefill fills the caches of all
policies, and each answers from its own.

Chosen  For SmolLM2-135M, on 40 needles of seeds 100 to 103, which no table shows, in
        512 and 1,024 tokens at 12.5 % of the bytes; a tie goes to what is nearest to
        the paper. SnapKV and PyramidKV find all 40 with kernel 13, which keeps five
        digits together, and a window of the question's last 4 tokens; 31 and 37 with 8
        tokens, fewer with smaller kernels. WindowKV finds 39 with windows of 3 and two
        neighbours on each side (ours), 2 observed tokens and a choice in every layer;
        37 with windows of 4 and one neighbour. `windowkv_grid` is the best that was
        found without neighbours, and keeps 41 of the 58 needles of the default run at
        12.5 % (`--only windowkv windowkv_grid`): a fixed grid cuts a number in two.
        GemFilter's layer is one that finds every needle, early enough to cut the layers
        above (experiments.gemfilter); the prompt's end, the question, stays.
Expect  What is asked for survives a cut of the cache to an eighth by any policy that
        selects (95 % of the needles); of StreamingLLM only what is near the end does.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Int

import jmem
import jmem.checkpoints
import jmem.data
from experiments.harness import cli, plots
from experiments.harness.journal import Journal, told
from experiments.harness.models import attached, dimensions
from experiments.harness.report import Column, gib, loss, percent
from experiments.harness.run import Run
from jmem.checkpoints import Checkpoint
from jmem.data.longbench import TASKS, Example, prompt_tokens, read_longbench
from jmem.data.needle import Haystack, NeedleCase
from jmem.evaluate import needle
from jmem.evaluate.decoding import answers, losses
from jmem.generate.programs import decode_program, prefill_program
from jmem.kvcache.budget import fitted
from jmem.kvcache.full import Full
from jmem.kvcache.gemfilter import GemFilter, filter_program
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import WindowKV
from jmem.models.decoder import PRECISIONS, Decoder, Precision
from jmem.program import Program
from jmem.targets import Target

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Method = Literal[
    "streaming_llm", "snapkv", "pyramidkv", "windowkv", "windowkv_grid", "gemfilter"
]
ENOUGH = 2 / 3
"""Of the cells, what the full cache must answer for the others to be compared."""
KEPT = 0.95
"""Of the needles, what a policy should keep at `PICTURED`; what it loses is told."""
PICTURED = 0.125
"""The share whose needles are drawn cell by cell, or the nearest one that was run."""


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"kvcache: {name}={value}; need >= {least}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The programs compiled for `gpu`, where each policy keeps its own capacity."""

    prompt: int = 2048
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Room for an answer; with none, a new token takes the place of the last one."""
    batch_size: int = 1
    """Prompts read together."""
    chunk: int = 4096
    """Tokens of a row handled at a time where each is handled alone, as by the MLP."""
    dtype: Precision = "bfloat16"
    """Of weights, activations and caches."""

    def __post_init__(self):
        for name in ("prompt", "batch_size", "chunk"):
            _at_least(f"compiled.{name}", getattr(self, name), 1)
        _at_least("compiled.new_tokens", self.new_tokens, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to run, "smollm2-135m" or a checkpoint's path."""
    only: tuple[Method, ...] = ()
    """Policies to compare with the full cache; empty means all but windowkv_grid."""
    full: Full = Full()
    streaming_llm: StreamingLLM = StreamingLLM()
    snapkv: SnapKV = SnapKV(window=4, kernel=13)
    pyramidkv: PyramidKV = PyramidKV(window=4, kernel=13)
    windowkv: WindowKV = WindowKV(
        window=3, observation=2, best=1, group=1, divisor=3, neighbours=2
    )
    windowkv_grid: WindowKV = WindowKV(observation=4, group=5, pyramid="paper")
    """As published, without neighbours: compared where `only` names it."""
    gemfilter: GemFilter = GemFilter(layer=21, keep_last=16)
    shares: tuple[float, ...] = (1 / 16, 1 / 8)
    """Budgets, as shares of the full cache's bytes."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of the prompts that needles are hidden in; empty: no needles."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in the prompt, from its front to its end."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Each draws a text and a needle for every length."""
    passages: int = 8
    """Held-out texts whose continuation is scored; 0: none."""
    passage: int = 896
    """Tokens of such a text that are read."""
    continuation: int = 24
    """Tokens of it that follow, and are scored."""
    longbench: tuple[pathlib.Path, ...] = ()
    """Files in LongBench's format (.jsonl) to be answered and scored."""
    longbench_tokens: int = 2048
    """Longest prompt of theirs; longer ones lose their middle."""
    chat: tuple[str, str] = (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    """What the model's chats have before and after a question, which LongBench's are;
    two empty strings for a model that does not chat."""
    batch_size: int = 20
    """Prompts answered together."""
    read_rows: int = 1
    """Of those, at most this many are read at a time: attention's memory."""
    run_dtype: Precision = "float32"
    """Of weights, activations and caches in what runs here."""
    compiled: Compiled = Compiled()
    gpu: str = "h200"
    """GPU that is compiled for: a name, or a TOML file of your own."""

    def __post_init__(self):
        for name in ("passage", "longbench_tokens", "batch_size", "read_rows"):
            _at_least(name, getattr(self, name), 1)
        _at_least("passages", self.passages, 0)
        _at_least("continuation", self.continuation, 2)
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(
                    f"kvcache: shares={share} must lie within (0, 1); the full cache "
                    "is there in any case."
                )
        for name in ("depths", "seeds", "shares"):
            if not getattr(self, name):
                raise ValueError(f"kvcache: {name} is empty; name at least one.")
        for name in ("lengths", "depths", "seeds", "shares", "only", "longbench"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"kvcache: {name}={values} names one of them twice.")

    @property
    def methods(self) -> tuple[Method, ...]:
        usual = tuple(name for name in get_args(Method) if name != "windowkv_grid")
        return self.only or usual


# Memory on a GPU ----------------------------------------------------------------------


def cache_plans(
    model: Decoder,
    policies: Mapping[str, Policy | GemFilter],
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int = 1,
    target: Target | None = None,
) -> dict[str, PolicyPlan]:
    """The cache of each policy; GemFilter's is a full one of the prompt it leaves."""
    found = {}
    for name, policy in policies.items():
        length, kind = prompt, policy
        if isinstance(kind, GemFilter):
            length, kind = min(prompt, kind.tokens), Full()
        found[name] = kind.plan(
            model,
            prompt=length,
            new_tokens=new_tokens,
            batch_size=batch_size,
            target=target,
        )
    return found


def cache_programs(
    model: Decoder,
    policies: Mapping[str, Policy | GemFilter],
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int = 1,
    target: Target | None = None,
) -> dict[str, Program]:
    """`<name>-prefill` and `<name>-decode` of each policy, and of GemFilter `-filter`.

    The filter is given the weights it reads alone; a GemFilter's prefill reads what the
    filter left. Sizes are those of `Policy.plan`.
    """
    plans = cache_plans(
        model,
        policies,
        prompt=prompt,
        new_tokens=new_tokens,
        batch_size=batch_size,
        target=target,
    )
    found = {}
    for name, policy in policies.items():
        if isinstance(policy, GemFilter):
            found[f"{name}-filter"] = filter_program(
                model, policy, prompt=prompt, batch_size=batch_size
            )
        found[f"{name}-prefill"] = prefill_program(model, plans[name])
        found[f"{name}-decode"] = decode_program(model, plans[name])
    return found


def build(config: Config, target: Target) -> Decoder:
    """The model as it is compiled for the described GPU."""
    asked, dims = config.compiled, dimensions(config.model)
    if asked.prompt + asked.new_tokens > dims.max_positions:
        raise ValueError(
            f"kvcache: compiled.prompt={asked.prompt} + new_tokens={asked.new_tokens} "
            f"exceed the {dims.max_positions:,} positions of {config.model}."
        )
    precision = PRECISIONS[asked.dtype]
    model = Decoder.on(target, dims, **precision, remat="none")
    return dataclasses.replace(model, chunk=asked.chunk)


def _asked(config: Config) -> dict[str, Any]:
    """Policies and sizes of the programs for `gpu`."""
    methods = ("full", *config.methods)
    return {
        "policies": {method: getattr(config, method) for method in methods},
        "prompt": config.compiled.prompt,
        "new_tokens": config.compiled.new_tokens,
        "batch_size": config.compiled.batch_size,
    }


def programs(config: Config, target: Target) -> dict[str, Program]:
    """Prefill and one decoding step of every policy, for `target`."""
    return cache_programs(build(config, target), **_asked(config), target=target)


def report_memory(config: Config, run: Run) -> None:
    """What each policy holds on the described GPU, reading and writing."""
    model, target, asked = build(config, run.target), run.target, config.compiled
    plans = cache_plans(model, **_asked(config), target=target)
    for name, program in programs(config, target).items():
        with run.console.status(f"compiling {name}"):
            report = jmem.measure(program, target=target)
        run.record(report, name)
    device = {name: report.device_bytes for name, report in run.memory.items()}
    parts = ("filter", "prefill", "decode")
    run.table(
        f"Memory on {target.name}",
        [
            "policy",
            Column("cache, planned", mib),
            Column("cache, compiled", mib),
            *(Column(part, gib) for part in parts),
            "decodes by",
        ],
        [
            (
                *(name, plan.bytes()),
                run.memory[f"{name}-prefill"].by_label["kv cache"],
                *(device.get(f"{name}-{part}") for part in parts),
                plan.attention,
            )
            for name, plan in plans.items()
        ],
    )
    what = f"{config.model}, {asked.batch_size} x {asked.prompt:,} tokens"
    run.note(
        f"{what} and room for {asked.new_tokens:,} more, {asked.dtype}; prefill by "
        f"{model.attention} attention, {asked.chunk:,} tokens at a time in the MLP. "
        "Peaks hold the weights; a filter is given only those that it reads."
    )
    run.plot("memory", lambda: plots.memory(run.memory, title=what))


# At equal bytes -----------------------------------------------------------------------


class Contender(NamedTuple):
    """A policy cut to a budget, for prompts of one length."""

    method: str
    share: float
    """The budget, of the full cache's bytes; 1 for the full cache itself."""
    plan: PolicyPlan
    gem: GemFilter | None = None
    """What cuts the prompt before it is read into the plan's cache."""


def contenders(
    config: Config,
    model: Decoder,
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int,
    answer_besides: bool = False,
) -> dict[str, Contender]:
    """The full cache, and each policy at each share of its bytes, by name.

    With `answer_besides` a share is of the prompt's bytes alone, and room for the new
    tokens comes on top of it, for all alike.

    Raises:
      ValueError: a share is too small for a policy, which is named with what it needs.
    """
    size: Any = {"prompt": prompt, "new_tokens": new_tokens, "batch_size": batch_size}
    whole = config.full.plan(model, **size)
    shared, besides = whole.bytes(), 0
    if answer_besides:
        shared = config.full.plan(model, **(size | {"new_tokens": 0})).bytes()
        besides = whole.bytes() - shared
    found = {"full": Contender("full", 1.0, whole)}
    for method in config.methods:
        policy = getattr(config, method)
        for share in config.shares:
            nbytes = math.floor(share * shared) + besides
            try:
                if isinstance(policy, GemFilter):
                    gem = _roomy(policy, model, nbytes, **size)
                    plan = Full().plan(model, **(size | {"prompt": gem.tokens}))
                    cut = Contender(method, share, plan, gem)
                else:
                    policy = fitted(policy, model, nbytes, **size)
                    cut = Contender(method, share, policy.plan(model, **size))
            except ValueError as error:
                raise ValueError(
                    f"kvcache: shares={share:g} of the full cache for {prompt:,} + "
                    f"{new_tokens:,} tokens is too little for {method}; raise it, or "
                    f"choose with --only.\n{error}"
                ) from error
            found[label(method, share)] = cut
    return found


def label(method: str, share: float) -> str:
    """A policy at a budget, as tables name it.

    >>> label("snapkv", 0.125)
    'snapkv 12.5 %'
    """
    return f"{method} {_percent(share)}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def mib(nbytes: float) -> str:
    """Bytes as MiB with one decimal."""
    return f"{nbytes / 2**20:,.1f} MiB"


def _roomy(
    gem: GemFilter,
    model: Decoder,
    nbytes: int,
    *,
    prompt: int,
    new_tokens: int,
    batch_size: int,
) -> GemFilter:
    """`gem` that keeps as many tokens as a full cache of `nbytes` has room for."""

    def size(tokens: int) -> int:
        sizes: Any = {"new_tokens": new_tokens, "batch_size": batch_size}
        return Full().plan(model, prompt=tokens, **sizes).bytes()

    fit = (nbytes - size(1)) // (size(2) - size(1)) + 1
    tokens = min(fit, prompt) // gem.window * gem.window
    if tokens < 1:
        raise ValueError(
            f"GemFilter: {nbytes:,} bytes, but a window of {gem.window} tokens and the "
            f"new ones take {size(gem.window):,}."
        )
    return dataclasses.replace(gem, tokens=tokens)


def given(found: Mapping[str, Contender], read_rows: int) -> dict[str, Any]:
    """The contenders as `jmem.evaluate.decoding` takes them."""
    batch = found["full"].plan.batch_size
    rows = max(n for n in range(1, min(read_rows, batch) + 1) if batch % n == 0)
    return {
        "plans": {name: c.plan for name, c in found.items() if c.gem is None},
        "filters": {name: c.gem for name, c in found.items() if c.gem is not None},
        "rows": rows,
    }


def real_share(found: Mapping[str, Contender], name: str) -> float:
    """The bytes of a contender's cache, as a share of the full one's."""
    return found[name].plan.bytes() / found["full"].plan.bytes()


# What is opened, and what is kept -----------------------------------------------------


class Work(NamedTuple):
    """Prompts of one shape that are answered together."""

    name: str
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    places: Sequence[int]
    """Which cases, passages or examples the first rows are; others fill up."""
    found: Mapping[str, Contender]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """All that a run needs, opened and checked; no weights yet."""

    checkpoint: Checkpoint
    tokenizer: "Tokenizer"
    model: Decoder
    cases: Sequence[NeedleCase]
    needles: Sequence[Work]
    passages: Sequence[Work]
    examples: Sequence[Example]
    longbench: Sequence[Work]


def open_bench(config: Config) -> Bench:
    """Reads all but the weights, and refuses what cannot work."""
    dims = dimensions(config.model)
    precision = PRECISIONS[config.run_dtype]
    model = Decoder.on(attached(), dims, **precision, remat="none")
    checkpoint = jmem.checkpoints.load(config.model, model.stored_dtype)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"kvcache: {checkpoint.path} holds no tokenizer; put the model's "
            "tokenizer.json beside its config.json."
        )
    if "gemfilter" in config.methods and config.gemfilter.layer >= dims.layers:
        raise ValueError(
            f"kvcache: gemfilter.layer={config.gemfilter.layer} is not below the "
            f"{dims.layers} layers of {config.model}. Lower it, or choose with --only."
        )
    if not (config.lengths or config.passages or config.longbench):
        raise ValueError("kvcache: no lengths, no passages, no longbench: no work.")
    examples = read_longbench(*config.longbench) if config.longbench else []
    longbench = list(_longbench(config, model, tokenizer, examples))
    texts = jmem.data.python_reference()
    cases: list[NeedleCase] = []
    if config.lengths:
        text = "\n\n".join(document["text"] for document in texts.training)
        cases = needle.grid(
            Haystack(tokenizer, text),
            lengths=config.lengths,
            depths=config.depths,
            seeds=config.seeds,
        )
    return Bench(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        model=model,
        cases=cases,
        needles=list(_needles(config, model, cases)),
        passages=list(_passages(config, model, tokenizer, texts.held_out)),
        examples=examples,
        longbench=longbench,
    )


def _needles(
    config: Config, model: Decoder, cases: Sequence[NeedleCase]
) -> Iterator[Work]:
    for length in config.lengths:
        at = [i for i, case in enumerate(cases) if case.length == length]
        rows = [cases[i].tokens for i in at]
        steps = needle.answer_steps(cases)
        for work in _batches(config, model, f"needles {length}", rows, length, steps):
            yield work._replace(places=[at[place] for place in work.places])


def _passages(
    config: Config,
    model: Decoder,
    tokenizer: "Tokenizer",
    documents: Sequence[jmem.data.Document],
) -> Iterator[Work]:
    """Pieces of held-out documents, each read and then continued.

    A piece begins where half of the one before it is read, so that texts overlap and
    continuations do not.
    """
    size, rows = config.passage + config.continuation, []
    for document in documents:
        tokens = tokenizer.encode(document["text"], add_special_tokens=False).ids
        starts = range(0, len(tokens) - size + 1, max(size // 2, config.continuation))
        rows += [tokens[start : start + size] for start in starts]
    if len(rows) < config.passages:
        raise ValueError(
            f"kvcache: passages={config.passages}, but the held-out text has only "
            f"{len(rows)} pieces of passage={config.passage} + continuation="
            f"{config.continuation} tokens. Lower one of the three."
        )
    sizes = config.passage, config.continuation
    yield from _batches(config, model, "passages", rows[: config.passages], *sizes)


def _longbench(
    config: Config, model: Decoder, tokenizer: "Tokenizer", examples: Sequence[Example]
) -> Iterator[Work]:
    limit = config.longbench_tokens
    for name in dict.fromkeys(example.dataset for example in examples):
        at = [i for i, example in enumerate(examples) if example.dataset == name]
        rows = [
            prompt_tokens(examples[i], tokenizer, limit=limit, chat=config.chat)
            for i in at
        ]
        sizes = limit, TASKS[name].new_tokens, True
        for work in _batches(config, model, f"longbench {name}", rows, *sizes):
            yield work._replace(places=[at[place] for place in work.places])


def _batches(
    config: Config,
    model: Decoder,
    name: str,
    rows: Sequence[Sequence[int]],
    prompt: int,
    new_tokens: int,
    answer_besides: bool = False,
) -> Iterator[Work]:
    """The rows, padded to one width, as many at a time as are answered together."""
    if not rows:
        return
    limit = model.config.max_positions
    if prompt + new_tokens > limit:
        raise ValueError(
            f"kvcache: {name} of {prompt:,} tokens with {new_tokens} to follow exceed "
            f"the {limit:,} positions of {config.model}."
        )
    size = min(config.batch_size, len(rows))
    found = contenders(
        config,
        model,
        prompt=prompt,
        new_tokens=new_tokens,
        batch_size=size,
        answer_besides=answer_besides,
    )
    width = max(map(len, rows))
    for number, start in enumerate(range(0, len(rows), size)):
        places = range(start, min(start + size, len(rows)))
        own = [rows[place] for place in (*places, *[start] * (size - len(places)))]
        tokens = np.zeros((size, width), np.int32)
        for row, ids in enumerate(own):
            tokens[row, : len(ids)] = ids
        lengths = np.array([len(ids) for ids in own], np.int32)
        yield Work(f"{name} {number}", tokens, lengths, places, found)


def _stage(work: Work) -> str:
    return work.name.rpartition(" ")[0]


def _tokens(work: Work) -> int:
    return work.tokens.size


# The three measures -------------------------------------------------------------------

type Done = list[tuple[Work, dict[str, list]]]
"""Works and their results: by contender, a value a row."""


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    bench = open_bench(config)
    journal = Journal(run.folder, resume=run.resume)
    model, params = bench.model, bench.checkpoint.params()
    tokenizer, ends = bench.tokenizer, bench.checkpoint.eos_ids
    panels: list[plots.Panel] = []

    def answer(work: Work, steps: int) -> dict[str, np.ndarray]:
        asked = given(work.found, config.read_rows)
        plans, rest = asked.pop("plans"), asked
        return answers(
            model, params, plans, work.tokens, work.lengths, steps=steps, **rest
        )

    def hit(work: Work) -> dict[str, np.ndarray]:
        cases = [bench.cases[place] for place in work.places]
        produced = answer(work, needle.answer_steps(bench.cases))
        return {
            name: needle.hits(tokenizer, cases, rows[: len(cases)])
            for name, rows in produced.items()
        }

    def lose(work: Work) -> dict[str, np.ndarray]:
        asked = given(work.found, config.read_rows)
        plans, rest = asked.pop("plans"), asked
        text, after = np.split(work.tokens, [config.passage], axis=1)
        lengths = work.lengths - config.continuation
        found = losses(model, params, plans, text, lengths, after, **rest)
        return {name: rows[: len(work.places)] for name, rows in found.items()}

    def score(work: Work) -> dict[str, np.ndarray]:
        examples = [bench.examples[place] for place in work.places]
        produced = answer(work, examples[0].task.new_tokens)
        return {
            name: np.array(
                [
                    example.score(tokenizer.decode(until(row.tolist(), ends)))
                    for example, row in zip(examples, rows)
                ]
            )
            for name, rows in produced.items()
        }

    stages = (
        (bench.needles, hit, report_needles),
        (bench.passages, lose, report_passages),
        (bench.longbench, score, report_longbench),
    )
    for works, make, report in stages:
        done: Done = []
        try:
            for work in told(run, works, name=_stage, size=_tokens):
                done.append((work, journal(work.name, lambda: make(work))))  # noqa: B023
        finally:  # stopped in the middle, what is done is told
            if done:
                panels += report(config, run, bench, done)
    if panels:
        run.plot(
            "quality",
            lambda: plots.quality(
                panels, config.shares, title=f"{config.model}: quality at equal bytes"
            ),
        )


def until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text.

    >>> until([5, 6, 2, 7], (2, 0))
    [5, 6]
    """
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:at]


def report_needles(
    config: Config, run: Run, bench: Bench, done: Done
) -> list[plots.Panel]:
    """Needles that are still found, of those that the full cache finds."""
    names, places = list(done[0][0].found), [p for work, _ in done for p in work.places]
    cases = [bench.cases[place] for place in places]
    found = {
        name: np.array([hit for _, values in done for hit in values[name]], bool)
        for name in names
    }
    full, lengths = found["full"], list(dict.fromkeys(case.length for case in cases))

    def kept(name: str, **where: Any) -> needle.Retained:
        """In the cells of one length, depth or both."""
        mine = np.array(
            [all(getattr(c, k) == v for k, v in where.items()) for c in cases], bool
        )
        return needle.retained(full[mine], found[name][mine])

    by_length = {work.tokens.shape[1]: work.found for work, _ in done}
    shares = {
        name: float(np.mean([real_share(by_length[n], name) for n in lengths]))
        for name in names
    }
    longest = by_length[max(lengths)]
    rows = []
    for name in names:
        own = kept(name)
        bytes_a_row = longest[name].plan.bytes() // longest[name].plan.batch_size
        rows.append(
            (
                *(name, bytes_a_row, shares[name], own.hits, own.cells, own.share),
                *(own.interval or (None, None)),
                *(kept(name, length=length).share for length in lengths),
            )
        )
    run.table(
        "Needles kept",
        [
            "cache",
            Column(f"at {max(lengths):,}", mib),
            Column("of full", percent),
            *("hits", "of"),
            Column("kept", percent),
            *(Column(end, percent) for end in ("from", "to")),
            *(Column(f"{length:,}", percent) for length in lengths),
        ],
        rows,
    )
    cells, excluded = kept("full").cells, kept("full").excluded
    words = (
        f"{cells} of {len(cases)} cells count: the full cache does not answer the other"
        f" {excluded}. from and to: Wilson's interval, 95 %. The last columns: kept at "
        f"each length. {config.run_dtype}, {bench.model.attention} attention, on "
        f"{jax.devices()[0].device_kind}."
    )
    if cells < ENOUGH * len(cases):
        words += " TOO FEW to compare policies by: give a model that finds its needles."
    run.note(words)
    pictured = min(config.shares, key=lambda share: abs(share - PICTURED))
    drawn = {"full": "full"}
    drawn |= {method: label(method, pictured) for method in config.methods}
    lost = [
        _lost(name, kept, lengths, config.depths)
        for name in drawn.values()
        if (share := kept(name).share) is not None and share < KEPT
    ]
    if lost:
        run.note("\n".join([f"Below {_percent(KEPT)}:", *lost]))
    panels = {
        method: [
            [kept(name, length=n, depth=depth)[:2] for n in lengths]
            for depth in config.depths
        ]
        for method, name in drawn.items()
    }
    run.plot(
        "needles",
        lambda: plots.cells(
            panels,
            rows=[_percent(depth) for depth in config.depths],
            columns=[f"{length:,}" for length in lengths],
            row_label="depth of the needle",
            column_label="tokens of the prompt",
            title=f"Needles kept in {_percent(pictured)} of the full cache's bytes",
        ),
    )
    curves = {
        method: [
            (shares[name], own.share, *own.interval)
            for name in (label(method, share) for share in sorted(config.shares))
            if (own := kept(name)).share is not None and own.interval is not None
        ]
        for method in config.methods
    }
    if not cells:
        return []
    return [
        plots.Panel(
            title=f"Needles, {cells} prompts, 95 % intervals",
            label="still found",
            curves=curves,
            reference=1.0,
            percent=True,
        )
    ]


def _lost(
    name: str,
    kept: Callable[..., needle.Retained],
    lengths: Sequence[int],
    depths: Sequence[float],
) -> str:
    """Where a cache lost needles, in words."""
    own = kept(name)
    where = []
    for length in lengths:
        found = {depth: kept(name, length=length, depth=depth) for depth in depths}
        missed = [
            f"{_percent(depth)} ({cell.cells - cell.hits})"
            for depth, cell in found.items()
            if cell.hits < cell.cells
        ]
        if missed:
            where.append(f"{length:,} tokens at depth {', '.join(missed)}")
    return f"{name} lost {own.cells - own.hits} of {own.cells}: {'; '.join(where)}"


def report_passages(
    config: Config, run: Run, bench: Bench, done: Done
) -> list[plots.Panel]:
    """Loss of the continuations, and how much of it the full cache does not have."""
    contenders = done[0][0].found
    found = {
        name: np.array([row for _, values in done for row in values[name]])
        for name in contenders
    }
    more = {name: (rows - found["full"]).mean(axis=1) for name, rows in found.items()}
    count = len(found["full"])

    def error(values: np.ndarray) -> float | None:
        """Standard error of the mean over passages."""
        return float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None

    run.table(
        "Loss of a continuation",
        [
            "cache",
            Column("of full", percent),
            *(Column(n, loss) for n in ("loss", "above full", "standard error")),
            "perplexity",
        ],
        [
            (
                *(name, real_share(contenders, name), float(rows.mean())),
                *(float(more[name].mean()), error(more[name])),
                math.exp(float(rows.mean())),
            )
            for name, rows in found.items()
        ],
    )
    run.note(
        f"Nats a token over the {config.continuation} tokens after each of {count} "
        f"held-out texts of {config.passage} tokens; standard error of what is above "
        "the full cache, text by text."
    )
    curves = {}
    for method in config.methods:
        names = [label(method, share) for share in sorted(config.shares)]
        points = [(real_share(contenders, n), float(more[n].mean()), n) for n in names]
        curves[method] = [
            (share, value, value - (bar := error(more[n]) or 0.0), value + bar)
            for share, value, n in points
        ]
    return [
        plots.Panel(
            title=f"Continuations of {count} texts, standard errors",
            label="loss above the full cache's, nats a token",
            curves=curves,
            reference=0.0,
        )
    ]


def report_longbench(
    config: Config, run: Run, bench: Bench, done: Done
) -> list[plots.Panel]:
    """Scores of the files' examples, by data set, from 0 to 100."""
    scores: dict[str, dict[str, list[float]]] = {}
    for work, values in done:
        dataset = bench.examples[work.places[0]].dataset
        for name, rows in values.items():
            scores.setdefault(name, {}).setdefault(dataset, []).extend(rows)
    datasets, rows = list(scores["full"]), []
    for name, own in scores.items():
        means = [100 * float(np.mean(own[dataset])) for dataset in datasets]
        rows.append((name, *means, float(np.mean(means))))
    heads = [f"{dataset} ({len(scores['full'][dataset])})" for dataset in datasets]
    columns = [Column(head, _score) for head in (*heads, "mean")]
    run.table("LongBench", ["cache", *columns], rows)
    run.note(
        "Each data set by its own metric, from 0 to 100; of prompts above "
        f"{config.longbench_tokens:,} tokens the middle is left out. Shares are of the "
        "cache of a prompt of that length, so of a shorter one more is kept; room for "
        "the answer comes on top, for all alike. The words of the instructions are our "
        "own: compare with the full cache, not with papers."
    )
    return []


def _score(value: float) -> str:
    return f"{value:.2f}"


if __name__ == "__main__":
    cli.run(main, Config)
