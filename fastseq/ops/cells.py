"""The recurrent cells as every backend's drivers know them; element math: csrc/cells.h, kernels/cells.py."""

from typing import NamedTuple

__all__ = ["CELLS", "Columns"]


class Columns(NamedTuple):
    """A cell of csrc/cells.h, which says what columns are; its gates are blocks of H rows of W_ih and W_hh."""

    number: int  # in the native modules
    gates: int
    columns: int
    INPUT: tuple[int, ...]  # of each column the gate of W_ih that adds to it; -1: none
    HIDDEN: tuple[int, ...]  # the same of W_hh
    cell_state: bool  # c beside h

    @property
    def PLACE(self) -> tuple[int, ...]:
        """Where gradients of the columns are stored: those of the input product come first, in its gates' order."""
        free = iter(range(self.gates, self.columns))
        return tuple(gate if gate >= 0 else next(free) for gate in self.INPUT)


CELLS = {
    "lstm": Columns(0, 4, 4, (0, 1, 2, 3), (0, 1, 2, 3), True),
    "gru": Columns(1, 3, 4, (0, 1, -1, 2), (0, 1, 2, -1), False),
    "gru_reset_before": Columns(2, 3, 3, (0, 1, 2), (0, 1, 2), False),
    "rnn_tanh": Columns(3, 1, 1, (0,), (0,), False),
    "rnn_relu": Columns(4, 1, 1, (0,), (0,), False),
}
