"""The same bits a thousand times: a race that one run in a hundred loses shows here."""

import itertools

import pytest
import torch

import fastseq
from tests.gpu.place import BACKEND, DEVICE, REHEARSES

TIMES = 3 if REHEARSES else 1000


@pytest.mark.parametrize(("kind", "H"), list(itertools.product(("LSTM", "GRU"), (64, 256, 768))))
def test_a_step_repeats(kind: str, H: int) -> None:
    """A training step of a few steps, both directions; by size, one block, a cluster, or a grid."""
    torch.manual_seed(1)
    layer = getattr(fastseq, kind)(8, H if not REHEARSES else 8, bidirectional=True, backend=BACKEND)
    layer = layer.to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 9, 8, dtype=torch.bfloat16, device=DEVICE)
    lengths = torch.tensor([4, 0, 1, 2, 3, 4, 4, 2, 3], device=DEVICE)
    first = None
    for _ in range(TIMES):
        out = layer(x, lengths=lengths)[0]
        now = [out, *torch.autograd.grad(out.sum(), list(layer.parameters()))]
        first = first or [t.clone() for t in now]
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
