"""Lists the experiments, one line each: `python -m experiments`."""

import ast
import pathlib

from experiments.harness.cli import forgive


def list_experiments() -> dict[str, str]:
    """Names of the experiments and the first line of what each says of itself.

    Files are parsed, not imported: listing takes no time and starts no JAX.
    """
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        if not path.name.startswith("_"):
            words = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.stem] = words.partition("\n")[0]
    return found


def main() -> None:
    found = list_experiments()
    width = max(map(len, found), default=0)
    for name, line in found.items():
        print(f"python -m experiments.{name:{width}}  {line}")


if __name__ == "__main__":
    with forgive():
        main()
