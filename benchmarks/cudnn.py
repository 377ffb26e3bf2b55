"""Which library runs a recurrent layer of PyTorch's, by the rules of its aten/src/ATen/native/{,cudnn/}RNN.cpp."""

import torch

from .cases import LayerCase

__all__ = ["algorithm", "has_half", "onednn", "tf32"]


def algorithm(case: LayerCase) -> str | None:
    """The recurrence's algorithm; None on other devices than GPUs and for cells, which cuDNN has not."""
    if case.device != "cuda" or case.is_cell:
        return None
    half = case.dtype == "float16"
    return f"cuDNN {_requested(case, half)}"


def onednn(case: LayerCase) -> str | None:
    """Its name, where it runs the case: an LSTM of padded rows on the CPU; of packed data, the case's or its peer's for
    lengths, it has none.
    """
    if case.device != "cpu" or case.op != "lstm" or case.rows != "full" or case.dtype == "float64":
        return None
    return "oneDNN" if torch.backends.mkldnn.is_available() and (case.dtype == "float32" or has_half()) else None


def has_half() -> bool:
    """Whether PyTorch's oneDNN takes bf16 on this CPU: not without AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
