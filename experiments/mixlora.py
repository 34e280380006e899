"""MixLoRA beside LoRA of as many parameters: loss by task, router load, memory.

    python -m experiments.mixlora         SmolLM2-135M on four tasks (8 minutes)
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
import gc
from collections.abc import Iterator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

import jmem
import jmem.checkpoints
import jmem.data
from experiments.harness import cli, models, plots
from experiments.harness.report import Column, gib, loss, rate, seconds
from experiments.harness.run import Run
from jmem.data.batch import Batch
from jmem.finetune import mixture as slots
from jmem.finetune.adamw import AdamW
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture, MixtureFeed, Update
from jmem.finetune.program import step_program
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.nn import quantised
from jmem.nn.stack import Remat
from jmem.program import Program
from jmem.targets import Target
from jmem.train import metrics
from jmem.train.loop import train
from jmem.train.loss import next_token_loss

Method = Literal["lora", "mixlora", "joint", "official", "vanilla"]
TRAINED: tuple[Method, ...] = ("lora", "mixlora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to train, "smollm2-135m" or a checkpoint's path."""
    only: tuple[Method, ...] = ()
    """Methods to run; empty means all."""
    mixture: Mixture = Mixture(
        rank=8, alpha=16.0, adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0)
    )
    lora: Lora = Lora(adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0), dropout=0.05)
    """Its rank and alpha are set to `equal_rank`'s, unless `equal` is off."""
    equal: bool = True
    """LoRA gets the rank that trains as many parameters as the mixture, alpha twice
    that."""
    together: int = 2
    """Mixtures of "joint", which are trained over one base."""
    router: slots.Router = "top_k"
    update: Update = "auto"
    """Of MixLoRA's adapters: inside the backward pass, or after it."""
    dropout: float = 0.05
    steps: int = 60
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
    """As `dtype`, in what is trained here."""
    run_remat: Remat = "none"
    """As `remat`, in what is trained here."""
    seed: int = 0
    """Of the order of the batches, of adapters and of dropout."""
    gpu: str = "h200"
    """GPU whose memory is laid out: a name, or a TOML file of your own."""

    def __post_init__(self):
        sizes = "together", "steps", "batch_size", "seq_len", "held_out_rows"
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"mixlora: {name}={getattr(self, name)}; need >= 1.")
        if self.seed < 0:
            raise ValueError(f"mixlora: seed={self.seed} must not be negative.")

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.only or get_args(Method)


# The official schemes, to be measured -------------------------------------------------


class OfficialFeed(MixtureFeed):
    """Gate and up once a token, down once a slot; JAX makes the backward pass."""

    shared: tuple[str, ...] = ("gate", "up")

    def experts_of(self, experts, x, chosen, weights, adapters, base, key):
        def product(name, x):
            return quantised.linear(name, base[name], x)

        hidden = [name for name in ("gate", "up") if name in base]
        once = {name: product(name, x) for name in hidden if name in self.shared}
        scale = jnp.array(experts.scales, x.dtype)[:, None, None]

        def low_rank(name, x, mask):
            a, b = (half.astype(x.dtype) for half in adapters[name])
            code = jnp.einsum("jni,jir->jnr", x, a) * scale * mask
            return jnp.einsum("jnr,jro->jno", code, b)

        y = jnp.zeros(x.shape, jnp.float32)
        for slot in range(chosen.shape[-1]):
            example = adapters["down"][1][:, :, 0][:, None]  # [J, 1, E*r]
            mask = slots.mask_of(experts, chosen[..., slot], example).astype(x.dtype)
            inner = None
            for name in hidden:
                own = once[name] if name in once else product(name, x)
                own += low_rank(name, x, mask)
                inner = experts.activate(own) if inner is None else inner * own
            out = product("down", inner) + low_rank("down", inner, mask)
            y += weights[..., slot, None] * out.astype(jnp.float32)
        return y.astype(x.dtype)


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
    sizes = {"q": width + queries, "k": width + keys, "v": width + keys}
    sizes |= {"o": width + queries, "up": width + inner, "down": width + inner}
    sizes |= {"gate": width + inner} if dims.gated else {}
    plain = sum(size for name, size in sizes.items() if name in mixture.maps)
    mixed = sum(
        size * (mixture.experts if name in ("gate", "up", "down") else 1)
        for name, size in sizes.items()
        if name in mixture.maps
    )
    return max(round((mixture.rank * mixed + mixture.experts * width) / plain), 1)


def finetuner(config: Config, method: Method, dims: DecoderConfig) -> Lora | MixLora:
    """The method as the config has it."""
    if method == "lora":
        if not config.equal:
            return config.lora
        rank = equal_rank(config.mixture, dims)
        maps = config.mixture.maps
        return dataclasses.replace(config.lora, rank=rank, alpha=2.0 * rank, maps=maps)
    options = {"router": config.router, "dropout": config.dropout}
    if method in ("official", "vanilla"):
        kind = OfficialMixLora if method == "official" else VanillaMixLora
        options |= {"update": "separate"}
        return kind(mixtures=(config.mixture,), **options)
    count = config.together if method == "joint" else 1
    mixtures = (config.mixture,) * count
    return MixLora(mixtures=mixtures, update=config.update, **options)


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
    chosen = [method for method in TRAINED if method in config.methods]
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
    training, held_out = tasks(config, checkpoint)
    pretrained = checkpoint.params()
    before = {
        task: float(jax.jit(functools.partial(next_token_loss, model))(pretrained, own))
        for task, own in held_out.items()
    }
    after, curves, loads = {}, {}, {}
    for method in chosen:
        own = finetuner(config, method, dims)
        state = train(
            own,
            model,
            start(config, own, model, pretrained),
            training,
            steps=config.steps,
            folder=run.folder_of(method),
            keep=1,
            resume=run.resume,
            trace_steps=2 if run.trace else 0,
        )
        curves[method] = metrics.read(run.folder_of(method) / "metrics.jsonl")
        after[method] = by_task(own, model, state, held_out)
        if isinstance(own, MixLora):
            loads = load_by_task(own, model, state, held_out)
        del state
        gc.collect()
    report_training(config, run, dims, curves, before, after)
    if loads:
        report_load(config, run, loads)
    report_memory(config, run)
    if curves:
        title = f"{config.model}: training loss, four tasks"
        run.plot("loss", lambda: plots.losses(curves, title=title))


def start(config: Config, own: Lora | MixLora, model: Decoder, pretrained: dict):
    """A method's state from a copy of the pretrained weights: training consumes it."""

    @jax.jit
    def init(params, key):
        return own.init(model, jax.tree.map(jnp.copy, params), key)

    return init(pretrained, jax.random.key(config.seed))


def tasks(config: Config, checkpoint) -> "tuple[jmem.data.Joint, dict[str, Batch]]":
    """Batches with as many rows of each task, and held-out rows of each."""
    corpora = jmem.data.python_tasks()
    each, left = divmod(config.batch_size, len(corpora))
    if left or not each:
        raise ValueError(
            f"mixlora: batch_size={config.batch_size} is not a multiple of the "
            f"{len(corpora)} tasks {', '.join(corpora)}."
        )
    loaders, held_out = [], {}
    for number, (task, corpus) in enumerate(corpora.items()):
        padded = [
            fitting(config, jmem.data.tokenise(documents, checkpoint.tokenizer))
            for documents in corpus
        ]
        loaders.append(jmem.data.Loader(padded[0], each, config.seed + number))
        rows = [leaf[: config.held_out_rows] for leaf in padded[1]]
        held_out[task] = Batch(*rows)
    return jmem.data.Joint(tuple(loaders)), held_out


def fitting(config: Config, sequences: list) -> Batch:
    """A row each of those whose completion begins within `seq_len` tokens."""
    able = [
        own
        for own in sequences
        if not np.ma.getmaskarray(own)[1 : config.seq_len + 1].all()
    ]
    return jmem.data.pad(able, config.seq_len)


def by_task(own, model: Decoder, state, held_out: dict[str, Batch]) -> dict:
    """Held-out loss of every task, nats a token of completion."""

    @jax.jit
    def of(state, batch):
        if isinstance(own, MixLora):
            return own.loss(model, state, batch)
        return next_token_loss(model, own.merged(state), batch)

    return {task: float(of(state, batch)) for task, batch in held_out.items()}


def load_by_task(own: MixLora, model: Decoder, state, held_out) -> dict:
    """Slots that tokens of each task spend on each expert: {task: [L, E]}."""
    of = jax.jit(lambda state, batch: own.load(model, state, batch)[:, 0])
    return {task: np.asarray(of(state, batch)) for task, batch in held_out.items()}


# Reports ------------------------------------------------------------------------------


def report_training(config: Config, run: Run, dims, curves, before, after) -> None:
    """Loss by task before and after, and what a step took here."""
    columns = [Column(method, loss) for method in after]
    run.table(
        "Held-out loss by task",
        ["task", Column("before", loss), *columns],
        [
            (task, before[task], *(after[method][task] for method in after))
            for task in before
        ]
        + [
            (
                *("mean", float(np.mean(list(before.values())))),
                *(float(np.mean(list(own.values()))) for own in after.values()),
            )
        ],
    )

    def line(method) -> Iterator:
        own = finetuner(config, method, dims)
        timed = sorted(row["tokens_per_second"] for row in curves[method])
        yield from (method, trained(own, dims), curves[method][-1]["loss"])
        yield from (len(curves[method]), timed[len(timed) // 2])
        first = own.mixtures[0] if isinstance(own, MixLora) else own
        yield from (first.rank, first.adamw.learning_rate, config.seed)

    run.table(
        "Training",
        [
            *("method", Column("trained parameters", "{:,}".format)),
            *(Column("train loss", loss), "steps", Column("tokens", rate)),
            *("rank", "rate", "seed"),
        ],
        [tuple(line(method)) for method in curves],
    )
    run.note(
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} padded tokens "
        "at one rate a method, one seed: not a ranking. Losses are nats a token of "
        f"completion over {config.held_out_rows} held-out rows a task."
    )


def trained(own: Lora | MixLora, dims: DecoderConfig) -> int:
    """Parameters that a method trains."""
    params = Decoder(dims).abstract()
    state = jax.eval_shape(
        lambda params: own.init(None, params, jax.random.key(0)), params
    )
    held = state["lora" if isinstance(own, Lora) else "adapters"]
    return sum(leaf.size for leaf in jax.tree.leaves(held))


def report_load(config: Config, run: Run, loads: dict[str, np.ndarray]) -> None:
    """Which experts each task uses, and how unevenly."""
    mean = {task: own.mean(axis=0) for task, own in loads.items()}
    experts = config.mixture.experts
    run.table(
        "Router load: slots a token spends on each expert, mean over layers",
        ["task", *(Column(str(e), "{:.2f}".format) for e in range(experts))],
        [(task, *map(float, own)) for task, own in mean.items()],
    )
    everything = np.mean(list(loads.values()), axis=0)
    worst = float((everything.max(axis=1) / everything.mean(axis=1)).max())
    tasks = np.stack(list(loads.values()))
    apart = float(np.abs(tasks - everything).sum(axis=-1).mean() / 2)
    run.note(
        f"The busiest expert of any layer has {worst:.2f} times its share; in the mean "
        f"over layers and tasks {apart:.2f} of a token's "
        f"{float(everything.sum(axis=1).mean()):.2f} slots go elsewhere than the "
        "average task's."
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
