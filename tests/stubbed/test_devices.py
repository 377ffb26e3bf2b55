"""Launches go to the device that the tensors are on, and into its current stream; another one stays the current."""

import pytest

from tests.kinds import KINDS, Kind, Sizes
from tests.stub_driver import Stub, stream_of

SIZES = Sizes(I=32, H=48, D=32, most=300)


@pytest.mark.parametrize("name", KINDS)
def test_forward_and_backward(name: str, gpus: Stub) -> None:
    kind = Kind.of(name, SIZES)
    kind.results()
    forward = len(gpus.launched)
    assert forward
    kind.step()
    assert len(gpus.launched) > 2 * forward
    for made in gpus.launched:
        assert (made.device, made.stream) == (1, stream_of(1)), made
        assert not made.lost, made
