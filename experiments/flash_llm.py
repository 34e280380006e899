"""Pruned weights: held-out loss against bytes, and what decoding with them takes.

    python -m experiments.flash_llm            SmolLM2-135M on this machine (25 minutes)
    python -m experiments.flash_llm --preset opt_175b --measure-only --gpu h200
    python -m experiments.flash_llm --model ./my-checkpoint --data my.jsonl

Paper   Xia et al., Flash-LLM, VLDB 2024, arXiv:2309.10285: OPT-30B, 66B and 175B at
        70, 80 and 90 % sparsity, pruned by somebody else.
Expect  OPT-175B at 80 % decodes eight sequences on one H200, where the paper takes four
        A100s. Loss: SparseGPT <= Wanda <= magnitude at 50 and 60 %. Types of four and
        five bits lose less than zeros do at their bytes.

Every criterion prunes the same weights by the same text, and every loss is of the same
other text. Bytes are those of the blocks' maps as they lie on a card, in 16 bits where
a row says nothing else; embedding, norms and head are the same in all rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import cli, memory, plots
from experiments.harness.journal import Journal
from experiments.harness.report import Column, gib, loss, make_columns, mib, share
from experiments.harness.run import Run
from experiments.harness.settings import Card, Here, Weights, need
from experiments.harness.training import learn
from experiments.harness.weights import build_loss, list_kernels, pack, round_to
from jmem.checkpoints import Checkpoint
from jmem.data import Batch, Loader
from jmem.data.source import TextSource
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full as Finetuning
from jmem.generate.decode import generate
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full
from jmem.models.decoder import Decoder
from jmem.program import Program
from jmem.sparse import flash_llm
from jmem.sparse.flash_llm import FormatName, Values
from jmem.sparse.prune import CRITERIA, prune
from jmem.targets import Target

Name = Literal["sparsegpt", "wanda", "magnitude"]
Dense = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """The programs compiled for `gpu`: one decoding step of every kind of weights."""

    sparsities: tuple[float, ...] = (0.6, 0.8)
    """Shares of zeros."""
    formats: tuple[FormatName, ...] = ("FragBitmap", "TiledCSL")
    values: Values = "stored"
    """Of FragBitmap's numbers; others keep 16 bits."""
    prompt: int = 64
    """Tokens before the first new one."""
    new_tokens: int = 512
    """Room for an answer."""
    batch_size: int = 8
    """Sequences decoded together."""

    def __post_init__(self):
        need(self, "sparsities", least=0, below=1, some=True, once=True)
        need(self, "prompt", "new_tokens", "batch_size", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextSource, Here, Card, Weights):
    criteria: tuple[Name, ...] = ("sparsegpt", "wanda", "magnitude")
    """What prunes; the weights of the first are also kept as integers, and tuned."""
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8)
    """Shares of zeros in every row of a map."""
    integers: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
    """What the first criterion's numbers are also kept as."""
    dense: tuple[Dense, ...] = ("Q8_0", "Q5_0", "Q4_0")
    """GGUF's types that the unpruned maps are rounded to."""
    recover_sparsity: float = 0.6
    """Of the weights that are fine-tuned, zeros staying zero; as many steps of the
    unpruned ones stand beside them."""
    recover_steps: int = 16
    """0: nothing is fine-tuned."""
    recover: Finetuning = Finetuning(
        adamw=AdamW(learning_rate=1e-4, warmup_steps=4), keep_zeros=True
    )
    calibration_tokens: int = 8192
    """What criteria go by, of the training text."""
    held_out_tokens: int = 4096
    """Tokens whose loss is told."""
    seq_len: int = 256
    """Tokens a sequence."""
    batch_size: int = 8
    """Sequences read together."""
    question: str = "The capital of France is"
    """What every model is asked."""
    packed: Packed = Packed()
    seed: int = 0
    """Of the order of the text."""

    def __post_init__(self):
        TextSource.__post_init__(self)
        need(self, "criteria", "sparsities", some=True, once=True)
        need(self, "sparsities", least=0, below=1)
        need(self, "recover_sparsity", least=0, below=1)
        need(self, "recover_steps", "seed", least=0)
        names = ("calibration_tokens", "held_out_tokens", "batch_size")
        need(self, *names, least=1)
        need(self, "seq_len", least=2)


# Memory on a GPU ----------------------------------------------------------------------


def programs(config: Config, target: Target) -> dict[str, Program]:
    """A decoding step with dense weights, and one of each format and sparsity."""
    own = config.packed
    sizes = {"prompt": own.prompt, "new_tokens": own.new_tokens}
    model = config.build(target, config.dimensions(**sizes))
    plan = Full().plan(model, **sizes, batch_size=own.batch_size, target=target)
    found = {"dense": decode_program(model, plan)}
    for form in own.formats:
        values = own.values if form == "FragBitmap" else "stored"
        for part in own.sparsities:
            params = flash_llm.abstract(
                model.abstract(), part, format=form, values=values
            )
            name = f"{form}-{100 * part:g}"
            found[name] = decode_program(model, plan, params=params)
    return found


def report_memory(config: Config, run: Run) -> None:
    """What a decoding step holds on the described GPU, and whether it fits."""
    own = config.packed

    def rows(found: memory.Reports) -> Iterable[Sequence[Any]]:
        for name, one in found.items():
            kinds = one.by_label["weights"], one.by_label["kv cache"]
            yield name, *kinds, one.device_bytes, bool(one.fits())

    size = f"{own.batch_size} x ({own.prompt:,} + {own.new_tokens:,}) tokens"
    memory.report(
        *(run, programs(config, run.target)),
        title=f"A decoding step on {run.target.name}",
        columns=["weights", *make_columns(gib, "held", "kv cache", "peak"), "fits"],
        rows=rows,
        note=f"{config.model}, {size}, {config.dtype}; FragBitmap's numbers "
        f"{own.values}. Masks are drawn: every value is zero by itself with that "
        "probability.",
        picture=f"{config.model}, {size}",
        bounds=run.measure_only,
    )


# What runs here -----------------------------------------------------------------------


class Bench(NamedTuple):
    """All that a run needs, opened and checked."""

    checkpoint: Checkpoint
    model: Decoder
    params: dict
    data: Loader
    calibration: tuple[Batch, ...]
    held_out: tuple[Batch, ...]


def open_bench(config: Config) -> Bench:
    """Reads weights and text, and refuses what cannot work."""
    model = config.build_here(config.dimensions(seq_len=config.seq_len), remat="block")
    checkpoint, _ = config.open(model)
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    data, held_out = config.batches(
        checkpoint, **sizes, held_out_tokens=config.held_out_tokens, seed=config.seed
    )
    count = -(-config.calibration_tokens // (config.batch_size * config.seq_len))
    calibration = tuple(data.batch(index) for index in range(count))
    return Bench(checkpoint, model, checkpoint.params(), data, calibration, held_out)


def main(config: Config, run: Run) -> None:
    if run.measure_only:
        report_memory(config, run)
        return
    bench = open_bench(config)
    known = Journal(run.folder, resume=run.resume)
    tabulate(config, run, compare(config, run, bench, known))
    report_recovery(config, run, bench, known)
    run.note(
        f"Run here: {config.describe(bench.model)}. Measured below are other programs: "
        f"{config.dtype}, for {config.gpu}."
    )
    report_memory(config, run)


class Row(NamedTuple):
    """One kind of weights."""

    curve: str
    """What it is a point of."""
    sparsity: float | None
    """None: nothing was pruned."""
    nbytes: int
    loss: float
    answer: str


def compare(
    config: Config, run: Run, bench: Bench, known: Journal
) -> Mapping[str, Row]:
    """Loss and bytes of every kind of weights, by name; known ones are not made again.

    Raises:
      ValueError: a map that a type or a pattern cannot hold.
    """
    evaluate = build_loss(bench.model, bench.held_out)
    tokenizer = bench.checkpoint.require_tokenizer()
    question = tokenizer.encode(config.question).ids
    found: dict[str, Row] = {}

    def add(curve: str, sparsity: float | None, make: Callable[[], tuple[dict, int]]):
        name = curve if sparsity is None else f"{curve} {share(sparsity)}"

        def measure() -> dict[str, np.ndarray]:
            params, nbytes = make()
            (answer,) = generate(bench.model, params, [question], max_new_tokens=12)
            values = {"loss": evaluate(params), "bytes": nbytes, "answer": answer}
            return {key: np.asarray(value) for key, value in values.items()}

        with run.console.status(f"{name}: pruning, packing, reading"):
            own: dict[str, Any] = known(name, measure)
        words = " ".join(tokenizer.decode(own["answer"]).split())
        found[name] = Row(curve, sparsity, own["bytes"], own["loss"], words)
        run.console.print(f"{name}: loss {own['loss']:.4f}", highlight=False)

    width = np.dtype(jnp.bfloat16).itemsize
    whole = sum(kernel.size for kernel in list_kernels(bench.params))
    add("16 bits", None, lambda: (bench.params, whole * width))
    for kind in config.dense:
        add(kind, None, functools.partial(round_to, bench.params, kind))
    for name in config.criteria:
        for part in config.sparsities:
            make = functools.cache(functools.partial(cut, bench, name, part))
            add(name, part, lambda make=make: pack(make()))
            for values in config.integers if name == config.criteria[0] else ():
                curve = f"{name}, {values}"
                add(curve, part, lambda make=make, v=values: pack(make(), v))
    return found


def cut(bench: Bench, name: Name, sparsity: float) -> dict:
    """The parameters as a criterion prunes them."""
    criterion, calibration = CRITERIA[name], bench.calibration
    return prune(bench.model, bench.params, criterion, sparsity, calibration)


def tabulate(config: Config, run: Run, rows: Mapping[str, Row]) -> None:
    """Loss and bytes of every kind of weights, as a table and as curves."""
    whole = rows["16 bits"]
    lines = [
        (
            *(name, row.nbytes, whole.nbytes / row.nbytes),
            *(row.loss, row.loss - whole.loss, row.answer),
        )
        for name, row in rows.items()
    ]
    columns = ["weights", Column("maps", mib), Column("smaller", "{:.2f}x".format)]
    columns += [*make_columns(loss, "loss", "lost"), "answer"]
    run.table("Loss against bytes", columns, lines)
    run.note(
        f"{config.model}, {config.held_out_tokens:,} held-out tokens, nats a token; "
        f"calibrated by {config.calibration_tokens:,} others. Every map takes the "
        f'smallest form, its kernel in 16 bits among them. Asked: "{config.question}".'
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows.values():
        curve = "GGUF" if row.curve in config.dense else row.curve
        curves.setdefault(curve, []).append((row.nbytes, row.loss))
    run.plot(
        "loss_by_bytes",
        lambda: plots.draw_by_bytes(
            {curve: sorted(points) for curve, points in curves.items()},
            bytes_label="linear maps of the blocks",
            label="held-out loss, nats a token",
            title=f"{config.model}: pruned, and rounded",
        ),
    )


# Fine-tuned, and asked ----------------------------------------------------------------


def report_recovery(config: Config, run: Run, bench: Bench, known: Journal) -> None:
    """The loss after a few steps with the zeros kept, and of the unpruned weights."""
    if not config.recover_steps:
        return
    evaluate = build_loss(bench.model, bench.held_out)
    first, part = config.criteria[0], config.recover_sparsity

    def measure(make: Callable[[], dict], folder: str) -> dict[str, np.ndarray]:
        params = make()
        before = evaluate(params)
        state = learn(
            *(run, config.recover, bench.model, params, bench.data),
            folder=run.folder_of(folder),
            steps=config.recover_steps,
            seed=config.seed,
            export=False,
        )
        tuned = config.recover.merged(state)[0]
        kernels = list_kernels(tuned)
        zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
        size = sum(kernel.size for kernel in kernels)
        values = {"before": before, "after": evaluate(tuned), "zeros": zeros / size}
        return {key: np.asarray(value) for key, value in values.items()}

    pruned = functools.partial(cut, bench, first, part)
    kinds = {
        "16 bits": ("unpruned", lambda: jax.tree.map(jnp.copy, bench.params)),
        f"{first} {share(part)}": ("pruned", pruned),
    }
    lines = []
    for name, (folder, make) in kinds.items():
        own = known(f"{name}, fine-tuned", functools.partial(measure, make, folder))
        lines.append((name, own["before"], own["after"], own["zeros"]))
    columns = [*make_columns(loss, "before", "after"), Column("zeros after", share)]
    run.table("Fine-tuned, zeros kept", ["weights", *columns], lines)
    run.note(
        f"{config.recover_steps} steps of {config.batch_size} x {config.seq_len} "
        "tokens, both by the same text at one rate."
    )


if __name__ == "__main__":
    cli.run(main, Config)
