"""Whole calls on GPUs that are not there (tests/stub_driver.py): tests/test_triton_launched.py runs this folder."""

from collections.abc import Iterator

import pytest
from fastseq.kernels import launch

from tests.pretended import Gpu
from tests.stub_driver import Stub, install

STUB = install()


@pytest.fixture
def gpus() -> Iterator[Stub]:
    """The machine, all of whose tensors are on its second GPU; the first is the current one, before and after."""
    STUB.launched.clear()
    with Gpu(1, real="cpu"):
        yield STUB
    assert STUB.device == 0
    assert launch._recorded.get() is None
