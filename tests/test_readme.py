"""What the README shows works: its Python runs, and prints what it says there."""

import pathlib
import re

import pytest

PATH = pathlib.Path(__file__).parents[1] / "README.md"
TEXT = PATH.read_text()
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, re.S | re.M
)
HOW = r"^ahead of time, jax .*$"
"""The line that names versions and seconds."""


def line_of(code: str) -> int:
    return TEXT[: TEXT.index(code)].count("\n") + 1


def test_it_is_read_in_one_sitting():
    assert PATH.stat().st_size <= 12 * 1024, "what is longer is a page of docs/"


def test_it_shows_python_with_its_answer_and_a_command():
    assert len(SNIPPETS) == TEXT.count("```python") > 0
    assert "$ uv run python -m experiments.lisa" in TEXT


@pytest.mark.parametrize(
    ("code", "shown"), SNIPPETS, ids=lambda text: f"line {line_of(text)}"
)
def test_its_python_prints_what_it_says(code, shown, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine" / "attention.py"  # the report names lines of it
    exec(compile(code, str(file), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert re.sub(HOW, "", printed, flags=re.M) == re.sub(HOW, "", shown, flags=re.M)
