"""Sparse maps of all layers, multiplied where they lie: the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, random_params

import jmem
from jmem.generate.conversation import Conversation
from jmem.generate.decode import generate
from jmem.generate.programs import decode_program
from jmem.kvcache.full import Full
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.nn.pruned import count_bytes
from jmem.nn.pruned.in_place import read_in_place
from jmem.sparse import flash_llm
from jmem.sparse.magnitude import zero_smallest
from jmem.targets import resolve

CONFIG = dataclasses.replace(TINY, layers=3, qkv_bias=True, o_bias=True)


@pytest.fixture(scope="module")
def packed():
    """Parameters whose maps are sparse, but for those that no format makes smaller."""
    params = random_params(CONFIG, scale=0.3)
    prune = jax.tree_util.Partial(zero_smallest, sparsity=0.7)
    for part in ("attention", "mlp"):
        for leaf in params["blocks"][part].values():
            rows = [prune(np.ascontiguousarray(w.T)).T for w in leaf["kernel"]]
            leaf["kernel"] = np.stack(rows)
    with pytest.warns(flash_llm.KeptDense, match=r"attention/[kv]. keeps its kernel"):
        found = flash_llm.pack(jax.tree.map(jnp.asarray, params))
    assert "sparse" in found["blocks"]["mlp"]["up"]
    return found


def test_answers_and_turns_are_those_of_maps_expanded_one_by_one(packed):
    apart, whole = Decoder(CONFIG), Decoder(CONFIG, sparse="xla")
    block, blocks = read_in_place(whole, packed["blocks"])
    assert block is not whole.block
    assert "sparse" not in blocks["mlp"]["up"]
    assert "bias" in blocks["attention"]["q"]
    prompts = [[3, 7, 1, 9], [5, 5]]
    answers = [generate(m, packed, prompts, max_new_tokens=4) for m in (apart, whole)]
    assert answers[0] == answers[1]
    turns = []
    for model in (apart, whole):
        talk = Conversation(model, packed, Full(), prompt=16, max_new_tokens=2)
        turns.append([talk.say([turn]) for turn in ([3, 7, 1], [4, 2])])
    assert turns[0] == turns[1]


def test_a_model_without_a_kernel_changes_nothing(packed):
    model = Decoder(CONFIG)
    assert read_in_place(model, packed["blocks"]) == (model.block, packed["blocks"])


def test_adapters_and_kernels_stay_in_the_loop(packed):
    mlp = dict(packed["blocks"]["mlp"])
    adapter = {"lora_a": jnp.zeros((3, 32, 2)), "lora_b": jnp.zeros((3, 2, 64))}
    blocks = packed["blocks"] | {"mlp": mlp | {"up": mlp["up"] | adapter}}
    _, rest = read_in_place(Decoder(CONFIG, sparse="xla"), blocks)
    assert rest["mlp"]["up"]["sparse"] is blocks["mlp"]["up"]["sparse"]
    assert "sparse" not in rest["mlp"]["down"]


def test_a_decoding_step_for_hopper_copies_and_expands_no_map():
    """Without the kernel the largest map is expanded."""
    card, temporaries = resolve("h200"), {}
    config = dataclasses.replace(zoo.get("opt-1.3b"), layers=4)
    for sparse in ("mosaic_gpu", None):
        model = Decoder.on(card, config, dtype="bfloat16")
        assert model.sparse == "mosaic_gpu"
        model = dataclasses.replace(model, sparse=sparse)
        params = flash_llm.abstract(model.abstract(), 0.6)
        plan = Full().plan(model, prompt=64, new_tokens=64, batch_size=8, target=card)
        program = decode_program(model, plan, params=params)
        report = jmem.measure(program, target=card, bounds=False)
        temporaries[sparse] = report.by_kind["other temporaries"]
    least = count_bytes(params["blocks"]["attention"]["q"]["sparse"]) / config.layers
    expanded = 2 * config.hidden * config.intermediate
    assert temporaries["mosaic_gpu"] < least < expanded < temporaries[None]
