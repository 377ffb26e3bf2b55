"""The suite's own oracle: one recurrent layer written out in plain PyTorch, and the error budget that it gives.

The same few lines run in float64, which is taken as the truth, and in the dtype under test, whose error against that
truth is what plain PyTorch would have made of the same numbers. A kernel may err twice as much, plus one rounding of
its result; nothing else is allowed for. Nothing here is shared with fastseq, its `reference` included, but the tuple
that masks come in.

Letters: T steps, B rows, I features, H units, D directions, N tokens of a packed batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.ops.extras import NONE, Extras
from tests.guards import guard_bands

__all__ = [
    "CELLS",
    "SMOOTH",
    "Case",
    "Layer",
    "Mismatch",
    "Problem",
    "Results",
    "Terms",
    "allow",
    "behind",
    "budget",
    "cell_kinds",
    "check_backward_changes_nothing",
    "check_layer",
    "check_second",
    "compare",
    "differentiate",
    "largest",
    "nan_in_empty",
    "plain",
    "run",
    "second",
]

Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None]]  # the signature of `plain`
Measure = Callable[..., "Results"]  # of (layer, problem, dtype or nothing), as `run`
Results = dict[str, Tensor]  # by name: out, h_n, (c_n), then d_x, d_h0, ...: the gradients
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = tuple(GATES)
SMOOTH = CELLS[:3]  # relu's slope jumps at 0, where 16 bits often miss the side: no budget holds for its gradients
EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
SUMS = ("d_w_", "d_b_", "d_we", "d_bi")  # gradients of the weights, as named here or in torch.nn
STATES = ("h_n", "c_n", "d_h0", "d_c0")


class Mismatch(AssertionError):
    """A result is outside its budget, of another shape or dtype, or not finite."""


@dataclass(frozen=True)
class Case:
    """One call of one layer."""

    cell: str = "lstm"
    dtype: torch.dtype = torch.float32
    T: int = 6
    B: int = 5
    I: int = 7  # noqa: E741  (the project's letter)
    H: int = 20
    bidirectional: bool = False
    rows: str = "full"  # "lengths": padded, in any order, one of them 0; "packed"
    hx: bool = True
    bias: bool = True
    batch_first: bool = False
    state: torch.dtype | None = None  # of h0 and c0; None: dtype
    threads: int = 1
    resets: bool = False  # segments begin within the rows; not of packed ones
    noise: str = ""  # "zoneout", "mean": what is left of it in evaluation; "state", "update": recurrent dropout; "both"
    states: bool = False  # c of every step is a result, of an LSTM

    def __str__(self) -> str:
        flags = [f for f in ("bidirectional", "hx", "bias", "batch_first", "resets", "states") if getattr(self, f)]
        flags += [self.noise] * bool(self.noise)
        name = str(self.dtype).removeprefix("torch.")
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        return "-".join([self.cell, name, shape, self.rows, *flags, f"threads{self.threads}"])


@dataclass
class Problem:
    """The tensors of a case. `tensors` are the differentiable ones by name, in the order of a layer's arguments."""

    case: Case
    tensors: dict[str, Tensor]  # x, (h0, (c0)), w_ih.0, w_hh.0, (b_ih.0, b_hh.0), w_ih.1, ...
    grads: dict[str, Tensor]  # of out, h_n, (c_n)
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None  # in x's layout
    extras: Extras = NONE

    @classmethod
    def draw(cls, case: Case, seed: int = 0) -> "Problem":
        """Random values of the case's dtype. What stands behind a row's length is NaN: nobody may read it."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        dirs, hidden, gates = 2 if case.bidirectional else 1, case.H, GATES[case.cell]
        lengths, batch_sizes, lead = None, None, (case.T, case.B)
        if case.rows != "full":
            lengths = torch.randint(1, case.T + 1, (case.B,), generator=g)
            if case.B:
                lengths[case.B // 2] = case.T  # T is the length of the longest row, as in packed data
        if case.rows == "packed":
            assert lengths is not None
            batch_sizes = (torch.arange(case.T)[:, None] < lengths).sum(1)
            lengths, lead = None, (int(batch_sizes.sum()),)
        elif lengths is not None and case.B > 1:
            lengths[0] = 0
        if case.batch_first and case.rows != "packed":
            lead = lead[::-1]
        x, d_out = normal(*lead, case.I), normal(*lead, dirs * hidden)
        if lengths is not None:
            x[behind(lengths, case)] = torch.nan
        tensors, grads, state = {"x": x}, {"out": d_out}, case.state or case.dtype
        for name in ("h", "c") if case.cell == "lstm" else ("h",):
            given = normal(dirs, case.B, hidden, dtype=state)
            if case.hx:
                tensors[name + "0"] = given
            grads[name + "_n"] = normal(dirs, case.B, hidden, dtype=state)
        for d in range(dirs):
            tensors[f"w_ih.{d}"] = normal(gates * hidden, case.I, scale=(1 + case.I) ** -0.5)
            tensors[f"w_hh.{d}"] = normal(gates * hidden, hidden, scale=hidden**-0.5)
            for name in ("b_ih", "b_hh") if case.bias else ():
                tensors[f"{name}.{d}"] = normal(gates * hidden, scale=0.5)
        if case.states and case.cell == "lstm":
            grads["c_out"] = normal(*lead, dirs * hidden)
        assert not (case.resets and case.rows == "packed")
        resets = torch.rand(lead, generator=g) < 0.3 if case.resets else None  # behind the lengths as well: for nobody
        return cls(case, tensors, grads, lengths, batch_sizes, resets, draw_extras(case, lead, g))

    def near(self, seed: int) -> "Problem":
        """The same problem with every value changed by about a hundredth."""
        g = torch.Generator().manual_seed(seed)

        def shake(t: Tensor) -> Tensor:
            return t * (1 + 0.01 * torch.randn(t.shape, generator=g)).to(t.dtype)

        tensors = {n: shake(t) for n, t in self.tensors.items()}
        grads = {n: shake(t) for n, t in self.grads.items()}
        return replace(self, tensors=tensors, grads=grads)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a result: states and their gradients have that of the state given, all else the input's."""
        case = self.case
        return (case.state if case.hx else None) or case.dtype if name in STATES else case.dtype

    def call(self, layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """out, h_n and c_n of `layer` on these tensors."""
        weights = [t for name, t in tensors.items() if name[:2] in ("w_", "b_")]
        more = [] if self.extras == NONE else [self.extras]
        out, h_n, c_n, *c_out = layer(
            self.case.cell, tensors["x"], tensors.get("h0"), tensors.get("c0"), weights, self.lengths, self.resets,
            self.batch_sizes, self.case.batch_first, self.case.bidirectional, *more,
        )  # fmt: skip
        found = {"out": out, "h_n": h_n, "c_n": c_n, "c_out": c_out[0] if c_out else None}
        return {name: t for name, t in found.items() if t is not None}


def draw_extras(case: Case, lead: tuple[int, ...], g: torch.Generator) -> Extras:
    """Random masks: a quarter of the units is held, a third dropped."""
    dirs, lstm = 2 if case.bidirectional else 1, case.cell == "lstm"

    def flags(p: float) -> Tensor:
        return torch.rand(*lead, dirs * case.H, generator=g) < p

    update = hold_h = hold_c = recurrent = None
    scale, share_h, share_c = 1.0, 0.0, 0.0
    if case.noise in ("zoneout", "both"):
        hold_h, hold_c = flags(0.25), flags(0.25) if lstm else None
    if case.noise == "mean":
        share_h, share_c = 0.25, 0.125 if lstm else 0.0
    if case.noise in ("update", "both") and GATES[case.cell] > 1:
        update, scale = flags(2 / 3), 1.5
    if case.noise in ("state", "both"):
        recurrent = (torch.rand(dirs, case.B, case.H, generator=g) < 2 / 3).to(case.dtype) * 1.5
    return Extras(update, hold_h, hold_c, recurrent, (scale, share_h, share_c), case.states)


def behind(lengths: Tensor, case: Case) -> Tensor:
    """[T, B], or [B, T] if batch_first: which steps lie behind their row's length."""
    mask = torch.arange(case.T)[:, None] >= lengths
    return mask.T if case.batch_first else mask


def plain(
    cell: str,
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H]
    c0: Tensor | None,
    weights: list[Tensor],  # D times w_ih, w_hh (, b_ih, b_hh)
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B], [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T]
    batch_first: bool,
    bidirectional: bool,
    extras: Extras = NONE,
) -> tuple[Tensor | None, ...]:
    """One layer, step by step, every operation in x's dtype; h and c are carried in that of h0."""
    if batch_sizes is not None:
        valid = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]  # [T, B]
        place = torch.zeros(valid.shape, dtype=torch.int64)
        place[valid] = torch.arange(x.shape[0])
        xs = x[place]
    else:
        xs = x.transpose(0, 1) if batch_first else x
        valid = torch.arange(xs.shape[0])[:, None] < (xs.shape[0] if lengths is None else lengths)
        valid = valid.expand(xs.shape[:2])
    xs = torch.where(valid[..., None], xs, 0.0)
    first = torch.zeros_like(valid)
    if resets is not None:
        first = (resets.T if batch_first else resets) & valid
    last = torch.cat((first[1:], torch.zeros_like(first[:1])))  # the steps before
    dirs = 2 if bidirectional else 1
    masks = [None if m is None else (m[place] if batch_sizes is not None else m.transpose(0, 1) if batch_first else m)
             for m in extras[:3]]  # fmt: skip
    per, outs, finals = len(weights) // dirs, [], []
    for d in range(dirs):
        fresh = (last if d else first)[..., None]
        own = [None if m is None else m.unflatten(-1, (dirs, -1))[..., d, :] for m in masks]
        drop = None if extras.recurrent is None else extras.recurrent[d].to(x.dtype)
        noise = (*own, drop, *extras.rates)
        out, state = _scan(cell, xs, valid[..., None], fresh, h0, c0, weights[d * per : (d + 1) * per], d, noise)
        outs.append(out)
        finals.append(state)
    results = [torch.cat(steps, -1) for steps in zip(*outs, strict=True)]
    results = [t[valid] if batch_sizes is not None else t.transpose(0, 1) if batch_first else t for t in results]
    h_n, *c_n = (torch.stack(s) for s in zip(*finals, strict=True))
    return results[0], h_n, c_n[0] if c_n else None, results[1] if c_n and extras.states else None


def _scan(
    cell: str, xs: Tensor, valid: Tensor, fresh: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor],
    d: int, noise: tuple[Any, ...],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Direction d: (h, and of an LSTM c, of all steps [T, B, H]; [h] or [h, c]). Past a row's end its state stays, its
    output is 0. noise: masks of update, of what h and c keep [T, B, H], of h in the product [B, H]; three rates.

    valid, fresh [T, B, 1]: the steps that a row has, and those that it begins from 0.
    """
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    zeros = xs.new_zeros(xs.shape[1], w_hh.shape[1])
    state = [zeros if s is None else s[d] for s in ((h0, c0) if cell == "lstm" else (h0,))]
    update, hold_h, hold_c, drop, scale, share_h, share_c = noise
    steps: list[list[Tensor]] = [[]] * len(xs)
    for t in reversed(range(len(xs))) if d else range(len(xs)):
        state = [s.masked_fill(fresh[t], 0.0) for s in state]
        seen, written = state[0].to(xs.dtype), 1.0 if update is None else update[t] * scale
        gx, gh = linear(xs[t], w_ih, b_ih), linear(seen if drop is None else seen * drop, w_hh, b_hh)
        if cell == "lstm":
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * (g.tanh() * written)
            new = [o.sigmoid() * c.tanh(), c]
        elif cell == "rnn_tanh":
            new = [(gx + gh).tanh()]
        elif cell == "rnn_relu":
            new = [(gx + gh).relu()]
        else:
            (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
            z = (xz + hz).sigmoid()
            new = [(1 - z) * ((xn + (xr + hr).sigmoid() * hn).tanh() * written) + z * state[0]]
        for k, (hold, share) in enumerate(((hold_h, share_h), (hold_c, share_c))[: len(new)]):
            new[k] = (1 - share) * new[k] + share * state[k] if hold is None else torch.where(hold[t], state[k], new[k])
        state = [torch.where(valid[t], n, s) for n, s in zip(new, state, strict=True)]
        steps[t] = [torch.where(valid[t], n, 0.0).to(xs.dtype) for n in new]
    return [torch.stack(s) for s in zip(*steps, strict=True)], state


def differentiate(outputs: Mapping[str, Tensor], grads: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Results:
    """The gradient of sum(outputs * grads) by every input, named d_<input>. Raises where one does not arrive."""
    names = [n for n in outputs if n in grads]
    found = torch.autograd.grad(
        [outputs[n] for n in names], list(inputs.values()), [grads[n].to(outputs[n].dtype) for n in names],
        retain_graph=True,
    )  # fmt: skip
    return {f"d_{name}": d for name, d in zip(inputs, found, strict=True)}


def run(layer: Layer, problem: Problem, dtype: torch.dtype | None = None) -> Results:
    """Outputs and every gradient of `layer`; with all tensors converted to `dtype` where one is given."""
    leaves = {n: t.to(dtype or t.dtype, copy=True).requires_grad_() for n, t in problem.tensors.items()}
    outputs = problem.call(layer, leaves)
    return {n: o.detach() for n, o in outputs.items()} | differentiate(outputs, problem.grads, leaves)


def second(layer: Layer, problem: Problem, dtype: torch.dtype | None = None) -> Results:
    """First derivatives recorded with create_graph, and the derivatives by every input of a function of them."""
    leaves = {n: t.to(dtype or t.dtype, copy=True).requires_grad_() for n, t in problem.tensors.items()}
    outputs = problem.call(layer, leaves)
    loss = sum((o.sin() * problem.grads[n].to(o.dtype)).sum() for n, o in outputs.items())
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    total = sum((d * d).sum() for d in first)
    again = torch.autograd.grad(total, list(leaves.values()))
    results = {f"d_{n}": d.detach() for n, d in zip(leaves, first, strict=True)}
    return results | {f"d_d_{n}": d for n, d in zip(leaves, again, strict=True)}


def budget(problem: Problem, measure: Measure = run) -> tuple[Results, dict[str, float]]:
    """The float64 truth, and by how much each result may differ from it: `allow`, with `plain` as the reference.

    A tensor with few elements may have a small error by luck alone; then problems with nearby values are run as well.
    So of second derivatives, whose errors PyTorch's order of summation decides, another one on another CPU.
    """
    truth = measure(plain, problem, torch.float64)
    pairs = [(measure(plain, problem), truth)]
    draws = max(32 // min([t.numel() for t in truth.values() if t.numel()]), 4 if measure is second else 1)
    for seed in range(1, draws):
        near = problem.near(seed)
        pairs.append((measure(plain, near), measure(plain, near, torch.float64)))
    case = problem.case
    terms = Terms(case.I + case.H, GATES[case.cell] * case.H, problem.tensors["x"][..., 0].numel())
    return truth, {n: allow({n: truth[n]}, pairs, problem.dtype_of(n), terms)[n] for n in truth}


class Terms(NamedTuple):
    """How many products a sum of each kind of results adds up."""

    outputs: int  # I + H
    inputs: int  # G * H, in the gradients of inputs and states
    weights: int  # T * B, in those of the weights: of factors that are such sums themselves

    def of(self, name: str) -> int:
        if name[:2] != "d_":
            return self.outputs
        return self.inputs + (self.weights if name[:4] in SUMS else 0)


def allow(
    truth: Results, pairs: Sequence[tuple[Results, Results]], dtype: torch.dtype, terms: Terms
) -> dict[str, float]:
    """By how much each result in `dtype` may differ from the truth, given (low-precision result, its truth) pairs.

    Twice the error of the low-precision runs, relative to a tensor's largest value, and two roundings: that of the
    result, and that of a sum of N products in fp32 in whatever order, sqrt(N) / 2 units in the last place. The error is
    the largest of the outputs, of the gradients, or of the second derivatives: that of one tensor may be luck.
    """
    errors: dict[str, float] = {}
    for low, exact in pairs:
        for name, t in exact.items():
            error = largest(low[name].double() - t) / max(largest(t), TINY)
            errors[kind_of(name)] = max(error, errors.get(kind_of(name), 0.0))
    units = {n: torch.finfo(dtype).eps + EPS * terms.of(n) ** 0.5 / 2 for n in truth}
    return {n: (2 * errors[kind_of(n)] + units[n]) * largest(t) for n, t in truth.items()}


@contextmanager
def nan_in_empty() -> Iterator[None]:
    """torch.empty gives NaN: whatever is read before it is written shows, and what is written outside of it."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with guard_bands():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def kind_of(name: str) -> str:
    """Outputs, gradients and second derivatives have errors of their own size each."""
    return "second" if name.startswith("d_d_") else "gradients" if name.startswith("d_") else "outputs"


def cell_kinds(dtypes: Sequence[torch.dtype]) -> list[tuple[str, torch.dtype]]:
    """Every cell with every dtype in which its gradients have a budget."""
    return [(c, dtype) for c in CELLS for dtype in dtypes if c in SMOOTH or dtype == torch.float32]


def largest(t: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor."""
    return t.abs().max().item() if t.numel() else 0.0


def compare(got: Results, truth: Results, allowed: Mapping[str, float]) -> None:
    """Raise Mismatch unless every result is finite and differs from the truth by no more than allowed."""
    if got.keys() != truth.keys():
        raise Mismatch(f"results {sorted(got)}, expected {sorted(truth)}")
    for name, exact in truth.items():
        if got[name].shape != exact.shape:
            raise Mismatch(f"{name} has shape {tuple(got[name].shape)}, expected {tuple(exact.shape)}")
        error = largest(got[name].double() - exact)
        if not (error <= allowed[name]):  # so that NaN fails
            raise Mismatch(f"{name} errs by {error:.3g}, allowed {allowed[name]:.3g}, largest {largest(exact):.3g}")


Budget = Callable[..., tuple[Results, dict[str, float]]]  # of (problem, measure or nothing), as `budget`


def check_layer(layer: Layer, problem: Problem, budget: Budget = budget) -> None:
    """Outputs and every gradient of `layer` within budget; behind a row's length both are exactly 0."""
    torch.set_num_threads(1)
    truth, allowed = budget(problem)
    torch.set_num_threads(problem.case.threads)
    with nan_in_empty():
        got = run(layer, problem)
    compare(got, truth, allowed)
    for name, t in got.items():
        if t.dtype != problem.dtype_of(name):
            raise Mismatch(f"{name} is {t.dtype}, expected {problem.dtype_of(name)}")
    if problem.lengths is not None:
        padding = behind(problem.lengths, problem.case)
        for name in ("out", "d_x"):
            if got[name][padding].count_nonzero():
                raise Mismatch(f"{name} is not 0 behind the rows' lengths")


def check_second(layer: Layer, problem: Problem, budget: Budget = budget) -> None:
    """Second derivatives, and the first ones as recorded for them, within budget."""
    torch.set_num_threads(1)
    truth, allowed = budget(problem, second)
    torch.set_num_threads(problem.case.threads)
    compare(second(layer, problem), truth, allowed)


def check_backward_changes_nothing(way: Layer, problem: Problem) -> None:
    """A second backward gives the same bits, and inputs, outputs and their gradients stay as they were."""
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    outputs = problem.call(way, leaves)
    before = {n: o.detach().clone() for n, o in outputs.items()}
    grads = {n: g.clone() for n, g in problem.grads.items()}
    first = differentiate(outputs, grads, leaves)
    for name, d in differentiate(outputs, grads, leaves).items():
        assert torch.equal(d, first[name]), name
    for now, then in ((outputs, before), (leaves, problem.tensors), (grads, problem.grads)):
        for name, t in then.items():
            assert torch.equal(now[name].nan_to_num(), t.nan_to_num()), name
