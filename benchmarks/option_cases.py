"""Calls of a layer with one of fastseq's options, which torch.nn's layers have not."""

from dataclasses import dataclass
from typing import Any

from .cases import LayerCase, named

__all__ = ["LACKS", "OPTIONS", "OptionCase"]

OPTIONS: dict[str, dict[str, Any]] = {  # the module's arguments
    "": {},
    "zoneout": {"zoneout": 0.1},
    "state_dropout": {"recurrent_dropout": 0.2},
    "update_dropout": {"recurrent_dropout": 0.2, "recurrent_dropout_on": "update"},
    "learned_state": {"learn_state": True},
    "cell_states": {},  # by `forward_states`
    "resets": {},  # an argument of the call
    "layer_norm": {"layer_norm": True},
}
LACKS: dict[str, set[str]] = {"gru": {"cell_states"}, "rnn_tanh": {"cell_states", "update_dropout", "layer_norm"}}


@dataclass(frozen=True)
class OptionCase(LayerCase):
    """One layer in training mode, which draws its masks; mode "forward" records no gradients. option "": none."""

    kind = "options"
    option: str = ""  # of OPTIONS

    def __str__(self) -> str:
        return named(super().__str__(), self.option or "plain")
