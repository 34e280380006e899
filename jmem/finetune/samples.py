"""Programs of every kind, whose memory is predicted: what a card is compared with.

    report = jmem.memory.confirm(build, "lora", "h200", target="h200")   # on that card

Training steps of several fine-tuners, a forward pass, decoding from a cache, moments on
the host, an NNX module, a Pallas kernel, and the classic fault of a cache that exists
twice. `python -m experiments.gpu_check` confirms all of them, and a test accounts for
every byte of each, small, without a card.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import loss_program, step_program
from jmem.generate.programs import decode_program
from jmem.kvcache.cache import decode_attend, make_empty
from jmem.kvcache.full import Full as FullCache
from jmem.kvcache.plan import PolicyPlan
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.linear import dense
from jmem.nn.ops import Ops
from jmem.program import Program
from jmem.targets import Target, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the programs are made of: 1 to 24 GiB each, so that 1 % means something."""

    model: str = "tinyllama-1.1b"
    """Of most programs; a name in jmem.models.zoo."""
    gpt2: str = "gpt2-large"
    """Of the program that is GPT-2's."""
    batch: int = 4
    """Sequences a step."""
    seq_len: int = 1024
    """Tokens a sequence."""
    accumulate: int = 4
    """Parts of the batch that is accumulated."""
    decode_batch: int = 32
    """Rows that are decoded together."""
    slots: int = 2048
    """Tokens that their cache holds."""
    width: int = 8192
    """Of the two programs that are no transformers."""


def build_decoder(
    name: str, target: Target, remat: Literal["none", "block"] = "block"
) -> Decoder:
    """A model of the zoo as `target` runs it best."""
    return Decoder.on(target, zoo.get(name), dtype="bfloat16", remat=remat)


type Sample = Callable[[Sizes, Target], Program]


def _build_step(
    finetuner: Callable[[Sizes], Any],
    remat: Literal["none", "block"] = "block",
    model: Literal["model", "gpt2"] = "model",
) -> Sample:
    """A donated training step of a fine-tuner on one of the models."""

    def build(sizes: Sizes, target: Target) -> Program:
        decoder = build_decoder(getattr(sizes, model), target, remat)
        size = {"batch_size": sizes.batch, "seq_len": sizes.seq_len}
        return step_program(finetuner(sizes), decoder, **size)

    return build


def forward(sizes: Sizes, target: Target) -> Program:
    """The loss of a batch, and nothing kept of it."""
    model = build_decoder(sizes.model, target)
    return loss_program(model, batch_size=sizes.batch, seq_len=sizes.seq_len)


def plan_cache(model: Decoder, sizes: Sizes) -> PolicyPlan:
    """Of a plain cache."""
    size: Any = {"new_tokens": 0, "batch_size": sizes.decode_batch}
    return FullCache().plan(model, prompt=sizes.slots, **size)


def decode(sizes: Sizes, target: Target) -> Program:
    """One token for every row of a donated cache, which the layer scan carries."""
    model = build_decoder(sizes.model, target)
    return decode_program(model, plan_cache(model, sizes))


def rebuild(sizes: Sizes, target: Target) -> Program:
    """The same, but the cache is scanned over and stacked anew: the classic fault."""
    model = build_decoder(sizes.model, target)
    layers = model.config.layers
    single = dataclasses.replace(model.config, layers=1)
    plan = plan_cache(dataclasses.replace(model, config=single), sizes)
    carried = decode(sizes, target)

    def make(key):
        assert carried.make is not None
        rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), make_empty(plan))
        return *carried.make(key)[:3], rows

    def step(params, tokens, positions, cache):
        def body(x, xs):
            layer_params, row = xs
            attend = decode_attend(plan, model.config, row, positions)
            given = positions[:, None], jnp.int32(0), Ops(attend, dense), row
            done: Any = model.block(layer_params, x, *given)
            return done[:2]

        x = model.embed(params, tokens[:, None], positions[:, None])
        x, cache = jax.lax.scan(body, x, (params["blocks"], cache))
        return model.head(params, x[:, 0], model.ops), cache

    args = jax.eval_shape(make, jax.random.key(0))
    return dataclasses.replace(carried, fn=step, args=args, make=make)


def nnx(sizes: Sizes, target: Target) -> Program:
    """A step of Adam on a flax NNX module and optimizer, float32."""
    import optax
    from flax import nnx

    del target

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(sizes.width, 4 * sizes.width, rngs=rngs)
            self.down = nnx.Linear(4 * sizes.width, sizes.width, rngs=rngs)

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(x)))

    def make():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    graph, state = nnx.split(nnx.eval_shape(make))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss(model):
            return jnp.mean((model(batch) - batch) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    rows = sizes.batch * sizes.seq_len
    batch = jax.ShapeDtypeStruct((rows, sizes.width), jnp.float32)
    labels = {"weights": (0, "0"), "optimizer": (0, "1/opt_state"), "batch": (1, "")}
    return Program(step, (state, batch), donate=(0,), labels=labels)


def mosaic(sizes: Sizes, target: Target) -> Program:
    """A step of SGD whose products are JAX's own Mosaic GPU kernel for Hopper."""
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as hopper

    del target
    tiles = hopper.TuningConfig(
        tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=3
    )

    @jax.custom_vjp
    def product(a, b):
        return hopper.matmul(a, b, None, tiles)

    def product_forward(a, b):
        return product(a, b), (a, b)

    def product_backward(residuals, dy):
        a, b = residuals
        return product(dy, b.T), product(a.T, dy)

    product.defvjp(product_forward, product_backward)

    def step(params, x):
        def loss(params):
            y = product(jax.nn.relu(product(x, params["up"])), params["down"])
            return jnp.mean((y - x).astype(jnp.float32) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(
            lambda w, g: w - w.dtype.type(0.1) * g, params, gradients
        ), value

    def described(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {
        "up": described(sizes.width, 2 * sizes.width),
        "down": described(2 * sizes.width, sizes.width),
    }
    x = described(sizes.batch * sizes.seq_len, sizes.width)
    labels = {"weights": (0, ""), "batch": (1, "")}
    return Program(step, (params, x), donate=(0,), labels=labels)


SAMPLES: dict[str, Sample] = {
    "forward": forward,
    "unremat": _build_step(lambda sizes: Full(), remat="none"),
    "full": _build_step(lambda sizes: Full()),
    "accumulated": _build_step(lambda sizes: Full(accumulate=sizes.accumulate)),
    "lora": _build_step(lambda sizes: Lora()),
    "lisa": _build_step(lambda sizes: Lisa(active_layers=2)),
    "gpt2": _build_step(lambda sizes: Full(), model="gpt2"),
    "decode": decode,
    "rebuilt": rebuild,
    "offloaded": _build_step(lambda sizes: Full(moments="host")),
    "nnx": nnx,
    "mosaic": mosaic,
}


def build(name: str, gpu: str, sizes: Sizes | None = None) -> Program:
    """A sample for the GPU called `gpu`."""
    return SAMPLES[name](sizes or Sizes(), resolve(gpu))
