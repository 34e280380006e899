"""What the kernels' tests share: Pallas's interpreter, clean and watched for races."""

import jaxtyping
import pytest

from jmem.kernels import _mgpu


@pytest.fixture
def interpreter():
    """For tests that interpret kernels: fails where one raced, and cleans up after."""
    _mgpu.reset_interpreter()
    try:
        yield
        assert not _mgpu.races_found()
    finally:
        _mgpu.reset_interpreter()


@pytest.fixture
def unchecked():
    """Calls as users make them: without the type checker of the test suite."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
