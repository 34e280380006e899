"""From the command line to the exit status."""

import ast
import dataclasses
import fcntl
import importlib.machinery
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest
from toy_experiment import Schedule

from experiments import __main__ as listing
from experiments.harness import cli
from experiments.harness.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


EXPERIMENT = '''
"""Toy: what it answers.

More.
"""
import dataclasses, os, signal
from experiments.harness import cli

@dataclasses.dataclass(frozen=True)
class Config:
    gpu: str = "h200"
    fail: str = ""

def main(config, run):
    if config.fail == "refused":
        raise ValueError("Toy: fail='refused' is refused.\\nUse another.")
    if config.fail == "bug":
        1 / 0
    if config.fail == "file":
        open("not/there")
    if config.fail == "memory":
        from jax.errors import JaxRuntimeError
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    if config.fail == "closed":
        os.kill(os.getpid(), signal.SIGHUP)
    run.note(f"compiled for {run.target.name}")
    if config.fail == "stopped":
        raise KeyboardInterrupt("toy: stopped after update 3")
    return int(config.fail == "no")

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a parent may ignore
    cli.run(main, Config)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    """Runs `python -m experiments.toy` in this process: (exit status, out, err)."""
    module = types.ModuleType("experiments.toy")
    module.__spec__ = importlib.machinery.ModuleSpec("experiments.toy", None)
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    monkeypatch.chdir(tmp_path)
    exec(EXPERIMENT, vars(module))

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
        try:
            cli.run(module.main, module.Config)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return start


class TestProcess:
    """From the command line to the exit status."""

    def test_run_leaves_config_and_report(self, toy, tmp_path):
        status, out, err = toy("--gpu", "rtx4090")
        assert (status, err) == (0, "")
        assert "compiled for rtx4090" in out
        [folder] = (tmp_path / "runs" / "toy").iterdir()
        saved = json.loads((folder / "report.json").read_text())
        assert saved["command"] == "python -m experiments.toy --gpu rtx4090"
        assert (saved["status"], saved["target"]) == ("complete", "rtx4090")
        assert saved["config"] == {"gpu": "rtx4090", "fail": ""}
        assert 'gpu = "rtx4090"' in (folder / "config.toml").read_text()

    def test_refusal_is_one_message_and_leaves_nothing(
        self, toy, tmp_path, monkeypatch
    ):
        assert toy("--fail", "refused") == (
            2,
            "",
            "ValueError: Toy: fail='refused' is refused.\n            Use another.\n"
            "            Flags: --fail refused.\n",
        )
        assert not list((tmp_path / "runs" / "toy").iterdir())
        monkeypatch.setenv("JMEM_DEBUG", "1")
        with pytest.raises(ValueError, match="is refused"):
            toy("--fail", "refused")

    def test_a_bug_keeps_its_traceback(self, toy):
        with pytest.raises(ZeroDivisionError):
            toy("--fail", "bug")

    def test_unknown_gpu_is_refused_before_any_work(self, toy, tmp_path):
        status, _, err = toy("--gpu", "h20")
        assert status == 2
        assert err.startswith("ValueError: target='h20' is no known GPU; did you mean")
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("fail", ["file", "memory", "no"])
    def test_what_the_machine_refuses_is_said_and_no_verdict(self, toy, fail):
        status, _, err = toy("--fail", fail)
        words = {
            "file": (2, "FileNotFoundError: [Errno 2] No such file"),
            "memory": (2, "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"),
            "no": (1, ""),
        }[fail]
        assert (status, err[: len(words[1])]) == words

    def test_a_run_that_goes_on_elsewhere_is_not_touched(self, toy, tmp_path):
        status, *_ = toy()
        [folder] = (tmp_path / "runs" / "toy").iterdir()
        holding = os.open(folder, os.O_RDONLY)
        fcntl.flock(holding, fcntl.LOCK_EX)  # of another open file: as if elsewhere
        files = (folder, *folder.iterdir())
        before = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
        status, _, err = toy("--resume", str(folder))
        os.close(holding)
        assert status == 2
        assert err.startswith(f"FolderError: folder={str(folder)!r} is in use by proc")
        assert before == [(f.stat().st_mtime_ns, f.stat().st_ino) for f in files]
        assert toy("--resume", str(folder))[0] == 0

    def test_folder_that_cannot_be_written(self, toy, tmp_path):
        (tmp_path / "file").touch()
        status, _, err = toy("--runs", "file/runs")
        assert status == 2
        assert err.startswith("FolderError: folder='file/runs/toy' cannot be written")

    def test_interruption_leaves_a_report_and_says_how_to_go_on(self, toy, tmp_path):
        status, out, err = toy("--fail", "stopped")
        [folder] = (tmp_path / "runs" / "toy").iterdir()
        assert (status, err) == (130, "")
        assert "toy: stopped after update 3" in out
        assert f"experiments.toy --resume runs/toy/{folder.name}" in out
        saved = json.loads((folder / "report.json").read_text())
        assert saved["status"] == "interrupted"
        status, _, err = toy("--resume", str(folder), "--fail", "")
        assert status == 2
        assert "fail='' differs from the saved run's 'stopped'" in err

    def test_as_a_module(self, tmp_path):
        (tmp_path / "toy.py").write_text(EXPERIMENT)
        done = subprocess.run(
            [sys.executable, "-m", "toy", "--fail", "refused"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("ValueError: Toy: fail='refused'")
        assert (tmp_path / "runs" / "toy").is_dir()  # named by the module, not __main__

    @pytest.mark.parametrize(
        ("fail", "status", "words"),
        [("bug", 2, "ZeroDivisionError: division by zero"), ("closed", 130, "")],
    )
    def test_status_of_a_bug_and_of_a_terminal_that_closes(
        self, tmp_path, fail, status, words
    ):
        """A traceback's own, 1, would be a verdict; a pipe's reader is gone as well."""
        (tmp_path / "toy.py").write_text(EXPERIMENT)
        process = subprocess.Popen(
            [sys.executable, "-m", "toy", "--fail", fail],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stderr  # noqa: PT018
        process.stdout.close()
        last = (process.stderr.read().splitlines() or [""])[-1]
        process.stderr.close()
        assert (process.wait(timeout=60), last) == (status, words)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [("raise ConfigError('x')", True), ("int('x')", False), ("1 / 0", False)],
)
def test_what_jax_or_python_raises_is_no_refusal(error, refusal):
    source = "from experiments.harness.config import ConfigError\n" + error
    with pytest.raises(Exception) as caught:
        exec(source, {"__name__": "somewhere.else"})
    assert cli.is_refusal(caught.value) is refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    check: bool = False
    """Whether it is only looked at."""
    only: tuple[Schedule, ...] = ()
    out: pathlib.Path | None = None


class TestScript:
    """A command line without presets and runs."""

    def start(self, arguments, main=lambda command: None):
        with pytest.raises(SystemExit) as stop:
            cli.script(main, Command, arguments)
        return stop.value.code

    def test_fields_are_flags_and_the_status_is_what_main_returns(self):
        seen = []
        flags = ["--check", "--only", "cosine", "--out", "a.json"]
        assert self.start(flags, lambda command: seen.append(command) or 3) == 3
        assert seen == [
            Command(check=True, only=("cosine",), out=pathlib.Path("a.json"))
        ]
        assert self.start([]) == 0

    def test_help_is_the_module_and_the_fields(self, capsys):
        assert self.start(["--help"]) == 0
        shown = capsys.readouterr().out
        assert "python -m experiments.test_cli" in shown
        assert "From the command line to the exit status" in shown
        assert "Whether it is only looked at." in shown
        assert "--no-check" not in shown

    def test_refusals_bugs_and_interruptions(self, capsys):
        def main(command):
            if command.check:
                raise KeyboardInterrupt
            raise ConfigError("out=None is needed.") if command.only else KeyError

        assert self.start(["--check"], main) == 130
        assert self.start(["--only", "cosine"], main) == 2
        told = "ConfigError: out=None is needed.\n            Flags: --out.\n"
        assert capsys.readouterr().err == told
        with pytest.raises(KeyError):
            cli.script(main, Command, [])
        assert self.start(["--chek"]) == 2
        assert "--check" in capsys.readouterr().err

    def test_parsing_starts_no_jax(self):
        code = "import sys, experiments.harness.cli; print('jax' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.strip() == "False", done.stderr


def test_listing_reads_every_experiment_without_importing(capsys):
    listing.main()
    shown = capsys.readouterr().out.splitlines()
    files = sorted(p.stem for p in (ROOT / "experiments").glob("[!_]*.py"))
    assert [line.split()[2] for line in shown] == [f"experiments.{n}" for n in files]
    for name, line in listing.list_experiments().items():
        tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
        assert line
        assert (ast.get_docstring(tree) or "").startswith(line)


def test_harness_leaves_matplotlib_and_tyro_alone():
    code = textwrap.dedent(
        """
        import sys
        import experiments.harness.cli, experiments.harness.plots
        print({"matplotlib", "tyro", "orbax", "datasets", "flax"} & set(sys.modules))
        """
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
