"""fastseq.LSTMCell, fastseq.GRUCell and fastseq.RNNCell: torch.nn's cells with another forward."""

from typing import Any, overload

from torch import Tensor, device, dtype, nn

from ..backends.call import RnnCall
from ..dispatch import check_name
from ..engine import run_cell
from ..errors import InputError
from ..functional import state_pair
from .frozen import frozen
from .modes import serves_modes
from .recurrent import backend_repr

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "gru_cell_call", "lstm_cell_call", "rnn_cell_call"]


def lstm_cell_call(module: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    h0, c0 = state_pair(hx)
    return RnnCall("lstm", input, h0, c0, _weights(module), has_bias=module.bias, frozen=frozen(module))


def gru_cell_call(module: nn.GRUCell, input: Tensor, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return RnnCall("gru", input, hx, None, _weights(module), has_bias=module.bias, frozen=frozen(module))


def rnn_cell_call(module: nn.RNNCell, input: Tensor, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return RnnCall(
        f"rnn_{module.nonlinearity}", input, hx, None, _weights(module), has_bias=module.bias, frozen=frozen(module)
    )


def _weights(module: nn.RNNCellBase) -> list[Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]
    except KeyError:  # parametrized
        return [getattr(module, name) for name in names]


class _Cell(nn.Module):
    """Goes before torch.nn's class among the bases. Instances made by torch.nn itself have the class's default."""

    backend: str = "auto"

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + backend_repr(self)


@serves_modes
class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell, faster: the same arguments, parameters and results. backend as for `fastseq.LSTM`."""

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next (h, c) [B, H] of input [B, I] and hx (h, c) [B, H]; all without B for one row."""
        return run_cell(lstm_cell_call(self, input, hx), self.backend)  # type: ignore[return-value]


@serves_modes
class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell, faster: the same arguments, parameters and results. backend as for `fastseq.LSTM`."""

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h [B, H] of input [B, I] and hx [B, H]; all without B for one row."""
        return run_cell(gru_cell_call(self, input, hx), self.backend)[0]


@serves_modes
class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell, faster: the same arguments, parameters and results. backend as for `fastseq.LSTM`."""

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = ...,
        nonlinearity: str = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.nonlinearity not in ("tanh", "relu"):
            raise InputError(f"nonlinearity={self.nonlinearity!r}; use 'tanh' or 'relu'")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h [B, H] of input [B, I] and hx [B, H]; all without B for one row."""
        return run_cell(rnn_cell_call(self, input, hx), self.backend)[0]
