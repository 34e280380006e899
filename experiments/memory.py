"""Explain one program: what fills a GPU's memory at its peak, and does it fit?

    python -m experiments.memory              full AdamW on LLaMA-2-7B, H200 (1 minute)
    python -m experiments.memory --method lora --gpu rtx4090
    python -m experiments.memory --model llama3-8b --program decode --seq-len 8192
    python -m experiments.memory --preset llama2_70b_lisa
    python -m experiments.memory --model llama2-70b --method lora --weights host

No GPU, no weights: XLA's GPU compiler lays the program out on this machine. Prints the
kinds of memory, the largest buffers with the line that made them, and the verdict;
writes the same, and a timeline of live bytes as PNG, to runs/memory/. Where saved
activations are most of the peak, it measures the step under every other `remat` too.
Exit status 1: it does not fit.

Expect  LLaMA-2-7B, batch 1, 1,024 tokens on an H200: full 75.7 GiB, lora (rank 128)
        16.9 GiB, lisa (2 layers) 19.3 GiB.
"""

import dataclasses
import re
from typing import Any, Literal, get_args

import jax

import jmem
from experiments.harness import cli, memory
from experiments.harness.rates import lay_out
from experiments.harness.report import GiB, gib, make_columns
from experiments.harness.run import Run
from experiments.harness.settings import Card, Weights, need
from jmem import offload
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import loss_program, step_program
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full as FullCache
from jmem.memory.report import MemoryReport
from jmem.models.decoder import Precision
from jmem.nn.stack import Remat
from jmem.program import Program, format_path
from jmem.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Card, Weights):
    model: str = "llama2-7b"
    """A name in jmem.models.zoo, or a checkpoint's path."""
    program: Literal["train", "forward", "decode"] = "train"
    """One training step, the loss of one batch, or one token from a full cache."""
    method: Literal["full", "lora", "lisa"] = "full"
    """What the training step updates, and how."""
    batch_size: int = 1
    """Sequences."""
    seq_len: int = 1024
    """Tokens a sequence; for decode, slots of the cache."""
    dtype: Precision = "bfloat16"
    """Of weights and activations, or "mixed": float32 weights under bfloat16 products.
    Moments have their own, --lisa.adamw.moment-dtype."""
    remat: Remat = "block"
    """What the backward pass keeps: all, the matrix products, only block inputs, or
    those in host memory ("offload")."""
    weights: Literal["device", "host"] = "device"
    """Where the blocks' weights live; on the host, a layer at a time visits the GPU. Of
    training, only LoRA leaves them alone; --full.moments host moves full's moments."""
    full: Full = Full()
    lora: Lora = Lora(rank=128)
    lisa: Lisa = Lisa()
    gpu: str = "h200"
    """GPU the program is compiled for: a name, h200x8, or a TOML file of your own."""
    reserve: float = 1.0
    """GiB that must stay free for the program to fit."""
    top: int = 12
    """Largest buffers listed."""

    def __post_init__(self):
        need(self, "seq_len", "batch_size", "top", least=1)
        need(self, "reserve", least=0, below=1024)
        self.dimensions(seq_len=self.seq_len)
        if self.weights == "host" and (self.program, self.method) in (
            ("train", "full"),
            ("train", "lisa"),
        ):
            raise ValueError(
                f"memory: weights='host' is for weights that nothing changes, and "
                f"method={self.method!r} trains them. Use --method lora."
            )

    @property
    def name(self) -> str:
        """The program's, in tables and file names."""
        return f"train-{self.method}" if self.program == "train" else self.program


def programs(config: Config, target: Target) -> dict[str, Program]:
    """The one program that is asked about, by name."""
    model = config.build(target, config.dimensions(), remat=config.remat)
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    match config.program:
        case "train":
            # Over however many updates a rate falls, a step holds the same.
            own = lay_out(getattr(config, config.method), 1_000_000)
            program = step_program(own, model, **sizes)
        case "forward":
            program = loss_program(model, **sizes)
        case "decode":
            plan = FullCache().plan(
                model, prompt=config.seq_len, new_tokens=0, batch_size=config.batch_size
            )
            program = decode_program(model, plan)
    if config.weights == "host":
        program = blocks_on_host(program)
    return {config.name: program}


def blocks_on_host(program: Program) -> Program:
    """The program, given the blocks of its weights in pinned host memory."""
    blocks = re.compile("(params/)?blocks/")

    def place(path, leaf):
        return offload.on_host(leaf) if blocks.match(format_path(path)) else leaf

    first, *others = program.args
    first = jax.tree.map_with_path(place, first)
    # No row is read in place any more: jmem.nn.stack.choose_options.
    given: Any = {"args": (first, *others), "options": {}, "make": None}
    return dataclasses.replace(program, **given)


def main(config: Config, run: Run) -> int:
    run.measure_only = True  # with the flag or without it
    reserve = round(config.reserve * GiB)
    [(name, program)] = programs(config, run.target).items()
    run.note(
        f"{config.model}, {name}: batch {config.batch_size}, {config.seq_len:,} tokens,"
        f" {config.dtype}, compiled for {run.target.name}"
    )
    if config.program != "decode":  # which has its own, over the cache
        model = config.build(run.target, config.dimensions())
        run.note(f"attention: {model.attention}")
    with run.console.status("compiling twice, with and without Triton matmuls"):
        report = jmem.measure(program, target=run.target)
    report = dataclasses.replace(report, name=f"{config.model}, {name},")
    run.record(report, name, reserve=reserve)
    run.note(report.table(top=config.top, reserve=reserve))
    report.plot(run.picture("timeline"), reserve=reserve)
    if not report.fits(reserve):
        suggest(config, run, reserve)
    if "saved activations" in [advice.rule for advice in report.advice]:
        compare_remat(config, run, report)
    return int(not report.fits(reserve))


def suggest(config: Config, run: Run, reserve: int) -> None:
    """What would fit in place of a program that does not: compiled; and which cards."""
    rows = []
    for words, other in list_alternatives(config).items():
        [(name, program)] = programs(other, run.target).items()
        with run.console.status(f"compiling {name}, {words}"):
            found = jmem.measure(program, target=run.target, bounds=False)
        fits = bool(found.fits(reserve))
        rows.append((words, found.device_bytes, found.host_bytes, fits))
    for words in memory.explain({config.name: run.memory[config.name]}, reserve):
        run.note(words)
    if rows:
        columns = ["instead", *make_columns(gib, "device", "host"), "fits"]
        run.table(f"What would fit {run.target.name}", columns, rows)


def list_alternatives(config: Config) -> dict[str, Config]:
    """Configs that need less memory for the same model and tokens, by their flags."""
    changes: list[dict[str, Any]] = [{"weights": "host"}]
    if config.program == "train":
        changes = [
            {"method": "lisa", "remat": "block", "weights": "device"},
            {"method": "lora", "remat": "block"},
            {"method": "lora", "remat": "block", "weights": "host"},
        ]
    found = {}
    for change in changes:
        other = dataclasses.replace(config, **change)
        flags = [
            f"--{name} {value}"
            for name, value in change.items()
            if getattr(config, name) != value
        ]
        if flags:
            found[" ".join(flags)] = other
    return found


def compare_remat(config: Config, run: Run, report: MemoryReport) -> None:
    """A table of the same step under every `remat`; each is compiled."""
    rows = []
    for remat in get_args(Remat):
        if remat != config.remat:
            other = dataclasses.replace(config, remat=remat)
            [program] = programs(other, run.target).values()
            with run.console.status(f"compiling with remat {remat}"):
                found = jmem.measure(program, target=run.target, bounds=False)
        else:
            found = report
        saved = report.device_bytes - found.device_bytes
        rows.append((remat, found.device_bytes, found.host_bytes, saved))
    columns = ["remat", *make_columns(gib, "device", "host", "saves")]
    run.table("What the backward pass keeps", columns, rows)


if __name__ == "__main__":
    cli.run(main, Config)
