"""`python -m jmem.memory module:program`."""

import json
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
        (["mine:double", "--gpu", "h20"], "did you mean 'h200'"),
        (["mine:double", "--reserve", "-1"], "must not be negative"),
    ],
)
def test_refusals_are_one_line_and_status_2(module, capsys, arguments, words):
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_module_that_lacks_a_module_says_which(module):
    (module / "lame.py").write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        command.main(["lame:step"])
