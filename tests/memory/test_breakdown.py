"""The breakdown checks itself: sums that do not agree raise with both numbers."""

import tempfile
import types

import pytest

from jmem.memory import breakdown, hlo, kinds
from jmem.memory.measure import _compile
from jmem.targets import resolve


@pytest.fixture(scope="module")
def compiled(request):
    """A training step: its module, program and XLA's sums as plain numbers."""
    from tests.memory.conftest import scanned  # noqa: F401
