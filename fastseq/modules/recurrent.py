"""What fastseq's layers have beyond torch.nn's: options of the recurrence, a learned first state, a backend."""

from numbers import Real
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends.call import Results, RnnCall
from ..config import described
from ..dispatch import check_name, check_options
from ..engine import run
from ..errors import InputError, with_article
from ..functional import Lengths
from ..ops.extras import Noise
from .norm import add_norms, norms_of, reset_norms

__all__ = ["Recurrent", "backend_repr", "first_state", "noise_of"]


class Recurrent(nn.Module):
    """Goes before torch.nn's class among the bases. Instances made by torch.nn itself have the class's defaults."""

    ARGUMENTS: ClassVar[dict[str, Any]] = {
        "input_size": int, "hidden_size": int, "num_layers": int, "bias": bool, "batch_first": bool, "dropout": float,
        "bidirectional": bool, "zoneout": float | tuple[float, float], "recurrent_dropout": float,
        "recurrent_dropout_on": str, "learn_state": bool, "layer_norm": bool, "backend": str,
    }  # fmt: skip
    backend: str = "auto"
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    recurrent_dropout_on: str = "state"
    learn_state: bool = False
    layer_norm: bool = False

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_on: str = "state",
        learn_state: bool = False,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        check_name(backend)
        for name, flag in (("learn_state", learn_state), ("layer_norm", layer_norm)):
            if not isinstance(flag, bool):
                raise InputError(f"{name}={flag!r}; use True or False")
        super().__init__(*args, **kwargs)
        self.backend = backend
        zoneout = (*zoneout,) if isinstance(zoneout, list) else zoneout  # as a file has it
        for name, value in (
            ("zoneout", zoneout), ("recurrent_dropout", recurrent_dropout),
            ("recurrent_dropout_on", recurrent_dropout_on), ("learn_state", learn_state), ("layer_norm", layer_norm),
        ):  # fmt: skip
            if value != getattr(type(self), name):
                setattr(self, name, value)
        noise = _noise(self)  # raises for what no call could be made with
        if not any(noise.zoneout):
            self.zoneout = 0.0  # of a pair of zeros
        if layer_norm:
            add_norms(self)
        if learn_state:
            base: Any = self
            rows = base.num_layers * (2 if base.bidirectional else 1)
            like = base.weight_hh_l0
            self.initial_h = nn.Parameter(like.new_zeros(rows, like.shape[1]))
            if isinstance(self, nn.LSTM):
                self.initial_c = nn.Parameter(like.new_zeros(rows, base.hidden_size))
        if backend != "auto":
            self._check_backend(noise if any(noise.zoneout) else None)  # of dropout alone, evaluation is without noise

    def _check_backend(self, noise: Noise | None) -> None:
        """InputError where the backend can run no call of this layer."""
        base: Any = self
        call = RnnCall(
            self._cell, base.weight_hh_l0.new_empty(1, 1, base.input_size), None, None, list(base._flat_weights),
            has_bias=base.bias, num_layers=base.num_layers, bidirectional=base.bidirectional,
            proj_size=base.proj_size, noise=noise, norms=norms_of(base),
        )  # fmt: skip
        check_options(call, self.backend)

    @property
    def _cell(self) -> str:
        """What its calls name as their cell."""
        mode: str = self.mode.lower()  # type: ignore[operator, union-attr]
        return mode

    def reset_parameters(self) -> None:
        """torch.nn's draws; a learned first state begins at 0, gains of layer normalisation at 1."""
        super().reset_parameters()  # type: ignore[misc]
        reset_norms(self)
        if self.learn_state:
            for name in ("initial_h", "initial_c"):
                if name in self._parameters:
                    nn.init.zeros_(getattr(self, name))

    def _run(self, call: RnnCall, lengths: Lengths, resets: Tensor | None) -> Results:
        if resets is not None and self.learn_state:
            raise InputError(
                "resets with learn_state=True: a segment would begin from zeros, not from the learned state; cut the "
                "rows where segments begin and pass lengths=, or build the layer without learn_state"
            )
        return run(call, self.backend, lengths, resets)

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data."""
        return described(self)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("zoneout", "recurrent_dropout", "recurrent_dropout_on", "learn_state", "layer_norm"):
            if getattr(self, name) != getattr(Recurrent, name):
                text += f", {name}={getattr(self, name)!r}"
        return text + backend_repr(self)


def noise_of(module: nn.RNNBase) -> Noise | None:
    """The masks that a call of `module` draws now; None where there are none, as in a module of torch.nn."""
    if not isinstance(module, Recurrent) or not (module.zoneout or module.recurrent_dropout):
        return None
    noise = _noise(module)
    return noise if any(noise.zoneout) or (module.training and noise.dropout) else None


def _noise(module: Any) -> Noise:
    """The module's options as they are now. Raises InputError for what none can be."""
    given, cell, kind = module.zoneout, module.mode.lower(), type(module).__name__
    zoneout = tuple(given) if isinstance(given, (tuple, list)) else (given, given if cell == "lstm" else 0.0)
    if len(zoneout) != 2 or (cell != "lstm" and zoneout[1]):
        either = ", or (of h, of c)" if cell == "lstm" else ""
        raise InputError(f"zoneout={given!r} of {kind}; pass a probability{either}")
    given = (("zoneout", zoneout[0]), ("zoneout", zoneout[1]), ("recurrent_dropout", module.recurrent_dropout))
    for name, p in given:
        if not isinstance(p, Real):
            raise InputError(
                f"{name}={p!r} is {with_article(type(p).__name__)}; it is a probability, a float from 0 to below 1"
            )
        if not 0 <= float(p) < 1:
            raise InputError(f"{name}={p}; it is a probability, 0 to below 1")
    h, c, dropout = (float(p) for _, p in given)
    noise = Noise((h, c), dropout, module.recurrent_dropout_on)
    if noise.on not in ("state", "update"):
        raise InputError(f"recurrent_dropout_on={noise.on!r}; use 'state' (Gal 2016) or 'update' (Semeniuta 2016)")
    if noise.dropout and noise.on == "update" and cell.startswith("rnn"):
        raise InputError(f"recurrent_dropout_on='update' of {kind}, which writes its whole state; use 'state'")
    return noise


def first_state(module: Any, input: Any) -> Any:
    """hx where none is given: None, or what `module` has learned, for each row."""
    if not getattr(module, "learn_state", False):
        return None
    rows: Any = ()
    if isinstance(input, PackedSequence):
        rows = (int(input.batch_sizes[0]),)
    elif isinstance(input, Tensor) and input.dim() == 3:
        rows = (input.shape[0 if module.batch_first else 1],)
    states = [getattr(module, name) for name in ("initial_h", "initial_c") if hasattr(module, name)]
    if not states:
        raise InputError(
            "learn_state=True set later, but it has parameters of its own, which are made when the layer is built:"
            f" build one with learn_state=True, such as fastseq.{type(module).__name__}(..., learn_state=True)"
        )
    if rows:
        states = [s.unsqueeze(1).expand(s.shape[0], *rows, s.shape[1]).contiguous() for s in states]
    return tuple(states) if len(states) == 2 else states[0]


def backend_repr(module: Any) -> str:
    """What a module's repr says of its backend: nothing while it is auto."""
    return "" if module.backend == "auto" else f", backend={module.backend!r}"
