"""Explain one program: what fills a GPU's memory at its peak, and does it fit?

    python -m experiments.memory              full AdamW on LLaMA-2-7B, H200 (1 minute)
    python -m experiments.memory --method lora --gpu rtx4090
    python -m experiments.memory --model llama3-8b --program decode --seq-len 8192
    python -m experiments.memory --preset llama2_70b_lisa

No GPU, no weights: XLA's GPU compiler lays the program out on this machine. Prints the
kinds of memory, the largest buffers with the line that made them, and the verdict;
writes the same, and a timeline of live bytes as PNG, to runs/memory/.

Expect  LLaMA-2-7B, batch 1, 1,024 tokens on an H200: full 75.7 GiB, lora (rank 128)
        16.9 GiB, lisa (2 layers) 19.3 GiB.
"""

import dataclasses
from typing import Literal

import jmem
from experiments.harness import cli
from experiments.harness.report import GiB
from experiments.harness.run import Run
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import loss_program, step_program
from jmem.generate.decode import decode_program
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.program import Program
from jmem.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "llama2-7b"
    """A name in jmem.models.zoo."""
    program: Literal["train", "forward", "decode"] = "train"
    """One training step, the loss of one batch, or one token from a full cache."""
    method: Literal["full", "lora", "lisa"] = "full"
    """What the training step updates, and how."""
    batch_size: int = 1
    """Sequences."""
    seq_len: int = 1024
    """Tokens a sequence; for decode, slots of the cache."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations; moments have their own, --lisa.adamw.moment-dtype."""
    remat: Literal["none", "dots", "block"] = "block"
    """What the backward pass keeps: all, the matrix products, or only block inputs."""
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
        most = zoo.get(self.model).max_positions
        if not 1 <= self.seq_len <= most:
            raise ValueError(
                f"memory: seq_len={self.seq_len} is out of range; {self.model} has "
                f"positions for 1 to {most:,} tokens."
            )
        for name in ("batch_size", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory: {name}={getattr(self, name)}; need >= 1.")
        if not 0 <= self.reserve < 1024:
            raise ValueError(f"memory: reserve={self.reserve} GiB; need 0 to 1,024.")


def build(config: Config, target: Target) -> Decoder:
    """The model as it runs on `target`."""
    dims = zoo.get(config.model)
    return Decoder.on(target, dims, dtype=config.dtype, remat=config.remat)


def programs(config: Config, target: Target) -> dict[str, Program]:
    """The one program that is asked about, by name."""
    model = build(config, target)
    sizes = {"batch_size": config.batch_size}
    match config.program:
        case "train":
            finetuner = getattr(config, config.method)
            program = step_program(finetuner, model, seq_len=config.seq_len, **sizes)
            return {f"train-{config.method}": program}
        case "forward":
            return {"forward": loss_program(model, seq_len=config.seq_len, **sizes)}
        case "decode":
            return {"decode": decode_program(model, slots=config.seq_len, **sizes)}


def main(config: Config, run: Run) -> None:
    run.measure_only = True  # with the flag or without it
    reserve = round(config.reserve * GiB)
    [(name, program)] = programs(config, run.target).items()
    run.note(
        f"{config.model}, {name}: batch {config.batch_size}, {config.seq_len:,} tokens,"
        f" {config.dtype}, compiled for {run.target.name}"
    )
    if config.program != "decode":  # which has its own, over the cache
        run.note(f"attention: {build(config, run.target).attention}")
    with run.console.status("compiling twice, with and without Triton matmuls"):
        report = jmem.measure(program, target=run.target)
    report = dataclasses.replace(report, name=f"{config.model}, {name},")
    run.record(report, name, reserve=reserve)
    run.note(report.table(top=config.top, reserve=reserve))
    report.plot(run.picture("timeline"), reserve=reserve)


if __name__ == "__main__":
    cli.run(main, Config)
