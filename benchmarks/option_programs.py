"""An option's case made ready to run: the truth is fastseq's reference in float64, mask for mask."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.modules.rnn import lstm_call

from .option_cases import OPTIONS, OptionCase
from .problem import DTYPES, LayerProblem, flatten, module_of, uniform
from .programs import NotRunnable, Program, Results, chosen_backend, module_program, predicted

__all__ = ["OptionProblem", "built", "exact_program", "fastseq_program", "program"]

SEED = 2  # of the masks of a check; what is timed draws others in each call
GAIN = 0.5  # of layer normalisation: from 1, its first value, 50 steps of an LSTM make a rounding grow a hundredfold
RESETS = 0.05  # of a row's steps


@dataclass(frozen=True)
class OptionProblem(LayerProblem):
    """A layer's, with the option's weights; every cell state gets a gradient of its own."""

    case: OptionCase
    resets: Tensor | None = None  # [T, B], bool

    @classmethod
    def draw(cls, case: OptionCase, seed: int = 0) -> "OptionProblem":  # type: ignore[override]
        g, plain = torch.Generator().manual_seed(seed + 1), LayerProblem.draw(case, seed)
        ours = {f.name: getattr(plain, f.name) for f in fields(plain)}
        module = module_of(fastseq, replace(case, dtype="float32"), **OPTIONS[case.option])
        drawn = uniform(module, case.H, DTYPES[case.dtype], g)
        added = {n: GAIN + w if n.startswith("norm_") and "bias" not in n else w for n, w in drawn.items()}
        ours["weights"] = added | plain.weights
        shape = (case.T, case.B)
        if case.option == "cell_states":
            ours["grads"] += (torch.randn(*shape, case.H, generator=g).to(case.device, DTYPES[case.dtype]),)
        resets = torch.rand(shape, generator=g).to(case.device) < RESETS if case.option == "resets" else None
        return cls(**ours, resets=resets)


def built(problem: OptionProblem, backend: str) -> nn.RNNBase:
    """The module with its weights. Raises NotRunnable where the backend never runs the option."""
    try:
        module: Any = module_of(fastseq, problem.case, backend=backend, **OPTIONS[problem.case.option])
    except fastseq.InputError as error:
        raise NotRunnable(str(error)) from error
    module.load_state_dict(problem.weights)
    return module.to(problem.case.device).train()


def exact_program(problem: OptionProblem) -> Program:
    return fastseq_program(problem, "reference")


def fastseq_program(problem: OptionProblem, backend: str) -> Program:
    """fastseq with `backend=` forced, or "auto"; the program says which one runs."""
    module, x, resets = built(problem, backend), problem.x, problem.resets
    states = problem.case.option == "cell_states"
    with torch.set_grad_enabled(problem.case.mode == "train"), fastseq.use_backend(backend):
        call: Any = module
        if states:
            call = lstm_call(module, x, None)  # type: ignore[arg-type]
            call.states = True
        chosen = chosen_backend(fastseq.explain(call, None if states else x, resets=resets), backend)

    def forward(x: Tensor) -> list[Tensor]:
        if states:
            out, last, cells = module.forward_states(x)  # type: ignore[operator]
            return [out, cells, *last]
        return flatten(module(x) if resets is None else module(x, resets=resets))

    ready = program(module, problem, forward, chosen)
    return replace(ready, note=predicted(problem.case)) if chosen == "cuda" else ready


def program(
    module: nn.RNNBase, problem: OptionProblem, forward: Callable[[Tensor], list[Tensor]], backend: str
) -> Program:
    """`forward` of the input; its results are those of one seed."""
    ready = module_program(module, problem, lambda _: lambda module, x, hx: forward(x), backend)

    def results() -> Results:
        torch.manual_seed(SEED)
        return ready.results()

    return replace(ready, results=results)
