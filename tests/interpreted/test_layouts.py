"""However a call's tensors lie in memory, its results and gradients are to the bit those of contiguous ones."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastseq
from tests.kinds import KINDS, Kind, Sizes
from tests.test_kernels import misaligned, padded, reordered, sliced

SMALL = Sizes(T=2, B=3, S=4, I=3, H=4, D=5, most=17)
Layout = Callable[[Tensor], Tensor]


def step(kind: Kind, inputs: dict[str, Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Results, and the gradients of inputs and parameters."""
    torch.manual_seed(7)
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    results = kind.results(**leaves)
    wanted = [t for t in (*leaves.values(), *kind.module.parameters()) if t.requires_grad]
    found = torch.autograd.grad(results, wanted, grads, materialize_grads=True)
    return [*(t.detach() for t in results), *found]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), index


def laid(t: Tensor, layout: Layout) -> Tensor:
    """Lengths, which have no NaN to lie between, at every second place."""
    return torch.stack((t, t + 1), -1)[..., 0] if t.dtype == torch.int64 else layout(t)


def laid_parameters(kind: Kind, layout: Layout) -> None:
    """Where PyTorch's own products read them, whose bits are others for other strides, only at an odd address."""
    own = isinstance(kind.module, fastseq.Attention | fastseq.Decoder)
    for parameter in kind.module.parameters():
        parameter.data = (misaligned if own else layout)(parameter.data)


@pytest.mark.parametrize("layout", [misaligned, padded, sliced, reordered])
@pytest.mark.parametrize("name", KINDS)
def test_strides_and_addresses(name: str, layout: Layout) -> None:
    """Of inputs, parameters and the gradients of results."""
    kind = Kind.of(name, SMALL)
    inputs = {n: t.detach() for n, t in kind.inputs.items()}
    grads = [torch.randn_like(t) for t in kind.results()]
    expected = step(kind, inputs, grads)
    laid_parameters(kind, layout)
    same(step(kind, {n: laid(t, layout) for n, t in inputs.items()}, [layout(t) for t in grads]), expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_expanded(name: str, dim: int) -> None:
    """Inputs that are the same for all of a dimension, and the gradients that a sum sends back."""
    kind = Kind.of(name, SMALL)
    inputs = {n: t.detach().narrow(min(dim, t.dim() - 1), 0, 1).expand(t.shape) for n, t in kind.inputs.items()}
    ones = [torch.ones(t.shape) for t in kind.results()]
    expected = step(kind, {n: t.contiguous() for n, t in inputs.items()}, ones)
    same(step(kind, inputs, [torch.ones(()).expand(t.shape) for t in ones]), expected)
