"""What the tests of toolkits share: every toolkit's decoder with its conversion, and problems put to both.

Gradients are by the inputs, the encoder's result and the toolkit's parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.spec import DecoderOutput, DropoutMasks, LayerState, Memory
from tests import toolkit_weights as weights
from tests import toolkits
from tests.oracle import Results, compare, largest
from tests.toolkit_joeynmt import Joey
from tests.toolkit_weights import Converted
from tests.toolkits import Sizes

__all__ = ["KITS", "SIZES", "Kit", "Problem", "Step", "check_exactly", "named", "run"]

ROUNDING = 1e-12  # of the largest value, in float64: thousands of units in the last place, far below any other formula


@dataclass(frozen=True)
class Kit:
    """A toolkit's decoder."""

    make: Callable[[Sizes], nn.Module]
    convert: Callable[[dict[str, Tensor]], Converted]
    fit: Callable[[Sizes], Sizes] = field(default=lambda n: n)  # to the sizes that the toolkit allows
    state: Callable[[Sizes], list[int]] = field(default=lambda n: [n.H] * n.L)  # features of the encoder's state
    leaves: int = 2  # (h, c), or h alone
    prefix: str = ""  # of the decoder's parameters
    dropouts: tuple[str, ...] = ()
    masks: tuple[str, ...] = ("none", "prefix")  # "holes": any positions, one of them at least


def opennmt(cell: str, score: str, feed: bool = True, bridge: bool = False) -> Kit:
    """With a bridge H is even: two directions of the encoder."""
    dropouts = ("layers", "output") if feed else ("output",)  # without feeding, those between layers are torch's own
    make = partial(toolkits.OpenNMT, cell=cell, score=score, feed=feed, bridge=bridge)

    def fit(n: Sizes) -> Sizes:
        hidden = n.H + n.H % 2 if bridge else n.H
        return replace(n, H=hidden, D=hidden)

    return Kit(make, weights.opennmt, fit, leaves=LEAVES[cell], dropouts=dropouts)


def joeynmt(cell: str, attention: str, input_feeding: bool = True, init_hidden: str = "bridge") -> Kit:
    options: dict[str, Any] = {"input_feeding": input_feeding, "init_hidden": init_hidden}
    return Kit(
        partial(Joey, cell=cell, attention=attention, **options), partial(weights.joeynmt, **options),
        lambda n: replace(n, D=2 * n.H) if init_hidden == "last" else n, lambda n: [n.D] * n.L, LEAVES[cell],
        "decoder.", ("readout",), ("prefix", "holes"),
    )  # fmt: skip


def tensorflow(cell: str, score: str) -> Kit:
    return Kit(partial(toolkits.TensorflowNMT, cell=cell, score=score), weights.tensorflow_nmt,
               leaves=LEAVES[cell], prefix="v.")  # fmt: skip


def gnmt(cell: str, score: str) -> Kit:
    """One layer more: of two layers at least the upper one reads the context."""
    return Kit(
        partial(toolkits.GNMT, cell=cell, score=score), weights.gnmt, lambda n: replace(n, L=n.L + 1),
        lambda n: [2 * n.H] + [n.H] * (n.L - 1), LEAVES[cell], "v.",
    )  # fmt: skip


def one_layer(n: Sizes) -> Sizes:
    return replace(n, L=1)


LEAVES = {"lstm": 2, "gru": 1}
ANY = ("none", "prefix", "holes")
KITS = {
    "opennmt-dot": opennmt("lstm", "dot"),
    "opennmt-general": opennmt("lstm", "general"),
    "opennmt-mlp": opennmt("lstm", "mlp"),
    "opennmt-general-gru": opennmt("gru", "general"),
    "opennmt-mlp-gru": opennmt("gru", "mlp"),
    "opennmt-general-std": opennmt("lstm", "general", feed=False),
    "opennmt-mlp-std-gru": opennmt("gru", "mlp", feed=False),
    "opennmt-general-bridge": opennmt("lstm", "general", bridge=True),
    "opennmt-mlp-bridge-gru": opennmt("gru", "mlp", bridge=True),
    "fairseq": Kit(toolkits.Fairseq, weights.fairseq, state=lambda n: [n.D] * n.L, masks=ANY,
                   dropouts=("input", "layers", "output")),
    "fairseq-same-size": Kit(toolkits.Fairseq, weights.fairseq, lambda n: replace(n, D=n.H), masks=ANY),
    "joeynmt-bahdanau": joeynmt("lstm", "bahdanau"),
    "joeynmt-luong": joeynmt("lstm", "luong"),
    "joeynmt-bahdanau-gru": joeynmt("gru", "bahdanau"),
    "joeynmt-luong-gru": joeynmt("gru", "luong", init_hidden="zero"),
    "joeynmt-luong-last": joeynmt("lstm", "luong", init_hidden="last"),
    "joeynmt-bahdanau-not-fed": joeynmt("lstm", "bahdanau", input_feeding=False),
    "joeynmt-luong-gru-not-fed": joeynmt("gru", "luong", input_feeding=False, init_hidden="last"),
    "tf-luong": tensorflow("lstm", "luong"),
    "tf-scaled-luong": tensorflow("lstm", "scaled_luong"),
    "tf-bahdanau": tensorflow("lstm", "bahdanau"),
    "tf-normed-bahdanau": tensorflow("lstm", "normed_bahdanau"),
    "tf-scaled-luong-gru": tensorflow("gru", "scaled_luong"),
    "gnmt-normed-bahdanau": gnmt("lstm", "normed_bahdanau"),
    "gnmt-scaled-luong-gru": gnmt("gru", "scaled_luong"),
    "bentrevett": Kit(toolkits.Bentrevett, weights.bentrevett, one_layer, lambda n: [n.D], 1, "", ("input",), ANY),
    "nematus": Kit(toolkits.Nematus, weights.nematus, one_layer, leaves=1, prefix="v.", dropouts=("input",), masks=ANY),
    "bahdanau": Kit(toolkits.Bahdanau, weights.bahdanau, one_layer, lambda n: [n.D], 1, "v.", ("output",), ANY),
    "cho": Kit(toolkits.Cho, weights.cho, one_layer, lambda n: [n.D], 1, "v.", ("output",), ("none",)),
    "luong-local": Kit(toolkits.LuongLocal, weights.luong_local, lambda n: replace(n, A=n.H),
                       dropouts=("layers", "output")),
    "sutskever": Kit(toolkits.Sutskever, weights.sutskever, masks=("none",)),
}  # fmt: skip
SIZES = {
    "several": Sizes(),
    "one": Sizes(B=1, T=1, S=1, I=1, H=1, D=2, A=1, R=1, L=1),
    "odd": Sizes(B=3, T=4, S=11, I=9, H=17, D=26, A=5, R=13, L=1),
    "deep": Sizes(B=2, T=3, S=4, I=6, H=6, D=10, A=8, R=5, L=3),
}


@dataclass
class Problem:
    """A decoder of random weights and what it is asked; all values are fp32's, so that both dtypes see the same."""

    kit: Kit
    sizes: Sizes
    model: nn.Module
    tensors: dict[str, Tensor]  # differentiable: y, memory, h0.<layer>, c0.<layer>, and "w_" with a parameter's name
    mask: Tensor | None
    masks: DropoutMasks
    grads: dict[str, Tensor]  # of the outputs

    @classmethod
    def draw(cls, kit: Kit, sizes: Sizes, mask: str = "none", dropout: bool = False, seed: int = 0) -> "Problem":
        n, g = kit.fit(sizes), torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        model = kit.make(n)
        tensors = {"y": normal(n.B, n.T, n.I), "memory": normal(n.B, n.S, n.D)}
        for index, size in enumerate(kit.state(n)):
            tensors |= {f"{letter}0.{index}": normal(n.B, size) for letter in "hc"[: kit.leaves]}
        for name, value in model.named_parameters():
            tensors[f"w_{name}"] = normal(*value.shape) * max(value.shape, default=1) ** -0.5
        problem = cls(kit, n, model, tensors, draw_mask(mask, n, g), DropoutMasks(), {})
        widths = {name: t.shape[-1] for name, t in problem.toolkit(tensors).items()}
        if dropout:
            problem.masks = draw_masks(kit, n, widths["out"], g)
        problem.grads = {name: normal(*t.shape) for name, t in problem.toolkit(tensors).items()}
        return problem

    def memory(self, t: dict[str, Tensor]) -> Memory:
        layers = range(len(self.kit.state(self.sizes)))
        state: list[LayerState] = [tuple(t[f"{letter}0.{i}"] for letter in "hc"[: self.kit.leaves]) for i in layers]
        return Memory(t["memory"], self.mask, tuple(state))

    def toolkit(self, t: dict[str, Tensor]) -> Results:
        """The toolkit's results of these tensors."""
        params = {name.removeprefix("w_"): value for name, value in t.items() if name.startswith("w_")}
        masks = DropoutMasks(*(m if m is None else m.to(t["y"].dtype) for m in self.masks))
        return torch.func.functional_call(self.model, params, (t["y"], self.memory(t), masks))

    def converted(self, t: dict[str, Tensor]) -> Converted:
        prefix = f"w_{self.kit.prefix}"
        return self.kit.convert({name.removeprefix(prefix): v for name, v in t.items() if name.startswith(prefix)})

    def fastseq(self, t: dict[str, Tensor], fault: Callable[[Converted], Converted] | None = None) -> Results:
        """fastseq's results of these tensors, with a fault planted in the converted decoder where one is given."""
        decoder, memory = self.converted(t), self.memory(t)
        decoder = decoder if fault is None else fault(decoder)
        masks = DropoutMasks(*(m if m is None else m.to(t["y"].dtype) for m in self.masks))
        return named(fastseq.functional.attention_decoder(
            t["y"], decoder.keys(memory), decoder.state(memory), decoder.params(), decoder.spec, dropout_masks=masks,
            need_weights=True,
        ))  # fmt: skip


def named(result: DecoderOutput) -> Results:
    """A decoder's results by the names of `toolkits`."""
    output, state, seen = result
    found = {"out": output} | ({} if seen is None else {"weights": seen})
    for index, layer in enumerate(state.layers):
        found |= {f"{letter}_n.{index}": leaf for letter, leaf in zip("hc", layer, strict=False)}
    return found if state.feed is None else found | {"f_n": state.feed}


def draw_mask(kind: str, n: Sizes, g: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "prefix":
        return torch.arange(n.S) < torch.randint(1, n.S + 1, (n.B, 1), generator=g)
    mask = torch.rand(n.B, n.S, generator=g) < 0.5
    mask[:, n.S // 2] = True
    return mask


def draw_masks(kit: Kit, n: Sizes, output: int, g: torch.Generator) -> DropoutMasks:
    shapes = {"input": (n.B, n.T, n.I), "layers": (n.L - 1, n.B, n.T, n.H), "readout": (n.B, n.T, n.H + n.D),
              "output": (n.B, n.T, output)}  # fmt: skip
    drawn = {name: (torch.rand(shapes[name], generator=g) < 0.5) * 2.0 for name in kit.dropouts}
    return DropoutMasks(**{name: m for name, m in drawn.items() if m.numel()})


Step = Callable[[dict[str, Tensor]], Results]


def run(step: Step, problem: Problem, dtype: torch.dtype) -> Results:
    """Results and every gradient, in this dtype."""
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in problem.tensors.items()}
    outputs = step(leaves)
    assert outputs.keys() == problem.grads.keys()
    grads = [problem.grads[name].to(dtype) for name in outputs]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, materialize_grads=True)
    return {name: o.detach() for name, o in outputs.items()} | dict(
        zip((f"d_{name}" for name in leaves), found, strict=True)
    )


def check_exactly(step: Step, problem: Problem) -> None:
    """In float64."""
    truth = run(problem.toolkit, problem, torch.float64)
    compare(run(step, problem, torch.float64), truth, {name: ROUNDING * largest(t) for name, t in truth.items()})
