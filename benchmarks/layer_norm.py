"""`python -m benchmarks.layer_norm`: the layer-normalised layer beside what PyTorch has for one, a loop over cells that
call torch.nn.functional.layer_norm. Equality first, then both in turns.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import fastseq

from .calm import MEMORY, Watch
from .machine import describe
from .programs import Program
from .stats import bootstrap, median, quantile
from .timing import Effort, Runnable, interleave

__all__ = ["loop", "main"]

SHAPES = ((8, 128), (32, 256))  # B, H = I
T, TOLERANCE = 50, 1e-4


def loop(module: torch.nn.RNNBase, x: Tensor) -> Tensor:
    """out [T, B, H] of `module`, of one layer, on x [T, B, I]: the products of x at once, then step by step."""
    hidden, p = module.hidden_size, dict(module.named_parameters())
    ax, h = linear(x, p["weight_ih_l0"]), x.new_zeros(x.shape[1], hidden)
    c, outs = h, []
    if module.mode == "LSTM":
        gx = layer_norm(ax, ax.shape[-1:], p["norm_ih_l0"], p["bias_ih_l0"])
    else:
        gx = _of_gru(ax, p["norm_ih_l0"], p["bias_ih_l0"])
    for g in gx.unbind(0):
        ah = linear(h, p["weight_hh_l0"])
        if module.mode == "LSTM":
            i, f, n, o = (g + layer_norm(ah, ah.shape[-1:], p["norm_hh_l0"], p["bias_hh_l0"])).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * n.tanh()
            h = o.sigmoid() * layer_norm(c, c.shape[-1:], p["norm_c_l0"], p["norm_c_bias_l0"]).tanh()
        else:
            (xr, xz, xn), (hr, hz, hn) = g.chunk(3, 1), _of_gru(ah, p["norm_hh_l0"], p["bias_hh_l0"]).chunk(3, 1)
            z = (xz + hz).sigmoid()
            h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
        outs.append(h)
    return torch.stack(outs)


def _of_gru(a: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    sizes = [2 * a.shape[-1] // 3, a.shape[-1] // 3]
    parts = zip(a.split(sizes, -1), gain.split(sizes), bias.split(sizes), strict=True)
    return torch.cat([layer_norm(p, p.shape[-1:], g, b) for p, g, b in parts], -1)


def _step(kind: str, B: int, H: int, ours: bool, train: bool) -> Callable[[], list[Tensor]]:
    """One call, and in training the gradients of everything."""
    torch.manual_seed(1)
    module = getattr(fastseq, kind)(H, H, layer_norm=True, backend="cpu")
    x, seed = torch.randn(T, B, H, requires_grad=train), torch.randn(T, B, H)
    inputs = [x, *module.parameters()]

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = module(x)[0] if ours else loop(module, x)
            return [out, *(torch.autograd.grad(out, inputs, seed) if train else ())]

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_norm", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    watch, found = Watch(MEMORY), []
    print("kind  shape         mode     loop / fastseq  [20 %, 80 %]")
    for (B, H), kind, mode in product(SHAPES, ("LSTM", "GRU"), ("forward", "train")):
        train = mode == "train"
        steps = {name: _step(kind, B, H, name == "fastseq", train) for name in ("loop", "fastseq")}
        for expected, got in zip(*(step() for step in steps.values()), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
        programs = {name: Runnable(Program(step, dict, train, "cpu"), given.threads) for name, step in steps.items()}
        samples = interleave(programs, Effort(seconds=given.seconds), watch.calm)
        ratios = [a / b for a, b in zip(samples.values["loop"], samples.values["fastseq"], strict=True)]
        low, high = quantile(ratios, 0.2), quantile(ratios, 0.8)
        row = {"kind": kind, "B": B, "H": H, "mode": mode, "ratio": median(ratios), "q20": low, "q80": high}
        found.append({**row, "interval": bootstrap(ratios), "calm": samples.calm})
        print(f"{kind:<5} B={B:<3} H={H:<5} {mode:<8} {median(ratios):>12.2f}    [{low:.2f}, {high:.2f}]", flush=True)
    watch.save()
    if given.json:
        command = "python -m benchmarks.layer_norm " + " ".join(sys.argv[1:] if arguments is None else arguments)
        report = {"environment": {**describe(), "command": command}, "rows": found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
