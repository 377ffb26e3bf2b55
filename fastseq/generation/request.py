"""What is asked of a search, whole: its numbers, forced tokens, processors, and who is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .options import Options, forced_prefix
from .scores import LogitsProcessor

__all__ = ["Request", "Stream"]

Stream = Callable[[Tensor], None]  # of the tokens [N] of a step


@dataclass(frozen=True)
class Request:
    """Checked before any work. Fields as the arguments of `generate`."""

    options: Options
    prefix: Tensor  # [B, P] int64 from bos on
    largest: int  # of the forced tokens
    processors: list[LogitsProcessor]
    streamer: Any
    generator: torch.Generator | None

    @classmethod
    def of(
        cls,
        *,
        device: torch.device,
        decoder_input_ids: Any = None,
        logits_processor: Any = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **numbers: Any,
    ) -> "Request":
        """Of the arguments of `generate`; InputError or TypeError, naming the option."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "generate within the capture of a CUDA graph: how many steps it takes is read from the GPU, which a "
                "capture does not allow; call it outside (a search makes a graph of its own), or capture "
                "Decoder.step or a call with the target given"
            )
        options = Options(**numbers)
        processors, stream = _processors(logits_processor), _stream(streamer)
        if stream is not None and options.num_beams > 1:
            raise InputError(
                f"streamer with num_beams={options.num_beams}: a beam's tokens may still change; use num_beams=1"
            )
        prefix = forced_prefix(decoder_input_ids, options, device)
        largest = 0 if decoder_input_ids is None else int(prefix.max())
        return cls(options, prefix, largest, processors, streamer, generator)

    def check_vocabulary(self, size: int) -> None:
        """InputError for ids that a vocabulary of this size lacks."""
        self.options.check_vocabulary(size)
        if self.largest >= size:
            raise InputError(f"decoder_input_ids holds {self.largest}, but step gives logits of {size} tokens")

    @property
    def rows(self) -> Tensor:
        """The prefix of each of the N = B * k rows [N, P]."""
        return self.prefix.repeat_interleave(self.options.copies, 0)

    @property
    def stream(self) -> Stream | None:
        """What takes each step's tokens."""
        return _stream(self.streamer)


def _processors(given: Any) -> list[LogitsProcessor]:
    if given is None:
        return []
    alone = callable(given) and not isinstance(given, list)  # transformers' list of them is both
    processors = [given] if alone or not isinstance(given, Sequence) else list(given)
    for processor in processors:
        if not callable(processor):
            raise TypeError(
                f"logits_processor must be callable, (ids, scores) -> scores, got {type(processor).__name__}"
            )
    return processors


def _stream(streamer: Any) -> Stream | None:
    """What takes a step's tokens."""
    if hasattr(streamer, "put") and hasattr(streamer, "end"):
        return lambda tokens: streamer.put(tokens.cpu())
    if streamer is not None and (hasattr(streamer, "put") or not callable(streamer)):
        raise TypeError(f"streamer must be callable or have put and end, got {type(streamer).__name__}")
    return streamer
