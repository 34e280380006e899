"""What the README shows works: its Python runs, its commands exist."""

import importlib.util
import pathlib
import re

import pytest

TEXT = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.S | re.M)
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", TEXT)))


def line_of(code: str) -> int:
    return TEXT[: TEXT.index(code)].count("\n") + 1


def test_it_shows_python_and_commands():
    assert SNIPPETS
    assert "experiments.lisa" in MODULES


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: f"line {line_of(code)}")
def test_its_python_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip(), "a snippet should print its answer"


@pytest.mark.parametrize("module", MODULES)
def test_its_commands_exist(module):
    assert importlib.util.find_spec(module) is not None
