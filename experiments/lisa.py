"""LISA beside full fine-tuning, LoRA and embedding-only: loss on real text, and memory.

    python -m experiments.lisa            SmolLM2-135M on this machine (6 minutes)
    python -m experiments.lisa --preset llama2_7b --measure-only --gpu h200
    python -m experiments.lisa --model ./my-checkpoint --data my.jsonl --gpu rtx4090
    python -m experiments.lisa --preset compare       loss against bytes (1 to 2 hours)
    python -m experiments.lisa --preset compare_long  the same, longer, on a GPU here
    python -m experiments.lisa --preset llama2_70b_fsdp8 --measure-only

Paper   Pan et al., LISA, NeurIPS 2024, arXiv:2403.17919, table 1 (peak memory).
Expect  device(lora, rank 128) < device(lisa, 2 layers) < 0.5 * device(full) at 7B with
        float32 moments; every method lowers the loss of text it was not trained on.

Every method trains the same model on the same batches for the same number of steps, at
one learning rate each. That shows that each works and what it costs; which one is best
is another question, and a few hundred steps a rate long.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from experiments.harness import cli, memory, plots, sweep
from experiments.harness.rates import explain_tie, lay_out, scale_rate
from experiments.harness.report import Column, gib, loss, make_columns, rate
from experiments.harness.run import Run
from experiments.harness.settings import need
from experiments.harness.training import Training, learn
from jmem.data import Batch, Loader
from jmem.data.source import TextSource
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.finetune.start import load_params
from jmem.models.decoder import Decoder
from jmem.models.next_token import next_token_loss
from jmem.nn.stack import Remat
from jmem.program import Program
from jmem.sharding import Layout
from jmem.targets import Target
from jmem.train import metrics

Usual = Literal["full", "lora", "lisa", "embedding"]
Method = Literal[Usual, "lora_wide", "badam", "lomo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextSource, Training):
    only: tuple[Method, ...] = ()
    """Methods to run; empty means full, lora, lisa and embedding."""
    full: Full = Full(adamw=AdamW(learning_rate=5e-5, warmup_steps=4))
    lora: Lora = Lora(adamw=AdamW(learning_rate=5e-4, warmup_steps=4))
    lisa: Lisa = Lisa(period=4, adamw=AdamW(learning_rate=1e-4, warmup_steps=4))
    embedding: Lisa = Lisa(
        active_layers=0, period=4, adamw=AdamW(learning_rate=1e-4, warmup_steps=4)
    )
    """LISA without active layers: embedding, final norm and head alone."""
    lora_wide: Lora = Lora(rank=64, adamw=AdamW(learning_rate=5e-4, warmup_steps=4))
    badam: Lisa = Lisa(
        active_layers=1,
        period=2,
        order="reshuffled",
        train=("blocks",),
        adamw=AdamW(learning_rate=1e-4, warmup_steps=4),
    )
    """BAdam: one block at a time, each once before one comes again; embedding, final
    norm and head stay."""
    lomo: Lomo = Lomo(warmup_steps=4)
    """AdaLomo, or LOMO, on all parameters."""
    held_out_tokens: int = 4096
    """Tokens, of those that are learnt, whose loss is told before and after."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0 keeps the last one only."""
    evaluate_every: int = 0
    """Updates between held-out losses, besides the first and the last; the state of the
    least one is kept too, in `best/`."""
    remat: Remat = "block"
    """What full and LoRA keep for the backward pass on `gpu`: all, matrix products, or
    block inputs only, as LISA always does."""
    mesh: Layout = Layout()
    """GPUs, of this machine and of `gpu` (as h200x8), that a step is divided over."""
    seed: int = 0
    """Of the order of the batches, of adapters and of draws."""
    factors: tuple[float, ...] = ()
    """Compare: every method is tried at its own rate times each of these, and run at
    the best one with each of `seeds`. Empty: every method runs once, at its rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Used with `factors`, in place of `seed`."""

    @property
    def growing(self) -> dict[str, str]:
        """What may be more when a run goes on, or why not: "" if it may.

        Of a comparison nothing may, as its trials have ended.
        """
        return {} if self.factors else {"steps": explain_tie(self, self.methods)}

    def __post_init__(self):
        TextSource.__post_init__(self)
        Training.__post_init__(self)
        need(self, "held_out_tokens", least=1)
        need(self, "seed", "checkpoint_every", "evaluate_every", least=0)
        if self.factors and self.mesh.devices > 1:
            raise ValueError(
                f"lisa: factors={self.factors} compare methods on one device; leave "
                "mesh out."
            )

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.only or get_args(Usual)


def build(config: Config, target: Target) -> Decoder:
    """The model as it is compiled for the described GPUs."""
    dims = config.dimensions(seq_len=config.seq_len)
    return config.build(target, dims, remat=config.remat, layout=config.mesh)


def build_here(config: Config) -> Decoder:
    """The model as it is trained on this machine."""
    dims = config.dimensions(seq_len=config.seq_len)
    return config.build_here(dims, remat=config.run_remat, layout=config.mesh)


def make_finetuners(config: Config) -> dict[Method, Any]:
    """What is trained, by method."""
    return {m: lay_out(getattr(config, m), config.steps) for m in config.methods}


def programs(config: Config, target: Target) -> dict[str, Program]:
    """One training step a method, for `target`."""
    return build_steps(config, build(config, target))


def build_steps(config: Config, model: Decoder) -> dict[str, Program]:
    """One training step a method; what a method cannot train is refused here."""
    shape = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    return {
        method: step_program(own, model, **shape)
        for method, own in make_finetuners(config).items()
    }


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    build(config, run.target)
    model = build_here(config)
    mesh = None if model.layout is None else model.layout.mesh()
    checkpoint, _ = config.open(model)
    build_steps(config, model)
    data, held_out = make_batches(config, checkpoint)
    pretrained = load_params(model, checkpoint, mesh)
    config.plan_exports(run, model, checkpoint, make_finetuners(config))
    if config.factors:
        compare(config, run, model, data, held_out, pretrained)
        return
    rows, before = {}, []
    for method, own in make_finetuners(config).items():
        folder = run.folder_of(method)
        learn(
            *(run, own, model, pretrained, data),
            folder=folder,
            steps=config.steps,
            seed=config.seed,
            mesh=mesh,
            held_out=held_out,
            evaluate_first=not rows,  # all start from the same weights
            checkpoint_every=config.checkpoint_every,
            evaluate_every=config.evaluate_every,
        )
        rows[method] = before + metrics.read(folder)
        before = before or [row for row in rows[method] if row["step"] == 0]
    report_losses(config, run, rows)
    run.note(
        f"Trained here: {config.describe(model, f'remat {config.run_remat}')}; memory "
        "here is XLA's plan of that step. Measured below is another program: "
        f"{config.dtype}, remat {config.remat}, for {config.gpu}."
    )
    report_memory(config, run)
    run.plot(
        "loss", lambda: plots.draw_losses(rows, title=f"{config.model}: held-out loss")
    )


def make_batches(config: Config, checkpoint: Any) -> tuple[Loader, tuple[Batch, ...]]:
    """Batches that every method is trained on, and those that are held out."""
    return config.batches(
        checkpoint,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        held_out_tokens=config.held_out_tokens,
        seed=config.seed,
    )


def report_losses(
    config: Config, run: Run, rows: Mapping[str, Sequence[metrics.Row]]
) -> None:
    """The loss before and after, and what a step took here.

    `rows` are the metrics of every method, with those of before the first update.
    """

    def line(method: str, own: Sequence[metrics.Row]) -> tuple[Any, ...]:
        held = [row["held_out_loss"] for row in own if "held_out_loss" in row]
        steps = [row for row in own if "loss" in row]
        timed = sorted(row["tokens_per_second"] for row in steps)
        planned = run.read_plan(method).get("bytes")
        losses = held[0], held[-1], held[0] - held[-1], steps[-1]["loss"]
        at = getattr(config, method).adamw.learning_rate, config.seed
        return method, *losses, len(steps), timed[len(timed) // 2], *at, planned

    losses = make_columns(loss, "before", "after", "gain", "train loss")
    here = Column("tokens", rate), "rate", "seed", Column("memory here", gib)
    lines = [line(method, own) for method, own in rows.items()]
    run.table("Held-out loss", ["method", *losses, "steps", *here], lines)
    run.note(
        f"{config.steps} steps of {config.size} at one rate a method, one seed: each "
        "works, but this is not a ranking. Losses are nats a token over "
        f"{config.held_out_tokens:,} held-out tokens."
    )


def compare(
    config: Config,
    run: Run,
    model: Decoder,
    data: Loader,
    held_out: tuple[Batch, ...],
    pretrained: dict,
) -> None:
    """Every method at its best of several rates, over several seeds, against bytes."""
    choosing, judging = held_out[::2], held_out[1::2]
    if not judging:
        raise ValueError(
            f"lisa: held_out_tokens={config.held_out_tokens} make one batch, and a "
            "rate is chosen by other text than it is judged by. Raise held_out_tokens."
        )

    def mean(loss, state, batches) -> float:
        weights = [float(batch.weights.sum()) for batch in batches]
        return float(np.average([loss(state, b) for b in batches], weights=weights))

    def one(trial: sweep.Trial[Method], folder: pathlib.Path) -> dict[str, float]:
        own = scale_rate(make_finetuners(config)[trial.method], trial.factor)
        state = learn(
            *(run, own, model, pretrained),
            dataclasses.replace(data, seed=trial.seed),
            folder=folder,
            steps=config.steps,
            seed=trial.seed,
            export=trial.seed == config.seeds[0],
        )
        loss = jax.jit(lambda s, b: next_token_loss(model, own.merged(s)[0], b))
        return {
            "choose": mean(loss, state, choosing),
            "loss": mean(loss, state, judging),
        }

    plain = jax.jit(functools.partial(next_token_loss, model))
    before = mean(plain, pretrained, judging)
    outcomes = sweep.search(run, config.methods, config.factors, config.seeds, one)
    memory.measure(run, programs(config, run.target))

    def cells(method: Method, own: sweep.Outcome) -> tuple[int, float]:
        best = scale_rate(getattr(config, method), own.factor).adamw.learning_rate
        return run.memory[method].device_bytes, best

    columns = [Column("device", gib), "best rate"]
    sweep.tabulate(run, "Loss against bytes", outcomes, columns, cells, before=before)
    run.note(
        f"Before: {before:.4f}. {config.steps} steps of {config.size} in "
        f"{config.run_dtype}, at the best of {len(config.factors)} rates; that is "
        "chosen by one half of the held-out text, with the first seed, and judged by "
        f"the other half. {sweep.say_where(outcomes.values())} Bytes are those of the "
        f"step compiled for {config.gpu} in {config.dtype}, remat {config.remat}."
    )
    memory.tabulate_kinds(run)
    points = {
        method: (run.memory[method].device_bytes, own.losses)
        for method, own in outcomes.items()
    }
    title = f"{config.model}: {config.steps} steps, each at its best rate"
    words = {"label": "held-out loss, nats", "title": title}
    run.plot("compare", lambda: plots.draw_against_bytes(points, **words))


def report_memory(config: Config, run: Run) -> None:
    """What fills the GPU at the peak of every method's step, and whether it fits."""
    memory.report(
        run,
        programs(config, run.target),
        title=f"Does it fit {run.target.name}?",
        picture=f"{config.model}, {config.size}, {config.dtype}",
        kinds=True,
    )
    if "lisa" in run.memory:
        run.note(
            "LISA's weights move inside the backward pass, a tile at a time."
            if config.lisa.fuses
            else "LISA makes the active blocks' gradients before it moves their "
            "weights, since they are clipped or accumulated; without that "
            "(--lisa.adamw.max-grad-norm 0) they need not exist."
        )
    largest = max(run.memory.values(), key=lambda report: max(report.interval))
    run.note(str(largest.fits()))
    if run.target.devices > 1:
        run.note(
            f"Memory is that of each of {run.target.devices} devices, of which each "
            f"has {config.batch_size // config.mesh.fsdp} of the batch's sequences."
        )


if __name__ == "__main__":
    cli.run(main, Config)
