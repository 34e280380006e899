"""Compiled for an H200 at 7B's width: no weight is copied to be read, and a decoding
layer launches so many kernels."""

import dataclasses
import functools

import jax
import pytest
from launches import count_copied_bytes, list_launches, list_sliced_operands

from experiments.harness.timed import UNCLIPPED, make_finetuners
from jmem.finetune.program import step_program
from jmem.generate.programs import decode_program, read_on_program
from jmem.kvcache.snapkv import SnapKV
from jmem.lowering import IN_PLACE
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.joined import join_maps
from jmem.targets import resolve

CARD = resolve("h200")
LAYERS = 4
FINETUNERS = make_finetuners(UNCLIPPED, rank=16)
SAME = ("lisa-bf16", "lisa-host", "embedding")
"""The walk of "lisa", with other moments or no block."""
OPEN = ("badam",)
"""Its walk ends at the lowest block that was drawn, where no gradient is wanted any
more. XLA then does not know how often the loop turns, and copies rows out."""


@functools.cache
def build_model(name: str) -> Decoder:
    config = dataclasses.replace(zoo.get(name), layers=LAYERS)
    return Decoder.on(CARD, config, dtype="bfloat16")


def compile_step(name: str) -> str:
    model = build_model("llama2-7b")
    program = step_program(FINETUNERS[name], model, batch_size=1, seq_len=1024)
    return get_text(program)


def get_text(program, options=None) -> str:
    text = program.compile(CARD, options).as_text()
    assert text
    return text


@pytest.mark.parametrize("name", sorted(FINETUNERS.keys() - {*SAME, *OPEN}))
def test_a_training_step_reads_weights_in_their_stack(name):
    assert list_sliced_operands(compile_step(name), LAYERS) == []


@functools.cache
def compile_decoding(joined: bool, **options) -> str:
    model = build_model("llama3-8b")
    size = {"prompt": 8000, "new_tokens": 64, "batch_size": 32}
    plan = SnapKV(capacity=1024).plan(model, **size, target=CARD)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if joined:
        params["blocks"] = jax.eval_shape(join_maps, params["blocks"])
    return get_text(decode_program(model, plan, params=params), options)


@pytest.mark.parametrize("joined", [False, True])
def test_a_decoding_step_reads_weights_in_their_stack(joined):
    text = compile_decoding(joined)
    assert list_sliced_operands(text, LAYERS) == []


def test_by_xlas_defaults_it_copies_them():
    """Else nobody needs the options any more, or nothing is found by these tests."""
    defaults = {
        "xla_gpu_enable_triton_gemm": True,
        "xla_gpu_dot_merger_threshold_mb": 32,
    }
    assert defaults.keys() == IN_PLACE.keys()
    text = compile_decoding(False, **defaults)
    assert len(list_sliced_operands(text, LAYERS)) > 3
    assert count_copied_bytes(text) > LAYERS * 2 * 4096 * 14336


@pytest.mark.parametrize(("joined", "most"), [(False, 18), (True, 15)])
def test_launches_of_a_decoding_layer(joined, most):
    text = compile_decoding(joined)
    launches = list_launches(text, LAYERS)
    assert 8 < len(launches) <= most, [own.find_op_name() for own in launches]


def test_a_prompts_next_tokens_are_read_with_weights_in_their_stack():
    """As `prompt_chunk` does, and a later turn."""
    model = build_model("llama3-8b")
    size = {"prompt": 4096, "new_tokens": 8}
    plan = SnapKV(capacity=1024).plan(model, **size, target=CARD)
    text = get_text(read_on_program(model, plan, tokens=512))
    assert list_sliced_operands(text, LAYERS) == []
