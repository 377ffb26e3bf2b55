"""The peer `cells`: a layer by torch.nn's cells, step by step, as one writes it who needs what no layer has."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from .cases import Case, LayerCase
from .graphs import graphed
from .option_cases import OptionCase
from .option_programs import OptionProblem, built
from .option_programs import program as option_program
from .problem import LayerProblem, module_of
from .programs import Program, compiled, lengths_call, module_program

__all__ = ["cells_program", "compiled_cells_program", "graphed_cells_program", "normalised", "refuses"]

State = tuple[Tensor, ...]  # (h,) | (h, c)


def refuses(case: Case) -> str | None:
    """Why a case is not worth a loop, or has none."""
    if isinstance(case, OptionCase):
        return None if case.option == "layer_norm" else "of the options, layer normalisation alone"
    if isinstance(case, LayerCase) and (case.is_cell or case.rows == "packed"):
        return "a single cell is torch.nn's" if case.is_cell else "padded rows only"
    return None


def cells_program(problem: LayerProblem) -> Program:
    """The loop, eagerly; where the layer normalises, with torch.nn.functional.layer_norm."""
    if isinstance(problem, OptionProblem):
        module = built(problem, "auto")
        return option_program(module, problem, lambda x: normalised(module, x), "cells")
    loop = _loop(problem)
    return module_program(loop, problem, lengths_call, "cells", _weights(loop))


def compiled_cells_program(problem: LayerProblem) -> Program:
    """The loop under torch.compile, all its steps in one graph."""
    loop = _loop(problem)
    unrolled = torch.compile(loop, dynamic=False)
    return compiled(module_program(unrolled, problem, lengths_call, "cells.compile", _weights(loop)))


def graphed_cells_program(problem: LayerProblem) -> Program:
    """The loop captured in a CUDA graph."""
    return graphed(cells_program(problem))


class Loop(nn.Module):
    """torch.nn.LSTM, GRU or RNN by its cells, named l0, l0_reverse, ..., as the layer's weights end."""

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.ends, width = ("", "_reverse") if case.bidirectional else ("",), case.I
        for layer in range(case.layers):
            for end in self.ends:
                self.add_module(f"l{layer}{end}", module_of(nn, replace(case, op=f"{case.cell}_cell", I=width)))
            width = case.H * len(self.ends)

    def forward(
        self,
        x: Tensor,  # [T, B, I]
        hx: Tensor | State | None = None,  # [L*D, B, H] each
        lengths: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, State]:
        """As the layer's: out [T, B, D*H], 0 behind a row's length, and the last states."""
        cells: list[nn.RNNCellBase] = list(self.children())  # type: ignore[arg-type]
        alive = None if lengths is None else (torch.arange(len(x), device=x.device)[:, None] < lengths)[..., None]
        first, last = _states(cells, x, hx), []
        for layer in range(0, len(cells), len(self.ends)):
            outs = []
            for k, end in enumerate(self.ends, layer):
                out, state = _run(cells[k], x, first[k], alive, -1 if end else 1)
                outs.append(out)
                last.append(state)
            x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _run(
    cell: nn.RNNCellBase,
    x: Tensor,  # [T, B, I]
    state: State,  # [B, H] each
    alive: Tensor | None,  # [T, B, 1], bool
    way: int,  # 1, or -1 from the last step to the first
) -> tuple[Tensor, State]:
    """out [T, B, H] and the state after the last step; a row that has ended keeps its own."""
    outs = []
    alone = len(state) == 1
    live = [None] * len(x) if alive is None else alive.unbind(0)
    for now, here in list(zip(x.unbind(0), live, strict=True))[::way]:
        new = (cell(now, state[0]),) if alone else cell(now, state)
        if here is not None:
            new = tuple(torch.where(here, after, before) for after, before in zip(new, state, strict=True))
        state = new
        outs.append(state[0] if here is None else state[0] * here)
    return torch.stack(outs[::way]), state


def _states(cells: Sequence[nn.RNNCellBase], x: Tensor, hx: Tensor | State | None) -> list[State]:
    """The first state of each cell."""
    if hx is not None:
        parts = (hx,) if isinstance(hx, Tensor) else hx
        return list(zip(*(part.unbind(0) for part in parts), strict=True))
    zeros = x.new_zeros(x.shape[1], cells[0].hidden_size)
    return [(zeros, zeros) if isinstance(cells[0], nn.LSTMCell) else (zeros,)] * len(cells)


def _loop(problem: LayerProblem) -> Loop:
    loop = Loop(problem.case)
    parts = {name: name.split("_", 2) for name in problem.weights}  # weight_ih_l0_reverse -> l0_reverse.weight_ih
    loop.load_state_dict({f"{end}.{kind}_{of}": problem.weights[name] for name, (kind, of, end) in parts.items()})
    return loop.to(problem.case.device).train(problem.case.mode == "train")


def _weights(loop: Loop) -> dict[str, Tensor]:
    """By the layer's names."""
    return {f"{part}_{end}": w for name, w in loop.named_parameters() for end, part in [name.split(".")]}


def normalised(module: nn.RNNBase, x: Tensor) -> list[Tensor]:
    """out [T, B, H], h and c of a layer-normalised `module`, of one layer: the products of x at once, then steps."""
    p, lstm = dict(module.named_parameters()), module.mode == "LSTM"
    first = (x.new_zeros(x.shape[1], module.hidden_size),) * (2 if lstm else 1)
    states = list((_lstm_steps if lstm else _gru_steps)(linear(x, p["weight_ih_l0"]), first, p))
    return [torch.stack([h for h, *_ in states]), *(part[None] for part in states[-1])]


def _lstm_steps(ax: Tensor, state: State, p: Mapping[str, Tensor]) -> Iterator[State]:
    h, c = state
    for g in layer_norm(ax, ax.shape[-1:], p["norm_ih_l0"], p["bias_ih_l0"]).unbind(0):
        ah = linear(h, p["weight_hh_l0"])
        i, f, n, o = (g + layer_norm(ah, ah.shape[-1:], p["norm_hh_l0"], p["bias_hh_l0"])).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * n.tanh()
        h = o.sigmoid() * layer_norm(c, c.shape[-1:], p["norm_c_l0"], p["norm_c_bias_l0"]).tanh()
        yield h, c


def _gru_steps(ax: Tensor, state: State, p: Mapping[str, Tensor]) -> Iterator[State]:
    (h,) = state
    for g in _of_gru(ax, p["norm_ih_l0"], p["bias_ih_l0"]).unbind(0):
        ah = _of_gru(linear(h, p["weight_hh_l0"]), p["norm_hh_l0"], p["bias_hh_l0"])
        (xr, xz, xn), (hr, hz, hn) = g.chunk(3, 1), ah.chunk(3, 1)
        z = (xz + hz).sigmoid()
        h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
        yield (h,)


def _of_gru(a: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """r and z together, n by itself."""
    sizes = [2 * a.shape[-1] // 3, a.shape[-1] // 3]
    parts = zip(a.split(sizes, -1), gain.split(sizes), bias.split(sizes), strict=True)
    return torch.cat([layer_norm(p, p.shape[-1:], g, b) for p, g, b in parts], -1)
