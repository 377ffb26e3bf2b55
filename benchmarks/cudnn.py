"""What PyTorch asks of cuDNN for a recurrent layer, by the rules of its aten/src/ATen/native/cudnn/RNN.cpp."""

import torch

from .cases import LayerCase

__all__ = ["algorithm", "tf32"]


def algorithm(case: LayerCase) -> str | None:
    """The recurrence's algorithm; None on other devices than GPUs and for cells, which cuDNN has not."""
    if case.device != "cuda" or case.is_cell:
        return None
    half = case.dtype == "float16"
    return f"cuDNN {_requested(case, half)}"


def _requested(case: LayerCase, half: bool) -> str:
    if case.rows != "full":
        return "STANDARD"  # packed
    small = range(1, 129 if case.mode == "train" else 193)
    if case.dtype != "float64" and case.H in small:
        return "PERSIST_STATIC_SMALL_H"
    whole = case.H % 128 == 0 and case.I % 128 == 0 and case.B % 8 == 0
    fits = case.H <= 1024 and case.B <= 128 and case.layers == 1 and not case.bidirectional
    return "PERSIST_STATIC" if half and case.cell == "lstm" and whole and fits else "STANDARD"


def tf32(case: LayerCase) -> bool:
    """Whether products of fp32 may be made in TF32, which for layers torch allows by default, for cells not."""
    if case.device != "cuda" or case.dtype != "float32":
        return False
    return bool(torch.backends.cuda.matmul.allow_tf32 if case.is_cell else torch.backends.cudnn.allow_tf32)
