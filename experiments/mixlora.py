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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

import jmem.data
from experiments.harness import cli, memory, plots, sweep
from experiments.harness.rates import lay_out, scale_rate
from experiments.harness.report import Column, gib, loss, make_columns, score
from experiments.harness.run import Run
from experiments.harness.settings import need
from experiments.harness.training import Training, learn
from jmem.data import Batch, Document
from jmem.finetune import mixture as slots
from jmem.finetune.adamw import AdamW
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture, Update
from jmem.finetune.mixlora_official import OfficialMixLora, VanillaMixLora
from jmem.finetune.program import step_program
from jmem.models.decoder import Decoder, DecoderConfig
from jmem.models.next_token import next_token_loss
from jmem.nn.stack import Remat
from jmem.program import Program
from jmem.targets import Target
from jmem.train import metrics

Method = Literal["lora", "mixlora", "joint", "official", "vanilla"]
TRAINED: tuple[Method, ...] = ("lora", "mixlora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    only: tuple[Method, ...] = ("lora", "mixlora", "joint")
    """Methods to run; empty means all. What is not LoRA or MixLoRA is only measured."""
    mixture: Mixture = Mixture(
        rank=8, alpha=16.0, adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0)
    )
    lora: Lora = Lora(adamw=AdamW(learning_rate=1e-3, max_grad_norm=0.0))
    """Its rank and alpha are set to `find_equal_rank`'s, unless `equal` is off."""
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
    batch_size: int = 4
    """Sequences an update, for each mixture; a multiple of the four tasks to train."""
    seq_len: int = 128
    """Tokens a sequence, padded."""
    held_out_rows: int = 24
    """Sequences of each task whose loss is told before and after."""
    remat: Remat = "block"
    """What is kept for the backward pass on `gpu`; of an MLP MixLoRA never keeps more
    than its input."""
    factors: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        super().__post_init__()
        need(self, "together", "held_out_rows", least=1)
        need(self, "seq_len", least=2)
        need(self, "factors", some=True)

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.only or get_args(Method)


# Programs -----------------------------------------------------------------------------


def find_equal_rank(mixture: Mixture, dims: DecoderConfig) -> int:
    """The rank of LoRA, on the same maps, with about as many trained parameters."""
    each = count_trained(Lora(rank=1, maps=mixture.maps), dims)
    return max(round(count_trained(MixLora(mixtures=(mixture,)), dims) / each), 1)


@functools.cache
def count_trained(own: Lora | MixLora, dims: DecoderConfig) -> int:
    """Parameters that a method trains."""
    params = Decoder(dims).abstract()
    state = jax.eval_shape(lambda p: own.init(None, p, {}, jax.random.key(0)), params)
    held = state["lora" if isinstance(own, Lora) else "adapters"]
    return sum(leaf.size for leaf in jax.tree.leaves(held))


def make_finetuner(
    config: Config, method: Method, dims: DecoderConfig, factor: float = 1.0
) -> Lora | MixLora:
    """The method as the config has it, its learning rate times `factor`."""
    mixture = lay_out(scale_rate(config.mixture, factor), config.steps)
    if method == "lora":
        lora = lay_out(scale_rate(config.lora, factor), config.steps)
        if not config.equal:
            return lora
        rank = find_equal_rank(config.mixture, dims)
        maps = config.mixture.maps
        return dataclasses.replace(lora, rank=rank, alpha=2.0 * rank, maps=maps)
    options = {"router": config.router, "dropout": config.dropout}
    if method in ("official", "vanilla"):
        kind = OfficialMixLora if method == "official" else VanillaMixLora
        options |= {"update": "separate"}
        return kind(mixtures=(mixture,), **options)
    count = config.together if method == "joint" else 1
    return MixLora(mixtures=(mixture,) * count, update=config.update, **options)


def make_finetuners(config: Config) -> dict[Method, Lora | MixLora]:
    """What is trained, by method."""
    dims = config.dimensions()
    return {
        method: make_finetuner(config, method, dims)
        for method in TRAINED
        if method in config.methods
    }


def count_rows(config: Config, method: Method) -> int:
    """Rows of a method's batch: those of all its mixtures."""
    return config.batch_size * (config.together if method == "joint" else 1)


def programs(config: Config, target: Target) -> dict[str, Program]:
    """One training step a method, for `target`."""
    dims = config.dimensions(seq_len=config.seq_len)
    model = config.build(target, dims, remat=config.remat)
    found = {}
    for method in config.methods:
        size = {"batch_size": count_rows(config, method), "seq_len": config.seq_len}
        found[method] = step_program(
            make_finetuner(config, method, dims), model, **size
        )
    return found


# The run ------------------------------------------------------------------------------


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    dims = config.dimensions(seq_len=config.seq_len)
    model = config.build_here(dims, remat=config.run_remat)
    checkpoint, tokenizer = config.open(model)

    def pad(documents: Iterable[Document]) -> Batch:
        sequences = jmem.data.tokenise(documents, tokenizer, vocab_size=dims.vocab_size)
        able = jmem.data.keep_trainable(sequences, config.seq_len)
        return jmem.data.pad(able, config.seq_len)

    corpora = jmem.data.python_tasks()
    training = {task: pad(corpus.training) for task, corpus in corpora.items()}
    tested = {task: pad(corpus.held_out) for task, corpus in corpora.items()}
    pretrained = checkpoint.params()
    finetuners = make_finetuners(config)
    config.plan_exports(run, model, checkpoint, finetuners)
    balance = functools.partial(jmem.data.balance, training, config.batch_size)
    balance(config.seeds[0])  # refuses a batch without every task

    def one(trial: sweep.Trial[Method], folder: pathlib.Path) -> dict[str, Any]:
        own = make_finetuner(config, trial.method, dims, trial.factor)
        state = learn(
            *(run, own, model, pretrained),
            balance(trial.seed),
            folder=folder,
            steps=config.steps,
            seed=trial.seed,
            export=trial.seed == config.seeds[0],
        )
        found = judge(config, choose_loss(own, model), state, tested)
        if isinstance(own, MixLora):
            found |= {"load": count_load_by_task(config, own, model, state, tested)}
        return found

    plain = functools.partial(next_token_loss, model)
    before = judge(config, plain, pretrained, tested)["parts"]
    outcomes = sweep.search(run, finetuners, config.factors, config.seeds, one)
    if outcomes:
        report_training(config, run, dims, before, outcomes)
        curves = {
            method: metrics.read(run.folder_of(own.first))
            for method, own in outcomes.items()
        }
        title = f"{config.model}: training loss, four tasks"
        run.plot("loss", lambda: plots.draw_losses(curves, title=title))
    if "mixlora" in outcomes:
        report_load(config, run, outcomes["mixlora"].more[0]["load"])
    report_memory(config, run)


def split_held_out(config: Config, rows: Batch) -> tuple[Batch, Batch]:
    """Two batches of every other row: to choose a rate by, and to judge by."""
    most = config.held_out_rows

    def take(first: int) -> Batch:
        return jax.tree.map(lambda leaf: leaf[first::2][:most], rows)

    return take(0), take(1)


def choose_loss(own: Lora | MixLora, model: Decoder) -> Callable:
    """(state, batch) -> the method's loss."""
    if isinstance(own, MixLora):
        return functools.partial(own.loss, model)
    return lambda state, batch: next_token_loss(model, own.merged(state)[0], batch)


def judge(config: Config, loss, state, tested: Mapping[str, Batch]) -> dict[str, Any]:
    """Nats a token of completion: {"choose": mean, "loss": mean, "parts": by task}."""
    loss = jax.jit(loss)
    choosing, judging = {}, {}
    for task, rows in tested.items():
        first, second = split_held_out(config, rows)
        choosing[task] = float(loss(state, first))
        judging[task] = float(loss(state, second))
    choose, mean = (sum(own.values()) / len(own) for own in (choosing, judging))
    return {"choose": choose, "loss": mean, "parts": judging}


def count_load_by_task(
    config: Config, own: MixLora, model, state, tested
) -> dict[str, list]:
    """By task: slots that its tokens spend on each expert, [L][E]."""
    load = jax.jit(lambda state, batch: own.load(model, state, batch)[:, 0])
    return {
        task: np.asarray(load(state, split_held_out(config, rows)[1])).tolist()
        for task, rows in tested.items()
    }


# Reports ------------------------------------------------------------------------------


def report_training(
    config: Config, run: Run, dims, before: dict, outcomes: dict[Method, sweep.Outcome]
) -> None:
    """Loss by task before and after, and what each method trained."""

    def by_task(own: sweep.Outcome, task: str) -> float:
        return float(np.mean([found["parts"][task] for found in own.more]))

    rows: list[tuple] = [
        (task, before[task], *(by_task(own, task) for own in outcomes.values()))
        for task in before
    ]
    means = (own.mean for own in outcomes.values())
    rows.append(("mean", float(np.mean(list(before.values()))), *means))
    columns = ["task", *make_columns(loss, "before", *outcomes)]
    run.table("Held-out loss by task", columns, rows)

    def cells(method: Method, own: sweep.Outcome) -> tuple[int, int, float]:
        made = make_finetuner(config, method, dims, own.factor)
        first = made.mixtures[0] if isinstance(made, MixLora) else made
        return count_trained(made, dims), first.rank, first.adamw.learning_rate

    columns = [Column("trained parameters", "{:,}".format), "rank", "rate"]
    title = "Each method at its best rate"
    sweep.tabulate(run, title, outcomes, columns, cells, name="mean loss")
    run.note(
        f"{config.steps} steps of {config.size}; "
        f"{len(config.factors)} rate(s) a method, {len(config.seeds)} seed(s). Losses "
        f"are nats a token of completion over at most {config.held_out_rows} held-out "
        "rows a task, other rows than the rate was chosen by. "
        f"{sweep.say_where(outcomes.values())}"
    )


def report_load(config: Config, run: Run, load: dict[str, list]) -> None:
    """Which experts each task uses, and how unevenly."""
    loads = {task: np.array(own) for task, own in load.items()}  # [L, E]
    title = "Router load: slots a token spends on each expert, mean over layers"
    experts = make_columns(score, *map(str, range(config.mixture.experts)))
    rows = [(task, *map(float, own.mean(axis=0))) for task, own in loads.items()]
    run.table(title, ["task", *experts], rows)
    tasks = np.stack(list(loads.values()))
    mean = tasks.mean(axis=0)
    busiest = float((mean.max(axis=1) / mean.mean(axis=1)).max())
    apart = float(np.abs(tasks - mean).sum(axis=-1).mean() / 2)
    heads = (
        "busiest expert of a layer, share",
        "slots a task spends apart from the mean",
    )
    columns = ["of", *make_columns(score, *heads)]
    run.table("Router", columns, [("all layers", busiest, apart)])


def report_memory(config: Config, run: Run) -> None:
    """What fills the GPU at the peak of every method's step, and whether it fits."""
    method, device, *rest = memory.FIT
    models = {"joint": config.together}
    memory.report(
        run,
        programs(config, run.target),
        title=f"Does it fit {run.target.name}?",
        columns=(method, device, Column("a model", gib), *rest),
        rows=lambda found: (
            (name, size, size / models.get(name, 1), *more)
            for name, size, *more in memory.list_fits(found)
        ),
        picture=f"{config.model}, {config.size} a model, {config.dtype}",
        kinds=True,
    )


if __name__ == "__main__":
    cli.run(main, Config)
