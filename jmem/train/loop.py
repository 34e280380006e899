"""The training loop: one compiled step, fed by number, stopped and resumed at will.

    state = train(finetuner, model, state, data, steps=400, folder="runs/mine")

It knows no method: a `Finetuner` gives `step`, and the loop compiles it once, with the
state donated. `data.batch(n)` is the batch of update n, whatever came before, so a
resumed run sees what an uninterrupted one would have seen. Metrics are fetched one
step late: the device never waits for a row to be written.

    folder/metrics.jsonl     a row a step, a row an evaluation
    folder/plan.json         the memory XLA planned for a step, on the device it ran on,
                             and the hash of its program
    folder/checkpoints/<n>/  the state after n updates (`jmem.train.checkpoint`)
    folder/best/<n>/         the one of the least held-out loss, if it is to be kept
    folder/trace/            XLA profiler trace of some steps, for xprof or Perfetto

What was trained leaves for other programs by `jmem.finetune.tuned.save`.
"""

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jmem import disk
from jmem.models.contract import Batch
from jmem.train import progress as progresses
from jmem.train.checkpoint import Checkpoints, abstract
from jmem.train.errors import DivergedError, Interrupted, TrainingError
from jmem.train.evaluation import Best, compile_evaluation
from jmem.train.finetuner import Finetuner
from jmem.train.finite import find_not_finite, name_leaves
from jmem.train.folder import Hold, prepare, require_free
from jmem.train.log import Log, Trace
from jmem.train.metrics import MetricsFile
from jmem.train.order import describe_order
from jmem.train.step import check_batch, choose_placement, compile_step, describe_plan

__all__ = ["Data", "DivergedError", "Interrupted", "TrainingError", "train"]

SPARE_BYTES = 64 * 2**20
"""Room asked for beside the checkpoints: metrics and trace."""


@runtime_checkable
class Data(Protocol):
    """Batches by number, and what they are made of.

    It may also have `order`, a mapping of the settings that say which rows are in which
    batch, as a seed: a run that goes on then names the one that differs.
    """

    @property
    def digest(self) -> str:
        """A word that differs for other data; a checkpoint remembers it."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of update `step`, from 0; a pure function of `step`, everywhere."""
        ...


def train[State](
    finetuner: Finetuner[Any, Any, Any, State],
    model: Any,
    state: State,
    data: Data,
    *,
    steps: int,
    folder: str | os.PathLike,
    held_out: Iterable[Batch] = (),
    evaluate: Callable[[State, Batch], jax.Array] | None = None,
    evaluate_first: bool = True,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    keep: int = 2,
    keep_best: bool = False,
    patience: int = 0,
    resume: bool = False,
    trace_steps: int = 0,
    progress: bool = True,
) -> State:
    """Bring `state` to `steps` updates, and return it.

    `state` is consumed: its buffers are donated to the first step, or freed before a
    checkpoint replaces them.

    Args:
      finetuner: the method. Its `step` is compiled ahead of the loop, so that nothing
        in the loop can compile again.
      model: handed to the method as it is.
      state: from `finetuner.init`. Where `model` has a layout, placed by it
        (`Layout.shardings`); a checkpoint of any other mesh, or none, is divided anew.
      data: batches by update number, all of one shape.
      steps: updates in all, those of earlier sessions included.
      folder: where metrics, checkpoints and trace go.
      held_out: batches never trained on. Their mean loss, by their weights, is written
        before the first update, every `evaluate_every` and after the last.
      evaluate_first: False where the loss before the first update is known already.
      evaluate: (state, batch) -> mean loss; by default the model's own, of
        `finetuner.merged(state)`, with stored statistics and without noise.
      evaluate_every: updates between evaluations; 0 for none in between.
      checkpoint_every: updates between checkpoints; 0 for none in between. The last
        state is always written, and so is the one at Ctrl-C.
      keep: checkpoints that stay on the disk; one more exists while it is written.
      keep_best: also keep, in `folder/best/`, the state of the least held-out loss.
      patience: stop early after this many evaluations in a row that were no better
        than the best before them; 0 never does. The state returned is the last one.
      resume: continue from the latest intact checkpoint in `folder`, and drop the rows
        after it. Where there is no checkpoint yet, start from `state`.
      trace_steps: steps to trace with the XLA profiler, after the first two.
      progress: tell loss, rate (tokens a second) and time left on standard output.

    Raises:
      TrainingError: an argument is out of range, `folder` already holds a run, a
        leaf of `state` is not finite, `step` changes the state's layout, or a batch
        has another shape.
      DivergedError: loss, gradient norm or a leaf of the state that is to be saved or
        returned is not finite; older checkpoints stay.
      FolderError: `folder` cannot be written, has no room for the checkpoints, or
        belongs to another process just now.
      CheckpointError: `folder` holds a checkpoint of another state, of other data, or
        of data that came in another order.
      Interrupted: Ctrl-C, SIGTERM or SIGHUP; the state is in a checkpoint, and
        `resume=True` continues.
    """
    _check_arguments(
        steps=(steps, 1),
        evaluate_every=(evaluate_every, 0),
        checkpoint_every=(checkpoint_every, 0),
        keep=(keep, 1),
        patience=(patience, 0),
        trace_steps=(trace_steps, 0),
    )
    folder, held_out = prepare(folder), tuple(held_out)
    if (patience or keep_best) and not held_out:
        raise TrainingError(
            f"train: patience={patience} and keep_best={keep_best} go by the held-out "
            "loss; give held_out batches, and evaluate_every."
        )
    state = jax.tree.map(_copy_to_jax, state)
    like = abstract(state)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Hold(folder))  # before anything in it is touched
        checkpoints = Checkpoints(folder / "checkpoints", keep=keep)
        stack.callback(checkpoints.close)
        start = 0
        if resume and checkpoints.list_steps():
            jax.tree.map(lambda leaf: leaf.delete(), state)
            start, state = checkpoints.restore(
                like,
                data=data.digest,
                order=lambda step: describe_order(data, data.batch(step - 1)),
            )
        elif not resume:
            _check_unused(folder, checkpoints)
        if start > steps:
            raise TrainingError(
                f"train: steps={steps} and {folder} is already at update {start}. "
                "Ask for more steps, or start in a new folder."
            )
        checkpoints.remove_unfinished()
        best = Best(folder, start)
        if start == steps or best.is_exhausted(patience):
            return state
        _check_room(
            folder, like, checkpoints, steps - start, checkpoint_every, keep_best
        )
        began = time.perf_counter()
        first = data.batch(start)
        place = choose_placement(model, state)
        if not start and (names := find_not_finite(state)):
            raise TrainingError(
                f"train: {name_leaves(names)} is not finite before the first update.\n"
                "Look at the weights it was made of."
            )
        step, program = compile_step(finetuner, model, state, place(first))
        held_out_loss = compile_evaluation(
            finetuner, model, state, held_out, evaluate, place
        )
        compiling = time.perf_counter() - began

        lines = progresses.choose(
            folder.name, steps, start=start, unit=first.unit, silent=not progress
        )
        stack.callback(lines.close)
        plan = describe_plan(step, program)
        disk.write_atomically(folder / "plan.json", disk.seal(plan, indent=1) + "\n")
        lines.note(
            f"compiled in {compiling:.1f} s; XLA plans {plan['bytes'] / 2**30:.2f} GiB "
            "for a step here"
        )
        file = MetricsFile(folder, step=start)
        stack.callback(file.close)
        log = Log(file, lines, checkpoints)
        trace = Trace(folder / "trace", start, steps, trace_steps)
        stack.callback(trace.stop)
        stop = stack.enter_context(_stop_between_steps(lines))

        def evaluated(done: int) -> bool:
            """Writes the held-out loss; returns whether it is the best so far."""
            loss = held_out_loss(state)
            log.write_held_out(done, loss)
            return best.record(done, loss)

        if start:
            lines.note(f"resumed after update {start}")
        elif held_out and evaluate_first:
            evaluated(0)
        log.restart_clock()
        for done in range(start + 1, steps + 1):  # updates done when this one is
            batch = data.batch(done - 1)
            check_batch(batch, first, done - 1)
            trace.start_before(done - 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=done - 1):
                state, metrics = step(state, place(batch))
            log.step(done, metrics, batch)

            asked = stop.is_set()
            saving = asked or done == steps or _is_due(done, checkpoint_every)
            evaluating = held_out and (done == steps or _is_due(done, evaluate_every))
            if saving or evaluating or trace.is_over(done):
                log.flush()
                if trace.is_over(done):
                    trace.stop()
                better = evaluating and evaluated(done) and keep_best
                if best.is_exhausted(patience):
                    saving = True
                    lines.note(
                        f"no better held-out loss since update {best.step}; stopping"
                    )
                of = {"data": data.digest, "order": describe_order(data, batch)}
                if better:
                    best.save(state, **of)
                if saving:
                    file.sync()
                    checkpoints.save(done, state, **of)
                log.restart_clock()
            if best.is_exhausted(patience):
                break
            if asked and done < steps:
                raise Interrupted(
                    f"{folder.name}: stopped after update {done} of {steps}; its "
                    f"checkpoint is in {folder / 'checkpoints'}. Resume to continue."
                )
    return state


def _copy_to_jax(leaf: Any) -> jax.Array:
    """A copy of what is no JAX array: memory shared with NumPy cannot be donated."""
    return leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


@contextlib.contextmanager
def _stop_between_steps(lines: progresses.Progress) -> Iterator[threading.Event]:
    """Ctrl-C, SIGTERM and SIGHUP set the event; a second one stops at once.

    But for SIGHUP: a terminal that closes may send several. `nohup` ignores it, and so
    it stays.
    """
    asked = threading.Event()

    def ask(signum, frame):
        if asked.is_set() and signum != signal.SIGHUP:
            raise KeyboardInterrupt
        asked.set()
        lines.note("stopping after this step; once more to stop without a checkpoint")

    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python lets only the main thread handle signals
        return
    asking = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in asking}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _check_arguments(**least: tuple[int, int]) -> None:
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise TrainingError(f"train: {name}={value} must be at least {lowest}.")


def _check_unused(folder: pathlib.Path, checkpoints: Checkpoints) -> None:
    if checkpoints.list_steps() or (folder / "metrics.jsonl").exists():
        raise TrainingError(
            f"train: folder={str(folder)!r} already holds a run.\n"
            "resume=True continues it; choose another folder to start afresh."
        )


def _check_room(
    folder, like, checkpoints: Checkpoints, steps: int, every: int, keep_best: bool
) -> None:
    """Refuse a disk that is going to be full before the last checkpoint is written."""
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    now = len(checkpoints.list_steps())
    saves = -(-steps // every) if every else 1
    more = max(min(checkpoints.keep + 1, now + saves) - now, 1) + 2 * keep_best
    require_free(
        folder,
        more * each + SPARE_BYTES,
        f"{more} more checkpoints of {each / 2**30:.2f} GiB beside metrics",
    )
