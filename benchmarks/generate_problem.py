"""The tensors of a search's case, the same for every peer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .generate_cases import GenerateCase
from .generate_loop import EOS, BahdanauSearch, LuongSearch, SearchLoop
from .problem import DTYPES, uniform

__all__ = ["GenerateProblem", "loop_of"]

SEARCHES: dict[str, type[SearchLoop]] = {"bahdanau": BahdanauSearch, "luong": LuongSearch}
SHARPNESS = 24.0  # of the output's weights: as torch.nn draws them, all tokens are alike, and rounding would choose
NEVER = -1e4  # EOS's bias: no row ends early, at the cost of nothing, and no contender knows it


@dataclass(frozen=True)
class GenerateProblem:
    """The weights of a loop, and the memory that it reads."""

    case: GenerateCase
    weights: dict[str, Tensor]  # the loop's state_dict
    memory: Tensor  # [B, S, H]
    mask: Tensor  # [B, S], True: attended to

    @classmethod
    def draw(cls, case: GenerateCase, seed: int = 0) -> "GenerateProblem":
        """As torch.nn draws weights, but for the output's; the same values for every dtype, rounded to it."""
        g, dtype = torch.Generator().manual_seed(seed), DTYPES[case.dtype]
        weights = uniform(loop_of(case), case.H, dtype, g)
        weights["embedding.weight"] = torch.randn(case.V, case.H, generator=g).to(dtype)
        weights["output.weight"] *= SHARPNESS
        weights["output.bias"][EOS] = NEVER
        weights = {name: w.to(case.device) for name, w in weights.items()}
        memory = torch.randn(case.B, case.S, case.H, generator=g).to(case.device, dtype)
        return cls(case, weights, memory, torch.ones(case.B, case.S, dtype=torch.bool, device=case.device))

    def in_float64(self) -> "GenerateProblem":
        """The same values, to be computed without rounding."""
        weights = {name: w.double() for name, w in self.weights.items()}
        return GenerateProblem(replace(self.case, dtype="float64"), weights, self.memory.double(), self.mask)


def loop_of(case: GenerateCase) -> SearchLoop:
    """The loop that makes the case's search, in its dtype."""
    return SEARCHES[case.attention](case.cell, case.H, case.V, DTYPES[case.dtype])
