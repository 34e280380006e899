"""`python -m jmem.memory module:program`."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from jmem.memory import __main__ as command
from jmem.memory.report import MemoryReport


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import jax, jax.numpy as jnp, jmem

            x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
            double = jmem.Program(lambda x: x * 2, (x,))
            number = 3

            def step():
                return jmem.Program(lambda x: x + 1, (x,), donate=(0,))

            def large():
                big = jax.ShapeDtypeStruct((2**32,), jnp.float32)
                return jmem.Program(lambda x: x + 1, (big,))
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_prints_and_writes_every_form(module, capsys):
    kinds = ("png", "html", "md", "json")
    outputs = [f"--{kind}={module}/report.{kind}" for kind in kinds]
    assert command.main(["mine:double", *outputs]) == 0
    assert "8.00 MiB" in capsys.readouterr().out
    assert MemoryReport.from_json(module / "report.json").device_bytes == 8 * 2**20
    assert json.loads((module / "report.json").read_text())["target"] == "h200"
    assert (module / "report.png").stat().st_size > 10_000
    assert "<table>" in (module / "report.html").read_text()
    assert "## By scope" in (module / "report.md").read_text()


def test_a_function_that_returns_a_program(module, capsys):
    assert command.main(["mine:step", "--gpu", "l4"]) == 0
    assert "4.00 MiB" in capsys.readouterr().out


def test_the_exit_status_is_the_verdict(module, capsys):
    assert command.main(["mine:large", "--gpu", "rtx4090"]) == 1
    assert "does not fit rtx4090" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine"], "'mine' names no program; write module:name"),
        (["nowhere:step"], "no module 'nowhere' can be imported"),
        (["mine:stop"], "module 'mine' has no 'stop'; did you mean 'step'?"),
        (["mine:number"], "mine:number is a int; need a jmem.Program"),
        (["mine:double", "--gpu", "h20"], "--gpu h20: target='h20' is no known"),
        (["mine:double", "--reserve", "-1"], "must not be negative"),
    ],
)
def test_refusals_are_one_line_and_status_2(module, capsys, arguments, words):
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


CAUSED = {  # what a user's module may do: the words that name it
    "import not_there_at_all": "broken imports not_there_at_all, which is not inst",
    "1 / 0": "ZeroDivisionError: division by zero\n  at .*broken.py:1",
    "def step(:": "SyntaxError",
    "import sys; sys.exit(0)": r"ended the process with sys.exit\(0\)",
    "def step(x): ...": "broken:step is a function with arguments",
    "def step(): raise KeyError('a\\x1b[2J')": "KeyError: .*x1b",
    "def step():\n return step()": "RecursionError",
}


@pytest.mark.parametrize("code", CAUSED)
def test_what_a_user_s_module_does_is_no_verdict(module, capsys, code):
    """Status 1 would say that it does not fit, and 0 that it does."""
    (module / "broken.py").write_text(code + "\n")
    sys.modules.pop("broken", None)
    assert command.main(["broken:step"]) == 2
    said = capsys.readouterr().err
    assert re.search(CAUSED[code], said), said
    assert "Traceback" not in said
    assert "\x1b" not in said


def test_interrupted(module, capsys):
    (module / "stopped.py").write_text("def step(): raise KeyboardInterrupt\n")
    assert command.main(["stopped:step"]) == 130


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reserve", "nan"], "--reserve nan: must not be negative, nor more than"),
        (["--reserve", "inf"], "--reserve inf"),
        (["--reserve", "1e300"], "--reserve 1e"),
        (["--top", "-1"], "--top -1: must not be negative"),
        (["--json", "."], "--json .: it is a folder"),
        (["--html", "nowhere/a.html"], "there is no folder nowhere"),
        (["--md", "mine.py/a.md"], "there is no folder mine.py"),
        (["--png", "a" * 300], "File name too long"),
    ],
)
def test_flags_are_refused_before_anything_is_compiled(
    module, capsys, monkeypatch, flags, words
):
    monkeypatch.chdir(module)
    before = sorted(module.iterdir())
    assert command.main(["not.even.a:module", *flags]) == 2
    assert words in capsys.readouterr().err
    assert sorted(module.iterdir()) == before


def test_a_file_that_was_there_is_replaced_whole(module, monkeypatch):
    report, link = module / "report.json", module / "link.json"
    report.write_text("earlier")
    link.symlink_to(report)
    assert command.main(["mine:double", "--json", str(link)]) == 0
    assert MemoryReport.from_json(report).device_bytes == 8 * 2**20
    assert link.is_symlink()
    assert not [*module.glob(".*partial")]


def test_in_a_process_of_its_own(module):
    done = subprocess.run(
        [sys.executable, "-m", "jmem.memory", "mine:double", "--reserve", "nan"],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        cwd=module,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jmem.memory: --reserve nan: must not be")


class TestOutput:
    """What reads the output decides neither the verdict nor the files."""

    def say(self, monkeypatch, stream, module, arguments=("mine:double",)):
        monkeypatch.setattr(sys, "stdout", stream)
        with contextlib.suppress(OSError):
            return command.main([*arguments])

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
    def test_an_encoding_without_our_signs(self, module, monkeypatch, encoding):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding)
        assert self.say(monkeypatch, stream, module) == 0
        text = raw.getvalue().decode(encoding)
        assert "fits h200" in text
        assert "-" * 88 in text

    def test_a_reader_that_has_left(self, module, monkeypatch, capfd):
        reading, writing = os.pipe()
        os.close(reading)
        stream = os.fdopen(writing, "w")
        to = f"--json={module}/report.json"
        assert self.say(monkeypatch, stream, module, ["mine:double", to]) == 0
        stream.close()  # as Python does at its end; nothing is left to fail
        assert (module / "report.json").exists()
        assert capfd.readouterr().err == ""

    def test_no_output_at_all(self, module, monkeypatch):
        assert self.say(monkeypatch, None, module) == 0

    def test_a_full_disk_is_no_verdict(self, module, monkeypatch, capsys):
        if not pathlib.Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        with open("/dev/full", "w") as full:
            assert self.say(monkeypatch, full, module) == 2
        assert "No space left" in capsys.readouterr().err

    def test_a_report_into_a_pipe(self, module):
        reading, writing = os.pipe()
        with os.fdopen(reading) as output:
            assert command.main(["mine:step", f"--json=/dev/fd/{writing}"]) == 0
            os.close(writing)
            assert MemoryReport.from_json(output.read()).device_bytes == 4 * 2**20
