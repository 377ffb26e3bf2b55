"""Masks of a layer's steps within kernels, from fastseq/ops/extras.py's `Extras`."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastseq.ops.extras import Extras

__all__ = ["SILENT", "Masks", "held_c", "held_h", "masked", "masked_backward", "step_back", "stepped", "update_of"]


class Masks(NamedTuple):
    """One argument of a kernel. Masks are uint8 and lie as `out`, [tokens, D, H]. What is None is left out of the code.

    The numbers are the run's: other rates are no other compilation.
    """

    update: Any  # where 0, what a step would write is dropped
    scale: Any  # of what is not, with such a mask
    hold_h: Any  # where 1, h stays
    share_h: Any  # without such a mask, the share of h that stays
    hold_c: Any  # the same of c
    share_c: Any

    @classmethod
    def of(cls, extras: Extras) -> "Masks | None":
        """None where they would do nothing."""
        scale, share_h, share_c = map(float, extras.rates)  # of a whole number Triton would compile for the value
        update, hold_h, hold_c, _ = extras[:4]
        masks = cls(update, None if update is None else scale, hold_h, share_h or None, hold_c, share_c or None)
        return None if all(field is None for field in masks) else masks

    @property
    def of_h(self) -> bool:
        """Whether some of h stays from step to step."""
        return self.hold_h is not None or self.share_h is not None

    @property
    def of_c(self) -> bool:
        """Whether some of c does."""
        return self.hold_c is not None or self.share_c is not None


SILENT = Masks(None, None, None, None, None, None)


@triton.jit
def masked(CELL: tl.constexpr, pre, h, c, masks, at, there):
    """Any cell's forward under masks. at: where the tile lies in `out`; there: what of it exists."""
    new_h, new_c, saved = stepped(CELL, pre, h, c, masks, at, there)
    return held_h(h, new_h, masks, at, there), held_c(c, new_c, masks, at, there), saved


@triton.jit
def stepped(CELL: tl.constexpr, pre, h, c, masks, at, there):
    """The same before anything is held."""
    update = None
    if masks.update is not None:
        update = update_of(masks, at, there)
    return CELL(pre, h, c, update)


@triton.jit
def held_h(old, new, masks, at, there):
    """`new`, but for what stays of h; from a gradient and 0, what of it goes past the step."""
    if (masks.hold_h is not None) or (masks.share_h is not None):
        new = _mixed(old, new, masks.hold_h, masks.share_h, at, there)
    return new


@triton.jit
def held_c(old, new, masks, at, there):
    """The same of c."""
    if (masks.hold_c is not None) or (masks.share_c is not None):
        new = _mixed(old, new, masks.hold_c, masks.share_c, at, there)
    return new


@triton.jit
def update_of(masks, at, there):
    """What multiplies what a step writes, where there is such a mask."""
    return tl.load(masks.update + at, there, 0).to(tl.float32) * masks.scale


@triton.jit
def masked_backward(CELL: tl.constexpr, CELL_STATE: tl.constexpr, saved, before, after, dh, carry, masks, at, there):
    """Its backward: (the columns' gradients, carry, kept); kept adds to dL/dh beside gates and carry.

    after: the state that came out of `masked`.
    """
    update = None
    if masks.update is not None:
        update = update_of(masks, at, there)
    if not CELL_STATE:
        dh = dh + carry
        carry = tl.zeros_like(carry)
    kept = held_h(dh, tl.zeros_like(dh), masks, at, there)
    dh = dh - kept
    if (masks.hold_c is not None) or (masks.share_c is not None):
        held = held_c(carry, tl.zeros_like(carry), masks, at, there)
        d_pre, carry = CELL(saved, before, None, dh, carry - held, update)  # the cell's own c' is not `after`
        carry += held
    else:
        d_pre, carry = CELL(saved, before, after, dh, carry, update)
    return d_pre, carry, kept


@triton.jit
def _mixed(old, new, hold, share, at, there):
    """`new`, but for what stays of `old`."""
    if hold is not None:
        mixed = tl.where(tl.load(hold + at, there, 0) != 0, old, new)
    else:
        mixed = share * old + (1 - share) * new
    return mixed


@triton.jit
def step_back(dh, new_dh, carry, new_carry, active, recurrent, at, there, MASKED: tl.constexpr):
    """(dL/dh, carry) before a step, in the rows where there is one. new_dh: through W_hh, which multiplied `recurrent`
    times h, at `at` where `there`. MASKED: in those rows dh is by now what masks keep.
    """
    if recurrent is not None:
        new_dh *= tl.load(recurrent + at, there, 0.0).to(tl.float32)  # kept from step to step it would take registers
    if MASKED:
        dh += tl.where(active[:, None], new_dh, 0.0)
    else:
        dh = tl.where(active[:, None], new_dh, dh)
    return dh, tl.where(active[:, None], new_carry, carry)
