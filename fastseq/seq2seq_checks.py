"""What is wrong with the token ids and sources of a sequence-to-sequence model."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .checks import checked_lengths, need_tensor
from .errors import InputError
from .modules.encoder import Encoder
from .spec import Memory

__all__ = ["check_ids", "check_kind", "check_range", "check_source", "rows_of"]


def check_source(src: Any, lengths: Any, encoder: nn.Module) -> None:
    """InputError or TypeError for what fastseq's Encoder cannot read; a warning where it would read padding."""
    check_ids(src, encoder)
    if not isinstance(encoder, Encoder) or torch.compiler.is_compiling():
        return
    if src.dim() < 2:
        return  # the encoder says it
    if lengths is not None:
        checked_lengths(lengths, src, src.shape[0], src.shape[1], "src_lengths")
        return
    padding = getattr(encoder.embedding, "padding_idx", None)
    if padding is not None and src.device.type == "cpu" and bool((src[:, -1] == padding).any()):
        warnings.warn(
            f"src ends with the encoder's padding_idx={padding} and there are no src_lengths: the padding is read and"
            " attended to; pass src_lengths",
            stacklevel=5,  # the caller of loss
        )


def check_kind(name: str, ids: Any) -> None:
    """TypeError or InputError unless `ids` is an integer tensor [B, T]."""
    if need_tensor(name, ids).dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise InputError(f"{name} has shape {tuple(ids.shape)}; expected [B, T], both at least 1")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold token ids, int64 or int32, got {ids.dtype}; convert with .long()")


def check_ids(src: Any, encoder: nn.Module) -> None:
    """Raise InputError or TypeError for an empty batch, and for what an encoder with nn.Embedding cannot look up."""
    embedding = getattr(encoder, "embedding", None)
    looks_up = isinstance(encoder, Encoder) and isinstance(embedding, nn.Embedding)
    if looks_up:
        need_tensor("src", src, "pass token ids [B, S]")
    if not isinstance(src, Tensor):
        return
    if src.dim() == 0 or src.shape[0] == 0:
        raise InputError(f"src has shape {tuple(src.shape)}; expected a batch of at least one row: [B, S]")
    if not looks_up or not isinstance(embedding, nn.Embedding):
        return
    if src.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"src must hold token ids, int64 or int32, got {src.dtype}; convert with .long()")
    if src.dim() != 2:
        raise InputError(f"src has shape {tuple(src.shape)}; expected token ids [B, S]")
    check_range("src", src, embedding.num_embeddings, "the rows of the encoder's embedding")


def check_range(name: str, ids: Tensor, size: int, what: str) -> None:
    """InputError for ids that are none of `size`; on other devices than the CPU the host does not wait for them."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    least, most = (int(t) for t in ids.aminmax())
    if least < 0 or most >= size:
        raise InputError(f"{name} holds {least if least < 0 else most}; ids are 0 to {size - 1}, {what}")


def rows_of(of: Tensor | Memory) -> int:
    """B of a source or of a memory."""
    if isinstance(of, Tensor):
        return of.shape[0] if of.dim() else 0
    leaf = of.out if of.out is not None else None if of.state is None else of.state[0][0]
    if leaf is None:
        raise InputError("the encoder's memory has neither out nor state; one of them tells the batch")
    return leaf.shape[0]
