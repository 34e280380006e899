"""Training over a mesh: the numbers of one device, with an eighth of the bytes."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tiny_decoder import TINY

import jmem
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import loss_program, step_program
from jmem.models import zoo
from jmem.models.decoder import Decoder
from jmem.program import by_key
from jmem.sharding import Layout, LayoutError, find_rule

FUSED = Lisa(active_layers=2, adamw=AdamW(max_grad_norm=0))
FINETUNERS = {"full": Full(), "lora": Lora(rank=8), "lisa": FUSED, "separate": Lisa()}


class TestPlacement:
    layout = Layout(fsdp=4, tensor=2)

    def specs(self, finetuner):
        state = jax.eval_shape(
            lambda key: finetuner.init(Decoder(TINY), Decoder(TINY).init(key), {}, key),
            jax.random.key(0),
        )
        placed = by_key(self.layout.shardings(state))
        return {path: sharding.spec for path, sharding in placed.items()}

    def test_columns_and_rows_are_divided_as_megatron_divides_them(self):
        specs = self.specs(Full())
        assert specs["params/blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
        assert specs["params/blocks/mlp/down/kernel"] == P(
            None, ("tensor", "fsdp"), None
        )
        assert specs["params/head/kernel"] == P(("tensor", "fsdp"), None)
        assert specs["params/final_norm/scale"] == specs["step"] == P()

    @pytest.mark.parametrize("finetuner", FINETUNERS.values(), ids=list(FINETUNERS))
    def test_moments_lie_as_their_weights_do(self, finetuner):
        specs = self.specs(finetuner)
        matrices = [path for path in specs if find_rule(path)]
        assert len(matrices) > 9
        for path in matrices:
            words = path.split("/")
            like = [p for p in matrices if p.split("/")[-3:] == words[-3:]]
            assert {specs[p] for p in like} == {specs[path]}
            assert specs[path] != P()

    def test_every_kernel_of_every_architecture_has_a_rule(self):
        for name in ("llama2-7b", "gpt2", "opt-125m", "phi-2", "qwen2-1.5b"):
            for path, leaf in by_key(Decoder(zoo.get(name)).abstract()).items():
                matrix = leaf.ndim - path.startswith("blocks/") > 1
                assert bool(find_rule(path)) == matrix, path


class TestRefusals:
    def refused(self, match, build):
        with pytest.raises(LayoutError, match=match):
            build()

    def test_a_size_below_one(self):
        self.refused("fsdp=0 must be at least 1", lambda: Layout(fsdp=0))

    def test_a_dimension_that_the_mesh_does_not_divide(self):
        config = dataclasses.replace(TINY, hidden=36)
        model = Decoder(config, layout=Layout(fsdp=8))
        self.refused(
            r"fsdp=8.* does not divide axis \d of .*, which is 36",
            lambda: step_program(Full(), model, batch_size=8, seq_len=4),
        )

    def test_heads_that_the_mesh_does_not_divide(self):
        layout = Layout(fsdp=2, tensor=4)
        self.refused(
            r"tensor=4 does not divide kv_heads=2", lambda: Decoder(TINY, layout=layout)
        )

    def test_a_batch_that_the_mesh_does_not_divide(self):
        model = Decoder(TINY, layout=Layout(fsdp=8))
        self.refused(
            "fsdp=8 does not divide a batch of 4 sequences",
            lambda: step_program(Full(), model, batch_size=4, seq_len=4),
        )

    def test_more_devices_than_there_are(self):
        self.refused(r"needs 4096 devices, and there are \d+", Layout(fsdp=4096).mesh)

    def test_moments_that_share_a_scale(self):
        lisa = Lisa(adamw=AdamW(max_grad_norm=0, moment_dtype="float8"))
        model = Decoder(TINY, layout=Layout(fsdp=8))
        self.refused(
            "8-bit moments.*'bfloat16'",
            lambda: step_program(lisa, model, batch_size=8, seq_len=4),
        )


def test_a_layout_of_one_device_is_none():
    assert Decoder(TINY, layout=Layout()) == Decoder(TINY)


# Ahead of time ------------------------------------------------------------------------

SMALL = dataclasses.replace(
    zoo.get("tinyllama-1.1b"), vocab_size=4096, layers=12, kv_heads=8
)
"""Deep enough that a stack of it stands out among what one layer takes."""


MESH = Layout(fsdp=8)


@functools.cache
def report(name: str):
    target = jmem.targets.resolve("h200x8")
    model = Decoder.on(target, SMALL, dtype="bfloat16", layout=MESH)
    program = step_program(FINETUNERS[name], model, batch_size=8, seq_len=256)
    return jmem.measure(program, target=target, bounds=False)


class TestAheadOfTime:
    matrices = SMALL.parameters - (2 * SMALL.layers + 1) * SMALL.hidden
    layer = 2 * (matrices - 2 * SMALL.vocab_size * SMALL.hidden) // SMALL.layers

    @pytest.mark.compat
    def test_lisa_gathers_a_layer_and_never_a_stack(self):
        found = report("lisa")
        row = 2 * SMALL.hidden * SMALL.intermediate  # the largest matrix of a layer
        held = ("optimizer", "batch", "workspace")
        made = [row for row in found.rows if row.kind not in held]
        made = [r for r in made if not r.name.startswith("state/") and r.op]
        assert made
        # All that is made: saved inputs, one layer's matrices, and parts of these.
        inputs = SMALL.layers * 8 // MESH.fsdp * 256 * SMALL.hidden * 2
        assert max(r.bytes for r in made) <= max(row // MESH.tensor, inputs)
        assert found.temp_bytes < inputs + 3 * self.layer // MESH.tensor
        assert found.temp_bytes < self.layer * SMALL.layers / 3
        assert found.collectives["all-gather"]["count"]
        assert found.collectives["reduce-scatter"]["count"]

    def test_state_is_an_eighth_and_is_updated_in_place(self):
        found = report("lisa")
        trained = 2 * self.layer // 2 + 2 * SMALL.vocab_size * SMALL.hidden
        norms = 2 * (2 * SMALL.layers + 1) + 8 * (2 * 2 + 1)
        state = (2 * self.matrices + 8 * trained) // 8 + norms * SMALL.hidden
        batch = 3 * 4 * 256
        assert found.argument_bytes == pytest.approx(state + batch, abs=256)
        assert found.alias_bytes == pytest.approx(state, abs=256)
        assert found.device_bytes == pytest.approx(
            state + found.temp_bytes, rel=0.02
        )  # the claim of claims.toml, small

    def test_evaluation_too_is_divided(self):
        model = Decoder(SMALL, dtype=jnp.bfloat16, layout=MESH)
        program = loss_program(model, batch_size=8, seq_len=128)
        held: Any = program.compile(jmem.targets.resolve("h200x8")).memory_analysis()
        assert held.argument_size_in_bytes < 1.01 * self.matrices * 2 / 8 + 2**20
        assert held.temp_size_in_bytes < 2 * self.layer


# On eight devices ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight():
    """What `eight_devices` found, in a process of its own."""
    here = pathlib.Path(__file__).parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(here / "eight_devices.py")],
        capture_output=True,
        text=True,
        timeout=1200,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    ["full 4x2", "lora 2x4", "lisa 8x1", "lisa 2x4", "lisa tied, packed 4x2"],
)
def test_three_steps_are_those_of_one_device(eight, case):
    """Sums are in another order, and AdamW divides by their root."""
    assert eight[case] < 1e-5


def test_each_device_holds_an_eighth(eight):
    whole, own = eight["held bytes"]
    assert whole / 8 < own < whole / 7


@pytest.mark.parametrize("mesh", ["2x4", "one device"])
@pytest.mark.parametrize("promise", ["has the bits", "is placed", "goes on"])
def test_what_was_saved_on_one_mesh_resumes_on_another(eight, mesh, promise):
    assert eight["resumed"][f"{mesh} {promise}"] is True


def test_a_program_makes_arguments_where_it_wants_them(eight):
    assert eight["live"] == ["P('fsdp',)", "P(None, ('tensor', 'fsdp'), None)"]


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("too_many", "needs 16 devices, and there are 8"),
        ("unplaced", "is on no mesh"),
        ("parts", "does not divide a batch of 4 sequences"),
    ],
)
def test_refusals_on_real_devices(eight, what, match):
    assert match in eight["refused"][what]
