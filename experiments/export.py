"""The tuned models of a run that has ended or was stopped, in its `tuned/<method>/`.

    python -m experiments.export runs/lisa/20261201-101500-0ff7f539
    python -m experiments.export RUN --only lisa --state best --dtype bfloat16

A run of `experiments.lisa` or `experiments.mixlora` leaves them by itself when it ends;
this is for one that was stopped, that ran with `--export none` or before there were
exports, and for its best state, which it keeps with `--evaluate-every` (that goes into
`tuned/<method>-best/`). Methods that move a model's own weights give a Hugging Face
folder, the others an adapter. No GPU is touched.
"""

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax

import jmem.checkpoints
from experiments.harness import cli, sweep
from experiments.harness import config as configs
from experiments.harness.config import ConfigError
from experiments.harness.exports import Dtype, Exports, describe
from experiments.harness.rates import scale_rate
from jmem.checkpoints import smollm2
from jmem.finetune import tuned
from jmem.train.checkpoint import Checkpoints
from jmem.train.folder import Hold

State = Literal["last", "best"]
_KEPT: Mapping[State, str] = {"last": "checkpoints", "best": "best"}
"""A method's folder of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    run: pathlib.Path
    """The run's folder."""
    only: tuple[str, ...] = ()
    """Methods, or trials of a comparison; empty means all that keep a state."""
    state: State = "last"
    """Which state: the last one kept, or the one of the least held-out loss."""
    dtype: Dtype = "stored"
    """Of a model's own weights: the checkpoint's on disk, or another."""


def open_run(folder: pathlib.Path) -> tuple[Any, Any]:
    """A run's experiment, as a module, and its config.

    Raises:
      ConfigError: the folder holds no run, or one of an experiment that trains none of
        the user's models.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no run was saved there (it has no config.toml).\n"
            "Give the folder that the run printed, runs/<experiment>/<time>-<hash>."
        )
    head = path.read_text(errors="replace").partition("\n")[0]
    named = re.match(r"# Config of a run of (\w+);", head)
    module = None
    if named and (pathlib.Path(__file__).parent / f"{named[1]}.py").exists():
        module = importlib.import_module(f"experiments.{named[1]}")
    if module is None or not hasattr(module, "make_finetuners"):
        raise ConfigError(
            f"{path}:1: {head!r:.80} names no experiment that tunes a model.\n"
            "Those are lisa and mixlora."
        )
    return module, configs.read(path, module.Config())


def find_states(
    folder: pathlib.Path, finetuners: Mapping[str, Any], state: State
) -> dict[str, Any]:
    """The fine-tuners of a run that kept such a state, by the names of their folders.

    Raises:
      ConfigError: none did.
    """
    found = {}
    for kept in sorted(folder.glob(f"*/{_KEPT[state]}/*/manifest.json")):
        name = kept.parents[2].name
        trial = sweep.parse_trial(name)
        method = name if trial is None else trial.method
        if method in finetuners:
            own, factor = finetuners[method], 1.0 if trial is None else trial.factor
            found[name] = own if factor == 1 else scale_rate(own, factor)
    if not found:
        why = (
            "A comparison of rates keeps what it tuned and no state, and a run that "
            "was killed has none before its first checkpoint."
            if state == "last"
            else "It is kept by `experiments.lisa --evaluate-every N`."
        )
        left = ", ".join(sorted(path.name for path in folder.glob("tuned/*")))
        why += f"\nIts tuned/ has {left}." if left else ""
        raise ConfigError(f"{folder}: keeps no {state} state of any method.\n{why}")
    return found


def export(command: Command) -> list[pathlib.Path]:
    """Writes the folders, and returns them.

    Raises:
      ConfigError: no such run, method or state, or its model is not there.
      FolderError: the run is going on in another process, or the disk has no room.
      CheckpointError: a state is damaged, or its folder cannot be written.
    """
    module, config = open_run(command.run)
    finetuners = module.make_finetuners(config)
    found = find_states(command.run, finetuners, command.state)
    if config.model != smollm2.NAME and not pathlib.Path(config.model).exists():
        raise ConfigError(
            f"{command.run / 'config.toml'}: model={config.model!r} is not here.\n"
            "Run this in the folder that the run was started in, or put the model back."
        )
    if unknown := [name for name in command.only if name not in found]:
        raise ConfigError(
            f"--only {unknown[0]}: {command.run} keeps a {command.state} state of "
            f"{', '.join(found)}."
        )
    chosen = {name: found[name] for name in command.only or found}
    model = config.build_here(config.dimensions())
    checkpoint = jmem.checkpoints.load(config.model)
    best = "-best" if command.state == "best" else ""
    exports = Exports(
        module.__name__.rpartition(".")[2],
        command.run / "tuned",
        {name + best: own for name, own in chosen.items()},
        model,
        checkpoint,
        command.dtype,
    )
    places = []
    with Hold(command.run):  # no other process is writing these states
        print(exports.plan(room=command.run))
        for name, own in chosen.items():
            like = jax.tree.map(_describe_here, tuned.describe_state(own, model))
            with Checkpoints(command.run / name / _KEPT[command.state]) as kept:
                steps, state = kept.restore(like, data=None)
            trial = sweep.parse_trial(name)
            seed = getattr(config, "seed", None) if trial is None else trial.seed
            what: dict[str, Any] = {"steps": steps, "seed": seed, "kept": command.state}
            places.append(exports.write(name + best, own, state, **what))
    return places


def _describe_here(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf in this process's memory, wherever training had it."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


def main(command: Command) -> None:
    jax.config.update("jax_platforms", "cpu")  # a GPU may be training at this moment
    for place in export(command):
        print(describe(place))


if __name__ == "__main__":
    cli.script(main, Command)
