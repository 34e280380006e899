"""MixLoRA beside LoRA of as many parameters: loss by task, router load, memory.

    python -m experiments.mixlora         SmolLM2-135M on four tasks (10 minutes)
    python -m experiments.mixlora --preset llama2_7b --measure-only --gpu h200

Paper   Li et al., MixLoRA, 2024, arXiv:2404.15159: two models trained over one base
        take 41 % less memory than apart (abstract, version 1); about 9 % more accuracy
        than LoRA on several tasks at once.
Expect  device(two joint) <= 0.59 * 2 * device(official), device(four joint) <= 0.43 * 4
        * device(official). That MixLoRA's loss is below LoRA's is a hypothesis.

The tasks are made of the documentation inside Python (`jmem.data.python_tasks`): text
that every pretrained model has met. Both methods see the same batches, as many rows of
each task, at one rate each. "official" and "vanilla" are static JAX forms of the
official schemes, which run the down projection, or all three, once for each slot and
leave the backward pass to JAX; they are measured, and never trained.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

import jmem
import jmem.checkpoints
import jmem.data
from experiments.harness import cli, models, plots
from experiments.harness.report import Column, gib, loss, seconds
from experiments.harness.run import Run
from experiments.harness.sweep import Outcome, Trial, at_rate, sweep, trained_on
from jmem.data.batch import Batch
from jmem.finetune import mixture as slots
from jmem.finetune.adamw import AdamW
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture, Update
from jmem.finetune.mixture_ops import MixtureFeed
from jmem.finetune.program import step_program
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.models.next_token import next_token_loss
from jmem.nn import quantised
from jmem.nn.maps import choose_maps
from jmem.nn.stack import Remat
from jmem.program import Program
from jmem.targets import Target
from jmem.train import metrics
from jmem.train.loop import train

Method = Literal["lora", "mixlora", "joint", "official", "vanilla"]
TRAINED: tuple[Method, ...] = ("lora", "mixlora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to train, "smollm2-135m" or a checkpoint's path."""
    only: tuple[Method, ...] = ("lora", "mixlora", "joint")
    """Methods to run; empty means all. What is not LoRA or MixLoRA is only measured."""
    mixture: Mixture = Mixture(
        rank=8, alpha=16.0, adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0)
    )
    lora: Lora = Lora(adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0))
    """Its rank and alpha are set to `equal_rank`'s, unless `equal` is off."""
    equal: bool = True
    """LoRA gets the rank that trains as many parameters as the mixture, alpha twice
    that."""
    together: int = 2
    """Mixtures of "joint", which are trained over one base."""
    router: slots.Router = "top_k"
    update: Update = "auto"
    """Of MixLoRA's adapters: inside the backward pass, or after it."""
    dropout: float = 0.0
    """Of MixLoRA; on a CPU its random draws take as long as the step."""
    steps: int = 40
    """Updates a method."""
    batch_size: int = 4
    """Sequences an update, for each mixture; a multiple of the four tasks to train."""
    seq_len: int = 128
    """Tokens a sequence, padded."""
    held_out_rows: int = 24
    """Sequences of each task whose loss is told before and after."""
    dtype: Precision = "bfloat16"
    """Of weights and activations in the programs compiled for `gpu`."""
    remat: Remat = "block"
    """What is kept for the backward pass on `gpu`; of an MLP MixLoRA never keeps more
    than its input."""
    run_dtype: Precision = "float32"
    """As `dtype`, in what is trained here. A GPU multiplies float32 as TF32, unless
    JAX_DEFAULT_MATMUL_PRECISION=highest."""
    run_remat: Remat = "none"
    """As `remat`, in what is trained here."""
    factors: tuple[float, ...] = (1.0,)
    """Each method is tried at its own rate times each of these; the best one counts."""
    seeds: tuple[int, ...] = (0,)
    """Of the order of the batches and of adapters: a run each, at the best
    rate."""
    gpu: str = "h200"
    """GPU whose memory is laid out: a name, or a TOML file of your own."""

    def __post_init__(self):
        sizes = "together", "steps", "batch_size", "seq_len", "held_out_rows"
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"mixlora: {name}={getattr(self, name)}; need >= 1.")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"mixlora: seeds={self.seeds}; need one or more, >= 0.")
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"mixlora: factors={self.factors} must be positive.")

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.only or get_args(Method)


# The official schemes, to be measured -------------------------------------------------


class OfficialFeed(MixtureFeed):
    """Gate and up once a token, down once a slot; JAX makes the backward pass."""

    shared: tuple[str, ...] = ("gate", "up")

    def experts_of(self, *given):
        experts, x, chosen, weights, adapters, base, key = given
        del key  # no dropout among the experts

        def product(name, x):
            return quantised.linear(name, base[name], x)

        hidden = [name for name in ("gate", "up") if name in base]
        once = {name: product(name, x) for name in hidden if name in self.shared}
        scale = jnp.array(experts.scales, x.dtype)[:, None, None]

        def low_rank(name, x, mask):
            a, b = (half.astype(x.dtype) for half in adapters[name])
            code = jnp.einsum("jni,jir->jnr", x, a) * scale * mask
            return jnp.einsum("jnr,jro->jno", code, b)

        y = jnp.zeros_like(x)
        for slot in range(chosen.shape[-1]):
            example = adapters["down"][1][:, :, 0][:, None]  # [J, 1, E*r]
            mask = slots.mask_of(experts, chosen[..., slot], example).astype(x.dtype)
            inner = None
            for name in hidden:
                own = once[name] if name in once else product(name, x)
                own += low_rank(name, x, mask)
                inner = experts.activate(own) if inner is None else inner * own
            out = product("down", inner) + low_rank("down", inner, mask)
            y += weights[..., slot, None].astype(x.dtype) * out
        return y


class VanillaFeed(OfficialFeed):
    """All three maps once a slot."""

    shared = ()


class OfficialMixLora(MixLora):
    feed = OfficialFeed


class VanillaMixLora(MixLora):
    feed = VanillaFeed


# Programs -----------------------------------------------------------------------------


def dimensions(config: Config) -> DecoderConfig:
    """Of the zoo's model, or of the checkpoint that `model` is the path of."""
    dims = models.dimensions(config.model)
    if config.seq_len > dims.max_positions:
        raise ValueError(
            f"mixlora: seq_len={config.seq_len} exceeds the {dims.max_positions:,} "
            f"positions of {config.model}."
        )
    return dims


def equal_rank(mixture: Mixture, dims: DecoderConfig) -> int:
    """The rank of LoRA, on the same maps, with about as many trained parameters."""
    queries, keys = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    width, inner = dims.hidden, dims.intermediate
    sizes = {f"attention/{name}": width + queries for name in "qo"}
    sizes |= {f"attention/{name}": width + keys for name in "kv"}
    hidden = ("gate", "up", "down") if dims.gated else ("up", "down")
    sizes |= {f"mlp/{name}": width + inner for name in hidden}
    chosen = choose_maps(mixture.maps, sizes, "mixlora: maps")
    plain = sum(sizes[name] for name in chosen)
    mixed = sum(
        sizes[name] * (mixture.experts if name.startswith("mlp/") else 1)
        for name in chosen
    )
    return max(round((mixture.rank * mixed + mixture.experts * width) / plain), 1)


def finetuner(
    config: Config, method: Method, dims: DecoderConfig, factor: float = 1.0
) -> Lora | MixLora:
    """The method as the config has it, its learning rate times `factor`."""
    mixture = at_rate(config.mixture, factor)
    if method == "lora":
        lora = at_rate(config.lora, factor)
        if not config.equal:
            return lora
        rank = equal_rank(config.mixture, dims)
        maps = config.mixture.maps
        return dataclasses.replace(lora, rank=rank, alpha=2.0 * rank, maps=maps)
    options = {"router": config.router, "dropout": config.dropout}
    if method in ("official", "vanilla"):
        kind = OfficialMixLora if method == "official" else VanillaMixLora
        options |= {"update": "separate"}
        return kind(mixtures=(mixture,), **options)
    count = config.together if method == "joint" else 1
    return MixLora(mixtures=(mixture,) * count, update=config.update, **options)


def rows(config: Config, method: Method) -> int:
    """Of a method's batch."""
    return config.batch_size * (config.together if method == "joint" else 1)


def build(config: Config, dims: DecoderConfig, target: Target) -> Decoder:
    """The model as it is compiled for the described GPU."""
    return Decoder.on(target, dims, **PRECISIONS[config.dtype], remat=config.remat)


def programs(config: Config, target: Target) -> dict[str, Program]:
    """One training step a method, for `target`."""
    dims = dimensions(config)
    model = build(config, dims, target)
    return {
        method: step_program(
            finetuner(config, method, dims),
            model,
            batch_size=rows(config, method),
            seq_len=config.seq_len,
        )
        for method in config.methods
    }


# The run ------------------------------------------------------------------------------


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    dims = dimensions(config)
    model = Decoder.on(
        models.attached(),
        dims,
        **PRECISIONS[config.run_dtype],
        remat=config.run_remat,
    )
    checkpoint = jmem.checkpoints.load(config.model, model.stored_dtype)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"mixlora: {checkpoint.path} holds no tokenizer; put the model's "
            "tokenizer.json beside its config.json."
        )
    corpora = jmem.data.python_tasks()
    padded = {
        task: tuple(
            fitting(config, jmem.data.tokenise(documents, checkpoint.tokenizer))
            for documents in corpus
        )
        for task, corpus in corpora.items()
    }
    pretrained = checkpoint.params()

    def one(trial: Trial[Method], folder: pathlib.Path) -> dict[str, Any]:
        own = finetuner(config, trial.method, dims, trial.factor)
        state = train(
            own,
            model,
            models.start(own, model, pretrained, trial.seed),
            batches(config, padded, trial.seed),
            steps=config.steps,
            folder=folder,
            keep=1,
            resume=run.resume,
            trace_steps=2 if run.trace else 0,
        )
        return judged(config, loss_of(own, model), state, padded) | (
            load_by_task(config, own, model, state, padded)
            if isinstance(own, MixLora)
            else {}
        )

    plain = functools.partial(next_token_loss, model)
    before = judged(config, plain, pretrained, padded)["parts"]
    methods: list[Method] = [m for m in TRAINED if m in config.methods]
    outcomes = sweep(run, methods, config.factors, config.seeds, one)
    if outcomes:
        report_training(config, run, dims, before, outcomes)
        curves = {
            method: metrics.read(
                run.folder_of(Trial(method, own.factor, config.seeds[0]).name)
                / "metrics.jsonl"
            )
            for method, own in outcomes.items()
        }
        title = f"{config.model}: training loss, four tasks"
        run.plot("loss", lambda: plots.losses(curves, title=title))
    if "mixlora" in outcomes:
        report_load(config, run, outcomes["mixlora"].more[0]["load"])
    report_memory(config, run)


def fitting(config: Config, sequences: list) -> Batch:
    """A row each of those whose completion begins within `seq_len` tokens."""
    able = [
        own
        for own in sequences
        if not np.ma.getmaskarray(own)[1 : config.seq_len + 1].all()
    ]
    return jmem.data.pad(able, config.seq_len)


def batches(config: Config, padded: dict, seed: int) -> jmem.data.Joint:
    """Batches with as many rows of each task."""
    each, left = divmod(config.batch_size, len(padded))
    if left or not each:
        raise ValueError(
            f"mixlora: batch_size={config.batch_size} is not a multiple of the "
            f"{len(padded)} tasks {', '.join(padded)}, which get as many rows each."
        )
    loaders = [
        jmem.data.Loader(rows, each, 1000 * seed + number)
        for number, (rows, _) in enumerate(padded.values())
    ]
    return jmem.data.Joint(tuple(loaders))


def held_out(config: Config, rows: Batch) -> tuple[Batch, Batch]:
    """Every other row each: to choose a rate by, and to judge by."""
    most = config.held_out_rows
    halves = (Batch(*(leaf[i::2][:most] for leaf in rows)) for i in (0, 1))
    return next(halves), next(halves)


def loss_of(own: Lora | MixLora, model: Decoder) -> Callable:
    """(state, batch) -> the method's loss."""
    if isinstance(own, MixLora):
        return functools.partial(own.loss, model)
    return lambda state, batch: next_token_loss(model, own.merged(state)[0], batch)


def judged(config: Config, loss, state, padded: dict) -> dict[str, Any]:
    """Nats a token of completion: {"choose": mean, "loss": mean, "parts": by task}."""
    loss = jax.jit(loss)
    choosing, judging = {}, {}
    for task, (_, rows) in padded.items():
        first, second = held_out(config, rows)
        choosing[task] = float(loss(state, first))
        judging[task] = float(loss(state, second))
    choose, mean = (sum(own.values()) / len(own) for own in (choosing, judging))
    return {"choose": choose, "loss": mean, "parts": judging}


def load_by_task(config: Config, own: MixLora, model, state, padded) -> dict:
    """{"load": {task: slots that its tokens spend on each expert, [L][E]}}."""
    load = jax.jit(lambda state, batch: own.load(model, state, batch)[:, 0])
    found = {}
    for task, (_, rows) in padded.items():
        found[task] = np.asarray(load(state, held_out(config, rows)[1])).tolist()
    return {"load": found}


# Reports ------------------------------------------------------------------------------


def report_training(
    config: Config, run: Run, dims, before: dict, outcomes: dict[Method, Outcome]
) -> None:
    """Loss by task before and after, and what each method trained."""

    def by_task(own: Outcome, task: str) -> float:
        return float(np.mean([found["parts"][task] for found in own.more]))

    columns = [Column(method, loss) for method in outcomes]
    means = (own.mean for own in outcomes.values())
    run.table(
        "Held-out loss by task",
        ["task", Column("before", loss), *columns],
        [
            (task, before[task], *(by_task(own, task) for own in outcomes.values()))
            for task in before
        ]
        + [("mean", float(np.mean(list(before.values()))), *means)],
    )

    def line(method: Method, own: Outcome) -> Iterator:
        made = finetuner(config, method, dims, own.factor)
        first = made.mixtures[0] if isinstance(made, MixLora) else made
        yield from (method, trained(made, dims), first.rank)
        yield from (first.adamw.learning_rate, own.mean)
        yield from (min(own.losses), max(own.losses), len(own.losses))
        yield "at the edge" if own.edge else ""

    run.table(
        "Each method at its best rate",
        [
            *("method", Column("trained parameters", "{:,}".format), "rank", "rate"),
            *(Column(name, loss) for name in ("mean loss", "least", "most")),
            *("seeds", "of the rates"),
        ],
        [tuple(line(*pair)) for pair in outcomes.items()],
    )
    run.note(
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens; "
        f"{len(config.factors)} rate(s) a method, {len(config.seeds)} seed(s). Losses "
        f"are nats a token of completion over at most {config.held_out_rows} held-out "
        "rows a task, other rows than the rate was chosen by. "
        f"{trained_on(outcomes.values())}"
    )


def trained(own: Lora | MixLora, dims: DecoderConfig) -> int:
    """Parameters that a method trains."""
    params = Decoder(dims).abstract()
    state = jax.eval_shape(lambda p: own.init(None, p, {}, jax.random.key(0)), params)
    held = state["lora" if isinstance(own, Lora) else "adapters"]
    return sum(leaf.size for leaf in jax.tree.leaves(held))


def report_load(config: Config, run: Run, load: dict[str, list]) -> None:
    """Which experts each task uses, and how unevenly."""
    loads = {task: np.array(own) for task, own in load.items()}  # [L, E]
    run.table(
        "Router load: slots a token spends on each expert, mean over layers",
        [
            "task",
            *(Column(str(e), "{:.2f}".format) for e in range(config.mixture.experts)),
        ],
        [(task, *map(float, own.mean(axis=0))) for task, own in loads.items()],
    )
    tasks = np.stack(list(loads.values()))
    mean = tasks.mean(axis=0)
    busiest = float((mean.max(axis=1) / mean.mean(axis=1)).max())
    apart = float(np.abs(tasks - mean).sum(axis=-1).mean() / 2)
    run.table(
        "Router",
        [
            "of",
            Column("busiest expert of a layer, share", "{:.2f}".format),
            Column("slots a task spends apart from the mean", "{:.2f}".format),
        ],
        [("all layers", busiest, apart)],
    )


def report_memory(config: Config, run: Run) -> None:
    """What fills the GPU at the peak of every method's step, and whether it fits."""
    for name, program in programs(config, run.target).items():
        run.record(jmem.measure(program, target=run.target), name)
    run.memory_table()
    run.table(
        f"Does it fit {run.target.name}?",
        [
            *("method", Column("device", gib), Column("a model", gib)),
            *(Column("at most", gib), "fits", Column("compiled in", seconds)),
        ],
        [
            (
                *(name, report.device_bytes),
                report.device_bytes / (config.together if name == "joint" else 1),
                *(max(report.interval), bool(report.fits()), report.compile_seconds),
            )
            for name, report in run.memory.items()
        ],
    )
    title = (
        f"{config.model}, {config.batch_size} x {config.seq_len} tokens a model, "
        f"{config.dtype}"
    )
    run.plot("memory", lambda: plots.memory(run.memory, title=title))


if __name__ == "__main__":
    cli.run(main, Config)
