"""Every preset of fastseq.Decoder against the loop that its paper or toolkit would run, forward and every gradient."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import Decoder, DecoderState, Memory
from tests.decoder_loops import LOOPS, Read
from tests.oracle import Results, Terms, allow, compare, nan_in_empty

B, T, S, I, H = 4, 5, 6, 7, 10  # noqa: E741
DRAWS = 8  # a gradient of one element may have a small error by luck alone
# by preset: layers of the decoder, features of the memory, and of each encoder layer's state
SIZES: dict[str, tuple[int, int, list[int]]] = {
    "sutskever": (2, H, [H, H]),
    "cho": (1, 9, [9]),
    "bahdanau": (1, 12, [12]),
    "luong": (2, 12, [H, H]),
    "opennmt": (1, H, [H]),
    "opennmt_mlp": (2, H, [H, H]),
    "fairseq": (2, 14, [14, 14]),
    "joeynmt": (2, 14, [14, 14]),
    "tf_nmt": (1, H, [H]),
    "gnmt": (4, H, [2 * H, H, H, H]),
    "conditional_gru": (1, 12, [12]),
    "bentrevett": (1, 12, [12]),
}


def build(name: str, **options: Any) -> Decoder:
    """The preset, with parameters that are all different from 0."""
    layers, features, _ = SIZES[name]
    if name == "opennmt_mlp":
        options["attention"] = "additive"
    make = getattr(Decoder, name.removesuffix("_mlp"))
    return make(I, H, layers, memory_size=features, **options)


@dataclass
class Problem:
    """A decoder's inputs by name, the mask of its memory, and the gradients of its results."""

    name: str
    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    mask: Tensor
    grads: dict[str, Tensor]

    @classmethod
    def draw(cls, name: str, seed: int = 0) -> "Problem":
        torch.manual_seed(seed)
        decoder = build(name)
        _, features, states = SIZES[name]
        inputs = {"y": torch.randn(B, T, I), "out": torch.randn(B, S, features)}
        for layer, size in enumerate(states):
            for leaf in ("h", "c") if decoder.spec.cell == "lstm" else ("h",):
                inputs[f"{leaf}0.{layer}"] = torch.randn(B, size)
        mask = torch.rand(B, S) < 0.6
        mask[1] = False  # a row with nothing to attend to
        parameters = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in decoder.named_parameters()}
        problem = cls(name, parameters, inputs, mask, {})
        problem.grads = {n: torch.randn(t.shape) for n, t in problem.by_loop(torch.float64, False).items()}
        return problem

    def memory(self) -> Memory:
        """What a module reads."""
        x, layers = self.inputs, range(len(SIZES[self.name][2]))
        state = tuple(tuple(x[f"{leaf}0.{k}"] for leaf in "hc" if f"{leaf}0.{k}" in x) for k in layers)
        return Memory(x["out"], self.mask, state)

    def by_loop(self, dtype: torch.dtype, gradients: bool = True) -> Results:
        """What the plain loop gives in `dtype`."""
        p, x = ({n: t.to(dtype).requires_grad_() for n, t in ts.items()} for ts in (self.parameters, self.inputs))
        layers = range(len(SIZES[self.name][2]))
        state = [[x[f"{leaf}0.{k}"] for leaf in "hc" if f"{leaf}0.{k}" in x] for k in layers]
        out = torch.where(self.mask[..., None], x["out"], 0.0)
        found = LOOPS[self.name](p, x["y"], Read(out, self.mask, state))
        results = named(found.out, found.weights, DecoderState(tuple(map(tuple, found.states)), found.feed))
        return self._with_gradients(results, p, x) if gradients else results

    def by_module(self, decoder: Decoder, dtype: torch.dtype) -> Results:
        """What the module gives in `dtype`; what stands behind the mask is NaN."""
        decoder.to(dtype).load_state_dict({n: t.to(dtype) for n, t in self.parameters.items()})
        x = {n: t.to(dtype) for n, t in self.inputs.items()}
        if decoder.attention is not None:
            x["out"] = torch.where(self.mask[..., None], x["out"], torch.nan)
        x = {n: t.requires_grad_() for n, t in x.items()}
        layers = range(len(SIZES[self.name][2]))
        state = tuple(tuple(x[f"{leaf}0.{k}"] for leaf in "hc" if f"{leaf}0.{k}" in x) for k in layers)
        output, last, weights = decoder(x["y"], Memory(x["out"], self.mask, state), need_weights=True)
        assert all(leaf.dtype == torch.float32 for layer in last.layers for leaf in layer)
        return self._with_gradients(named(output, weights, last), dict(decoder.named_parameters()), x)

    def _with_gradients(self, results: Results, p: dict[str, Tensor], x: dict[str, Tensor]) -> Results:
        leaves = {f"d_weight {n}": t for n, t in p.items()} | {f"d_{n}": t for n, t in x.items()}
        grads = [self.grads[n].to(t.dtype) for n, t in results.items()]
        found = torch.autograd.grad(list(results.values()), list(leaves.values()), grads, materialize_grads=True)
        return {n: t.detach() for n, t in results.items()} | dict(zip(leaves, found, strict=True))


def named(out: Tensor, weights: Tensor | None, state: DecoderState) -> Results:
    results = {"out": out} | ({} if weights is None else {"weights": weights})
    for k, layer in enumerate(state.layers):
        results |= {f"{leaf}_n.{k}": t for leaf, t in zip("hc", layer, strict=False)}
    return results if state.feed is None else results | {"f_n": state.feed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_presets(name: str, dtype: torch.dtype) -> None:
    """Outputs, weights, last states and every gradient, within twice the plain loop's own error and two roundings."""
    problem, truth, allowed = budget(name, dtype)
    with nan_in_empty():
        got = problem.by_module(build(name), dtype)
    compare(got, truth, allowed)
    if "weights" in got:
        assert not got["d_out"][~problem.mask].any()
        assert not got["weights"][1].any()


def budget(name: str, dtype: torch.dtype) -> tuple[Problem, Results, dict[str, float]]:
    """A problem whose values `dtype` has, its truth, and by how much each result may differ from it."""
    problem = Problem.draw(name)
    rounded = Problem(name, *({n: t.to(dtype).float() for n, t in ts.items()} for ts in
                              (problem.parameters, problem.inputs)), problem.mask,
                      {n: t.to(dtype).float() for n, t in problem.grads.items()})  # fmt: skip
    truth = rounded.by_loop(torch.float64)
    pairs = [(rounded.by_loop(dtype), truth)]
    for seed in range(1, DRAWS):
        other = Problem.draw(name, seed)
        pairs.append((other.by_loop(dtype), other.by_loop(torch.float64)))
    layers, features, _ = SIZES[name]
    terms = Terms(I + 2 * H + features + S, layers * 4 * H + features + S, B * T)
    return rounded, truth, allow(truth, pairs, dtype, terms)


@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_the_whole(name: str) -> None:
    """T calls of `step` from prepare and init_state give what `forward` gives; beside bf16 the state is in fp32."""
    problem = Problem.draw(name)
    decoder = build(name)
    for dtype in (torch.float32, torch.bfloat16):
        decoder.to(dtype)
        x = {n: t.to(dtype) for n, t in problem.inputs.items()}
        state = tuple(tuple(x[f"{leaf}0.{k}"] for leaf in "hc" if f"{leaf}0.{k}" in x)
                      for k in range(len(SIZES[name][2])))  # fmt: skip
        memory = Memory(x["out"], problem.mask, state)
        whole = decoder(x["y"], memory, need_weights=True)
        keys, at = decoder.prepare(memory), decoder.init_state(memory)
        outputs, weights = [], []
        for t in range(T):
            output, at, seen = decoder.step(x["y"][:, t], keys, at, need_weights=True)
            outputs.append(output)
            weights.append(seen)
        seen = None if whole.weights is None else torch.stack(weights, 1)
        roundings = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        close(fastseq.DecoderOutput(torch.stack(outputs, 1), at, seen), whole, roundings)
        again = decoder(x["y"], keys, decoder.init_state(memory), need_weights=True)
        close(again, whole)


@pytest.mark.parametrize("name", LOOPS)
def test_beams_read_the_keys_of_their_row(name: str) -> None:
    """N = B * k rows against B keys: row n is row n // k; in `step` and in `forward`."""
    problem, decoder, k = Problem.draw(name), build(name), 3
    x = problem.inputs
    state = tuple(tuple(x[f"{leaf}0.{j}"] for leaf in "hc" if f"{leaf}0.{j}" in x) for j in range(len(SIZES[name][2])))
    memory = Memory(x["out"], problem.mask, state)
    y = torch.randn(B * k, T, I)
    many = decoder(y, memory, need_weights=True)
    for beam in range(k):
        one = decoder(y[beam::k], memory, need_weights=True)
        close(one, take(many, slice(beam, None, k)))
    keys, first = decoder.prepare(memory), decoder.init_state(memory)
    wide = take(first, torch.arange(B).repeat_interleave(k))
    stepped = decoder.step(y[:, 0], keys, wide)
    close(stepped.output, many.output[:, 0])


def take(tree: Any, rows: Any) -> Any:
    """These rows of every tensor."""
    if isinstance(tree, tuple):
        parts = [take(t, rows) for t in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree if tree is None else tree[rows]


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
