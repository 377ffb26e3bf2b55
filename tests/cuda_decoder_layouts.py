"""The decoder's CUDA kernels in the place of the native ones, emulated, in layouts of a test's choice."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastseq
from fastseq.backends import decoder_fused
from fastseq.backends.decoder_call import DecoderCall
from fastseq.cuda import decoder as host
from fastseq.cuda import devices, native
from fastseq.cuda.decoder_plan import DecoderPlan, DecoderShape, laid_out, sizes, tiles_of
from fastseq.ops.rnn_gpu import tf32_flag
from fastseq.spec import DecoderOutput

__all__ = ["BLOCKS", "drawn", "fixed", "looped_on_cuda"]

ALL = 1 << 20  # tiles
BLOCKS = {"block": (1,), "cluster": (2, 3, 4), "grid": (2, 3, 5)}


@pytest.fixture
def looped_on_cuda(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Decoders run on the emulated kernels, whatever a backend would refuse."""

    def decode(y: Any, keys: Any, state: Any, params: Any, spec: Any, *, dropout_masks: Any, need_weights: bool,
               backend: str) -> DecoderOutput:  # fmt: skip
        return decoder_fused.decoder(DecoderCall(spec, y, keys, state, params, dropout_masks, need_weights), backend)

    monkeypatch.setattr(fastseq.functional, "attention_decoder", decode)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")  # of layers above the loop
    return emulated


def _made(made: Any, x: Any, shape: DecoderShape) -> DecoderPlan:
    source = 0 if x.keys is None else x.keys.shape[1]
    kind = native.kind_of(x.y.dtype, tf32_flag("matmul"))
    there = [tiles_of(made, s, kind) for p in made.phases for s in p.segments]
    shape = replace(shape, near=tuple(min(pair) for pair in zip(shape.near, there, strict=True)))
    chosen = laid_out(made, x.y.shape[0], source, kind, devices.H200, shape)
    assert chosen is not None, sizes(made, shape, source, kind)
    return chosen


@contextmanager
def drawn(monkeypatch: pytest.MonkeyPatch, design: str, seed: int) -> Iterator[list[DecoderPlan]]:
    """Loops are laid out in `design`, otherwise at random; the list has the plans that ran."""
    draw, ran = random.Random(seed), []

    def pick(made: Any, x: Any, steps: int = 1) -> DecoderPlan:
        blocks, chunk = draw.choice(BLOCKS[design]), draw.choice((8, 16))
        attends, groups = made.attends, draw.choice((1, 2))  # with one group it takes several blocks of rows
        pieces = draw.randint(1, blocks) if attends else 1
        near = tuple(draw.choice((0, 1, 3, ALL)) for p in made.phases for _ in p.segments)
        keys, memory = (attends and draw.random() < 0.6 for _ in range(2))
        rows = chunk * draw.choice((1, 2))
        ran.append(_made(made, x, DecoderShape(design, blocks, rows, groups, chunk, pieces, near, keys, memory)))
        return ran[-1]

    with monkeypatch.context() as patch:
        patch.setattr(host, "_plan", pick)
        yield ran


@contextmanager
def fixed(
    monkeypatch: pytest.MonkeyPatch, design: str, blocks: int, pieces: int = 1, *, stays: bool = True
) -> Iterator[None]:
    """All loops in one layout of 8 rows a group; stays: with all weights, keys and memory in shared memory."""

    def pick(made: Any, x: Any, steps: int = 1) -> DecoderPlan:
        near, kept = tuple(ALL * stays for p in made.phases for _ in p.segments), made.attends and stays
        shape = DecoderShape(design, blocks, 8, 2, 8, pieces if made.attends else 1, near, kept, kept)
        return _made(made, x, shape)

    with monkeypatch.context() as patch:
        patch.setattr(host, "_plan", pick)
        yield
