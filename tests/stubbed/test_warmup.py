"""fastseq.warmup leaves nothing to compile, at other B, T and S."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from tests.kinds import KINDS, Kind, Sizes
from tests.stub_driver import Stub

SIZES = Sizes(T=5, I=32, H=48, D=32, most=300)  # of an attention's kernels those for more than a few queries


class Called(nn.Module):
    """A kind's module, called as the kind is."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.module, self.kind = kind.module, kind

    def forward(self, **inputs: Tensor) -> Any:
        return self.kind.call(self.module, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_left_to_compile(name: str, gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastseq.warmup"), "_gpus", lambda tensors: [])  # no random state there
    kind = Kind.of(name, SIZES)
    gpus.forget()
    fastseq.warmup(Called(kind), backward=True, **kind.inputs)
    compiled = gpus.compiled
    assert compiled
    kind.inputs = Kind.of(name, replace(SIZES, T=9, B=18, S=21)).inputs
    kind.step()
    with torch.no_grad():
        kind.module.eval()
        kind.results()
    assert gpus.compiled == compiled
