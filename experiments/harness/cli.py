"""Command lines: a frozen dataclass whose fields are the flags, docstrings as help.

An experiment has its config, and five flags besides:

    if __name__ == "__main__":
        cli.run(main, Config)

Every field is a flag (`--lisa.active-layers 4`), with its docstring as help. Presets
come first, then the command line:

    --preset NAME      configs/<experiment>/NAME.toml, or the path of a TOML file
    --measure-only     compile only: no weights, no training, no GPU
    --resume DIR       continue a run, with its own config, `PLACES` aside; --steps may
                       be more where the config says so (`growing`), as long as no
                       learning rate falls over the steps of the run
    --trace            let the XLA profiler record some steps
    --runs DIR         where run folders are made

`gpu`, where a config has it, names the described GPU: a field like any other, looked up
before any work.

What is no experiment, with no presets and no run folder, has its own flags alone:

    if __name__ == "__main__":
        cli.script(main, Command)       # main(command) gives the exit status, or None

Exit status 0 is done, 1 a verdict that is no, 130 an interruption, and 2 any failure.
What the user can mend ends in one message; JMEM_DEBUG=1 shows where it came from.
Nothing that is printed ends a command: nobody may read it, or its letters be unknown.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import pathlib
import runpy
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from experiments.harness import config as configs
from experiments.harness.config import ConfigError, find_slug
from experiments.harness.flags import read as read_flags
from experiments.harness.naming import name_flags

if TYPE_CHECKING:
    from experiments.harness.run import Run

ROOT = pathlib.Path(__file__).resolve().parents[2]
"""The checkout: presets are found in it, whatever the working directory is."""


PLACES = ("gpu", "mesh", "export")
"""Fields that say where a run computes and what it leaves, not what it finds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What every experiment understands, beside its config."""

    preset: str = ""
    """Name of a TOML file in the experiment's configs, or the path of one."""
    measure_only: bool = False
    """Compile and measure only: no weights, no training."""
    resume: str = ""
    """Folder of a run to continue, with its own config."""
    trace: bool = False
    """Record a profiler trace of some steps, for xprof or Perfetto."""
    runs: pathlib.Path = pathlib.Path("runs")
    """Where run folders are made."""


def run[Config](
    main: Callable[[Config, "Run"], int | None], config: type[Config]
) -> None:
    """Read the command line, run `main`, write the report, and exit on failure.

    Exit status 1 is a verdict that is no, which `main` returns; 2 is a refusal in words
    or a bug, which keeps its traceback; 130 is an interruption.
    """
    with _end_in_words((config, Flags), sys.argv[1:]) as read:
        slug = find_slug(main)
        flags, chosen = parse(config, slug, sys.argv[1:], _describe(main))
        read.append(chosen)
        from experiments.harness.run import Run  # with JAX, which a script may not need
        from jmem.targets import resolve

        gpu = getattr(chosen, "gpu", None)
        target = None if gpu is None else resolve(gpu)
        with Run(
            slug,
            chosen,
            target=target,
            runs=flags.runs,
            measure_only=flags.measure_only,
            resume=pathlib.Path(flags.resume) if flags.resume else None,
            trace=flags.trace,
        ) as started:
            status = main(chosen, started)
    if status:
        sys.exit(status)


def script[Command](
    main: Callable[[Command], int | None],
    command: type[Command],
    arguments: Sequence[str] | None = None,
) -> None:
    """Read the command line (or `arguments`), run `main`, and exit with its status.

    Refusals and interruptions end as those of an experiment do. The module's docstring
    is the head of --help.

    Raises:
      TypeError: `command` cannot be one (`experiments.harness.config.check`).
    """
    given = sys.argv[1:] if arguments is None else arguments
    with _end_in_words((command,), given) as read:
        configs.check(command)
        chosen = read_flags(
            command,
            given,
            prog=f"python -m experiments.{find_slug(main)}",
            description=_describe(main),
        )
        read.append(chosen)
        status = main(chosen)
    sys.exit(status or 0)


@contextlib.contextmanager
def _end_in_words(
    kinds: Sequence[type], arguments: Sequence[str]
) -> Iterator[list[Any]]:
    """Ends the process in words where the user can mend what went wrong.

    The words end with the flags that they speak of, of dataclasses of these `kinds`;
    these are to be appended to what is yielded, once they are read.
    """
    read = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(forgive())
        stack.enter_context(_stop_as_by_ctrl_c())
        try:
            yield read
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if os.environ.get("JMEM_DEBUG") or not is_refusal(error):
                sys.excepthook = _exit_after_traceback
                raise
            flags = name_flags(str(error), kinds, arguments, read)
            print(format_error(error, flags), file=sys.stderr)
            sys.exit(2)


def forgive() -> contextlib.AbstractContextManager:
    """`jmem.terminal.forgive`, without JAX, which a script may not need."""
    path = ROOT / "jmem" / "terminal.py"
    return runpy.run_path(str(path))["forgive"]()


@contextlib.contextmanager
def _stop_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, and SIGHUP where `nohup` does not ignore it, interrupt like Ctrl-C."""

    def interrupt(signum, frame):
        signal.signal(signum, signal.SIG_IGN)  # a closing terminal sends several
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _exit_after_traceback(*raised: Any) -> None:
    """For `sys.excepthook`: Python's own status, 1, would be a verdict."""
    sys.__excepthook__(*raised)
    sys.exit(2)


def parse[Config](
    config: type[Config],
    slug: str,
    arguments: Sequence[str],
    description: str = "",
) -> tuple[Flags, Config]:
    """Flags and config from a command line: defaults, then preset, then flags.

    `--help` and a flag that is not one end the process, as command lines do.

    Raises:
      ConfigError: a preset that is missing or does not fit; with --resume, a field
        that differs from the saved run's; tyro is not installed.
      ValueError: a value that the config, or a table within it, refuses.
      TypeError: `config` cannot be one (`experiments.harness.config.check`).
    """
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tyro, which reads the flags of experiments, is not installed; no wheel "
            "brings it. Run `uv sync`, or `pip install tyro`."
        ) from error

    configs.check(config)
    if (
        hidden := configs.resolve_hints(config).keys()
        & configs.resolve_hints(Flags).keys()
    ):
        name = f"{config.__name__}.{min(hidden)}"
        raise TypeError(f"{name} is a flag of every experiment.")
    base = config()
    saved = None
    if folder := _find_value("--resume", arguments):
        base = saved = _read_saved(pathlib.Path(folder), base)
    if name := _find_value("--preset", arguments):
        base = configs.read(find_preset(slug, name), base)

    known = ", ".join(list_presets(slug)) or "none"
    bare = tyro.conf.arg(name="")  # no prefix before the names of fields
    parts = (
        Annotated[Flags, bare, tyro.conf.FlagCreatePairsOff],
        Annotated[config, bare],
    )
    both: Any = tuple[*parts]
    with _raise_our_own():
        flags, chosen = tyro.cli(
            both,
            args=list(arguments),
            default=(Flags(), base),
            prog=f"python -m experiments.{slug}",
            description=f"{description}\n\nPresets: {known}".strip(),
        )
    if saved is not None:
        _check_resumed(flags, saved, chosen)
    return flags, chosen


@contextlib.contextmanager
def _raise_our_own() -> Iterator[None]:
    """Raises what a table within a config refused, where tyro would exit with a box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        error: BaseException | None = stop
        while error := error.__context__:
            if isinstance(error, ValueError) and is_refusal(error):
                raise error from None
        sys.stderr.write(box.getvalue())
        raise


def _find_value(flag: str, arguments: Sequence[str]) -> str:
    """The value of a flag that decides what the other flags' defaults are."""
    value = ""
    for index, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name == flag and (equals or index + 1 < len(arguments)):
            value = after if equals else arguments[index + 1]
    return value


def find_preset(slug: str, name: str) -> pathlib.Path:
    """The file of a preset.

    Raises:
      ConfigError: there is none; the nearest name is offered.
    """
    if name.endswith(".toml") or "/" in name:
        path = pathlib.Path(name)
        if not path.is_file():
            raise ConfigError(f"--preset {name}: no such file.")
        return path
    names = list_presets(slug)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        tail = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
        raise ConfigError(f"--preset {name}: no configs/{slug}/{name}.toml; {tail}")
    return ROOT / "configs" / slug / f"{name}.toml"


def list_presets(slug: str) -> list[str]:
    """Names of an experiment's presets."""
    paths = (ROOT / "configs" / slug).glob("*.toml")
    return sorted(path.stem for path in paths if path.name != "claims.toml")


def _read_saved[Config](folder: pathlib.Path, base: Config) -> Config:
    """The config of the run in a folder; ConfigError if there is none."""
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(
            f"--resume {folder}: no run was saved there (it has no config.toml).\n"
            "Give the folder that the run printed, runs/<experiment>/<time>-<hash>."
        )
    return configs.read(path, base)


def _check_resumed(flags: Flags, saved: Any, given: Any) -> None:
    """Refuse to continue a run with another config.

    `PLACES` may differ, and what the config's `growing` names may be more, unless that
    says why not.
    """
    if flags.measure_only:
        raise ConfigError("--resume and --measure-only: there is nothing to resume.")
    for name, before, now in configs.find_differences(saved, given):
        if name.partition(".")[0] in PLACES:
            continue
        why = getattr(saved, "growing", {}).get(name)
        if why == "" and now > before:
            continue
        if not why or now < before:
            why = (
                "A run goes on with its own config: drop the flag, or start a new run."
            )
        raise ConfigError(
            f"--resume {flags.resume}: {name}={now!r} differs from the saved run's "
            f"{before!r}.\n{why}"
        )


# Words --------------------------------------------------------------------------------


def _describe(main: Callable) -> str:
    """What the module that holds `main` says of itself."""
    return inspect.getdoc(sys.modules[main.__module__]) or ""


def is_refusal(error: Exception) -> bool:
    """Whether an error says what the user can do.

    It does when its class is our own, when a line of ours raised it as a ValueError or
    TypeError, or when a file or memory was refused: what else JAX or Orbax raise by
    themselves is a bug, not a user's mistake.
    """
    full = isinstance(error, OSError | MemoryError) or "RESOURCE_EXHAUSTED" in str(
        error
    )
    if full or _is_ours(type(error).__module__):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    name = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError | TypeError) and _is_ours(name)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("jmem", "experiments", "__main__")


def format_error(error: Exception, more: str = "") -> str:
    """An error in the house style: its class, its words, further lines indented.

    `more` is a line of its own at the end.
    """
    first, *rest = [*(str(error).splitlines() or [""]), *more.splitlines()]
    lines = [f"{type(error).__name__}: {first}"]
    return "\n".join(lines + [textwrap.indent(line, " " * 12) for line in rest])
