"""The package as a whole: what it exports, and what importing it does not cost."""

import pkgutil
import subprocess
import sys

import jmem.data
from jmem.data.batch import Batch


def test_batch_is_the_contract():
    """What a loader makes and a step takes, in this order."""
    assert jmem.data.Batch is Batch
    assert Batch._fields == ("tokens", "targets", "weights", "segments")


def test_no_name_hides_a_module():
    modules = {info.name for info in pkgutil.iter_modules(jmem.data.__path__)}
    assert not modules & set(jmem.data.__all__)


def test_nothing_heavy_is_imported():
    """`datasets` takes seconds, and only `read` needs it."""
    code = (
        "import sys, jmem.data\n"
        "heavy = {'datasets', 'tokenizers', 'pandas', 'pyarrow', 'flax'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
