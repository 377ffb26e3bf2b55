"""The oracle of layer-normalised layers, row by row and step by step, and problems for it; budgets: tests/oracle.py.

Ba, Kiros and Hinton 2016, eq. 20 to 22, for the LSTM; for the GRU r and z are normalised together, n by itself, and the
cell has torch's form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.ops.extras import NONE, Extras
from tests.oracle import (
    GATES,
    Case,
    Layer,
    Problem,
    Results,
    Terms,
    allow,
    check_layer,
    check_second,
    run,
)

__all__ = ["CELLS", "NormProblem", "check_norm", "check_norm_second", "norm_budget", "norm_plain"]

CELLS = ("lstm", "gru")


@dataclass
class NormProblem(Problem):
    """A problem with gains w_n_ih.0, w_n_hh.0 (, w_n_c.0, w_n_cb.0), w_n_ih.1, ... behind the weights."""

    @classmethod
    def draw(cls, case: Case, seed: int = 0) -> "NormProblem":
        base, g = Problem.draw(case, seed), torch.Generator().manual_seed(seed + 1)
        tensors, wide = dict(base.tensors), GATES[case.cell] * case.H
        for d in range(2 if case.bidirectional else 1):
            sizes = {"w_n_ih": wide, "w_n_hh": wide} | (
                {"w_n_c": case.H, "w_n_cb": case.H} if case.cell == "lstm" else {}
            )
            for name, size in sizes.items():
                shift = 0.0 if name == "w_n_cb" else 1.0
                tensors[f"{name}.{d}"] = (torch.randn(size, generator=g, dtype=torch.float64) * 0.3 + shift).to(
                    case.dtype
                )
        return cls(case, tensors, base.grads, base.lengths, base.batch_sizes, base.resets, base.extras)

    def call(self, layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """out, h_n and c_n of `layer` on these tensors."""
        norms = [t for name, t in tensors.items() if name.startswith("w_n_")]
        plain = {name: t for name, t in tensors.items() if not name.startswith("w_n_")}

        def normed(*args: Any) -> Any:
            return layer(*args, norms=norms)

        return super().call(normed, plain)


def norm_plain(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], lengths: Tensor | None,
    resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, bidirectional: bool, extras: Extras = NONE,
    *, norms: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `tests.oracle.plain`, of a layer-normalised layer."""
    places = _places(x, lengths, batch_sizes, batch_first)
    dirs, hidden = 2 if bidirectional else 1, weights[1].shape[1]
    per, gains = len(weights) // dirs, len(norms) // dirs
    found: dict[Any, Tensor] = {}
    cells: dict[Any, Tensor] = {}
    finals: list[list[list[Tensor]]] = []
    for d in range(dirs):
        w, n = weights[d * per : (d + 1) * per], norms[d * gains : (d + 1) * gains]
        finals.append([])
        for row, own in enumerate(places):
            state = [x.new_zeros(hidden) if s is None else s[d, row] for s in ((h0, c0) if cell == "lstm" else (h0,))]
            for k in reversed(range(len(own))) if d else range(len(own)):
                begins = k + 1 if d else k
                if resets is not None and begins < len(own) and resets[own[begins]]:
                    state = [s.masked_fill(torch.ones_like(s, dtype=torch.bool), 0.0) for s in state]
                noise = _noise(extras, own[k], d, row, hidden)
                state = _step(cell, x[own[k]], state, w, n, noise)
                found[own[k], d], cells[own[k], d] = state[0], state[-1]
            finals[-1].append(state)
    shape = (*x.shape[:-1], dirs * hidden)
    out, c_out = (_gathered(by_place, x, shape, dirs, hidden) for by_place in (found, cells))
    states = [torch.stack([torch.stack([state[k] for state in rows]) for rows in finals]) for k in range(len(state))]
    lstm = cell == "lstm"
    return out, states[0], states[1] if lstm else None, c_out if lstm and extras.states else None


def _places(x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, batch_first: bool) -> list[list[Any]]:
    """For each row the indices of its tokens in x, step by step."""
    if batch_sizes is not None:
        starts, sizes = (batch_sizes.cumsum(0) - batch_sizes).tolist(), batch_sizes.tolist()
        return [[(starts[t] + b,) for t in range(len(sizes)) if sizes[t] > b] for b in range(sizes[0])]
    rows, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    ends = [steps] * rows if lengths is None else lengths.tolist()
    return [[(b, t) if batch_first else (t, b) for t in range(ends[b])] for b in range(rows)]


def _gathered(by_place: dict[Any, Tensor], x: Tensor, shape: tuple[int, ...], dirs: int, hidden: int) -> Tensor:
    """What stands at (place, direction), laid out as x; zeros where nothing does."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).reshape(-1, len(shape) - 1).tolist()
    zeros = x.new_zeros(hidden)
    flat = [by_place.get((tuple(p), d), zeros).to(x.dtype) for p in places for d in range(dirs)]
    return torch.stack(flat).reshape(shape) if flat else x.new_zeros(shape)


def _noise(extras: Extras, place: Any, d: int, row: int, hidden: int) -> tuple[Any, ...]:
    own = [None if m is None else m[place][d * hidden : (d + 1) * hidden] for m in extras[:3]]
    return *own, None if extras.recurrent is None else extras.recurrent[d, row], *extras.rates


def _norm(x: Tensor) -> Tensor:
    """Statistics in fp32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = wide.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((wide - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return ((wide - mean) / (variance + 1e-5).sqrt()).to(x.dtype)


def _step(
    cell: str,
    x: Tensor,
    state: list[Tensor],
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    noise: tuple[Any, ...],
) -> list[Tensor]:
    """One row's next state."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (0.0, 0.0)
    update, hold_h, hold_c, drop, scale, share_h, share_c = noise
    seen = state[0].to(x.dtype)
    seen = seen if drop is None else seen * drop.to(x.dtype)
    written = 1.0 if update is None else update.to(x.dtype) * scale
    ax, ah = linear(x, w_ih), linear(seen, w_hh)
    if cell == "lstm":
        i, f, g, o = (norms[0] * _norm(ax) + b_ih + norms[1] * _norm(ah) + b_hh).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * (g.tanh() * written)
        new = [o.sigmoid() * (norms[2] * _norm(c).to(x.dtype) + norms[3]).tanh(), c]
    else:
        two = 2 * state[0].shape[0]
        gx = norms[0] * torch.cat((_norm(ax[:two]), _norm(ax[two:]))) + b_ih
        gh = norms[1] * torch.cat((_norm(ah[:two]), _norm(ah[two:]))) + b_hh
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3), gh.chunk(3)
        z = (xz + hz).sigmoid()
        new = [(1 - z) * ((xn + (xr + hr).sigmoid() * hn).tanh() * written) + z * state[0]]
    for k, (hold, share) in enumerate(((hold_h, share_h), (hold_c, share_c))[: len(new)]):
        new[k] = (1 - share) * new[k] + share * state[k] if hold is None else torch.where(hold, state[k], new[k])
    return [n.to(s.dtype) for n, s in zip(new, state, strict=True)]


def norm_budget(problem: NormProblem, measure: Callable[..., Results] = run) -> tuple[Results, dict[str, float]]:
    """`tests.oracle.budget` with `norm_plain` in the place of `plain`.

    Of less than 20 rows' steps the error may be luck however many elements they have: it is divided by a deviation of
    each. Then three problems are run at least.
    """
    case, truth = problem.case, measure(norm_plain, problem, torch.float64)
    pairs = [(measure(norm_plain, problem), truth)]
    draws = min(8, 32 // min([t.numel() for t in truth.values() if t.numel()]))
    for seed in range(1, max(draws, 3 if case.T * case.B < 20 else 1)):
        near = problem.near(seed)
        pairs.append((measure(norm_plain, near), measure(norm_plain, near, torch.float64)))
    terms = Terms(case.I + case.H, GATES[case.cell] * case.H, problem.tensors["x"][..., 0].numel())
    return truth, {n: allow({n: truth[n]}, pairs, problem.dtype_of(n), terms)[n] for n in truth}


def check_norm(layer: Layer, problem: NormProblem) -> None:
    """`tests.oracle.check_layer` with this budget."""
    check_layer(layer, problem, norm_budget)


def check_norm_second(layer: Layer, problem: NormProblem) -> None:
    """`tests.oracle.check_second` with this budget."""
    check_second(layer, problem, norm_budget)
