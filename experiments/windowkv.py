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
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

import jmem
from experiments.harness import cli, plots
from experiments.harness.report import Column, gib, percent, seconds
from experiments.harness.run import Run
from experiments.kvcache import cache_programs, mib
from jmem.data.batch import Batch
from jmem.data.recall import KINDS, Recall
from jmem.evaluate.interval import wilson
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full as Learning
from jmem.generate.decode import extend
from jmem.generate.reading import prefill
from jmem.kvcache import task
from jmem.kvcache.budget import fitted
from jmem.kvcache.cache import empty
from jmem.kvcache.full import Full
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.pyramidkv import PyramidKV
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.streaming_llm import StreamingLLM
from jmem.kvcache.windowkv import TASKS, Tasks, WindowKV
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.program import Program
from jmem.targets import Target
from jmem.train.loop import train

Asked = Literal["find", "majority"]
TASK: Mapping[Asked, task.Task] = {"find": "localization", "majority": "aggregation"}
"""What each kind of question is an example of."""
LEARNT = 0.98
"""Of each kind, what the full cache must answer for the others to be compared."""


class Lesson(NamedTuple):
    """Texts of one kind, and for how long the decoder learns from them."""

    changes: Mapping[str, Any]
    """Fields of `Recall` that differ from what is asked in the end."""
    rows: int
    updates: int


LESSONS = (
    Lesson({"text": 64, "value": 3}, 64, 350),
    Lesson({"text": 128}, 16, 150),
    Lesson({}, 16, 150),
)
"""From easy to hard: of long texts alone, to find is not learnt in 1,200 updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """The decoder that is trained here."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 128
    questions: int = 12
    """On each text of a lesson."""
    adamw: AdamW = AdamW(learning_rate=1e-3, warmup_steps=20, b2=0.95)
    effort: float = 1.0
    """Times the updates of each lesson."""

    def config(self, recall: Recall) -> DecoderConfig:
        """Long enough for the questions of a lesson, and with a tied head: what is
        attended need only be copied.
        """
        return DecoderConfig(
            vocab_size=recall.vocab_size,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            max_positions=recall.text + self.questions * (2 + recall.value),
            tied=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The programs compiled for `gpu`."""

    model: str = "llama3-8b"
    """A name in jmem.models.zoo."""
    prompt: int = 7950
    """Tokens of a prompt."""
    new_tokens: int = 0
    """Room for an answer; with none, a new token takes the place of the last one."""
    batch_size: int = 1
    """Prompts read together."""
    capacities: tuple[int, ...] = (1024,)
    """Mean tokens a layer keeps; each is a program beside the full cache's."""
    windowkv: WindowKV = WindowKV()
    """All but the capacity."""
    chunk: int = 4096
    """Tokens of a row handled at a time where each is handled alone, as by the MLP."""
    dtype: Precision = "bfloat16"
    """Of weights, activations and caches."""


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
        for name in ("tested", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"windowkv: {name}={getattr(self, name)}; need >= 1.")
        if self.tested % self.batch_size:
            raise ValueError(
                f"windowkv: tested={self.tested} is no multiple of batch_size="
                f"{self.batch_size}; all batches have one shape."
            )
        if not self.shares or len(set(self.shares)) < len(self.shares):
            raise ValueError(
                f"windowkv: shares={self.shares} must name one or more, and none twice."
            )
        if not self.small.effort > 0:
            raise ValueError(
                f"windowkv: small.effort={self.small.effort} must be positive."
            )
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(
                    f"windowkv: shares={share} must lie within (0, 1); the full cache "
                    "is there in any case."
                )


# Learning -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Batches of a lesson by number: `jmem.train.loop.Data`."""

    recall: Recall
    rows: int
    questions: int
    seed: tuple[int, ...]

    @property
    def digest(self) -> str:
        return str(self)

    def batch(self, step: int) -> Batch:
        return self.recall.sample(
            self.rows,
            seed=(*self.seed, step),
            kinds=tuple(TASK),
            questions=self.questions,
        ).batch


def texts(config: Config) -> list[Texts]:
    """What is learnt from, lesson by lesson."""
    return [
        Texts(
            dataclasses.replace(config.recall, **lesson.changes),
            lesson.rows,
            config.small.questions,
            (config.seed, number),
        )
        for number, lesson in enumerate(LESSONS)
    ]


def learn(config: Config, run: Run, model: Decoder) -> dict:
    """Parameters with which the model answers both kinds of question."""
    learning = Learning(adamw=config.small.adamw)

    @jax.jit
    def begin(key):
        return learning.init(model, model.init(key), model.stats(), key)

    effort = config.small.effort
    state = begin(jax.random.key(config.seed))
    for number, (lesson, batches) in enumerate(zip(LESSONS, texts(config)), 1):
        state = train(
            learning,
            model,
            state,
            batches,
            steps=max(round(effort * lesson.updates), 1),
            folder=run.folder_of(f"lesson-{number}"),
            keep=1,
            resume=run.resume,
        )
    return learning.merged(state)[0]


# Recall at equal bytes ----------------------------------------------------------------


def policies(config: Config, kind: Asked) -> dict[str, Policy]:
    """What is compared on questions of a kind; WindowKV as code and paper score it."""

    def scored_by(by: Tasks, policy: WindowKV) -> WindowKV:
        given = dataclasses.asdict(policy)
        del given["best"]
        return WindowKV.for_task(TASK[kind], by=by, **given)

    return {
        "streaming_llm": config.streaming_llm,
        "snapkv": config.snapkv,
        "snapkv unpooled": config.unpooled,
        "pyramidkv": config.pyramidkv,
        **{f"windowkv {by}": scored_by(by, config.windowkv) for by in TASKS},
        "windowkv grid": scored_by("official_code", config.grid),
    }


class Contender(NamedTuple):
    """A policy cut to a budget."""

    policy: str
    share: float
    """The budget, of the full cache's bytes; 1 for the full cache itself."""
    plan: PolicyPlan


def contenders(config: Config, model: Decoder, kind: Asked) -> dict[str, Contender]:
    """The full cache, and each policy at each share of its bytes, by name.

    Raises:
      ValueError: a share is too small for a policy, which is named with what it needs.
    """
    recall = config.recall
    size: Any = {"prompt": recall.prompt, "batch_size": config.batch_size}
    size["new_tokens"] = recall.value
    whole = Full().plan(model, **size)
    prompt_bytes = of_prompt(whole)
    found = {"full": Contender("full", 1.0, whole)}
    for name, policy in policies(config, kind).items():
        for share in config.shares:
            nbytes = math.floor(share * prompt_bytes) + whole.bytes() - prompt_bytes
            try:
                cut = fitted(policy, model, nbytes, **size)
            except ValueError as error:
                raise ValueError(
                    f"windowkv: shares={share:g} of the full cache for {recall.prompt}"
                    f" tokens is too little for {name}; raise it, or lower what the "
                    f"policy keeps in any case.\n{error}"
                ) from error
            plan = cut.plan(model, **size)
            found[f"{name} {100 * share:g} %"] = Contender(name, share, plan)
    return found


def of_prompt(whole: PolicyPlan) -> int:
    """Bytes of a full cache without its room for an answer."""
    return dataclasses.replace(whole, tail=whole.tail - whole.new_tokens).bytes()


def answers(
    model: Decoder,
    params: dict,
    plans: tuple[PolicyPlan, ...],
    prompts: Int[np.ndarray, "B T"],
    *,
    steps: int,
) -> list[Int[np.ndarray, "B steps"]]:
    """Greedy answers of each plan, the first token too from the cut cache.

    The prompt's last token is decoded once more, at its own position: its keys and
    values take the slots that they already have.
    """
    tokens, last = jnp.asarray(prompts), jnp.asarray(prompts[:, -1])
    lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
    caches = tuple(empty(plan) for plan in plans)
    _, caches = prefill(model, params, tokens, lengths, caches, plans)
    again = jax.nn.one_hot(last, model.config.vocab_size)
    found = []
    for plan, cache in zip(plans, caches, strict=True):
        produced, _ = extend(
            *(model, params, again, lengths - 1, cache, jax.random.key(0)),
            plan=plan,
            steps=steps + 1,
        )
        found.append(np.asarray(produced)[:, 1:])
    return found


Hits = Mapping[str, Bool[np.ndarray, " N"]]
"""By contender: which questions were answered rightly."""


def examine(
    config: Config,
    run: Run,
    model: Decoder,
    params: dict,
    found: Mapping[Asked, Mapping[str, Contender]],
) -> dict[Asked, Hits]:
    """All contenders on the same questions of each kind."""
    plans = {c.plan: None for kind in found for c in found[kind].values()}
    unique, recall = tuple(plans), config.recall
    hits: dict[Asked, Hits] = {}
    batches = config.tested // config.batch_size
    for kind, own in found.items():
        right: dict[PolicyPlan, list[np.ndarray]] = {plan: [] for plan in unique}
        for number in range(batches):
            run.console.print(f"{kind}: batch {number + 1} of {batches}")
            rows = recall.sample(
                config.batch_size,
                seed=(config.seed, KINDS.index(kind), number, 1),
                kinds=(kind,),
            )
            prompts = rows.tokens[:, : recall.prompt]
            produced = answers(model, params, unique, prompts, steps=recall.value)
            for plan, tokens in zip(unique, produced, strict=True):
                right[plan].append(recall.correct(rows, tokens))
        hits[kind] = {name: np.concatenate(right[c.plan]) for name, c in own.items()}
    return hits


def report_recall(
    config: Config,
    run: Run,
    found: Mapping[Asked, Mapping[str, Contender]],
    hits: Mapping[Asked, Hits],
) -> None:
    """What is still answered, by policy and bytes; which scoring answers more."""
    own = found["find"]
    whole, prompt_bytes = own["full"].plan, of_prompt(own["full"].plan)

    def share(name: str) -> float:
        """Of the bytes that a prompt takes, beside room for the answer."""
        return 1 - (whole.bytes() - own[name].plan.bytes()) / prompt_bytes

    def kept(kind: Asked, name: str) -> tuple[float, float, float]:
        right = int(hits[kind][name].sum())
        return right / config.tested, *wilson(right, config.tested)

    run.table(
        "Answered rightly",
        [
            "cache",
            Column("a row", kib),
            Column("of the prompt's", percent),
            *(
                Column(f"{kind}{end}", percent)
                for kind in found
                for end in ("", " from", " to")
            ),
        ],
        [
            (
                *(name, own[name].plan.bytes() // config.batch_size, share(name)),
                *(value for kind in found for value in kept(kind, name)),
            )
            for name in own
        ],
    )
    words = (
        f"{config.tested} questions of each kind on texts of {config.recall.text} "
        f"tokens; from, to: Wilson's interval, 95 %. {model_words(config)}, float32, "
        f"on {jax.devices()[0].device_kind}."
    )
    weak = [kind for kind in found if kept(kind, "full")[0] < LEARNT]
    if weak:
        words += (
            f" NOT LEARNT: even the full cache answers less than {100 * LEARNT:g} % of"
            f" {' and '.join(weak)}; raise --small.effort before policies are compared."
        )
    run.note(words)
    run.table(
        "How WindowKV scores a window",
        [
            "asked",
            "official_code",
            "paper",
            *(Column(f"by {by}", percent) for by in TASKS),
            *(f"more by {by}" for by in TASKS),
        ],
        [scoring(config, kind, hits[kind]) for kind in found],
    )
    run.note(recommendation(config, hits))
    panels = [
        plots.Panel(
            title={"find": "Find a record", "majority": "Name the majority"}[kind]
            + f", {config.tested} prompts, 95 % intervals",
            label="answered rightly",
            curves={
                policy: [
                    (share(name), *kept(kind, name))
                    for name, c in found[kind].items()
                    if c.policy == policy
                ]
                for policy in policies(config, kind)
            },
            reference=kept(kind, "full")[0],
            percent=True,
        )
        for kind in found
    ]
    run.plot(
        "recall",
        lambda: plots.quality(
            panels,
            config.shares,
            title="Recall at equal bytes, beside room for the answer",
        ),
    )


def kib(nbytes: float) -> str:
    """Bytes as KiB with one decimal."""
    return f"{nbytes / 2**10:,.1f} KiB"


def model_words(config: Config) -> str:
    small = config.small
    return f"{small.layers} layers of {small.hidden}"


def scored(config: Config, kind: Asked) -> dict[Tasks, str]:
    """In words, which tokens of a window count, by code and by paper."""
    found = {}
    for by in TASKS:
        policy = policies(config, kind)[f"windowkv {by}"]
        assert isinstance(policy, WindowKV)
        best = policy.best or policy.window
        found[by] = f"{best} of {policy.window}"
    return found


def gains(config: Config, kind_hits: Hits, by: Tasks) -> Int[np.ndarray, " N"]:
    """At how many budgets each question is answered by one scoring of windows."""
    names = [f"windowkv {by} {100 * share:g} %" for share in config.shares]
    return np.sum([kind_hits[name] for name in names], axis=0)


def scoring(config: Config, kind: Asked, kind_hits: Hits) -> tuple[Any, ...]:
    """A row of the table: shares over all budgets, and the questions that differ."""
    code, paper = (gains(config, kind_hits, by) for by in TASKS)
    of = config.tested * len(config.shares)
    shares = (int(code.sum()) / of, int(paper.sum()) / of)
    more = int((code > paper).sum()), int((paper > code).sum())
    return kind, *scored(config, kind).values(), *shares, *more


def better(more_by_code: int, more_by_paper: int) -> Tasks | None:
    """Whose scoring answers more, if that is no chance: Wilson's interval, 95 %."""
    differ = more_by_code + more_by_paper
    if not differ:
        return None
    low, high = wilson(more_by_code, differ)
    return "official_code" if low > 0.5 else "paper" if high < 0.5 else None


def recommendation(config: Config, hits: Mapping[Asked, Hits]) -> str:
    """Which mapping of tasks to scores the numbers speak for, in words."""
    verdicts = {}
    for kind in hits:
        *_, more_by_code, more_by_paper = scoring(config, kind, hits[kind])
        verdicts[kind] = better(more_by_code, more_by_paper)
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
    """How often it is right on what it has not seen, and the seconds it takes."""
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
    found = task.accuracy(classify, seed=config.seed + 1)
    run.table(
        "Classifier of tasks",
        [
            "classifier",
            Column("held-out contexts", percent),
            Column("held-out templates", percent),
            Column("to train", seconds),
            Column("a prompt", milliseconds),
        ],
        [("byte n-grams", *found, trained - began, asked)],
    )


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms"


# Memory on a GPU ----------------------------------------------------------------------


def build(config: Config, target: Target) -> Decoder:
    """The model as it is compiled for the described GPU."""
    asked, dims = config.compiled, zoo.get(config.compiled.model)
    if asked.prompt + asked.new_tokens > dims.max_positions:
        raise ValueError(
            f"windowkv: compiled.prompt={asked.prompt} + new_tokens={asked.new_tokens} "
            f"exceed the {dims.max_positions:,} positions of {asked.model}."
        )
    model = Decoder.on(target, dims, **PRECISIONS[asked.dtype], remat="none")
    return dataclasses.replace(model, chunk=asked.chunk)


def programs(config: Config, target: Target) -> dict[str, Program]:
    """Prefill and one decoding step of the full cache and of WindowKV's."""
    asked = config.compiled
    found: dict[str, Policy] = {"full": Full()}
    for capacity in asked.capacities:
        policy = dataclasses.replace(asked.windowkv, capacity=capacity)
        found[f"windowkv-{capacity}"] = policy
    return cache_programs(
        build(config, target),
        found,
        prompt=asked.prompt,
        new_tokens=asked.new_tokens,
        batch_size=asked.batch_size,
        target=target,
    )


def report_memory(config: Config, run: Run) -> None:
    """What each cache takes on the described GPU, while it is filled and while read."""
    asked, target = config.compiled, run.target
    for name, program in programs(config, target).items():
        with run.console.status(f"compiling {name}"):
            report = jmem.measure(program, target=target)
        run.record(report, name)
    caches = ("full", *(f"windowkv-{capacity}" for capacity in asked.capacities))
    whole = run.memory["full-prefill"].by_label["kv cache"]

    def line(name: str) -> tuple[Any, ...]:
        reading, writing = (run.memory[f"{name}-{p}"] for p in ("prefill", "decode"))
        cache = reading.by_label["kv cache"]
        fits = bool(reading.fits()) and bool(writing.fits())
        peaks = reading.device_bytes, writing.device_bytes
        return name, cache, cache / whole, *peaks, fits

    run.table(
        f"Memory on {target.name}",
        [
            "cache",
            Column("cache", mib),
            Column("of full", percent),
            *(Column(part, gib) for part in ("prefill", "decode")),
            "fits",
        ],
        [line(name) for name in caches],
    )
    what = f"{asked.model}, {asked.batch_size} x {asked.prompt:,} tokens, {asked.dtype}"
    run.note(f"{what}; peaks hold the weights.")
    run.plot("memory", lambda: plots.memory(run.memory, title=what))


def main(config: Config, run: Run) -> None:
    if not run.measure_only:
        model = Decoder(config.small.config(config.recall), remat="none")
        found: dict[Asked, dict[str, Contender]] = {
            kind: contenders(config, model, kind) for kind in TASK
        }
        params = learn(config, run, model)
        report_recall(config, run, found, examine(config, run, model, params, found))
        if config.classifier_prompts:
            report_classifier(config, run)
    report_memory(config, run)


if __name__ == "__main__":
    cli.run(main, Config)
