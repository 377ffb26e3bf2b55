"""The recurrences as the papers write them, in plain PyTorch: the oracle of every other backend.

Any floating dtype and device; differentiable any number of times; no in-place operation and no control flow on values,
so the transforms of torch.func apply. fp16 and bf16 are computed in fp32 and rounded once, at the end.

lstm              Hochreiter and Schmidhuber 1997, with the forget gate of Gers, Schmidhuber and Cummins 2000;
                  the projection is Sak, Senior and Beaufays 2014, eq. 6
gru_reset_before  Cho et al. 2014, eq. 5 to 8
gru               the same with the reset gate behind the recurrent product, as in torch.nn.GRU and cuDNN
rnn_tanh          Elman 1990
rnn_relu          the same with another nonlinearity

Zoneout is Krueger et al. 2016, section 3.2: h and c keep their values where a mask says so, and h comes from a c that
does not. Recurrent dropout is Gal and Ghahramani 2016, eq. 7, on h before W_hh, or Semeniuta et al. 2016, eq. 9 and 12,
on what a step writes. Layer normalisation is Ba, Kiros and Hinton 2016 (arXiv 1607.06450), eq. 20 to 22 for the LSTM;
for the GRU that of the same supplement, with the reset gate as in gru: N(W_x x) + N(W_h h) in place of W_x x + W_h h.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from ..ops.cells import CELLS
from ..ops.extras import NONE, Extras
from . import stack
from .call import Results, RnnCall

__all__ = [
    "NAME", "STEPS", "Weights", "layer", "norm_direction", "refuses", "rnn", "rnn_cell", "unavailable",
    "wide",
]  # fmt: skip

NAME = "reference"

State = tuple[Tensor, ...]  # (h [B, P],), for the LSTM (h [B, P], c [B, H])


def unavailable() -> str | None:
    """Always usable."""
    return None


def refuses(call: RnnCall) -> str | None:
    """Nothing."""
    return None


def never(call: RnnCall) -> str | None:
    """Nothing."""
    return None


def rnn(call: RnnCall) -> Results:
    """A layer stack."""
    return stack.run(call, layer)


def rnn_cell(call: RnnCall) -> tuple[Tensor, ...]:
    """One step."""
    x = wide(call.input)
    w = Weights.split(call.weights, 1)[0]
    state = STEPS[call.cell](linear(x, w.ih, w.b_ih), _initial(call.cell, call.h0, call.c0, w, x), w)
    return tuple(s.to(_state_dtype(call.h0, call.input)) for s in state)


def layer(
    cell: str,
    x: Tensor,  # [T, B, I]; [B, T, I] if batch_first; packed data [N, I] with batch_sizes
    h0: Tensor | None,  # [D, B, P]
    c0: Tensor | None,  # [D, B, H]
    weights: Sequence[Tensor],  # D times w_ih, w_hh (, b_ih, b_hh) (, w_hr)
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B] bool; [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T]
    batch_first: bool,
    bidirectional: bool,
    extras: Extras = NONE,
    norms: Sequence[Tensor] = (),  # D times the gains of N(W_ih x) and N(W_hh h), of an LSTM those and the bias of N(c)
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer in one or both directions: (out in x's layout, h_n [D, B, P], c_n [D, B, H] or None, c of every step).

    The last is None unless extras ask for it; of a cell that has c it is in out's layout.
    """
    parts = Weights.split(weights, 2 if bidirectional else 1, norms)
    return _layer(cell, x, h0, c0, parts, lengths, resets, batch_sizes, batch_first, (False, True), extras)


def norm_direction(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], norms: Sequence[Tensor],
    lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, reverse: bool,
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """One direction of a layer-normalised layer, forward or in reverse; extras are its own."""
    parts = Weights.split(weights, 1, norms)
    return _layer(cell, x, h0, c0, parts, lengths, resets, batch_sizes, batch_first, (reverse,), extras)


def _layer(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, parts: Sequence["Weights"], lengths: Tensor | None,
    resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, reverses: tuple[bool, ...], extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    if batch_sizes is not None:
        return _packed_layer(cell, x, h0, c0, parts, batch_sizes, reverses, extras)
    xs, mask = wide(x.transpose(0, 1) if batch_first else x), None
    begins = None if resets is None else (resets.transpose(0, 1) if batch_first else resets)[:, :, None]  # [T, B, 1]
    if lengths is not None:
        steps = torch.arange(xs.shape[0], device=lengths.device)
        mask = (steps[:, None] < lengths).to(xs.device)[:, :, None]  # [T, B, 1]
        xs = torch.where(mask, xs, 0.0)  # behind a length may stand NaN, and backward would multiply it by 0
        begins = None if begins is None else begins & mask
    runs = []
    for d, (w, reverse) in enumerate(zip(parts, reverses, strict=False)):
        held = _Masks.of(extras, d, cell, w, batch_first)
        w = w if extras.recurrent is None else w._replace(drop=wide(extras.recurrent[d]))
        state = _initial(cell, None if h0 is None else h0[d], None if c0 is None else c0[d], w, xs[0])
        runs.append(_scan(STEPS[cell], xs, state, w, mask, begins, held, reverse))
    outputs = [torch.cat(both, -1).to(x.dtype) for both in zip(*(steps for steps, _ in runs), strict=True)]
    if batch_first:
        outputs = [t.transpose(0, 1) for t in outputs]
    finals = [torch.stack(s).to(_state_dtype(h0, x)) for s in zip(*(state for _, state in runs), strict=True)]
    lstm = cell == "lstm"
    c_out = outputs[1] if lstm and extras.states else None
    return outputs[0], finals[0], finals[1] if lstm else None, c_out


class Weights(NamedTuple):
    """One direction's parameters, at least fp32."""

    ih: Tensor  # [G*H, I]
    hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    hr: Tensor | None = None  # [P, H]
    drop: Tensor | None = None  # [B, P]: multiplies h in the recurrent product
    beside: Tensor | None = None  # [B, G*H]: joins the recurrent product; not of gru_reset_before, which has two
    norm_ih: Tensor | None = None  # [G*H], gain of N(W_ih x); None: nothing is normalised
    norm_hh: Tensor | None = None  # [G*H], gain of N(W_hh h)
    norm_c: Tensor | None = None  # [H], gain of N(c); an LSTM's
    norm_c_bias: Tensor | None = None

    @classmethod
    def split(cls, flat: Sequence[Tensor], directions: int, norms: Sequence[Tensor] = ()) -> list["Weights"]:
        n = len(flat) // directions  # 2, with biases 4, with a projection one more
        parts, gains = [], len(norms) // directions
        for d in range(directions):
            ih, hh, *rest = (wide(w) for w in flat[d * n : (d + 1) * n])
            hr = rest.pop() if n % 2 else None
            b_ih, b_hh = rest or (None, None)
            own = [wide(n) for n in norms[d * gains : (d + 1) * gains]]
            parts.append(cls(ih, hh, b_ih, b_hh, hr, None, None, *own))
        return parts


class _Masks(NamedTuple):
    """One direction's masks of all steps, time-major."""

    update: Tensor | None  # [T, B, H], scaled
    hold: tuple[Tensor | float, ...]  # of h, of c: [T, B, P or H] bool, or the share of the old value that is kept

    @classmethod
    def of(cls, extras: Extras, d: int, cell: str, w: "Weights", batch_first: bool) -> "_Masks | None":
        if extras.silent:
            return None
        hidden, state = w.hh.shape[0] // CELLS[cell].gates, w.hh.shape[1]

        def own(mask: Tensor | None, units: int) -> Tensor | None:
            if mask is None:
                return None
            return (mask.transpose(0, 1) if batch_first else mask)[..., d * units : (d + 1) * units]

        update, hold_h, hold_c = own(extras.update, hidden), own(extras.hold_h, state), own(extras.hold_c, hidden)
        scale, h, c = extras.rates
        hold = (h if hold_h is None else hold_h, c if hold_c is None else hold_c)
        return cls(None if update is None else update.to(w.hh.dtype) * scale, hold)

    def held(self, t: int, old: State, new: State) -> State:
        """What zoneout makes of a step's new state."""
        return tuple(
            _held(m[t] if isinstance(m, Tensor) else m, o, n) for m, o, n in zip(self.hold, old, new, strict=False)
        )


def _held(mask: Tensor | float, old: Tensor, new: Tensor) -> Tensor:
    if isinstance(mask, Tensor):
        return torch.where(mask, old, new)
    return new + mask * (old - new) if mask else new


def _dropped(h: Tensor, w: Weights) -> Tensor:
    return h if w.drop is None else h * w.drop


def _written(value: Tensor, update: Tensor | None) -> Tensor:
    return value if update is None else value * update


def _normalised(product: Tensor, gain: Tensor, bias: Tensor | None, lstm: bool) -> Tensor:
    """N(product) gain (+ bias) [.., G*H]: over all gates of an LSTM, over r and z, and over n, of a GRU."""
    total = gain.shape[0]
    blocks = [total] if lstm else [total // 3 * 2, total // 3]
    biases = [None] * len(blocks) if bias is None else bias.split(blocks)
    parts = zip(product.split(blocks, -1), gain.split(blocks), biases, strict=True)
    done = [layer_norm(p, (n,), g, b) for n, (p, g, b) in zip(blocks, parts, strict=True)]
    return done[0] if lstm else torch.cat(done, -1)


def _projected(x: Tensor, w: Weights) -> Tensor:
    if w.norm_ih is None:
        return linear(x, w.ih, w.b_ih)
    return _normalised(linear(x, w.ih), w.norm_ih, w.b_ih, w.norm_c is not None)


def _recurrent(h: Tensor, w: Weights) -> Tensor:
    if w.norm_hh is not None:
        return _normalised(linear(_dropped(h, w), w.hh), w.norm_hh, w.b_hh, w.norm_c is not None)
    product = linear(_dropped(h, w), w.hh, w.b_hh)
    return product if w.beside is None else product + w.beside


def _lstm(gx: Tensor, state: State, w: Weights, update: Tensor | None = None) -> State:
    h, c = state
    i, f, g, o = (gx + _recurrent(h, w)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * _written(g.tanh(), update)
    seen = c if w.norm_c is None else layer_norm(c, c.shape[-1:], w.norm_c, w.norm_c_bias)
    h = o.sigmoid() * seen.tanh()
    return (h if w.hr is None else linear(h, w.hr)), c


def _gru(gx: Tensor, state: State, w: Weights, update: Tensor | None = None) -> State:
    (h,) = state
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = _recurrent(h, w).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = _written((xn + r * hn).tanh(), update)
    return ((1 - z) * n + z * h,)


def _gru_reset_before(gx: Tensor, state: State, w: Weights, update: Tensor | None = None) -> State:
    (h,) = state
    seen = _dropped(h, w)
    hidden = h.shape[-1]
    xr, xz, xn = gx.chunk(3, -1)
    b_gates, b_n = (None, None) if w.b_hh is None else (w.b_hh[: 2 * hidden], w.b_hh[2 * hidden :])
    hr, hz = linear(seen, w.hh[: 2 * hidden], b_gates).chunk(2, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = _written((xn + linear(r * seen, w.hh[2 * hidden :], b_n)).tanh(), update)
    return ((1 - z) * n + z * h,)


def _rnn_tanh(gx: Tensor, state: State, w: Weights, update: None = None) -> State:
    return ((gx + _recurrent(state[0], w)).tanh(),)


def _rnn_relu(gx: Tensor, state: State, w: Weights, update: None = None) -> State:
    return ((gx + _recurrent(state[0], w)).relu(),)


Step = Callable[..., State]  # (x W_ih' + b_ih [B, G*H], state, weights, update's mask or None) -> next state
STEPS: dict[str, Step] = {
    "lstm": _lstm, "gru": _gru, "gru_reset_before": _gru_reset_before, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu,
}  # fmt: skip


def _scan(
    step: Step, x: Tensor, state: State, w: Weights, mask: Tensor | None, begins: Tensor | None, masks: _Masks | None,
    reverse: bool,
) -> tuple[tuple[Tensor, ...], State]:  # fmt: skip
    """One direction over x [T, B, I]: (states of all steps [T, B, .], the final one). Masked steps keep it and give 0.

    begins [T, B, 1]: where a segment begins. Its first step starts from 0; in reverse the last one before it does.
    """
    gx = _projected(x, w).unbind(0)
    steps: list[State] = [()] * len(gx)
    for t in reversed(range(len(gx))) if reverse else range(len(gx)):
        begin = t + reverse
        if begins is not None and begin < len(gx):
            state = tuple(torch.where(begins[begin], 0.0, s) for s in state)
        update = None if masks is None or masks.update is None else masks.update[t]
        if mask is None:
            new = step(gx[t], state, w, update)
            steps[t] = state = new if masks is None else masks.held(t, state, new)
        else:
            m = mask[t]
            old = tuple(torch.where(m, s, 0.0) for s in state)
            new = step(gx[t], old, w, update)
            new = new if masks is None else masks.held(t, old, new)
            state = tuple(torch.where(m, n, s) for n, s in zip(new, state, strict=True))
            steps[t] = tuple(torch.where(m, n, 0.0) for n in new)
    return tuple(torch.stack(s) for s in zip(*steps, strict=True)), state


def _packed_layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parts: Sequence[Weights],
    batch_sizes: Tensor,
    reverses: tuple[bool, ...],
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Packed data through the padded layer: gather, run with lengths, gather back."""
    rows = torch.arange(int(batch_sizes[0]))
    valid = rows < batch_sizes[:, None]  # [T, B]
    place = (batch_sizes.cumsum(0) - batch_sizes)[:, None] + rows  # row b of step t lies at place[t, b]
    place = torch.where(valid, place, 0).to(x.device)
    update, hold_h, hold_c = (None if m is None else m[place] for m in extras[:3])
    extras = extras._replace(update=update, hold_h=hold_h, hold_c=hold_c)
    out, h_n, c_n, states = _layer(cell, x[place], h0, c0, parts, valid.sum(0), None, None, False, reverses, extras)
    back = valid.flatten().nonzero()[:, 0].to(x.device)
    return out.flatten(0, 1)[back], h_n, c_n, None if states is None else states.flatten(0, 1)[back]


def _initial(cell: str, h0: Tensor | None, c0: Tensor | None, w: Weights, x: Tensor) -> State:
    """The state before the first step of x [B, ·]; zeros where none is given."""
    h = x.new_zeros(x.shape[0], w.hh.shape[1]) if h0 is None else wide(h0)
    if cell != "lstm":
        return (h,)
    return h, x.new_zeros(x.shape[0], w.hh.shape[0] // 4) if c0 is None else wide(c0)


def _state_dtype(h0: Tensor | None, x: Tensor) -> torch.dtype:
    """States come back in the dtype they came in."""
    return x.dtype if h0 is None else h0.dtype


def wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
