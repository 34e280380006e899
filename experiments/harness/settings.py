"""Settings that experiments share, each with what is done by it.

    class Config(Here, Card, Weights):                # their flags first, then its own
        shares: tuple[float, ...] = (0.5,)

        def __post_init__(self):
            need(self, "shares", above=0, below=1, some=True, once=True)

    dims = config.dimensions(prompt=512, new_tokens=64)   # refuses what is too long
    config.build(target, dims)                            # for a GPU, there or not
    model = config.build_here(dims)                       # for this machine
    checkpoint, tokenizer = config.open(model)

`Weights` says what is opened, `Card` what is compiled for, `Here` what runs, `Compiled`
what a program has that reads a prompt and goes on from its cache. An experiment that
states one of their fields again gives it another default.
"""

import dataclasses
import operator
import os
from typing import TYPE_CHECKING, Any

import jax

import jmem.checkpoints
from experiments.harness.config import find_slug
from jmem.checkpoints import Checkpoint
from jmem.models import zoo
from jmem.models.decoder import PRECISIONS, Decoder, DecoderConfig, Precision
from jmem.nn.stack import Remat
from jmem.sharding import Layout
from jmem.targets import Target, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The model that an experiment is about."""

    model: str = "smollm2-135m"
    """A name in jmem.models.zoo; to run, "smollm2-135m" or a checkpoint's path."""

    def dimensions(self, **tokens: int) -> DecoderConfig:
        """Of the zoo's model, or of the checkpoint that `model` is the path of.

        Args:
          **tokens: parts of a sequence by the fields that say how long they are.

        Raises:
          ValueError: there is no such model, or it has positions for fewer tokens.
        """
        dims = dimensions(self.model)
        if sum(tokens.values()) > dims.max_positions:
            sizes = " + ".join(f"{name}={size}" for name, size in tokens.items())
            verb = "exceed" if len(tokens) > 1 else "exceeds"
            raise ValueError(
                f"{_name_owner(self)}: {sizes} {verb} the {dims.max_positions:,} "
                f"positions of {self.model}."
            )
        return dims

    def open(self, model: Decoder) -> "tuple[Checkpoint, Tokenizer]":
        """The checkpoint, in the dtype that `model` stores; its weights stay on disk.

        Raises:
          CheckpointError: it cannot be read, or holds no tokenizer.
        """
        checkpoint = jmem.checkpoints.load(self.model, model.stored_dtype)
        return checkpoint, checkpoint.require_tokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The GPU that programs are compiled for, there or not."""

    dtype: Precision = "bfloat16"
    """Of weights and activations in the programs compiled for `gpu`; "mixed" keeps
    float32 weights and computes in bfloat16."""
    gpu: str = "h200"
    """GPU whose memory is laid out: a name, or a TOML file of your own."""

    def build(self, target: Target, dims: DecoderConfig, **more: Any) -> Decoder:
        """The model as it is compiled for `target`; `more` as `build`."""
        return build(target, dims, self.dtype, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Here:
    """What runs on this machine, where it need not be what is compiled for a card."""

    run_dtype: Precision = "float32"
    """As `dtype`, in what runs here. A GPU multiplies float32 as TF32, unless
    JAX_DEFAULT_MATMUL_PRECISION=highest."""

    def build_here(self, dims: DecoderConfig, **more: Any) -> Decoder:
        """The model as it runs on the attached device; `more` as `build`."""
        return build(attached(), dims, self.run_dtype, **more)

    def describe(self, model: Decoder, *more: str) -> str:
        """In words, how and where `model` runs.

        >>> Here().describe(Decoder(dimensions("gpt2")), "remat none")
        'float32, xla attention, remat none, on cpu'
        """
        words = (self.run_dtype, f"{model.attention} attention", *more)
        return f"{', '.join(words)}, on {jax.devices()[0].device_kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The programs compiled for `gpu`: a prompt is read, and its cache decoded from."""

    prompt: int = 2048
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Room for an answer; with none, a new token takes the place of the last one."""
    batch_size: int = 1
    """Prompts read together."""
    chunk: int = 4096
    """Tokens of a row handled at a time where each is handled alone, as by the MLP."""
    dtype: Precision = "bfloat16"
    """Of weights, activations and caches."""

    def __post_init__(self):
        need(self, "prompt", "batch_size", "chunk", least=1)
        need(self, "new_tokens", least=0)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that a cache is planned by."""
        names = ("prompt", "new_tokens", "batch_size")
        return {name: getattr(self, name) for name in names}

    def build(self, target: Target, weights: Weights) -> Decoder:
        """The model as it is compiled for `target`.

        Raises:
          ValueError: it has no positions for the prompt and its answer.
        """
        dims = weights.dimensions(prompt=self.prompt, new_tokens=self.new_tokens)
        return build(target, dims, self.dtype, chunk=self.chunk)


# Models -------------------------------------------------------------------------------


def dimensions(model: str) -> DecoderConfig:
    """Sizes of a model of the zoo, or of the checkpoint that `model` is the path of.

    A folder that holds config.json and no weights has sizes too.
    """
    named = "/" in model or model.endswith((".gguf", ".safetensors", ".json"))
    if named or (model not in zoo.MODELS and os.path.isdir(model)):
        return jmem.checkpoints.read_config(model)
    return zoo.get(model)


def attached() -> Target | None:
    """The kind of GPU in this machine as far as attention goes; None without one."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    capability = str(device.compute_capability)
    return dataclasses.replace(resolve("h200"), compute_capability=capability)


def build(
    target: Target | None,
    dims: DecoderConfig,
    dtype: Precision,
    *,
    remat: Remat = "none",
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Decoder:
    """The decoder for `target`, or for a CPU (None).

    Raises:
      ValueError: the target has another number of devices than the mesh of `layout`.
    """
    if target and layout and target.devices != layout.devices:
        raise ValueError(
            f"gpu={target.name!r} is {target.devices} devices, and mesh.fsdp="
            f"{layout.fsdp} * mesh.tensor={layout.tensor} is {layout.devices}. Make "
            "them equal; a mesh of GPUs is written like 'h200x8'."
        )
    precision = PRECISIONS[dtype]
    model = Decoder.on(target, dims, **precision, remat=remat, layout=layout)
    return dataclasses.replace(model, chunk=chunk) if chunk else model


# Refusals -----------------------------------------------------------------------------


def need(
    config: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    some: bool = False,
    once: bool = False,
    why: str = "",
) -> None:
    """Refuses a field outside the bounds; of a tuple, every entry must be within.

    A field that is None is let be.

    Args:
      config: whose fields they are; it is named in the message.
      *names: of the fields.
      least: the value itself is allowed.
      above: the value itself is not allowed.
      most: as `least`, from above.
      below: as `above`, from above.
      some: a tuple must not be empty.
      once: a tuple must not name one value twice.
      why: the end of the message.

    Raises:
      ValueError: names the field, its value, and what it needs.

    >>> need(Compiled(), "chunk", least=1, below=2**12)
    Traceback (most recent call last):
    ValueError: Compiled: chunk=4096; need >= 1 and < 4,096.
    """
    bounds = [
        (sign, bound, holds)
        for sign, bound, holds in (
            *((">=", least, operator.ge), (">", above, operator.gt)),
            *(("<=", most, operator.le), ("<", below, operator.lt)),
        )
        if bound is not None
    ]
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        many = isinstance(value, tuple)
        entries = value if many else (value,)
        within = all(holds(e, bound) for e in entries for _, bound, holds in bounds)
        twice = once and len(set(entries)) < len(entries)
        if within and not twice and (entries or not some):
            continue
        rules = [" and ".join(f"{sign} {bound:,}" for sign, bound, _ in bounds)]
        rules = [f"each {rule}" if many else rule for rule in rules if rule]
        rules = ["one or more"] * some + rules + ["none twice"] * once
        reason = f"; {why}" if why else ""
        raise ValueError(
            f"{_name_owner(config)}: {name}={value}; need {', '.join(rules)}{reason}."
        )


def _name_owner(config: Any) -> str:
    """Who a message speaks for: the experiment, or the table within its config."""
    kind = type(config)
    return find_slug(kind) if kind.__name__ == "Config" else kind.__name__
