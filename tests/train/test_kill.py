"""SIGKILL in the middle, then resume: bit-equal to the run that was left alone."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex

from jmem.train import checkpoint, metrics

from . import tiny

COLUMNS = ("step", "loss", "lr", "grad_norm", "active")


def start(folder, *flags):
    script = pathlib.Path(tiny.__file__)
    return subprocess.Popen([sys.executable, script, folder, *flags], text=True)


def kill_when(process, ready):
    """SIGKILL as soon as `ready()`; the process must still have been running."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never got so far"
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"


def rows(folder):
    path = folder / metrics.NAME
    return metrics.read(path) if path.exists() else []


def test_killed_twice_and_resumed_is_bit_equal(tmp_path):
    killed = tmp_path / "killed"
    checkpoints = killed / "checkpoints"
    chance = random.Random(seed := time.time_ns())
    print("seed", seed)  # shown when this test fails

    # In the middle of writing a checkpoint, after at least one is complete ...
    process = start(killed)
    whole = tiny.long_run(tmp_path / "whole")  # meanwhile, in this process
    nth = chance.randint(1, 4)
    kill_when(
        process,
        lambda: len(rows(killed)) > 15 * nth and any(checkpoints.glob("*.partial")),
    )
    first = len(rows(killed))
    # ... and in the middle of a period, between two checkpoints.
    process = start(killed, "--resume")
    stop = min(first + chance.randint(5, 45), tiny.STEPS - 10)
    kill_when(process, lambda: len(rows(killed)) > stop)

    last = checkpoint.Checkpoints(checkpoints).list_steps()[-1]
    assert 0 < last < tiny.STEPS
    resumed = tiny.long_run(killed, resume=True)

    chex.assert_trees_all_equal(whole, resumed)
    chex.assert_trees_all_equal_dtypes(whole, resumed)
    expected, found = rows(tmp_path / "whole"), rows(killed)
    assert len(expected) == tiny.STEPS + tiny.STEPS // tiny.EVALUATE_EVERY + 1
    kept = [*COLUMNS, "held_out_loss"]
    assert [[row.get(c) for c in kept] for row in expected] == [
        [row.get(c) for c in kept] for row in found
    ]
    assert not list(os.scandir(tmp_path / "whole" / "checkpoints"))[2:]  # keep=2
