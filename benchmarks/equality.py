"""No contender is timed before it has computed what PyTorch computes in float64: torch.nn, or its operators."""

import time

import torch

from .cases import Case, LayerCase
from .cudnn import tf32
from .kinds import exact_program
from .problem import Problem
from .programs import Program, Results

__all__ = ["Unequal", "check", "precision", "truth_of"]

# Of a result's largest value. This tells a wrong computation from a right one; the tests hold kernels to rounding.
TOLERANCE = {"float32": 1e-4, "tf32": 2**-6, "bfloat16": 2**-4, "float16": 2**-7, "autocast": 2**-4}


class Unequal(AssertionError):
    """A contender's result is not the truth's."""


def truth_of(problem: Problem) -> Results:
    """Outputs and, for training, every gradient, in float64."""
    return _results(exact_program(problem.in_float64()))


def precision(case: Case) -> str:
    """A key of TOLERANCE: the case's dtype, or TF32 where torch's flags allow that for it."""
    return "tf32" if isinstance(case, LayerCase) and tf32(case) else case.dtype


def check(program: Program, truth: Results, dtype: str) -> float:
    """Raise Unequal unless every result of `truth` is there, finite and equal. Seconds that computing them took."""
    begin = time.perf_counter()
    got = _results(program)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if got.keys() != truth.keys():
        raise Unequal(f"{program.backend} gives {sorted(got)}, expected {sorted(truth)}")
    for name, exact in truth.items():
        if got[name].shape != exact.shape:
            raise Unequal(f"{program.backend}: {name} is {tuple(got[name].shape)}, expected {tuple(exact.shape)}")
        tolerance = TOLERANCE[dtype] if exact.is_floating_point() else 0.0  # tokens are the same or not
        error, allowed = (got[name].double() - exact).abs().max().item(), tolerance * exact.abs().max().item()
        if not (error <= allowed):  # so that NaN fails
            raise Unequal(f"{program.backend}: {name} errs by {error:.3g}, allowed {allowed:.3g}")
    return seconds


def _results(program: Program) -> Results:
    with torch.set_grad_enabled(program.grad):
        return program.results()
