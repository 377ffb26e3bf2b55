"""fastseq.LSTM and GRU on every backend against torch.nn in float64: random options, forward and every gradient."""

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from tests.oracle import GATES, Results, Terms, allow, compare

BACKENDS = [name for name, reason in fastseq.backends().items() if reason is None]
KINDS = ("padded", "unbatched", "sorted", "unsorted")  # the last two: packed


@dataclass
class Draw:
    """A torch.nn module with random options and sizes, and what it is called with."""

    module: nn.RNNBase
    x: Tensor
    hx: list[Tensor]  # empty: not given
    lengths: Tensor | None  # packed
    enforce_sorted: bool

    @classmethod
    def random(cls, cell: str, seed: int) -> "Draw":
        r = random.Random(f"{cell}{seed}")
        torch.manual_seed(seed)
        kind = KINDS[seed % len(KINDS)]
        options: dict[str, Any] = {
            name: r.random() < 0.5 for name in ("bias", "batch_first", "bidirectional") if r.random() < 0.8
        }
        options["num_layers"] = r.choice((1, 1, 2, 3))
        hidden = r.choice((8, 15, 16, 17, 33))
        if cell == "lstm" and r.random() < 0.25:
            options["proj_size"] = r.randint(1, hidden - 1)
        module = (nn.LSTM if cell == "lstm" else nn.GRU)(r.randint(1, 20), hidden, **options)
        steps, batch = r.randint(1, 12), r.randint(1, 9)
        lead = (steps,) if kind == "unbatched" else (batch, steps) if module.batch_first else (steps, batch)
        rows = module.num_layers * (1 + module.bidirectional)
        lead_h = (rows,) if kind == "unbatched" else (rows, batch)
        sizes = (module.proj_size or hidden, hidden)[: 2 if cell == "lstm" else 1]
        hx = [torch.randn(*lead_h, size) for size in sizes]
        lengths = torch.randint(1, steps + 1, (batch,)) if kind in ("sorted", "unsorted") else None
        if kind == "sorted" and lengths is not None:
            lengths = lengths.sort(descending=True).values
        x = torch.randn(*lead, module.input_size)
        return cls(module, x, hx if r.random() < 0.6 else [], lengths, kind == "sorted")

    def __str__(self) -> str:
        kind = "padded" if self.lengths is None else "sorted" if self.enforce_sorted else "unsorted"
        return f"{self.module}, {kind} {list(self.x.shape)}, {len(self.hx)} states"


def measure(draw: Draw, module: nn.Module, dtype: torch.dtype = torch.float32) -> Results:
    """Outputs of `module`, and the gradients by input, states and parameters of a fixed random function of them."""
    x = draw.x.to(dtype, copy=True).requires_grad_()
    hx = [t.to(dtype, copy=True).requires_grad_() for t in draw.hx]
    args: tuple[Any, ...] = (x,)
    if draw.lengths is not None:
        args = (pack_padded_sequence(x, draw.lengths, draw.module.batch_first, draw.enforce_sorted),)
    if hx:
        args += (tuple(hx) if isinstance(module, nn.LSTM) else hx[0],)
    out, state = module(*args)
    results = {"out": out.data if isinstance(out, PackedSequence) else out}
    results |= {f"state{k}": s for k, s in enumerate(state if isinstance(state, tuple) else (state,))}
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype)).sum() for t in results.values())
    inputs = {"x": x} | {f"hx{k}": t for k, t in enumerate(hx)} | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(inputs.values()))
    results = {n: t.detach() for n, t in results.items()}
    return results | {f"d_{n}": d for n, d in zip(inputs, grads, strict=True)}


def check_module(cell: str, seed: int, backend: str) -> None:
    """One random module: results as torch.nn's, within the error of torch.nn's own fp32."""
    draw = Draw.random(cell, seed)
    options = {"backend": backend} | ({"proj_size": draw.module.proj_size} if cell == "lstm" else {})

    def build() -> nn.RNNBase:
        return (fastseq.LSTM if cell == "lstm" else fastseq.GRU)(
            draw.module.input_size, draw.module.hidden_size, draw.module.num_layers, draw.module.bias,
            draw.module.batch_first, 0.0, draw.module.bidirectional, **options,
        )  # fmt: skip

    if backend == "cpu" and draw.module.proj_size:
        with pytest.raises(fastseq.InputError, match="proj_size"):
            build()
        return
    ours = build()
    ours.load_state_dict(draw.module.state_dict())
    truth = measure(draw, copy.deepcopy(draw.module).double(), torch.float64)
    stock = measure(draw, draw.module)
    tokens = draw.x[..., 0].numel() if draw.lengths is None else int(draw.lengths.sum())
    hidden = draw.module.hidden_size
    terms = Terms(draw.module.input_size + hidden, GATES[cell] * hidden, tokens)
    compare(measure(draw, ours), truth, allow(truth, [(stock, truth)], torch.float32, terms))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("seed", range(28))
def test_module_against_float64_torch(cell: str, seed: int, backend: str) -> None:
    """All options: num_layers, bias, batch_first, bidirectional, proj_size, packed in any order, states or none."""
    check_module(cell, seed, backend)
