"""Where the tests of this folder run: on CUDA tensors the Triton backend, or the one that FASTSEQ_GPU_BACKEND names.

FASTSEQ_REHEARSE=1 has them run on the CPU, to see that the tests themselves are right: on the reference, or with
TRITON_INTERPRET=1 on the kernels in Triton's interpreter; on those in CUDA C++, emulated, where that backend is named.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import dispatch
from fastseq.backends import reference
from fastseq.backends.call import RnnCall
from fastseq.backends.decoder_call import mapped
from fastseq.ops.extras import NONE
from fastseq.ops.rnn import rnn_layer
from fastseq.ops.rnn_norm import rnn_norm_layer
from tests.decoder_oracle import Problem, Step, fast
from tests.oracle import Results

__all__ = ["BACKEND", "DEVICE", "DTYPES", "REHEARSES", "layer", "noisy_layer", "step", "there"]

REHEARSES = os.environ.get("FASTSEQ_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSES else "cuda"
BACKEND = (
    "reference"
    if REHEARSES and os.environ.get("TRITON_INTERPRET") != "1"
    else os.environ.get("FASTSEQ_GPU_BACKEND", "triton")
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def there(tree: Any) -> Any:
    """The tensors of nested tuples on the device under test; gradients come back through the copy."""
    return mapped(lambda t: t.to(DEVICE) if isinstance(t, Tensor) else t, tree)


def layer(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], lengths: Tensor | None,
    resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, bidirectional: bool,
    norms: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As `oracle.plain`, by the backend under test; results are on the CPU, where the oracle is."""
    biased = len(weights) == (8 if bidirectional else 4)
    call = RnnCall(
        cell, *there((x, h0, c0)), list(there(tuple(weights))), there(lengths), batch_sizes, biased,
        bidirectional=bidirectional, batch_first=batch_first, resets=there(resets),
        norms=None if norms is None else list(there(tuple(norms))),
    )  # fmt: skip
    assert dispatch.obstacle(BACKEND, call) is None
    out, state = dispatch.load(BACKEND).rnn(call)
    return out.cpu(), state[0].cpu(), state[1].cpu() if cell == "lstm" else None


def noisy_layer(
    cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *options: Any, norms: Sequence[Tensor] = ()
) -> Any:
    """As `layer`, under given masks: a module draws its own."""
    lengths, resets, batch_sizes, batch_first, bidirectional, *extras = options
    masks = there(extras[0]) if extras else NONE
    given = (cell, *there((x, h0, c0, tuple(weights), lengths, resets)), batch_sizes, batch_first, bidirectional, masks)
    more: dict[str, Any] = {"norms": there(tuple(norms))} if norms else {}
    if BACKEND == "reference":
        results = reference.layer(*given, **more)
    else:
        results = (rnn_norm_layer if norms else rnn_layer)(*given, **more, on=BACKEND)
    return tuple(None if t is None else t.cpu() for t in results)


def step(problem: Problem, tensors: Mapping[str, Tensor]) -> Results:
    """As `decoder_oracle.plain`: an attention or a decoder by the backend under test."""
    moved = Problem(problem.case, {}, {}, there(problem.mask), there(problem.masks))
    found = fast(BACKEND)(moved, {name: t.to(DEVICE) for name, t in tensors.items()})
    return {name: t.cpu() for name, t in found.items()}


_: Step = step
