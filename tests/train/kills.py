"""Training is killed at random moments, and resumes as if it had been left alone.

    uv run python -m tests.train.kills                  30 kills of each fine-tuner
    uv run python -m tests.train.kills lisa lora        of these
    uv run python -m tests.train.kills tiny --kills 3   of the smallest, which is none

A small run is killed (SIGKILL) while it starts, after a row, or while a checkpoint is
written, then continued in the same folder and killed again, until it ends; then the
next run begins. Every sixth time two processes are started on the folder at once: the
second must refuse, and the first is killed. It prints where each kill struck, and ends
with status 1 unless

- after each kill the newest checkpoint is intact, no older than the one before, and
  its state that of a run left alone, bit for bit;
- each row on the disk, and at the end all of them, are those of that run, too.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax

from jmem.finetune.family import FINETUNERS
from jmem.models.decoder import Decoder
from jmem.train import loop, metrics
from jmem.train.checkpoint import Checkpoints, abstract
from jmem.train.folder import FolderError

from ..tiny_decoder import TINY
from . import tiny

STEPS, CHECKPOINT_EVERY, EVALUATE_EVERY = 40, 4, 10
DATA = tiny.Walk()
TIMES = ("seconds", "tokens_per_second")
PRELOADED = ["chex", "jmem.finetune.family", "jmem.train.loop", "orbax.checkpoint"]
"""What a process finds imported as it starts, which takes longer than its run."""
PATIENCE = 300.0
"""Seconds that a process may take to get to where it is killed."""


def train(name: str, folder: pathlib.Path, keep: int = 2) -> Any:
    """The run that is killed: from where it was, to its end."""
    settings: dict[str, Any] = {
        "steps": STEPS,
        "held_out": [tiny.Walk(seed=9).batch(0)],
        "evaluate_every": EVALUATE_EVERY,
        "checkpoint_every": CHECKPOINT_EVERY,
        "keep": keep,
        "resume": True,
        "progress": False,
    }
    if name == "tiny":
        return tiny.run(folder, **settings)
    member, key = FINETUNERS[name], jax.random.key(0)
    finetuner = member.finetuner
    model = Decoder(dataclasses.replace(TINY, hidden=64, head_dim=16))  # NF4's blocks
    begin = jax.jit(lambda key: finetuner.init(model, model.init(key), {}, key))
    if not member.merges:
        del settings["held_out"]
    return loop.train(finetuner, model, begin(key), DATA, folder=folder, **settings)


def run_child(name: str, folder: pathlib.Path) -> None:
    """`train` in a process of its own, whose refusal is its exit message."""
    try:
        train(name, folder)
    except FolderError as error:
        (folder.parent / f"refused-{os.getpid()}").write_text(str(error))
        sys.exit(3)


def read_rows(folder: pathlib.Path) -> list[dict]:
    """All complete rows but what they say of time."""
    if not (folder / metrics.NAME).exists():
        return []
    rows = metrics.read(folder)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


class Victim:
    """One fine-tuner's run, which is killed again and again."""

    def __init__(self, name: str, folder: pathlib.Path, seed: int):
        self.name, self.folder = name, folder
        self.chance = random.Random(f"{seed} {name}")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        whole = train(name, folder / "whole", keep=STEPS)
        self.like = abstract(whole)
        self.rows = read_rows(folder / "whole")
        self.runs, self.newest = 0, 0
        self.begin_run()

    def begin_run(self) -> None:
        self.runs, self.newest = self.runs + 1, 0
        self.run = self.folder / f"run{self.runs}"

    def start(self) -> BaseProcess:
        process = self.context.Process(target=run_child, args=(self.name, self.run))
        process.start()
        return process

    def restore(self, folder: pathlib.Path) -> tuple[int, Any]:
        """The newest checkpoint of a folder, read from a copy: reading tidies up."""
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            return Checkpoints(pathlib.Path(copy)).restore(self.like, data=DATA.digest)

    # A kill ---------------------------------------------------------------------------

    def choose_moment(self) -> tuple[str, Callable[[], bool], float]:
        """(what it is called, whether it has come, seconds to wait then)."""
        began, chance = time.time(), self.chance
        row = self.newest + chance.randint(1, 2 * CHECKPOINT_EVERY + 1)
        step = self.newest + CHECKPOINT_EVERY * chance.randint(1, 2)
        plan = self.run / "plan.json"

        def has_row() -> bool:
            started = plan.exists() and plan.stat().st_mtime > began
            return started and len(read_rows(self.run)) >= row

        match chance.choice(["start", "row", "checkpoint", "checkpoint"]):
            case "start":
                return "while it starts", lambda: True, chance.uniform(0, 3)
            case "row":
                return f"at row {row}", has_row, chance.uniform(0, 0.005)
        writing = self.run / "checkpoints" / f"{step}.partial"
        return f"at checkpoint {step}", writing.exists, chance.uniform(0, 0.1)

    def kill(self, *, two: bool) -> str:
        """Start, kill at some moment, check; what happened, in words.

        "" if the run came to its end before that moment.
        """
        processes = [self.start() for _ in range(1 + two)]
        words, ready, delay = self.choose_moment()
        try:
            if two:
                processes = [self.find_first(processes)]
            [process] = processes
            wait_until(lambda: ready() or not process.is_alive(), words)
            time.sleep(delay)
            process.kill()
            process.join()
        finally:
            for process in processes:
                process.kill()
                process.join()
        if process.exitcode == 0:
            self.check_end()
            return ""
        assert process.exitcode == -9, f"it ended with status {process.exitcode}"
        return f"{words}{', two at once' * two}: {self.describe()}"

    def find_first(self, processes: list[BaseProcess]) -> BaseProcess:
        """The one of two processes that has the folder, when the other has refused."""
        wait_until(lambda: not all(p.is_alive() for p in processes), "a refusal")
        others = [p for p in processes if not p.is_alive()]
        assert len(others) == 1, "both processes ended"
        message = self.folder / f"refused-{others[0].pid}"
        assert message.exists(), f"it ended with status {others[0].exitcode}"
        assert "in use by" in message.read_text(), message.read_text()
        return next(p for p in processes if p is not others[0])

    # What must hold -------------------------------------------------------------------

    def describe(self) -> str:
        """What a kill left in the folder, once it is known to be right."""
        rows, checkpoints = read_rows(self.run), self.run / "checkpoints"
        found = sorted(p.name for p in checkpoints.glob("*")) if rows else []
        steps = sorted(int(name) for name in found if name.isdecimal())
        assert rows == self.rows[: len(rows)], "a row is not that of the whole run"
        newest = max(steps, default=0)
        assert newest >= self.newest, f"checkpoint {self.newest} is lost"
        if newest:
            self.check_state(checkpoints, newest)
            done = [row["step"] for row in rows if "loss" in row]
            assert max(done) >= newest, f"rows before checkpoint {newest} are lost"
        self.newest = newest
        unfinished = [name for name in found if not name.isdecimal()]
        return f"{len(rows)} rows, checkpoints {steps}" + (
            f", {' '.join(unfinished)} half written" if unfinished else ""
        )

    def check_state(self, checkpoints: pathlib.Path, step: int) -> None:
        """The newest checkpoint is that of `step`, and its state that of the whole."""
        found, state = self.restore(checkpoints)
        assert found == step, f"checkpoint {step} is damaged"
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            own = self.folder / "whole" / "checkpoints" / str(step)
            shutil.copytree(own, pathlib.Path(copy) / str(step))
            _, expected = Checkpoints(pathlib.Path(copy)).restore(
                self.like, data=DATA.digest
            )
        chex.assert_trees_all_equal(state, expected)
        chex.assert_trees_all_equal_dtypes(state, expected)

    def check_end(self) -> None:
        """A run that came to its end is the whole run; the next one may begin."""
        assert read_rows(self.run) == self.rows, "rows differ from those of the whole"
        self.check_state(self.run / "checkpoints", STEPS)
        shutil.rmtree(self.run)
        self.begin_run()

    def finish(self) -> None:
        """Let the last run come to its end."""
        process = self.start()
        process.join()
        assert process.exitcode == 0, f"it ended with status {process.exitcode}"
        self.check_end()


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Returns as soon as it is so."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, f"it never came so far: {what}"
        time.sleep(0.0005)


def kill_often(name: str, folder: pathlib.Path, kills: int, seed: int) -> str:
    """So many kills of one fine-tuner, and what they came to."""
    victim, kinds = Victim(name, folder, seed), collections.Counter()
    done, pairs = 0, 0
    while done < kills:
        two = done % 6 == 1
        if words := victim.kill(two=two):
            done, pairs = done + 1, pairs + two
            kinds["half" in words] += 1
            print(f"{name}  {done}/{kills}  {words}", flush=True)
    victim.finish()
    return (
        f"{name}: {done} kills, {kinds[True]} with a checkpoint half written, {pairs} "
        f"of two processes at once; {victim.runs - 1} runs came to their end, all "
        "bit-equal, nothing lost"
    )


def main() -> None:
    words = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=words[0])
    parser.add_argument("names", nargs="*", metavar="FINETUNER", default=[*FINETUNERS])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := set(given.names) - FINETUNERS.keys() - {"tiny"}:
        parser.error(f"no fine-tuner {sorted(unknown)}; there are {[*FINETUNERS]}")
    totals = []
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            total = kill_often(name, pathlib.Path(folder), given.kills, given.seed)
            totals.append(f"{total} ({time.monotonic() - began:.0f} s)")
            print(totals[-1], flush=True)
    print("\n" + "\n".join(totals))


if __name__ == "__main__":
    main()
