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
import gc
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh

import jmem
import jmem.checkpoints
import jmem.data
from experiments.harness import cli, models, plots
from experiments.harness.report import Column, gib, loss, rate, seconds
from experiments.harness.run import Run
from experiments.harness.sweep import Outcome, Trial, at_rate, sweep, trained_on
from jmem.data.batch import Batch
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.memory.report import MemoryReport
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.models.next_token import next_token_loss
from jmem.nn.stack import Remat
from jmem.program import Program
from jmem.sharding import Layout
from jmem.targets import Target
from jmem.train import metrics
from jmem.train.loop import train

Usual = Literal["full", "lora", "lisa", "embedding"]
Method = Literal[Usual, "lora_wide", "badam", "lomo"]
SEPARATOR = "<|endoftext|>"
"""What stood between the documents that many models were pretrained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to train, "smollm2-135m" or a checkpoint's path."""
    data: str = ""
    """A .jsonl or .txt file to train on; empty for Python's own documentation."""
    held_out: str = ""
    """A file never trained on; empty to keep back whole documents of `data`."""
    column: str = "text"
    """The key that holds the text in a .jsonl file."""
    prompt: str = ""
    """The column of prompts, in place of `column`; with `completion`."""
    completion: str = ""
    """The column of what is to be learnt after each prompt, and alone is."""
    chat: str = ""
    """The column of chats, as lists of messages. The checkpoint's template writes them
    out, and only what the assistant says is learnt."""
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
    steps: int = 16
    """Updates a method."""
    batch_size: int = 1
    """Sequences an update."""
    seq_len: int = 512
    """Tokens a sequence."""
    held_out_tokens: int = 4096
    """Tokens, of those that are learnt, whose loss is told before and after."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0 keeps the last one only."""
    dtype: Precision = "bfloat16"
    """Of weights and activations in the programs compiled for `gpu`; "mixed" keeps
    float32 weights and computes in bfloat16."""
    remat: Remat = "block"
    """What full and LoRA keep for the backward pass on `gpu`: all, matrix products, or
    block inputs only, as LISA always does."""
    run_dtype: Precision = "float32"
    """As `dtype`, in what is trained here. A GPU multiplies float32 as TF32, unless
    JAX_DEFAULT_MATMUL_PRECISION=highest."""
    run_remat: Remat = "none"
    """As `remat`, in what is trained here."""
    mesh: Layout = Layout()
    """GPUs, of this machine and of `gpu` (as h200x8), that a step is divided over."""
    seed: int = 0
    """Of the order of the batches, of adapters and of draws."""
    factors: tuple[float, ...] = ()
    """Compare: every method is tried at its own rate times each of these, and run at
    the best one with each of `seeds`. Empty: every method runs once, at its rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Used with `factors`, in place of `seed`."""
    gpu: str = "h200"
    """GPU whose memory is laid out: a name, or a TOML file of your own."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "held_out_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"lisa: {name}={getattr(self, name)}; need >= 1.")
        kinds = {name: getattr(self, name) for name in ("prompt", "completion", "chat")}
        if self.chat and (self.prompt or self.completion):
            raise ValueError(f"lisa: {kinds} are two kinds of rows; give one of them.")
        if any(kinds.values()) and not self.data:
            raise ValueError(f"lisa: {kinds} name columns of a file; give --data.")
        if self.seed < 0 or self.checkpoint_every < 0:
            raise ValueError(
                f"lisa: seed={self.seed} and checkpoint_every={self.checkpoint_every} "
                "must not be negative."
            )
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"lisa: seeds={self.seeds}; need one or more, >= 0.")
        if any(factor <= 0 for factor in self.factors):
            raise ValueError(f"lisa: factors={self.factors} must be positive.")
        if self.factors and self.mesh.devices > 1:
            raise ValueError(
                f"lisa: factors={self.factors} compare methods on one device; leave "
                "mesh out."
            )

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.only or get_args(Usual)


def dimensions(config: Config) -> DecoderConfig:
    """Of the zoo's model, or of the checkpoint that `model` is the path of."""
    dims = models.dimensions(config.model)
    if config.seq_len > dims.max_positions:
        raise ValueError(
            f"lisa: seq_len={config.seq_len} exceeds the {dims.max_positions:,} "
            f"positions of {config.model}."
        )
    return dims


def build(config: Config, dims: DecoderConfig, target: Target) -> Decoder:
    """The model as it is compiled for the described GPUs."""
    if target.devices != config.mesh.devices:
        raise ValueError(
            f"lisa: gpu={config.gpu!r} is {target.devices} devices, and mesh.fsdp="
            f"{config.mesh.fsdp} * mesh.tensor={config.mesh.tensor} is "
            f"{config.mesh.devices}. Make them equal; a mesh of GPUs is written like "
            "'h200x8'."
        )
    return Decoder.on(
        target,
        dims,
        **PRECISIONS[config.dtype],
        remat=config.remat,
        layout=config.mesh,
    )


def build_here(config: Config, dims: DecoderConfig) -> Decoder:
    """The model as it is trained on this machine."""
    precision, remat = PRECISIONS[config.run_dtype], config.run_remat
    return Decoder.on(
        models.attached(), dims, **precision, remat=remat, layout=config.mesh
    )


def programs(config: Config, target: Target) -> dict[str, Program]:
    """One training step a method, for `target`."""
    return steps(config, build(config, dimensions(config), target))


def steps(config: Config, model: Decoder) -> dict[str, Program]:
    """One training step a method; what a method cannot train is refused here."""
    shape = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    return {
        method: step_program(getattr(config, method), model, **shape)
        for method in config.methods
    }


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run, measure(config, run.target))
        return
    dims = dimensions(config)
    build(config, dims, run.target)
    model = build_here(config, dims)
    mesh = None if model.layout is None else model.layout.mesh()
    checkpoint = jmem.checkpoints.load(config.model, model.stored_dtype)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"lisa: {checkpoint.path} holds no tokenizer; put the model's "
            "tokenizer.json beside its config.json."
        )
    steps(config, model)
    training, held_out = batches(config, checkpoint)
    pretrained = parameters(model, checkpoint, mesh)
    if config.factors:
        compare(config, run, model, training, held_out, pretrained)
        return
    rows, before = {}, []
    for method in config.methods:
        folder, own = run.folder_of(method), getattr(config, method)
        train(
            own,
            model,
            models.start(own, model, pretrained, config.seed, mesh),
            training,
            steps=config.steps,
            folder=folder,
            held_out=held_out,
            evaluate_first=not rows,  # all start from the same weights
            checkpoint_every=config.checkpoint_every,
            keep=1,
            resume=run.resume,
            trace_steps=2 if run.trace else 0,
        )
        gc.collect()
        told = metrics.read(folder / "metrics.jsonl")
        before = before or [row for row in told if row["step"] == 0]
        rows[method] = told if not rows else before + told
    report_training(config, run, rows)
    run.note(
        f"Trained here: {config.run_dtype}, {model.attention} attention, remat "
        f"{config.run_remat}, on {jax.devices()[0].device_kind}; memory here is XLA's "
        f"plan of that step. Measured below is another program: {config.dtype}, remat "
        f"{config.remat}, for {config.gpu}."
    )
    report_memory(config, run, measure(config, run.target))
    run.plot("loss", lambda: plots.losses(rows, title=f"{config.model}: held-out loss"))


def compare(
    config: Config,
    run: Run,
    model: Decoder,
    training: jmem.data.Loader,
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

    def one(trial: Trial[Method], folder: pathlib.Path) -> dict[str, float]:
        method = trial.method
        own = at_rate(getattr(config, method), trial.factor)
        state = train(
            own,
            model,
            models.start(own, model, pretrained, trial.seed),
            dataclasses.replace(training, seed=trial.seed),
            steps=config.steps,
            folder=folder,
            keep=1,
            resume=run.resume,
        )
        loss = jax.jit(lambda s, b: next_token_loss(model, own.merged(s)[0], b))
        return {
            "choose": mean(loss, state, choosing),
            "loss": mean(loss, state, judging),
        }

    plain = jax.jit(functools.partial(next_token_loss, model))
    before = mean(plain, pretrained, judging)
    outcomes = sweep(run, config.methods, config.factors, config.seeds, one)
    for name, report in measure(config, run.target):
        run.record(report, name)

    def line(method: Method, own: Outcome) -> Iterator:
        rate = at_rate(getattr(config, method), own.factor).adamw.learning_rate
        yield from (method, run.memory[method].device_bytes, rate)
        yield from (own.mean, min(own.losses), max(own.losses), before - own.mean)
        yield from (len(own.losses), "at the edge" if own.edge else "")

    run.table(
        "Loss against bytes",
        [
            *("method", Column("device", gib), "best rate"),
            *(Column(name, loss) for name in ("loss", "least", "most", "gain")),
            *("seeds", "of the rates"),
        ],
        [tuple(line(method, outcomes[method])) for method in config.methods],
    )
    run.note(
        f"Before: {before:.4f}. {config.steps} steps of {config.batch_size} x "
        f"{config.seq_len} tokens in {config.run_dtype}, at the best of "
        f"{len(config.factors)} rates; that is chosen by one half of the held-out "
        "text, with the first seed, and judged by the other half. "
        f"{trained_on(outcomes.values())} Bytes are those of the step compiled for "
        f"{config.gpu} in {config.dtype}, remat {config.remat}."
    )
    run.memory_table()
    points = {
        method: (run.memory[method].device_bytes, outcomes[method].losses)
        for method in config.methods
    }
    title = f"{config.model}: {config.steps} steps, each at its best rate"
    run.plot(
        "compare",
        lambda: plots.against_bytes(points, label="held-out loss, nats", title=title),
    )


def parameters(model: Decoder, checkpoint, mesh: Mesh | None) -> dict:
    """The pretrained weights. Those of a mesh are read into host memory first."""
    if model.layout is None or mesh is None:
        return checkpoint.params()
    with jax.default_device(jax.devices("cpu")[0]):
        params = checkpoint.params()
    return jax.device_put(params, model.layout.shardings(params, mesh))


def batches(config: Config, checkpoint) -> tuple[jmem.data.Loader, tuple[Batch, ...]]:
    """Shuffled training batches, and held-out ones in order, cut to a static length."""
    if not config.data:
        training, held_out = jmem.data.python_reference()
    else:
        read = reader(config, checkpoint)
        training = read(config.data)
        held_out = read(config.held_out) if config.held_out else None
    tokenise = functools.partial(
        jmem.data.tokenise,
        tokenizer=checkpoint.tokenizer,
        end=end_token(config, checkpoint),
        vocab_size=checkpoint.config.vocab_size,
        add_special_tokens=not config.chat,
    )
    sequences = tokenise(training)
    if held_out is None:
        sequences, kept = keep_back(config, sequences)
    else:
        kept = tokenise(held_out)
    test, found = [], 0
    for batch in jmem.data.in_order(
        jmem.data.pack(kept, config.seq_len), config.batch_size
    ):
        test.append(batch)
        found += int(batch.weights.sum())
        if found >= config.held_out_tokens:
            break
    else:
        raise ValueError(
            f"lisa: held_out_tokens={config.held_out_tokens}, but the held-out text "
            f"has only {found}; lower it, or give a longer --held-out."
        )
    packed = jmem.data.pack(sequences, config.seq_len)
    return jmem.data.Loader(packed, config.batch_size, config.seed), tuple(test)


def reader(config: Config, checkpoint) -> Callable[[str], Iterable]:
    """How a file is read: as text, prompts with their completions, or chats."""
    if config.chat:
        path = checkpoint.path
        template = jmem.data.read_template(path if path.is_dir() else path.parent)
        return functools.partial(
            jmem.data.read_chats, template=template, column=config.chat
        )
    return functools.partial(
        jmem.data.read,
        column=config.column,
        prompt=config.prompt or None,
        completion=config.completion or None,
        unit="file" if config.held_out else "paragraph",
    )


def end_token(config: Config, checkpoint) -> str:
    """The token that closes a document.

    A completion ends where generation stops, at the first of the checkpoint's
    `eos_ids`. A text or a chat, whose template ends each turn, ends in SEPARATOR where
    the tokenizer knows it, and else as a completion does.
    """
    tokenizer = checkpoint.tokenizer
    known = [end for end in map(tokenizer.id_to_token, checkpoint.eos_ids) if end]
    if not config.completion and tokenizer.token_to_id(SEPARATOR) is not None:
        return SEPARATOR
    return known[0] if known else SEPARATOR


def keep_back(config: Config, sequences: list) -> tuple[list, list]:
    """The last whole documents that make up `held_out_tokens`, apart from the rest."""
    wanted, first = config.held_out_tokens + 1, len(sequences)
    while first and wanted > 0:
        first -= 1
        wanted -= np.ma.count(sequences[first])
    if wanted > 0 or first == 0:
        raise ValueError(
            f"lisa: --data {config.data} has no {config.held_out_tokens} tokens to "
            "keep back beside some to train on; lower --held-out-tokens, or give "
            "--held-out."
        )
    return sequences[:first], sequences[first:]


def report_training(config: Config, run: Run, rows: dict[str, list[dict]]) -> None:
    """Loss before and after, of text not trained on, and what a step took here."""

    def line(method: str, own: list[dict]) -> Iterator:
        held = [row["held_out_loss"] for row in own if "held_out_loss" in row]
        steps = [row for row in own if "loss" in row]
        timed = sorted(row["tokens_per_second"] for row in steps)
        yield from (method, held[0], held[-1], held[0] - held[-1])
        yield from (steps[-1]["loss"], len(steps), timed[len(timed) // 2])
        yield from (getattr(config, method).adamw.learning_rate, config.seed)
        plan = json.loads((run.folder_of(method) / "plan.json").read_text())
        yield plan["bytes"]

    run.table(
        "Held-out loss",
        [
            "method",
            *(Column(n, loss) for n in ("before", "after", "gain", "train loss")),
            "steps",
            Column("tokens", rate),
            "rate",
            "seed",
            Column("memory here", gib),
        ],
        [tuple(line(method, own)) for method, own in rows.items()],
    )
    run.note(
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens at one "
        "rate a method, one seed: each works, but this is not a ranking. "
        f"Losses are nats a token over {config.held_out_tokens:,} held-out tokens."
    )


def measure(config: Config, target: Target) -> Iterator[tuple[str, MemoryReport]]:
    """Memory of every method's step on the described GPU."""
    for name, program in programs(config, target).items():
        yield name, jmem.measure(program, target=target)


def report_memory(
    config: Config, run: Run, reports: Iterable[tuple[str, MemoryReport]]
) -> None:
    """What fills the GPU at the peak of every method's step, and whether it fits."""
    for name, report in reports:
        run.record(report, name)
    run.memory_table()
    run.table(
        f"Does it fit {run.target.name}?",
        [
            "method",
            Column("device", gib),
            Column("at most", gib),
            "fits",
            Column("compiled in", seconds),
        ],
        [
            (
                *(name, report.device_bytes, max(report.interval)),
                *(bool(report.fits()), report.compile_seconds),
            )
            for name, report in run.memory.items()
        ],
    )
    largest = max(run.memory.values(), key=lambda report: max(report.interval))
    if "lisa" in run.memory:
        run.note(
            "LISA's weights move inside the backward pass, a tile at a time."
            if config.lisa.fuses
            else "LISA makes the active blocks' gradients before it moves their "
            "weights, since they are clipped or accumulated; without that "
            "(--lisa.adamw.max-grad-norm 0) they need not exist."
        )
    run.note(str(largest.fits()))
    if run.target.devices > 1:
        run.note(
            f"Memory is that of each of {run.target.devices} devices, of which each "
            f"has {config.batch_size // config.mesh.fsdp} of the batch's sequences."
        )
    title = (
        f"{config.model}, {config.batch_size} x {config.seq_len} tokens, {config.dtype}"
    )
    run.plot("memory", lambda: plots.memory(run.memory, title=title))


if __name__ == "__main__":
    cli.run(main, Config)
