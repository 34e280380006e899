"""What trains a decoder trains a net of images too: statistics, noise and all."""

import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import jmem
from jmem.finetune.adamw import AdamW
from jmem.finetune.full import Full
from jmem.finetune.lisa import Lisa
from jmem.finetune.lora import Lora
from jmem.finetune.program import loss_program, step_program
from jmem.models.contract import Batch, Model
from jmem.train import metrics
from jmem.train.finetuner import Finetuner

from . import convnet
from .kills import read_rows, wait_until

MODEL = convnet.ConvNet()
FUSED_LORA = Lora(update="fused", adamw=AdamW(max_grad_norm=0.0))
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "held_out_loss")


def jitted(finetuner):
    return jax.jit(lambda state, batch: finetuner.step(MODEL, state, batch))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and last state of the long run, left alone."""
    folder = tmp_path_factory.mktemp("convnet") / "whole"
    return folder, convnet.long_run(folder)


def test_it_is_what_the_contracts_ask_for():
    assert isinstance(MODEL, Model)
    assert isinstance(convnet.Bars().batch(0), Batch)
    assert isinstance(convnet.FULL, Finetuner)


def test_learns_and_tells_its_own_words(whole):
    told = metrics.read(whole[0])
    steps = [row for row in told if "loss" in row]
    assert {"images_per_second", "accuracy"} <= steps[0].keys()
    assert steps[0]["images_per_second"] == pytest.approx(16 / steps[0]["seconds"])
    held_out = [row["held_out_loss"] for row in told if "held_out_loss" in row]
    assert held_out[-1] < 0.5 * held_out[0]


def test_evaluation_uses_the_statistics_that_are_stored(whole):
    folder, state = whole
    params, stats = convnet.FULL.merged(state)
    pairs = zip(*map(jax.tree.leaves, jax.device_get((stats, MODEL.stats()))))
    assert all((a != b).any() for a, b in pairs)
    batches = [convnet.Bars(seed=9).batch(n) for n in range(2)]
    loss = jax.jit(MODEL.loss)

    def mean(stats):
        losses = [loss(params, stats, b, None)[0] for b in batches]
        return np.average(losses, weights=[b.weights.sum() for b in batches])

    told = metrics.read(folder)[-1]["held_out_loss"]
    np.testing.assert_allclose(told, mean(stats), rtol=1e-5)
    assert abs(told - mean(MODEL.stats())) > 1e-2  # the promise is tested


def test_a_batch_in_parts_is_what_its_parts_are_one_after_another():
    """Statistics go from part to part; gradients are weighed by the parts' weights."""
    # A step that shows the gradient itself: AdamW divides it away.
    adamw = AdamW(learning_rate=1e-2, max_grad_norm=0.0, b1=0.0, b2=0.0, eps=1.0)
    plain = Full(adamw=adamw, accumulate=2)
    state, batch = convnet.start(plain), convnet.Bars().batch(0)
    found, told = jitted(plain)(state, batch)

    compute = jax.jit(jax.value_and_grad(MODEL.loss, has_aux=True))
    stats, losses, grads = state["stats"], [], []
    parts = [jax.tree.map(lambda x, n=n: x[8 * n : 8 * n + 8], batch) for n in (0, 1)]
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), 0)
    for number, part in enumerate(parts):
        key = jax.random.fold_in(jax.random.fold_in(step_key, number), 1_000)
        (loss, aux), grad = compute(state["params"], stats, part, key)
        stats = aux.stats
        losses.append(loss)
        grads.append(jax.device_get(grad))
    shares = [part.weights.sum() / batch.weights.sum() for part in parts]
    assert shares[0] != shares[1]  # the promise is tested
    mean = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, *grads)
    expected = jax.tree.map(
        lambda p, g: p - 1e-2 * g / (np.abs(g) + 1),
        jax.device_get(state["params"]),
        mean,
    )
    np.testing.assert_allclose(told["loss"], np.dot(shares, losses), rtol=1e-5)
    chex.assert_trees_all_close(found["stats"], stats, rtol=1e-5)
    chex.assert_trees_all_close(found["params"], expected, atol=1e-7)


def test_noise_differs_between_parts_and_steps_and_repeats_itself():
    one = convnet.Bars(size=8).batch(0)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), one)
    still = AdamW(learning_rate=0.0, max_grad_norm=0.0)
    losses = {}
    for parts, batch in ((1, one), (2, twice)):
        finetuner = Full(adamw=still, accumulate=parts)
        step, state = jitted(finetuner), convnet.start(finetuner)
        state = state | {"stats": MODEL.stats()}
        losses[parts] = [step(state | {"step": n}, batch)[1]["loss"] for n in (0, 1, 0)]
    assert losses[1][0] == losses[1][2] != losses[1][1]
    assert abs(losses[2][0] - losses[1][0]) > 1e-5


def test_killed_and_resumed_is_bit_equal_statistics_too(tmp_path, whole):
    chance = random.Random(seed := time.time_ns())
    print("seed", seed)  # shown when this test fails
    killed = tmp_path / "killed"
    script = pathlib.Path(convnet.__file__)
    process = subprocess.Popen([sys.executable, script, killed], text=True)
    stop = chance.randint(12, 45)
    wait_until(
        lambda: len(read_rows(killed)) > stop or process.poll() is not None, "a row"
    )
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    resumed = convnet.long_run(killed, resume=True)
    chex.assert_trees_all_equal(whole[1], resumed)
    expected, found = (metrics.read(folder) for folder in (whole[0], killed))
    assert [[row.get(c) for c in COLUMNS] for row in expected] == [
        [row.get(c) for c in COLUMNS] for row in found
    ]


def test_a_step_is_measured_with_labels():
    finetuner = dataclasses.replace(convnet.FULL, accumulate=1)
    batch = convnet.Bars().batch(0)
    program = step_program(finetuner, MODEL, batch=batch)
    labels = zip(program.label_leaves(), program.list_leaves(), strict=True)
    unlabelled = {path for label, (_, path, _) in labels if label is None}
    assert unlabelled == {"step", "key"}
    report = jmem.measure(program, target="h200")

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = program.args[0]
    assert report.by_label["weights"] == size(state["params"])
    assert report.by_label["statistics"] == size(state["stats"])
    assert report.by_label["optimizer"] == size(state["optimizer"])
    assert report.by_label["batch"] == size(batch)
    assert report.by_kind["state"] == size(state["stats"])
    assert sum(report.by_kind.values()) == report.device_bytes


def test_an_evaluation_is_a_program_too():
    program = loss_program(MODEL, batch=lambda key: convnet.Bars().batch(0))
    assert program.labels.keys() == {"weights", "statistics", "batch"}
    assert program.make is not None
    loss = jax.jit(program.fn)(*program.make(jax.random.key(0)))
    params, stats = MODEL.init(jax.random.key(0)), MODEL.stats()
    expected = jax.jit(MODEL.loss)(params, stats, convnet.Bars().batch(0), None)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


class TestRefusals:
    def test_a_program_without_a_batch(self):
        with pytest.raises(TypeError, match=r"batch=NoneType.* seq_len=4. Give a"):
            step_program(convnet.FULL, MODEL, seq_len=4)

    def test_parts_that_do_not_divide(self):
        finetuner = dataclasses.replace(convnet.FULL, accumulate=3)
        with pytest.raises(ValueError, match=r"accumulate=3 .* batch of 16 images"):
            finetuner.step(MODEL, convnet.start(), convnet.Bars().batch(0))

    @pytest.mark.parametrize("finetuner", [Lisa(), FUSED_LORA])
    def test_a_walk_over_blocks(self, finetuner):
        with pytest.raises(ValueError, match="a ConvNet keeps statistics or draws"):
            convnet.start(finetuner)

    def test_a_rate_that_decays_over_no_blocks(self):
        with pytest.raises(ValueError, match=r"layer_decay=0.9 is over stacked blocks"):
            convnet.start(Full(adamw=AdamW(layer_decay=0.9)))
