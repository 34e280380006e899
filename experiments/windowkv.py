"""WindowKV beside other cache policies at equal bytes: recall, and GPU memory.

    python -m experiments.windowkv         a decoder trained here
    python -m experiments.windowkv --preset llama3_8b --measure-only --gpu h200
    python -m experiments.windowkv --preset llama31_8b_128k --measure-only --gpu h200

Paper   Zuo et al., WindowKV, 2025, arXiv:2503.17922.
Chosen  On 100 questions of each kind of another seed, at 10 to 50 % of the bytes.
        SnapKV and PyramidKV are best with kernel 13, which spans a record's value,
        PyramidKV with the flattest pyramid there is; WindowKV with windows of 4 and two
        neighbours on each side (ours), and without neighbours with windows of 8.
Expect  Llama-3-8B, 7,950 tokens: 138 MB of cache with capacity 1,024, 272 with 2,048,
        where the full one takes 1,042; the official layout takes four times as much.
        At equal bytes a record is found by windows more often than by SnapKV without
        pooling, and far more often than in the last tokens alone. Whether half of a
        window's tokens score it or all, official code and paper disagree: the run says
        which answers more.

A small decoder learns to find a record by its key (localization) and to name the
commonest symbol (aggregation) in text of `jmem.data.recall`, where all that a cut cache
gets wrong is the cache's fault. The first token after a prompt is always that of full
attention, and would hide what was dropped from a majority, which is one token: so a
prompt's last token is read a second time, from the cut cache.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from experiments.harness import cli, memory, plots, settings
from experiments.harness.comparison import Outcome, Trial, examine, prepare
from experiments.harness.recall import Small, learn, report_answers
from experiments.harness.report import (
    Column,
    gib,
    make_columns,
    mib,
    milliseconds,
    percent,
    seconds,
)
from experiments.harness.run import Run
from experiments.harness.settings import Weights, need
from jmem.data.recall import Kind, Recall
from jmem.evaluate.contenders import name_contender
from jmem.evaluate.interval import wilson
from jmem.evaluate.programs import build_programs
from jmem.evaluate.recall import Questions, draw_questions
from jmem.kvcache import task
from jmem.kvcache.full import Full
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import TASKS, Tasks, WindowKV
from jmem.models.decoder import Decoder
from jmem.program import Program
from jmem.targets import Target

TASK: Mapping[Kind, task.Task] = {"find": "localization", "majority": "aggregation"}
"""What each kind of question is an example of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled(settings.Compiled):
    """The programs compiled for `gpu`."""

    model: str = "llama3-8b"
    """A name in jmem.models.zoo."""
    prompt: int = 7950
    """Tokens of a prompt."""
    new_tokens: int = 0
    """Room for an answer; with none, a new token takes the place of the last one."""
    capacities: tuple[int, ...] = (1024,)
    """Mean tokens a layer keeps; each is a program beside the full cache's."""
    windowkv: WindowKV = WindowKV()
    """All but the capacity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    recall: Recall = Recall(keys=8, values=24)
    """The texts that are asked about; all values are in each of them."""
    small: Small = Small()
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Budgets, as shares of the bytes that the full cache takes for a prompt; room for
    the answer comes on top, for all alike."""
    streaming_llm: StreamingLLM = StreamingLLM()
    snapkv: SnapKV = SnapKV(window=4, kernel=13)
    unpooled: SnapKV = SnapKV(window=4, kernel=1)
    pyramidkv: PyramidKV = PyramidKV(window=4, kernel=13, divisor=2)
    windowkv: WindowKV = WindowKV(
        window=4, observation=4, group=1, pyramid="flat", neighbours=2
    )
    """All but `best`, on which code and paper disagree: both are run."""
    grid: WindowKV = WindowKV(window=8, observation=4, group=1, pyramid="flat")
    """The official scores without neighbours."""
    tested: int = 400
    """Questions of each kind."""
    batch_size: int = 50
    """Prompts answered together."""
    classifier_prompts: int = 1000
    """Of each data set, to train the classifier of tasks on; 0: it is left out."""
    compiled: Compiled = Compiled()
    seed: int = 0
    """Of weights, texts and questions."""
    gpu: str = "h200"
    """GPU that is compiled for: a name, or a TOML file of your own."""

    def __post_init__(self):
        need(self, "tested", "batch_size", least=1)
        need(self, "classifier_prompts", "seed", least=0)
        if self.tested % self.batch_size:
            raise ValueError(
                f"windowkv: tested={self.tested} is no multiple of batch_size="
                f"{self.batch_size}; all batches have one shape."
            )
        need(self, "shares", some=True, once=True)
        whole = "the full cache is there in any case"
        need(self, "shares", above=0, below=1, why=whole)
        need(self.small, "effort", above=0)


# Recall at equal bytes ----------------------------------------------------------------


def make_policies(config: Config, kind: Kind) -> dict[str, Policy]:
    """What is compared on questions of a kind; WindowKV as code and paper score it."""

    def score_by(by: Tasks, policy: WindowKV) -> WindowKV:
        given = dataclasses.asdict(policy)
        del given["best"]
        return WindowKV.for_task(TASK[kind], by=by, **given)

    return {
        "streaming_llm": config.streaming_llm,
        "snapkv": config.snapkv,
        "snapkv unpooled": config.unpooled,
        "pyramidkv": config.pyramidkv,
        **{f"windowkv {by}": score_by(by, config.windowkv) for by in TASKS},
        "windowkv grid": score_by("official_code", config.grid),
    }


def contend(config: Config, model: Decoder, kind: Kind) -> Trial[Questions]:
    """A trial of every policy on questions of a kind; a share is of the prompt's bytes.

    Raises:
      ValueError: a share is too small for a policy, which is named with what it needs.
    """
    size = config.batch_size
    asked = draw_questions(
        config.recall, kind, count=config.tested, batch_size=size, seed=config.seed
    )
    methods = make_policies(config, kind), config.shares
    return prepare(asked, model, *methods, batch_size=size, answer_besides=True)


def report_recall(
    config: Config, run: Run, outcomes: Sequence[Outcome[Questions]]
) -> list[plots.Panel]:
    """What is still answered, by policy and bytes; which scoring answers more."""
    panels = report_answers(run, config.small, outcomes)
    hits: dict[Kind, Hits] = {own.task.kind: own.scores for own in outcomes}
    shares = make_columns(percent, *(f"by {by}" for by in TASKS))
    columns = ["asked", *TASKS, *shares, *(f"more by {by}" for by in TASKS)]
    rows = [compare_scores(config, kind, hits[kind]) for kind in hits]
    run.table("How WindowKV scores a window", columns, rows)
    run.note(recommend(config, hits))
    title = "Recall at equal bytes, beside room for the answer"
    run.plot("recall", lambda: plots.draw_quality(panels, config.shares, title=title))
    return panels


Hits = Mapping[str, Bool[np.ndarray, " N"]]
"""By contender: which questions were answered rightly."""


def count_tokens(config: Config, kind: Kind, by: Tasks) -> str:
    """In words, how many tokens of a window count."""
    policy = make_policies(config, kind)[f"windowkv {by}"]
    assert isinstance(policy, WindowKV)
    return f"{policy.best or policy.window} of {policy.window}"


def count_budgets(config: Config, hits: Hits, by: Tasks) -> Int[np.ndarray, " N"]:
    """At how many budgets each question is answered by one scoring of windows."""
    names = [name_contender(f"windowkv {by}", share) for share in config.shares]
    return np.sum([hits[name] for name in names], axis=0)


def compare_scores(config: Config, kind: Kind, hits: Hits) -> tuple[Any, ...]:
    """A row of the table: shares over all budgets, and the questions that differ."""
    code, paper = (count_budgets(config, hits, by) for by in TASKS)
    of = config.tested * len(config.shares)
    words = [count_tokens(config, kind, by) for by in TASKS]
    right = int(code.sum()) / of, int(paper.sum()) / of
    return kind, *words, *right, int((code > paper).sum()), int((paper > code).sum())


def find_better(more_by_code: int, more_by_paper: int) -> Tasks | None:
    """Whose scoring answers more, if that is no chance: Wilson's interval, 95 %."""
    differ = more_by_code + more_by_paper
    if not differ:
        return None
    low, high = wilson(more_by_code, differ)
    return "official_code" if low > 0.5 else "paper" if high < 0.5 else None


def recommend(config: Config, hits: Mapping[Kind, Hits]) -> str:
    """Which mapping of tasks to scores the numbers speak for, in words."""
    verdicts: dict[Kind, Tasks | None] = {
        kind: find_better(*compare_scores(config, kind, hits[kind])[-2:])
        for kind in hits
    }
    winners = set(verdicts.values()) - {None}
    parts = [
        f"{kind} ({TASK[kind]}): "
        + (f"{by}'s answers more" if by else "no difference that is not chance")
        for kind, by in verdicts.items()
    ]
    if len(winners) == 1:
        (winner,) = winners
        last = f"Recommended: by={winner!r}."
    elif winners:
        named = ", ".join(f"{TASK[kind]} by={by!r}" for kind, by in verdicts.items())
        last = f"Recommended: neither as a whole, but {named}."
    else:
        last = "Recommended: the default, by='official_code'."
    return f"How to score windows. {'; '.join(parts)}. {last}"


# The classifier of tasks --------------------------------------------------------------


def report_classifier(config: Config, run: Run) -> None:
    """A table: how often the classifier of tasks is right on held-out prompts, and its
    time.
    """
    began = time.perf_counter()
    classify = task.train(count=config.classifier_prompts, seed=config.seed)
    jax.block_until_ready(dict(classify.params))
    trained = time.perf_counter()
    prompt = "Summarise this report on one page.\n" + "It rained. " * 1000
    classify(prompt)  # compiles
    warm = time.perf_counter()
    for _ in range(20):
        classify(prompt)
    asked = (time.perf_counter() - warm) / 20
    found = task.measure_accuracy(classify, seed=config.seed + 1)
    shares = make_columns(percent, "held-out contexts", "held-out templates")
    times = Column("to train", seconds), Column("a prompt", milliseconds)
    row = "byte n-grams", *found, trained - began, asked
    run.table("Classifier of tasks", ["classifier", *shares, *times], [row])


# Memory on a GPU ----------------------------------------------------------------------


def programs(config: Config, target: Target) -> dict[str, Program]:
    """Prefill and one decoding step of the full cache and of WindowKV's."""
    asked = config.compiled
    cut = {f"windowkv-{n}": asked.windowkv.resize(n) for n in asked.capacities}
    model = asked.build(target, Weights(model=asked.model))
    return build_programs(model, {"full": Full()} | cut, **asked.sizes, target=target)


def report_memory(config: Config, run: Run) -> None:
    """What each cache takes on the described GPU, while it is filled and while read."""
    asked, target = config.compiled, run.target

    def rows(found: memory.Reports):
        whole = found["full-prefill"].by_label["kv cache"]
        for name in ("full", *(f"windowkv-{size}" for size in asked.capacities)):
            both = [found[f"{name}-{part}"] for part in ("prefill", "decode")]
            cache = both[0].by_label["kv cache"]
            fits = all(bool(own.fits()) for own in both)
            yield name, cache, cache / whole, *(own.device_bytes for own in both), fits

    cache = "cache", Column("cache", mib), Column("of full", percent)
    what = f"{asked.model}, {asked.batch_size} x {asked.prompt:,} tokens, {asked.dtype}"
    memory.report(
        *(run, programs(config, target)),
        title=f"Memory on {target.name}",
        columns=[*cache, *make_columns(gib, "prefill", "decode"), "fits"],
        rows=rows,
        note=f"{what}; peaks hold the weights.",
        picture=what,
    )


def main(config: Config, run: Run) -> None:
    if not run.measure_only:
        model = Decoder(config.small.config(config.recall), remat="none")
        trials = [contend(config, model, kind) for kind in TASK]
        params = learn(config.small, config.recall, run, model, config.seed)
        report = functools.partial(report_recall, config, run)
        examine(run, model, params, trials, report)
        if config.classifier_prompts:
            report_classifier(config, run)
    report_memory(config, run)


if __name__ == "__main__":
    cli.run(main, Config)
