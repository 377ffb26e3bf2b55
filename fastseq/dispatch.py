"""Which backend runs a call. `backend=` runs or raises; `auto` takes the first of `crossover` that can."""

import importlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from . import _triton
from ._cpus import cpu_name
from ._gpus import gpu_name
from .backends.call import RnnCall
from .backends.decoder_call import AttentionCall, DecoderCall
from .crossover import ANY, DEFAULT, RULES, Rule
from .cuda import native
from .errors import InputError

__all__ = ["BACKENDS", "Call", "backends", "candidates", "choose", "forced", "load", "obstacle", "use_backend"]

Call = RnnCall | DecoderCall | AttentionCall


class Operator(NamedTuple):
    """What runs the calls that name it as their OPERATOR."""

    title: str
    modules: dict[str, str]  # by backend, the module in fastseq.backends; a backend not named has no such operator
    refuses: str = "refuses"  # the modules' name for why they cannot run a call


_LAYERS = {"cpu": "cpu", "triton": "triton", "cuda": "cuda", "torch": "stock", "reference": "reference"}
_DECODERS = {
    "cpu": "decoder_cpu",
    "triton": "decoder_triton",
    "cuda": "decoder_cuda",
    "reference": "decoder_reference",
}
_ATTENTIONS = {name: module for name, module in _DECODERS.items() if name != "cuda"}
OPERATORS = {
    "rnn": Operator("recurrent layer", _LAYERS),
    "decoder": Operator("attention decoder", _DECODERS),
    "attention": Operator("attention of several queries", _ATTENTIONS, "refuses_attention"),
}
BACKENDS = tuple(OPERATORS["rnn"].modules)
_MODULES = tuple({module for operator in OPERATORS.values() for module in operator.modules.values()})

_forced: ContextVar[str | None] = ContextVar("fastseq_backend", default=None)


def forced() -> str | None:
    """What `auto` stands for here and now: a backend's name, or None."""
    return _forced.get()


class use_backend:
    """Within the block, calls whose `backend` is "auto" run on `name`, or raise InputError where it cannot.

    >>> with fastseq.use_backend("reference"):
    ...     model(x)

    Holds for this thread or task only; blocks nest. An explicit `backend=` of a module or call goes first.
    What torch.compile traced keeps the choice that held while it was traced.
    """

    __slots__ = ("_name", "_tokens")

    def __init__(self, name: str) -> None:
        self._name = None if check_name(name) == "auto" else name
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_forced.set(self._name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _forced.reset(self._tokens.pop())


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where this machine can run it and the reason where it cannot."""
    return {name: load(name).unavailable() for name in BACKENDS}


def check_name(name: str) -> str:
    """`name` if it is "auto" or a backend's; otherwise raise."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str, got {type(name).__name__}; use one of {_names()}")
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown backend={name!r}; use one of {_names()}")
    return name


def load(name: str, operator: str = "rnn") -> ModuleType:
    """The backend's module for this operator, imported on first use."""
    module = OPERATORS[operator].modules[name]
    _import(_MODULES if torch.compiler.is_compiling() else (module,))  # Dynamo looks into _loaded only once
    return _loaded[module]


_loaded: dict[str, ModuleType] = {}


def _import(modules: tuple[str, ...]) -> bool:
    for name in modules:
        if name not in _loaded:
            _loaded[name] = importlib.import_module(f"fastseq.backends.{name}")
    return True


def _threads() -> int:
    return torch.get_num_threads()


for _constant in (
    forced,
    _import,
    _threads,
    cpu_name,
    gpu_name,
    _triton.interprets,
    _triton.unavailable,
    native.emulates,
    native.unavailable,
):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010  (torch.compile asks once, while it traces)


def obstacle(name: str, call: Call) -> str | None:
    """Why backend `name` cannot run `call`; None: it can."""
    operator = OPERATORS[call.OPERATOR]
    if name not in operator.modules:
        return f"{name} has no {operator.title}"
    backend = load(name, call.OPERATOR)
    reason: str | None = backend.unavailable() or getattr(backend, operator.refuses)(call)
    return reason


def choose(call: Call, backend: str) -> ModuleType:
    """The backend that runs `call`: `backend` itself, or `auto`'s choice."""
    if backend != "auto":
        reason = obstacle(check_name(backend), call)
        if reason is not None:
            raise _refusal(backend, call, reason)
        return load(backend, call.OPERATOR)
    for name, _ in candidates(call):
        if obstacle(name, call) is None:
            return load(name, call.OPERATOR)
    raise AssertionError("the reference refuses nothing")


def check_options(call: RnnCall, backend: str) -> None:
    """Raise InputError as `choose` would where `backend` runs no call of such a layer, whatever its input."""
    if backend != "auto" and (reason := load(backend).never(call)) is not None:
        raise _refusal(backend, call, reason)


def _refusal(backend: str, call: Call, reason: str) -> InputError:
    able = [name for name in BACKENDS if obstacle(name, call) is None]
    return InputError(f"backend={backend!r} cannot run this call: {reason}; use 'auto' or one of {able}")


def candidates(call: Call) -> Iterator[tuple[str, str]]:
    """(name, why) in `auto`'s order of preference; a name may come twice."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._get_tracing_state() is not None:
        yield "torch", "torch.jit traces PyTorch's operators only"
    transformed = not compiling and torch._C._functorch.peek_interpreter_stack() is not None
    for rule in RULES:
        if fits(rule, call) and not (transformed and rule.backend == "torch"):
            yield rule.backend, rule.because
    for name in DEFAULT:
        if not (transformed and name == "torch"):  # its operators have no batching rule
            yield name, "first that can run the call"


def fits(rule: Rule, call: Call) -> bool:
    """Whether `call` is within all bounds of `rule`."""
    if rule.operator != call.OPERATOR or str(call.dtype).removeprefix("torch.") not in rule.dtypes:
        return False
    if rule.device is not None and rule.device != call.device.type:
        return False
    if rule.machine is not None and rule.machine != _machine(call.device):
        return False
    if rule.grad is not None and rule.grad != torch.is_grad_enabled():
        return False
    if isinstance(call, RnnCall):
        if call.cell not in rule.cells:
            return False
        if rule.lengths is not None and rule.lengths == (call.lengths is None and call.batch_sizes is None):
            return False
        if rule.packed is not None and rule.packed == (call.batch_sizes is None):
            return False
    if not rule.hidden[0] <= call.hidden_size < rule.hidden[1]:
        return False
    if not rule.threads[0] <= _threads() < rule.threads[1]:
        return False
    if rule.batch == ANY and rule.steps == ANY:
        return True
    if torch.compiler.is_compiling():
        return False
    return rule.batch[0] <= call.batch < rule.batch[1] and rule.steps[0] <= call.steps < rule.steps[1]


def _machine(device: torch.device) -> str:
    return gpu_name(device.index) if device.type == "cuda" else cpu_name()


def _names() -> list[str]:
    return ["auto", *BACKENDS]
