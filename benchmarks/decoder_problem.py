"""The tensors of a decoder's or an attention's case, the same for every peer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .decoder_cases import AttentionCase, Lengths, TeacherForced
from .decoder_loop import BahdanauLoop, LuongLoop
from .problem import DTYPES, uniform

__all__ = ["AttentionProblem", "Batch", "DecoderProblem", "loop_of"]

LOOPS: dict[str, type[nn.Module]] = {"bahdanau": BahdanauLoop, "luong": LuongLoop}


@dataclass(frozen=True)
class Batch:
    """What one call of a decoder reads, and the gradient of its output, 0 behind a target's end."""

    y: Tensor  # [B, T, H]
    memory: Tensor  # [B, S, H]
    mask: Tensor  # [B, S], True = attend
    grad: Tensor  # [B, T, H]


@dataclass(frozen=True)
class DecoderProblem:
    """A case of one batch, or of several that the same weights decode in turn."""

    case: TeacherForced
    weights: dict[str, Tensor]  # the state_dict of its loop
    batches: tuple[Batch, ...]

    @classmethod
    def draw(cls, case: TeacherForced, seed: int = 0) -> "DecoderProblem":
        """The same values for every dtype of the same shapes, rounded to it."""
        g, dtype = torch.Generator().manual_seed(seed), DTYPES[case.dtype]
        weights = {name: w.to(case.device) for name, w in uniform(loop_of(case), case.H, dtype, g).items()}

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(case.device, dtype)

        def batch(lengths: Lengths) -> Batch:
            mask, there = (_until(of).to(case.device) for of in lengths)
            y, grad = (normal(*there.shape, case.H) for _ in range(2))
            return Batch(y, normal(*mask.shape, case.H), mask, grad * there[:, :, None])

        return cls(case, weights, tuple(map(batch, case.batches)))

    def in_float64(self) -> "DecoderProblem":
        """The same values, to be computed without rounding."""
        case = replace(self.case, dtype="float64")  # type: ignore[type-var]  # every concrete one is a dataclass
        batches = [Batch(b.y.double(), b.memory.double(), b.mask, b.grad.double()) for b in self.batches]
        return DecoderProblem(case, {n: w.double() for n, w in self.weights.items()}, tuple(batches))


@dataclass(frozen=True)
class AttentionProblem:
    """Queries, the keys and the memory they meet, the parameters of an additive score, the gradient of the contexts."""

    case: AttentionCase
    weights: dict[str, Tensor]  # w_query [H, H], v [H]; none for a dot score
    query: Tensor  # [B, T, H]
    keys: Tensor  # [B, S, H]
    memory: Tensor  # [B, S, H]
    mask: Tensor  # [B, S]
    grad: Tensor  # [B, T, H]

    @classmethod
    def draw(cls, case: AttentionCase, seed: int = 0) -> "AttentionProblem":
        """As for DecoderProblem; dot scores are scaled to about 1, lest one position take all the weight."""
        g, dtype, H = torch.Generator().manual_seed(seed), DTYPES[case.dtype], case.H

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(case.device, dtype)

        additive = case.score == "additive"
        weights = {"w_query": normal(H, H, scale=H**-0.5), "v": normal(H, scale=H**-0.5)} if additive else {}
        mask = _until(case.lengths.source).to(case.device)
        query, grad = (normal(case.B, case.T, H) for _ in range(2))
        keys = normal(*mask.shape, H, scale=1.0 if additive else H**-0.5)
        return cls(case, weights, query, keys, normal(*mask.shape, H), mask, grad)

    def in_float64(self) -> "AttentionProblem":
        """The same values, to be computed without rounding."""
        case, weights = replace(self.case, dtype="float64"), {n: w.double() for n, w in self.weights.items()}
        query, keys, memory, grad = (t.double() for t in (self.query, self.keys, self.memory, self.grad))
        return AttentionProblem(case, weights, query, keys, memory, self.mask, grad)


def loop_of(case: TeacherForced) -> nn.Module:
    """The loop that makes the case's call, in its dtype."""
    return LOOPS[case.attention](case.cell, case.H, dtype=DTYPES[case.dtype])


def _until(lengths: tuple[int, ...]) -> Tensor:
    """[rows, most], True before a row's end."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
