"""The suite's oracle of attention and attention decoders: plain loops, and the error budget that they give.

As in `oracle`: the same lines run in float64, which is the truth, and in the dtype under test, whose error is what
plain PyTorch would have made of the same numbers. An attention looks at one row after another and at attended positions
only, so it needs no masking. Nothing here is shared with fastseq but the vocabulary of `fastseq.spec`.

Letters: N decoder rows, B rows of keys, T steps, S source positions, I input, H hidden, A attention units, D memory,
R readout, L layers.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import fastseq
from fastseq.spec import AttentionParams, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from tests.oracle import GATES, TINY, Mismatch, Results, Terms, allow, compare, largest, nan_in_empty

__all__ = [
    "PRESETS",
    "AttentionCase",
    "Case",
    "Problem",
    "Step",
    "budget",
    "check",
    "check_second",
    "fast",
    "plain",
    "preset",
    "run",
    "second",
]

GATE_COUNT = GATES | {"gru_reset_before": 3}
AIM_MARGIN = 1e-3  # how far a window's edge stays from any position: no rounding then moves one in or out
FEED = {"attend": "after", "feed": "output", "combine": "tanh"}
PRESETS: dict[str, dict[str, Any]] = {  # as in the papers and toolkits of the name
    "sutskever": {"attention": False, "readout": ("state",)},
    "cho": {"attention": False, "context_to": "first", "context_side": "hidden",
            "readout": ("state", "input", "context"), "combine": "maxout"},
    "bahdanau": {"context_to": "first", "readout": ("prev_state", "input", "context"), "combine": "maxout"},
    "luong": FEED,
    "opennmt_mlp": FEED | {"combine": "linear"},
    "joeynmt": FEED | {"readout": ("state", "context")},
    "tf_nmt": FEED | {"readout": ("state", "context"), "combine": "linear"},
    "gnmt": {"num_layers": 3, "attend": "after", "query_layer": 0, "feed": "context", "context_to": "upper",
             "readout": ("state",), "residual": 2},
    "conditional_gru": {"attend": "between", "readout": ("input", "state", "context"), "combine": "tanh"},
    "bentrevett": {"context_to": "first", "readout": ("state", "context", "input")},
}  # fmt: skip
BIASED = ("opennmt_mlp", "joeynmt", "conditional_gru")


@dataclass(frozen=True)
class AttentionCase:
    """One attention of N rows with T queries each."""

    score: str = "additive"  # "dot"; "bare" (additive without W_q); "projected" (dot with W_q)
    window: int | None = None
    dtype: torch.dtype = torch.float32
    N: int = 6
    B: int = 3
    T: int = 4
    S: int = 9
    A: int = 19
    D: int = 13
    Q: int = 20  # features of a query: a decoder's H, or what it feeds back
    mask: str = "holes"  # "none"; "prefix"; "holes": any positions, and a row without any
    weights: bool = True
    threads: int = 1
    seed: int = 0

    def __str__(self) -> str:
        text = [f"{k}={v}" for k, v in vars(self).items() if k not in ("spec", "name", "dtype") and v != _DEFAULTS[k]]
        return "-".join([getattr(self, "name", ""), str(self.dtype).removeprefix("torch."), *text])


@dataclass(frozen=True)
class Case(AttentionCase):
    """One attention decoder; Q follows from it."""

    name: str = "bahdanau"
    spec: DecoderSpec = field(default_factory=DecoderSpec)
    I: int = 7  # noqa: E741  (the project's letter)
    H: int = 20
    R: int = 17
    bias: bool = False  # of the readout
    dropout: bool = True
    context: bool = True  # without attention: a fixed context is given
    state: torch.dtype | None = None  # of the state's leaves; None: dtype

    @property
    def parts(self) -> int:
        """P, the features of the readout's parts."""
        sizes = {"input": self.I, "context": self.D}
        return sum(sizes.get(part, self.H) for part in self.spec.readout)

    @property
    def output(self) -> int:
        return self.parts if self.spec.combine is None else self.R

    @property
    def feed(self) -> int:
        return {None: 0, "context": self.D, "output": self.output}[self.spec.feed]


_DEFAULTS = {**vars(AttentionCase()), **vars(Case())}


def preset(name: str, cell: str = "lstm", **changes: Any) -> Case:
    """A case of one of `PRESETS`; changes of the spec's fields go into the spec."""
    of_spec = {k: changes.pop(k) for k in [*changes] if k in DecoderSpec.__dataclass_fields__ and k != "window"}
    window = {"window": changes["window"]} if "window" in changes else {}
    spec = DecoderSpec(cell=cell, **(PRESETS[name] | of_spec | window))
    options: dict[str, Any] = {"bias": name in BIASED, "context": name != "sutskever"}
    return Case(name=f"{name}-{cell}", spec=spec, **(options | changes))


@dataclass
class Problem:
    """The tensors of a case: `tensors` are the differentiable ones by name."""

    case: AttentionCase
    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]  # of the outputs
    mask: Tensor | None  # [B, S]
    masks: DropoutMasks

    @classmethod
    def draw(cls, case: AttentionCase) -> "Problem":
        """Random values of the case's dtype. What stands behind mask False is NaN: nobody may read it."""
        for seed in itertools.count(1000 * case.seed):
            g = torch.Generator().manual_seed(seed)

            def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype, g: Any = g) -> Tensor:
                return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

            mask = _draw_mask(case, g)
            attends = True
            if isinstance(case, Case):
                tensors, attends = _decoder_tensors(case, normal), case.spec.attention
            else:
                tensors = {"query": normal(case.N, case.T, case.Q)}
            if attends:
                tensors |= _attention_tensors(case, normal)
                if mask is not None:
                    tensors["keys"][~mask] = torch.nan
                    tensors["memory"][~mask] = torch.nan
            problem = cls(case, tensors, {}, mask if attends else None, _draw_masks(case, g))
            aims: list[Tensor] = []
            outputs = plain(problem, {n: t.double() for n, t in tensors.items()}, aims)
            problem.grads = {n: normal(*o.shape, dtype=problem.dtype_of(n)) for n, o in outputs.items()}
            if _settled(aims):
                return problem
        raise AssertionError("count ends")

    def near(self, seed: int) -> "Problem":
        """The same problem with every value changed by about a hundredth."""
        for again in itertools.count(seed, 1000):
            g = torch.Generator().manual_seed(again)

            def shake(t: Tensor, g: Any = g) -> Tensor:
                return t * (1 + 0.01 * torch.randn(t.shape, generator=g)).to(t.dtype)

            other = replace(self, tensors={n: shake(t) for n, t in self.tensors.items()})
            other.grads = {n: shake(t) for n, t in self.grads.items()}
            aims: list[Tensor] = []
            plain(other, {n: t.double() for n, t in other.tensors.items()}, aims)
            if _settled(aims):
                return other
        raise AssertionError("count ends")

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a result: the state and its gradients have that of the state given, all else the input's."""
        state = name.removeprefix("d_")[:2] in ("h_", "c_", "f_", "h0", "c0", "f0")
        return (getattr(self.case, "state", None) or self.case.dtype) if state else self.case.dtype


def _draw_mask(case: AttentionCase, g: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    if case.mask == "prefix":
        lengths = torch.randint(1, case.S + 1, (case.B,), generator=g)
        return torch.arange(case.S) < lengths[:, None]
    mask = torch.rand(case.B, case.S, generator=g) < 0.6
    if case.B > 1:
        mask[case.B // 2] = False
    return mask


def _draw_masks(case: AttentionCase, g: torch.Generator) -> DropoutMasks:
    if not isinstance(case, Case) or not case.dropout:
        return DropoutMasks()

    def factors(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) < 0.5).to(case.dtype) * 2

    lead, layers = (case.N, case.T), case.spec.num_layers - 1
    return DropoutMasks(
        factors(*lead, case.I), factors(layers, *lead, case.H) if layers else None, factors(*lead, case.parts),
        factors(*lead, case.output),
    )  # fmt: skip


def _query_size(case: AttentionCase) -> int:
    if not isinstance(case, Case):
        return case.Q
    return case.feed if case.spec.query == "feed" else case.H


def _attention_tensors(case: AttentionCase, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    size = _query_size(case)
    units = size if case.score in ("dot", "bare") else case.A
    scale = 0.5 if case.score == "additive" else units**-0.5
    tensors = {
        "keys": normal(case.B, case.S, units, scale=scale),
        "memory": normal(case.B, case.S, case.D),
    }
    if case.score in ("additive", "projected"):
        tensors["w_query"] = normal(units, size, scale=size**-0.5)
    if case.score in ("additive", "bare"):
        tensors["w_v"] = normal(units, scale=2 * units**-0.5)
    if case.window is not None:
        tensors["w_aim"] = normal(case.A, size, scale=size**-0.5)
        tensors["w_aim_v"] = normal(case.A, scale=case.A**-0.5)
    return tensors


def _decoder_tensors(case: Case, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    spec, hidden = case.spec, case.H
    rows, state = GATE_COUNT[spec.cell] * hidden, case.state or case.dtype
    tensors = {"y": normal(case.N, case.T, case.I)}
    for index in range(spec.num_layers):
        for name in ("h0", "c0") if spec.cell == "lstm" else ("h0",):
            tensors[f"{name}.{index}"] = normal(case.N, hidden, dtype=state)
    if spec.feed is not None:
        tensors["f0"] = normal(case.N, case.feed, dtype=state)
    if not spec.attention and case.context:
        tensors["context"] = normal(case.B, case.D)
    reads = [case.I + case.feed] + [hidden] * (spec.num_layers - 1)
    reads = [size + (case.D if _reads(spec, index) else 0) for index, size in enumerate(reads)]
    names = [str(index) for index in range(spec.num_layers)]
    if spec.attention and spec.attend == "between":
        reads, names = [*reads, case.D], [*names, "between"]
    for name, size in zip(names, reads, strict=True):
        tensors[f"w_ih.{name}"] = normal(rows, size, scale=(1 + size) ** -0.5)
        tensors[f"w_hh.{name}"] = normal(rows, hidden, scale=hidden**-0.5)
        tensors[f"b_ih.{name}"] = normal(rows, scale=0.5)
        tensors[f"b_hh.{name}"] = normal(rows, scale=0.5)
    if spec.context_side == "hidden":
        tensors["w_context"] = normal(rows, case.D, scale=case.D**-0.5)
    if spec.combine is not None:
        out = case.R * (2 if spec.combine == "maxout" else 1)
        tensors["w_out"] = normal(out, case.parts, scale=case.parts**-0.5)
        if case.bias:
            tensors["b_out"] = normal(out)
    return tensors


def _reads(spec: DecoderSpec, index: int) -> bool:
    """Whether layer `index` has the context in its input."""
    if spec.context_side == "hidden" or spec.context_to == "none":
        return False
    if spec.context_to == ("upper" if index == 0 else "first"):
        return False
    return not spec.attention or spec.attend != "after" or index > spec.query_layer


def _settled(aims: list[Tensor]) -> bool:
    return all(float((aim - aim.round()).abs()) > AIM_MARGIN for aim in aims)


Step = Callable[..., Results]  # (problem, tensors) -> outputs by name


def plain(problem: Problem, t: dict[str, Tensor], aims: list[Tensor] | None = None) -> Results:
    """Every output, step by step, every operation in y's dtype but the state, which is kept in its own."""
    case, aims = problem.case, [] if aims is None else aims
    if isinstance(case, Case):
        return _plain_decoder(problem, case, t, aims)
    asked = [_look(problem, t, t["query"][:, i], aims) for i in range(case.T)]
    contexts, weights = zip(*asked, strict=True)
    return {"out": torch.stack(contexts, 1)} | ({"weights": torch.stack(weights, 1)} if case.weights else {})


def _look(problem: Problem, t: dict[str, Tensor], queries: Tensor, aims: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Context [N, D] and weights [N, S] of one query [N, Q] a row."""
    case, contexts, rows = problem.case, [], []
    for n, query in enumerate(queries):
        b = n // (case.N // case.B)
        there = torch.arange(case.S) if problem.mask is None else problem.mask[b].nonzero()[:, 0]
        keys = t["keys"][b][there]
        q = t["w_query"] @ query if "w_query" in t else query
        scores = torch.tanh(keys + q) @ t["w_v"] if "w_v" in t else keys @ q
        bell = torch.ones_like(scores)
        if case.window is not None and len(there):
            p = len(there) * torch.sigmoid(t["w_aim_v"] @ torch.tanh(t["w_aim"] @ query))
            aims.append(p.detach())
            inside = (there - p).abs() <= case.window
            there, scores = there[inside], scores[inside]
            bell = torch.exp(-((there - p) ** 2) / (2 * (case.window / 2) ** 2))
        raised = torch.exp(scores - scores.detach().max()) if len(there) else scores
        weights = raised / raised.sum() * bell
        contexts.append(weights @ t["memory"][b][there])
        rows.append(torch.zeros(case.S, dtype=weights.dtype).index_put((there,), weights))
    return torch.stack(contexts), torch.stack(rows)


def _cell(
    cell: str, x: Tensor, state: list[Tensor], t: dict[str, Tensor], name: str, beside: Any = 0.0
) -> list[Tensor]:
    """One step of the cell with the parameters of this name; `beside` joins the recurrent product."""
    h, dtype = state[0], x.dtype
    w_hh, b_hh, low = t[f"w_hh.{name}"], t[f"b_hh.{name}"], h.to(x.dtype)
    gx = x @ t[f"w_ih.{name}"].T + t[f"b_ih.{name}"]
    gates = [part.to(dtype) for part in gx.chunk(GATE_COUNT[cell], -1)]
    if cell == "gru_reset_before":  # Cho et al. 2014, eq. 5 to 8
        (u_r, u_z, u_n), (b_r, b_z, b_n) = w_hh.chunk(3), b_hh.chunk(3)
        r = torch.sigmoid(gates[0] + low @ u_r.T + b_r)
        z = torch.sigmoid(gates[1] + low @ u_z.T + b_z)
        return [z * h + (1 - z) * torch.tanh(gates[2] + (r * low) @ u_n.T + b_n)]
    inner = (low @ w_hh.T + b_hh + beside).chunk(GATE_COUNT[cell], -1)
    if cell == "gru":
        r, z = torch.sigmoid(gates[0] + inner[0]), torch.sigmoid(gates[1] + inner[1])
        return [z * h + (1 - z) * torch.tanh(gates[2] + r * inner[2])]
    if cell.startswith("rnn_"):
        return [getattr(torch, cell.removeprefix("rnn_"))(gates[0] + inner[0])]
    i, f, g, o = (a + b for a, b in zip(gates, inner, strict=True))
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def _plain_decoder(problem: Problem, case: Case, t: dict[str, Tensor], aims: list[Tensor]) -> Results:
    spec, masks = case.spec, DropoutMasks(*(m if m is None else m.to(t["y"].dtype) for m in problem.masks))
    letters = ("h0", "c0") if spec.cell == "lstm" else ("h0",)
    states = [[t[f"{letter}.{index}"] for letter in letters] for index in range(spec.num_layers)]
    fed, top = t.get("f0"), states[-1][0].to(t["y"].dtype)
    whose = torch.arange(case.N) // (case.N // case.B)
    fixed = t["context"][whose] if "context" in t else None
    beside = fixed @ t["w_context"].T if spec.context_side == "hidden" and fixed is not None else 0.0
    outputs, weights = [], []
    for i in range(case.T):
        y, context, previous = t["y"][:, i], fixed, top
        dtype = y.dtype
        if masks.input is not None:
            y = y * masks.input[:, i]
        if spec.attention and spec.attend == "before":
            asks = fed if spec.query == "feed" else states[spec.query_layer][0]
            assert asks is not None
            context, seen = _look(problem, t, asks.to(dtype), aims)
        top = y
        for index in range(spec.num_layers):
            if index > 0 and masks.layers is not None:
                top = top * masks.layers[index - 1, :, i]
            x = top
            if index == 0 and fed is not None:
                x = torch.cat((x, fed.to(dtype)), 1)
            if _reads(spec, index):
                assert context is not None
                x = torch.cat((x, context), 1)
            states[index] = _cell(spec.cell, x, states[index], t, str(index), beside if index == 0 else 0.0)
            h = states[index][0].to(dtype)
            top = top + h if spec.residual is not None and index >= spec.residual else h
            if spec.attention and spec.attend == "after" and index == spec.query_layer:
                context, seen = _look(problem, t, h, aims)
        if spec.attention and spec.attend == "between":
            context, seen = _look(problem, t, top, aims)
            states[0] = _cell(spec.cell, context, states[0], t, "between")
            top = states[0][0].to(dtype)
        out = torch.cat(
            [{"state": top, "prev_state": previous, "context": context, "input": y}[p] for p in spec.readout], 1
        )
        if masks.readout is not None:
            out = out * masks.readout[:, i]
        if spec.combine is not None:
            out = out @ t["w_out"].T + t.get("b_out", torch.zeros((), dtype=dtype))
            if spec.combine == "tanh":
                out = torch.tanh(out)
            if spec.combine == "maxout":
                out = out.reshape(len(out), -1, 2).max(-1).values
        if masks.output is not None:
            out = out * masks.output[:, i]
        if spec.feed is not None:
            fed = context if spec.feed == "context" else out
        outputs.append(out)
        weights.append(seen if spec.attention else None)
    results = {"out": torch.stack(outputs, 1)}
    if case.weights and spec.attention:
        results["weights"] = torch.stack(weights, 1)
    for index, state in enumerate(states):
        results |= {f"{letter[0]}_n.{index}": s for letter, s in zip(letters, state, strict=True)}
    return results if fed is None else results | {"f_n": fed.to(t["f0"].dtype)}


def fast(backend: str = "auto") -> Step:
    """The same outputs by fastseq's functions."""

    def decode(problem: Problem, t: dict[str, Tensor]) -> Results:
        case = problem.case
        keys = Keys(t.get("keys"), t.get("memory"), problem.mask, t.get("context"))
        window = (t["w_aim"], t["w_aim_v"]) if "w_aim" in t else None
        attention = AttentionParams(t.get("w_query"), t.get("w_v"), window) if "keys" in t else None
        if not isinstance(case, Case):
            assert attention is not None
            out, weights = fastseq.functional.attention(
                t["query"], keys, attention, window=case.window, need_weights=case.weights, backend=backend
            )
            return {"out": out} | ({} if weights is None else {"weights": weights})
        names = [*map(str, range(case.spec.num_layers))]
        cells = {n: tuple(t[f"{k}.{n}"] for k in ("w_ih", "w_hh", "b_ih", "b_hh")) for n in [*names, "between"]
                 if f"w_ih.{n}" in t}  # fmt: skip
        layers = tuple(tuple(t[f"{k}.{n}"] for k in ("h0", "c0") if f"{k}.{n}" in t) for n in names)
        readout = (t["w_out"], t.get("b_out")) if "w_out" in t else None
        params = DecoderParams(
            tuple(cells[n] for n in names),
            cells.get("between"),
            t.get("w_context"),
            attention,
            readout,  # type: ignore[arg-type]
        )
        masks = DropoutMasks(*(m if m is None else m.to(t["y"].dtype) for m in problem.masks))
        output, state, weights = fastseq.functional.attention_decoder(
            t["y"], keys, DecoderState(layers, t.get("f0")), params, case.spec, dropout_masks=masks,
            need_weights=case.weights, backend=backend,
        )  # fmt: skip
        results = {"out": output} | ({} if weights is None else {"weights": weights})
        for n, layer in enumerate(state.layers):
            results |= {f"{letter}_n.{n}": s for letter, s in zip("hc", layer, strict=False)}
        return results if state.feed is None else results | {"f_n": state.feed}

    return decode


def run(step: Step, problem: Problem, dtype: torch.dtype | None = None) -> Results:
    """Outputs and every gradient of `step`; with all tensors converted to `dtype` where one is given."""
    leaves = {n: t.to(dtype or t.dtype, copy=True).requires_grad_() for n, t in problem.tensors.items()}
    outputs = step(problem, leaves)
    grads = [problem.grads[n].to(o.dtype) for n, o in outputs.items()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, materialize_grads=True)
    return {n: o.detach() for n, o in outputs.items()} | {f"d_{n}": d for n, d in zip(leaves, found, strict=True)}


def second(step: Step, problem: Problem, dtype: torch.dtype | None = None) -> Results:
    """First derivatives recorded with create_graph, and the derivatives by every input of a function of them."""
    leaves = {n: t.to(dtype or t.dtype, copy=True).requires_grad_() for n, t in problem.tensors.items()}
    outputs = step(problem, leaves)
    loss = sum((o.sin() * problem.grads[n].to(o.dtype)).sum() for n, o in outputs.items())
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)  # type: ignore[arg-type]
    total = sum((d * d).sum() for d in first)
    again = torch.autograd.grad(total, inputs, materialize_grads=True)  # type: ignore[arg-type]
    results = {f"d_{n}": d.detach() for n, d in zip(leaves, first, strict=True)}
    return results | {f"d_d_{n}": d for n, d in zip(leaves, again, strict=True)}


@lru_cache(maxsize=32)
def budget(case: AttentionCase, measure: Callable[..., Results] = run) -> tuple[Problem, Results, dict[str, float]]:
    """A problem, its float64 truth, and by how much each result may differ from it, as `oracle.budget` has it."""
    problem = Problem.draw(case)
    truth = measure(plain, problem, torch.float64)
    pairs = [(measure(plain, problem), truth)]
    fewest = min([t.numel() for t in truth.values() if largest(t) > TINY], default=32)
    least = (
        8 if measure is second else 1
    )  # the largest error of a second derivative varies more from problem to problem
    for seed in range(1, max(least, 32 // fewest)):
        near = problem.near(seed)
        pairs.append((measure(plain, near), measure(plain, near, torch.float64)))
    if isinstance(case, Case):
        read = case.I + case.feed + case.H + case.parts
        inner = GATE_COUNT[case.spec.cell] * case.H + case.parts
    else:
        read = inner = case.Q
    terms = Terms(read + case.A + case.S, inner + case.A + case.D + case.S, case.N * case.T)
    return problem, truth, {n: allow({n: truth[n]}, pairs, problem.dtype_of(n), terms)[n] for n in truth}


def check(step: Step, case: AttentionCase) -> None:
    """Outputs and every gradient of `step` within budget; exactly 0 where nothing is attended to."""
    torch.set_num_threads(1)
    problem, truth, allowed = budget(case)
    torch.set_num_threads(case.threads)
    with nan_in_empty():
        got = run(step, problem)
    compare(got, truth, allowed)
    for name, t in got.items():
        if t.dtype != problem.dtype_of(name):
            raise Mismatch(f"{name} is {t.dtype}, expected {problem.dtype_of(name)}")
    if problem.mask is None:
        return
    for name in ("d_keys", "d_memory"):
        if got[name][~problem.mask].count_nonzero():
            raise Mismatch(f"{name} is not 0 behind the mask")
    if case.weights:
        hidden = ~problem.mask.repeat_interleave(case.N // case.B, 0)[:, None].expand_as(got["weights"])
        if got["weights"][hidden].count_nonzero():
            raise Mismatch("weights are not 0 behind the mask")


def check_second(step: Step, case: AttentionCase) -> None:
    """Second derivatives, and the first ones as recorded for them, within budget."""
    torch.set_num_threads(1)
    problem, truth, allowed = budget(case, second)
    torch.set_num_threads(case.threads)
    compare(second(step, problem), truth, allowed)
