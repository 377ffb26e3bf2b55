"""The peer FlashRNN (Pöppel, Beck and Hochreiter 2025; Apache-2.0), where it is installed: one head of size H.

`flashrnn.flashrnn(Wx, R, b, ...)` takes what the input's product gives, Wx [B, T, gates, heads, H], so that product is
made here, inside the call. Its LSTM and Elman network are torch's; its GRU is torch's too, with the recurrent gates in
the order n r z and four biases: b_hn, within the reset gate, then r, z and b_in.
"""

import importlib.util
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cases import LayerCase
from .problem import LayerProblem
from .programs import Program, program_of

__all__ = ["arguments", "flashrnn_program", "refuses", "unavailable"]

FUNCTIONS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "elman"}
TRITON_H = 64  # units of a head that its Triton kernels hold


def unavailable(backend: str) -> str | None:
    """Why it is not here: the package, or what its backend compiles with."""
    if importlib.util.find_spec("flashrnn") is None:
        return "not installed; run: pip install flashrnn"
    if backend != "triton_fused" and shutil.which("nvcc") is None:
        return f"its {backend} kernels are compiled at the first call, and there is no nvcc"
    return None


def refuses(case: LayerCase, backend: str) -> str | None:
    """Why it cannot run a case."""
    if case.device != "cuda":
        return "its kernels are for GPUs"
    if case.is_cell or case.rows != "full" or case.layers > 1 or case.bidirectional:
        return "one layer of one direction and rows of one length only"
    if case.cell not in FUNCTIONS or case.dtype not in ("float32", "bfloat16", "float16"):
        return f"it has no {case.cell} in {case.dtype}"
    if backend == "triton_fused" and (case.cell != "lstm" or case.H > TRITON_H):
        return f"its Triton kernels are an LSTM's of at most {TRITON_H} units"
    if backend == "cuda_fused" and case.cell == "gru":
        return "its fused kernels have no GRU"
    return None


def arguments(
    cell: str,  # of FUNCTIONS
    x: Tensor,  # [T, B, I]
    weights: dict[str, Tensor],  # a layer's of torch.nn
) -> tuple[Tensor, Tensor, Tensor]:
    """Wx [B, T, gates, 1, H], R [gates, 1, H, H] and b [gates, 1, H] (GRU: four)."""
    w, r, b_ih, b_hh = (weights[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = r.shape[1]
    wx = linear(x.transpose(0, 1), w).unflatten(-1, (-1, 1, hidden))
    recurrent, of_x, of_h = (t.unflatten(0, (-1, 1, hidden)) for t in (r, b_ih, b_hh))
    if cell != "gru":
        return wx, recurrent, of_x + of_h
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.unbind(0), of_h.unbind(0)
    r_r, r_z, r_n = recurrent.unbind(0)
    return wx, torch.stack([r_n, r_r, r_z]), torch.stack([h_n, x_r + h_r, x_z + h_z, x_n])


def flashrnn_program(backend: str) -> Callable[[LayerProblem], Program]:
    """On one of its backends: cuda_fused, cuda, triton_fused; its own loop in PyTorch, vanilla, runs on CPUs too."""

    def build(problem: LayerProblem) -> Program:
        from flashrnn import flashrnn

        case, train = problem.case, problem.case.mode == "train"
        x = problem.x.detach().requires_grad_(train)
        hx = [h.detach().requires_grad_(train) for h in problem.hx]
        weights = {n: w.detach().to(case.device).requires_grad_(train) for n, w in problem.weights.items()}

        def forward() -> list[Tensor]:
            first = torch.stack([h.transpose(0, 1)[:, :, None] for h in hx]) if hx else None  # [S, B, 1, 1, H]
            given = arguments(case.cell, x, weights)
            states, last = flashrnn(
                *given, states=first, function=FUNCTIONS[case.cell], backend=backend, dtype=case.dtype
            )
            return [states[0, :, :, 0].transpose(0, 1), *(s[:, :, 0].transpose(0, 1) for s in last)]

        leaves = {"x": x} | {f"hx{k}": h for k, h in enumerate(hx)} | weights
        return program_of(forward, leaves, problem.grads, train, f"flashrnn {backend}")

    return build
