"""However a call's tensors lie, its kernels are the same: at any address, of any strides, expanded."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kinds import KINDS, Kind, Sizes
from tests.stub_driver import Stub
from tests.test_kernels import misaligned, reordered, sliced

SIZES = Sizes(I=32, H=48, D=32, most=300)


def kernels_of(gpus: Stub, kind: Kind, grads: Sequence[Tensor], inputs: dict[str, Tensor]) -> list[tuple[str, int]]:
    """Those of a training step, and how many were compiled of each by then."""
    gpus.launched.clear()
    torch.autograd.backward(kind.results(**inputs), grads)
    assert not any(one.lost for one in gpus.launched)
    return [(one.kernel, one.compiled) for one in gpus.launched]


def padded(t: Tensor) -> Tensor:
    """In a larger one, at an odd address. By 16, for a step's kernel knows whether its rows lie that far apart."""
    large = torch.zeros([n + 16 for n in t.shape], dtype=t.dtype)
    return large[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)


def expanded(t: Tensor) -> Tensor:
    return torch.ones(()).expand(t.shape)


@pytest.mark.parametrize("name", KINDS)
def test_no_further_compilation(name: str, gpus: Stub) -> None:
    kind = Kind.of(name, SIZES)
    ones = [torch.ones(t.shape) for t in kind.results()]
    kind.step()
    expected = kernels_of(gpus, kind, ones, {})
    for layout in (misaligned, sliced, padded, reordered):
        inputs = {
            n: layout(t.detach()).requires_grad_() if t.is_floating_point() else misaligned(t)
            for n, t in kind.inputs.items()
        }
        assert kernels_of(gpus, kind, [layout(t) for t in ones], inputs) == expected
    assert kernels_of(gpus, kind, [expanded(t) for t in ones], {}) == expected
    for parameter in kind.module.parameters():
        parameter.data = misaligned(parameter.data)
    assert kernels_of(gpus, kind, ones, {}) == expected
