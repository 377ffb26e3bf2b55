"""What a layer's operator is asked for beyond torch.nn's: random masks within the recurrence, and every cell state.

Masks are drawn by torch's generator, outside the operators, so that every backend sees the same ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from .common import is_direct

__all__ = ["NONE", "Extras", "Noise"]


class Extras(NamedTuple):
    """Of one layer. Masks over steps are bool and in out's layout: [T, B, D*H], [B, T, D*H] or packed [N, D*H]."""

    update: Tensor | None = None  # where False, what a step would write is dropped; where True, scaled by rates[0]
    hold_h: Tensor | None = None  # where True, a step keeps the unit's h of before; None: the share rates[1] of it
    hold_c: Tensor | None = None  # the same of c, rates[2]; for a cell without c always None
    recurrent: Tensor | None = None  # [D, B, H] in x's dtype: multiplies h on its way into W_hh, at every step
    rates: tuple[float, float, float] = (1.0, 0.0, 0.0)
    states: bool = False  # c of every step is a result too, in out's layout and dtype

    @property
    def masks(self) -> list[Tensor | None]:
        """As the operators' schemas take them; [] where there is nothing to do."""
        masks = [self.update, self.hold_h, self.hold_c, self.recurrent]
        return [] if self.silent else masks

    @property
    def silent(self) -> bool:
        """Whether the recurrence is that of torch.nn."""
        still = self.update is self.hold_h is self.hold_c is self.recurrent is None  # `tensor == None` takes 15 us
        return still and self.rates == (1.0, 0.0, 0.0)

    def direction(self, d: int, hidden: int) -> "Extras":
        """Direction d's share, of views; hidden: units of h and c."""
        if self.silent:
            return self
        update, hold_h, hold_c = (None if m is None else m[..., d * hidden : (d + 1) * hidden] for m in self[:3])
        recurrent = None if self.recurrent is None else self.recurrent[d : d + 1]
        return Extras(update, hold_h, hold_c, recurrent, self.rates, self.states)

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], rates: Sequence[float], states: bool) -> "Extras":
        """From the arguments of a schema."""
        if not masks:
            return cls(states=states)
        update, hold_h, hold_c, recurrent = masks
        scale, h, c = rates
        return cls(update, hold_h, hold_c, recurrent, (scale, h, c), states)


NONE = Extras()
_peek = torch._C._functorch.peek_interpreter_stack


@dataclass(frozen=True, slots=True)
class Noise:
    """The options of a module that draws masks: what Krueger et al. 2016, Gal and Ghahramani 2016 and Semeniuta et al.
    2016 do to a recurrence. In evaluation zoneout mixes states in proportion, and nothing else is left of them.
    """

    zoneout: tuple[float, float] = (0.0, 0.0)  # of h, of c
    dropout: float = 0.0
    on: str = "state"  # "state": h before W_hh, one mask a sequence; "update": what a step writes, one a step

    def drawn(
        self,
        x: Tensor,  # a layer's input, as `RnnCall` has it
        rows: int,
        directions: int,
        hidden: int,
        state: int,  # units of h: hidden, or the projection's
        cell_state: bool,
        training: bool,
        states: bool,  # of `Extras`
    ) -> Extras:
        """One layer's masks."""
        kept_h, kept_c = self.zoneout

        def mask(p: float, units: int) -> Tensor | None:
            return _flags(p, (*x.shape[:-1], directions * units), x) if training and p else None

        update = recurrent = None
        if training and self.dropout:
            kept = 1.0 - self.dropout
            if self.on == "update":
                update = mask(kept, hidden)
            else:
                recurrent = _flags(kept, (directions, rows, state), x).to(x.dtype).div_(kept)
        scale = 1.0 if update is None else 1.0 / (1.0 - self.dropout)
        hold_h, hold_c = mask(kept_h, state), mask(kept_c, hidden) if cell_state else None
        rates = (scale, 0.0 if training else kept_h, 0.0 if training or not cell_state else kept_c)
        return Extras(update, hold_h, hold_c, recurrent, rates, states)


def _flags(p: float, shape: Sequence[int], x: Tensor) -> Tensor:
    """bool on x's device, True with probability p.

    On a CPU torch's bernoulli_ takes 8 ns a flag of one core and torch.rand 3 (Zen 4), too much beside a layer; the
    native module, seeded by torch's generator, 0.1, on all threads: 16 random bits below a bound, p to within 2^-17.
    """
    unseen = is_direct((x,)) and _peek() is None and torch._C._get_tracing_state() is None  # nobody records the calls
    if _native.C is not None and x.device.type == "cpu" and unseen:
        flags = torch.empty(shape, dtype=torch.bool, device=x.device)
        seed, bound = int(torch.randint(1 << 62, (), device=x.device)), min(round(p * 65536), 65535)
        _native.C.random_flags(seed, math.prod(shape), bound, flags.data_ptr(), torch.get_num_threads())
        return flags
    return torch.rand(shape, device=x.device) < p
