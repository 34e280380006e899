"""A stack's weights are read where they lie, as IN_PLACE has XLA do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jmem.finetune.lora import Lora
from jmem.finetune.program import step_program
from jmem.lowering import IN_PLACE
from jmem.memory.measure import measure
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.stack import choose_options
from jmem.offload import on_host
from jmem.program import Program
from jmem.targets import resolve


@pytest.mark.compat
@pytest.mark.parametrize("rows", [1, 32])
def test_a_few_tokens_products_copy_no_weights(rows):
    layers, width = 8, 4096
    up, gate, down = (
        jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16) for _ in range(3)
    )
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)

    def run(x, *weights):
        def step(x, layer):
            up, gate, down = layer
            return x + (jnp.tanh(x @ gate) * (x @ up)) @ down, None

        return lax.scan(step, x, weights)[0]

    def temporaries(options):
        program = Program(run, (x, up, gate, down), options=options)
        compiled: Any = program.compile(resolve("h200"))
        return compiled.memory_analysis().temp_size_in_bytes

    one = 2 * width * width
    scratch = 32 * 2**20  # cuBLAS's own, for all products together
    assert temporaries({}) > 2 * one  # else nobody needs the options any more
    assert scratch < temporaries(IN_PLACE) < scratch + one / 4


def test_steps_of_packed_weights_are_compiled_by_xlas_defaults():
    """They are made at full width first, and there is no row to read in place."""
    plain = {"params": {"blocks": {"mlp": {"up": {"kernel": jnp.zeros((2, 4, 4))}}}}}
    packed = {"params": {"blocks": {"mlp": {"up": {"packed": jnp.zeros((2, 4, 4))}}}}}
    assert choose_options(plain) == IN_PLACE
    assert choose_options(packed) == {}


def test_steps_of_weights_on_the_host_are_compiled_by_xlas_defaults():
    """They are fetched, so none is read in its stack; moments there change nothing."""
    here = {"q": jax.ShapeDtypeStruct((2, 4, 4), jnp.bfloat16)}
    there = on_host(here)
    assert choose_options({"params": {"blocks": there}, "optimizer": here}) == {}
    assert choose_options({"params": {"blocks": here}, "optimizer": there}) == IN_PLACE


def test_a_blocks_backward_pass_holds_five_arrays_of_the_mlp():
    """At most gate, up, their gradients, and that of their product or itself: more,
    where XLA makes value and gradients in one kernel, or scales LoRA's products."""
    config = dataclasses.replace(zoo.get("llama2-7b"), layers=2)
    model = Decoder.on(resolve("h200"), config, dtype="bfloat16")
    tokens = 2**14
    program = step_program(Lora(rank=8), model, batch_size=1, seq_len=tokens)
    report = measure(program, target="h200", bounds=False)
    wide = f"[{tokens},{config.intermediate}]"
    at_peak = [row for row in report.rows if row.shape.endswith(wide)]
    assert 0 < sum(row.count for row in at_peak) <= 5, at_peak
