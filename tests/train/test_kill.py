"""SIGKILL in the middle, then resume: bit-equal to the run that was left alone."""

import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]


def test_killed_and_resumed_is_bit_equal():
    """Every kind of leaf a state may have; one of the kills is of two processes."""
    command = [sys.executable, "-m", "tests.train.kills", "tiny", "--kills", "3"]
    command += ["--seed", str(time.time_ns())]  # shown when this test fails
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "tiny: 3 kills" in done.stdout
    assert "1 of two processes at once" in done.stdout
    assert "all bit-equal, nothing lost" in done.stdout
