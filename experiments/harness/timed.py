"""What the checks on a GPU measure: every program by name, and how it is built.

    SAMPLES      experiments.gpu_check    programs whose peak is beside its prediction
    STEPS        experiments.step_rate    fine-tuners whose training step is timed
    FINETUNERS   experiments.step_check   fine-tuners whose losses are beside the CPU's
    POINTS       experiments.decode_rate  prompts and rows at which each of POLICIES,
                                          the caches, is decoded from

SAMPLES are those of `jmem.finetune.samples`. Each check is a module that has
`programs(row, target, config)`: the programs of a row, by name, for a described GPU.
Nothing is on any device before somebody runs them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lomo import Lomo
from jmem.finetune.lora import Lora
from jmem.finetune.mixlora import MixLora, Mixture
from jmem.finetune.program import step_program
from jmem.finetune.samples import build_decoder
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full as FullCache
from jmem.kvcache.plan import PolicyPlan
from jmem.kvcache.policy import Policy
from jmem.kvcache.snapkv import SnapKV
from jmem.kvcache.windowkv import WindowKV
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.joined import join_maps
from jmem.program import Program
from jmem.targets import Target

# Fine-tuners --------------------------------------------------------------------------


def make_finetuners(
    adamw: AdamW, *, rank: int = 8, period: int = Lisa.period
) -> dict[str, Any]:
    """Every fine-tuner by name, with one `adamw` for all that have one."""
    lisa = Lisa(active_layers=2, period=period, adamw=adamw)
    blocks = dataclasses.replace(lisa, active_layers=1, train=("blocks",))
    half = dataclasses.replace(adamw, moment_dtype="bfloat16")
    return {
        "full": Full(adamw=adamw),
        "lora": Lora(rank=rank, adamw=adamw),
        "lisa": lisa,
        "lisa-separate": dataclasses.replace(lisa, update="separate"),
        "lisa-bf16": dataclasses.replace(lisa, adamw=half),
        "lisa-host": dataclasses.replace(lisa, moments="persist", persist_in="host"),
        "badam": dataclasses.replace(blocks, order="reshuffled"),
        "lomo": Lomo(),
        "embedding": dataclasses.replace(lisa, active_layers=0),
        "mixlora": MixLora(mixtures=(Mixture(rank=4, experts=4, adamw=adamw),)),
    }


UNCLIPPED = AdamW(max_grad_norm=0.0)
STEPS = ("lora", "lisa", "lisa-separate", "lisa-bf16", "lomo", "full")
"""Those that are timed at 7B, where the dearest comes last."""
FINETUNERS = tuple(name for name in make_finetuners(UNCLIPPED) if name != "lisa-bf16")
"""Those whose losses are compared; moments of 16 bits would be another's losses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of the training step that is timed: its model and its batch."""

    model: str = "llama2-7b"
    """A name in jmem.models.zoo."""
    batch_size: int = 1
    """Sequences a step."""
    seq_len: int = 1024
    """Tokens a sequence."""


def build_step(method: str, sizes: StepSizes, target: Target) -> Program:
    """A donated training step in bfloat16, blocks computed again going backward."""
    finetuner = make_finetuners(UNCLIPPED, rank=128)[method]
    model = build_decoder(sizes.model, target)
    size = {"batch_size": sizes.batch_size, "seq_len": sizes.seq_len}
    return step_program(finetuner, model, **size)


# Caches -------------------------------------------------------------------------------

POLICIES: dict[str, Policy] = {
    "full": FullCache(),
    "snapkv": SnapKV(capacity=1024),
    "windowkv": WindowKV(capacity=1024),
}
"""The full cache first, which the others are set by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A prompt's length, rows, and how many times faster the cut caches must be."""

    prompt: int
    batch: int
    expect: float


POINTS = {
    "8k-b32": Point(prompt=8192, batch=32, expect=2.3),
    "32k-b16": Point(prompt=32768, batch=16, expect=4.0),
    "128k-b6": Point(prompt=131072, batch=6, expect=6.0),
}
DECODED = "llama3-8b"


def build_reader(target: Target | None, name: str = DECODED) -> Decoder:
    """The model that decodes; its positions reach as far as the points do."""
    config = dataclasses.replace(zoo.get(name), max_positions=2**18)
    model = Decoder.on(target, config, dtype=jnp.bfloat16)
    return dataclasses.replace(model, chunk=4096)  # of prompts, which are long


def draw_reader(model: Decoder) -> Callable[[jax.Array], dict]:
    """What draws random weights to decode by: maps that read one input side by side."""

    def draw(key):
        params = model.init(key)
        return params | {"blocks": join_maps(params["blocks"])}

    return draw


def plan_caches(
    model: Decoder, point: Point, new_tokens: int, target: Target | None
) -> dict[str, PolicyPlan]:
    """Each policy's cache at a point."""
    size: Any = {"prompt": point.prompt, "new_tokens": new_tokens}
    return {
        name: policy.plan(model, **size, batch_size=point.batch, target=target)
        for name, policy in POLICIES.items()
    }


def build_decoding(point: Point, new_tokens: int, target: Target) -> dict[str, Program]:
    """One decoding step from each policy's cache."""
    model = build_reader(target)
    plans = plan_caches(model, point, new_tokens, target)
    params = jax.eval_shape(draw_reader(model), jax.random.key(0))
    return {
        name: decode_program(model, plan, params=params) for name, plan in plans.items()
    }
