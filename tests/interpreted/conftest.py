"""The Triton kernels in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 python -m pytest tests/interpreted`.

Numbers only, on small shapes: what a GPU would be given is compiled in tests/test_triton_compiled.py.
"""

import pytest

from fastseq import _triton


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "layer_kernels: runs whole layers too")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning:triton")
    if not _triton.interprets():
        raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment")
