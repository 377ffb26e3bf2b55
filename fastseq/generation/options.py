"""What a search is asked for, checked before any work."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..spec import one_of

__all__ = ["Options", "forced_prefix"]


@dataclass(frozen=True)
class Options:
    """The numbers of `generate`, which says what each is."""

    batch_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 1.0
    length_norm: str = "len"
    coverage_penalty: float = 0.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    return_weights: bool = False

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1, "bos_id": 0, "eos_id": 0, "pad_id": 0, "max_new_tokens": 1, "min_new_tokens": 0,
            "num_beams": 1, "top_k": 0, "no_repeat_ngram_size": 0, "num_return_sequences": 1,
        }  # fmt: skip
        for name, limit in least.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), limit))
        for name in ("temperature", "top_p", "length_penalty", "coverage_penalty"):
            _need_number(name, getattr(self, name))
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}; lower it"
            )
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature}; it is above 0. For the likeliest token: do_sample=False")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}; it is a probability above 0, 1 keeps all tokens")
        if self.coverage_penalty < 0:
            raise InputError(f"coverage_penalty={self.coverage_penalty}; it is at least 0 (Wu et al. 2016, eq. 14)")
        one_of("length_norm", self.length_norm, ("len", "wu"))
        for name in ("do_sample", "return_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f"early_stopping={self.early_stopping!r}; expected True, False or 'never'")
        self._refuse_contradictions()
        for length in (1, self.max_new_tokens):
            self._check_norm(length)

    def norm(self, length: int) -> float:
        """What the log-probability of so many tokens is divided by: length^alpha, or Wu et al. 2016, eq. 14's
        ((5 + length) / 6)^alpha; alpha is the length_penalty.
        """
        base = length if self.length_norm == "len" else (5 + length) / 6
        return float(base**self.length_penalty)

    def _check_norm(self, length: int) -> None:
        try:
            usable = 1e-30 < self.norm(length) < 1e30  # scores are fp32
        except OverflowError:
            usable = False
        if not usable:
            raise InputError(
                f"length_penalty={self.length_penalty} is too far from 0 for {length} tokens; 0 to 2 is usual"
            )

    def _refuse_contradictions(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise InputError(f"do_sample=True with num_beams={self.num_beams}; sample with num_beams=1, or search")
        if self.do_sample and self.coverage_penalty:
            raise InputError(
                f"coverage_penalty={self.coverage_penalty} with do_sample=True, which ranks nothing; drop it"
            )
        if not self.do_sample:
            for name, idle in (("temperature", 1), ("top_k", 0), ("top_p", 1)):
                if getattr(self, name) != idle:
                    raise InputError(f"{name}={getattr(self, name)} without do_sample=True has no effect; drop one")
            if self.num_return_sequences > self.num_beams:
                raise InputError(
                    f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}; raise"
                    " num_beams, or pass do_sample=True"
                )
        if self.num_beams == 1 and self.early_stopping is not False:
            raise InputError(f"early_stopping={self.early_stopping!r} with num_beams=1, which stops at eos; drop it")

    @property
    def copies(self) -> int:
        """Rows of the step for each of the batch: N / B."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    @property
    def needs_weights(self) -> bool:
        """Whether the step's weights are looked at."""
        return self.return_weights or self.coverage_penalty > 0

    def check_vocabulary(self, size: int) -> None:
        for name in ("bos_id", "eos_id", "pad_id"):
            if getattr(self, name) >= size:
                raise InputError(
                    f"{name}={getattr(self, name)}, but step gives logits of {size} tokens: 0 to {size - 1}"
                )


def forced_prefix(ids: Any, options: Options, device: torch.device) -> Tensor:
    """[B, P] int64, from bos on: `decoder_input_ids`, with bos put before them unless they start with it."""
    bos = torch.full((options.batch_size, 1), options.bos_id, dtype=torch.int64, device=device)
    if ids is None:
        return bos
    if not isinstance(ids, Tensor):
        if not isinstance(ids, Sequence):
            raise TypeError(f"decoder_input_ids must be an integer tensor [B, P], got {type(ids).__name__}")
        lengths = {len(row) if isinstance(row, Sequence) else -1 for row in ids}
        if len(lengths) > 1 or lengths & {-1, 0}:
            raise InputError("decoder_input_ids must have rows of one length, at least 1: [B, P]; they are not padded")
        ids = torch.tensor(ids) if ids else torch.empty(0, 0, dtype=torch.int64)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"decoder_input_ids must hold integers, got {ids.dtype}; convert with .long()")
    if ids.dim() != 2 or ids.shape[0] != options.batch_size or ids.shape[1] == 0:
        raise InputError(
            f"decoder_input_ids has shape {tuple(ids.shape)}; expected [B={options.batch_size}, P], P at least 1"
        )
    ids = ids.to(device, torch.int64)
    if int(ids.min()) < 0:
        raise InputError(f"decoder_input_ids holds {int(ids.min())}; ids are at least 0")
    begin = int((ids[:, 0] == options.bos_id).sum())
    if 0 < begin < len(ids):
        raise InputError(
            f"decoder_input_ids begins with bos_id={options.bos_id} in {begin} of {len(ids)} rows; in all or in none"
        )
    return ids if begin else torch.cat((bos, ids), 1)


def _integer(name: str, value: Any, least: int) -> int:
    """NumPy's integers too."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise InputError(f"{name}={value}; it is at least {least}")
    return int(value)


def _need_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise InputError(f"{name}={value}; it is finite")
