"""How long a file may be: a reader takes it in at one sitting."""

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMITS = {"jmem": 350, "kernels": 350, "experiments": 350}
"""Lines of code of any file in these folders."""
EXPERIMENT = 240
"""Of an experiment, which leaves to the harness what two of them need."""
QUIET = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def count_lines(text: str) -> int:
    """Lines that hold code: no blank, comment, or string that is a statement.

    >>> count_lines("'Words.'\\nx = (\\n    1\\n)  # one\\n\\n# none\\n")
    3
    """
    prose = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in QUIET:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


@pytest.mark.parametrize("folder", LIMITS)
def test_no_file_is_longer_than_a_sitting(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    sizes = {str(f.relative_to(ROOT)): count_lines(f.read_text()) for f in files}
    long = {name: n for name, n in sizes.items() if n > LIMITS[folder]}
    assert not long, "split it, or move what others need too to where they find it"


def test_an_experiment_is_config_programs_and_study():
    files = (ROOT / "experiments").glob("*.py")
    sizes = {file.name: count_lines(file.read_text()) for file in files}
    long = {name: n for name, n in sizes.items() if n > EXPERIMENT}
    assert not long, "what a second experiment needs belongs to experiments/harness"
