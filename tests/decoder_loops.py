"""The presets of fastseq.Decoder as their papers and toolkits compute them: plain loops over steps.

Each takes the decoder's parameters by their state_dict names, the target y [B, T, I] and a memory, and returns the
outputs [B, T, R], the weights [B, T, S] or None, and the last states and fed value by name. They share nothing with
fastseq but those names, and look at one preset each, so that a preset's options are tested with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LOOPS", "Loop", "Read"]

P = dict[str, Tensor]
State = list[Tensor]  # [h] or [h, c]


class Read(NamedTuple):
    """What a loop reads."""

    out: Tensor  # [B, S, D], 0 behind the mask
    mask: Tensor  # [B, S]
    state: list[State]  # by layer, of the encoder


class Result(NamedTuple):
    out: Tensor
    weights: Tensor | None
    states: list[State]
    feed: Tensor | None = None


Loop = Callable[[P, Tensor, Read], Result]


def lstm(p: P, name: str, x: Tensor, state: State) -> State:
    h, c = state
    gates = x @ p[f"weight_ih_{name}"].T + p[f"bias_ih_{name}"] + h @ p[f"weight_hh_{name}"].T + p[f"bias_hh_{name}"]
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def gru(p: P, name: str, x: Tensor, state: State, beside: Any = 0.0) -> State:
    """torch.nn's; `beside` joins U h within the reset bracket."""
    h = state[0]
    x_r, x_z, x_n = (x @ p[f"weight_ih_{name}"].T + p[f"bias_ih_{name}"]).chunk(3, 1)
    h_r, h_z, h_n = (h @ p[f"weight_hh_{name}"].T + p[f"bias_hh_{name}"] + beside).chunk(3, 1)
    z = torch.sigmoid(x_z + h_z)
    return [z * h + (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)]


def gru_before(p: P, name: str, x: Tensor, state: State) -> State:
    """Bahdanau et al. 2014, A.1.1, with z opposite."""
    h = state[0]
    x_r, x_z, x_n = (x @ p[f"weight_ih_{name}"].T + p[f"bias_ih_{name}"]).chunk(3, 1)
    (u_r, u_z, u_n), (b_r, b_z, b_n) = p[f"weight_hh_{name}"].chunk(3), p[f"bias_hh_{name}"].chunk(3)
    r, z = torch.sigmoid(x_r + h @ u_r.T + b_r), torch.sigmoid(x_z + h @ u_z.T + b_z)
    return [z * h + (1 - z) * torch.tanh(x_n + (r * h) @ u_n.T + b_n)]


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """[B, S]; rows without a position are 0."""
    raised = torch.exp(scores - scores.detach().amax(1, keepdim=True)) * mask
    return raised / raised.sum(1, keepdim=True).clamp(min=torch.finfo(raised.dtype).tiny)


def look(weights: Tensor, out: Tensor) -> Tensor:
    return (weights[:, :, None] * out).sum(1)


def additive(p: P, query: Tensor, memory: Read, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Context and weights by v . tanh(W_q q + W_m m + b)."""
    x = (query @ p["attention.weight_query"].T)[:, None] + memory.out @ p["attention.weight_memory"].T
    x = torch.tanh(x + p["attention.bias"] if "attention.bias" in p else x)
    weights = softmax(x @ (p["attention.v"] if v is None else v), memory.mask)
    return look(weights, memory.out), weights


def general(p: P, query: Tensor, memory: Read, scale: Any = 1.0) -> tuple[Tensor, Tensor]:
    """Context and weights by scale * q . W m."""
    scores = ((memory.out @ p["attention.weight_memory"].T) * query[:, None]).sum(-1) * scale
    weights = softmax(scores, memory.mask)
    return look(weights, memory.out), weights


def mapped(p: P, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def maxout(x: Tensor) -> Tensor:
    return torch.stack([torch.maximum(x[:, i], x[:, i + 1]) for i in range(0, x.shape[1], 2)], 1)


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def sutskever(p: P, y: Tensor, memory: Read) -> Result:
    states, outs = memory.state, []
    for x in y.unbind(1):
        for layer, state in enumerate(states):
            states = [*states[:layer], lstm(p, f"l{layer}", x, state), *states[layer + 1 :]]
            x = states[layer][0]
        outs.append(x)
    return Result(torch.stack(outs, 1), None, states)


def cho(p: P, y: Tensor, memory: Read) -> Result:
    c = torch.tanh(mapped(p, "summary", memory.state[-1][0]))
    state, outs = [torch.tanh(mapped(p, "bridge.h.0", c))], []
    for x in y.unbind(1):
        state = gru(p, "l0", x, state, c @ p["weight_ch_l0"].T)
        outs.append(maxout(cat(state[0], x, c) @ p["readout.weight"].T))
    return Result(torch.stack(outs, 1), None, [state])


def bahdanau(p: P, y: Tensor, memory: Read) -> Result:
    half = memory.state[0][0].shape[1] // 2
    state, outs, seen = [torch.tanh(mapped(p, "bridge.h.0", memory.state[0][0][:, half:]))], [], []
    for x in y.unbind(1):
        before = state[0]
        context, weights = additive(p, before, memory)
        state = gru_before(p, "l0", cat(x, context), state)
        outs.append(maxout(cat(before, x, context) @ p["readout.weight"].T))
        seen.append(weights)
    return Result(torch.stack(outs, 1), torch.stack(seen, 1), [state])


def input_feeding(
    p: P, y: Tensor, memory: Read, states: list[State], attend: Callable[..., Any], combine: Callable[..., Tensor]
) -> Result:
    """The cells, the attention, what `combine` makes of context and state; that joins the next input."""
    outs: list[Tensor] = []
    seen = []
    fed = y.new_zeros(len(y), p["readout.weight"].shape[0])
    for x in y.unbind(1):
        x = cat(x, fed)
        for layer, state in enumerate(states):
            states = [*states[:layer], lstm(p, f"l{layer}", x, state), *states[layer + 1 :]]
            x = states[layer][0]
        context, weights = attend(p, x, memory)
        fed = combine(context, x)
        outs.append(fed)
        seen.append(weights)
    return Result(torch.stack(outs, 1), torch.stack(seen, 1), states, fed)


def luong(p: P, y: Tensor, memory: Read) -> Result:
    w = p["readout.weight"]
    return input_feeding(p, y, memory, memory.state, general, lambda c, s: torch.tanh(cat(c, s) @ w.T))


def opennmt_mlp(p: P, y: Tensor, memory: Read) -> Result:
    return input_feeding(p, y, memory, memory.state, additive, lambda c, s: mapped(p, "readout", cat(c, s)))


def fairseq(p: P, y: Tensor, memory: Read) -> Result:
    w = p["readout.weight"]
    states = [[mapped(p, f"bridge.{n}.0", s) for n, s in zip("hc", state, strict=True)] for state in memory.state]
    return input_feeding(p, y, memory, states, general, lambda c, s: torch.tanh(cat(c, s) @ w.T))


def joeynmt(p: P, y: Tensor, memory: Read) -> Result:
    first = torch.tanh(mapped(p, "bridge.h.0", memory.state[-1][0]))
    states = [[first, first] for _ in memory.state]
    return input_feeding(p, y, memory, states, additive, lambda c, s: torch.tanh(mapped(p, "readout", cat(s, c))))


def tf_nmt(p: P, y: Tensor, memory: Read) -> Result:
    def scaled(p: P, query: Tensor, memory: Read) -> tuple[Tensor, Tensor]:
        return general(p, query, memory, p["attention.scale"])

    return input_feeding(p, y, memory, memory.state, scaled, lambda c, s: cat(s, c) @ p["readout.weight"].T)


def gnmt(p: P, y: Tensor, memory: Read) -> Result:
    half = memory.state[0][0].shape[1] // 2
    states, outs, seen = [[s[:, half:] for s in memory.state[0]], *memory.state[1:]], [], []
    v = p["attention.v"] / p["attention.v"].square().sum().sqrt() * p["attention.g"]
    context = y.new_zeros(len(y), memory.out.shape[2])
    for x in y.unbind(1):
        state = lstm(p, "l0", cat(x, context), states[0])
        context, weights = additive(p, state[0], memory, v)
        below, after = state[0], [state]
        for layer in range(1, len(states)):
            state = lstm(p, f"l{layer}", cat(below, context), states[layer])
            below = state[0] + below if layer >= 2 else state[0]
            after.append(state)
        states = after
        outs.append(below)
        seen.append(weights)
    return Result(torch.stack(outs, 1), torch.stack(seen, 1), states, context)


def conditional_gru(p: P, y: Tensor, memory: Read) -> Result:
    count = memory.mask.sum(1, keepdim=True).clamp(min=1)
    state, outs, seen = [torch.tanh(mapped(p, "bridge.h.0", memory.out.sum(1) / count))], [], []
    for x in y.unbind(1):
        middle = gru(p, "l0", x, state)
        context, weights = additive(p, middle[0], memory)
        state = gru(p, "transition", context, middle)
        outs.append(torch.tanh(mapped(p, "readout", cat(x, state[0], context))))
        seen.append(weights)
    return Result(torch.stack(outs, 1), torch.stack(seen, 1), [state])


def bentrevett(p: P, y: Tensor, memory: Read) -> Result:
    state, outs, seen = [torch.tanh(mapped(p, "bridge.h.0", memory.state[0][0]))], [], []
    for x in y.unbind(1):
        context, weights = additive(p, state[0], memory)
        state = gru(p, "l0", cat(x, context), state)
        outs.append(cat(state[0], context, x))
        seen.append(weights)
    return Result(torch.stack(outs, 1), torch.stack(seen, 1), [state])


LOOPS: dict[str, Loop] = {
    "sutskever": sutskever,
    "cho": cho,
    "bahdanau": bahdanau,
    "luong": luong,
    "opennmt": luong,
    "opennmt_mlp": opennmt_mlp,
    "fairseq": fairseq,
    "joeynmt": joeynmt,
    "tf_nmt": tf_nmt,
    "gnmt": gnmt,
    "conditional_gru": conditional_gru,
    "bentrevett": bentrevett,
}
