"""The Triton kernels in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 python -m pytest tests/interpreted`.

Numbers only, on small shapes: what a GPU would be given is compiled in tests/test_triton_compiled.py.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from fastseq import _triton


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "layer_kernels: runs whole layers too")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning:triton")
    if not _triton.interprets():
        raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment")


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which of a layer's kernels run: "sequence", up to 16 units, layer-normalised up to 32, or "steps" above;
    "barrier": these in one launch.
    """
    from fastseq.kernels import (
        devices,
        launch,
        rnn,
        rnn_norm,
    )  # not at the top: without Triton this folder only says so

    # Of one program, which need not be resident beside others, the barrier; of three without one, as on AMD.
    units = 1 if request.param == "barrier" else 3
    monkeypatch.setattr(devices, "INTERPRETER", replace(devices.INTERPRETER, units=units))
    started = set()

    def noted(x: Tensor, what: Any) -> None:
        kind = re.search("sequence|steps", what.kernel.fn.__module__)
        if kind is not None:  # else it is beside the recurrence
            started.add((kind[0], bool(what.constants.get("BARRIER"))))
        launch.run(x, what)

    for module in (rnn, rnn_norm):
        monkeypatch.setattr(module, "run", noted)
    yield request.param
    assert started == {("sequence" if request.param == "sequence" else "steps", request.param == "barrier")}
