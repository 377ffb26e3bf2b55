"""Launches go to the device that the tensors are on, and into its current stream; another one stays the current."""

import pytest
import torch

from tests.kinds import KINDS, Kind, Sizes
from tests.stub_driver import Stub

SIZES = Sizes(I=32, H=48, D=32, most=300)


@pytest.mark.parametrize("name", KINDS)
def test_forward_and_backward(name: str, gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the stream that is the current one when it begins; autograd sets forward's for a backward pass."""
    results = Kind.of(name, SIZES).results()
    forward = len(gpus.launched)
    assert forward
    assert {one.stream for one in gpus.launched} == {gpus.streams[1]}
    monkeypatch.setitem(gpus.streams, 1, 0x7000)
    torch.autograd.backward(results, [torch.ones_like(t) for t in results])
    assert {one.stream for one in gpus.launched[forward:]} == {0x7000}
    assert {one.device for one in gpus.launched} == {1}
    assert not any(one.lost for one in gpus.launched)
