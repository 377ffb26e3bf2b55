"""A call of every kind of module that the kernels run, for what a test asks of all of them alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastseq

__all__ = ["KINDS", "Kind", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Those of weights choose the kernels; `most` is more than one program holds."""

    T: int = 3
    B: int = 4
    S: int = 5
    I: int = 6  # noqa: E741  (the project's letter)
    H: int = 8
    D: int = 7
    most: int = 40


@dataclass
class Kind:
    """A module, its inputs by name, and how one is called with the others."""

    module: nn.Module
    inputs: dict[str, Tensor]
    call: Callable[[Any, Mapping[str, Tensor]], Any]

    @classmethod
    def of(cls, name: str, sizes: Sizes, device: str = "cpu", backend: str = "triton") -> "Kind":
        """One of KINDS, the same each time, on `device`; inputs of floating point require gradients."""
        torch.manual_seed(5)
        build, of_inputs, call = _KINDS[name]
        module = build(sizes, backend).to(device)
        inputs = {n: t.to(device) for n, t in of_inputs(sizes).items()}
        for t in inputs.values():
            t.requires_grad_(t.is_floating_point())
        return cls(module, inputs, call)

    def results(self, **others: Tensor) -> list[Tensor]:
        """What the call gives, `others` in the place of inputs of these names."""
        found = tree_leaves(self.call(self.module, self.inputs | others))
        return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]

    def step(self) -> list[Tensor]:
        """Results, then the gradients of inputs and parameters, none of which is left behind: of a training step.

        Masks of noise are those of one seed.
        """
        torch.manual_seed(7)
        found, leaves = self.results(), self.leaves
        try:
            torch.autograd.backward(found, [t.detach().cos() for t in found])
            return [*(t.detach() for t in found), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]
        finally:
            self.forget()

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (*self.inputs.values(), *self.module.parameters()) if t.requires_grad]

    def forget(self) -> None:
        for t in self.leaves:
            t.grad = None


Inputs = Mapping[str, Tensor]


def _layer(name: str, **options: Any) -> Callable[[Sizes, str], nn.Module]:
    def build(of: Sizes, backend: str) -> nn.Module:
        made: nn.Module = getattr(fastseq, name)(of.I, of.H, backend=backend, **options)
        return made

    return build


def _large(name: str, **options: Any) -> Callable[[Sizes, str], nn.Module]:
    def build(of: Sizes, backend: str) -> nn.Module:
        made: nn.Module = getattr(fastseq, name)(of.I, of.most, backend=backend, **options)
        return made

    return build


def _attention(score: str) -> Callable[[Sizes, str], nn.Module]:
    units = {"attn_size": 6} if score == "additive" else {}
    return lambda of, backend: fastseq.Attention(of.H, of.D, score=score, backend=backend, **units)


def _decoder(preset: str, **options: Any) -> Callable[[Sizes, str], nn.Module]:
    def build(of: Sizes, backend: str) -> nn.Module:
        made: nn.Module = getattr(fastseq.Decoder, preset)(
            of.I, of.H, memory_size=of.D, bridge="zero", backend=backend, **options
        )
        return made

    return build


def _sequence(of: Sizes) -> dict[str, Tensor]:
    lengths = torch.arange(of.B) % (of.T + 1)
    return {"x": torch.randn(of.T, of.B, of.I), "lengths": lengths.flip(0)}


def _with_state(of: Sizes) -> dict[str, Tensor]:
    """Of both directions."""
    return _sequence(of) | {name: torch.randn(2, of.B, of.H) for name in "hc"}


def _tokens(of: Sizes) -> dict[str, Tensor]:
    return {"x": torch.randn(2 * of.B - 1, of.I)}


def _resets(of: Sizes) -> dict[str, Tensor]:
    return {"x": torch.randn(of.T, of.B, of.I), "resets": torch.rand(of.T, of.B) < 0.5}


def _one(of: Sizes) -> dict[str, Tensor]:
    return {"x": torch.randn(of.B, of.I), "h": torch.randn(of.B, of.H), "c": torch.randn(of.B, of.H)}


def _source(of: Sizes) -> dict[str, Tensor]:
    mask = torch.rand(of.B, of.S) < 0.7
    mask[0] = False
    return {"memory": torch.randn(of.B, of.S, of.D), "mask": mask}


def _queries(of: Sizes) -> dict[str, Tensor]:
    return {"query": torch.randn(of.B, of.T, of.H), **_source(of)}


def _targets(of: Sizes) -> dict[str, Tensor]:
    return {"y": torch.randn(of.B, of.T, of.I), **_source(of)}


def _targets_with_state(of: Sizes) -> dict[str, Tensor]:
    return _targets(of) | {name: torch.randn(of.B, of.H) for name in ("h", "c", "fed")}


def _of_lengths(module: Any, of: Inputs) -> Any:
    return module(of["x"], lengths=of["lengths"])


def _packed(module: Any, of: Inputs) -> Any:
    """Of two steps, the second one without the last row."""
    rows = (len(of["x"]) + 1) // 2
    sizes = pack_padded_sequence(torch.empty(2, rows, 1), torch.tensor([2] * (rows - 1) + [1])).batch_sizes
    out, state = module(PackedSequence(of["x"], sizes))
    return out.data, state


def _asks(module: Any, of: Inputs) -> Any:
    return module(of["query"], module.prepare(fastseq.Memory(of["memory"], of["mask"])), need_weights=True)


def _decodes(module: Any, of: Inputs) -> Any:
    state = None
    if "fed" in of:
        state = fastseq.DecoderState(((of["h"], of["c"]), (of["c"], of["h"])), of["fed"])
    found = module(of["y"], fastseq.Memory(of["memory"], of["mask"]), state, need_weights=True)
    return found.output, found.weights, [list(layer) for layer in found.state.layers]


NOISE: dict[str, Any] = {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.4}
_KINDS: dict[str, tuple[Callable[[Sizes, str], nn.Module], Callable[[Sizes], dict[str, Tensor]], Any]] = {
    "lstm": (
        _layer("LSTM", bidirectional=True), _with_state,
        lambda m, of: m(of["x"], (of["h"], of["c"]), lengths=of["lengths"]),
    ),
    "lstm, packed": (_layer("LSTM", num_layers=2), _tokens, _packed),
    "lstm, step by step": (_large("LSTM"), _sequence, _of_lengths),
    "lstm, noise": (_layer("LSTM", **NOISE), _sequence, _of_lengths),
    "lstm, every state": (_layer("LSTM"), _sequence, lambda m, of: m.forward_states(of["x"], lengths=of["lengths"])),
    "gru": (_layer("GRU", batch_first=True), _sequence, lambda m, of: m(of["x"].transpose(0, 1))),
    "gru, step by step": (_large("GRU", bidirectional=True), _sequence, _of_lengths),
    "gru, resets": (_layer("GRU"), _resets, lambda m, of: m(of["x"], resets=of["resets"])),
    "norm": (_layer("GRU", layer_norm=True), _sequence, _of_lengths),
    "norm, step by step": (_large("LSTM", layer_norm=True), _sequence, _of_lengths),
    "lstm cell": (_layer("LSTMCell"), _one, lambda m, of: m(of["x"], (of["h"], of["c"]))),
    "gru cell": (_layer("GRUCell"), _one, lambda m, of: m(of["x"], of["h"])),
    "one step": (_layer("LSTM"), _sequence, lambda m, of: m(of["x"][:1])),
    "attention, additive": (_attention("additive"), _queries, _asks),
    "attention, general": (_attention("general"), _queries, _asks),
    "luong": (_decoder("luong", num_layers=2), _targets_with_state, _decodes),
    "bahdanau": (_decoder("bahdanau"), _targets, _decodes),
    "gnmt": (_decoder("gnmt", num_layers=3), _targets, _decodes),
}  # fmt: skip
KINDS = tuple(_KINDS)
